"""What a benchmark's database holds: models, runs, runners and leases, made set-wise.

On a connection of its own (`open_connection`), without the service's time limits.
"""

import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from auth.tokens import Tokens
from db.pool import SESSION
from db.run_queue import Capabilities

PLANNING = {name: SESSION[name] for name in ("plan_cache_mode", "jit")}
TOKEN_TTL_S = 7200
RING = {"bench": b"k" * 32}
CAPABILITIES: dict[str, Any] = {"vram_gb": 24, "quantizations": ["q4_k_m", "q8_0"]}
OFFER = Capabilities(24, ("q4_k_m", "q8_0"))
# As large as a small run's: 0.6 kB.
TASK = {"domain": "math", "user_prompt": "What is 2 + 2? " * 6, "expected": "4", "scorer": "exact"}
JOB = {
    "tasks": [{"id": f"sum-{number}", **TASK} for number in range(2)],
    "floor_tasks": [],
    "prompts": [{"id": "plain", "system": ""}],
    "config": {"run": {"seed": 7}, "models": [{"id": "bench"}]},
    "config_hash": "a" * 64,
}
ADD_MODELS = """
INSERT INTO models (model_id, name, parameter_count_b, active_parameter_count_b, quantization_id)
SELECT gen_random_uuid(), 'bench-' || $1 || '-' || n, $2, $2, x.quantization_id
FROM quantization_methods AS x, generate_series(1, $3) AS n WHERE x.name = $1
RETURNING model_id
"""
ADD_RUNS = """
WITH made AS (
    INSERT INTO runs (run_id, submitted_at, publisher_id)
    SELECT gen_random_uuid(), now(), 'bench' FROM generate_series(1, $2) RETURNING run_id
),
numbered AS (SELECT run_id, row_number() OVER () AS n FROM made)
INSERT INTO run_queue (queue_id, run_id, model_id, judge_model_id, job, config_hash, priority,
    retry_after, created_at)
SELECT gen_random_uuid(), run_id, m.model_id, m.model_id, $3, repeat('a', 64), $4,
    now() + $5::interval, now() - interval '1 hour' + n * interval '1 microsecond'
FROM numbered, LATERAL (SELECT ($1::uuid[])[1 + n % cardinality($1)] AS model_id) AS m
"""
ADD_KEYS = """
INSERT INTO runner_keys (fingerprint, public_key, runner_id, added_by, max_leases)
SELECT f, k, r, 'bench', $4 FROM unnest($1::text[], $2::bytea[], $3::text[]) AS t (f, k, r)
"""
ADD_RUNNERS = """
INSERT INTO runners (runner_id, public_key, hostname, capabilities, key_fingerprint, registered_at,
    started_at, last_heartbeat, status)
SELECT r, '', 'bench', c, f, now(), now(), now(), 'IDLE'
FROM unnest($1::text[], $2::text[], $3::jsonb[]) AS t (r, f, c)
"""
LEASE = """
WITH numbered AS (
    SELECT queue_id, 1 + n % c AS place, 1 + n / c AS slot FROM (
        SELECT queue_id, row_number() OVER () - 1 AS n, cardinality($2::text[]) AS c FROM (
            SELECT queue_id FROM run_queue WHERE status = 'PENDING' AND job IS NOT NULL LIMIT $1
        ) AS q
    ) AS counted
),
taken AS (
    UPDATE run_queue AS q SET
        status = 'CLAIMED', lease_seq = q.lease_seq + 1, lease_id = gen_random_uuid(),
        lease_slot = slot, claim_key = 'bench-' || slot, claimed_by = ($2::text[])[place],
        lease_key = ($3::text[])[place], claimed_at = now(),
        lease_expires_at = now() + $4::interval
    FROM numbered WHERE q.queue_id = numbered.queue_id
    RETURNING q.run_id, q.lease_seq, q.lease_id, q.claimed_by, q.lease_key, q.claimed_at
),
ledger AS (
    INSERT INTO attempts (run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at)
    SELECT run_id, lease_seq, lease_id, claimed_by, lease_key, claimed_at FROM taken
)
SELECT run_id, lease_id, claimed_by FROM taken
"""
PUT_BACK = """
UPDATE run_queue SET
    status = 'PENDING', lease_seq = 0, lease_id = NULL, lease_key = NULL, lease_slot = NULL,
    lease_expires_at = NULL, claim_key = NULL, claim_digest = NULL, claimed_by = NULL,
    claimed_at = NULL, started_at = NULL, last_heartbeat = NULL, progress = NULL
WHERE status IN ('CLAIMED', 'IN_PROGRESS')
"""


