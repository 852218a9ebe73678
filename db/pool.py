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

from config.urls import hosts_of, without_hosts

Executor = asyncpg.Pool | asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
Result = TypeVar("Result")
Given = ParamSpec("Given")

CONNECT_S = 5
HOST_S = 2  # of several hosts each: one that hangs must leave time for the next
ACQUIRE_S = 5
COMMAND_S = 10  # above the server's own statement_timeout: for a server that does not answer at all
CLOSE_S = 5
TRIES = 3
# Rolled back whole, and may succeed when done again: a deadlock, a race, a table that has been
# migrated since the connection prepared its statement (asyncpg has forgotten that one by now), and
# a session of a server that is the primary no more (it is closed by now).
LOST_RACES = (
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.InvalidCachedStatementError,
)
# The server of such a connection takes no changes any more, or does not answer: closed, not kept.
FORSAKEN = (asyncpg.ReadOnlySQLTransactionError, TimeoutError)
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


NO_PRIMARY = (
    "every server of the address is read-only (a standby, or default_transaction_read_only):"
    " promote one, or name all hosts (postgres://user@host1,host2/name)"
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
        """Give it back, unless its server was the primary once, or does not answer any more.

        Nor with a transaction that could not be rolled back (the server stalled, or was cut off):
        asyncpg would complain to the loop, and wait for the rollback once more. PostgreSQL's
        details are not told: they quote whole rows, leases and tokens among them.
        """
        if isinstance(exc_val, asyncpg.PostgresError):
            vars(exc_val)["detail"] = None
        if isinstance(exc_val, asyncpg.ReadOnlySQLTransactionError):
            await self.pool.expire_connections()
        if self.connection and (
            isinstance(exc_val, FORSAKEN) or _is_in_transaction(self.connection)
        ):
            self.connection.terminate()
        await super().__aexit__(exc_type, exc_val, exc_tb)


def _is_in_transaction(connection: Any) -> bool:
    try:
        return connection.is_in_transaction()
    except asyncpg.InterfaceError:  # it is closed, and the pool has let go of it
        return False


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


class ReadOnly(asyncpg.InterfaceError):
    """Every server that the address names is read-only."""


class Unreachable(asyncpg.InterfaceError):
    """No connection to the server: an OSError of ours is then none of the database."""


class Primary:
    """The one server of an address that takes changes, which may be another one tomorrow."""

    def __init__(self, dsn: str) -> None:
        """Nothing is connected yet. `dsn` may name several hosts."""
        hosts = hosts_of(dsn)
        self._dsn = without_hosts(dsn) if hosts[1:] else dsn
        self._hosts = [{"host": name, "port": port} for name, port in hosts] if hosts[1:] else [{}]

    async def connect(self, *_: Any, **options: Any) -> asyncpg.Connection:
        """Return a connection to the server that takes changes, the last known one asked first.

        Each host has its own time: asyncpg would let one that hangs use up that of all. Raises
        ReadOnly, Unreachable, or the server's own refusal.
        """
        if self._hosts[1:]:
            options["timeout"] = min(HOST_S, options["timeout"])
        failed: Exception | None = None
        for host in list(self._hosts):
            try:
                connection = await asyncpg.connect(
                    self._dsn, target_session_attrs="read-write", **host, **options
                )
            except asyncpg.TargetServerAttributeNotMatched:
                failed = ReadOnly(NO_PRIMARY)
            except (OSError, asyncpg.CannotConnectNowError) as error:
                failed = failed or error
            else:
                self._hosts.sort(key=lambda known: known is not host)
                return connection
        assert failed is not None
        if isinstance(failed, OSError):
            raise Unreachable(str(failed) or type(failed).__name__) from failed
        raise failed


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
        connect=Primary(dsn).connect,
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
        raise unready(error) from None
    try:
        yield pool
    finally:
        await _close(pool)


def unready(error: BaseException) -> DatabaseUnready:
    """Return what says that the database cannot be used."""
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
        raise unready(error) from None
    if missing:
        raise NotMigrated(f"the database lacks migration {newest}: run `bakeoff-queue db migrate`")


async def is_writable(pool: Executor) -> bool:
    """Return whether the server takes changes: it is no standby, and nobody has fenced it."""
    state = "SELECT current_setting('transaction_read_only')"
    return await pool.fetchval(state) == "off"


async def replication_risk(pool: Executor) -> str | None:
    """Return what an asynchronous failover could lose, with the fix; None when it loses nothing.

    A commit that no standby has confirmed is gone when its primary is. The accepted result is then
    claimed, and accepted, a second time.
    """
    row = await fetch_one(
        pool,
        "SELECT EXISTS (SELECT FROM pg_stat_replication) AS replicated,"
        " current_setting('synchronous_standby_names') AS standbys,"
        " current_setting('synchronous_commit') AS commit",
    )
    if not row["replicated"]:
        return None
    if not row["standbys"]:
        return (
            "standbys follow asynchronously: a failover may lose accepted results and cancels; set"
            " synchronous_standby_names"
        )
    if row["commit"] in ("off", "local"):
        return (
            f"synchronous_commit is {row['commit']}: a failover may lose accepted results and"
            " cancels; set it to on"
        )
    return None


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
