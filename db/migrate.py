"""Migrations: applies the files of `db/migrations` to a database that others are using.

A statement that waits for a table's lock holds up every later request for that table. So each try
waits `TRY_S` only, gives up what it holds, pauses, and tries again, until `Limits.wait_s` are over;
meanwhile it says who holds the lock. How long a statement may work is a limit of its own.

One `db migrate` works at a time. The lock for that belongs to a transaction, not to a session: a
pooler (PgBouncer) hands a session that keeps a lock to somebody else. `CREATE INDEX CONCURRENTLY`
waits for every transaction in which a statement runs at the wrong moment: so nothing runs in the
transaction that has the lock, and whoever waits for the lock asks in a new one each time.
"""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from db import roles
from db.migration_files import Migration, Script, read_migrations
from db.pool import CONNECT_S, LOST, DatabaseUnready, Primary, ReadOnly, describe
from db.queries import load

COME_UP_S = 10.0  # a database that starts together with us
TRY_S = 1.0  # shorter than the lock_timeout of requests: behind a try, none of them fails
PAUSE_S = (1.0, 3.0)  # what piled up behind a try has been served by then
LOOK_S = 0.25
TELL_EVERY_S = 5.0
WORKER = "bakeoff-queue migrate"
_CONCURRENT = re.compile(r"\bCONCURRENTLY\b", re.IGNORECASE)
_NEW_INDEX = re.compile(r"CREATE\s+(?:UNIQUE\s+)?INDEX\s+CONCURRENTLY\s+IF\s+NOT\s+EXISTS\s+(\w+)",
                        re.IGNORECASE)  # fmt: skip
# A try that another transaction made fail, and that left nothing behind.
_REFUSED = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)

Tell = Callable[[str], None]
SQL = load("migrations")


class MigrationFailed(DatabaseUnready):
    """A migration was not applied; the message names it and the fix."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait for locks, in all, and how long one statement may work."""

    wait_s: float = 600
    work_s: float = 3600


def migrate(dsn: str, tell: Tell = lambda _: None, limits: Limits | None = None) -> None:
    """Bring the database at `dsn` to the newest version; safe to run from several processes.

    Waits 10 s for the server to come up. Raises DatabaseUnready. Not for use in an event loop.
    """

    async def work() -> None:
        async with _migrator(dsn, tell, limits or Limits()) as migrator:
            for migration, applied in await migrator.status():
                if not applied:
                    await migrator.apply(migration, migration.up, SQL["record"], "applied")
            await migrator.renew_roles()

    asyncio.run(_in_words(work()))


def roll_back(dsn: str, tell: Tell = lambda _: None, limits: Limits | None = None) -> None:
    """Undo the newest applied migration. Raises DatabaseUnready. Not for use in an event loop."""

    async def work() -> None:
        async with _migrator(dsn, tell, limits or Limits()) as migrator:
            applied = [migration for migration, applied in await migrator.status() if applied]
            if applied:
                newest = applied[-1]
                await migrator.apply(newest, newest.down, SQL["forget"], "undone")

    asyncio.run(_in_words(work()))


def status(dsn: str) -> list[tuple[str, bool]]:
    """Return each migration's name, and whether it is applied. Raises DatabaseUnready."""

    async def work() -> list[tuple[str, bool]]:
        async with _connected(dsn, WORKER) as connection:
            return [(found.name, applied) for found, applied in await _status(connection)]

    return asyncio.run(_in_words(work()))


async def _in_words(work: Awaitable[Any]) -> Any:
    """Do `work`; a server that is lost meanwhile is told as DatabaseUnready."""
    try:
        return await work
    except LOST as error:
        raise DatabaseUnready(f"migrations: {describe(error)}") from None


async def _connect(dsn: str, name: str) -> asyncpg.Connection:
    """Return a connection called `name`; a server that does not answer yet is waited for."""
    deadline = _now() + COME_UP_S
    while True:
        try:
            return await Primary(dsn).connect(
                timeout=CONNECT_S,
                statement_cache_size=0,  # a pooler gives each statement to another session
                server_settings={"application_name": name},
            )
        except (OSError, ReadOnly, asyncpg.CannotConnectNowError):
            if _now() > deadline:
                raise
            await asyncio.sleep(LOOK_S)
        except ValueError as error:
            raise DatabaseUnready(f"migrations: {describe(error)}") from None


