"""The connection pool, and what every connection promises."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import asyncpg

Executor = asyncpg.Pool | asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
Result = TypeVar("Result")
Given = ParamSpec("Given")

CONNECT_S = 5
ACQUIRE_S = 5
COMMAND_S = 10  # above the server's own statement_timeout: for a server that does not answer at all
CLOSE_S = 5
TRIES = 3
# Rolled back whole, and may succeed when done again: a deadlock, a race, and a table that has been
# migrated since the connection prepared its statement (asyncpg has forgotten that one by now).
LOST_RACES = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.InvalidCachedStatementError,
)
RETRY_WITHIN_S = 0.05

# Nothing the service does takes seconds; what does is stuck, and must not hold a row for others.
SESSION = {
    "application_name": "bakeoff-queue",
    "timezone": "UTC",
    "statement_timeout": "5s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "5s",
    # Planned once per connection: to plan a claim anew takes longer than to run it.
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}


# What is raised when the server is away, refuses us or cuts a connection off. asyncpg's
# InternalClientError is among them: a statement sent after the server's last word was read, and
# before the end of the connection was, meets a protocol that is in no state to take it.
LOST = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class DatabaseUnready(Exception):
    """The database cannot be used; the message names the fix."""


class NotMigrated(DatabaseUnready):
    """The database is there, but lacks a migration that this code needs."""


async def _prepare(connection: asyncpg.Connection) -> None:
    # The standard library's json, not a faster one: a job may hold integers beyond 64 bits.
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads
    )


async def _keep(connection: asyncpg.Connection) -> None:
    """Leave a connection as it is: nobody changes its session, and to reset it is a round trip.

    asyncpg has rolled back by now what was left open.
    """


class _Borrowed(asyncpg.pool.PoolAcquireContext):
    """A connection for as long as a block runs, and what its errors may tell."""

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_val: BaseException | None = None,
        exc_tb: TracebackType | None = None,
    ) -> None:
        """Give it back. PostgreSQL's details quote whole rows, leases and tokens among them."""
        if isinstance(exc_val, asyncpg.PostgresError):
            vars(exc_val)["detail"] = None
        await super().__aexit__(exc_type, exc_val, exc_tb)


class BoundedPool(asyncpg.Pool):
    """A pool whose waits end: for a connection after `ACQUIRE_S`, for an answer after `COMMAND_S`.

    asyncpg would wait for ever for a connection; a request that waits is better answered 503. A
    statement that lost a deadlock, or could not be serialized, is sent again: it has been rolled
    back whole, so that is safe.
    """

    def acquire(self, *, timeout: float | None = None) -> Any:
        """Take a connection. Raises TimeoutError when all are busy for too long."""
        return _Borrowed(self, timeout or ACQUIRE_S)

    async def execute(self, *arguments: Any, **options: Any) -> str:
        """Run a statement."""
        return await retried(super().execute, *arguments, **options)

    async def fetch(self, *arguments: Any, **options: Any) -> list[asyncpg.Record]:
        """Run a statement and return its rows."""
        return await retried(super().fetch, *arguments, **options)

    async def fetchrow(self, *arguments: Any, **options: Any) -> asyncpg.Record | None:
        """Run a statement and return its first row."""
        return await retried(super().fetchrow, *arguments, **options)

    async def fetchval(self, *arguments: Any, **options: Any) -> Any:
        """Run a statement and return the first value of its first row."""
        return await retried(super().fetchval, *arguments, **options)


async def retried(
    work: Callable[..., Awaitable[Result]], *arguments: Any, **options: Any
) -> Result:
    """Return what `work` does; do it up to three times while it meets `LOST_RACES`.

    `work` is a statement or a whole transaction: nothing of a failed try is left.
    """
    for _ in range(TRIES - 1):
        try:
            return await work(*arguments, **options)
        except LOST_RACES:
            await asyncio.sleep(random.uniform(0, RETRY_WITHIN_S))  # noqa: S311 (jitter)
    return await work(*arguments, **options)


def retries(
    verb: Callable[Given, Coroutine[Any, Any, Result]],
) -> Callable[Given, Coroutine[Any, Any, Result]]:
    """Make a verb of one transaction try again, whole, when it loses a deadlock or a race."""

    @wraps(verb)
    async def tried(*arguments: Given.args, **options: Given.kwargs) -> Result:
        return await retried(verb, *arguments, **options)

    return tried


@asynccontextmanager
async def open_pool(dsn: str, max_size: int) -> AsyncIterator[asyncpg.Pool]:
    """Yield a pool of up to `max_size` connections, closed at the end.

    Raises DatabaseUnready, in one line, when the server cannot be reached or refuses us.
    """
    pool = BoundedPool(
        dsn,
        connection_class=asyncpg.Connection,
        record_class=asyncpg.Record,
        init_size=1,
        min_size=1,
        max_size=max_size,
        max_queries=50_000,
        max_inactive_connection_lifetime=300,
        connect=None,
        setup=None,
        init=_prepare,
        reset=_keep,
        loop=None,
        server_settings=SESSION,
        timeout=CONNECT_S,
        command_timeout=COMMAND_S,
    )
    try:
        await pool
    except (*LOST, ValueError) as error:
        raise _unready(error) from None
    try:
        yield pool
    finally:
        await _close(pool)


def _unready(error: BaseException) -> DatabaseUnready:
    return DatabaseUnready(
        f"PostgreSQL cannot be used: {describe(error)};"
        " check BAKEOFF_QUEUE_DATABASE_URL and that the server runs"
    )


async def _close(pool: asyncpg.Pool) -> None:
    """Close the pool; what still holds a connection after a while is cut off."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await pool.close()
    except TimeoutError:
        pool.terminate()


def describe(error: BaseException) -> str:
    """Return the error's first line, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


async def check_migrated(pool: asyncpg.Pool, newest: str) -> None:
    """Raise NotMigrated unless the migration `newest` has been applied.

    Raises DatabaseUnready when the server is lost before it says so.
    """
    try:
        missing = await missing_migration(pool, newest)
    except LOST as error:
        raise _unready(error) from None
    if missing:
        raise NotMigrated(f"the database lacks migration {newest}: run `bakeoff-queue db migrate`")


async def missing_migration(pool: Executor, newest: str) -> bool:
    """Return whether the migration `newest` is still to be applied."""
    known = await pool.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
    if not known:
        return True
    statement = "SELECT EXISTS (SELECT FROM schema_migrations WHERE version = $1)"
    return not await pool.fetchval(statement, newest)


async def fetch_planned(
    pool: asyncpg.Pool, statement: str, *arguments: Any
) -> list[asyncpg.Record]:
    """Return the rows of a statement that is planned for these arguments, and no others.

    For listings with filters that may be left out: one plan for all of them (`SESSION`) can use no
    filter to find its rows, and reads everything.
    """
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL plan_cache_mode = force_custom_plan")
        return await connection.fetch(statement, *arguments)


async def fetch_one(executor: Executor, statement: str, *arguments: Any) -> asyncpg.Record:
    """Return the row of a statement that always gives one."""
    row = await executor.fetchrow(statement, *arguments)
    assert row is not None, statement
    return row
