"""Expiry: the bell and the sweep that make a silent runner's run PENDING again.

Redis tells within a moment that a lease key expired; the sweep then ends every lease that is
overdue by the database's clock. The content of an event is never trusted, so late, double, stale
or forged events are harmless; and because events are fire-and-forget, the sweep also runs by
itself, in every process, without a leader: SKIP LOCKED makes the batches disjoint.
"""

import asyncio
import random
import time

import asyncpg
import redis.asyncio
import structlog

from broker.lease_keys import PREFIX, LeaseKey, LeaseKeys
from config.settings import Settings
from db import run_queue
from db.pool import describe

BATCH = 200
# Leases that die together ring together: one sweep for all of them.
GATHER_S = 0.1
SELF_TEST_S = 3.0
LISTEN_S = 30.0
BACKOFF_MIN_S = 0.1
# So many leases overdue together, and more than half of the live ones, is not their runners' doing.
MASS = 3
BACKOFF_MAX_S = 5.0

log = structlog.get_logger()


class Sweep:
    """Ends overdue leases: `run_once()` is one pass, `run()` repeats it until it is cancelled."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings, keys: LeaseKeys) -> None:
        self._pool = pool
        self._settings = settings
        self._keys = keys
        self._due = asyncio.Event()
        self._breaker = Breaker(settings.lease_ttl_s)
        self._blind_until = 0.0  # monotonic
        self.degraded = True  # until the listener has proved itself

    def ring(self) -> None:
        """Sweep soon: something may have expired."""
        self._due.set()

    async def run_once(self) -> int:
        """End all overdue leases; return how many there were, 0 while the breaker holds."""
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
            self._keys.drop(LeaseKey(row["queue_id"], row["lease_seq"]) for row in rows)
            ended += len(rows)
            if len(rows) < BATCH:
                return ended

    async def run(self) -> None:
        """Sweep on every ring and at every interval, for ever."""
        while True:
            await self._wait()
            try:
                if time.monotonic() < self._blind_until:
                    await run_queue.overdue_share(self._pool)
                else:
                    await self.run_once()
            except Exception as error:  # the sweep is the guarantee: whatever fails, it goes on
                # Runners could not be heard either: they get two beats before they count as silent.
                grace_s = 2 * self._settings.heartbeat_interval_s
                self._blind_until = time.monotonic() + grace_s
                log.warning("sweep.failed", error=type(error).__name__, detail=describe(error))

    async def _wait(self) -> None:
        settings = self._settings
        interval = settings.sweep_degraded_s if self.degraded else settings.sweep_interval_s
        try:
            async with asyncio.timeout(interval * random.uniform(0.8, 1.2)):  # noqa: S311 (jitter)
                await self._due.wait()
                await asyncio.sleep(GATHER_S)
        except TimeoutError:
            pass
        self._due.clear()


class Breaker:
    """Holds the sweep back when most leases are overdue at once: then the cause is more likely us.

    A balancer or a database that was away made every runner look silent. They are given one TTL to
    be heard again, and then the sweep goes on: a real disaster is not held up any longer.
    """

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._since: float | None = None

    def holds(self, live: int, overdue: int, now: float) -> bool:
        """Return whether to wait; `now` is monotonic, in seconds."""
        if overdue <= MASS or 2 * overdue <= live:
            self._since = None
            return False
        if self._since is None:
            self._since = now
            log.error("sweep.held", live=live, overdue=overdue, hold_s=self._hold_s)
        return now - self._since < self._hold_s


class ExpiryListener:
    """Rings the sweep on expired lease keys; reconnects for ever and never takes us down."""

    def __init__(self, client: redis.asyncio.Redis, sweep: Sweep) -> None:
        self._client = client
        self._sweep = sweep
        database = client.connection_pool.connection_kwargs.get("db", 0)
        self._channel = f"__keyevent@{database}__:expired"
        self.healthy = asyncio.Event()

    async def run(self) -> None:
        """Listen until cancelled."""
        backoff = BACKOFF_MIN_S
        while True:
            try:
                await self._listen()
            except Exception as error:  # for ever, whatever a Redis or its client comes up with
                log.warning("listener.lost", error=type(error).__name__, retry_in_s=backoff)
            if self.healthy.is_set():
                backoff = BACKOFF_MIN_S  # it worked until now: this loss is a new one
            self._mark(healthy=False)
            await asyncio.sleep(backoff * random.uniform(0.8, 1.2))  # noqa: S311 (jitter)
            backoff = min(2 * backoff, BACKOFF_MAX_S)

    async def _listen(self) -> None:
        async with self._client.pubsub() as pubsub:
            await pubsub.subscribe(self._channel)
            proof = asyncio.create_task(self._prove())
            try:
                while True:
                    message = await pubsub.get_message(timeout=LISTEN_S)
                    if message is not None:
                        self._hear(message)
            finally:
                proof.cancel()

    def _hear(self, message: dict[str, object]) -> None:
        if message["type"] == "subscribe":
            self._sweep.ring()  # events may have been lost before this subscription
        elif message["type"] == "message" and _is_ours(message["data"]):
            self._mark(healthy=True)
            self._sweep.ring()

    async def _prove(self) -> None:
        """Let a key of ours expire: if no event tells of it, say how to switch events on."""
        try:
            await self._client.set(f"{PREFIX}self-test", 1, px=50)
            async with asyncio.timeout(SELF_TEST_S):
                await self.healthy.wait()
        except TimeoutError:
            log.warning(
                "listener.deaf",
                channel=self._channel,
                fix="redis-cli CONFIG SET notify-keyspace-events Ex"
                " (managed Redis: its parameter group); until then the sweep runs more often",
            )
        except (redis.RedisError, OSError) as error:
            log.warning("listener.unproven", error=type(error).__name__)

    def _mark(self, *, healthy: bool) -> None:
        self._sweep.degraded = not healthy
        if healthy:
            self.healthy.set()
        else:
            self.healthy.clear()


def _is_ours(data: object) -> bool:
    return isinstance(data, bytes) and data.startswith(PREFIX.encode())
