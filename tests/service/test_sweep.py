"""Lapses: the sweep ends overdue leases, and no others."""

import asyncio
import uuid
from collections.abc import Callable

import pytest

from broker.leases import sweep
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, code_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]


async def lapse(fleet: Fleet, run_id: str) -> None:
    """Let a run's lease lapse."""
    await fleet.overdue(run_id)
    assert await fleet.sweep() == 1


@pytest.mark.gen_test
async def test_one_pass_ends_the_leases_behind_their_deadline_and_leaves_the_others(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=3)
        run_ids = [await fleet.enqueue() for _ in range(3)]
        jobs = [await runner.take() for _ in run_ids]
        await runner.heartbeat(jobs[0])
        for run_id, offset_s in zip(run_ids, (-1, 0, 60), strict=True):
            await fleet.pool.execute(
                "UPDATE run_queue SET lease_expires_at = clock_timestamp()"
                " + $2 * interval '1 second' WHERE run_id = $1",
                run_id,
                offset_s,
            )
        assert await fleet.sweep() == 2
        rows = [await fleet.row(run_id) for run_id in run_ids]
        assert [row["status"] for row in rows] == ["PENDING", "PENDING", "CLAIMED"]
        assert [row["attempt_count"] for row in rows] == [1, 1, 0]
        assert await fleet.sweep() == 0


