"""Parked claims: who is woken, for what, and in which order."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker.leases import parked_claims
from broker.leases.matching import Capabilities, Offer
from broker.leases.parked_claims import LOOK_MAX, ParkedClaims

NEVER_S = 1000.0
BIG = Capabilities(80, ("fp16", "q8_0"))
SMALL = Capabilities(8, ("q8_0",))


def offer(claimable: int, need_gb: int = 4, quantization: str = "q8_0", **more: Any) -> Offer:
    """Return what the queue has of one model."""
    given: dict[str, Any] = {
        "deferred": 0, "next_retry": None, "due_in": None, "pause_reason": None, **more,
    }  # fmt: skip
    return Offer("m", quantization, None, quantization, need_gb, claimable, **given)


@dataclass
class Queue:
    """What the looks find, one after the other; the last one for ever."""

    finds: list[list[Offer] | Exception]
    bounds: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    async def look(self, bound: int) -> Sequence[Offer]:
        self.bounds.put_nowait(bound)
        found = self.finds.pop(0) if len(self.finds) > 1 else self.finds[0]
        if isinstance(found, Exception):
            raise found
        return found


@dataclass
class Crowd:
    """Claims that wait, and the places of those that were woken, in order."""

    parked: ParkedClaims
    queue: Queue
    woken: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    tasks: dict[int, asyncio.Task[bool]] = field(default_factory=dict)

    async def enter(
        self, *places: int, runner: Capabilities = SMALL, runner_id: str | None = None
    ) -> None:
        for place in places:
            waiting = self._wait(place, runner_id or f"runner-{place}", runner)
            self.tasks[place] = asyncio.create_task(waiting)
        await asyncio.sleep(0)  # each of them has begun to wait

    async def _wait(self, place: int, runner_id: str, runner: Capabilities) -> bool:
        woken = await self.parked.wait(place, runner_id, runner, self.parked.generation, NEVER_S)
        if woken:
            self.woken.put_nowait(place)
        return woken

    async def rung(self) -> list[int]:
        """Ring; return who was woken by the look that this brings."""
        self.parked.notify()
        await self.queue.bounds.get()
        for _ in range(3):  # the look returns, the futures resolve, the claims go on
            await asyncio.sleep(0)
        return [self.woken.get_nowait() for _ in range(self.woken.qsize())]


@asynccontextmanager
async def crowd(
    *finds: list[Offer] | Exception, recheck_s: float = NEVER_S
) -> AsyncIterator[Crowd]:
    """Yield parked claims whose looks find this."""
    queue = Queue(list(finds))
    parked = ParkedClaims(queue.look, recheck_s, most=1_000_000)
    running = asyncio.create_task(parked.run(lambda: None))
    people = Crowd(parked, queue)
    try:
        yield people
    finally:
        for task in (running, *people.tasks.values()):
            task.cancel()
        await asyncio.gather(running, *people.tasks.values(), return_exceptions=True)


@pytest.mark.gen_test
async def test_one_run_wakes_the_one_that_waits_longest() -> None:
    async with crowd([offer(1)]) as people:
        await people.enter(7, 3, 5)
        assert await people.rung() == [3]
        assert len(people.parked) == 2
        assert await people.rung() == [5]
        assert await people.rung() == [7]
        assert len(people.parked) == 0


@pytest.mark.gen_test
async def test_a_claim_that_comes_back_has_its_old_place() -> None:
    async with crowd([offer(1)]) as people:
        await people.enter(1, 2)
        assert await people.rung() == [1]
        await people.enter(1)  # somebody else was quicker
        assert await people.rung() == [1]


@pytest.mark.gen_test
async def test_a_claim_that_comes_back_goes_before_a_later_one_of_its_runner() -> None:
    async with crowd([offer(1)]) as people:
        await people.enter(1, 2, runner_id="one")
        assert await people.rung() == [1]
        await people.enter(1, runner_id="one")
        assert await people.rung() == [1]


@pytest.mark.gen_test
async def test_as_many_are_woken_as_there_are_runs_that_fit_them() -> None:
    found = [offer(1), offer(1, need_gb=40, quantization="fp16"), offer(5, need_gb=200)]
    async with crowd(found) as people:
        await people.enter(1, 2, 3)
        await people.enter(4, 5, runner=BIG)
        # The small run goes to the first small one; a big one gets what only it can run.
        assert await people.rung() == [1, 4]
        assert len(people.parked) == 3


@pytest.mark.gen_test
async def test_whom_nothing_fits_stands_in_nobodys_way() -> None:
    async with crowd([offer(3, need_gb=40, quantization="fp16")]) as people:
        await people.enter(1, 2)
        await people.enter(3, runner=BIG)
        assert await people.rung() == [3]


@pytest.mark.gen_test
async def test_one_look_serves_all_and_counts_no_further_than_they_are() -> None:
    async with crowd([]) as people:
        await people.enter(1, 2, 3)
        people.parked.notify()
        assert await people.queue.bounds.get() == 3
        assert people.queue.bounds.empty()
        await people.enter(*range(10, 10 + LOOK_MAX))
        people.parked.notify()
        assert await people.queue.bounds.get() == LOOK_MAX


@pytest.mark.gen_test
async def test_who_is_left_of_a_crowd_is_looked_after_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parked_claims, "CROWD_S", 0.01)
    async with crowd([offer(LOOK_MAX)], [offer(1)]) as people:
        await people.enter(*range(LOOK_MAX + 1))
        people.parked.notify()
        async with asyncio.timeout(10):  # and not after NEVER_S
            assert await people.tasks[LOOK_MAX]


@pytest.mark.gen_test
async def test_nobody_there_no_look() -> None:
    async with crowd([offer(1)], recheck_s=0.001) as people:
        people.parked.notify()
        await asyncio.sleep(0.02)  # any number of rechecks: there is no signal of what never comes
        assert people.queue.bounds.empty()


@pytest.mark.gen_test
async def test_a_ring_between_a_claims_own_look_and_its_wait_is_not_lost() -> None:
    async with crowd([offer(1)]) as people:
        heard = people.parked.generation
        people.parked.notify()
        await asyncio.sleep(0)  # the parked has looked already: nobody was there
        assert await people.parked.wait(1, "runner-a", SMALL, heard, NEVER_S)


@pytest.mark.gen_test
async def test_the_room_looks_by_itself_now_and_then() -> None:
    async with crowd([], [], [offer(1)], recheck_s=0.001) as people:
        assert await people.parked.wait(1, "runner-a", SMALL, people.parked.generation, NEVER_S)


@pytest.mark.gen_test
async def test_the_room_looks_when_a_deferred_run_comes_due() -> None:
    later = offer(0, deferred=1, due_in=timedelta(milliseconds=10))
    async with crowd([later], [offer(1)]) as people:
        await people.enter(1)
        people.parked.notify()
        assert await people.tasks[1]


@pytest.mark.gen_test
async def test_a_look_that_fails_is_told_of_and_the_next_one_goes_on() -> None:
    async with crowd(ConnectionResetError(), [offer(1)], recheck_s=0.001) as people:
        with capture_logs() as logs:
            await people.enter(1)
            assert await people.tasks[1]
    assert [(line["event"], line["error"]) for line in logs] == [
        ("parked_claims.query_failed", "ConnectionResetError")
    ]


@pytest.mark.gen_test
async def test_who_leaves_is_not_woken() -> None:
    async with crowd([offer(1)]) as people:
        await people.enter(1, 2)
        people.tasks[1].cancel()
        await asyncio.wait([people.tasks[1]])
        assert await people.rung() == [2]


@pytest.mark.gen_test
async def test_the_run_of_one_that_is_woken_and_gone_before_its_turn_is_the_next_ones() -> None:
    async with crowd([offer(1)], [offer(1)], []) as people:
        await people.enter(1, 2)
        people.parked.notify()
        await people.queue.bounds.get()  # in this turn of the loop the parked wakes the first one
        people.tasks[1].cancel()
        async with asyncio.timeout(10):  # and not after NEVER_S
            assert await people.woken.get() == 2
        assert people.tasks[1].cancelled()


@pytest.mark.gen_test
async def test_time_is_up_and_the_room_is_emptied() -> None:
    async with crowd([]) as people:
        assert not await people.parked.wait(1, "runner-a", SMALL, people.parked.generation, 0.001)
        await people.enter(2, 3)
        people.parked.release_all()
        assert not await people.tasks[2]
        assert not await people.tasks[3]
        assert len(people.parked) == 0
