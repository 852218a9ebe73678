"""Adoption: the migrations take over a database that bakeoff made, and lose no row of it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from config.settings import Settings
from db.migrate import migrate, roll_back, status
from db.migration_files import MIGRATIONS
from db.pool import DatabaseUnready
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.archived import aged, archive_once
from tests.support.fleet import SMALL, code_of, open_fleet, run_of
from tests.support.result_factory import hardware
from tests.support.schema_facts import Facts, facts, not_kept, seeds

MakeSettings = Callable[..., Settings]
Rows = dict[str, list[str]]
FIXTURES = Path(__file__).parents[1] / "fixtures"
UPSTREAM = (FIXTURES / "upstream_schema.sql").read_text()
ROWS = (FIXTURES / "upstream_rows.sql").read_text()
# What bakeoff has added to its schema, newest first: without it, a database of before.
BEFORE_JUNE_2026 = """
ALTER TABLE run_model_metrics DROP COLUMN trace_id;
DROP TABLE agent_traces, schema_tables_join, schema_tables, schema_versions;
ALTER TABLE tasks DROP COLUMN uplift_baseline_task_id;
DELETE FROM task_categories WHERE name = 'cyber_safety';
"""
OF_25_MAY_2026 = f"""{BEFORE_JUNE_2026}
ALTER TABLE run_model_metrics DROP COLUMN failure_detail;
ALTER TABLE runs DROP COLUMN run_status;
DELETE FROM task_categories;
"""
OLDER = {"before June 2026": BEFORE_JUNE_2026, "of 25 May 2026": OF_25_MAY_2026}
VERSIONS = len(list(MIGRATIONS.glob("*.sql")))
# Names that bakeoff may not have known yet are added to these; all else stays as it is.
LOOKUPS = {
    "source_types",
    "quantization_methods",
    "model_architectures",
    "model_file_formats",
    "task_categories",
    "interface_type",
}


async def on(dsn: str, work: Callable[[asyncpg.Connection], Any]) -> Any:
    """Work on a database over a connection of its own."""
    connection = await asyncpg.connect(dsn)
    try:
        return await work(connection)
    finally:
        await connection.close()


async def columns(connection: asyncpg.Connection) -> dict[str, str]:
    """Return the tables of a database, and the columns that each has now."""
    rows = await connection.fetch(
        "SELECT table_name, string_agg(quote_ident(column_name), ', ' ORDER BY ordinal_position)"
        " AS names FROM information_schema.columns WHERE table_schema = 'public' GROUP BY 1"
    )
    return {row["table_name"]: row["names"] for row in rows}


async def contents(connection: asyncpg.Connection, tables: dict[str, str]) -> Rows:
    """Return every row of these tables as text, by these columns."""
    return {
        table: sorted(
            row["text"]
            for row in await connection.fetch(f"SELECT row({names})::text AS text FROM {table}")
        )
        for table, names in tables.items()
    }


@pytest.fixture
def upstreams(empty_database: str) -> tuple[str, dict[str, str], Rows]:
    """A database of bakeoff's: its DSN, its tables with their columns, and all rows."""

    async def create(connection: asyncpg.Connection) -> tuple[str, dict[str, str], Rows]:
        await connection.execute(UPSTREAM)
        await connection.execute(ROWS)
        tables = await columns(connection)
        return empty_database, tables, await contents(connection, tables)

    return asyncio.run(on(empty_database, create))


def rows_of(dsn: str, tables: dict[str, str]) -> Rows:
    """Return the rows as they are now, by the columns that were there before."""
    return asyncio.run(on(dsn, lambda connection: contents(connection, tables)))


def applied(dsn: str) -> int:
    """Return how many migrations are applied."""
    return sum(is_applied for _, is_applied in status(dsn))


def assert_kept(before: Rows, after: Rows) -> None:
    """Every row is there as it was; only lookup tables may have more."""
    assert len(before) == 24
    for table, rows in before.items():
        assert rows, f"{table} has no row to lose"
        if table in LOOKUPS:
            assert set(rows) <= set(after[table]), table
        else:
            assert rows == after[table], table


