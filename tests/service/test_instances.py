"""Two processes of one key: a lease is its process's, and the other one can end nothing of it."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from auth.tokens import RunnerIdentity
from broker.errors import LeaseLost
from broker.runners.liveness import Liveness
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, code_of, open_fleet

MakeSettings = Callable[..., Settings]


async def restarted(runner: Runner) -> Runner:
    """Return another process of a runner, which has registered."""
    other = replace(runner, instance_id=uuid4(), token="")
    assert (await other.register()).status_code == 200
    return other


async def resume(runner: Runner, run_id: str) -> httpx.Response:
    """Ask for a run that the runner holds."""
    return await runner.post(f"/api/queue/{run_id}/resume", {})


async def sign_off(runner: Runner) -> list[str]:
    """Sign off; return what was handed back."""
    answer = await runner.fleet.http.delete("/api/runners/me", headers=runner.headers)
    assert answer.status_code == 200
    return answer.json()["released"]


async def restarted_with_a_job(fleet: Fleet) -> tuple[Runner, dict[str, Any], Runner]:
    """Return a process with a job, the job, and the process that started after it."""
    old = await fleet.sign_on()
    await fleet.enqueue()
    job = await old.take()
    return old, job, await restarted(old)


async def two_jobs(fleet: Fleet) -> tuple[Runner, dict[str, Any], Runner, dict[str, Any]]:
    """Return two processes of one key, in the order they started, with a lease each."""
    old = await fleet.sign_on(max_leases=3)
    for _ in range(2):
        await fleet.enqueue()
    theirs = await old.take()
    new = await restarted(old)
    return old, theirs, new, await new.take()


@pytest.mark.gen_test
async def test_the_old_process_signs_off_and_the_new_ones_result_is_accepted(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        old, theirs, new, job = await two_jobs(fleet)
        assert await sign_off(old) == [theirs["run_id"]]
        assert (await fleet.pool.fetchval("SELECT status FROM runners")) != "DEAD"
        assert (await new.heartbeat(job)).status_code == 200
        answer = await new.submit(job)
        assert answer.status_code == 201, answer.text


@pytest.mark.gen_test
async def test_the_old_process_hands_back_and_fails_nothing_of_the_new_one(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        old, _, new, job = await two_jobs(fleet)
        # It learns the lease_id when it renews its token, which makes it no newer process.
        assert (await new.heartbeat(job)).status_code == 200
        renewed = await old.register()
        shown = {each["run_id"]: each["this_process"] for each in renewed.json()["held_leases"]}
        assert shown[job["run_id"]] is False
        for answer in (await old.release(job), await old.fail(job)):
            assert code_of(answer) == (409, "lease_lost")
            assert f"POST /api/queue/{job['run_id']}/resume" in answer.json()["detail"]
        assert (await new.heartbeat(job)).status_code == 200


@pytest.mark.parametrize("verb", ["release", "fail"])
@pytest.mark.gen_test
async def test_after_a_restart_the_new_process_hands_back_what_it_finds(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, verb: str
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        _, job, new = await restarted_with_a_job(fleet)
        assert (await getattr(new, verb)(job)).status_code == 200


@pytest.mark.gen_test
async def test_a_new_process_hands_back_nothing_that_another_still_beats_for(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        old, job, new = await restarted_with_a_job(fleet)
        assert (await old.heartbeat(job)).status_code == 200
        assert code_of(await new.release(job)) == (409, "lease_lost")
        assert (await old.submit(job)).status_code == 201


@pytest.mark.gen_test
async def test_a_process_that_beats_for_a_lease_holds_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        old, job, new = await restarted_with_a_job(fleet)
        assert (await new.heartbeat(job)).status_code == 200
        assert await sign_off(old) == []
        assert (await new.submit(job)).status_code == 201


@pytest.mark.gen_test
async def test_a_process_that_lost_its_job_resumes_it_and_the_old_one_is_fenced_off(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        old, job, new = await restarted_with_a_job(fleet)
        answer = await resume(new, job["run_id"])
        assert answer.status_code == 200, answer.text
        again = answer.json()
        changed = {"lease_id", "lease_expires_at", "server_time"}
        assert {k: v for k, v in again.items() if k not in changed} == {
            k: v for k, v in job.items() if k not in changed
        }
        assert again["lease_id"] != job["lease_id"]
        # Sent again, as the answer may be lost: nothing changes.
        assert (await resume(new, job["run_id"])).json()["lease_id"] == again["lease_id"]
        assert code_of(await old.heartbeat(job)) == (409, "lease_lost")
        assert code_of(await old.submit(job)) == (409, "lease_lost")
        assert await sign_off(old) == []
        assert (await new.submit(again)).status_code == 201
        (entry,) = await fleet.ledger(job["run_id"])
        assert (str(entry["lease_id"]), entry["how"]) == (again["lease_id"], "completed")
        trail = (await fleet.admin("GET", f"/audit?run_id={job['run_id']}")).json()["rows"]
        (taken,) = [each for each in trail if each["action"] == "lease.resume"]
        assert taken["detail"]["from"] == str(old.instance_id)
        assert taken["detail"]["instance_id"] == str(new.instance_id)


@pytest.mark.gen_test
async def test_what_is_not_held_is_not_resumed_and_nothing_else_is_granted(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        one, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        await fleet.enqueue()
        job = await one.take()
        pending = await fleet.enqueue()
        assert code_of(await resume(other, job["run_id"])) == (409, "lease_lost")
        assert code_of(await resume(one, pending)) == (409, "lease_lost")
        assert code_of(await resume(one, str(uuid4()))) == (404, "not_found")
        assert (await fleet.row(pending))["status"] == "PENDING"
        assert (await one.submit(job)).status_code == 201
        assert code_of(await resume(one, job["run_id"])) == (409, "run_finished")
        await fleet.revoke(other)
        assert code_of(await resume(other, pending)) == (403, "key_revoked")


@pytest.mark.gen_test
async def test_a_token_that_signed_off_resumes_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        old, _, new, job = await two_jobs(fleet)
        await sign_off(old)
        (ended,) = await fleet.pool.fetchval("SELECT ended_tokens FROM runner_keys")
        in_another_process = RunnerIdentity(
            old.runner_id, old.fingerprint, old.instance_id, ended, datetime.now(UTC)
        )
        with pytest.raises(LeaseLost):
            await fleet.services.claims.resume(in_another_process, UUID(job["run_id"]))
        assert (await new.heartbeat(job)).status_code == 200


@pytest.mark.gen_test
async def test_two_live_processes_of_one_key_are_shown_and_logged_once(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        old = await fleet.sign_on()
        alive = Liveness(fleet.pool, fleet.services.settings)

        async def seen_after(*processes: Runner) -> bool:
            for each in processes:
                alive.saw(each.runner_id, each.instance_id)
            await alive.run_once()
            page = (await fleet.admin("GET", "/runners/runner-a")).json()
            return page["second_process_seen_at"] is not None

        alive.saw(old.runner_id, old.instance_id)  # before the restart: no second process
        new = await restarted(old)
        assert not await seen_after(new)
        await fleet.pool.execute("UPDATE runners SET started_at = started_at - interval '1 minute'")
        assert await seen_after(old, new)
        assert await seen_after(old)
        assert capsys.readouterr().out.count("runner.two_processes") == 1
