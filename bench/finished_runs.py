"""What finished runs cost the hot statements: claim, beat and lapse by their plans, and the tally.

Each is run by EXPLAIN (ANALYZE, BUFFERS) in a transaction that is rolled back, on a queue with some
PENDING and live runs: without a finished run, with RUNS of them (a million), and after the archiver
has taken those. Rounds of a state are medians; buffers do not depend on the machine's load.

    make bench ONLY=finished_runs RUNS=100000
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
from rich.console import Console
from rich.table import Table

from broker.admin.archiver import BATCH
from db import archive, migrate, run_queue
from db.pool import open_pool
from sandbox.services import servers

ROUNDS = 15
PENDING = 5_000
LIVE = 1_000
LONG_S = 3_600
TTL = timedelta(minutes=5)
SEED = """
INSERT INTO models (model_id, name, parameter_count_b, active_parameter_count_b, quantization_id)
SELECT gen_random_uuid(), 'bench', 1, 1, x.quantization_id
FROM quantization_methods AS x WHERE x.name = 'q8_0';
INSERT INTO runner_keys (fingerprint, public_key, runner_id, added_by, max_leases)
SELECT 'key-' || n, decode(lpad(to_hex(n), 64, '0'), 'hex'), 'bench-' || n, 'bench', 64
FROM generate_series(0, 999) AS n;
INSERT INTO runners (runner_id, public_key, key_fingerprint)
SELECT runner_id, '', fingerprint FROM runner_keys;
"""
# A job of some kilobytes is as long as a real one, and is stored outside the row like one.
FILL = """
WITH made AS (
    INSERT INTO runs (run_id, submitted_at, publisher_id)
    SELECT gen_random_uuid(), now(), 'bench' FROM generate_series(1, $1) RETURNING run_id
)
INSERT INTO run_queue (queue_id, run_id, model_id, judge_model_id, job, config_hash, status,
    created_at)
SELECT gen_random_uuid(), run_id, (SELECT model_id FROM models), (SELECT model_id FROM models),
    '{"tasks": [], "prompts": []}', '',
    'PENDING', now()
FROM made
"""
LEASE = """
WITH chosen AS (
    SELECT queue_id, row_number() OVER () - 1 AS n FROM run_queue
    WHERE status = 'PENDING' LIMIT $1
)
UPDATE run_queue AS q SET status = 'IN_PROGRESS', claimed_by = 'bench-' || n, claimed_at = now(),
    lease_seq = 1, lease_id = gen_random_uuid(), lease_key = 'key-' || n, lease_slot = 1,
    lease_expires_at = now() + interval '1 hour'
FROM chosen AS c WHERE q.queue_id = c.queue_id
"""
# Each finished run has two attempts: one that lapsed, and one that completed it.
FINISHED = """
WITH made AS (
    INSERT INTO runs (run_id, submitted_at, publisher_id)
    SELECT gen_random_uuid(), now(), 'bench' FROM generate_series(1, $1) RETURNING run_id
),
numbered AS (
    SELECT run_id, (row_number() OVER ())::int AS n FROM made
),
queued AS (
    INSERT INTO run_queue (queue_id, run_id, model_id, judge_model_id, job, config_hash, status,
        claimed_by, lease_seq, created_at, completed_at)
    SELECT gen_random_uuid(), run_id, (SELECT model_id FROM models), (SELECT model_id FROM models),
        '{"tasks": [], "prompts": []}', '', 'COMPLETE', 'bench-' || n % 1000, 2,
        now() - interval '60 days' + n * interval '1 second',
        now() - interval '30 days' + n * interval '1 second'
    FROM numbered
)
INSERT INTO attempts (run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at,
    ended_at, how)
SELECT run_id, s, gen_random_uuid(), 'bench-' || n % 1000, 'key-' || n % 1000,
    now() - interval '30 days' + n * interval '1 second' - (3 - s) * interval '1 minute',
    now() - interval '30 days' + n * interval '1 second' - (2 - s) * interval '1 minute',
    CASE s WHEN 1 THEN 'lapsed' ELSE 'completed' END
FROM numbered CROSS JOIN generate_series(1, 2) AS s
"""
OVERDUE = """
UPDATE run_queue SET lease_expires_at = now() - interval '1 second' WHERE queue_id IN (
    SELECT queue_id FROM run_queue WHERE status = 'IN_PROGRESS' ORDER BY queue_id LIMIT 20
)
"""


async def explained(
    pool: asyncpg.Pool, statement: str, arguments: Sequence[Any], prepare: str = ""
) -> tuple[float, int]:
    """Return a statement's median time in ms and its buffers, each run rolled back."""
    times, buffers = [], []
    for _ in range(ROUNDS):
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            if prepare:
                await connection.execute(prepare)
            text = await connection.fetchval(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT json) {statement}", *arguments
            )
            plan = (json.loads(text) if isinstance(text, str) else text)[0]
            times.append(plan["Execution Time"])
            buffers.append(buffers_of(plan["Plan"]))
            await transaction.rollback()
    return statistics.median(times), round(statistics.median(buffers))


