"""The plans of the queue's hot statements, pinned: on 200,000 rows none of them reads the table.

On a connection that plans as the service's do (db/pool.py): once, for any values.
"""

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from bench.support import seeding
from bench.support.seeding import BenchRunner, Lease
from db.pool import fetch_one
from db.queries import load
from sandbox.services import servers

SQL = {**load("run_queue"), **load("archive")}
RUNNERS = load("runners")
PENDING, UNFIT, LATER, DUE, DONE, LIVE = 89_000, 50_000, 10_000, 1_000, 48_000, 2_000
MODELS = 40
FIRST = ("0001-01-01", "00000000-0000-0000-0000-000000000000")
TTL = timedelta(minutes=5)
# As the service plans its hot statements, and its listings (db/pool.fetch_planned).
GENERIC, CUSTOM = "force_generic_plan", "force_custom_plan"
DONE_NOW = """
UPDATE run_queue SET status = 'COMPLETE', completed_at = now() WHERE queue_id IN (
    SELECT queue_id FROM run_queue WHERE status = 'PENDING' LIMIT $1
)
"""
# The sweep's work: a tenth of what is live.
OVERDUE = """
UPDATE run_queue SET lease_expires_at = now() - interval '1 second' WHERE queue_id IN (
    SELECT queue_id FROM run_queue WHERE status IN ('CLAIMED', 'IN_PROGRESS') LIMIT 200
)
"""


@dataclass(frozen=True)
class Seeded:
    """A database with 200,000 runs, and who can ask for them."""

    dsn: str
    idle: list[BenchRunner]
    leases: list[Lease]


def claim(seeded: Seeded, claimants: int) -> list[Any]:
    """Return the arguments of `claim` for so many runners that hold nothing."""
    some = seeded.idle[:claimants]
    return [
        [24], ["q4_k_m,q8_0"], [r.runner_id for r in some], [r.fingerprint for r in some],
        [f"key-{number}" for number in range(claimants)], ["digest"] * claimants,
        [1] * claimants, TTL, 1, 86_400, True, [LEASE] * claimants, [LEASE] * claimants,
    ]  # fmt: skip


def beat(seeded: Seeded, beats: int) -> list[Any]:
    """Return the arguments of `beat` for so many leases."""
    some = seeded.leases[:beats]
    return [
        [lease.run_id for lease in some], [lease.lease_id for lease in some],
        [lease.runner.runner_id for lease in some], [lease.runner.fingerprint for lease in some],
        [None] * beats, TTL, 86_400, [LEASE] * beats,
    ]  # fmt: skip


def refused(seeded: Seeded, leases: int) -> list[Any]:
    """Return the arguments of `why_refused` for so many leases."""
    some = seeded.leases[:leases]
    return [
        [lease.run_id for lease in some], [lease.runner.fingerprint for lease in some],
        [LEASE] * leases, [lease.runner.runner_id for lease in some],
    ]  # fmt: skip


# Statement, its arguments, and the most pages of 8 kB it may touch, as it is and with room to grow
# by half; a scan of the table alone would be 20,000.
PLANS = {
    "claim for one": ("claim", lambda seeded: claim(seeded, 1), 650),
    "claim for 64": ("claim", lambda seeded: claim(seeded, 64), 2_000),
    "beat of one": ("beat", lambda seeded: beat(seeded, 1), 65),
    "beat of 100": ("beat", lambda seeded: beat(seeded, 100), 5_300),
    "64 dead leases": ("why_refused", lambda seeded: refused(seeded, 64), 700),
    "lapse": ("lapse", lambda seeded: [200], 10_500),
    "promote aged": ("promote_aged", lambda seeded: [timedelta(days=1), 16], 1_000),
    "promote_due": ("promote_due", lambda seeded: [200], 8_400),
    "a look at the offers": ("offers", lambda seeded: [1], 3_000),
    "archive, all too young": ("archive", lambda seeded: [timedelta(days=7), 200, *FIRST], 10),
    "offers for explain": ("offers", lambda seeded: [1000], 5_500),
}


