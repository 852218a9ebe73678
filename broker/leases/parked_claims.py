"""Claims that wait for a run: in memory, in the order they came, without a database connection.

A ring (NOTIFY: something became claimable) brings one look at what the queue has, for all who wait;
then as many are woken as there are runs for, the longest waiting first, each only for a run that
fits it. One new run wakes one claim, not a thousand. The room also looks by itself when a deferred
run comes due, and every few seconds, for what no ring told of.
"""

import asyncio
import itertools
import random
from bisect import insort
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import structlog

from broker.concurrency.shares import PARKED_MAX
from broker.leases.matching import Capabilities, Offer, due_in

# Runs counted per model for one look. Whoever is left when so many were woken waits for the next
# look, which comes when those have had the time to claim.
LOOK_MAX = 1000
CROWD_S = 0.5
# After the moment a run comes due: the database's clock and ours drift apart a little meanwhile.
DUE_GRACE_S = 0.02

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class Waiter:
    """A claim that waits, and the runner whose it is."""

    runner_id: str
    capabilities: Capabilities
    woken: "asyncio.Future[bool]"


class ParkedClaims:
    """Parks claims; `run()` wakes them."""

    def __init__(
        self, look: Callable[[int], Awaitable[Sequence[Offer]]], recheck_s: float, most: int
    ) -> None:
        """Park up to `most`. Look with `look`, which counts a model's runs up to its argument."""
        self._most = most
        self._look = look
        self._recheck_s = recheck_s
        self._waiters: dict[int, Waiter] = {}  # by place
        self._places: dict[str, list[int]] = {}  # of each runner, in order
        self._woken: dict[str, int] = {}  # of those runners: the number of its last wake
        self._wakes = itertools.count(1)
        self._due = asyncio.Event()
        self.generation = 0

    def __len__(self) -> int:
        """The number of claims that wait."""
        return len(self._waiters)

    @property
    def is_full(self) -> bool:
        """Return whether no other claim may wait: each holds a connection that others need too."""
        return len(self._waiters) >= self._most

    def notify(self) -> None:
        """Look soon: something may have become claimable."""
        self.generation += 1
        self._due.set()

    async def wait(
        self,
        place: int,
        runner_id: str,
        capabilities: Capabilities,
        seen_generation: int,
        left_s: float,
    ) -> bool:
        """Wait for a run that may fit; return whether there is one, False after `left_s` seconds.

        `place` orders the waiting claims, smallest first. `seen_generation` is the `generation`
        before the caller last queried the queue: a notification since then is not lost. Of a runner
        with more claims than `PARKED_MAX`, the oldest stops waiting.
        """
        if self.generation != seen_generation:
            self._due.set()
        waiter = Waiter(runner_id, capabilities, asyncio.get_running_loop().create_future())
        self._waiters[place] = waiter
        places = self._places.setdefault(runner_id, [])
        insort(places, place)  # a claim that was woken in vain keeps its place
        if len(places) > PARKED_MAX:
            _tell(self._waiters[places[0]], False)
        try:
            async with asyncio.timeout(left_s):
                return await waiter.woken
        except TimeoutError:
            return False
        except asyncio.CancelledError:
            if waiter.woken.done() and not waiter.woken.cancelled() and waiter.woken.result():
                self.notify()  # it left before its turn: the run is the next one's
            raise
        finally:
            del self._waiters[place]
            places.remove(place)
            if not places:
                del self._places[runner_id]
                self._woken.pop(runner_id, None)

    def release_all(self) -> None:
        """Tell everybody that there is nothing."""
        for waiter in self._waiters.values():
            _tell(waiter, False)

    async def run(self, succeeded: Callable[[], None]) -> None:
        """Wake who can be given something, for ever."""
        pause_s = self._pause_s()
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    await self._due.wait()
            except TimeoutError:
                pass
            self._due.clear()
            pause_s = self._pause_s()
            if not self._waiters:
                succeeded()
                continue
            try:
                offers = await self._look(min(len(self._waiters), LOOK_MAX))
            except Exception as error:  # the database is away: the next look goes on
                log.warning("parked_claims.query_failed", error=type(error).__name__)
                continue
            succeeded()
            if self._wake(offers) >= LOOK_MAX:
                pause_s = min(pause_s, CROWD_S)
            if (due := due_in(offers)) is not None:
                pause_s = min(pause_s, max(0.0, due.total_seconds()) + DUE_GRACE_S)

    def _pause_s(self) -> float:
        return self._recheck_s * random.uniform(0.8, 1.2)  # noqa: S311 (jitter)

    def _wake(self, offers: Sequence[Offer]) -> int:
        """Wake the longest waiting for whom there is a run, as many as there are runs.

        In the order of runners, not of requests: a runner's second claim comes behind the first
        ones of all others, and its first behind those of others once it was woken. Returns how many
        were woken.
        """
        woken = 0
        left = [offer.claimable for offer in offers]
        fitting: dict[Capabilities, Iterator[int]] = {}
        current: dict[Capabilities, int | None] = {}
        turns = sorted(
            (turn, self._woken.get(runner_id, 0), place)
            for runner_id, places in self._places.items()
            for turn, place in enumerate(places)
        )
        for *_, place in turns:
            waiter = self._waiters[place]
            runner = waiter.capabilities
            if runner not in fitting:
                fitting[runner] = iter([i for i, o in enumerate(offers) if o.fits(runner)])
                current[runner] = next(fitting[runner], None)
            while (i := current[runner]) is not None and not left[i]:
                current[runner] = next(fitting[runner], None)
            if i is not None:
                left[i] -= 1
                woken += 1
                self._woken[waiter.runner_id] = next(self._wakes)
                _tell(waiter, True)
        return woken


def _tell(waiter: Waiter, there_is_one: bool) -> None:
    if not waiter.woken.done():
        waiter.woken.set_result(there_is_one)
