"""The coalescer: what waits together is served together, and nobody's answer is lost or doubled."""

import asyncio
from collections.abc import Sequence

import pytest

from broker.concurrency.batching import MIN_BATCH, Batcher


class Desk:
    """Serves batches when it is let, and remembers them; 0 is refused."""

    def __init__(self, limit: int = 1000) -> None:
        self.batches: list[list[int]] = []
        self.undelivered: list[str] = []
        self.started: asyncio.Queue[None] = asyncio.Queue()
        self.open = asyncio.Event()
        self.line = Batcher(self.serve, undelivered=self.undelivered.append, limit=limit)

    async def serve(self, items: Sequence[int]) -> list[str]:
        self.batches.append(list(items))
        self.started.put_nowait(None)
        await self.open.wait()
        if 0 in items:
            raise ZeroDivisionError("0")
        return [f"answer {item}" for item in items]

    def submit(self, *items: int) -> list[asyncio.Task[str]]:
        return [asyncio.create_task(self.line.submit(item)) for item in items]


@pytest.mark.gen_test
async def test_what_arrives_during_a_call_shares_the_next_one_in_order() -> None:
    desk = Desk()
    first = desk.submit(1)
    await desk.started.get()
    others = desk.submit(2, 3, 4)
    desk.open.set()
    assert await asyncio.gather(*first, *others) == [f"answer {n}" for n in (1, 2, 3, 4)]
    assert desk.batches == [[1], [2, 3, 4]]


@pytest.mark.gen_test
async def test_at_most_the_limit_is_served_by_one_call() -> None:
    desk = Desk(limit=2)
    desk.open.set()
    answers = await asyncio.gather(*desk.submit(1, 2, 3, 4, 5))
    assert answers == [f"answer {n}" for n in (1, 2, 3, 4, 5)]
    assert desk.batches == [[1, 2], [3, 4], [5]]


@pytest.mark.gen_test
async def test_a_call_that_fails_is_told_to_all_who_shared_it_and_to_no_others() -> None:
    desk = Desk()
    shared = desk.submit(1, 0)
    await desk.started.get()
    later = desk.submit(2)
    desk.open.set()
    outcomes = await asyncio.gather(*shared, *later, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ZeroDivisionError, ZeroDivisionError, str]


@pytest.mark.gen_test
async def test_who_is_gone_before_the_call_is_left_out_of_it() -> None:
    desk = Desk()
    first = desk.submit(1)
    await desk.started.get()
    gone, stays = desk.submit(2, 3)
    await asyncio.sleep(0)  # both are waiting now
    gone.cancel()
    desk.open.set()
    await asyncio.gather(*first, stays)
    assert desk.batches == [[1], [3]]
    assert desk.undelivered == []


@pytest.mark.gen_test
async def test_the_answer_to_who_is_gone_during_the_call_is_given_back() -> None:
    desk = Desk()
    gone, stays = desk.submit(1, 2)
    await desk.started.get()
    gone.cancel()
    await asyncio.wait([gone])
    desk.open.set()
    assert await stays == "answer 2"
    assert desk.undelivered == ["answer 1"]


@pytest.mark.gen_test
@pytest.mark.parametrize("item", [0, 1])
async def test_the_answer_to_who_is_cancelled_before_taking_it_is_given_back(item: int) -> None:
    """The answer is there, and the asker's turn comes after the hang-up of its connection."""
    desk = Desk()
    (gone,) = desk.submit(item)
    await desk.started.get()
    desk.open.set()
    # In one turn of the loop: the call goes on and answers, then the hang-up is noticed.
    asyncio.get_running_loop().call_soon(gone.cancel)
    await asyncio.wait([gone])
    assert gone.cancelled()
    assert desk.undelivered == ["answer 1"] * item


@pytest.mark.gen_test
async def test_a_failure_that_nobody_waits_for_any_more_harms_nobody() -> None:
    desk = Desk()
    (gone,) = desk.submit(0)
    await desk.started.get()
    gone.cancel()
    await asyncio.wait([gone])
    later = desk.submit(1)
    desk.open.set()
    assert await later[0] == "answer 1"
    assert desk.undelivered == []


@pytest.mark.gen_test
async def test_of_a_crowd_the_first_half_goes_first() -> None:
    """So that we answer these while the others are served, and are never all idle in turn."""
    desk = Desk()
    desk.open.set()
    everybody = range(1, 2 * MIN_BATCH + 3)
    answers = await asyncio.gather(*desk.submit(*everybody))
    assert answers == [f"answer {item}" for item in everybody]
    assert [len(batch) for batch in desk.batches] == [MIN_BATCH + 1, MIN_BATCH, 1]
    assert [item for batch in desk.batches for item in batch] == list(everybody)


@pytest.mark.gen_test
async def test_what_is_to_be_apart_shares_no_call_and_holds_nobody_else_up() -> None:
    desk = Desk()
    desk.line = Batcher(desk.serve, exclusive_key=lambda item: item % 10)
    desk.open.set()
    answers = await asyncio.gather(*desk.submit(1, 11, 21, 2, 12))
    assert answers == [f"answer {item}" for item in (1, 11, 21, 2, 12)]
    assert desk.batches == [[1, 2], [11, 12], [21]]


@pytest.mark.parametrize("ending", ["cancelled", "too few answers"])
@pytest.mark.gen_test
async def test_a_call_that_ends_in_no_way_it_should_lets_nobody_wait_for_ever(ending: str) -> None:
    async def serve(items: Sequence[int]) -> list[int]:
        if ending == "cancelled":
            raise asyncio.CancelledError  # a driver's, from within
        return []

    line: Batcher[int, int] = Batcher(serve)
    for _ in range(2):
        asked = [line.submit(1), line.submit(2)]
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RuntimeError, RuntimeError]