@pytest.fixture(scope="module")
def seeded(postgres: servers.Postgres) -> Iterator[Seeded]:
    """A database of this module's own, filled once."""
    admin, dsn = postgres.database_dsn("postgres"), postgres.database_dsn("plans")
    asyncio.run(_execute(admin, "CREATE DATABASE plans TEMPLATE bakeoff STRATEGY FILE_COPY"))
    yield asyncio.run(_seed(dsn))
    asyncio.run(_execute(admin, "DROP DATABASE plans (FORCE)"))


@pytest.mark.parametrize("name", PLANS)
def test_reads_no_more_than_it_needs(seeded: Seeded, name: str) -> None:
    """No sequential scan of run_queue, and a bounded number of pages."""
    statement, arguments, pages = PLANS[name]
    plan = asyncio.run(_explain(seeded.dsn, SQL[statement], arguments(seeded)))
    assert not list(_scanned(plan, "run_queue")), json.dumps(plan, indent=1)
    touched = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    assert touched <= pages, json.dumps(plan, indent=1)


@pytest.mark.parametrize(("page", "pages"), [(True, 1_200), (False, 20)])
def test_a_page_of_runners_reads_its_own_rows_and_no_others(
    seeded: Seeded, page: bool, pages: int
) -> None:
    """A hundred and one of 2,000 runners, or one: not all of them, nor all their keys."""
    arguments = [None, "", 101] if page else [seeded.idle[0].runner_id, "", 1]
    plan = asyncio.run(_explain(seeded.dsn, RUNNERS["overview"], arguments, CUSTOM))
    for table in ("runners", "runner_keys", "run_queue"):
        assert not list(_scanned(plan, table)), json.dumps(plan, indent=1)
    touched = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    assert touched <= pages, json.dumps(plan, indent=1)


RUN, LEASE = "00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"
GUARD = [RUN, LEASE, "runner-a", "a-key"]
OF_ONE_RUN = {
    "complete": [*GUARD, "0"],
    "release": [*GUARD, "why", "2026-01-01", 100, LEASE],
    "fail": [*GUARD, "timeout", "why", 1, 1, LEASE],
    "cancel_live": [RUN, "why"],
    "beat": [[RUN], [LEASE], ["runner-a"], ["a-key"], [None], TTL, 86_400, [LEASE]],
    "why_refused": [[RUN], ["a-key"], [LEASE], ["runner-a"]],
    "take_over": [RUN, "runner-a", "a-key", LEASE, "key", TTL, 86_400, LEASE],
}


@pytest.fixture(scope="module")
def idle(postgres: servers.Postgres) -> Iterator[str]:
    """A database whose statistics were made while nothing was leased."""
    admin, dsn = postgres.database_dsn("postgres"), postgres.database_dsn("idle")
    asyncio.run(_execute(admin, "CREATE DATABASE idle TEMPLATE bakeoff STRATEGY FILE_COPY"))
    asyncio.run(_seed_idle(dsn))
    yield dsn
    asyncio.run(_execute(admin, "DROP DATABASE idle (FORCE)"))


@pytest.mark.parametrize("name", OF_ONE_RUN)
def test_who_names_a_run_finds_it_by_its_name_when_nothing_was_leased_yet(
    idle: str, name: str
) -> None:
    """A small index of what is leased looks cheaper then, and is read whole later."""
    plan = asyncio.run(_explain(idle, SQL[name], OF_ONE_RUN[name]))
    conditions = [scan.get("Index Cond", "") for scan in _reads(plan, "run_queue")]
    assert conditions, json.dumps(plan, indent=1)
    for condition in conditions:
        assert "run_id" in condition or "queue_id" in condition, json.dumps(plan, indent=1)


def test_a_claim_asks_for_its_key_alone_whatever_the_planner_thinks_of_probes(idle: str) -> None:
    """As a join it becomes a merge with the keys of all leases, live and dead: 116 ms in a soak."""
    asked = [
        [24], ['q8_0'], *[['runner-a']] * 2, *[['a-key']] * 2, [1], TTL, 1, 86_400, True,
        *[[LEASE]] * 2,
    ]  # fmt: skip
    plan = asyncio.run(
        _explain(idle, SQL["claim"], asked, before="SET LOCAL enable_nestloop = off")
    )
    probe = "((claimed_by = r.runner_id) AND (claim_key = r.claim_key))"
    found = [read.get("Index Cond", "") for read in _reads(plan, "run_queue")]
    conditions = [re.sub(r"\br_\d+\.", "r.", condition) for condition in found]
    assert probe in conditions, json.dumps(plan, indent=1)


