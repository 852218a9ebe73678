"""One call for all that wait together: items that arrive during a call share the next one."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

from broker.concurrency.cancel import asked_to_stop

# So many go in one call. Of more, half go first: all of them at once would be answered at once and
# come back at once, with this process idle during each call, and the server called idle after it.
MIN_BATCH = 16

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Item, Answer]):
    """Turn many `ask(item)` into few `serve(items)`, at most one of them in flight.

    `serve` returns an answer per item, in order. When it raises, everybody who waited gets the
    exception. An asker that is cancelled before the call takes off is left out of it; one that is
    cancelled during the call has its answer given to `undelivered`, which must undo it.

    Items with the same `exclusive_key` never share a call: the later one waits.
    """

    def __init__(
        self,
        serve: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]],
        *,
        undelivered: Callable[[Answer], None] = lambda answer: None,
        exclusive_key: Callable[[Item], Hashable] | None = None,
        limit: int = 1000,
    ) -> None:
        self._serve = serve
        self._undelivered = undelivered
        self._exclusive_key = exclusive_key
        self._limit = limit
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._running: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Answer:
        """Return the answer to `item`, from a call shared with those that wait beside it."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        try:
            return await future
        except asyncio.CancelledError:
            # Between the answer and our turn to take it, the cancel comes too late for the future.
            if not future.cancelled() and future.exception() is None:
                self._undelivered(future.result())
            raise

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = self._take()
                if batch:
                    await self._serve_batch(batch)
        finally:
            self._running = None

    def _take(self) -> list[tuple[Item, "asyncio.Future[Answer]"]]:
        waiting = [(item, future) for item, future in self._waiting if not future.done()]
        size = min(self._limit, max(MIN_BATCH, math.ceil(len(waiting) / 2)))
        if self._exclusive_key is None:
            self._waiting = waiting[size:]
            return waiting[:size]
        batch: dict[Hashable, tuple[Item, asyncio.Future[Answer]]] = {}
        self._waiting = []
        for each in waiting:
            key = self._exclusive_key(each[0])
            if len(batch) < size and key not in batch:
                batch[key] = each
            else:
                self._waiting.append(each)
        return list(batch.values())

    async def _serve_batch(self, batch: list[tuple[Item, "asyncio.Future[Answer]"]]) -> None:
        try:
            answers = await self._serve([item for item, _ in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} questions")
        except BaseException as error:  # everybody who waited is told; the next batch is served
            for _, future in batch:
                if not future.done():
                    future.set_exception(_told(error))
            if asked_to_stop():
                raise
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                self._undelivered(answer)
            else:
                future.set_result(answer)


def _told(error: BaseException) -> Exception:
    """Return what those who waited are told: a cancellation from within is none of theirs."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{type(error).__name__} in a shared call: {error}")
