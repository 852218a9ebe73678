"""Requeue: an admin puts a run that ended without a result back into the queue."""

from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from config.settings import Settings
from db import run_queue
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_steering import audited, lapse, requeue, run_status
from tests.support.fleet import SIGNER, Runner, code_of, open_fleet, quiet_sweep
from tests.support.result_factory import bundle_files, result_for

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


async def submit_nothing(runner: Runner, job: dict[str, Any], status: str) -> None:
    """Hand in a result without a record, which completes the run."""
    result = result_for(job["run_id"], job, run_status=status)
    result["records"] = []
    unsigned = bundle_files(result, b"")
    files = bundle_files(result, runner.fleet.sigstore.sign(unsigned["result.json"], SIGNER))
    answer = await runner.submit(job, files)
    assert answer.status_code == 201, answer.text


@pytest.mark.gen_test
@pytest.mark.parametrize("status", ["incomplete", "failed"])
async def test_a_run_whose_result_is_not_whole_is_run_again_under_another_id(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, status: str
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        await submit_nothing(runner, job, status)
        answer = await requeue(fleet, run_id)
        assert answer.status_code == 200, answer.text
        new_run_id = answer.json()["new_run_id"]
        assert (answer.json()["run_id"], answer.json()["status"]) == (run_id, "COMPLETE")
        # What was accepted stays, with its bytes, and counts no more.
        shown = (await fleet.admin("GET", f"/results/{run_id}")).json()
        assert shown["state"] == "superseded"
        assert new_run_id in str(shown)
        again = await runner.take()
        assert again["run_id"] == new_run_id
        assert again["config"]["run"].pop("name") == new_run_id
        assert job["config"]["run"].pop("name") == run_id
        same = ("tasks", "prompts", "config", "config_hash", "model")
        assert {name: again[name] for name in same} == {name: job[name] for name in same}
        again["config"]["run"]["name"] = new_run_id
        answer = await runner.submit(again)
        assert answer.status_code == 201, answer.text
        assert code_of(await requeue(fleet, new_run_id)) == (409, "run_finished")
        assert code_of(await requeue(fleet, run_id)) == (409, "conflict")
        (told,) = await audited(fleet, "queue.requeue")
        assert told["detail"]["new_run_id"] == new_run_id


@pytest.mark.gen_test
async def test_three_results_without_a_measurement_pause_the_runner(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        for _ in range(4):
            await fleet.enqueue()
        for _ in range(3):
            await submit_nothing(runner, await runner.take(), "incomplete")
        answer = await runner.claim()
        assert code_of(answer) == (403, "runner_paused")
        assert "no measurement" in answer.json()["detail"]


@pytest.mark.gen_test
async def test_what_a_runner_failed_is_put_back_in_one_request(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        bad, other = await fleet.sign_on("bad"), await fleet.sign_on("other")
        failed = [await fleet.enqueue(max_attempts=attempts) for attempts in (1, 3)]
        for _ in failed:
            await bad.fail(await bad.take(), retry_after_s=86_400)
        others = await fleet.enqueue(max_attempts=1)
        await other.fail(await other.take())
        body = {"failed_by": "bad", "within_s": 3600, "reason": "its disk was broken"}
        answer = await fleet.admin("POST", "/queue/requeue", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["requeued"] == failed
        for run_id in failed:
            row = await fleet.row(run_id)
            assert (row["status"], row["attempt_count"]) == ("PENDING", 0)
            assert row["retry_after"] is None
        assert (await fleet.row(others))["status"] == "FAILED"
        assert len(await audited(fleet, "queue.requeue")) == 2
        # Sent again, there is nothing left to undo.
        again = await fleet.admin("POST", "/queue/requeue", json=body)
        assert again.json()["requeued"] == []
        # What another failed since is not undone, nor what was too long ago.
        await other.fail(await other.take())
        assert (await fleet.admin("POST", "/queue/requeue", json=body)).json()["requeued"] == []
        await fleet.pool.execute(
            "UPDATE attempts SET claimed_at = claimed_at - interval '1 day',"
            " ended_at = ended_at - interval '1 day'"
        )
        theirs = {**body, "failed_by": "other"}
        assert (await fleet.admin("POST", "/queue/requeue", json=theirs)).json()["requeued"] == []
        wrong = await fleet.admin("POST", "/queue/requeue", json={**body, "within_s": 0})
        assert code_of(wrong) == (422, "invalid_request")
