"""Liveness of runners and their processes: noted at any request, written in batches.

A claim that finds nothing is a sign of life like a heartbeat, so idle runners count as well. The
rows are upstream's (`runners.status`: ACTIVE, IDLE, DEAD): for people, never for a decision.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

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
        self._heard: dict[tuple[str, UUID], float] = {}  # when, by time.monotonic()

    def saw(self, runner_id: str, instance_id: UUID) -> None:
        """Note a request of this process of a runner."""
        self._heard[runner_id, instance_id] = time.monotonic()

    def forget(self, runner_id: str, instance_id: UUID) -> None:
        """Drop what was noted of a process that signed off: its goodbye is no sign of life."""
        self._heard.pop((runner_id, instance_id), None)

    async def run_once(self) -> list[str]:
        """Write who was heard of and who fell silent; return those that are DEAD from now on."""
        heard, self._heard = self._heard, {}
        if heard:
            now = time.monotonic()
            # In one order in every process, or two batches could deadlock.
            processes = [(*who, now - at) for who, at in sorted(heard.items())]
            for runner_id in await runners.seen(self._pool, processes):
                fix = "stop one of them, or give each machine a key of its own"
                log.warning("runner.two_processes", runner_id=runner_id, fix=fix)
        dead = await runners.mark_dead(self._pool, self._dead_after)
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
                log.warning("liveness.write_failed", error=type(error).__name__)
