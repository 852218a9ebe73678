"""Which runners are alive: heard of by any request, written in batches.

A claim that finds nothing is a sign of life like a heartbeat, so idle runners count as well. The
rows are upstream's (`runners.status`: ACTIVE, IDLE, DEAD): for people, never for a decision.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta

import asyncpg
import structlog

from config.settings import Settings
from db import runners

INTERVAL_S = 5.0

log = structlog.get_logger()


class Liveness:
    """`saw()` costs a set's entry; `run_once()` writes them down; `run()` repeats it."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self._pool = pool
        # An idle runner is heard of once per claim wait, a busy one once per heartbeat.
        self._dead_after = timedelta(seconds=2 * settings.lease_ttl_s + settings.claim_wait_max_s)
        self._heard: set[str] = set()

    def saw(self, runner_id: str) -> None:
        """Note a request of this runner."""
        self._heard.add(runner_id)

    def forget(self, runner_id: str) -> None:
        """Drop what was noted of a runner that signed off: its goodbye is no sign of life."""
        self._heard.discard(runner_id)

    async def run_once(self) -> list[str]:
        """Write who was heard of and who fell silent; return those that are DEAD from now on."""
        heard, self._heard = self._heard, set()
        if heard:
            # In one order in every process, or two batches could deadlock.
            await runners.seen(self._pool, sorted(heard))
        dead = await runners.bury(self._pool, self._dead_after)
        for runner_id in dead:
            log.info("runner.silent", runner_id=runner_id)
        return dead

    async def run(self, succeeded: Callable[[], None]) -> None:
        """Write every few seconds until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.run_once()
                succeeded()
            except Exception as error:  # for people only: it must not stop, nor stop anything
                log.warning("liveness.unwritten", error=type(error).__name__)
