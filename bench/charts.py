"""The charts of docs/performance.md: claims/s and latency against depth and against parked runners.

Each is written with its data beside it: docs/performance-depth.png and .json, and
docs/performance-parked.png and .json. A point is the median of its rounds; the queue only grows
deeper, so the points are not taken in turn. A queue of 1,000 would be empty within a second of 64
connections: it has the latency on one connection only.

    make bench ONLY=charts       # installs the extra `bench`
"""

import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.claims import ARMS, MODELS, RUNNERS_PER_S, SETTLE_S, ClaimBench, plan_of
from bench.parked import Parked, raise_file_limit
from bench.support import report, seeding
from bench.support.env import BenchEnv, open_env
from bench.support.load import Load, plan, send
from bench.support.report import Options
from bench.support.seeding import open_connection

DOCS = Path(__file__).parents[1] / "docs"
DEPTHS = (1_000, 10_000, 100_000, 1_000_000)
PARKED = (0, 500, 1_000, 2_000, 5_000)
QUICK_DEPTHS, QUICK_PARKED = (1_000, 10_000), (0, 50)
DEEP_ENOUGH = 10_000  # for a round of 64 connections
# Nothing here is for these: they wait while others claim.
WAITING_KIND = {"vram_gb": 1, "quantizations": ["iq1_s"]}
SPARE_FILES = 300

Point = dict[str, float]


async def against_depth(stage: BenchEnv, wanted: Options) -> list[Point]:
    """Return a point per depth: one connection, and 64 where the queue is long enough."""
    stage.serve()
    points, there = [], 0
    async with open_connection(stage.dsn) as connection:
        models = await seeding.add_models(connection, "q8_0", 1, MODELS)
        runners = await seeding.sign_on(connection, wanted.seconds * RUNNERS_PER_S)
        with plan(plan_of(ARMS["claim"], runners)) as file:
            claim = ClaimBench(stage, connection, wanted.seconds).arm(file, claims=True)
            for depth in QUICK_DEPTHS if wanted.quick else DEPTHS:
                await seeding.add_runs(connection, models, depth - there)
                there = depth
                singles, loads = [], []
                for _ in range(wanted.rounds):
                    singles.append(await send(stage.port, file, connections=1, seconds=1))
                    await asyncio.sleep(SETTLE_S)
                    await seeding.put_back(connection)
                    stage.forget_keys()
                    if depth >= DEEP_ENOUGH:
                        loads.append(await claim())
                point = {"depth": depth, **_point("one", singles), **_point("many", loads)}
                print(json.dumps(point), flush=True)
                points.append(point)
    return points


async def against_parked(stage: BenchEnv, wanted: Options) -> list[Point]:
    """Return a point per number of parked runners, of a kind for which there is nothing."""
    numbers = QUICK_PARKED if wanted.quick else PARKED
    allowed = raise_file_limit(max(numbers) + SPARE_FILES) - SPARE_FILES
    server, points = stage.serve(), []
    async with open_connection(stage.dsn) as connection:
        models = await seeding.add_models(connection, "q8_0", 1, MODELS)
        await seeding.add_runs(connection, models, 100_000)
        waiting = await seeding.sign_on(connection, max(numbers), kinds=(WAITING_KIND,))
        runners = await seeding.sign_on(connection, wanted.seconds * RUNNERS_PER_S)
        with plan(plan_of(ARMS["claim"], runners)) as file:
            claim = ClaimBench(stage, connection, wanted.seconds).arm(file, claims=True)
            await claim()  # what the first claims cost is not what a claim costs
            for number in (n for n in numbers if n <= allowed):
                loads = []
                for _ in range(wanted.rounds):
                    parked = Parked(server.port)
                    await parked.park(waiting[:number])
                    await asyncio.sleep(1)
                    loads.append(await claim())
                    await parked.hang_up()
                points.append({"parked": number, **_point("many", loads)})
                print(json.dumps(points[-1]), flush=True)
    return points


def draw(name: str, x: str, points: Sequence[Point], log: bool) -> None:
    """Write a chart and its data to docs/."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6))
    for axes, unit, series in (
        (above, "claims/s", {"many_per_s": "64 connections"}),
        (below, "ms", {"many_p50_ms": "p50, 64 connections", "many_p99_ms": "p99, 64 connections",
                       "one_p50_ms": "p50, 1 connection", "one_p99_ms": "p99, 1 connection"}),
    ):  # fmt: skip
        for member, label in series.items():
            known = [(point[x], point[member]) for point in points if member in point]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", label=label)
        axes.set_ylabel(unit)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        axes.legend()
    if log:
        below.set_xscale("log")
    below.set_xlabel({"depth": "runs PENDING", "parked": "parked runners"}[x])
    figure.tight_layout()
    figure.savefig(DOCS / f"{name}.png", dpi=110)
    kept = {"machine": report.machine(), "points": list(points)}
    (DOCS / f"{name}.json").write_text(json.dumps(kept, indent=2) + "\n")


def _point(prefix: str, loads: Sequence[Load]) -> Point:
    if not loads:
        return {}
    return {
        f"{prefix}_per_s": round(statistics.median(load.rate for load in loads), 1),
        f"{prefix}_p50_ms": round(statistics.median(load.p50_ms for load in loads), 2),
        f"{prefix}_p99_ms": round(statistics.median(load.p99_ms for load in loads), 2),
    }


def main() -> int:
    """Measure and draw; a quick one draws nothing."""
    wanted = report.options(seconds=2)
    report.introduce()
    with open_env() as stage:
        deep = asyncio.run(against_depth(stage, wanted))
    with open_env() as stage:
        parked = asyncio.run(against_parked(stage, wanted))
    if not wanted.quick:
        draw("performance-depth", "depth", deep, log=True)
        draw("performance-parked", "parked", parked, log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
