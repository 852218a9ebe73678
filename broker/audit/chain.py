"""The audit's hash chain: rows are chained behind the transactions that write them.

Every process runs it and one writes at a time; the others follow the head. A row is chained about a
second after its commit. Each hour the head is signed with the receipt key, into the log and into
the trail itself; and every receipt has the head of its moment, so that runners hold witnesses.
"""

import asyncio
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import structlog

from auth.audit_chain import GENESIS, HEAD_PURPOSE, entry_hash
from auth.receipts import ReceiptKeys
from broker.audit.log import SYSTEM, record, shown
from broker.documents.times import rfc3339
from db import audit
from db.audit import Entry
from db.pool import Executor, describe

BATCH = 500
INTERVAL_S = 1.0
HEAD_EVERY = timedelta(hours=1)
HEAD_ACTION = "audit.head"

log = structlog.get_logger()


class AuditChain:
    """Chains rows: `run_once()` is one pass, `run()` repeats it until it is cancelled."""

    def __init__(self, pool: asyncpg.Pool, keys: ReceiptKeys, public_url: str) -> None:
        self._pool = pool
        self._keys = keys
        self._public_url = public_url
        self._head: tuple[int, bytes] | None = None
        self._signed_at: datetime | None = None

    @property
    def head(self) -> dict[str, Any] | None:
        """The newest entry that this process knows of, as a receipt has it; None: there is none."""
        if self._head is None:
            return None
        seq, digest = self._head
        return {"seq": seq, "hash": digest.hex()}

    async def look(self) -> bool:
        """Learn the head; return whether there are rows to be chained."""
        found = await audit.look(self._pool)
        if found["seq"] is not None:
            self._head = found["seq"], found["hash"]
        return found["more"]

    async def run_once(self) -> int:
        """Chain what is to be chained, unless another process does; return how many rows."""
        chained = 0
        while await self.look():
            batch = await self._chain_batch()
            chained += batch
            if batch < BATCH:
                break
        await self._sign_hourly()
        return chained

    async def run(self, succeeded: Callable[[], None]) -> None:
        """Chain about once a second, for ever."""
        while True:
            try:
                await self.run_once()
                succeeded()
            except Exception as error:  # whatever fails, nothing is half chained: the next pass
                log.warning("audit.unchained", error=type(error).__name__, detail=describe(error))
            await asyncio.sleep(INTERVAL_S * random.uniform(0.8, 1.2))  # noqa: S311 (jitter)

    async def _chain_batch(self) -> int:
        async with self._pool.acquire() as connection, connection.transaction():
            if not await audit.lock_chain(connection):
                return 0
            # Read behind the lock: what another process has added is seen.
            found = await audit.look(connection)
            rows = await audit.take_unchained(connection, BATCH)
            entries = _link(found["seq"] or 0, found["hash"] or GENESIS, rows)
            if entries:
                await audit.chain(connection, entries)
        if entries:
            self._head = entries[-1].seq, entries[-1].hash
        return len(entries)

    async def _sign_hourly(self) -> None:
        """Sign the head, once an hour and by one process."""
        now = datetime.now(UTC)
        if self._head is None or (self._signed_at and now - self._signed_at < HEAD_EVERY):
            return
        async with self._pool.acquire() as connection, connection.transaction():
            if not await audit.lock_chain(connection):
                return
            self._signed_at = await audit.newest(connection, HEAD_ACTION)
            if self._signed_at is None or now - self._signed_at >= HEAD_EVERY:
                await self._sign(connection, now)
                self._signed_at = now

    async def _sign(self, connection: Executor, now: datetime) -> None:
        document = {**(self.head or {}), "at": rfc3339(now), "public_url": self._public_url}
        signed = self._keys.sign(document, HEAD_PURPOSE)
        await record(connection, SYSTEM, HEAD_ACTION, **signed)
        log.info(HEAD_ACTION, **signed)


def _link(seq: int, digest: bytes, rows: list[asyncpg.Record]) -> list[Entry]:
    """Return the entries of rows that follow an entry."""
    entries = []
    for row in rows:
        seq += 1
        digest = entry_hash(digest, seq, None if row["audit_id"] is None else shown(row))
        entries.append(Entry(seq, row["taken"], digest))
    return entries
