"""The ledger: a row per lease."""

from uuid import UUID

import asyncpg

from db.pool import Executor
from db.queries import load

SQL = load("attempts")


async def of_run(pool: Executor, run_id: UUID) -> list[asyncpg.Record]:
    """Return the attempts at a run, oldest first."""
    return await pool.fetch(SQL["of_run"], run_id)


async def ended_lease(
    pool: Executor, run_id: UUID, lease_id: UUID, runner_id: str
) -> asyncpg.Record | None:
    """Return how a lease of this runner ended, with the answer it was given."""
    return await pool.fetchrow(SQL["by_lease"], run_id, lease_id, runner_id)
