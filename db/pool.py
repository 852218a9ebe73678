"""The connection pool, and what every connection promises."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

Executor = asyncpg.Pool | asyncpg.Connection | asyncpg.pool.PoolConnectionProxy

# Nothing the service does takes seconds; what does is stuck, and must not hold a row for others.
SESSION = {
    "application_name": "bakeoff-queue",
    "timezone": "UTC",
    "statement_timeout": "5s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "5s",
}


class DatabaseUnready(Exception):
    """The database cannot be used; the message names the fix."""


class NotMigrated(DatabaseUnready):
    """The database is there, but lacks a migration that this code needs."""


async def _prepare(connection: asyncpg.Connection) -> None:
    # The standard library's json, not a faster one: a job may hold integers beyond 64 bits.
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads
    )


@asynccontextmanager
async def open_pool(dsn: str, max_size: int) -> AsyncIterator[asyncpg.Pool]:
    """Yield a pool of up to `max_size` connections, closed at the end.

    Raises DatabaseUnready, in one line, when the server cannot be reached or refuses us.
    """
    try:
        pool = await asyncpg.create_pool(
            dsn, min_size=1, max_size=max_size, init=_prepare, server_settings=SESSION, timeout=5
        )
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError) as error:
        raise DatabaseUnready(
            f"PostgreSQL cannot be used: {describe(error)};"
            " check BAKEOFF_QUEUE_DATABASE_URL and that the server runs"
        ) from None
    try:
        yield pool
    finally:
        await pool.close()


def describe(error: BaseException) -> str:
    """Return the error's first line, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


async def check_migrated(pool: asyncpg.Pool, newest: str) -> None:
    """Raise NotMigrated unless the migration `newest` has been applied."""
    if await missing_migration(pool, newest):
        raise NotMigrated(f"the database lacks migration {newest}: run `bakeoff-queue db migrate`")


async def missing_migration(pool: Executor, newest: str) -> bool:
    """Return whether the migration `newest` is still to be applied."""
    known = await pool.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
    if not known:
        return True
    statement = "SELECT EXISTS (SELECT FROM schema_migrations WHERE version = $1)"
    return not await pool.fetchval(statement, newest)


async def fetch_one(executor: Executor, statement: str, *arguments: Any) -> asyncpg.Record:
    """Return the row of a statement that always gives one."""
    row = await executor.fetchrow(statement, *arguments)
    assert row is not None, statement
    return row
