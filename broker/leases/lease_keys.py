"""The leases' TTL keys in Redis: their expiry is the bell that tells of a dead runner.

Best effort by design: Postgres decides, so no answer ever waits for these writes, and losing them
costs latency only (the sweep is the guarantee).
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import structlog

PREFIX = "lease:"
# The key outlives the deadline a little, so that the sweep it triggers finds the lease overdue.
GRACE = timedelta(milliseconds=250)
BACKLOG_MAX = 100_000
# Changes gather for so long: a pipeline costs the process as much as a dozen of the keys in it.
GATHER_S = 0.05

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LeaseKey:
    """The name of a lease in Redis, and its remaining life."""

    queue_id: UUID
    lease_seq: int
    remaining: timedelta = timedelta()

    @property
    def name(self) -> str:
        """The key's name in Redis."""
        return f"{PREFIX}{self.queue_id}:{self.lease_seq}"


class LeaseKeys:
    """Sets and drops lease keys, a pipeline at a time, behind the answers."""

    def __init__(self, client: Any, wrote: Callable[[bool], None] = lambda _: None) -> None:
        """Write with `client`, a Topology's; tell `wrote` whether each pipeline was taken."""
        self._client = client
        self._wrote = wrote
        self._changes: dict[str, float | None] = {}  # name -> when it expires, or None to drop it
        self._writer: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def put(self, leases: Iterable[LeaseKey]) -> None:
        """Let each lease's key live as long as the lease."""
        now = time.monotonic()
        self._change({x.name: now + (x.remaining + GRACE).total_seconds() for x in leases})

    def drop(self, leases: Iterable[LeaseKey]) -> None:
        """Remove the keys of leases that ended in time."""
        self._change({lease.name: None for lease in leases})

    async def flush(self) -> None:
        """Wait until what was asked for so far has been written, or given up."""
        if self._writer is not None:
            self._hurry.set()
            await self._writer

    def _change(self, changes: dict[str, float | None]) -> None:
        if len(self._changes) < BACKLOG_MAX:
            self._changes.update(changes)
        if self._changes and self._writer is None:
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._changes:
                with suppress(TimeoutError):
                    async with asyncio.timeout(GATHER_S):
                        await self._hurry.wait()
                changes, self._changes = self._changes, {}
                await self._write_once(changes)
        finally:
            self._hurry.clear()
            self._writer = None

    async def _write_once(self, changes: dict[str, float | None]) -> None:
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                now = time.monotonic()
                for name, expires in changes.items():
                    # Not .set() and .unlink(): the first looks at twelve options each time, and of
                    # the second a Cluster's pipeline makes a coroutine, which would never run.
                    if expires is None:
                        pipeline.execute_command("UNLINK", name)
                    else:
                        left_ms = max(1, int((expires - now) * 1000))
                        pipeline.execute_command("SET", name, 1, "PX", left_ms)
                await pipeline.execute()
            self._wrote(True)
        except Exception as error:  # a Cluster's client raises more than RedisError
            self._wrote(False)
            log.warning("lease_keys.lost", keys=len(changes), error=type(error).__name__)