@dataclass(frozen=True, slots=True)
class BenchRunner:
    """A runner that has signed on."""

    runner_id: str
    fingerprint: str
    token: str


@dataclass(frozen=True, slots=True)
class Lease:
    """A live lease and its runner."""

    run_id: UUID
    lease_id: UUID
    runner: BenchRunner


@asynccontextmanager
async def open_connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Yield a connection that plans as the service's do, without its time limits."""
    connection = await asyncpg.connect(dsn, server_settings=PLANNING)
    try:
        await connection.set_type_codec(
            "jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads
        )
        yield connection
    finally:
        await connection.close()


async def add_models(
    connection: asyncpg.Connection, quantization: str, size_b: float, count: int = 1
) -> list[UUID]:
    """Add models of `size_b` billion parameters."""
    rows = await connection.fetch(ADD_MODELS, quantization, size_b, count)
    return [row["model_id"] for row in rows]


async def add_runs(
    connection: asyncpg.Connection,
    models: Sequence[UUID],
    runs: int,
    *,
    priority: int = 100,
    deferred: timedelta | None = None,
) -> None:
    """Add PENDING runs, of each model in turn; `deferred` ones are not claimable for so long."""
    async with connection.transaction():
        # The foreign keys of rows made from each other need no look: that would take as long again.
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute(ADD_RUNS, models, runs, JOB, priority, deferred)
    await connection.execute("VACUUM (ANALYZE) runs, run_queue")


async def sign_on(
    connection: asyncpg.Connection,
    count: int,
    *,
    kinds: Sequence[dict[str, Any]] = (CAPABILITIES,),
    max_leases: int | None = None,
) -> list[BenchRunner]:
    """Add runners that have signed on, of each kind in turn, with tokens of the server's ring."""
    tokens, now = Tokens(RING, timedelta(seconds=TOKEN_TTL_S)), datetime.now(UTC)
    keys = [secrets.token_bytes(32) for _ in range(count)]
    runners = []
    for key in keys:
        runner_id, fingerprint = f"bench-{key.hex()[:12]}", hashlib.sha256(key).hexdigest()
        token = tokens.mint(runner_id, fingerprint, uuid4(), uuid4(), now)
        runners.append(BenchRunner(runner_id, fingerprint, token))
    names, prints = [r.runner_id for r in runners], [r.fingerprint for r in runners]
    await connection.execute(ADD_KEYS, prints, keys, names, max_leases)
    offers = [kinds[number % len(kinds)] for number in range(count)]
    await connection.execute(ADD_RUNNERS, names, prints, offers)
    await connection.execute("VACUUM (ANALYZE) runner_keys, runners")
    return runners


async def lease(
    connection: asyncpg.Connection,
    runners: Sequence[BenchRunner],
    life: timedelta,
    *,
    each: int = 1,
) -> list[Lease]:
    """Give each runner so many PENDING runs, due after `life`."""
    by_name = {runner.runner_id: runner for runner in runners}
    wanted, prints = len(runners) * each, [r.fingerprint for r in runners]
    rows = await connection.fetch(LEASE, wanted, list(by_name), prints, life)
    assert len(rows) == wanted, f"{len(rows)} PENDING runs for {wanted} leases"
    await connection.execute("VACUUM (ANALYZE) run_queue, attempts")
    return [Lease(r["run_id"], r["lease_id"], by_name[r["claimed_by"]]) for r in rows]


async def clear(connection: asyncpg.Connection) -> None:
    """Remove every run, with its lease and its ledger."""
    await connection.execute("TRUNCATE runs, run_queue, attempts CASCADE")


async def put_back(connection: asyncpg.Connection) -> int:
    """Make every leased run PENDING as if never claimed; return how many there were.

    Vacuumed and analyzed, so that the next round meets what the last one met.
    """
    done = await connection.execute(PUT_BACK)
    await connection.execute("TRUNCATE attempts")
    await connection.execute("VACUUM (ANALYZE) run_queue")
    return int(done.split()[1])
