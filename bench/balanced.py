"""B9: two processes behind nginx against one behind nginx, and what saturates.

B1's claims through the balancer's file of deploy/. During each round /proc says which program used
how much of the cores: the second process helps only until they are used up.

    make bench ONLY=balanced
"""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg

from bench.claims import ARMS, CONNECTIONS, MODELS, PENDING, RUNNERS_PER_S, SETTLE_S, plan_of
from bench.support import report, seeding
from bench.support.balancer import NginxMissing, balancer
from bench.support.env import BenchEnv, open_env
from bench.support.load import Load, plan, send
from bench.support.procfs import cores_between, cpu_by_program
from bench.support.report import Figure, Limit, Options, in_turn
from bench.support.seeding import open_connection

TARGET = 1.5
SATURATED = 0.9  # of a core, or of the machine


@dataclass(frozen=True, slots=True)
class Round:
    """What one round took, and the cores each program used meanwhile."""

    load: Load
    cores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Arm:
    """A balancer in front of some processes."""

    stage: BenchEnv
    connection: asyncpg.Connection
    port: int
    file: Path
    seconds: int

    async def measure(self) -> Round:
        """Send claims through the balancer for one round."""
        before, began = cpu_by_program(), time.monotonic()
        load = await send(self.port, self.file, connections=CONNECTIONS, seconds=self.seconds)
        cores = cores_between(before, cpu_by_program(), time.monotonic() - began)
        await asyncio.sleep(SETTLE_S)
        await seeding.put_back(self.connection)
        self.stage.forget_keys()
        return Round(load, cores)


async def measure(stage: BenchEnv, wanted: Options, fronts: Sequence[int]) -> Figure:
    """Seed, measure and return the figure. `fronts`: of one process, and of two."""
    count = wanted.runners or wanted.seconds * RUNNERS_PER_S
    async with open_connection(stage.dsn) as connection:
        models = await seeding.add_models(connection, "q8_0", 1, MODELS)
        await seeding.add_runs(connection, models, 2_000 if wanted.quick else PENDING)
        runners = await seeding.sign_on(connection, count)
        with plan(plan_of(ARMS["claim"], runners)) as file:
            one = Arm(stage, connection, fronts[0], file, wanted.seconds)
            two = replace(one, port=fronts[1])
            arms = {"one process": one.measure, "two processes": two.measure}
            taken = await in_turn(arms, wanted.rounds, warm_up=not wanted.quick)
    return _figure(taken)


def saturated(cores: dict[str, float], servers: int) -> str:
    """Say which program used up a core, or that together they used up the machine."""
    total, cpus = sum(cores.values()), os.cpu_count() or 1
    each = {name: used / (servers if name == "server" else 1) for name, used in cores.items()}
    full = [f"{name} (a core)" for name, used in each.items() if used >= SATURATED]
    shares = ", ".join(f"{name} {used:.2f}" for name, used in cores.items() if used >= 0.01)
    if total >= SATURATED * cpus:
        full.append(f"the machine: {total:.2f} of {cpus} cores")
    return f"{' and '.join(full) or 'nothing'} ({shares})"


def _figure(taken: dict[str, list[Round]]) -> Figure:
    rates = {name: [each.load.rate for each in rounds] for name, rounds in taken.items()}
    report.print_arms("claims/s behind nginx", rates, "one process")
    cores = {
        name: {
            program: round(statistics.median(each.cores.get(program, 0.0) for each in rounds), 2)
            for program in rounds[0].cores
        }
        for name, rounds in taken.items()
    }
    full = {
        name: saturated(used, servers)
        for servers, (name, used) in enumerate(cores.items(), start=1)
    }
    for name, said in full.items():
        print(f"saturated with {name}: {said}")
    two, one = (statistics.median(rates[name]) for name in ("two processes", "one process"))
    return Figure(
        "B9",
        f"claims over nginx and two processes, {CONNECTIONS} connections",
        two,
        "claims/s",
        {"one process": Limit(two / one, TARGET)},
        {
            "arms": {
                name: report.load_spread([r.load for r in rounds]) for name, rounds in taken.items()
            },
            "cores": cores,
            "saturated": full,
        },
    )


def main() -> int:
    """Measure on a private stage."""
    wanted = report.options()
    report.introduce()
    with open_env() as stage, ExitStack() as fronts:
        ports = [stage.serve().port, stage.serve().port]
        try:
            urls = [fronts.enter_context(balancer(some)).url for some in (ports[:1], ports)]
        except NginxMissing as missing:
            print(missing, file=sys.stderr)
            return report.NOT_HERE
        numbers = [int(url.rpartition(":")[2]) for url in urls]
        figure = asyncio.run(measure(stage, wanted, numbers))
    return report.publish(figure, wanted)


if __name__ == "__main__":
    sys.exit(main())
