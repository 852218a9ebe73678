"""The archiver: finished runs leave the hot tables some days after their end.

Every process runs it, without a leader: SKIP LOCKED makes the batches disjoint. Nothing waits for
it, so it takes small batches with a rest between them.
"""

import asyncio
import random
from collections.abc import Callable
from datetime import timedelta

import asyncpg
import structlog

from config.settings import Settings
from db import archive
from db.pool import describe

# Small: the rows of a batch are locked together, and a requeue of one of them waits.
BATCH = 200
REST_S = 0.05
# Nobody waits for it: a run that is archived minutes late costs nothing.
INTERVAL_S = 300.0

log = structlog.get_logger()


class Archiver:
    """Moves old runs: `run_once()` is one pass, `run()` repeats it until it is cancelled."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self._pool = pool
        self._after = timedelta(seconds=settings.archive_after_s)

    async def run_once(self) -> int:
        """Archive every run that is old enough; return how many there were."""
        place, moved = archive.START, 0
        while True:
            batch, place = await archive.archive(self._pool, self._after, BATCH, place)
            moved += batch
            if batch < BATCH:
                break
            await asyncio.sleep(REST_S)
        if moved:
            await archive.fold_counts(self._pool)
            log.info("archive.moved", runs=moved)
        return moved

    async def run(self, succeeded: Callable[[], None]) -> None:
        """Archive every few minutes, for ever; a process's first pass comes at a random moment."""
        await asyncio.sleep(random.uniform(0, INTERVAL_S))  # noqa: S311 (jitter)
        while True:
            try:
                await self.run_once()
                succeeded()
            except Exception as error:  # whatever fails, nothing is half moved: the next pass
                log.warning("archive.failed", error=type(error).__name__, detail=describe(error))
            await asyncio.sleep(INTERVAL_S * random.uniform(0.8, 1.2))  # noqa: S311 (jitter)
