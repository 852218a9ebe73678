"""Steering: poison and pause by the sweep; pause, resume and drain by an admin."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, code_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_sweep(monkeypatch)


async def lapse(fleet: Fleet, runner: Runner, run_id: str) -> dict[str, Any]:
    """Let a runner claim a run, which must be its next one, and fall silent; return the job."""
    job = await runner.take()
    assert job["run_id"] == run_id
    await fleet.overdue(run_id)
    assert await fleet.sweep() == 1
    return job


async def fall_silent(fleet: Fleet, runner: Runner, *priorities: int) -> None:
    """Let a runner lapse once on a new run of each priority; lower ones are claimed first."""
    for priority in priorities:
        await lapse(fleet, runner, await fleet.enqueue(priority=priority))


async def fleet_of(fleet: Fleet, *names: str) -> list[Runner]:
    """Sign runners on."""
    return [await fleet.sign_on(name) for name in names]


async def run_status(fleet: Fleet, run_id: str) -> str:
    """Return what upstream's own table says of a run."""
    return await fleet.pool.fetchval("SELECT run_status FROM runs WHERE run_id = $1", run_id)


async def steer(fleet: Fleet, verb: str, name: str = "runner-a", **body: Any) -> httpx.Response:
    """Pause, resume or drain a runner."""
    return await fleet.admin("POST", f"/runners/{name}/{verb}", json=body)


async def requeue(fleet: Fleet, run_id: str) -> httpx.Response:
    """Put a run back."""
    return await fleet.admin("POST", f"/queue/{run_id}/requeue", json={"reason": "try again"})


async def audited(fleet: Fleet, action: str) -> list[asyncpg.Record]:
    """Return the audit's rows of an action."""
    return await fleet.pool.fetch("SELECT * FROM audit WHERE action = $1 ORDER BY audit_id", action)