def buffers_of(node: Mapping[str, Any]) -> int:
    """Return the buffers of a plan, each node's own: a CTE's are not in those of its parent.

    What reads a CTE counts what making it took, so it has none of its own.
    """
    children = node.get("Plans", [])
    own = 0
    if node["Node Type"] != "CTE Scan":
        own = _counted(node) - sum(
            _counted(child)
            for child in children
            if not child.get("Subplan Name", "").startswith("CTE ")
        )
    return max(own, 0) + sum(buffers_of(child) for child in children)


def _counted(node: Mapping[str, Any]) -> int:
    return node["Shared Hit Blocks"] + node["Shared Read Blocks"]


async def measure(pool: asyncpg.Pool) -> dict[str, tuple[float, int]]:
    """Return what each statement takes in the state the database is in."""
    live = await pool.fetch(
        "SELECT run_id, lease_id, claimed_by, lease_key FROM run_queue"
        " WHERE status = 'IN_PROGRESS' LIMIT 20"
    )
    idle, key = "bench-999", "key-999"  # every other runner holds a lease
    claim = ([24], ["q8_0"], [idle], [key], [str(uuid4())], ["x"], [1], TTL, 64, 86_400,
             [uuid4()])  # fmt: skip
    beat = (
        [row["run_id"] for row in live],
        [row["lease_id"] for row in live],
        [row["claimed_by"] for row in live],
        [row["lease_key"] for row in live],
        [None] * len(live),
        TTL,
        86_400,
    )
    sql = run_queue.SQL
    return {
        "claim of 1": await explained(pool, sql["claim"], claim),
        "beat of 20": await explained(pool, sql["beat"], beat),
        "lapse of 20": await explained(pool, sql["lapse"], (200,), OVERDUE),
        "tally (metrics)": await explained(pool, sql["tally"], ()),
        "list, first page": await explained(
            pool, sql["list_page"], (None, *run_queue.FIRST_PAGE, 101, *[None] * 8)
        ),
    }


async def settle(pool: asyncpg.Pool) -> None:
    """Let the tables be as autovacuum leaves them, so that no state pays for the last one."""
    for table in ("run_queue", "attempts", "run_archive", "attempts_archive"):
        await _long(pool, f"VACUUM (ANALYZE) {table}")


async def take_all(pool: asyncpg.Pool) -> tuple[int, float]:
    """Let the archiver's statement take every old run; return how many, and the seconds."""
    place, moved, started = archive.START, 0, time.perf_counter()
    while True:
        batch, place = await archive.archive(pool, timedelta(days=7), BATCH, place)
        moved += batch
        if batch < BATCH:
            await archive.fold_counts(pool)
            return moved, time.perf_counter() - started


async def states(pool: asyncpg.Pool, runs: int) -> dict[str, dict[str, tuple[float, int]]]:
    """Bring the database from state to state and measure each."""
    await pool.execute(SEED)
    await _long(pool, FILL, PENDING + LIVE)
    await pool.execute(LEASE, LIVE - 1)
    await settle(pool)
    measured = {"0 finished": await measure(pool)}
    await _long(pool, FINISHED, runs)
    await settle(pool)
    measured[f"{runs:,} finished"] = await measure(pool)
    moved, seconds = await take_all(pool)
    print(f"archived {moved:,} runs in {seconds:.1f} s: {moved / seconds:,.0f}/s")
    await settle(pool)
    measured["archived"] = await measure(pool)
    return measured


async def _long(pool: asyncpg.Pool, statement: str, *arguments: Any) -> None:
    """Run a statement that takes longer than what serves requests may."""
    async with pool.acquire() as connection:
        await connection.execute(f"SET statement_timeout = '{LONG_S}s'")
        await connection.execute(statement, *arguments, timeout=LONG_S)


def show(measured: dict[str, dict[str, tuple[float, int]]]) -> None:
    """Print a row per statement, and time and buffers per state."""
    table = Table("statement", *(f"{state}: ms / buffers" for state in measured))
    for name in next(iter(measured.values())):
        cells = [f"{state[name][0]:.2f} / {state[name][1]:,}" for state in measured.values()]
        table.add_row(name, *cells)
    Console(width=140).print(table)


async def run(dsn: str, runs: int) -> None:
    """Measure and show."""
    async with open_pool(dsn, 2) as pool:
        show(await states(pool, runs))


def main() -> None:
    """Start a private server, measure, and end it."""
    parser = argparse.ArgumentParser(prog="python -m bench.finished_runs", description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="finished runs")
    runs = parser.parse_args().runs
    print(f"command: python -m bench.finished_runs --runs {runs}, Python {sys.version}")
    with servers.postgres() as postgres:
        print(f"PostgreSQL {postgres.version}; {PENDING:,} PENDING, {LIVE - 1:,} live")
        migrate.migrate(postgres.dsn)
        asyncio.run(run(postgres.dsn, runs))


if __name__ == "__main__":
    main()
