"""Adoption: the migrations take over a database that bakeoff made, and lose no row of it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from config.settings import Settings
from db.migrate import MIGRATIONS, migrate, run_dbmate
from sandbox.sigstore_instance import ThrowawaySigstore
from tests.fleet import SMALL, code_of, open_fleet, run_of
from tests.result_factory import hardware

MakeSettings = Callable[..., Settings]
Rows = dict[str, list[str]]
UPSTREAM = (Path(__file__).parent / "fixtures" / "upstream_schema.sql").read_text()
VERSIONS = len(list(MIGRATIONS.glob("*.sql")))
# Names that bakeoff may not have known yet are added to these; all else stays as it is.
LOOKUPS = {
    "source_types",
    "quantization_methods",
    "model_architectures",
    "model_file_formats",
    "task_categories",
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
        tables = await columns(connection)
        return empty_database, tables, await contents(connection, tables)

    return asyncio.run(on(empty_database, create))


def rows_of(dsn: str, tables: dict[str, str]) -> Rows:
    """Return the rows as they are now, by the columns that were there before."""
    return asyncio.run(on(dsn, lambda connection: contents(connection, tables)))


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
    assert f"Pending: {VERSIONS}" in run_dbmate(dsn, "status")
    migrate(dsn)
    after = rows_of(dsn, tables)
    assert_kept(before, after)
    assert len(after["quantization_methods"]) == 27 + 1, "the known names, and theirs"
    migrate(dsn)
    assert rows_of(dsn, tables) == after
    assert f"Applied: {VERSIONS}\nPending: 0" in run_dbmate(dsn, "status")


def test_going_back_and_forth_keeps_every_row(
    upstreams: tuple[str, dict[str, str], Rows],
) -> None:
    dsn, tables, before = upstreams
    migrate(dsn)
    for _ in range(VERSIONS):
        run_dbmate(dsn, "rollback")
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
    assert "Pending: 0" in run_dbmate(dsn, "status")


def test_three_migrations_of_an_empty_database_at_once_are_one(empty_database: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(migrate, [empty_database] * 3))
    assert f"Applied: {VERSIONS}\nPending: 0" in run_dbmate(empty_database, "status")


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

    after = await on(dsn, lambda connection: contents(connection, tables))
    grown = {"runners", "runs", "run_queue", "run_model_metrics", "run_hardware_metrics", "models",
             "model_sources", "tasks", "prompts"}  # fmt: skip
    for table, rows in before.items():
        if table not in LOOKUPS | grown:
            assert after[table] == rows, table
        mine = [row for row in rows if table != "runners" or not row.startswith("(runner-a,")]
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
