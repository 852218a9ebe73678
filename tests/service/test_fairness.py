"""Fair order: the largest that fits among equals, and no run overtaken for ever."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from config.settings import Settings
from db import run_queue
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, model_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]
SMALL, LARGE = model_of(4, "q8_0"), model_of(32, "q8_0")  # 5 GB and 40 GB
DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a sweep, which locks the deferred runs that came due, for a claim to pass over."""
    quiet_sweep(monkeypatch)


async def machine(fleet: Fleet, name: str, vram_gb: int, **key: Any) -> Runner:
    """Return a registered runner of this VRAM."""
    runner = await fleet.admit(name, **key)
    runner.capabilities = {"vram_gb": vram_gb, "quantizations": ["q8_0"]}
    assert (await runner.register()).is_success
    return runner


async def aged(fleet: Fleet, *run_ids: str, hours: float) -> None:
    """Let runs have been added so long ago."""
    await fleet.pool.execute(
        "UPDATE run_queue SET created_at = created_at - $2 * interval '1 hour'"
        " WHERE run_id = any($1::uuid [])",
        run_ids,
        hours,
    )


async def promoted(fleet: Fleet, limit: int = 16) -> list[str]:
    """Bring overtaken runs to the front; return their ids."""
    return [str(row["run_id"]) for row in await run_queue.promote_aged(fleet.pool, DAY, limit)]


@pytest.mark.gen_test
async def test_the_only_large_machine_takes_the_run_that_only_it_can_do(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        small, large = await machine(fleet, "small", 24), await machine(fleet, "large", 48)
        first, _ = [await fleet.enqueue(model=SMALL) for _ in range(2)]
        only = await fleet.enqueue(model=LARGE)
        assert (await large.take())["run_id"] == only
        assert (await small.take())["run_id"] == first


@pytest.mark.gen_test
async def test_the_largest_goes_first_among_equals_only(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await machine(fleet, "large", 48, max_leases=4)
        large = await fleet.enqueue(model=LARGE, priority=11)
        later, sooner = await fleet.enqueue(model=SMALL), await fleet.enqueue(model=SMALL)
        urgent = await fleet.enqueue(model=SMALL, priority=10)
        await aged(fleet, sooner, hours=1)
        taken = [(await runner.take())["run_id"] for _ in range(4)]
        assert taken == [urgent, large, sooner, later]


@pytest.mark.gen_test
async def test_a_deferred_run_that_came_due_has_its_place_by_size_as_well(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await machine(fleet, "large", 48)
        await fleet.enqueue(model=SMALL)
        due = await fleet.enqueue(model=LARGE)
        await fleet.pool.execute(
            "UPDATE run_queue SET retry_after = now() - interval '1 s' WHERE run_id = $1", due
        )
        assert (await runner.take())["run_id"] == due


@pytest.mark.gen_test
async def test_a_run_that_younger_ones_overtake_for_longer_than_a_day_comes_to_the_front(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await machine(fleet, "large", 48, max_leases=3)
        old, older, recent = [await fleet.enqueue(model=SMALL, priority=100) for _ in range(3)]
        urgent = await fleet.enqueue(model=LARGE, priority=10)
        await aged(fleet, older, hours=26)
        await aged(fleet, old, hours=25)
        await aged(fleet, recent, hours=23)
        assert await promoted(fleet) == [older]  # the first of its queue; the next when it has gone
        assert (await fleet.row(older))["priority"] == 9
        assert (await runner.take())["run_id"] == older
        assert await promoted(fleet) == [old]
        assert (await runner.take())["run_id"] == old
        assert await promoted(fleet) == []
        assert (await runner.take())["run_id"] == urgent


@pytest.mark.gen_test
async def test_the_oldest_come_first_and_as_many_as_are_asked_for(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        models = [model_of(size, "q8_0") for size in (1, 2, 3)]
        runs = [await fleet.enqueue(model=model, priority=100) for model in models]
        await fleet.enqueue(model=LARGE, priority=10)
        for run_id, hours in zip(runs, (30, 50, 40), strict=True):
            await aged(fleet, run_id, hours=hours)
        assert sorted(await promoted(fleet, limit=2)) == sorted([runs[1], runs[2]])
        assert await promoted(fleet) == [runs[0]]
        assert await promoted(fleet) == []


@pytest.mark.gen_test
async def test_equals_that_are_larger_overtake_no_longer_than_a_day(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await machine(fleet, "large", 48)
        small = await fleet.enqueue(model=SMALL)
        await fleet.enqueue(model=LARGE)
        await aged(fleet, small, hours=25)
        assert await promoted(fleet) == [small]
        assert (await runner.take())["run_id"] == small


@pytest.mark.gen_test
async def test_under_a_flow_of_urgent_runs_others_have_a_share_of_the_claims(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.leases.claims.PROMOTE_PAUSE_S", 0.0)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await machine(fleet, "large", 48)
        rest = [await fleet.enqueue(model=SMALL, priority=100) for _ in range(10)]
        await aged(fleet, *rest, hours=48)
        order = []
        for _ in range(24):
            await fleet.enqueue(model=SMALL, priority=10)
            job = await runner.take()
            order.append(job["run_id"] in rest)
            assert (await runner.submit(job)).is_success
        assert 4 <= sum(order) <= 6


@pytest.mark.gen_test
async def test_without_aging_the_order_is_strict(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(aging_s=0), sigstore) as fleet:
        runner = await machine(fleet, "large", 48)
        rest = await fleet.enqueue(model=SMALL, priority=100)
        await aged(fleet, rest, hours=48)
        for _ in range(10):
            await fleet.enqueue(model=SMALL, priority=10)
            job = await runner.take()
            assert job["run_id"] != rest
            assert (await runner.submit(job)).is_success
