"""Prune: delete what is past its retention, and nothing that a number on the leaderboard rests on.

In batches, each a transaction of its own with its row of the audit trail: it may be interrupted,
and may run on several hosts at once, whose batches are disjoint (SKIP LOCKED).
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import asyncpg

from broker.audit.log import record
from config.settings import Settings
from db import archive, prune
from db.audit import database_actor
from db.pool import retries
from db.prune import Found, Kind

BATCH = 500


@dataclass(frozen=True, slots=True)
class Retention:
    """A kind of row, in a reader's words, and how long it is kept."""

    kind: Kind
    what: str
    keep: timedelta


def retentions(settings: Settings) -> list[Retention]:
    """Return the kinds in the order they are pruned, with what the settings say of each."""
    none = timedelta(0)
    failed, ledgers, refusals, answers = (
        timedelta(seconds=keep)
        for keep in (
            settings.keep_failed_s,
            settings.keep_ledgers_s,
            settings.keep_refusals_s,
            settings.keep_answers_s,
        )
    )
    return [
        Retention("failed_runs", "FAILED and CANCELLED runs, archived", failed),
        Retention("ledgers", "attempts of COMPLETE runs, archived", ledgers),
        Retention("refusals", "records of refused bundles", refusals),
        Retention("answers", "answers kept for an Idempotency-Key", answers),
        Retention("nonces", "registration nonces, expired", none),
        Retention("revoked_tokens", "revocations of tokens, expired", none),
    ]


class Prune:
    """Counts and deletes what is past its time."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def look(self, of: Retention) -> Found:
        """Return what would be deleted of a kind. Changes nothing."""
        async with self._pool.acquire() as connection, connection.transaction():
            return await prune.count(connection, of.kind, of.keep)

    async def delete(self, of: Retention, progress: Callable[[int], None]) -> int:
        """Delete all of a kind that is past its time; tell `progress` how many are gone so far."""
        deleted = 0
        while True:
            batch = await self._delete_batch(of)
            deleted += batch
            if batch:
                progress(deleted)
            if batch < BATCH:
                break
        if of.kind == "failed_runs" and deleted:
            await archive.fold_counts(self._pool)
        return deleted

    @retries
    async def _delete_batch(self, of: Retention) -> int:
        async with self._pool.acquire() as connection, connection.transaction():
            deleted = await prune.delete(connection, of.kind, of.keep, BATCH)
            if deleted:
                keep_s = int(of.keep.total_seconds())
                await record(
                    connection,
                    await database_actor(connection),
                    "prune",
                    kind=of.kind,
                    rows=deleted,
                    keep_s=keep_s,
                )
            return deleted