def test_a_claim_enters_each_models_queue_at_its_head(idle: str) -> None:
    """What died before the head, while a session holds an old snapshot, is stepped over once."""
    asked = [
        [24], ['q8_0'], *[['runner-a']] * 2, *[['a-key']] * 2, [1], TTL, 1, 86_400, True,
        *[[LEASE]] * 2,
    ]  # fmt: skip
    plan = asyncio.run(_explain(idle, SQL["claim"], asked))
    conditions = [read.get("Index Cond", "") for read in _reads(plan, "run_queue")]
    head = "(ROW(priority, created_at, queue_id) >= ROW(f.priority, f.created_at, f.queue_id))"
    assert any(head in re.sub(r"\bf_\d+\.", "f.", condition) for condition in conditions)


def _reads(plan: dict[str, Any], table: str) -> Iterator[dict[str, Any]]:
    if plan.get("Relation Name") == table and plan["Node Type"] != "ModifyTable":
        yield plan
    for below in plan.get("Plans", []):
        yield from _reads(below, table)


async def _seed_idle(dsn: str) -> None:
    async with seeding.open_connection(dsn) as connection:
        models = await seeding.add_models(connection, "q8_0", 1, MODELS)
        await seeding.add_runs(connection, models, 20_000)
        await seeding.sign_on(connection, 64)
        await connection.execute("VACUUM (ANALYZE)")


def _scanned(plan: dict[str, Any], table: str) -> Iterator[dict[str, Any]]:
    if plan["Node Type"] == "Seq Scan" and plan["Relation Name"] == table:
        yield plan
    for below in plan.get("Plans", []):
        yield from _scanned(below, table)


async def _explain(
    dsn: str, statement: str, arguments: Sequence[Any], mode: str = GENERIC, before: str = ""
) -> dict[str, Any]:
    async with seeding.open_connection(dsn) as connection:
        await connection.execute(f"PREPARE pinned AS {statement}")
        given = f"({', '.join(map(_literal, arguments))})" if arguments else ""
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"SET LOCAL plan_cache_mode = {mode}; {before}")
        explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE pinned{given}"
        row = await fetch_one(connection, explain)
        await transaction.rollback()  # the next plan meets the same rows
        return json.loads(row[0])[0]["Plan"]


def _literal(value: Any) -> str:
    """Write an argument; PostgreSQL gives the text the parameter's type. Nothing here is quoted."""
    if isinstance(value, timedelta):
        return f"'{value.total_seconds()} seconds'"
    if isinstance(value, list):
        return "'{" + ",".join("NULL" if v is None else str(v) for v in value) + "}'"
    return "NULL" if value is None else f"'{value}'"


async def _seed(dsn: str) -> Seeded:
    async with seeding.open_connection(dsn) as connection:
        fitting = await seeding.add_models(connection, "q8_0", 1, MODELS)
        await seeding.add_runs(connection, fitting, DONE + LIVE)
        await connection.execute(DONE_NOW, DONE)
        busy = await seeding.sign_on(connection, LIVE)
        leases = await seeding.lease(connection, busy, timedelta(hours=1))
        await connection.execute(OVERDUE)
        too_big = await seeding.add_models(connection, "fp32", 400, MODELS)
        await seeding.add_runs(connection, too_big, UNFIT, priority=1)
        await seeding.add_runs(connection, fitting, LATER, deferred=timedelta(days=1))
        await seeding.add_runs(connection, fitting, DUE, deferred=timedelta(seconds=-1))
        await seeding.add_runs(connection, fitting, PENDING)
        idle = await seeding.sign_on(connection, 64)
        await connection.execute("VACUUM (ANALYZE)")
    return Seeded(dsn, idle, leases)


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(statement)
    await connection.close()
