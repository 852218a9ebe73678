"""B6: 5,000 long polls in one process: memory of each, database connections, idle CPU.

A round parks 5,000 claims on connections of their own, looks for a while, and hangs up; the process
is the same in all rounds, warmed up before the first. Memory is the server's resident set: before,
parked, and after the last release.

    make bench ONLY=parked
"""

import asyncio
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import asyncpg

from bench.support import procfs, report, seeding
from bench.support.env import BenchEnv, Server, open_env
from bench.support.load import Request, plan, send
from bench.support.report import Figure, Limit, Options
from bench.support.seeding import BenchRunner, open_connection
from db.pool import fetch_one

PARKED = 5_000
WAIT_S = 50
LOOK_S = 10
AT_A_TIME = 200  # connections being made; the listen queue is bounded
SETTLE_S = 3
SPARE_FILES = 200
POOL = 10
CONNECTIONS = POOL + 2  # the listener's own, and the yardsticks' pool of bench/support/server.py
KIB_MOST, CPU_MOST, LEFT_MOST = 40, 0.05, 1.2
STATES = """
SELECT count(*) AS all, count(*) FILTER (WHERE state LIKE 'idle in transaction%') AS held,
    count(*) FILTER (WHERE state = 'active') AS active
FROM pg_stat_activity WHERE application_name = 'bakeoff-queue' AND datname = current_database()
"""


class Parked:
    """Claims that wait for a run, each on a connection of its own."""

    def __init__(self, port: int, wait_s: int = WAIT_S) -> None:
        self._port = port
        self._body = json.dumps({"wait_s": wait_s})
        self._open: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def park(self, runners: Sequence[BenchRunner]) -> None:
        """Send a claim for each runner."""
        for begin in range(0, len(runners), AT_A_TIME):
            some = runners[begin : begin + AT_A_TIME]
            self._open += await asyncio.gather(*map(self.send, some))

    async def send(self, runner: BenchRunner) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send one claim; return its connection, to read the answer from."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = (
            "POST /api/queue/claim HTTP/1.1", "Host: bench",
            f"Authorization: Bearer {runner.token}", "Content-Type: application/json",
            f"Content-Length: {len(self._body)}", "", self._body,
        )  # fmt: skip
        writer.write("\r\n".join(lines).encode())
        await writer.drain()
        return reader, writer

    async def hang_up(self) -> None:
        """Close every connection."""
        for _, writer in self._open:
            writer.close()
        for _, writer in self._open:
            with suppress(OSError):
                await writer.wait_closed()
        self._open.clear()


@dataclass(frozen=True, slots=True)
class Look:
    """What one round saw."""

    kib_each: float
    cpu: float
    connections: int
    held: int
    active: float


async def one_round(
    server: Server, connection: asyncpg.Connection, runners: Sequence[BenchRunner], seconds: float
) -> Look:
    """Park, look, hang up."""
    before = procfs.resident_kib(server.pid)
    parked = Parked(server.port)
    await parked.park(runners)
    await asyncio.sleep(SETTLE_S)
    each = (procfs.resident_kib(server.pid) - before) / len(runners)
    began, used = time.monotonic(), procfs.cpu_s(server.pid)
    seen = []
    while time.monotonic() - began < seconds:
        seen.append(await fetch_one(connection, STATES))
        await asyncio.sleep(0.2)
    cpu = (procfs.cpu_s(server.pid) - used) / (time.monotonic() - began)
    await parked.hang_up()
    await asyncio.sleep(SETTLE_S)
    return Look(
        each,
        cpu,
        max(row["all"] for row in seen),
        max(row["held"] for row in seen),
        statistics.mean(row["active"] for row in seen),
    )


def raise_file_limit(wanted: int) -> int:
    """Allow so many open files, here and in the servers started from here; return what is allowed.

    Says so when the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        print(f"ulimit -n allows {allowed} open files, {wanted} are needed: fewer are parked")
    return max(allowed, soft)


async def measure(stage: BenchEnv, wanted: Options, server: Server, parked: int) -> Figure:
    """Measure and return the figure."""
    async with open_connection(stage.dsn) as connection:
        runners = await seeding.sign_on(connection, parked)
        with plan(Request("/bench/noop", runner.token) for runner in runners) as file:
            await send(server.port, file, connections=64, seconds=1)
        start = procfs.resident_kib(server.pid)
        looks = [
            await one_round(server, connection, runners, 1 if wanted.quick else LOOK_S)
            for _ in range(wanted.rounds)
        ]
        left = procfs.resident_kib(server.pid) / start
    arms = {
        "KiB per parked claim": [look.kib_each for look in looks],
        "idle CPU, cores": [look.cpu for look in looks],
        "connections to PostgreSQL": [look.connections for look in looks],
        "of these idle in a transaction": [look.held for look in looks],
        "statements running": [look.active for look in looks],
    }
    report.print_arms(f"{parked:,} parked claims", arms, None)
    # The first round's: later ones park in the memory that the first has left.
    most = max(look.kib_each for look in looks)
    return Figure(
        "B6",
        f"{parked:,} parked claims in one process: memory of each",
        most,
        "KiB",
        {
            "KiB": Limit(most, KIB_MOST, most=True),
            "idle_cpu": Limit(statistics.median(arms["idle CPU, cores"]), CPU_MOST, most=True),
            "held_connections": Limit(max(look.held for look in looks), 0, most=True),
            "connections": Limit(max(look.connections for look in looks), CONNECTIONS, most=True),
            "memory_after": Limit(left, LEFT_MOST, most=True),
        },
        {name: report.spread(values) for name, values in arms.items()},
    )


def main() -> int:
    """Measure on a private stage."""
    wanted = report.options()
    report.introduce()
    parked = wanted.runners or (200 if wanted.quick else PARKED)
    parked = min(parked, raise_file_limit(parked + SPARE_FILES) - SPARE_FILES)
    with open_env() as stage:
        server = stage.serve(database_pool_max=POOL)
        figure = asyncio.run(measure(stage, wanted, server, parked))
    return report.publish(figure, wanted)


if __name__ == "__main__":
    sys.exit(main())
