"""A long day of churn on the queue's table: claims that end in a result or in silence.

Straight through the statements of db/run_queue.py, in batches and without HTTP: a batch of runners
claims, beats and completes; a part of them falls silent instead, and the sweep ends their
leases. For part of the time another session sits idle in a transaction with an old snapshot, so
that vacuum may remove nothing that died since. New runs keep the queue at its length; finished ones
beyond a number are archived with their ledger, as the service does after a week.

    make bench ONLY=soak ARGS='--cycles 1000000'
    python -m bench.soak --cycles 100000 --models 300 --silent 0.3 --snapshot 0.3 0.35
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from rich.console import Console
from rich.table import Table

from bench.support import report, seeding
from bench.support.env import open_env
from bench.support.seeding import ADD_RUNS, JOB, OFFER, BenchRunner, open_connection
from broker.admin.archiver import BATCH
from db import archive, run_queue
from db.pool import fetch_one
from db.run_queue import SQL, Beat, Claimant

RESULT = report.LATEST.with_name("soak.json")
SLICES = 20
WIDTH = 150
TTL = timedelta(minutes=5)
INSTANCE = uuid4()  # the one process of every runner
# So many finished runs stay in the hot table, older ones are archived.
FINISHED = 50_000
RESUME = """
UPDATE runners SET paused_at = NULL, pause_reason = NULL, resumed_at = clock_timestamp()
WHERE paused_at IS NOT NULL
"""
SIZES = """
SELECT
    pg_relation_size(s.relid) AS table_bytes, pg_indexes_size(s.relid) AS index_bytes,
    s.n_live_tup AS live, s.n_dead_tup AS dead, s.n_tup_upd AS updates,
    s.n_tup_hot_upd AS hot_updates, s.autovacuum_count AS vacuums
FROM pg_stat_user_tables AS s WHERE s.relname = 'run_queue'
"""


@dataclass(frozen=True, slots=True)
class Slice:
    """What 5 % of the cycles saw."""

    done: int
    snapshot: bool
    cycles_per_s: float  # all statements of the cycles
    claims_per_s: float  # the claim statements alone
    claim_p50_ms: float
    claim_p99_ms: float
    dead: int
    live: int
    table_mb: float
    index_mb: float
    hot_share: float  # of the updates
    vacuums: int


class Churn:
    """The queue at work, one batch after the other."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        runners: Sequence[BenchRunner],
        models: Sequence[UUID],
        given: argparse.Namespace,
    ) -> None:
        self._connection = connection
        self._runners = runners
        self._models = models
        self._given = given
        self._random = random.Random(given.seed)  # noqa: S311 (repeatable, not secret)
        self._ended_at: deque[float] = deque()  # of the finished runs in the hot table
        self._last = 0
        self._pending = given.pending
        self.done = 0
        self.claim_ms: list[float] = []

    async def batch(self) -> None:
        """Claim for a batch of runners, and end every lease."""
        runners = self._random.sample(self._runners, self._given.batch)
        silent = round(len(runners) * self._given.silent)
        await self._lapse(await self._claim(runners[:silent], timedelta(0)))
        rows = await self._claim(runners[silent:], TTL)
        for _ in range(self._given.beats):
            await self._beat(rows)
        await self._complete(rows)
        await self._renew()

    async def _claim(self, runners: Sequence[BenchRunner], ttl: timedelta) -> list[asyncpg.Record]:
        if not runners:
            return []
        self._last += 1
        began = time.perf_counter()
        rows = await run_queue.claim(
            self._connection,
            [
                Claimant(
                    r.runner_id,
                    r.fingerprint,
                    INSTANCE,
                    uuid4(),
                    f"soak-{self._last}",
                    "digest",
                    OFFER,
                )
                for r in runners
            ],
            ttl=ttl,
            max_leases=1,
            max_runtime_s=86_400,
        )
        self.claim_ms.append((time.perf_counter() - began) * 1000)
        if any(row["paused"] for row in rows):
            await self._connection.execute(RESUME)
        granted = [row for row in rows if row["queue_id"] is not None]
        self.done += len(granted)
        self._pending -= len(granted)
        return granted

    async def _beat(self, rows: Sequence[asyncpg.Record]) -> None:
        beats = [
            Beat(row["run_id"], row["lease_id"], row["holder"], row["holder_key"], INSTANCE, None)
            for row in rows
        ]
        renewed = await run_queue.beat(self._connection, beats, ttl=TTL, max_runtime_s=86_400)
        assert len(renewed) == len(rows), f"{len(renewed)} of {len(rows)} leases renewed"

    async def _complete(self, rows: Sequence[asyncpg.Record]) -> None:
        now = datetime.now(UTC)
        async with self._connection.transaction():
            await self._connection.executemany(
                SQL["complete"],
                [(r["run_id"], r["lease_id"], r["holder"], r["holder_key"], "0") for r in rows],
            )
            await self._connection.executemany(
                SQL["complete_attempt"],
                [(r["run_id"], r["lease_seq"], now, now, now, None) for r in rows],
            )
        self._ended_at.extend([time.monotonic()] * len(rows))

    async def _lapse(self, rows: Sequence[asyncpg.Record]) -> None:
        ended = await run_queue.lapse(self._connection, len(rows)) if rows else []
        assert len(ended) == len(rows), f"{len(ended)} of {len(rows)} leases ended"
        failed = sum(row["status"] == "FAILED" for row in ended)
        self._ended_at.extend([time.monotonic()] * failed)
        self._pending += len(ended) - failed

    async def _renew(self) -> None:
        """Archive the oldest finished runs beyond their number, and fill the queue up."""
        beyond = len(self._ended_at) - FINISHED
        if beyond >= BATCH:
            age = timedelta(seconds=time.monotonic() - self._ended_at[beyond - 1])
            moved, _ = await archive.archive(self._connection, age, beyond, archive.START)
            for _ in range(moved):
                self._ended_at.popleft()
        missing = self._given.pending - self._pending
        if missing >= 10 * self._given.batch:
            await self._connection.execute(ADD_RUNS, self._models, missing, JOB, 100, None)
            self._pending += missing


