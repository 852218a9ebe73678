"""Release, fail and sign off: a lease handed back before its time."""

import asyncio
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from config.settings import Settings
from db import run_queue
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, about, code_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]
FREE = ("lease_id", "lease_key", "lease_expires_at", "lease_slot", "claim_key", "claimed_by")


def body_of(answer: httpx.Response) -> dict[str, Any]:
    """Return an accepted request's answer without its time."""
    assert answer.status_code == 200, answer.text
    return {name: value for name, value in answer.json().items() if name != "server_time"}


async def assert_free(fleet: Fleet, run_id: str, status: str) -> None:
    """A run that nobody holds keeps nothing of its last lease."""
    row = await fleet.row(run_id)
    assert row["status"] == status
    assert [row[name] for name in FREE] == [None] * len(FREE)


async def run_status(fleet: Fleet, run_id: str) -> str | None:
    """Return upstream's own status of a run."""
    return await fleet.pool.fetchval("SELECT run_status FROM runs WHERE run_id = $1", run_id)


@pytest.mark.gen_test
async def test_a_release_burns_no_attempt_and_the_run_is_claimable_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        await runner.heartbeat(job, progress={"done": 2})
        first = body_of(await runner.release(job))
        assert first == {"status": "PENDING"}
        await assert_free(fleet, run_id, "PENDING")
        row = await fleet.row(run_id)
        assert (row["attempt_count"], row["priority"], row["retry_after"]) == (0, 100, None)
        (attempt,) = await fleet.ledger(run_id)
        assert (attempt["how"], attempt["detail"]) == ("released", "test")
        assert attempt["progress"] == {"done": 2}
        assert attempt["started_at"] <= attempt["last_heartbeat"] <= attempt["ended_at"]
        again = await runner.take()
        assert again["attempt"] == 2
        # Sent again, a release is answered the same, and ends nothing else.
        assert body_of(await runner.release(job)) == first
        assert (await fleet.row(run_id))["status"] == "CLAIMED"


@pytest.mark.gen_test
async def test_a_failure_counts_waits_longer_each_time_and_goes_further_back(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_attempts=3)
        bystander = await fleet.enqueue(not_before="2999-01-01T00:00:00Z")
        waited = []
        for n in (1, 2):
            job = await runner.take()
            answer = body_of(await runner.fail(job, "oom"))
            assert (answer["status"], answer["attempt_count"]) == ("PENDING", n)
            row = await fleet.row(run_id)
            assert datetime.fromisoformat(answer["retry_after"]) == row["retry_after"]
            waited.append(row["retry_after"] - row["updated_at"])
            await assert_free(fleet, run_id, "PENDING")
            assert await run_status(fleet, run_id) != "failed"
            assert (await runner.claim()).status_code == 204
            due = "UPDATE run_queue SET retry_after = NULL WHERE run_id = $1"
            await fleet.pool.execute(due, run_id)
        assert waited == [about(300), about(600)]
        assert (await fleet.row(run_id))["priority"] == 100 + 5 + 10
        job = await runner.take()
        assert body_of(await runner.fail(job, "timeout")) == {
            "status": "FAILED", "attempt_count": 3, "retry_after": None,
        }  # fmt: skip
        await assert_free(fleet, run_id, "FAILED")
        row = await fleet.row(run_id)
        assert (row["priority"], row["error_detail"]) == (115, "timeout: test")
        assert row["completed_at"] is not None
        assert await run_status(fleet, run_id) == "failed"
        assert await run_status(fleet, bystander) != "failed"
        ledger = await fleet.ledger(run_id)
        assert [(a["how"], a["failure_code"], a["detail"]) for a in ledger] == [
            ("failed", "oom", "test"), ("failed", "oom", "test"), ("failed", "timeout", "test"),
        ]  # fmt: skip
        assert (await runner.claim()).status_code == 204


@pytest.mark.gen_test
async def test_a_failure_that_is_sent_again_gets_the_same_answer_and_counts_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        first = body_of(await runner.fail(job))
        assert body_of(await runner.fail(job)) == first
        assert (await fleet.row(run_id))["attempt_count"] == 1
        # But a lease ended by a failure was not released.
        assert code_of(await runner.release(job)) == (409, "lease_lost")


