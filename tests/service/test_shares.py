"""Shares: one runner that takes all it can get leaves room for the others."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from broker.concurrency import shares
from broker.concurrency.shares import RunnerShares, Shares
from broker.leases import parked_claims
from broker.leases.parked_claims import ParkedClaims
from config.settings import Settings
from handlers import rates
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_uploads import submit_head
from tests.support.fleet import Fleet, Runner, code_of, open_fleet
from tests.support.raw_http import line_to

MakeSettings = Callable[..., Settings]


def test_a_holder_has_no_more_than_its_share_and_gets_it_back() -> None:
    some = Shares(2)
    assert [some.take("a") for _ in range(3)] == [True, True, False]
    assert some.take("b")
    some.give_back("a")
    assert [some.take("a") for _ in range(2)] == [True, False]


async def until(happened: Callable[[], bool]) -> None:
    """Return when something has happened in the server."""
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110 (nothing there to wait for)
            await asyncio.sleep(0.001)


@asynccontextmanager
async def two_with_jobs(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, **changes: Any
) -> AsyncIterator[tuple[Fleet, tuple[Runner, dict], tuple[Runner, dict]]]:
    """Yield two runners, each with a job."""
    async with open_fleet(make_settings(**changes), sigstore) as fleet:
        both = []
        for name in ("greedy", "honest"):
            runner = await fleet.sign_on(name)
            await fleet.enqueue()
            both.append((runner, await runner.take()))
        yield fleet, both[0], both[1]


@pytest.mark.gen_test
async def test_uploads_that_trickle_leave_room_for_those_of_another_runner(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with two_with_jobs(make_settings, sigstore, uploads_max=4) as (fleet, greedy, honest):
        async with AsyncExitStack() as lines:
            for _ in range(2):  # the share is taken, and of the rest nothing comes
                line = await lines.enter_async_context(line_to(fleet.url))
                await line.send(submit_head(*greedy, "Content-Length: 100000"))
            await until(lambda: fleet.services.submissions.uploads_free == 2)
            refused = await greedy[0].submit(greedy[1])
            assert code_of(refused) == (503, "busy")
            assert "its share" in refused.json()["detail"]
            assert int(refused.headers["Retry-After"]) > 0
            assert (await honest[0].submit(honest[1])).status_code == 201
        await until(lambda: fleet.services.submissions.uploads_free == 4)
        assert (await greedy[0].submit(greedy[1])).status_code == 201


@pytest.mark.gen_test
async def test_verifications_of_one_runner_leave_room_for_those_of_another(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    changes = {"verify_max": 4, "workers": 1}
    async with two_with_jobs(make_settings, sigstore, **changes) as (fleet, greedy, honest):
        taken = fleet.services.shares.verifications
        assert taken.take("greedy")  # one that takes its time
        assert code_of(await greedy[0].submit(greedy[1])) == (503, "busy")
        assert (await honest[0].submit(honest[1])).status_code == 201
        taken.give_back("greedy")
        assert (await greedy[0].submit(greedy[1])).status_code == 201
        assert fleet.services.shares.verifications.take("greedy")  # given back


@pytest.mark.gen_test
async def test_parked_claims_of_one_runner_come_behind_the_first_of_another(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        greedy = await fleet.sign_on("greedy", max_leases=64)
        honest = await fleet.sign_on("honest")
        room = fleet.services.claims.parked
        flood = [asyncio.create_task(greedy.claim(wait_s=50)) for _ in range(20)]
        await until(lambda: len(room) == 20)
        waiting = asyncio.create_task(honest.claim(wait_s=50))
        await until(lambda: len(room) == 21)
        for _ in range(2):
            await fleet.enqueue()
        assert (await waiting).status_code == 200
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)


@pytest.mark.gen_test
async def test_of_a_runner_with_too_many_parked_claims_the_oldest_stops_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parked_claims, "PARKED_MAX", 2)
    parked = ParkedClaims(_nothing, 1000, most=100)
    offer = shares  # any hashable: nothing is looked up

    def wait(place: int, runner_id: str) -> "asyncio.Task[bool]":
        return asyncio.create_task(parked.wait(place, runner_id, offer, 0, 1000))  # type: ignore[arg-type]

    tasks = [wait(1, "greedy"), wait(2, "honest"), wait(3, "greedy"), wait(4, "greedy")]
    assert await tasks[0] is False
    assert len(parked) == 3
    parked.release_all()
    assert await asyncio.gather(*tasks) == [False] * 4


async def _nothing(_: int) -> list[Any]:
    return []


@pytest.mark.gen_test
async def test_a_runner_has_so_many_requests_in_flight_and_no_more(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "REQUESTS_MAX", 3)
    monkeypatch.setattr(rates, "DELAY_S", 0)
    async with open_fleet(make_settings(), sigstore) as fleet:
        greedy, honest = await fleet.sign_on("greedy"), await fleet.sign_on("honest")
        flood = [asyncio.create_task(greedy.claim(wait_s=50)) for _ in range(3)]
        await until(lambda: len(fleet.services.claims.parked) == 3)
        assert code_of(await greedy.claim()) == (429, "rate_limited")
        assert (await honest.claim()).status_code == 204
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        await until(lambda: len(fleet.services.claims.parked) == 0)
        assert (await greedy.claim()).status_code == 204  # what it had came back


@pytest.mark.gen_test
async def test_a_job_that_is_given_again_without_end_is_not_held_for_slow_readers(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """Each such answer may have 15 MB."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = (await runner.claim(key="k")).json()
        held = fleet.services.shares.replays
        for _ in range(held.most):
            assert held.take("runner-a")  # an answer that is not read
        assert code_of(await runner.claim(key="k")) == (429, "rate_limited")
        resumed: httpx.Response = await runner.post(f"/api/queue/{job['run_id']}/resume", {})
        assert code_of(resumed) == (429, "rate_limited")
        held.give_back("runner-a")
        for _ in range(3):  # each gives back what it took
            assert (await runner.claim(key="k")).json()["lease_id"] == job["lease_id"]


def test_a_quarter_is_one_runners_share() -> None:
    some = RunnerShares(uploads_max=16, verify_max=8)
    assert (some.uploads.most, some.verifications.most) == (4, 2)
