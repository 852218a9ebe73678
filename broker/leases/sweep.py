"""Expiry: the bell and the sweep that make a silent runner's run PENDING again.

Redis tells within a moment that a lease key expired; the sweep then ends every lease that is
overdue by the database's clock. The content of an event is never trusted, so late, double, stale
or forged events are harmless; and because events are fire-and-forget, the sweep also runs by
itself, in every process, without a leader: SKIP LOCKED makes the batches disjoint.
"""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Literal

import asyncpg
import structlog

from broker.leases.lease_keys import LeaseKey, LeaseKeys
from broker.telemetry import Telemetry
from config.settings import Settings
from db import run_queue
from db.pool import describe

BATCH = 200
# Leases that die together ring together: one sweep for all of them.
GATHER_S = 0.1
LOST_RACES = (
    asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError,
)  # fmt: skip
# So many leases overdue together, and more than half of the live ones, is not their runners' doing.
MASS = 3

log = structlog.get_logger()


class Sweep:
    """Ends overdue leases: `run_once()` is one pass, `run()` repeats it until it is cancelled."""

    def __init__(
        self, pool: asyncpg.Pool, settings: Settings, keys: LeaseKeys, telemetry: Telemetry
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._keys = keys
        self._telemetry = telemetry
        self._due = asyncio.Event()
        self._breaker = Breaker(settings.lease_ttl_s)
        self._blind_until = 0.0  # monotonic
        self.degraded = True  # until the listener has proved itself

    @property
    def held(self) -> bool:
        """Return whether the breaker held the last pass back."""
        return self._breaker.open

    def notify(self) -> None:
        """Sweep soon: something may have expired."""
        self._due.set()

    async def run_once(self, noticed_by: Literal["expiry_event", "interval"] = "interval") -> int:
        """End all overdue leases; return how many there were, 0 while the breaker holds.

        Deferred runs whose time has come take their place in the queue's order on the way.

        `noticed_by` is what brought this pass, for the counters.
        """
        live, overdue = await run_queue.overdue_share(self._pool)
        if self._breaker.holds(live, overdue, time.monotonic()):
            return 0
        ended = 0
        while True:
            rows = await run_queue.lapse(self._pool, BATCH)
            for row in rows:
                log.info(
                    "lease.lapsed",
                    run_id=str(row["run_id"]),
                    lease_seq=row["lease_seq"],
                    runner_id=row["claimed_by"],
                    status=row["status"],
                    lag_s=round(row["lag"].total_seconds(), 3),
                )
                self._telemetry.expiry_lag.observe(row["lag"].total_seconds())
            self._telemetry.lapsed.labels(noticed_by).inc(len(rows))
            self._keys.drop(LeaseKey(row["queue_id"], row["lease_seq"]) for row in rows)
            ended += len(rows)
            if len(rows) < BATCH:
                break
        while await run_queue.promote_due(self._pool, BATCH) == BATCH:
            pass
        self._telemetry.sweep_success.set_to_current_time()
        return ended

    async def run(self, succeeded: Callable[[], None]) -> None:
        """Sweep on every ring and at every interval, for ever."""
        while True:
            noticed_by = await self._wait()
            try:
                if time.monotonic() < self._blind_until:
                    await run_queue.overdue_share(self._pool)
                else:
                    await self.run_once(noticed_by)
                succeeded()
            except LOST_RACES as error:  # an answer, so no outage: the next pass tries again
                log.warning("sweep.lost", error=type(error).__name__, detail=describe(error))
            except Exception as error:  # the sweep is the guarantee: whatever fails, it goes on
                # Runners could not be heard either: they get two beats before they count as silent.
                grace_s = 2 * self._settings.heartbeat_interval_s
                self._blind_until = time.monotonic() + grace_s
                log.warning("sweep.failed", error=type(error).__name__, detail=describe(error))

    async def _wait(self) -> Literal["expiry_event", "interval"]:
        """Return when a sweep is due, and by what."""
        settings = self._settings
        interval = settings.sweep_degraded_s if self.degraded else settings.sweep_interval_s
        try:
            async with asyncio.timeout(interval * random.uniform(0.8, 1.2)):  # noqa: S311 (jitter)
                await self._due.wait()
                await asyncio.sleep(GATHER_S)
        except TimeoutError:
            pass
        rung = self._due.is_set()
        self._due.clear()
        return "expiry_event" if rung else "interval"


class Breaker:
    """Holds the sweep back when most leases are overdue at once: then the cause is more likely us.

    A balancer or a database that was away made every runner look silent. They are given one TTL to
    be heard again, and then the sweep goes on: a real disaster is not held up any longer.
    """

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._since: float | None = None
        self.open = False  # what the last `holds` returned

    def holds(self, live: int, overdue: int, now: float) -> bool:
        """Return whether to wait; `now` is monotonic, in seconds."""
        self.open = self._holds(live, overdue, now)
        return self.open

    def _holds(self, live: int, overdue: int, now: float) -> bool:
        if overdue <= MASS or 2 * overdue <= live:
            self._since = None
            return False
        if self._since is None:
            self._since = now
            log.error("sweep.held", live=live, overdue=overdue, hold_s=self._hold_s)
        return now - self._since < self._hold_s
