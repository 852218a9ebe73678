"""Rows past their retention: `sql/prune.sql` has a count and a delete for each kind.

An accepted result is of no kind: submissions, their files and metrics, archived COMPLETE runs and
the audit trail are never deleted.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from db.pool import Executor, fetch_one
from db.queries import load

SQL = load("prune")
COUNT_S = 120

Kind = Literal["failed_runs", "ledgers", "refusals", "answers", "nonces", "revoked_tokens"]


@dataclass(frozen=True, slots=True)
class Found:
    """The number of rows past their retention, and the age of the oldest (None: no row)."""

    rows: int
    oldest: datetime | None


async def count(connection: Executor, kind: Kind, keep: timedelta) -> Found:
    """Return what of a kind is older than `keep`. In a transaction: it may take its time."""
    await connection.execute(f"SET LOCAL statement_timeout = '{COUNT_S}s'")
    row = await connection.fetchrow(SQL[f"count_{kind}"], keep, timeout=COUNT_S)
    assert row is not None, kind
    return Found(row["found"], row["oldest"])


async def delete(connection: Executor, kind: Kind, keep: timedelta, limit: int) -> int:
    """Delete up to `limit` rows of a kind that are older than `keep`; return how many."""
    row = await fetch_one(connection, SQL[f"delete_{kind}"], keep, limit)
    return row["count"]
