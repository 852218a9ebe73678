"""Learned VRAM needs: raised by `oom`, lowered by a peak, listed and forgotten by admins."""

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, code_of, model_of, open_fleet
from tests.support.result_factory import result_for

MakeSettings = Callable[..., Settings]
NEEDS_20 = model_of(16, "q8_0")  # by the rule: 16 x 1.063 x 1.15, rounded up


async def machine(fleet: Fleet, name: str, vram_gb: int, **key: Any) -> Runner:
    """Return a registered runner of this VRAM."""
    runner = await fleet.admit(name, **key)
    runner.capabilities = {"vram_gb": vram_gb, "quantizations": ["q8_0"]}
    assert (await runner.register()).is_success
    return runner


async def learned(fleet: Fleet) -> list[tuple[int, int]]:
    """Return the rule's and the learned need of each model of which more was learned."""
    models = (await fleet.admin("GET", "/model-needs")).json()["models"]
    return [(each["rule_gb"], each["need_gb"]) for each in models]


async def hand_in(runner: Runner, job: dict[str, Any], peak_vram_mb: int) -> None:
    """Submit a result in which every cell took so much video memory."""
    records = result_for(job["run_id"], job)["records"]
    for record in records:
        record["peak_vram_mb"] = peak_vram_mb
    assert (await runner.submit(job, runner.bundle(job, records=records))).is_success


async def run_out_of_memory(fleet: Fleet, runner: Runner) -> str:
    """Let a runner fail a new run of the model with `oom`; return the run_id."""
    run_id = await fleet.enqueue(model=NEEDS_20, max_attempts=10)
    assert (await runner.fail(await runner.take(), "oom")).status_code == 200
    return run_id


@pytest.mark.gen_test
async def test_an_oom_raises_the_need_above_the_vram_that_failed_and_a_result_lowers_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        small, large = await machine(fleet, "small", 24), await machine(fleet, "large", 48)
        run_id = await run_out_of_memory(fleet, small)
        assert await learned(fleet) == [(20, 25)]
        assert (await fleet.admin("GET", f"/queue/{run_id}")).json()["need_gb"] == 25
        another = await machine(fleet, "another", 24)
        (why,) = (await another.claim(explain=True)).json()["reasons"]
        assert (why["code"], why["detail"]) == ("vram", "needs 25 GB, you offer 24")
        job = await large.take()
        await hand_in(large, job, 22 * 1024 - 7)
        assert await learned(fleet) == [(20, 22)]
        await fleet.enqueue(model=NEEDS_20)
        assert (await another.claim()).status_code == 200


@pytest.mark.gen_test
async def test_only_oom_teaches(make_settings: MakeSettings, sigstore: ThrowawaySigstore) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        runner = await machine(fleet, "runner-a", 24)
        await fleet.enqueue(model=NEEDS_20)
        await runner.fail(await runner.take(), "load_failure")
        assert await learned(fleet) == []


@pytest.mark.gen_test
async def test_a_large_machine_that_runs_out_of_memory_teaches_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        await run_out_of_memory(fleet, await machine(fleet, "large", 40))
        assert await learned(fleet) == []
        await run_out_of_memory(fleet, await machine(fleet, "medium", 39))
        assert await learned(fleet) == [(20, 40)]


@pytest.mark.gen_test
async def test_a_smaller_machines_oom_does_not_lower_what_was_learned(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        first, second = await machine(fleet, "first", 24), await machine(fleet, "second", 30)
        for _ in range(2):
            await fleet.enqueue(model=NEEDS_20)
        jobs = await first.take(), await second.take()
        await second.fail(jobs[1], "oom")
        await first.fail(jobs[0], "oom")
        assert await learned(fleet) == [(20, 31)]


@pytest.mark.gen_test
async def test_an_admins_cap_is_the_vram_that_failed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        capped = await machine(fleet, "capped", 30, capability_caps={"vram_gb": 22})
        await run_out_of_memory(fleet, capped)
        assert await learned(fleet) == [(20, 23)]


@pytest.mark.gen_test
async def test_a_result_with_a_larger_peak_does_not_raise_the_need(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        await run_out_of_memory(fleet, await machine(fleet, "small", 24))
        large = await machine(fleet, "large", 48)
        job = await large.take()
        await hand_in(large, job, 40 * 1024)
        assert await learned(fleet) == [(20, 25)]


@pytest.mark.gen_test
async def test_what_was_learned_of_another_model_stays(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        await run_out_of_memory(fleet, await machine(fleet, "small", 24))
        other = await machine(fleet, "other", 24)
        await fleet.enqueue(model=model_of(1, "q8_0"))
        job = await other.take()
        await hand_in(other, job, 2048)
        assert await learned(fleet) == [(20, 25)]


@pytest.mark.gen_test
async def test_an_admin_forgets_what_was_learned(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(retry_backoff_s=0), sigstore) as fleet:
        small = await machine(fleet, "small", 24)
        await run_out_of_memory(fleet, small)
        (model,) = (await fleet.admin("GET", "/model-needs")).json()["models"]
        at, why = f"/model-needs/{model['model_id']}", {"reason": "another process had the card"}
        assert (await fleet.admin("DELETE", at, json=why)).status_code == 200
        assert await learned(fleet) == []
        assert (await small.claim()).status_code == 200
        assert (await fleet.admin("DELETE", at, json=why)).status_code == 200
        unknown = f"/model-needs/{uuid.uuid4()}"
        assert code_of(await fleet.admin("DELETE", unknown, json=why)) == (404, "not_found")
        rows = await fleet.pool.fetch(
            "SELECT action, actor, target FROM audit WHERE action ~ 'model' ORDER BY audit_id"
        )
        assert [row["action"] for row in rows] == ["model.need.raise", "model.need.forget"]
        assert {row["target"] for row in rows} == {f"model:{model['model_id']}"}