@pytest.mark.gen_test
async def test_a_run_on_which_three_different_runners_fell_silent_is_failed_as_poison(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        first, second, third = await fleet_of(fleet, "runner-a", "runner-b", "runner-c")
        run_id = await fleet.enqueue(max_attempts=10)
        await lapse(fleet, first, run_id)
        await lapse(fleet, second, run_id)
        assert (await fleet.row(run_id))["status"] == "PENDING"
        assert await run_status(fleet, run_id) != "failed"
        await lapse(fleet, third, run_id)
        row = await fleet.row(run_id)
        assert (row["status"], row["attempt_count"]) == ("FAILED", 3)
        assert row["error_detail"].startswith("poison_suspected")
        assert row["completed_at"] is not None
        assert await run_status(fleet, run_id) == "failed"
        assert (await audited(fleet, "lease.lapse"))[-1]["detail"]["status"] == "FAILED"
        shown = (await fleet.admin("GET", f"/queue/{run_id}")).json()
        assert shown["error_detail"].startswith("poison_suspected")
        assert (await first.claim()).status_code == 204


@pytest.mark.gen_test
@pytest.mark.parametrize("turns", ["aaaa", "abab"])
async def test_fewer_than_three_different_runners_are_no_proof_of_poison(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, turns: str
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        first, second = await fleet_of(fleet, "runner-a", "runner-b")
        run_id = await fleet.enqueue(max_attempts=10)
        for turn in turns:
            await lapse(fleet, first if turn == "a" else second, run_id)
        row = await fleet.row(run_id)
        assert (row["status"], row["attempt_count"]) == ("PENDING", 4)


@pytest.mark.gen_test
async def test_only_lapses_make_poison_and_not_failures_or_releases(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        first, second, third = await fleet_of(fleet, "runner-a", "runner-b", "runner-c")
        run_id = await fleet.enqueue(max_attempts=10)
        await second.fail(await second.take())
        await third.release(await third.take())
        await lapse(fleet, first, run_id)
        assert (await fleet.row(run_id))["status"] == "PENDING"


@pytest.mark.gen_test
async def test_after_a_requeue_the_search_for_poison_starts_anew(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runners = await fleet_of(fleet, "runner-a", "runner-b", "runner-c")
        run_id = await fleet.enqueue(max_attempts=10)
        for runner in runners:
            await lapse(fleet, runner, run_id)
        assert (await requeue(fleet, run_id)).status_code == 200
        for runner in runners[:2]:
            await lapse(fleet, runner, run_id)
            assert (await fleet.row(run_id))["status"] == "PENDING"
        await lapse(fleet, runners[2], run_id)
        assert (await fleet.row(run_id))["status"] == "FAILED"


@pytest.mark.gen_test
async def test_a_runner_that_lapses_on_three_runs_in_a_row_is_paused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet_of(fleet, "runner-a", "runner-b")
        await fall_silent(fleet, runner, 9, 8)
        await fall_silent(fleet, other, 7)
        assert await audited(fleet, "runner.pause") == []
        await fall_silent(fleet, runner, 6)
        refused = await runner.claim()
        assert code_of(refused) == (403, "runner_paused")
        assert "three leases in a row lapsed" in refused.json()["detail"]
        (row,) = await audited(fleet, "runner.pause")
        assert (row["actor"], row["runner_id"]) == ("system", "runner-a")
        assert (await fleet.admin("GET", "/runners/runner-a")).json()["state"] == "paused"
        # The fault is the runner's own, so nobody else pays for it.
        assert (await other.claim()).status_code == 200


@pytest.mark.gen_test
async def test_three_leases_that_lapse_in_one_pass_pause_their_runner(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=3)
        for run_id in [await fleet.enqueue() for _ in range(3)]:
            await runner.take()
            await fleet.overdue(run_id)
        assert await fleet.sweep() == 3
        assert code_of(await runner.claim()) == (403, "runner_paused")


@pytest.mark.gen_test
@pytest.mark.parametrize("ending", ["submitted", "released", "failed", "late"])
async def test_a_lease_that_ended_otherwise_breaks_the_row_of_lapses(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, ending: str
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fall_silent(fleet, runner, 9)
        run_id = await fleet.enqueue(priority=8)
        # "late": it lapsed as well, but its result came after all.
        job = await (lapse(fleet, runner, run_id) if ending == "late" else runner.take())
        verbs = {"released": runner.release, "failed": runner.fail}
        assert (await verbs.get(ending, runner.submit)(job)).is_success
        await fall_silent(fleet, runner, 7, 6)
        await fleet.enqueue()
        assert (await runner.claim()).status_code == 200


async def fail_on(fleet: Fleet, runner: Runner, *priorities: int) -> None:
    """Let a runner fail once on a new run of each priority; lower ones are claimed first."""
    for priority in priorities:
        run_id = await fleet.enqueue(priority=priority)
        job = await runner.take()
        assert job["run_id"] == run_id
        assert (await runner.fail(job, "load_failure")).status_code == 200


@pytest.mark.gen_test
async def test_a_runner_that_fails_three_runs_in_a_row_is_paused_for_a_while(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet_of(fleet, "runner-a", "runner-b")
        await fail_on(fleet, runner, 9, 8)
        await fail_on(fleet, other, 7)
        assert await audited(fleet, "runner.pause") == []
        await fail_on(fleet, runner, 6)
        await fleet.enqueue(priority=5)
        refused = await runner.claim()
        assert code_of(refused) == (403, "runner_paused")
        assert "load_failure" in refused.json()["detail"]
        (row,) = await audited(fleet, "runner.pause")
        assert (row["actor"], row["runner_id"]) == ("system", "runner-a")
        shown = (await fleet.admin("GET", "/runners/runner-a")).json()
        assert (shown["state"], shown["paused_until"] is None) == ("paused", False)
        # The fault is the runner's own, so nobody else pays for it.
        assert (await other.claim()).status_code == 200


@pytest.mark.gen_test
async def test_a_failing_runner_comes_back_by_itself_and_one_failure_pauses_it_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fail_on(fleet, runner, 9, 8, 7)
        over = "UPDATE runners SET paused_until = clock_timestamp() WHERE runner_id = 'runner-a'"
        await fleet.pool.execute(over)
        await fail_on(fleet, runner, 6)
        assert code_of(await runner.claim()) == (403, "runner_paused")
        assert len(await audited(fleet, "runner.pause")) == 2


@pytest.mark.gen_test
async def test_after_a_resume_the_failures_are_counted_anew(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fail_on(fleet, runner, 9, 8, 7)
        await steer(fleet, "resume")
        await fail_on(fleet, runner, 6, 5)
        assert len(await audited(fleet, "runner.pause")) == 1
        await fail_on(fleet, runner, 4)
        assert len(await audited(fleet, "runner.pause")) == 2


@pytest.mark.gen_test
async def test_failures_of_one_run_are_not_three_different_ones(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue(max_attempts=10)
        for _ in range(4):
            assert (await runner.fail(await runner.take())).status_code == 200
        assert (await runner.claim()).status_code == 200


@pytest.mark.gen_test
async def test_a_result_breaks_the_row_of_failures(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fail_on(fleet, runner, 9, 8)
        await fleet.enqueue(priority=7)
        assert (await runner.submit(await runner.take())).is_success
        await fail_on(fleet, runner, 6, 5)
        await fleet.enqueue()
        assert (await runner.claim()).status_code == 200


@pytest.mark.gen_test
async def test_a_runner_that_hands_ten_leases_back_in_a_row_is_paused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue(priority=9)
        for _ in range(8):
            assert (await runner.release(await runner.take())).is_success
        done = await fleet.enqueue(priority=1)
        assert (await runner.submit(await runner.take())).is_success
        for _ in range(9):
            assert (await runner.release(await runner.take())).is_success
        assert (await fleet.row(done))["status"] == "COMPLETE"
        assert await audited(fleet, "runner.pause") == []
        assert (await runner.release(await runner.take())).is_success
        refused = await runner.claim()
        assert code_of(refused) == (403, "runner_paused")
        assert "ten leases in a row were handed back" in refused.json()["detail"]


@pytest.mark.gen_test
async def test_a_runner_whose_bundles_are_refused_ten_times_is_paused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        for refusals in (9, 9):
            await fleet.enqueue()
            job = await runner.take()
            bad = {**runner.bundle(job), "signature.sigstore.json": b"{}"}
            for _ in range(refusals):
                assert not (await runner.submit(job, bad)).is_success
            assert (await runner.submit(job)).is_success
            assert await audited(fleet, "runner.pause") == []
        await fleet.enqueue()
        job = await runner.take()
        for _ in range(10):
            assert not (await runner.submit(job, {**bad})).is_success
        (row,) = await audited(fleet, "runner.pause")
        assert row["detail"]["reason"] == "ten bundles in a row were refused"
        # What it holds it may still finish.
        assert (await runner.submit(job)).is_success
        assert code_of(await runner.claim()) == (403, "runner_paused")


@pytest.mark.gen_test
async def test_lapses_on_the_same_runs_again_are_not_three_different_ones(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        early = await fleet.enqueue(priority=9, max_attempts=10)
        for _ in range(3):
            await lapse(fleet, runner, early)
        await fall_silent(fleet, runner, 8)
        assert (await runner.claim()).status_code == 200


@pytest.mark.gen_test
async def test_a_resumed_runner_may_claim_and_is_given_three_new_lapses(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fall_silent(fleet, runner, 9, 8, 7)
        assert code_of(await runner.claim()) == (403, "runner_paused")
        assert (await steer(fleet, "resume")).json()["state"] == "idle"
        await fall_silent(fleet, runner, 6, 5)
        await runner.release(await runner.take())
        await fall_silent(fleet, runner, 4, 3, 2)
        assert code_of(await runner.claim()) == (403, "runner_paused")


@pytest.mark.gen_test
async def test_a_paused_runner_may_finish_what_it_holds(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        await fleet.enqueue()
        job = await runner.take()
        assert (await steer(fleet, "pause", reason="it smells")).status_code == 200
        await fleet.enqueue()
        refused = await runner.claim()
        assert code_of(refused) == (403, "runner_paused")
        assert "it smells" in refused.json()["detail"]
        assert (await runner.heartbeat(job)).json()["directive"] == "continue"
        assert (await runner.submit(job)).status_code == 201


@pytest.mark.gen_test
async def test_a_pause_may_end_by_itself(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        until = datetime.now(UTC) + timedelta(hours=1)
        paused = (await steer(fleet, "pause", reason="hot", until=until.isoformat())).json()
        assert paused["state"] == "paused"
        assert datetime.fromisoformat(paused["paused_until"]) == until
        assert code_of(await runner.claim()) == (403, "runner_paused")
        me = await fleet.http.get("/api/runners/me", headers=runner.headers)
        assert me.json()["paused"] is True
        await fleet.pool.execute("UPDATE runners SET paused_until = now()")  # the hour is over
        shown = (await fleet.admin("GET", "/runners/runner-a")).json()
        assert shown["state"] == "idle"
        assert (await runner.claim()).status_code == 200
        for name, wrong in (("gone by", "2026-01-01T00:00:00Z"), ("no time", "noon")):
            refused = await steer(fleet, "pause", reason="hot", until=wrong)
            assert code_of(refused) == (422, "invalid_request"), name
            assert refused.json()["errors"][0]["pointer"] == "/until", name


@pytest.mark.gen_test
async def test_an_admin_pauses_resumes_and_drains_and_each_is_audited(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet_of(fleet, "runner-a", "runner-b")
        paused = (await steer(fleet, "pause", reason="it smells")).json()
        assert (paused["state"], paused["pause_reason"]) == ("paused", "it smells")
        resumed = (await steer(fleet, "resume", reason="aired")).json()
        assert (resumed["state"], resumed["paused_at"], resumed["pause_reason"]) == (
            "idle", None, None,
        )  # fmt: skip
        drained = (await steer(fleet, "drain", reason="moving house")).json()
        assert drained["state"] == "draining"
        again = (await steer(fleet, "drain")).json()
        assert again["drain_requested_at"] == drained["drain_requested_at"]
        listed = (await fleet.admin("GET", "/runners")).json()["runners"]
        assert [(r["runner_id"], r["state"]) for r in listed] == [
            ("runner-a", "draining"), ("runner-b", "idle"),
        ]  # fmt: skip
        rows = [row for verb in ("pause", "resume", "drain")
                for row in await audited(fleet, f"runner.{verb}")]  # fmt: skip
        assert [row["detail"].get("reason") for row in rows] == [
            "it smells", "aired", "moving house", None,
        ]  # fmt: skip
        assert {(row["actor"], row["runner_id"]) for row in rows} == {("admin:test", "runner-a")}


@pytest.mark.gen_test
async def test_what_cannot_be_steered_is_refused_and_leaves_no_trace(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.admit()  # on the allowlist, but never registered
        await fleet.pool.execute(
            "INSERT INTO runners (runner_id, public_key) VALUES ('bakeoffs-own', '')"
        )
        for name in ("runner-a", "bakeoffs-own", "nobody"):
            for verb, body in (("pause", {"reason": "x"}), ("resume", {}), ("drain", {})):
                assert code_of(await steer(fleet, verb, name, **body)) == (404, "not_found")
            shown = await fleet.admin("GET", f"/runners/{name}")
            assert code_of(shown) == (404, "not_found")
        assert code_of(await steer(fleet, "pause")) == (422, "invalid_request")
        assert code_of(await steer(fleet, "drain", until="noon")) == (422, "invalid_request")
        unknown = await requeue(fleet, "00000000-0000-4000-8000-000000000000")
        assert code_of(unknown) == (404, "not_found")
        traces = "SELECT count(*) FROM audit WHERE action ~ '(pause|resume|drain|requeue)'"
        assert await fleet.pool.fetchval(traces) == 0


@pytest.mark.gen_test
async def test_a_draining_runner_is_told_so_and_gets_nothing_new_until_it_is_resumed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(max_leases=2), await fleet.sign_on("runner-b")
        for _ in range(3):
            await fleet.enqueue()
        job = await runner.take()
        await steer(fleet, "drain")
        beat = (await runner.heartbeat(job)).json()
        assert (beat["directive"], bool(beat["reason"])) == ("drain", True)
        assert "grace_s" not in beat
        assert (await runner.claim()).status_code == 204
        told = (await runner.claim(explain=True)).json()["reasons"]
        assert [(reason["code"], reason["count"]) for reason in told] == [("draining", 2)]
        assert (await other.heartbeat(await other.take())).json()["directive"] == "continue"
        assert (await runner.release(job)).status_code == 200
        nothing = await runner.claim()
        assert nothing.status_code == 204
        assert int(nothing.headers["Retry-After"]) > 0
        async with fleet.rings() as heard:
            await steer(fleet, "resume")
            await heard.get()  # its parked claims look again
        job = await runner.take()
        assert (await runner.heartbeat(job)).json()["directive"] == "continue"
