"""Migrations of a database in use: who waits, for how long, and what is left when it fails."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from db import migrate as migrations
from db.migrate import Limits, MigrationFailed, migrate, roll_back, status
from db.migration_files import (
    Migration,
    Script,
    newest_version,
    read_migration,
    read_migrations,
    split_statements,
)
from db.pool import SESSION, DatabaseUnready
from tests.support.migration_rules import LAST_FREE, breaches

ADD = "ALTER TABLE t ADD COLUMN IF NOT EXISTS more int"
INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS t_id ON t (id)"
BLOCKERS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the migrations be files of this test's own, with these statements each."""
    monkeypatch.setattr(migrations, "read_migrations", lambda: read_migrations(tmp_path))
    monkeypatch.setattr(migrations, "TRY_S", 0.1)
    monkeypatch.setattr(migrations, "PAUSE_S", (0.1, 0.1))
    monkeypatch.setattr(migrations, "LOOK_S", 0.01)
    monkeypatch.setattr(migrations, "TELL_EVERY_S", 0.05)

    def write(*ups: str, option: str = "", down: str = "SELECT 1") -> None:
        for number, up in enumerate(ups, start=1):
            text = f"-- migrate:up {option}\n{up};\n-- migrate:down\n{down};\n"
            (tmp_path / f"{number}_file.sql").write_text(text)

    return write


async def on(dsn: str, work: Callable[[asyncpg.Connection], Coroutine[Any, Any, Any]]) -> Any:
    """Work on a database over a connection of its own."""
    connection = await asyncpg.connect(dsn)
    try:
        return await work(connection)
    finally:
        await connection.close()


def execute(dsn: str, statement: str) -> None:
    """Run a statement."""
    asyncio.run(on(dsn, lambda connection: connection.execute(statement)))


def value(dsn: str, query: str) -> Any:
    """Return the one value of a query."""
    return asyncio.run(on(dsn, lambda connection: connection.fetchval(query)))


