"""B7 in small: from a runner's silence to a claimable run, with Redis and without.

200 leases fall silent together while 256 others are kept, so that the sweep's breaker has no reason
to hold. The lag is how long after its deadline each lease was ended, by the database's clock.

    make bench-expiry
"""

import asyncio
import os
import statistics
import subprocess
import sys
import uuid
from typing import Any

import asyncpg
import httpx
from rich.console import Console
from rich.table import Table

from bench.claims import PUBLIC_URL, seed, sign_on
from config.settings import PREFIX
from db import migrate
from db.pool import open_pool
from sandbox import servers

TTL_S = 15
INTERVAL_S = 3
KEEPERS, KEPT = 4, 64
SILENT, HELD = 4, 50
LAGS = """
SELECT extract(epoch FROM ended_at - (claimed_at + make_interval(secs => $1)))::float8 AS lag
FROM attempts WHERE how = 'lapsed'
"""


async def take(http: httpx.AsyncClient, headers: dict[str, str], count: int) -> list[Any]:
    """Claim `count` runs for one runner."""
    jobs = []
    for _ in range(count):
        own = {**headers, "Idempotency-Key": str(uuid.uuid4())}
        answer = await http.post("/api/queue/claim", content=b"{}", headers=own)
        jobs.append(answer.raise_for_status().json())
    return jobs


async def keep(http: httpx.AsyncClient, headers: dict[str, str], jobs: list[Any]) -> None:
    """Beat for every job until cancelled."""
    beats = [{"run_id": job["run_id"], "lease_id": job["lease_id"]} for job in jobs]
    while True:
        await http.post("/api/queue/heartbeats", json={"heartbeats": beats}, headers=headers)
        await asyncio.sleep(INTERVAL_S)


async def measure(dsn: str, port: int) -> list[float]:
    """Let the silent leases lapse and return their lags, in seconds."""
    async with (
        open_pool(dsn, 2) as pool,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as http,
    ):
        await seed(pool, "q8_0", 1, KEEPERS * KEPT + SILENT * HELD, 100)
        runners = [await sign_on(pool, http, number) for number in range(KEEPERS + SILENT)]
        kept = await asyncio.gather(*(take(http, own, KEPT) for own in runners[:KEEPERS]))
        keepers = [
            asyncio.create_task(keep(http, own, jobs))
            for own, jobs in zip(runners, kept, strict=False)
        ]
        await asyncio.gather(*(take(http, own, HELD) for own in runners[KEEPERS:]))
        lags = await until_lapsed(pool)
        for keeper in keepers:
            keeper.cancel()
        await asyncio.wait(keepers)
        return lags


async def until_lapsed(pool: asyncpg.Pool) -> list[float]:
    """Wait until every silent lease has been ended, and return the lags."""
    async with asyncio.timeout(4 * TTL_S):
        while True:
            rows = await pool.fetch(LAGS, float(TTL_S))
            if len(rows) >= SILENT * HELD:
                return sorted(row["lag"] for row in rows)
            await asyncio.sleep(0.2)


def run_once(with_redis: bool) -> list[float]:
    """Measure on private servers, with Redis or with one that is away."""
    with servers.postgres() as postgres, servers.redis() as redis:
        migrate.migrate(postgres.dsn)
        settings = {
            "DATABASE_URL": postgres.dsn,
            "REDIS_LEASE_URL": redis.url(1) if with_redis else "redis://127.0.0.1:1/1",
            "REDIS_TOKEN_URL": redis.url(2),
            "TOKEN_KEYS": f"bench:{'k' * 32}",
            "RECEIPT_KEYS": f"bench:{'ab' * 32}",
            "PUBLIC_URL": PUBLIC_URL,
            "LEASE_TTL_S": TTL_S,
            "HEARTBEAT_INTERVAL_S": INTERVAL_S,
        }
        own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        with subprocess.Popen(
            [sys.executable, "-m", "bench.server"],
            env={**own, **{PREFIX + name: str(value) for name, value in settings.items()}},
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdout is not None
            try:
                return asyncio.run(measure(postgres.dsn, int(server.stdout.readline())))
            finally:
                server.terminate()


def main() -> None:
    """Measure both and print the table."""
    print(f"command: {sys.executable} -m bench.expiry_lag, TTL {TTL_S} s")
    table = Table("leases that fell silent together", "count", "p50 s", "p99 s", "max s")
    for name, with_redis in (("with Redis", True), ("without Redis", False)):
        lags = run_once(with_redis)
        p99 = lags[int(len(lags) * 0.99) - 1]
        table.add_row(
            name, str(len(lags)), f"{statistics.median(lags):.2f}", f"{p99:.2f}", f"{lags[-1]:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
