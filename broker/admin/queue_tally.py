"""Gauges of the queue and the fleet: queried when a scrape comes, at most every few seconds."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import asyncpg

from broker.admin.runs import STATUSES
from broker.telemetry import Telemetry
from db import run_queue, runners

# Each process is scraped by itself; the count is one pass over the table.
REMEMBERED_S = 10.0
LOOK_S = 2.0
COUNTED_MAX = 10_000  # runs of one model that are counted by reason
# Why no live runner can be given a run, the first that holds; the labels of `unclaimable_runs`.
REASONS = ("paused", "not_before", "no_runner", "vram", "quantization", "no_runner_has_both")
RUNNER_STATES = ("idle", "busy", "draining", "paused", "stale", "revoked")


class QueueTally:
    """Keeps the gauges of the queue and the fleet in `telemetry` up to date."""

    def __init__(self, pool: asyncpg.Pool, telemetry: Telemetry, stale_after: timedelta) -> None:
        """Count a runner as stale when it was silent for `stale_after`."""
        self._pool = pool
        self._telemetry = telemetry
        self._stale_after = stale_after
        self._looking = asyncio.Lock()
        self._looked_at = -math.inf  # monotonic

    async def refresh(self) -> None:
        """Query again if it is time; a database that does not answer leaves the gauges empty.

        Old numbers would look like a queue that stands still, and a failing scrape would hide all
        the other metrics just when they are needed.
        """
        async with self._looking:
            if time.monotonic() - self._looked_at < REMEMBERED_S:
                return
            gauges = self._telemetry
            try:
                async with asyncio.timeout(LOOK_S):
                    self._show_runs(await run_queue.tally(self._pool))
                    backlog = await run_queue.backlog(self._pool, COUNTED_MAX, self._stale_after)
                    self._show_backlog(backlog)
                    self._show_fleet(await runners.by_state(self._pool, self._stale_after))
            except Exception:  # whatever it is, the scrape goes on without these
                for gauge in (gauges.runs, gauges.unclaimable, gauges.runners):
                    gauge.clear()
                gauges.oldest_pending.set(math.nan)
                gauges.leases_active.set(math.nan)
            self._looked_at = time.monotonic()

    def _show_runs(self, rows: list[asyncpg.Record]) -> None:
        counts = {row["status"]: row["runs"] for row in rows}
        for status in STATUSES:
            self._telemetry.runs.labels(status).set(counts.get(status, 0))
        self._telemetry.oldest_pending.set(max((row["oldest_s"] for row in rows), default=0))
        leased = counts.get("CLAIMED", 0) + counts.get("IN_PROGRESS", 0)
        self._telemetry.leases_active.set(leased)

    def _show_backlog(self, rows: Sequence[asyncpg.Record]) -> None:
        counts: Counter[str] = Counter()
        for row in rows:
            reason = _unclaimable(row)
            if reason is not None:
                counts[reason] += row["ready"]
            counts[reason or "not_before"] += row["later"]
        for reason in REASONS:
            self._telemetry.unclaimable.labels(reason).set(counts[reason])

    def _show_fleet(self, rows: Sequence[asyncpg.Record]) -> None:
        counts = {row["state"]: row["runners"] for row in rows}
        for state in RUNNER_STATES:
            self._telemetry.runners.labels(state).set(counts.get(state, 0))


def _unclaimable(row: asyncpg.Record) -> str | None:
    """Return why no live runner can be given a model's runs; None when one can."""
    if row["paused"]:
        return "paused"
    if row["fits"]:
        return None
    if not row["anybody"]:
        return "no_runner"
    if not row["large_enough"]:
        return "vram"
    return "no_runner_has_both" if row["supported"] else "quantization"
