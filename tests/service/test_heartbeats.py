"""Heartbeats: what keeps a lease, and what a runner hears when it is no longer its own."""

import asyncio
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
import redis.asyncio

from broker.leases.heartbeats import Heartbeats
from broker.leases.lease_keys import LeaseKeys
from config.settings import Settings
from db.run_queue import Beat
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, about, code_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]


async def age(fleet: Fleet, run_id: str, seconds: int) -> None:
    """Let a run have been claimed so many seconds earlier."""
    await fleet.pool.execute(
        "UPDATE run_queue SET claimed_at = claimed_at - $2 * interval '1 second' WHERE run_id = $1",
        run_id,
        seconds,
    )


def said(answer: httpx.Response) -> dict[str, Any]:
    """Return a refusal without what names the request."""
    return {k: v for k, v in answer.json().items() if k not in ("request_id", "server_time")}


@pytest.mark.gen_test
async def test_the_first_heartbeat_starts_the_run_and_each_one_renews_the_lease(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        assert (await fleet.row(run_id))["started_at"] is None
        answer = await runner.heartbeat(job, progress={"done": 1, "total": 5, "note": "warm"})
        assert answer.status_code == 200
        body = answer.json()
        assert set(body) == {
            "lease_expires_at", "lease_ttl_s", "heartbeat_interval_s", "directive", "server_time",
        }  # fmt: skip
        assert (body["directive"], body["lease_ttl_s"], body["heartbeat_interval_s"]) == (
            "continue", 300, 30,
        )  # fmt: skip
        first = await fleet.row(run_id)
        assert first["status"] == "IN_PROGRESS"
        assert first["progress"] == {"done": 1, "total": 5, "note": "warm"}
        assert first["lease_expires_at"] - first["last_heartbeat"] == about(300)
        await runner.heartbeat(job)
        second = await fleet.row(run_id)
        assert second["started_at"] == first["started_at"]
        assert second["lease_expires_at"] > first["lease_expires_at"]
        assert second["progress"] == first["progress"]  # kept by a beat that has none


@pytest.mark.gen_test
async def test_a_lease_that_is_not_yours_and_one_that_is_lost_are_the_same_answer(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        run_id = await fleet.enqueue()
        job = await runner.take()
        wrong = await runner.heartbeat({**job, "lease_id": str(uuid.uuid4())})
        stolen = await other.heartbeat(job)
        assert code_of(wrong) == (409, "lease_lost")
        await runner.release(job)
        lost = await runner.heartbeat(job)
        assert said(wrong) == said(stolen) == said(lost)
        row = await fleet.row(run_id)
        assert (row["status"], row["last_heartbeat"]) == ("PENDING", None)
        assert code_of(await runner.heartbeat({**job, "run_id": str(uuid.uuid4())})) == (
            404, "not_found",
        )  # fmt: skip


@pytest.mark.gen_test
async def test_an_old_lease_of_ones_own_is_lost_too(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        old = await runner.take()
        await runner.release(old)
        new = await runner.take()
        assert code_of(await runner.heartbeat(old)) == (409, "lease_lost")
        assert (await runner.heartbeat(new)).status_code == 200


@pytest.mark.gen_test
async def test_a_finished_run_says_so(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue(max_attempts=1)
        failed = await runner.take()
        await runner.fail(failed)
        await fleet.enqueue()
        complete = await runner.take()
        assert (await runner.submit(complete)).status_code == 201
        for job in (failed, complete):
            assert code_of(await runner.heartbeat(job)) == (409, "run_finished")


@pytest.mark.gen_test
async def test_an_overdue_lease_lives_on_if_the_sweep_has_not_ended_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        await fleet.overdue(run_id)
        assert (await runner.heartbeat(job)).json()["directive"] == "continue"
        row = await fleet.row(run_id)
        assert (row["status"], row["attempt_count"]) == ("IN_PROGRESS", 0)
        assert row["lease_expires_at"] - row["last_heartbeat"] == about(300)


@pytest.mark.gen_test
async def test_a_lapsed_lease_is_lost_though_its_secret_is_kept(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        await fleet.overdue(run_id)
        assert await fleet.sweep() == 1
        assert code_of(await runner.heartbeat(job)) == (409, "lease_lost")
        row = await fleet.row(run_id)
        assert (row["status"], str(row["lease_id"])) == ("PENDING", job["lease_id"])


@pytest.mark.gen_test
async def test_no_heartbeat_carries_a_lease_beyond_the_longest_runtime(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(max_runtime_s=2000), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        own = await fleet.enqueue(max_runtime_s=1000)
        default = await fleet.enqueue()
        jobs = [await runner.take(), await runner.take()]
        await age(fleet, own, 900)
        await age(fleet, default, 1900)
        for job in jobs:
            assert (await runner.heartbeat(job)).status_code == 200
        for run_id, longest in ((own, 1000), (default, 2000)):
            row = await fleet.row(run_id)
            assert row["lease_expires_at"] - row["claimed_at"] == timedelta(seconds=longest)
        await age(fleet, own, 200)
        await runner.heartbeat(jobs[0])
        # The next sweep ends it, however often it beats.
        assert await fleet.sweep() == 1
        assert code_of(await runner.heartbeat(jobs[0])) == (409, "lease_lost")


@pytest.mark.gen_test
async def test_a_heartbeat_hears_of_a_cancel_and_how_long_it_may_take(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        await fleet.cancel(run_id, "superseded")
        body = (await runner.heartbeat(job)).json()
        assert (body["directive"], body["reason"]) == ("cancel", "superseded")
        assert 290 <= body["grace_s"] <= 300
        await runner.release(job)
        row = await fleet.row(run_id)
        assert (row["status"], row["attempt_count"]) == ("CANCELLED", 0)
        assert [attempt["how"] for attempt in await fleet.ledger(run_id)] == ["cancelled"]
        assert code_of(await runner.heartbeat(job)) == (409, "run_finished")


@pytest.mark.gen_test
async def test_the_key_must_be_good(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        before = await fleet.row(run_id)
        # The leases stay, so that only the guard on the key itself can refuse.
        for change in ("not_after = clock_timestamp()", "revoked_at = now(), not_after = NULL"):
            await fleet.pool.execute(f"UPDATE runner_keys SET {change}")
            assert code_of(await runner.heartbeat(job)) == (403, "key_revoked")
        assert await fleet.row(run_id) == before


@pytest.mark.gen_test
async def test_a_batch_answers_each_lease_for_itself(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(max_leases=3), await fleet.sign_on("runner-b")
        for _ in range(3):
            await fleet.enqueue()
        live, cancelled = await runner.take(), await runner.take()
        theirs = await other.take()
        await fleet.cancel(cancelled["run_id"])
        unknown = {"run_id": str(uuid.uuid4()), "lease_id": str(uuid.uuid4())}
        sent = [live, theirs, cancelled, unknown, live]
        body = [{name: job[name] for name in ("run_id", "lease_id")} for job in sent]
        answer = await runner.post("/api/queue/heartbeats", {"heartbeats": body})
        assert answer.status_code == 200
        outcomes = answer.json()["heartbeats"]
        assert [outcome["run_id"] for outcome in outcomes] == [job["run_id"] for job in sent]
        assert [o.get("directive") or o["code"] for o in outcomes] == [
            "continue", "lease_lost", "cancel", "not_found", "continue",
        ]  # fmt: skip
        assert outcomes[0]["lease_ttl_s"] == 300
        # The fifth is the first one's duplicate: renewed once, answered twice.
        assert outcomes[0] == outcomes[4]


@pytest.mark.gen_test
async def test_the_same_heartbeat_sent_twice_at_once_is_answered_twice(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        answers = await asyncio.gather(*(runner.heartbeat(job) for _ in range(5)))
        assert [answer.status_code for answer in answers] == [200] * 5


@pytest.mark.gen_test
async def test_the_lease_key_in_redis_lives_as_long_as_the_lease_and_a_little_more(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    client = redis.asyncio.from_url(settings.redis_lease_url)
    async with open_fleet(settings, sigstore) as fleet, client:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_runtime_s=100)
        job = await runner.take()
        row = await fleet.row(run_id)
        name = f"lease:{row['queue_id']}:1"
        keys = LeaseKeys(client)
        await client.delete(name)
        await Heartbeats(
            fleet.pool, settings, keys, fleet.services.telemetry, fleet.services.cadence
        ).beat(beat_of(runner, job))
        await keys.flush()
        # 100 s, not the TTL of 300 s: the deadline's cap counts here as well.
        assert 95_000 < await client.pttl(name) <= 100_250
        await runner.release(job)
        assert await gone(client, name)


@pytest.mark.gen_test
async def test_progress_that_does_not_fit_the_contract_is_refused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    bad: dict[str, Any] = {
        "/progress/note": {"note": "x" * 201},
        "/progress/done": {"done": -1},
        "/progress/percent": {"percent": 3},
    }
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        for pointer, progress in bad.items():
            answer = await runner.heartbeat(job, progress=progress)
            assert code_of(answer) == (422, "invalid_request")
            assert [e["pointer"] for e in answer.json()["errors"]] == [pointer]
        missing = await runner.post(f"/api/queue/{job['run_id']}/heartbeat", {})
        assert code_of(missing) == (422, "invalid_request")
        assert (await runner.heartbeat(job, progress={"note": "x" * 200})).status_code == 200


def beat_of(runner: Runner, job: dict[str, Any]) -> Beat:
    """Return a job's heartbeat as the broker takes it."""
    run_id, lease_id = uuid.UUID(job["run_id"]), uuid.UUID(job["lease_id"])
    return Beat(run_id, lease_id, runner.runner_id, runner.fingerprint, runner.instance_id, None)


async def gone(client: redis.asyncio.Redis, name: str) -> bool:
    """Wait until a key is gone: it is dropped behind the answer."""
    async with asyncio.timeout(10):
        while await client.exists(name):  # noqa: ASYNC110 (another process does it)
            await asyncio.sleep(0.005)
    return True


@pytest.mark.gen_test
async def test_a_small_fleets_leases_are_short_and_a_large_ones_are_stretched(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(lease_ttl_min_s=60, heartbeat_interval_min_s=10)
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        assert (job["lease_ttl_s"], job["heartbeat_interval_s"]) == (60, 10)
        fleet.services.cadence.count(100_000)
        beat = (await runner.heartbeat(job)).json()
        assert (beat["lease_ttl_s"], beat["heartbeat_interval_s"]) == (300, 30)
        row = await fleet.row(run_id)
        assert row["lease_expires_at"] - row["last_heartbeat"] == about(300)