class Told:
    """What a migration said; `until` waits for words."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._said = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._said:
            self.lines.append(line)
            self._said.notify_all()

    def until(self, words: str, times: int = 1) -> str:
        """Wait until so many lines hold these words; return the last."""
        with self._said:
            assert self._said.wait_for(
                lambda: sum(words in line for line in self.lines) >= times, timeout=20
            ), self.lines
            return next(line for line in reversed(self.lines) if words in line)


async def beside_a_dump(dsn: str, limits: Limits | None, told: Told) -> None:
    """Migrate while somebody reads the table in a long transaction; beat for a lease meanwhile."""
    dump = await asyncpg.connect(dsn, server_settings={"application_name": "pg_dump"})
    beat = await asyncpg.connect(dsn, server_settings={**SESSION, "lock_timeout": "1s"})
    try:
        async with dump.transaction():
            await dump.execute("LOCK TABLE t IN ACCESS SHARE MODE")
            task = asyncio.create_task(asyncio.to_thread(migrate, dsn, told, limits))
            pid = await dump.fetchval("SELECT pg_backend_pid()")
            for times in (1, 2, 3):
                held = f"held by pid {pid} (pg_dump, user bakeoff, local, idle in transaction"
                await asyncio.to_thread(told.until, held, times)
                await beat.execute("UPDATE t SET id = id")
            if limits is not None:
                await task
        await task
    finally:
        await dump.close()
        await beat.close()


def test_who_works_on_a_table_is_not_held_up_by_a_migration_that_waits_for_it(
    empty_database: str, write: Callable[..., None]
) -> None:
    """A dump beside it: requests are served, and the migration is applied when the dump ends."""
    execute(empty_database, "CREATE TABLE t AS SELECT 1 AS id")
    write(ADD)
    told = Told()
    asyncio.run(beside_a_dump(empty_database, None, told))
    assert "statement 1 of 1" in told.until("held by")
    assert told.lines[-1].startswith("1_file: applied in ")
    assert status(empty_database) == [("1_file", True)]


def test_a_lock_that_does_not_come_ends_it_with_who_has_it_and_leaves_nothing(
    empty_database: str, write: Callable[..., None]
) -> None:
    execute(empty_database, "CREATE TABLE t AS SELECT 1 AS id")
    write(f"CREATE TABLE made (id int); {ADD}")
    with pytest.raises(MigrationFailed) as failed:
        asyncio.run(beside_a_dump(empty_database, Limits(wait_s=1), Told()))
    said = str(failed.value)
    assert said.startswith("migration 1_file, statement 2 of 2: no lock within 1 s, held by pid ")
    assert "pg_terminate_backend" in said
    assert status(empty_database) == [("1_file", False)]
    assert value(empty_database, "SELECT to_regclass('made')") is None
    assert value(empty_database, BLOCKERS) == 0


def test_work_that_does_not_end_has_a_limit_of_its_own(
    empty_database: str, write: Callable[..., None]
) -> None:
    write("SELECT pg_sleep(60)")
    with pytest.raises(MigrationFailed, match=r"not done within 0\.1 s; see --work-s"):
        migrate(empty_database, limits=Limits(work_s=0.1))


def test_a_statement_that_fails_takes_its_whole_file_back(
    empty_database: str, write: Callable[..., None]
) -> None:
    write("CREATE TABLE made (id int); SELECT 1 / 0")
    with pytest.raises(MigrationFailed, match="1_file, statement 2 of 2: division by zero"):
        migrate(empty_database)
    assert value(empty_database, "SELECT to_regclass('made')") is None
    assert status(empty_database) == [("1_file", False)]


def test_an_index_that_was_interrupted_is_made_anew(
    empty_database: str, write: Callable[..., None]
) -> None:
    """IF NOT EXISTS alone would be content with the invalid one."""
    execute(empty_database, "CREATE TABLE t AS SELECT 1 AS id UNION ALL SELECT 1")
    with pytest.raises(asyncpg.UniqueViolationError):
        execute(empty_database, "CREATE UNIQUE INDEX CONCURRENTLY t_id ON t (id)")
    write(INDEX, option="transaction:false")
    migrate(empty_database)
    valid = (
        "SELECT indisvalid AND NOT indisunique FROM pg_index WHERE indexrelid = 't_id'::regclass"
    )
    assert value(empty_database, valid) is True


def test_indexes_in_use_are_made_while_another_migration_waits_for_its_turn(
    empty_database: str, write: Callable[..., None]
) -> None:
    """CONCURRENTLY waits for all who have a snapshot: whoever waits for the lock must have none."""
    execute(empty_database, "CREATE TABLE t AS SELECT id FROM generate_series(1, 100000) id")
    write(*[INDEX.replace("t_id", f"t_id_{n}") for n in range(5)], option="transaction:false")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(migrate, [empty_database] * 3))
    assert {applied for _, applied in status(empty_database)} == {True}
    assert value(empty_database, BLOCKERS) == 0


def test_of_two_migrations_the_second_says_what_it_waits_for(
    empty_database: str, write: Callable[..., None]
) -> None:
    write("SELECT 1")
    lock = migrations.SQL["try_lock"].replace("pg_try_", "pg_")
    told = Told()

    async def held(connection: asyncpg.Connection) -> None:
        async with connection.transaction():
            await connection.execute(lock)
            task = asyncio.create_task(asyncio.to_thread(migrate, empty_database, told))
            await asyncio.to_thread(told.until, "another `db migrate` is at work")
            with pytest.raises(MigrationFailed, match="another `db migrate` has been at work"):
                await asyncio.to_thread(migrate, empty_database, limits=Limits(wait_s=0.1))
        await task

    asyncio.run(on(empty_database, held))
    assert told.lines[-1].startswith("1_file: applied")


def test_a_migration_whose_lock_is_lost_ends_and_the_next_goes_on(
    empty_database: str, write: Callable[..., None]
) -> None:
    write("SELECT pg_sleep(60)")
    told = Told()
    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'bakeoff-queue migrate (lock)'"
        " AND datname = current_database()"
    )
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(migrate, empty_database, told)
        told.until("statement 1 of 1")
        execute(empty_database, end)
        with pytest.raises(MigrationFailed, match="the session that had the lock of all was ended"):
            task.result(20)
    assert status(empty_database) == [("1_file", False)]
    write("SELECT 1")
    migrate(empty_database)


def test_a_roles_own_time_outs_do_not_end_the_lock(
    empty_database: str, write: Callable[..., None]
) -> None:
    write("SELECT pg_sleep(0.3)")
    role = "idle_in_transaction_session_timeout=100&statement_timeout=200&lock_timeout=100"
    migrate(f"{empty_database}&{role}")
    assert status(empty_database) == [("1_file", True)]


def test_behind_a_pooler_what_needs_a_session_is_refused_with_the_fix(
    empty_database: str, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler gives out process ids of its own; time-outs of a session would stay with others."""
    monkeypatch.setattr(asyncpg.Connection, "get_server_pid", lambda _: 0)
    execute(empty_database, "CREATE TABLE t AS SELECT 1 AS id")
    write("SELECT 1")
    migrate(empty_database)
    write("SELECT 1", INDEX, option="transaction:false")
    with pytest.raises(MigrationFailed, match=r"2_file .*set BAKEOFF_QUEUE_DATABASE_LISTEN_URL"):
        migrate(empty_database)


def test_a_database_that_is_not_there_is_told_in_a_line(empty_database: str) -> None:
    for dsn, words in (
        (empty_database.replace("/test_", "/no_test_"), "does not exist"),
        ("mysql://localhost/x", "scheme"),
    ):
        for work in (migrate, roll_back, status):
            with pytest.raises(DatabaseUnready, match=f"^migrations: .*{words}"):
                work(dsn)


def test_a_migration_is_undone_newest_first(
    empty_database: str, write: Callable[..., None]
) -> None:
    write("CREATE TABLE t (id int)", ADD, down="DROP TABLE IF EXISTS t")
    migrate(empty_database)
    told = Told()
    roll_back(empty_database, told)
    assert told.lines[-1].startswith("2_file: undone in ")
    assert status(empty_database) == [("1_file", True), ("2_file", False)]
    roll_back(empty_database)
    roll_back(empty_database)
    assert status(empty_database) == [("1_file", False), ("2_file", False)]