@pytest.mark.gen_test
async def test_a_lapsed_run_is_claimable_at_once_and_the_attempt_is_on_record(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        await runner.heartbeat(job, progress={"done": 4})
        await lapse(fleet, run_id)
        row = await fleet.row(run_id)
        assert (row["status"], row["attempt_count"]) == ("PENDING", 1)
        assert (row["retry_after"], row["priority"]) == (None, 100)
        assert (row["lease_expires_at"], row["lease_slot"], row["claim_key"]) == (None, None, None)
        assert (str(row["lease_id"]), row["claimed_by"]) == (job["lease_id"], "runner-a")
        # Nobody holds it, so nobody is shown to; the ledger has who did.
        for shown in (
            (await fleet.admin("GET", f"/queue/{run_id}")).json(),
            (await fleet.admin("GET", "/queue")).json()["runs"][0],
        ):
            assert (shown["claimed_by"], shown["claimed_at"]) == (None, None)
            assert (shown["lease_seq"], shown["attempt_count"]) == (1, 1)
        (attempt,) = await fleet.ledger(run_id)
        assert (attempt["how"], attempt["progress"]) == ("lapsed", {"done": 4})
        assert attempt["started_at"] <= attempt["last_heartbeat"] <= attempt["ended_at"]
        audit = await fleet.pool.fetchrow("SELECT * FROM audit WHERE action = 'lease.lapse'")
        assert audit is not None
        assert (str(audit["run_id"]), audit["actor"]) == (run_id, "system")
        assert audit["detail"] == {"lease_seq": 1, "status": "PENDING"}
        # Its slot is free as well: the very same runner may have it again.
        again = await runner.take()
        assert (again["run_id"], again["attempt"]) == (run_id, 2)


@pytest.mark.gen_test
async def test_a_late_result_counts_until_somebody_else_has_claimed_the_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        unclaimed = await fleet.enqueue()
        job = await runner.take()
        await lapse(fleet, unclaimed)
        assert (await runner.submit(job)).status_code == 201
        assert (await fleet.row(unclaimed))["status"] == "COMPLETE"
        (attempt,) = await fleet.ledger(unclaimed)
        assert attempt["how"] == "completed"

        reclaimed = await fleet.enqueue()
        job = await runner.take()
        await lapse(fleet, reclaimed)
        assert (await other.take())["run_id"] == reclaimed
        assert code_of(await runner.submit(job)) == (409, "lease_lost")
        assert (await fleet.row(reclaimed))["status"] == "CLAIMED"


@pytest.mark.gen_test
async def test_a_run_fails_for_good_when_its_attempts_are_used_up(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_attempts=2, priority=1)
        bystander = await fleet.enqueue(not_before="2999-01-01T00:00:00Z")
        status = "SELECT run_status FROM runs WHERE run_id = $1"
        await runner.take()
        await lapse(fleet, run_id)
        assert (await fleet.row(run_id))["status"] == "PENDING"
        assert await fleet.pool.fetchval(status, run_id) != "failed"
        await runner.take()
        await lapse(fleet, run_id)
        row = await fleet.row(run_id)
        assert (row["status"], row["attempt_count"]) == ("FAILED", 2)
        assert row["completed_at"] is not None
        assert row["error_detail"] == "its last lease lapsed"
        assert await fleet.pool.fetchval(status, run_id) == "failed"
        assert await fleet.pool.fetchval(status, bystander) != "failed"
        assert [a["how"] for a in await fleet.ledger(run_id)] == ["lapsed", "lapsed"]
        assert (await runner.claim()).status_code == 204


@pytest.mark.gen_test
async def test_a_run_cancelled_under_a_silent_runner_ends_as_cancelled(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_attempts=1)
        job = await runner.take()
        await fleet.cancel(run_id)
        assert (await fleet.row(run_id))["status"] == "CLAIMED"
        await lapse(fleet, run_id)
        row = await fleet.row(run_id)
        assert (row["status"], row["attempt_count"], row["lease_id"]) == ("CANCELLED", 0, None)
        assert row["completed_at"] is not None
        assert [a["how"] for a in await fleet.ledger(run_id)] == ["cancelled"]
        assert code_of(await runner.submit(job)) == (409, "run_finished")


@pytest.mark.gen_test
async def test_a_pass_goes_on_until_no_overdue_lease_is_left(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    monkeypatch.setattr(sweep, "BATCH", 2)
    async with open_fleet(make_settings(), sigstore) as fleet:
        # As many again live on, or the breaker would hold: half of all at once is our own fault.
        runner = await fleet.sign_on(max_leases=10)
        for _ in range(10):
            await fleet.enqueue()
        jobs = [await runner.take() for _ in range(10)]
        for job in jobs[:5]:
            await fleet.overdue(job["run_id"])
        assert await fleet.sweep() == 5


@pytest.mark.gen_test
async def test_two_sweeps_at_once_end_each_lease_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=12)
        for _ in range(12):
            await fleet.enqueue()
        jobs = [await runner.take() for _ in range(12)]
        for job in jobs[:6]:
            await fleet.overdue(job["run_id"])
        assert sum(await asyncio.gather(fleet.sweep(), fleet.sweep())) == 6
        counts = "SELECT sum(attempt_count), max(attempt_count) FROM run_queue"
        assert tuple(await fleet.pool.fetchrow(counts) or ()) == (6, 1)


@pytest.mark.gen_test
async def test_a_lease_that_is_being_renewed_is_passed_over_and_not_waited_for(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        renewed, silent = await fleet.enqueue(), await fleet.enqueue()
        for _ in range(2):
            await fleet.overdue((await runner.take())["run_id"])
        async with fleet.transaction() as connection:
            await connection.execute(
                "UPDATE run_queue SET lease_expires_at = clock_timestamp() + interval '1 minute'"
                " WHERE run_id = $1",
                renewed,
            )
            assert await fleet.sweep() == 1
        assert await fleet.sweep() == 0
        assert (await fleet.row(renewed))["status"] == "CLAIMED"
        assert (await fleet.row(silent))["status"] == "PENDING"


@pytest.mark.gen_test
async def test_rows_of_bakeoffs_own_local_runner_never_lapse(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_id = await fleet.enqueue()
        await fleet.pool.execute(
            "INSERT INTO run_queue (queue_id, run_id, status, lease_slot, lease_expires_at)"
            " VALUES ($1, $2, 'IN_PROGRESS', 1, '2000-01-01Z')",
            uuid.uuid4(),
            run_id,
        )
        assert await fleet.sweep() == 0
