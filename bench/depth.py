"""B4: what a claim takes, however long the queue is and whatever waits in it.

One claim statement (each rolled back), and a claim over HTTP on one connection, with 1,000,000 runs
PENDING against 1,000; and with 1,000 behind 1,000,000 that come first and do not fit: too big, of a
quantization the runner lacks, deferred until tomorrow. Also with 1,000,000 runs of 300 models.
Every state is a database of its own on one PostgreSQL, so that the rounds can be taken in turn.

    make bench ONLY=depth
"""

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import asyncpg

from bench.claims import ARMS, MODELS, SETTLE_S, plan_of
from bench.support import report, seeding
from bench.support.env import BenchEnv, Server, open_env
from bench.support.load import plan, send
from bench.support.report import Figure, Limit, Options, in_turn
from bench.support.seeding import OFFER, BenchRunner, open_connection
from db import run_queue
from db.run_queue import Claimant

SHALLOW, DEEP = 1_000, 1_000_000
RUNNERS_PER_S = 900  # on one connection; no state has more runs for them than SHALLOW
MANY_MODELS = 300
STATEMENTS = 40
AHEAD = 1  # priority of what comes first
MOST = {"deep": 1.3, "too big": 1.5, "quantization": 1.5, "deferred": 1.5}
TOO_BIG = "UPDATE models SET parameter_count_b = 400, active_parameter_count_b = 400"
OTHER_QUANTIZATION = """
UPDATE models SET quantization_id = x.quantization_id
FROM quantization_methods AS x WHERE x.name = 'iq1_s'
"""


@dataclass(frozen=True, slots=True)
class State:
    """A queue, and the server that hands it out."""

    dsn: str
    server: Server
    runner: BenchRunner

    async def statement_ms(self) -> float:
        """Return the median time of one claim statement, each rolled back."""
        times = []
        async with open_connection(self.dsn) as connection:
            for number in range(STATEMENTS):
                transaction = connection.transaction()
                await transaction.start()
                began = time.perf_counter()
                found = await self._claim(connection, f"statement-{number}")
                times.append((time.perf_counter() - began) * 1000)
                assert found[0]["queue_id"] is not None
                await transaction.rollback()
        return statistics.median(times)

    async def http_ms(self, file: Path, seconds: int) -> float:
        """Return the median time of a claim over HTTP, on one connection."""
        load = await send(self.server.port, file, connections=1, seconds=seconds)
        await asyncio.sleep(SETTLE_S)
        async with open_connection(self.dsn) as connection:
            await seeding.put_back(connection)
        return load.p50_ms

    async def _claim(self, connection: asyncpg.Connection, key: str) -> list[asyncpg.Record]:
        runner = self.runner
        return await run_queue.claim(
            connection,
            [
                Claimant(
                    runner.runner_id, runner.fingerprint, uuid4(), uuid4(), key, "digest", OFFER
                )
            ],
            ttl=timedelta(minutes=5),
            max_leases=1,
            max_runtime_s=3600,
        )


@asynccontextmanager
async def states(
    stage: BenchEnv, wanted: Options, runners: list[BenchRunner]
) -> AsyncIterator[dict[str, State]]:
    """Yield every state of the queue by name, the shallow one first. `runners` gets the runners."""
    deep = 2_000 if wanted.quick else DEEP
    async with AsyncExitStack() as stack:
        base = await stack.enter_async_context(open_connection(stage.dsn))
        count = wanted.runners or wanted.seconds * RUNNERS_PER_S
        runners += await seeding.sign_on(base, count)
        copies = _Copies(stage)
        shallow = await copies.make("shallow")
        async with open_connection(shallow) as connection:
            await _fill(connection, SHALLOW, MODELS)
        behind = await copies.make("behind")
        async with open_connection(behind) as connection:
            await _fill(connection, deep, MODELS, priority=AHEAD)
        dsns = {"shallow": shallow, "deep": behind}
        for name, change in (("too big", TOO_BIG), ("quantization", OTHER_QUANTIZATION)):
            dsns[name] = await copies.make(name.replace(" ", "_"), "behind")
            async with open_connection(dsns[name]) as connection:
                await connection.execute(change)
                await _fill(connection, SHALLOW, MODELS)
        dsns["deferred"] = await copies.make("deferred")
        async with open_connection(dsns["deferred"]) as connection:
            tomorrow = timedelta(days=1)
            models = await _fill(connection, deep, MODELS, priority=AHEAD, deferred=tomorrow)
            await seeding.add_runs(connection, models, SHALLOW)
        dsns["300 models"] = await copies.make("many_models")
        async with open_connection(dsns["300 models"]) as connection:
            await _fill(connection, deep, MANY_MODELS)
        yield {
            name: State(dsn, stage.serve(database_url=dsn), runners[0])
            for name, dsn in dsns.items()
        }


