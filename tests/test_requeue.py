"""Requeue: an admin puts a run that ended without a result back into the queue."""

from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from config.settings import Settings
from db import run_queue
from sandbox.sigstore_instance import ThrowawaySigstore
from tests.fleet import code_of, open_fleet, quiet_sweep
from tests.test_steering import audited, lapse, requeue, run_status

MakeSettings = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_sweep(monkeypatch)


@pytest.mark.gen_test
async def test_a_failed_run_that_is_requeued_is_as_if_it_had_never_been_tried(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_attempts=1)
        await runner.fail(await runner.take())
        assert (await fleet.row(run_id))["status"] == "FAILED"
        async with fleet.rings() as heard:
            answer = await requeue(fleet, run_id)
            await heard.get()
        assert (answer.status_code, answer.json()["status"]) == (200, "PENDING")
        row = await fleet.row(run_id)
        assert (row["status"], row["attempt_count"]) == ("PENDING", 0)
        assert (row["retry_after"], row["completed_at"], row["error_detail"]) == (None, None, None)
        assert (row["claimed_by"], row["started_at"]) == (None, None)
        assert await run_status(fleet, run_id) == "incomplete"
        (told,) = await audited(fleet, "queue.requeue")
        assert (told["actor"], str(told["run_id"])) == ("admin:test", run_id)
        assert told["detail"]["reason"] == "try again"
        job = await runner.take()
        assert (job["run_id"], job["attempt"]) == (run_id, 2)
        assert [attempt["how"] for attempt in job["previous_attempts"]] == ["failed"]


@pytest.mark.gen_test
async def test_a_cancelled_run_that_is_requeued_is_no_longer_cancelled(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        await fleet.cancel(run_id)
        assert (await requeue(fleet, run_id)).json()["status"] == "PENDING"
        row = await fleet.row(run_id)
        assert (row["cancel_requested_at"], row["cancel_reason"]) == (None, None)
        job = await runner.take()
        assert (await runner.heartbeat(job)).json()["directive"] == "continue"
        assert (await runner.release(job)).json()["status"] == "PENDING"


@pytest.mark.gen_test
async def test_a_run_that_somebody_works_on_or_that_has_a_result_is_not_requeued(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        assert code_of(await requeue(fleet, run_id)) == (409, "conflict")
        await runner.heartbeat(job)
        assert code_of(await requeue(fleet, run_id)) == (409, "conflict")
        assert (await runner.submit(job)).status_code == 201
        assert code_of(await requeue(fleet, run_id)) == (409, "run_finished")
        assert (await fleet.row(run_id))["status"] == "COMPLETE"
        assert await audited(fleet, "queue.requeue") == []


@pytest.mark.gen_test
async def test_a_requeue_leaves_a_pending_run_and_its_history_as_they_are(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        await lapse(fleet, runner, run_id)
        before = await fleet.row(run_id)
        answer = await requeue(fleet, run_id)
        assert (answer.status_code, answer.json()["status"]) == (200, "PENDING")
        assert await fleet.row(run_id) == before
        assert before["attempt_count"] == 1


@pytest.mark.gen_test
async def test_the_lease_of_before_a_requeue_cannot_submit(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_attempts=1)
        job = await lapse(fleet, runner, run_id)
        assert code_of(await runner.submit(job)) == (409, "run_finished")
        assert (await requeue(fleet, run_id)).status_code == 200
        assert code_of(await runner.submit(job)) == (409, "lease_lost")
        assert (await fleet.row(run_id))["status"] == "PENDING"
        assert (await runner.submit(await runner.take())).status_code == 201


@pytest.mark.gen_test
async def test_a_run_that_fails_while_it_is_looked_at_is_requeued_all_the_same(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_attempts=1)
        await runner.take()
        await fleet.overdue(run_id)
        look = run_queue.find

        async def sweep_first(*arguments: Any) -> asyncpg.Record | None:
            await fleet.sweep()
            return await look(*arguments)

        monkeypatch.setattr(run_queue, "find", sweep_first)
        assert (await requeue(fleet, run_id)).json()["status"] == "PENDING"
        assert (await fleet.row(run_id))["status"] == "PENDING"
