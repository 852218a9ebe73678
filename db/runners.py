"""The runners table and the nonces of their registrations."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from db.pool import Executor, fetch_one, fetch_planned
from db.queries import load

SQL = load("runners")
NONCES_KEPT = 300  # of a key: a registration every two seconds, for as long as one is remembered
# A cursor before every runner.
FIRST_PAGE = ""


@dataclass(frozen=True, slots=True)
class SignedOn:
    """The data of a runner's registration."""

    runner_id: str
    public_key: str
    hostname: str
    process_id: int | None
    effective_user: str | None
    instance_id: UUID
    capabilities: dict[str, Any]
    version: str | None
    fingerprint: str
    address: str | None


@dataclass(frozen=True, slots=True)
class Nonce:
    """A registration that was answered: its request, and what its answer was made of."""

    fingerprint: str
    nonce: str
    request_sha256: str
    jti: UUID
    issued_at: datetime
    keep_until: datetime
    created: bool
    address: str | None


async def upsert(connection: Executor, runner: SignedOn) -> asyncpg.Record:
    """Write the runner's row; `created` tells whether it is new."""
    return await fetch_one(
        connection,
        SQL["upsert"],
        runner.runner_id,
        runner.public_key,
        runner.hostname,
        runner.process_id,
        runner.effective_user,
        runner.instance_id,
        runner.capabilities,
        runner.version,
        runner.fingerprint,
        runner.address,
    )


async def find(pool: Executor, runner_id: str) -> asyncpg.Record | None:
    """Return a runner's row."""
    return await pool.fetchrow(SQL["find"], runner_id)


async def standings(pool: Executor, fingerprints: Sequence[str]) -> list[asyncpg.Record]:
    """Return the runners that registered with these keys, beside the allowlist's word on each."""
    return await pool.fetch(SQL["standings"], list(fingerprints))


async def sign_off(pool: Executor, runner_id: str, instance_id: UUID) -> None:
    """Mark a runner DEAD, without a process, when its newest one said goodbye."""
    await pool.execute(SQL["sign_off"], runner_id, instance_id)


async def remember_nonce(connection: Executor, nonce: Nonce) -> bool:
    """Record a nonce; False when this key has used it before."""
    stored = await connection.fetchval(
        SQL["remember_nonce"],
        nonce.fingerprint,
        nonce.nonce,
        nonce.request_sha256,
        nonce.jti,
        nonce.issued_at,
        nonce.keep_until,
        nonce.created,
        nonce.address,
        NONCES_KEPT,
    )
    return stored is not None


async def find_nonce(connection: Executor, fingerprint: str, nonce: str) -> Nonce | None:
    """Return the registration that used this nonce."""
    row = await connection.fetchrow(SQL["find_nonce"], fingerprint, nonce)
    return Nonce(**row) if row else None


async def living_tokens(pool: Executor, runner_id: str, life: timedelta) -> list[asyncpg.Record]:
    """Return the tokens that a runner was given and that have not expired, newest first."""
    return await pool.fetch(SQL["living_tokens"], runner_id, life)


async def seen(pool: Executor, heard: Sequence[tuple[str, UUID, float]]) -> list[str]:
    """Note that these processes of runners were heard of, so many seconds ago.

    Returns the runners of which another process than the newest was heard, for the first time in an
    hour.
    """
    rows = await pool.fetch(SQL["seen"], *([each[i] for each in heard] for i in range(3)))
    return [row["runner_id"] for row in rows if row["second_process"]]


async def mark_dead(pool: Executor, silent_for: timedelta) -> list[str]:
    """Mark runners that were silent for so long DEAD, and return them."""
    return [row["runner_id"] for row in await pool.fetch(SQL["mark_dead"], silent_for)]


async def list_page(pool: asyncpg.Pool, *, after: str | None, limit: int) -> list[asyncpg.Record]:
    """Return one page of the runners that have registered here, by name, after the cursor."""
    return await fetch_planned(pool, SQL["overview"], None, after or FIRST_PAGE, limit)


async def show(pool: asyncpg.Pool, runner_id: str) -> asyncpg.Record | None:
    """Return the runner of this name as the list has it, if it has registered here."""
    rows = await fetch_planned(pool, SQL["overview"], runner_id, FIRST_PAGE, 1)
    return rows[0] if rows else None


async def is_draining(pool: Executor, runner_id: str) -> bool:
    """Return whether an admin asked this runner to finish and stop."""
    return bool(await pool.fetchval(SQL["is_draining"], runner_id))


async def pause(connection: Executor, runner_id: str, reason: str, until: datetime | None) -> bool:
    """Give a runner nothing new (until then, or for good); False when it is unknown."""
    return await connection.fetchval(SQL["pause"], runner_id, reason, until) is not None


async def resume(connection: Executor, runner_id: str) -> bool:
    """Undo a pause or a drain; False when the runner is unknown."""
    return await connection.fetchval(SQL["resume"], runner_id) is not None


async def drain(connection: Executor, runner_id: str) -> bool:
    """Let a runner finish what it holds and give it nothing new; False when it is unknown."""
    return await connection.fetchval(SQL["drain"], runner_id) is not None


async def pause_failing(pool: Executor, runner_id: str, pause_s: int) -> str | None:
    """Pause a runner whose last leases failed, were handed back, or were refused; return why."""
    return await pool.fetchval(SQL["pause_failing"], runner_id, pause_s)


async def by_state(pool: Executor, stale_after: timedelta) -> list[asyncpg.Record]:
    """Return (state, runners); a runner is stale when it was silent for `stale_after`."""
    return await pool.fetch(SQL["by_state"], stale_after)