@asynccontextmanager
async def idle_in_transaction(dsn: str) -> AsyncIterator[None]:
    """Hold a snapshot open: vacuum may remove nothing that has died since."""
    async with open_connection(dsn) as connection:
        transaction = connection.transaction(isolation="repeatable_read")
        await transaction.start()
        await connection.fetchval("SELECT count(*) FROM run_queue")
        yield
        await transaction.rollback()


async def measure(dsn: str, given: argparse.Namespace) -> list[Slice]:
    """Run all cycles, and print a line for each 5 %."""
    begin, end = given.snapshot
    slices = []
    async with open_connection(dsn) as connection, AsyncExitStack() as held:
        models = await seeding.add_models(connection, "q8_0", 1, given.models)
        await seeding.add_runs(connection, models, given.pending)
        runners = await seeding.sign_on(connection, given.runners)
        churn = Churn(connection, runners, models, given)
        snapshot = False
        for number in range(SLICES):
            if snapshot != (begin <= number / SLICES < end):
                snapshot = not snapshot
                await held.aclose()
                if snapshot:
                    await held.enter_async_context(idle_in_transaction(dsn))
            cycles = given.cycles * (number + 1) // SLICES
            slices.append(await _slice(connection, churn, cycles, snapshot))
            print(json.dumps(asdict(slices[-1])), flush=True)
    return slices


async def _slice(
    connection: asyncpg.Connection, churn: Churn, cycles: int, snapshot: bool
) -> Slice:
    """Go on until so many cycles are done, and return what these saw."""
    before, done, began = await fetch_one(connection, SIZES), churn.done, time.perf_counter()
    churn.claim_ms.clear()
    while churn.done < cycles:
        await churn.batch()
    taken = time.perf_counter() - began
    after = await fetch_one(connection, SIZES)
    updates = after["updates"] - before["updates"]
    return Slice(
        done=churn.done,
        snapshot=snapshot,
        cycles_per_s=round((churn.done - done) / taken),
        claims_per_s=round((churn.done - done) / (sum(churn.claim_ms) / 1000)),
        claim_p50_ms=round(statistics.median(churn.claim_ms), 2),
        claim_p99_ms=round(report.percentile(churn.claim_ms, 99), 2),
        dead=after["dead"],
        live=after["live"],
        table_mb=round(after["table_bytes"] / 2**20, 1),
        index_mb=round(after["index_bytes"] / 2**20, 1),
        hot_share=round((after["hot_updates"] - before["hot_updates"]) / max(1, updates), 3),
        vacuums=after["vacuums"] - before["vacuums"],
    )


def show(slices: Sequence[Slice]) -> None:
    """Print the table."""
    names = list(Slice.__dataclass_fields__)
    table = Table(*names)
    for each in slices:
        table.add_row(*(str(getattr(each, name)) for name in names))
    Console(width=WIDTH).print(table)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1_000_000, help="leases, whatever ends them")
    parser.add_argument("--batch", type=int, default=64, help="runners that claim together")
    parser.add_argument("--runners", type=int, default=10_000, help="that take turns")
    parser.add_argument("--models", type=int, default=40, help="distinct models")
    parser.add_argument("--pending", type=int, default=20_000, help="length of the queue")
    parser.add_argument("--silent", type=float, default=0.15, help="share of leases that lapse")
    parser.add_argument(
        "--snapshot", type=float, nargs=2, default=(0.3, 0.35), metavar=("FROM", "TO"),
        help="when a session sits idle in a transaction, as shares of the cycles",
    )  # fmt: skip
    parser.add_argument("--beats", type=int, default=3, help="heartbeats of a lease")
    parser.add_argument("--seed", type=int, default=1, help="of who falls silent")
    return parser.parse_args()


def main() -> int:
    """Soak a private database; keep the figures in bench/results/soak.json."""
    given = arguments()
    report.introduce()
    with open_env() as stage:
        slices = asyncio.run(measure(stage.dsn, given))
    show(slices)
    RESULT.parent.mkdir(exist_ok=True)
    kept: dict[str, Any] = {
        "machine": report.machine(),
        "given": {**vars(given), "finished_kept": FINISHED},
        "slices": [asdict(each) for each in slices],
    }
    RESULT.write_text(json.dumps(kept, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
