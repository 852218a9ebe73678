"""The leases' TTL keys in Redis: their expiry is the bell that tells of a dead runner.

Best effort by design: Postgres decides, so no answer ever waits for these writes, and losing them
costs latency only (the sweep is the guarantee).
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import structlog

PREFIX = "lease:"
# The key outlives the deadline a little, so that the sweep it triggers finds the lease overdue.
GRACE = timedelta(milliseconds=250)
BACKLOG_MAX = 100_000

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LeaseKey:
    """Which lease, and how long it has to live."""

    queue_id: UUID
    lease_seq: int
    remaining: timedelta = timedelta()

    @property
    def name(self) -> str:
        """The key's name in Redis."""
        return f"{PREFIX}{self.queue_id}:{self.lease_seq}"


class LeaseKeys:
    """Sets and drops lease keys, a pipeline at a time, behind the answers."""

    def __init__(self, client: Any) -> None:
        """Write with `client`, a Topology's."""
        self._client = client
        self._changes: dict[str, int | None] = {}  # name -> PX in ms, or None to drop it
        self._writer: asyncio.Task[None] | None = None

    def put(self, leases: Iterable[LeaseKey]) -> None:
        """Let each lease's key live as long as the lease."""
        self._change({x.name: max(1, int((x.remaining + GRACE) / MILLISECOND)) for x in leases})

    def drop(self, leases: Iterable[LeaseKey]) -> None:
        """Remove the keys of leases that ended in time."""
        self._change({lease.name: None for lease in leases})

    async def flush(self) -> None:
        """Wait until what was asked for so far has been written, or given up."""
        if self._writer is not None:
            await self._writer

    def _change(self, changes: dict[str, int | None]) -> None:
        if len(self._changes) < BACKLOG_MAX:
            self._changes.update(changes)
        if self._changes and self._writer is None:
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._changes:
                changes, self._changes = self._changes, {}
                await self._write_once(changes)
        finally:
            self._writer = None

    async def _write_once(self, changes: dict[str, int | None]) -> None:
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                for name, milliseconds in changes.items():
                    # Not .set() and .unlink(): the first looks at twelve options each time, and of
                    # the second a Cluster's pipeline makes a coroutine, which would never run.
                    if milliseconds is None:
                        pipeline.execute_command("UNLINK", name)
                    else:
                        pipeline.execute_command("SET", name, 1, "PX", milliseconds)
                await pipeline.execute()
        except Exception as error:  # a Cluster's client raises more than RedisError
            log.warning("lease_keys.lost", keys=len(changes), error=type(error).__name__)


MILLISECOND = timedelta(milliseconds=1)
