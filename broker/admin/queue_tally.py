"""How many runs there are, by state: looked up when somebody scrapes, and not too often."""

import asyncio
import math
import time

import asyncpg

from broker.admin.runs import STATUSES
from broker.telemetry import Telemetry
from db import run_queue

# Each process is scraped by itself; the count is one pass over the table.
REMEMBERED_S = 10.0
LOOK_S = 2.0


class QueueTally:
    """Keeps the queue's gauges of `telemetry` up to date."""

    def __init__(self, pool: asyncpg.Pool, telemetry: Telemetry) -> None:
        self._pool = pool
        self._telemetry = telemetry
        self._looking = asyncio.Lock()
        self._looked_at = -math.inf  # monotonic

    async def refresh(self) -> None:
        """Look again if it is time; a database that does not answer leaves the gauges empty.

        Old numbers would look like a queue that stands still, and a failing scrape would hide all
        the other metrics just when they are needed.
        """
        async with self._looking:
            if time.monotonic() - self._looked_at < REMEMBERED_S:
                return
            try:
                async with asyncio.timeout(LOOK_S):
                    self._show(await run_queue.tally(self._pool))
            except Exception:  # whatever it is, the scrape goes on without these
                self._telemetry.runs.clear()
                self._telemetry.oldest_pending.set(math.nan)
            self._looked_at = time.monotonic()

    def _show(self, rows: list[asyncpg.Record]) -> None:
        counts = {row["status"]: row["runs"] for row in rows}
        for status in STATUSES:
            self._telemetry.runs.labels(status).set(counts.get(status, 0))
        self._telemetry.oldest_pending.set(max((row["oldest_s"] for row in rows), default=0))
