"""Attempts: a row per lease."""

from uuid import UUID

import asyncpg

from db.pool import Executor
from db.queries import load

SQL = load("attempts")
SHOWN_MAX = 200  # a run's lease_seq says how many there were


async def of_run(
    pool: Executor, run_id: UUID, runner_id: str | None = None
) -> list[asyncpg.Record]:
    """Return the newest attempts at a run, of all or of one runner, oldest first."""
    return await pool.fetch(SQL["of_run"], run_id, runner_id, SHOWN_MAX)


async def ended_lease(
    pool: Executor, run_id: UUID, lease_id: UUID, runner_id: str
) -> asyncpg.Record | None:
    """Return how a lease of this runner ended, with the answer it was given."""
    return await pool.fetchrow(SQL["by_lease"], run_id, lease_id, runner_id)