def test_a_migration_keeps_every_row_and_twice_is_once(
    upstreams: tuple[str, dict[str, str], Rows],
) -> None:
    dsn, tables, before = upstreams
    assert applied(dsn) == 0
    migrate(dsn)
    after = rows_of(dsn, tables)
    assert_kept(before, after)
    assert len(after["quantization_methods"]) == 27 + 1, "the known names, and theirs"
    migrate(dsn)
    assert rows_of(dsn, tables) == after
    assert applied(dsn) == VERSIONS


def facts_of(dsn: str) -> Facts:
    """Return the schema of a database."""
    return asyncio.run(on(dsn, facts))


def test_a_fresh_database_has_upstreams_tables_to_the_constraint(empty_database: str) -> None:
    """A NOT NULL, a default, a CHECK, a cascade or a seed row: all as bakeoff itself has them."""
    asyncio.run(on(empty_database, lambda connection: connection.execute(UPSTREAM)))
    theirs = facts_of(empty_database)
    named = {line.partition(".")[0] for line in theirs["columns"]}
    wanted = asyncio.run(on(empty_database, lambda connection: seeds(connection, named)))
    asyncio.run(on(empty_database, lambda c: c.execute("DROP SCHEMA public CASCADE")))
    asyncio.run(on(empty_database, lambda c: c.execute("CREATE SCHEMA public")))
    migrate(empty_database)
    assert not_kept(theirs, facts_of(empty_database)) == []
    assert asyncio.run(on(empty_database, lambda connection: seeds(connection, named))) == wanted


def test_what_is_not_kept_of_a_schema_is_named(empty_database: str) -> None:
    migrate(empty_database)
    ours = facts_of(empty_database)
    theirs = {**ours, "columns": [*ours["columns"], "runs.odd text null=NO default=-"],
              "indexes": [*ours["indexes"], "CREATE INDEX odd ON public.runs (odd)"]}  # fmt: skip
    assert not_kept(theirs, ours) == ["runs.odd text null=NO default=-", theirs["indexes"][-1]]
    less = {**ours, "columns": [c for c in ours["columns"] if not c.startswith("runs.publisher")]}
    assert "runs.publisher_id text null=NO" in not_kept(less, ours)[0]
    twin = {**ours, "indexes": [*ours["indexes"], ours["indexes"][0].replace(" ON ", "_b ON ", 1)]}
    assert "are one index" in not_kept(ours, twin)[0]


@pytest.mark.parametrize("changes", ["", *OLDER.values()], ids=["of August 2026", *OLDER])
def test_an_adopted_database_ends_as_a_fresh_one(
    changes: str, empty_database: str, database: str
) -> None:
    asyncio.run(on(empty_database, lambda connection: connection.execute(UPSTREAM + changes)))
    migrate(empty_database)
    assert facts_of(empty_database) == facts_of(database)


def test_a_database_with_numbered_models_is_refused_in_a_sentence_and_kept(
    empty_database: str,
) -> None:
    """Before 25 May 2026, when bakeoff gave its models UUIDs."""
    numbered = "CREATE TABLE models (model_id serial PRIMARY KEY, name text NOT NULL)"
    asyncio.run(on(empty_database, lambda connection: connection.execute(numbered)))
    with pytest.raises(DatabaseUnready) as refused:
        migrate(empty_database)
    said = str(refused.value)
    assert "cannot be adopted: its models.model_id is integer, where bakeoff has uuid since" in said
    assert "Nothing was changed: give the queue a database of its own" in said
    tables = asyncio.run(on(empty_database, columns))
    assert tables.keys() <= {"models", "schema_migrations"}


def test_going_back_and_forth_keeps_every_row(
    upstreams: tuple[str, dict[str, str], Rows],
) -> None:
    dsn, tables, before = upstreams
    migrate(dsn)
    for _ in range(VERSIONS):
        roll_back(dsn)
    assert_kept(before, rows_of(dsn, tables))
    migrate(dsn)
    assert_kept(before, rows_of(dsn, tables))


def test_three_migrations_at_once_are_one(
    upstreams: tuple[str, dict[str, str], Rows],
) -> None:
    dsn, tables, before = upstreams
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(migrate, [dsn] * 3))
    assert_kept(before, rows_of(dsn, tables))
    assert applied(dsn) == VERSIONS


