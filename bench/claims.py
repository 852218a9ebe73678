"""B1 and B4 of the design's performance page, as ratios of two things measured in the same run.

B1: claims/s over HTTP, one process, 64 connections, against an authenticated no-op of that process.
B4: the claim statement's time with 100,000 PENDING runs against 1,000, and with 100,000 runs ahead
in the queue that do not fit. Rounds are taken in turn; the table shows medians and the spread.

    make bench-claims
"""

import asyncio
import os
import statistics
import subprocess
import sys
import time
import uuid
from datetime import timedelta

import asyncpg
import httpx
from nacl.signing import SigningKey
from rich.console import Console
from rich.table import Table

from auth.keys import RunnerKey
from config.settings import PREFIX
from db import migrate, run_queue
from db.pool import open_pool
from db.run_queue import Capabilities, Claimant
from sandbox import servers
from sandbox.runner_identity import Identity, public_key_text

CONNECTIONS = 64
PER_CONNECTION = 20  # claims of a connection per round
ROUNDS = 3
PUBLIC_URL = "http://bench.test"
SEED = """
INSERT INTO models (model_id, name, parameter_count_b, active_parameter_count_b, quantization_id)
SELECT gen_random_uuid(), 'bench-' || x.name, $2, $2, x.quantization_id
FROM quantization_methods AS x WHERE x.name = $1 RETURNING model_id
"""
FILL = """
WITH made AS (
    INSERT INTO runs (run_id, submitted_at, publisher_id)
    SELECT gen_random_uuid(), now(), 'bench' FROM generate_series(1, $2) RETURNING run_id
)
INSERT INTO run_queue (queue_id, run_id, model_id, job, config_hash, priority)
SELECT gen_random_uuid(), run_id, $1, '{"tasks": [], "floor_tasks": [], "prompts": [],
    "config": {"models": [{"id": "bench"}]}, "config_hash": ""}', '', $3
FROM made
"""


async def seed(pool: asyncpg.Pool, quantization: str, size_b: float, runs: int, prio: int) -> None:
    """Add a model of `size_b` billion parameters with so many PENDING runs."""
    model = await pool.fetchval(SEED, quantization, size_b)
    await pool.execute(FILL, model, runs, prio, timeout=120)
    await pool.execute("ANALYZE run_queue", timeout=60)


async def sign_on(pool: asyncpg.Pool, http: httpx.AsyncClient, number: int) -> dict[str, str]:
    """Admit and register a runner; return the headers of its requests."""
    key = SigningKey.generate()
    good = RunnerKey.parse(public_key_text(key))
    await pool.execute(
        "INSERT INTO runner_keys (fingerprint, public_key, runner_id, added_by, max_leases)"
        " VALUES ($1, $2, $3, 'bench', 64)",
        good.fingerprint, good.raw, f"bench-{number}",
    )  # fmt: skip
    identity = Identity(key, PUBLIC_URL, "bench", {"vram_gb": 24, "quantizations": ["q8_0"]})
    answer = await http.post(
        "/api/runners/register",
        content=identity.sign_registration(),
        headers={"Content-Type": "application/json"},
    )
    return {
        "Authorization": f"Bearer {answer.raise_for_status().json()['access_token']}",
        "Content-Type": "application/json",
    }


