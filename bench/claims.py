"""B1: claims/s over HTTP, one process, 64 connections, one run per request, 200,000 PENDING.

Against the same process's authenticated no-op, and against a handler that runs one claim statement
per request (both in support/server.py), with the same tokens, headers, bodies and connections.
Thousands of runners with one lease each, so each claims once per round; between rounds the leases
are put back and the table is vacuumed. Twice: all runners alike, which is B1's figure, and runners
of five kinds, which the broker must serve by a statement per kind.

    make bench ONLY=claims
    python -m bench.claims --only claim --seconds 20    # for a profiler: prints the process id

An `--only` measures runners alike, and keeps no figure.
"""

import asyncio
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from bench.support import report, seeding
from bench.support.env import BenchEnv, open_env
from bench.support.load import Load, LoadFailed, Request, plan, send
from bench.support.report import Figure, Limit, Options, in_turn
from bench.support.seeding import BenchRunner, open_connection

CONNECTIONS = 64
PENDING = 200_000
MODELS = 12
# More claims per second than any process could do here: no runner claims twice in a round.
RUNNERS_PER_S = 6000
SETTLE_S = 0.5  # requests that were in flight when the load ended
ARMS = {"noop": "/bench/noop", "claim": "/api/queue/claim", "naive": "/bench/naive-claim"}
KINDS = tuple(
    {"vram_gb": vram_gb, "quantizations": quantizations}
    for vram_gb, quantizations in (
        (8, ["q4_k_m", "q8_0"]),
        (12, ["q8_0"]),
        (24, ["q4_k_m", "q5_k_m", "q8_0"]),
        (48, ["fp16", "q8_0"]),
        (80, ["bf16", "fp16", "q8_0"]),
    )
)


@dataclass(frozen=True, slots=True)
class ClaimBench:
    """A seeded stage with one server."""

    stage: BenchEnv
    connection: asyncpg.Connection
    seconds: int

    def arm(self, file: Path, claims: bool) -> Callable[[], Awaitable[Load]]:
        """Return what measures one round of a plan. Raises LoadFailed when claims got nothing."""

        async def measure() -> Load:
            load = await send(self.stage.port, file, connections=CONNECTIONS, seconds=self.seconds)
            await asyncio.sleep(SETTLE_S)
            leased = await seeding.put_back(self.connection)
            if claims and leased < load.requests:
                raise LoadFailed(f"{load.requests} claims were answered, {leased} runs leased")
            self.stage.forget_keys()
            return load

        return measure


def plan_of(path: str, runners: Sequence[BenchRunner]) -> list[Request]:
    """Return one request of each runner."""
    return [Request(path, runner.token) for runner in runners]


async def measure(stage: BenchEnv, wanted: Options) -> Figure:
    """Seed, measure both variants, and return the figure."""
    server = stage.serve()
    count = wanted.runners or wanted.seconds * RUNNERS_PER_S
    async with open_connection(stage.dsn) as connection:
        models = await seeding.add_models(connection, "q8_0", 1, MODELS)
        pending = max(count, 2_000 if wanted.quick else PENDING)
        await seeding.add_runs(connection, models, pending)
        print(f"server pid {server.pid}, {pending:,} PENDING, {count:,} runners", flush=True)
        scene = ClaimBench(stage, connection, wanted.seconds)
        alike = await _variant(scene, await seeding.sign_on(connection, count), wanted)
        mixed = await _variant(scene, await seeding.sign_on(connection, count, kinds=KINDS), wanted)
    report.print_arms("requests/s, runners alike", _rates(alike), "noop")
    if mixed:
        report.print_arms("requests/s, runners of 5 kinds", _rates(mixed), "noop")
    return _figure(alike, mixed, pending)


async def _variant(
    scene: ClaimBench, runners: Sequence[BenchRunner], wanted: Options
) -> dict[str, list[Load]]:
    with ExitStack() as files:
        arms = {
            name: scene.arm(files.enter_context(plan(plan_of(path, runners))), name != "noop")
            for name, path in ARMS.items()
            if wanted.wants(name)
        }
        return await in_turn(arms, wanted.rounds, warm_up=not wanted.quick)


def _rates(arms: dict[str, list[Load]]) -> dict[str, list[float]]:
    return {name: [load.rate for load in loads] for name, loads in arms.items()}


def _figure(alike: dict[str, list[Load]], mixed: dict[str, list[Load]], pending: int) -> Figure:
    medians = {name: statistics.median(rates) for name, rates in _rates(alike).items()}
    claims = medians.get("claim", 0.0)
    targets = {"noop": 0.85, "naive": 1.5}
    return Figure(
        "B1",
        f"claims over HTTP, {CONNECTIONS} connections, {pending:,} PENDING",
        claims,
        "claims/s",
        {
            name: Limit(claims / medians[name], target)
            for name, target in targets.items()
            if name in medians
        },
        {
            variant: {name: report.load_spread(loads) for name, loads in arms.items()}
            for variant, arms in (("alike", alike), ("five_kinds", mixed))
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