def test_three_migrations_of_an_empty_database_at_once_are_one(empty_database: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(migrate, [empty_database] * 3))
    assert applied(empty_database) == VERSIONS


@pytest.mark.gen_test
async def test_a_run_through_an_adopted_database_leaves_upstreams_rows_alone(
    upstreams: tuple[str, dict[str, str], Rows],
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
) -> None:
    dsn, tables, before = upstreams
    await asyncio.to_thread(migrate, dsn)
    settings = make_settings(database_url=dsn, sweep_interval_s=0.05)
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.admit()
        assert (await runner.register()).is_success, "a runner of that name was there before"
        assert (await runner.claim()).status_code == 204, "upstream's own rows are not handed out"
        explained = await runner.claim(explain=True)
        assert explained.json()["job"] is None
        listed = await fleet.admin("GET", "/queue")
        assert listed.json()["runs"] == []

        theirs = "30000000-0000-4000-8000-000000000002"
        for answer in (
            await fleet.admin("GET", f"/queue/{theirs}"),
            await fleet.admin("POST", f"/queue/{theirs}/cancel", json={"reason": "x"}),
            await runner.heartbeat({"run_id": theirs, "lease_id": theirs}),
        ):
            assert code_of(answer) == (404, "not_found")
        taken = await fleet.admin("POST", "/queue", json={"runs": [run_of(run_id=theirs)]})
        assert code_of(taken) == (409, "conflict")
        unmeasured = {"model_id": "20000000-0000-4000-8000-000000000002"}
        unfit = await fleet.admin("POST", "/queue", json={"runs": [run_of(model=unmeasured)]})
        assert code_of(unfit) == (422, "invalid_request")

        known = {"model_id": "20000000-0000-4000-8000-000000000001"}
        for model in (known, SMALL):
            run_id = await fleet.enqueue(model=model)
            job = await runner.take()
            assert job["run_id"] == run_id
            assert (await runner.heartbeat(job)).status_code == 200
            accepted = await runner.submit(job)
            assert accepted.status_code == 201, accepted.text
        lapsing = await fleet.enqueue()
        await runner.take()
        await fleet.overdue(lapsing)
        async with asyncio.timeout(20):
            while (await fleet.row(lapsing))["status"] != "PENDING":  # noqa: ASYNC110 (in SQL)
                await asyncio.sleep(0.01)
        await fleet.revoke(runner)
        # A column that bakeoff adds to its queue one day is not the archive's.
        await fleet.pool.execute("ALTER TABLE run_queue ADD COLUMN theirs text DEFAULT 'x'")
        await aged(fleet, job["run_id"])
        assert await archive_once(fleet) == 1
        assert await fleet.pool.fetchval("SELECT count(*) FROM run_archive") == 1

    after = await on(dsn, lambda connection: contents(connection, tables))
    grown = {"runners", "runs", "run_queue", "run_model_metrics", "run_hardware_metrics", "models",
             "model_sources", "tasks", "prompts"}  # fmt: skip
    for table, rows in before.items():
        if table not in LOOKUPS | grown:
            assert after[table] == rows, table
        mine = [row for row in rows if table != "runners" or ",runner-a," not in row]
        assert set(mine) <= set(after[table]), table


@pytest.mark.gen_test
async def test_the_machine_that_upstream_wrote_down_is_found_again(
    upstreams: tuple[str, dict[str, str], Rows],
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
) -> None:
    dsn, _, _ = upstreams
    await asyncio.to_thread(migrate, dsn)
    async with open_fleet(make_settings(database_url=dsn), sigstore) as fleet:
        runner = await fleet.admit()
        await runner.register()
        await fleet.enqueue()
        job = await runner.take()
        assert (await runner.submit(job, runner.bundle(job, hardware=hardware()))).is_success
        row = await fleet.pool.fetchrow(
            "SELECT * FROM run_hardware_metrics WHERE run_id = $1", job["run_id"]
        )
        assert row is not None
        found = (row["system_hardware_id"], row["system_software_id"], row["gpu_hardware_id"])
        assert found == (1, 1, 1)