async def requests_per_s(port: int, path: str, headers: list[dict[str, str]]) -> float:
    """Send `PER_CONNECTION` requests on each connection and return the rate of 200s."""

    async def one(own: dict[str, str]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(PER_CONNECTION):
            lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Length: 2"]
            lines += [f"{name}: {value}" for name, value in own.items()]
            lines += [f"Idempotency-Key: {uuid.uuid4()}", "", "{}"]
            writer.write("\r\n".join(lines).encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(one(own) for own in headers))
    return len(headers) * PER_CONNECTION / (time.perf_counter() - started)


async def bench_depth(pool: asyncpg.Pool) -> dict[str, float]:
    """Measure the claim statement on a short queue, a long one, and one full of what does not fit.

    The runs of B1 are gone by now: every state starts from an empty queue.
    """
    times = {}
    await pool.execute("DELETE FROM runs", timeout=120)
    await seed(pool, "q8_0", 1, 1_000, 100)
    times["1,000 PENDING"] = await statement_ms(pool)
    await seed(pool, "q8_0", 1, 100_000, 100)
    times["100,000 PENDING"] = await statement_ms(pool)
    await seed(pool, "fp32", 400, 100_000, 1)
    times["100,000 more ahead that do not fit"] = await statement_ms(pool)
    return times


async def bench_http(pool: asyncpg.Pool, port: int) -> dict[str, list[float]]:
    """Measure claims and no-ops in turn."""
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30
    ) as http:
        headers = [await sign_on(pool, http, number) for number in range(CONNECTIONS)]
    rates: dict[str, list[float]] = {"claim": [], "no-op": []}
    for _ in range(ROUNDS):
        rates["no-op"].append(await requests_per_s(port, "/bench/noop", headers))
        rates["claim"].append(await requests_per_s(port, "/api/queue/claim", headers))
    return rates


async def statement_ms(pool: asyncpg.Pool) -> float:
    """Return the median time of one claim statement, each rolled back."""
    runner = await pool.fetchrow("SELECT runner_id, key_fingerprint FROM runners LIMIT 1")
    assert runner is not None
    times = []
    for number in range(30):
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            started = time.perf_counter()
            rows = await run_queue.claim(
                connection,
                [
                    Claimant(
                        runner["runner_id"],
                        runner["key_fingerprint"],
                        f"key-{number}",
                        "x",
                        Capabilities(24, ("q8_0",)),
                    )
                ],
                ttl=timedelta(minutes=5),
                max_leases=64,
                max_runtime_s=3600,
            )
            times.append((time.perf_counter() - started) * 1000)
            assert rows[0]["queue_id"] is not None
            await transaction.rollback()
    return statistics.median(times)


def show(rates: dict[str, list[float]], times: dict[str, float]) -> None:
    """Print the tables of medians and ratios."""
    console = Console()
    table = Table("requests/s, 64 connections", "median", "spread", "ratio to no-op")
    base = statistics.median(rates["no-op"])
    for name, measured in rates.items():
        median = statistics.median(measured)
        spread = f"{min(measured):.0f} to {max(measured):.0f}"
        table.add_row(name, f"{median:.0f}", spread, f"{median / base:.2f}")
    console.print(table)
    table = Table("one claim statement", "median ms", "ratio to 1,000 PENDING")
    first = next(iter(times.values()))
    for name, taken in times.items():
        table.add_row(name, f"{taken:.2f}", f"{taken / first:.2f}")
    console.print(table)


async def measure(dsn: str, port: int) -> None:
    """Seed, measure, show."""
    async with open_pool(dsn, 4) as pool:
        await seed(pool, "q8_0", 1, CONNECTIONS * PER_CONNECTION * ROUNDS, 100)
        rates = await bench_http(pool, port)
        show(rates, await bench_depth(pool))


def main() -> None:
    """Start private servers and one server process, measure, and end them."""
    print(f"command: {' '.join([sys.executable, '-m', 'bench.claims'])}, Python {sys.version}")
    with servers.postgres() as postgres, servers.redis() as redis:
        print(f"PostgreSQL {postgres.version}")
        migrate.migrate(postgres.dsn)
        settings = {
            "DATABASE_URL": postgres.dsn,
            "REDIS_LEASE_URL": redis.url(1),
            "REDIS_TOKEN_URL": redis.url(2),
            "TOKEN_KEYS": f"bench:{'k' * 32}",
            "RECEIPT_KEYS": f"bench:{'ab' * 32}",
            "PUBLIC_URL": PUBLIC_URL,
        }
        own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        with subprocess.Popen(
            [sys.executable, "-m", "bench.server"],
            env={**own, **{PREFIX + name: value for name, value in settings.items()}},
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdout is not None
            try:
                asyncio.run(measure(postgres.dsn, int(server.stdout.readline())))
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
