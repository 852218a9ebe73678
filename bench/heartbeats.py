"""B2: heartbeats/s over HTTP, one process, 64 connections, 10,000 live leases.

Against the same process's authenticated no-op with the same tokens, headers, bodies and
connections. Every lease beats in turn, so each is renewed every few seconds.

    make bench ONLY=heartbeats
"""

import asyncio
import statistics
import sys
from contextlib import ExitStack
from datetime import timedelta

from bench.support import report, seeding
from bench.support.env import BenchEnv, open_env
from bench.support.load import Load, Request, plan, send
from bench.support.report import Figure, Limit, Options, in_turn
from bench.support.seeding import Lease, open_connection

CONNECTIONS = 64
LEASES = 10_000
LIFE = timedelta(hours=1)


def beat(lease: Lease) -> Request:
    """Return the heartbeat of a lease."""
    body = f'{{"lease_id": "{lease.lease_id}"}}'
    return Request(f"/api/queue/{lease.run_id}/heartbeat", lease.runner.token, body)


def noop(lease: Lease) -> Request:
    """Return the no-op with that heartbeat's body."""
    return Request("/bench/noop/heartbeat", lease.runner.token, beat(lease).body)


async def measure(stage: BenchEnv, wanted: Options) -> Figure:
    """Seed, measure, and return the figure."""
    server = stage.serve()
    count = wanted.runners or (500 if wanted.quick else LEASES)
    async with open_connection(stage.dsn) as connection:
        models = await seeding.add_models(connection, "q8_0", 1)
        await seeding.add_runs(connection, models, count)
        runners = await seeding.sign_on(connection, count)
        leases = await seeding.lease(connection, runners, LIFE)
    print(f"server pid {server.pid}, {count:,} live leases", flush=True)
    with ExitStack() as files:
        arms = {}
        for name, request in (("noop", noop), ("heartbeat", beat)):
            if wanted.wants(name):
                file = files.enter_context(plan(map(request, leases)))
                arms[name] = lambda file=file: send(
                    stage.port, file, connections=CONNECTIONS, seconds=wanted.seconds
                )
        taken = await in_turn(arms, wanted.rounds, warm_up=not wanted.quick)
    return _figure(taken, count)


def _figure(taken: dict[str, list[Load]], leases: int) -> Figure:
    rates = {name: [load.rate for load in loads] for name, loads in taken.items()}
    report.print_arms(f"requests/s, {CONNECTIONS} connections", rates, "noop")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    beats = medians.get("heartbeat", 0.0)
    return Figure(
        "B2",
        f"heartbeats over HTTP, {CONNECTIONS} connections, {leases:,} live leases",
        beats,
        "beats/s",
        {"noop": Limit(beats / medians["noop"], 0.85)} if "noop" in medians else {},
        {name: report.load_spread(loads) for name, loads in taken.items()},
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
