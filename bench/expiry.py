"""B7: 1,000 leases fall silent together: how long after its deadline each one is ended.

By the database's clock, from the ledger; with Redis, whose expiry events ring the sweep, and
without, where the sweep comes by itself. More leases live on beside them: the sweep's breaker holds
when most of what is live is overdue at once. Each has its own database and server; rounds in turn.

    make bench ONLY=expiry
"""

import asyncio
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import httpx

from bench.support import report, seeding
from bench.support.env import BenchEnv, open_env
from bench.support.report import Figure, Limit, Options, in_turn
from bench.support.seeding import Lease, open_connection

TTL_S, QUICK_TTL_S = 6, 3
SWEEP_S = 5  # the default, with Redis
DEGRADED_S = 1  # the default, without: the sweep interval of B7's second limit
RUNNERS, LEASES_EACH = 20, 50
KEEPERS, KEPT_EACH = 24, 50
KNOBS = {
    "sweep_interval_s": SWEEP_S,
    "sweep_degraded_s": DEGRADED_S,
}
AWAY = "redis://127.0.0.1:1/1"
LAGS = """
SELECT extract(epoch FROM ended_at - (last_heartbeat + make_interval(secs => $1)))::float8 AS lag
FROM attempts WHERE how = 'lapsed'
"""


@dataclass(frozen=True, slots=True)
class Arm:
    """A stage, and how many of its leases fall silent."""

    stage: BenchEnv
    each: int
    ttl_s: int

    async def lags(self) -> list[float]:
        """Let leases fall silent together; return their lags in seconds, in order."""
        async with open_connection(self.stage.dsn) as connection:
            await seeding.clear(connection)
            models = await seeding.add_models(connection, "q8_0", 1)
            runs = RUNNERS * self.each + KEEPERS * KEPT_EACH
            await seeding.add_runs(connection, models, runs)
            keepers = await seeding.sign_on(connection, KEEPERS, max_leases=64)
            await seeding.lease(connection, keepers, timedelta(hours=1), each=KEPT_EACH)
            silent = await seeding.sign_on(connection, RUNNERS, max_leases=64)
            leases = await seeding.lease(
                connection, silent, timedelta(seconds=self.ttl_s), each=self.each
            )
            await _beat_once(self.stage.port, leases)
            async with asyncio.timeout(10 * self.ttl_s):
                while True:
                    rows = await connection.fetch(LAGS, float(self.ttl_s))
                    if len(rows) >= len(leases):
                        return sorted(row["lag"] for row in rows)
                    await asyncio.sleep(0.5)


def ttl_of(wanted: Options) -> int:
    """Return the life of a lease: as short as the settings allow, when it is only to be seen."""
    return QUICK_TTL_S if wanted.quick else TTL_S


async def _beat_once(port: int, leases: Sequence[Lease]) -> None:
    """Renew all leases at the same moment, in one request for each runner's."""
    by_token = defaultdict(list)
    for lease in leases:
        entry = {"run_id": str(lease.run_id), "lease_id": str(lease.lease_id)}
        by_token[lease.runner.token].append(entry)
    url = f"http://127.0.0.1:{port}/api/queue/heartbeats"
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        answers = await asyncio.gather(*(
            http.post(
                url,
                content=json.dumps({"heartbeats": entries}),
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            for token, entries in by_token.items()
        ))  # fmt: skip
    renewed = sum(
        "directive" in each
        for answer in answers
        for each in answer.raise_for_status().json()["heartbeats"]
    )
    assert renewed == len(leases), f"{renewed} of {len(leases)} renewed"


async def measure(stages: dict[str, BenchEnv], wanted: Options) -> Figure:
    """Measure both stages in turn, and return the figure."""
    each = 5 if wanted.quick else LEASES_EACH
    ttl_s = ttl_of(wanted)
    arms = {
        name: Arm(stage, each, ttl_s).lags for name, stage in stages.items() if wanted.wants(name)
    }
    taken = await in_turn(arms, wanted.rounds, warm_up=False)
    p99 = {name: [report.percentile(lags, 99) for lags in rounds] for name, rounds in taken.items()}
    report.print_arms("p99 lag, s", p99, None)
    targets = {"redis": 1.0, "without": DEGRADED_S + 1.0}
    return Figure(
        "B7",
        f"{RUNNERS * each:,} leases due together: p99 from the deadline to the end",
        statistics.median(p99.get("redis", [0.0])),
        "s",
        {
            name: Limit(statistics.median(values), targets[name], most=True)
            for name, values in p99.items()
        },
        {
            name: {
                "p50_s": report.spread([statistics.median(lags) for lags in rounds]),
                "p99_s": report.spread(p99[name]),
                "max_s": report.spread([lags[-1] for lags in rounds]),
            }
            for name, rounds in taken.items()
        },
    )


def main() -> int:
    """Measure on two private stages."""
    wanted = report.options()
    report.introduce()
    with ExitStack() as held:
        stages = {name: held.enter_context(open_env()) for name in ("redis", "without")}
        ttl_s = ttl_of(wanted)
        knobs = {**KNOBS, "lease_ttl_s": ttl_s, "heartbeat_interval_s": ttl_s // 3}
        stages["redis"].serve(**knobs)
        stages["without"].serve(**knobs, redis_lease_url=AWAY)
        figure = asyncio.run(measure(stages, wanted))
    return report.publish(figure, wanted)


if __name__ == "__main__":
    sys.exit(main())