async def _fill(
    connection: asyncpg.Connection,
    runs: int,
    models: int,
    *,
    priority: int = 100,
    deferred: timedelta | None = None,
) -> list:
    ids = await seeding.add_models(connection, "q8_0", 1, models)
    await seeding.add_runs(connection, ids, runs, priority=priority, deferred=deferred)
    await connection.execute("CHECKPOINT")
    return ids


class _Copies:
    """Databases made from another one, file by file."""

    def __init__(self, stage: BenchEnv) -> None:
        self._stage = stage

    async def make(self, name: str, template: str = "bakeoff") -> str:
        """Copy a database that nobody uses (the base's own connection is another's)."""
        admin = await asyncpg.connect(self._stage.postgres.database_dsn("postgres"))
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", template
        )
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        await admin.close()
        return self._stage.postgres.database_dsn(name)


async def measure(stage: BenchEnv, wanted: Options) -> Figure:
    """Seed, measure, and return the figure."""
    runners: list[BenchRunner] = []
    async with states(stage, wanted, runners) as made:
        print(f"seeded {', '.join(made)}", flush=True)
        with plan(plan_of(ARMS["claim"], runners)) as file:
            statements: dict[str, Callable[[], Awaitable[float]]] = {
                name: state.statement_ms for name, state in made.items()
            }
            over_http: dict[str, Callable[[], Awaitable[float]]] = {
                name: lambda state=state: state.http_ms(file, wanted.seconds)
                for name, state in made.items()
            }
            taken = await in_turn(statements, wanted.rounds, warm_up=not wanted.quick)
            answered = await in_turn(over_http, wanted.rounds, warm_up=not wanted.quick)
    return _figure(taken, answered)


def _figure(taken: dict[str, list[float]], answered: dict[str, list[float]]) -> Figure:
    report.print_arms("one claim statement, median ms", taken, "shallow")
    report.print_arms("a claim over HTTP, median ms", answered, "shallow")
    ratios = {
        kind: {name: statistics.median(t) / statistics.median(times["shallow"])
               for name, t in times.items()}
        for kind, times in (("statement", taken), ("http", answered))
    }  # fmt: skip
    return Figure(
        "B4",
        f"claim statement's p50 with {DEEP:,} PENDING; ratios to {SHALLOW:,} PENDING",
        statistics.median(taken["deep"]),
        "ms",
        {
            f"{name}, {kind}": Limit(found[name], most, most=True)
            for name, most in MOST.items()
            for kind, found in ratios.items()
        },
        {
            "statement_ms": {name: report.spread(times) for name, times in taken.items()},
            "http_ms": {name: report.spread(times) for name, times in answered.items()},
            "ratio_300_models": {k: round(found["300 models"], 3) for k, found in ratios.items()},
        },
    )


def main() -> int:
    """Measure on a private stage."""
    wanted = report.options(rounds=5, seconds=1)
    report.introduce()
    with open_env() as stage:
        figure = asyncio.run(measure(stage, wanted))
    return report.publish(figure, wanted)


if __name__ == "__main__":
    sys.exit(main())
