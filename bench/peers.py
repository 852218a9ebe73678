"""B3: claims/s of B1 against two peers, each without HTTP, in its own process, with 16 workers.

procrastinate's `fetch_job` and pgqueuer's `dequeue(batch_size=1)`, on the same PostgreSQL, in
databases of their own with as many jobs. For comparison, without a target: our broker without HTTP,
called by as many workers. The rounds of all are taken in turn.

    make bench ONLY=peers      # installs the extra `bench`
"""

import asyncio
import json
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version

import asyncpg

from bench.claims import ARMS, MODELS, PENDING, RUNNERS_PER_S, ClaimBench, plan_of
from bench.peer_process import SEED
from bench.support import report, seeding
from bench.support.env import BenchEnv, open_env
from bench.support.load import plan
from bench.support.report import Figure, Limit, Options, in_turn
from bench.support.seeding import open_connection

WORKERS = 16
TARGET = 1.5


class PeerFailed(Exception):
    """A peer's process ended badly; what it said is above."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer and its database."""

    name: str
    dsn: str
    environment: dict[str, str] | None = None

    async def seed(self, jobs: int) -> None:
        """Fill its queue."""
        await self._run("seed", jobs)

    async def rate(self, seconds: int) -> float:
        """Return the jobs its workers fetch per second."""
        found = json.loads(await self._run("fetch", WORKERS, seconds))
        connection = await asyncpg.connect(self.dsn)
        await connection.execute("VACUUM (ANALYZE)", timeout=120)
        await connection.close()
        return found["jobs"] / found["seconds"]

    async def _run(self, verb: str, *numbers: int) -> bytes:
        argv = [sys.executable, "-m", "bench.peer_process", self.name, self.dsn, verb]
        process = await asyncio.create_subprocess_exec(
            *argv, *map(str, numbers), stdout=asyncio.subprocess.PIPE, env=self.environment
        )
        said, _ = await process.communicate()
        if process.returncode:
            raise PeerFailed(f"{self.name}, {verb}")
        return said


async def measure(stage: BenchEnv, wanted: Options) -> Figure:
    """Seed all three, measure in turn, and return the figure."""
    count = wanted.runners or wanted.seconds * RUNNERS_PER_S
    pending = max(count, 2_000 if wanted.quick else PENDING)
    peers = [Peer(name, stage.postgres.database_dsn(f"peer_{name}")) for name in SEED]
    async with open_connection(stage.dsn) as connection:
        for peer in peers:
            await connection.execute(f"CREATE DATABASE peer_{peer.name} TEMPLATE template0")
            await peer.seed(pending)
        models = await seeding.add_models(connection, "q8_0", 1, MODELS)
        await seeding.add_runs(connection, models, pending)
        runners = await seeding.sign_on(connection, count)
        stage.serve()
        with plan(plan_of(ARMS["claim"], runners)) as file:
            claim = ClaimBench(stage, connection, wanted.seconds).arm(file, claims=True)

            async def claims_per_s() -> float:
                return (await claim()).rate

            broker = Peer("broker", stage.dsn, stage.environment({}))

            async def without_http() -> float:
                rate = await broker.rate(wanted.seconds)
                await seeding.put_back(connection)
                stage.forget_keys()
                return rate

            arms: dict[str, Callable[[], Awaitable[float]]] = {
                "claim": claims_per_s,
                "broker, no HTTP": without_http,
            }
            for peer in peers:
                arms[peer.name] = lambda peer=peer: peer.rate(wanted.seconds)
            taken = await in_turn(arms, wanted.rounds, warm_up=not wanted.quick)
    return _figure(taken, pending)


def _figure(taken: dict[str, list[float]], pending: int) -> Figure:
    report.print_arms("claims/s", taken, None)
    claims = statistics.median(taken["claim"])
    return Figure(
        "B3",
        f"claims over HTTP against peers' fetches without, {WORKERS} workers, {pending:,} waiting",
        claims,
        "claims/s",
        {name: Limit(claims / statistics.median(taken[name]), TARGET) for name in SEED},
        {
            **{name: {"rate": report.spread(rates)} for name, rates in taken.items()},
            "versions": {name: version(name) for name in SEED},
        },
    )


def main() -> int:
    """Measure on a private stage."""
    wanted = report.options()
    report.introduce()
    with open_env() as stage:
        figure = asyncio.run(measure(stage, wanted))
    return report.publish(figure, wanted)


if __name__ == "__main__":
    sys.exit(main())
