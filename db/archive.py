"""The archive: finished runs and their attempts, out of the way of the hot tables.

Reads of a run or of its attempts go through the views `every_run` and `every_attempt`.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from db.pool import Executor
from db.queries import load

SQL = load("archive")


@dataclass(frozen=True, slots=True)
class Place:
    """How far a pass over the finished runs has come: they are moved in the order they ended."""

    completed_at: datetime
    queue_id: UUID


START = Place(datetime(1, 1, 1, tzinfo=UTC), UUID(int=0))


async def archive(pool: Executor, after: timedelta, limit: int, place: Place) -> tuple[int, Place]:
    """Move up to `limit` runs that ended more than `after` ago and come after `place`.

    Returns how many were moved, and the place of the last one.
    """
    row = await pool.fetchrow(SQL["archive"], after, limit, place.completed_at, place.queue_id)
    if row is None:
        return 0, place
    return row["moved"], Place(row["completed_at"], row["queue_id"])


async def bring_back(connection: Executor, run_id: UUID) -> bool:
    """Move an archived FAILED or CANCELLED run back to the queue; return whether there was one."""
    return await connection.fetchval(SQL["bring_back"], run_id) is not None


async def fold_counts(pool: Executor) -> None:
    """Add up the rows that count the archived runs."""
    await pool.execute(SQL["fold_counts"])
