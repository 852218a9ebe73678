"""B5: from an enqueue to the answer of a parked runner, with 1,000 parked.

One run at a time is enqueued (the service's own statements, in a transaction of its own); the time
is from before the enqueue to the answer's first bytes, whoever of the 1,000 gets it; another runner
then takes its place. Between the samples the same client times a no-op on a kept connection.
The parked claims' own re-check is put off, so that every claim statement is a wake-up's.

    make bench ONLY=wakeup
"""

import asyncio
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

import asyncpg
import httpx

from bench.parked import WAIT_S, Parked, raise_file_limit
from bench.support import report, seeding
from bench.support.env import BenchEnv, open_env
from bench.support.report import Figure, Limit, Options
from bench.support.seeding import JOB, BenchRunner, open_connection
from db import run_queue
from db.run_queue import QueuedRun

PARKED = 1_000
SAMPLES = 100  # of a round
PAUSE_S = 0.03  # between samples: the next runner parks, the last wake-up is over
SETTLE_S = 2
ANSWER_S = 10
SPARE_FILES = 200
P99_MOST, STATEMENTS_MOST = 10, 2
STATEMENTS = re.compile(r"^bakeoff_queue_claim_duration_seconds_count (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Round:
    """What one round took."""

    wakeups_ms: list[float]
    noops_ms: list[float]
    statements: float


class Waiters:
    """Parked runners; the one that is answered makes room for the next."""

    def __init__(self, port: int, runners: Sequence[BenchRunner]) -> None:
        self._parked = Parked(port)
        self._runners = iter(runners)
        self._answered: asyncio.Queue[float] = asyncio.Queue()
        self._waiting: set[asyncio.Task[None]] = set()

    async def add(self, count: int) -> None:
        """Park so many runners more."""
        for _ in range(count):
            reader, writer = await self._parked.send(next(self._runners))
            task = asyncio.create_task(self._wait(reader, writer))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)

    async def answered(self) -> float:
        """Return when the next answer arrived."""
        async with asyncio.timeout(ANSWER_S):
            return await self._answered.get()

    async def close(self) -> None:
        """Hang up."""
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)

    async def _wait(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            at = time.perf_counter()
            if b" 200 " not in head.split(b"\r\n")[0]:
                print(f"a parked claim was answered {head.split()[1].decode()}", file=sys.stderr)
                return
            self._answered.put_nowait(at)
        finally:
            writer.close()


class Wakeups:
    """One run after the other, and what each woke."""

    def __init__(
        self, connection: asyncpg.Connection, http: httpx.AsyncClient, model: UUID, token: str
    ) -> None:
        self._connection = connection
        self._http = http
        self._model = model
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    async def one_round(self, waiters: Waiters, samples: int) -> Round:
        """Enqueue `samples` runs and time each wake-up, and a no-op after each."""
        wakeups, noops = [], []
        before = await self._statements()
        for _ in range(samples):
            began = time.perf_counter()
            await self._enqueue()
            wakeups.append((await waiters.answered() - began) * 1000)
            await waiters.add(1)
            await asyncio.sleep(PAUSE_S)
            began = time.perf_counter()
            answer = await self._http.post("/bench/noop", content=b"{}", headers=self._headers)
            noops.append((time.perf_counter() - began) * 1000)
            answer.raise_for_status()
        # Each runner that parks looks first: that one is no wake-up's.
        return Round(wakeups, noops, (await self._statements() - before) / samples - 1)

    async def _enqueue(self) -> None:
        run_id = uuid4()
        run = QueuedRun(
            run_id, self._model, self._model, json.dumps(JOB), "", 100, None, 5, None, None
        )
        async with self._connection.transaction():
            await self._connection.execute(
                "INSERT INTO runs (run_id, submitted_at, publisher_id) VALUES ($1, now(), 'bench')",
                run_id,
            )
            await run_queue.enqueue(self._connection, [run])

    async def _statements(self) -> float:
        found = STATEMENTS.search((await self._http.get("/metrics")).text)
        return float(found[1]) if found else 0.0


async def measure(stage: BenchEnv, wanted: Options) -> Figure:
    """Measure and return the figure."""
    parked = wanted.runners or (100 if wanted.quick else PARKED)
    samples = 20 if wanted.quick else SAMPLES
    rounds = []
    async with (
        open_connection(stage.dsn) as connection,
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{stage.port}", trust_env=False, timeout=30
        ) as http,
    ):
        (model,) = await seeding.add_models(connection, "q8_0", 1)
        for _ in range(wanted.rounds):
            # Others in every round: those before hold leases now.
            runners = await seeding.sign_on(connection, parked + samples + 1)
            waiters = Waiters(stage.port, runners[1:])
            await waiters.add(parked)
            await asyncio.sleep(SETTLE_S)
            wakeups = Wakeups(connection, http, model, runners[0].token)
            rounds.append(await wakeups.one_round(waiters, samples))
            await waiters.close()
            await asyncio.sleep(SETTLE_S)
    return _figure(rounds, parked)


def _figure(rounds: list[Round], parked: int) -> Figure:
    arms = {
        "wake-up p50, ms": [statistics.median(r.wakeups_ms) for r in rounds],
        "wake-up p99, ms": [report.percentile(r.wakeups_ms, 99) for r in rounds],
        "no-op p50, ms": [statistics.median(r.noops_ms) for r in rounds],
        "no-op p99, ms": [report.percentile(r.noops_ms, 99) for r in rounds],
        "claim statements per run": [r.statements for r in rounds],
    }
    report.print_arms(f"{parked:,} parked", arms, None)
    medians = {name: statistics.median(values) for name, values in arms.items()}
    p99 = medians["wake-up p99, ms"]
    return Figure(
        "B5",
        f"from enqueue to answer with {parked:,} parked, p99",
        p99,
        "ms",
        {
            "noop_p99": Limit(p99 / medians["no-op p99, ms"], P99_MOST, most=True),
            "statements": Limit(medians["claim statements per run"], STATEMENTS_MOST, most=True),
        },
        {name: report.spread(values) for name, values in arms.items()},
    )


def main() -> int:
    """Measure on a private stage."""
    wanted = report.options()
    report.introduce()
    raise_file_limit(PARKED + SPARE_FILES)
    with open_env() as stage:
        stage.serve(claim_recheck_s=10 * WAIT_S)
        figure = asyncio.run(measure(stage, wanted))
    return report.publish(figure, wanted)


if __name__ == "__main__":
    sys.exit(main())