async def _fetch(connection: asyncpg.Connection, *query: Any) -> list[asyncpg.Record]:
    """Return a query's rows. Without a transaction, a pooler parts its parse from its run."""
    async with connection.transaction():
        return await connection.fetch(*query)


async def _status(connection: asyncpg.Connection) -> list[tuple[Migration, bool]]:
    ((known,),) = await _fetch(connection, SQL["is_known"])
    applied = {row["version"] for row in await _fetch(connection, SQL["applied"])} if known else ()
    return [(found, found.version in applied) for found in read_migrations()]


@asynccontextmanager
async def _connected(dsn: str, name: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await _connect(dsn, name)
    try:
        yield connection
    finally:
        connection.terminate()  # whatever is open in it, nobody needs it any more


@asynccontextmanager
async def _migrator(dsn: str, tell: Tell, limits: Limits) -> AsyncIterator["_Migrator"]:
    """Yield what migrates, while nobody else does."""
    async with (
        _connected(dsn, f"{WORKER} (lock)") as keeper,
        _connected(dsn, f"{WORKER} (watch)") as watcher,
        _connected(dsn, WORKER) as worker,
    ):
        await _take_turn(keeper, tell, limits.wait_s)
        await worker.execute(SQL["make_table"])
        yield _Migrator(keeper, watcher, worker, tell, limits)


async def _take_turn(keeper: asyncpg.Connection, tell: Tell, wait_s: float) -> None:
    """Begin the transaction that has the lock of all migrations. Raises MigrationFailed."""
    began, told = _now(), False
    while not await _has_turn(keeper):
        if _now() - began > wait_s:
            raise MigrationFailed(
                f"migrations: another `db migrate` has been at work for {wait_s:g} s: wait for it"
            )
        if not told:
            tell("another `db migrate` is at work on this database: waiting for it")
        told = True
        await asyncio.sleep(LOOK_S)


async def _has_turn(keeper: asyncpg.Connection) -> bool:
    """Try once. A transaction that stayed open and tried again would stop CONCURRENTLY."""
    transaction = keeper.transaction()
    await transaction.start()
    if not await keeper.fetchval(SQL["try_lock"]):
        await transaction.rollback()
        return False
    # `execute` comes last: what `fetchval` leaves open has a snapshot for CONCURRENTLY to wait for.
    await keeper.execute(SQL["keep_transaction"])
    return True


def _now() -> float:
    return asyncio.get_running_loop().time()


class _Migrator:
    """Applies migrations on `worker`; `keeper` has the turn, `watcher` sees who blocks `worker`."""

    def __init__(
        self,
        keeper: asyncpg.Connection,
        watcher: asyncpg.Connection,
        worker: asyncpg.Connection,
        tell: Tell,
        limits: Limits,
    ) -> None:
        self._keeper = keeper
        self._watcher = watcher
        self._worker = worker
        self._tell = tell
        self._limits = limits
        self._waited_s = 0.0
        self._at = ""  # the statement at work
        self._blockers = ""  # who made it wait last
        self._pausing = False

    async def status(self) -> list[tuple[Migration, bool]]:
        """Return each migration, and whether it is applied."""
        return await _status(self._worker)

    async def renew_roles(self) -> None:
        """Give the roles of the database, where it has them, what the migrations added."""
        await roles.renew(self._worker)

    async def apply(self, migration: Migration, script: Script, record: str, deed: str) -> None:
        """Carry out one direction of a migration and record it. Raises MigrationFailed."""
        self._waited_s, self._blockers = 0.0, ""
        began = _now()
        try:
            await self._watched(self._carry_out(migration, script, record), migration.name)
        except asyncpg.PostgresError as error:
            raise MigrationFailed(self._why(error, migration)) from None
        seconds = _now() - began
        self._tell(f"{migration.name}: {deed} in {seconds:.1f} s")

    async def _carry_out(self, migration: Migration, script: Script, record: str) -> None:
        if script.in_transaction:
            await self._patiently(lambda: self._transaction(migration, script, record))
            return
        await self._check_session(migration)
        for at, statement in self._numbered(script):
            self._at = at
            await self._patiently(lambda statement=statement: self._alone(statement))
        await self._worker.execute(record, migration.version)

    async def _transaction(self, migration: Migration, script: Script, record: str) -> None:
        async with self._worker.transaction():
            await self._limit(TRY_S, local=True)
            for at, statement in self._numbered(script):
                self._at = at
                await self._worker.execute(statement)
            await self._worker.execute(record, migration.version)

    async def _alone(self, statement: str) -> None:
        """Run a statement without a transaction around it."""
        if not _CONCURRENT.search(statement):
            await self._limit(TRY_S, local=False)
        else:
            # Nobody waits behind it, and to begin anew would cost all of its work.
            await self._limit(self._limits.wait_s - self._waited_s, local=False)
            index = _NEW_INDEX.match(statement)
            # What an interrupted one left is invalid, and IF NOT EXISTS would be content with it.
            if index and await self._worker.fetchval(SQL["is_invalid"], index[1]):
                await self._worker.execute(f"DROP INDEX CONCURRENTLY {index[1]}")
        await self._worker.execute(statement)

    async def _limit(self, wait_s: float, *, local: bool) -> None:
        work_s = self._limits.work_s + wait_s  # the server counts a wait as work
        for name, seconds in (("lock_timeout", wait_s), ("statement_timeout", work_s)):
            milliseconds = str(max(1, round(seconds * 1000)))
            await self._worker.fetchval(SQL["set"], name, milliseconds, local)

    async def _patiently(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` again and again while it gets no lock, until the time for that is over."""
        while True:
            try:
                return await work()
            except _REFUSED:
                pause_s = random.uniform(*PAUSE_S)  # noqa: S311 (jitter)
                self._waited_s += TRY_S + pause_s
                if self._waited_s > self._limits.wait_s:
                    raise
                self._pausing = True
                await asyncio.sleep(pause_s)
                self._pausing = False

    async def _check_session(self, migration: Migration) -> None:
        """Raise MigrationFailed behind a pooler: our time-outs would be set for other clients."""
        ((pid,),) = await _fetch(self._worker, "SELECT pg_backend_pid()")
        if pid != self._worker.get_server_pid():
            raise MigrationFailed(
                f"migration {migration.name} needs a session of its own, and this one is a"
                " pooler's: set BAKEOFF_QUEUE_DATABASE_LISTEN_URL to PostgreSQL itself"
            )

    async def _watched(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do `work` and tell how it goes. Raises what either of them raises."""
        tasks = [asyncio.create_task(work), asyncio.create_task(self._watch(name))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _watch(self, name: str) -> None:
        """Tell every few seconds what the migration does, or who makes it wait."""
        told = began = _now()
        while not self._keeper.is_closed():
            await asyncio.sleep(LOOK_S)
            rows = await _fetch(self._watcher, SQL["blockers"], WORKER)
            is_first = rows and not self._blockers
            self._blockers = "; ".join(map(_blocker, rows)) or self._blockers
            if is_first or _now() - told > TELL_EVERY_S:
                told = _now()
                waits = rows or self._pausing
                what = f"waits for a lock, held by {self._blockers}" if waits else "at work"
                self._tell(f"{name}: {self._at}, {told - began:.0f} s: {what}")
        raise MigrationFailed(f"migration {name}: the session that had the lock of all was ended")

    def _numbered(self, script: Script) -> list[tuple[str, str]]:
        count = len(script.statements)
        return [(f"statement {n} of {count}", s) for n, s in enumerate(script.statements, 1)]

    def _why(self, error: asyncpg.PostgresError, migration: Migration) -> str:
        told = f"migration {migration.name}, {self._at}: "
        if isinstance(error, _REFUSED):
            return (
                f"{told}no lock within {self._limits.wait_s:g} s, held by"
                f" {self._blockers or 'somebody'}; end that session (SELECT"
                " pg_terminate_backend(PID)) or wait for it, and run the command again"
            )
        if isinstance(error, asyncpg.QueryCanceledError):
            return f"{told}not done within {self._limits.work_s:g} s; see --work-s"
        return f"{told}{describe(error)}"


def _blocker(row: asyncpg.Record) -> str:
    """Say who holds the lock. Not its SQL: that may hold what nobody should read."""
    if not row["pid"]:
        return "a prepared transaction (pg_prepared_xacts)"
    facts = [row["application_name"] or "?", f"user {row['usename']}", row["client"] or "local",
             row["state"] or "?"]  # fmt: skip
    if row["seconds"] is not None:
        facts.append(f"in its transaction for {row['seconds']:.0f} s")
    return f"pid {row['pid']} ({', '.join(facts)})"