def test_dbmates_own_table_is_gone_on_with(empty_database: str, write: Callable[..., None]) -> None:
    """As dbmate 2.37 makes it."""
    execute(
        empty_database,
        "CREATE TABLE schema_migrations (version varchar NOT NULL PRIMARY KEY);"
        " INSERT INTO schema_migrations VALUES ('1')",
    )
    write("SELECT 1 / 0", "CREATE TABLE t (id int)")
    migrate(empty_database)
    assert status(empty_database) == [("1_file", True), ("2_file", True)]


# The files


def test_statements_are_parted_at_semicolons_that_end_them() -> None:
    text = """
        SELECT 'a;''b', "c;""d", $$e;f$$, $g$ ; $$ ; $g$, E'\\';' -- h;
        /* i; */; ;
        CREATE FUNCTION f() RETURNS int BEGIN ATOMIC
            SELECT CASE WHEN true THEN 1 END; SELECT 2;
        END;
        DO $$ BEGIN PERFORM 1; END $$;
        SELECT $1
    """
    first, function, block, last = split_statements(text)
    assert first.endswith("E'\\';'")
    assert function.endswith("END")
    assert function.count(";") == 2
    assert block == "DO $$ BEGIN PERFORM 1; END $$"
    assert last == "SELECT $1"


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1;",
        "-- migrate:up\nSELECT 1;",
        "SELECT 1;\n-- migrate:up\n\n-- migrate:down\n",
        "-- migrate:down\n-- migrate:up\n",
        "-- migrate:up\n-- migrate:down\n-- migrate:up\n",
        "-- migrate:up transactions:false\n-- migrate:down\n",
    ],
)
def test_a_file_of_another_form_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "1_odd.sql"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^1_odd"):
        read_migration(path)


def test_our_files_are_in_order_and_keep_the_rules_for_tables_in_use() -> None:
    ours = read_migrations()
    versions = [migration.version for migration in ours]
    assert versions == sorted(set(versions))
    assert versions[-1] == newest_version()
    later = [migration for migration in ours if migration.version > LAST_FREE]
    assert [line for migration in later for line in breaches(migration)] == []


GOOD = (
    "CREATE TABLE own (id int CHECK (id>0)); CREATE INDEX i ON own (id); INSERT INTO own SELECT",
    "ALTER TABLE runs ADD COLUMN IF NOT EXISTS a int DEFAULT 0",
    "ALTER TABLE runs ADD COLUMN IF NOT EXISTS a uuid REFERENCES models",
    "ALTER TABLE runs ADD CONSTRAINT c CHECK (a > 0) NOT VALID",
    "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql RETURN 1",
)
BAD = (
    "CREATE INDEX i ON runs (run_id)",
    "CREATE UNIQUE INDEX IF NOT EXISTS i ON runs (run_id)",
    "CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON runs (run_id)",  # within a transaction
    "DROP INDEX i",
    "REINDEX TABLE runs",
    "LOCK TABLE runs",
    "ALTER TABLE runs ADD COLUMN a int",
    "ALTER TABLE runs ADD COLUMN IF NOT EXISTS a int CHECK (a > 0)",
    "ALTER TABLE runs ADD COLUMN IF NOT EXISTS a int UNIQUE",
    "ALTER TABLE runs ADD COLUMN IF NOT EXISTS a uuid DEFAULT gen_random_uuid()",
    "ALTER TABLE runs ADD CONSTRAINT c CHECK (a > 0)",
    "ALTER TABLE runs ADD FOREIGN KEY (a) REFERENCES models",
    "ALTER TABLE runs ADD CONSTRAINT c UNIQUE (a)",
    "ALTER TABLE runs ALTER COLUMN a SET NOT NULL",
    "ALTER TABLE runs ALTER a TYPE bigint",
    "ALTER TABLE runs ADD COLUMN IF NOT EXISTS a int; UPDATE runs SET a = 1",
)
ALONE = {
    INDEX: True,
    "DROP INDEX CONCURRENTLY IF EXISTS i": True,
    "ALTER TABLE runs VALIDATE CONSTRAINT c": True,
    "UPDATE runs SET a = 1 WHERE a IS NULL": True,
    "CREATE INDEX CONCURRENTLY i ON runs (a)": False,
    "ALTER TABLE runs ADD CONSTRAINT c CHECK (a > 0) NOT VALID": False,
}


def test_the_rules_for_tables_in_use_are_kept_by_the_good_and_broken_by_the_bad() -> None:
    def lines(text: str, *, in_transaction: bool) -> list[str]:
        script = Script(tuple(split_statements(text)), in_transaction)
        return breaches(Migration("1_x", script, script))

    for text in GOOD:
        assert lines(text, in_transaction=True) == [], text
    for text in BAD:
        assert len(lines(text, in_transaction=True)) == 1, text
    for text, is_good in ALONE.items():
        assert (lines(text, in_transaction=False) == []) is is_good, text
