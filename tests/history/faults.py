"""What goes wrong with servers, Redis and PostgreSQL during a storm.

Every fault heals by itself after a moment, so that a storm is a series of bad moments and not one
long outage. `Faults.<kind>` is one fault; a plan says how often each comes.
"""

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import uuid4

import asyncpg
import redis.asyncio

from db.pool import LOST
from sandbox.services import servers
from tests.history.failpoints import POINTS
from tests.history.plans import TTL_S, Plan
from tests.history.server_group import ServerGroup

LEASE_DB = 1
APPLICATION = "bakeoff-queue"
AWAY = (redis.RedisError, OSError, TimeoutError)


class Faults:
    """Draws faults until it is told to stop; `counts` has all that really struck."""

    def __init__(
        self,
        plan: Plan,
        rng: random.Random,
        group: ServerGroup,
        postgres: servers.Postgres,
        redis_server: servers.Redis,
        dsn: str,
        counts: Counter[str],
    ) -> None:
        self._plan = plan
        self._rng = rng
        self._group = group
        self._postgres = postgres
        self._redis = redis_server
        self._dsn = dsn
        self._healing: set[asyncio.Task[None]] = set()
        self._postgres_turn = asyncio.Lock()
        self._redis_turn = asyncio.Lock()
        self.counts = counts
        self.log: list[tuple[str, datetime]] = []

    async def live(self, calm: asyncio.Event) -> None:
        """Inject until `calm`, then wait until everything has healed."""
        kinds, weights = list(self._plan.faults), list(self._plan.faults.values())
        while kinds and not calm.is_set():
            kind = self._rng.choices(kinds, weights)[0]
            task = asyncio.create_task(getattr(self, f"_{kind}")())
            self._healing.add(task)
            await asyncio.sleep(self._rng.uniform(*self._plan.fault_every_s))
            await self._collect()
        await asyncio.gather(*self._healing)

    def struck(self, point: str, stall_s: float | None) -> None:
        """Count a failpoint that was reached."""
        self.counts[f"{'kill' if stall_s is None else 'stall'}_at_{point}"] += 1

    async def _collect(self) -> None:
        """Raise what a fault could not do: a fault that does not strike proves nothing."""
        for task in [each for each in self._healing if each.done()]:
            self._healing.discard(task)
            await task

    async def _server_kill(self) -> None:
        if self._group.signal(self._rng.choice(self._group.slots), signal.SIGKILL):
            self.counts["server_kill"] += 1

    async def _server_failpoint(self) -> None:
        slot = self._rng.choice(self._group.slots)
        self._group.arm(slot, self._rng.choice(sorted(POINTS)), None)

    async def _server_stall(self) -> None:
        point = self._rng.choice(self._plan.stall_points or sorted(POINTS))
        stall_s = self._rng.uniform(*self._plan.stall_s)
        self._group.arm(self._rng.choice(self._group.slots), point, stall_s)

    async def _server_pause(self) -> None:
        """SIGSTOP for up to more than a TTL: what the server was about to do, it does late."""
        slot = self._rng.choice(self._group.slots)
        pid = slot.pid
        if pid is None or not self._group.signal(slot, signal.SIGSTOP):
            return
        self.counts["server_pause"] += 1
        await asyncio.sleep(self._rng.uniform(0.2, TTL_S + 1.5))
        if slot.pid == pid:
            self._group.signal(slot, signal.SIGCONT)

    async def _server_drain(self) -> None:
        if self._group.signal(self._rng.choice(self._group.slots), signal.SIGTERM):
            self.counts["server_drain"] += 1

    async def _redis_flush(self) -> None:
        async with self._redis_client() as client:
            await client.flushall()
            self.counts["redis_flush"] += 1

    async def _redis_restart(self) -> None:
        async with self._redis_turn:
            await asyncio.to_thread(self._redis.kill)
            await asyncio.sleep(self._rng.uniform(0, 2))
            await asyncio.to_thread(self._redis.restart)
            self.counts["redis_restart"] += 1

    async def _redis_kill_pubsub(self) -> None:
        async with self._redis_client() as client:
            await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            self.counts["redis_kill_pubsub"] += 1

    async def _redis_pause(self) -> None:
        async with self._redis_turn:
            await asyncio.to_thread(self._redis.pause)
            await asyncio.sleep(1.0)
            await asyncio.to_thread(self._redis.resume)
            self.counts["redis_pause"] += 1

    async def _redis_deaf(self) -> None:
        """No expired events for a while. A restart in between switches them on again: as well."""
        async with self._redis_client() as client:
            await client.config_set("notify-keyspace-events", "")
            self.counts["redis_deaf"] += 1
        await asyncio.sleep(self._rng.uniform(1, 4))
        async with self._redis_turn, self._redis_client() as client:
            await client.config_set("notify-keyspace-events", "Ex")

    async def _event_early(self) -> None:
        """Keys of live leases expire at once."""
        async with self._redis_client() as client:
            keys = [key async for key in client.scan_iter("lease:*:*")]
            for key in self._rng.sample(keys, min(len(keys), 3)):
                await client.set(key, 1, px=1)
                self.counts["event_early"] += 1

    async def _event_forged(self) -> None:
        """Events of leases that never were, and the same event of a real one three times."""
        async with self._redis_client() as client:
            keys = [key async for key in client.scan_iter("lease:*:*")]
            channel = f"__keyevent@{LEASE_DB}__:expired"
            await client.set(f"lease:{uuid4()}:1", 1, px=1)
            for key in (*keys[:1], b"lease:nonsense", b"lease:\xff:1"):
                for _ in range(3):
                    await client.publish(channel, key)
            self.counts["event_forged"] += 1

    async def _postgres_restart(self) -> None:
        async with self._postgres_turn:
            await asyncio.to_thread(self._postgres.restart)
            self.counts["postgres_restart"] += 1

    async def _postgres_crash(self) -> None:
        """SIGKILL and recovery; heartbeats of the last moment may be lost with it."""
        async with self._postgres_turn:
            self.log.append(("postgres_crash", datetime.now(UTC)))
            await asyncio.to_thread(self._postgres.kill)
            await asyncio.sleep(self._rng.uniform(0, 1))
            await asyncio.to_thread(self._postgres.restart)
            self.counts["postgres_crash"] += 1

    async def _postgres_terminate(self) -> None:
        with contextlib.suppress(*LOST):
            connection = await asyncpg.connect(self._dsn, timeout=2)
            try:
                ended = await connection.fetch(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = $1 AND random() < 0.7",
                    APPLICATION,
                )
            finally:
                await connection.close(timeout=2)
            self.counts["postgres_terminate"] += bool(ended)

    @asynccontextmanager
    async def _redis_client(self) -> AsyncIterator[redis.asyncio.Redis]:
        """A client for one fault; nothing happens while Redis is away by another fault."""
        client = redis.asyncio.from_url(self._redis.url(LEASE_DB), socket_timeout=2)
        try:
            with contextlib.suppress(*AWAY):
                yield client
        finally:
            await client.aclose()