@pytest.mark.gen_test
async def test_a_runners_wish_delays_the_run_for_that_runner_and_for_nobody_else(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        answer = body_of(await runner.fail(await runner.take(), retry_after_s=86400))
        row = await fleet.row(run_id)
        assert row["retry_after"] - row["updated_at"] == about(0)
        assert answer["status"] == "PENDING"
        assert (await runner.claim()).status_code == 204
        (why,) = (await runner.claim(explain=True)).json()["reasons"]
        assert (why["code"], why["count"]) == ("failed_here", 1)
        assert "asked to wait until" in why["detail"]
        other = await fleet.sign_on("runner-b")
        assert (await other.take())["run_id"] == run_id


@pytest.mark.gen_test
async def test_a_wish_ends_by_itself_and_by_a_requeue(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        await runner.fail(await runner.take(), retry_after_s=86400)
        await fleet.pool.execute("UPDATE run_deferrals SET until = clock_timestamp()")
        await runner.fail(await runner.take(), retry_after_s=86400)
        assert (await runner.claim()).status_code == 204
        await fleet.cancel(run_id)
        body = {"reason": "the disk was full"}
        assert (await fleet.admin("POST", f"/queue/{run_id}/requeue", json=body)).is_success
        assert (await runner.take())["run_id"] == run_id


@pytest.mark.gen_test
@pytest.mark.parametrize("other_is", ["idle", "small", "paused", "draining", "dead", "revoked"])
async def test_a_run_goes_to_another_that_fits_before_it_comes_back_to_who_failed_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, other_is: str
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        runner = await fleet.sign_on()
        caps = {"capability_caps": {"vram_gb": 1}} if other_is == "small" else {}
        other = await fleet.sign_on("runner-b", **caps)
        run_id = await fleet.enqueue()
        await runner.fail(await runner.take())
        if other_is == "paused":
            await fleet.admin("POST", "/runners/runner-b/pause", json={"reason": "test"})
        elif other_is == "draining":
            await fleet.admin("POST", "/runners/runner-b/drain", json={})
        elif other_is == "dead":
            await fleet.pool.execute(
                "UPDATE runners SET status = 'DEAD' WHERE runner_id = 'runner-b'"
            )
        elif other_is == "revoked":
            await fleet.revoke(other)
        if other_is == "idle":
            assert (await runner.claim()).status_code == 204
            (why,) = (await runner.claim(explain=True)).json()["reasons"]
            assert (why["code"], why["count"]) == ("failed_here", 1)
            await other.fail(await other.take())  # it has failed on both: neither is better
        assert (await runner.take())["run_id"] == run_id


@pytest.mark.gen_test
async def test_a_runner_that_avoids_a_run_is_served_beside_one_of_the_same_kind_that_does_not(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        failed = await fleet.enqueue(priority=1)
        await runner.fail(await runner.take())
        fresh = await fleet.enqueue(priority=50)
        rows = await run_queue.claim(
            fleet.pool,
            [runner.claimant("k-a"), other.claimant("k-b")],
            ttl=timedelta(seconds=60), max_leases=1, max_runtime_s=86_400,
        )  # fmt: skip
        assert [str(row["run_id"]) for row in rows] == [fresh, failed]


@pytest.mark.gen_test
async def test_what_a_model_does_is_a_result_and_no_failure(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        for code in ("refusal", "malformed_output", "capability_gap"):
            answer = await runner.fail(job, code)
            assert code_of(answer) == (422, "invalid_request")
            assert "submit it in result.json" in answer.json()["detail"]
            assert answer.json()["errors"][0]["pointer"] == "/failure_code"
        assert code_of(await runner.fail(job, "fire")) == (422, "invalid_request")
        assert (await fleet.row(run_id))["status"] == "CLAIMED"


@pytest.mark.gen_test
async def test_only_the_live_lease_of_the_runner_itself_can_be_handed_back(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        run_id = await fleet.enqueue()
        job = await runner.take()
        before = await fleet.row(run_id)
        wrong = {**job, "lease_id": str(uuid.uuid4())}
        unknown = {**job, "run_id": str(uuid.uuid4())}
        for verb in ("release", "fail"):
            assert code_of(await getattr(other, verb)(job)) == (409, "lease_lost")
            assert code_of(await getattr(runner, verb)(wrong)) == (409, "lease_lost")
            assert code_of(await getattr(runner, verb)(unknown)) == (404, "not_found")
        assert await fleet.row(run_id) == before
        await fleet.overdue(run_id)
        await fleet.sweep()
        lapsed = await fleet.row(run_id)
        for verb in ("release", "fail"):
            assert code_of(await getattr(runner, verb)(job)) == (409, "lease_lost")
        assert await fleet.row(run_id) == lapsed


@pytest.mark.gen_test
async def test_a_revoked_key_hands_nothing_back(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        before = await fleet.row(run_id)
        # The lease stays, so that only the guard on the key itself can refuse.
        await fleet.pool.execute("UPDATE runner_keys SET revoked_at = now()")
        assert code_of(await runner.release(job)) == (403, "key_revoked")
        assert code_of(await runner.fail(job)) == (403, "key_revoked")
        assert await fleet.row(run_id) == before


@pytest.mark.gen_test
async def test_handing_back_a_finished_run_says_so(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        assert (await runner.submit(job)).status_code == 201
        for verb in (runner.release, runner.fail):
            assert code_of(await verb(job)) == (409, "run_finished")


@pytest.mark.gen_test
async def test_a_failure_of_a_run_that_was_to_be_cancelled_cancels_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_attempts=1)
        job = await runner.take()
        await fleet.cancel(run_id)
        answer = body_of(await runner.fail(job))
        assert answer == {"status": "CANCELLED", "attempt_count": 0, "retry_after": None}
        assert body_of(await runner.fail(job)) == answer
        await assert_free(fleet, run_id, "CANCELLED")
        (attempt,) = await fleet.ledger(run_id)
        assert attempt["how"] == "cancelled"
        assert await run_status(fleet, run_id) != "failed"


@pytest.mark.gen_test
async def test_signing_off_releases_every_lease_and_ends_the_token(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(max_leases=2), await fleet.sign_on("runner-b")
        run_ids = [await fleet.enqueue(), await fleet.enqueue()]
        jobs = [await runner.take(), await runner.take()]
        assert await sign_off(runner) == {"runner_id": "runner-a", "released": run_ids}
        for run_id in run_ids:
            await assert_free(fleet, run_id, "PENDING")
            assert [attempt["how"] for attempt in await fleet.ledger(run_id)] == ["released"]
        assert code_of(await runner.heartbeat(jobs[0])) == (401, "invalid_token")
        assert (await other.take())["run_id"] == run_ids[0]
        status = "SELECT status FROM runners WHERE runner_id = 'runner-a'"
        assert await fleet.pool.fetchval(status) == "DEAD"
        # One that fell silent is DEAD as well, and stale.
        assert (await fleet.admin("GET", "/runners/runner-a")).json()["state"] == "signed_off"
        await runner.register()
        assert await fleet.pool.fetchval(status) == "IDLE"
        assert (await runner.take())["run_id"] == run_ids[1]


@pytest.mark.gen_test
async def test_signing_off_beside_a_lapse_still_succeeds(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease it meant to release may have ended by itself a moment before."""
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        run_ids = [await fleet.enqueue(), await fleet.enqueue()]
        for _ in run_ids:
            await runner.take()
        async with fleet.transaction() as connection:
            await fleet.overdue(run_ids[0])
            await run_queue.lapse(connection, 1)
            signing_off = asyncio.create_task(sign_off(runner))
            await fleet.until_blocked()
        assert (await signing_off)["released"] == [run_ids[1]]
        assert [each["how"] for each in await fleet.ledger(run_ids[0])] == ["lapsed"]


async def sign_off(runner: Any) -> dict[str, Any]:
    """Sign a runner off and return the answer."""
    return body_of(await runner.fleet.http.delete("/api/runners/me", headers=runner.headers))
