"""The allowlist (runner_keys) and revoked tokens: a function per statement of its SQL file."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from db.pool import Executor
from db.queries import load

SQL = load("runner_keys")


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key to admit to the allowlist."""

    fingerprint: str
    public_key: bytes
    runner_id: str
    description: str | None
    added_by: str
    not_after: datetime | None
    max_leases: int | None
    capability_caps: dict[str, Any] | None
    signer_identity: str | None
    signer_issuer: str | None
    signature_policy: str


async def find(pool: Executor, fingerprint: str) -> asyncpg.Record | None:
    """Return the allowlist's row of a key, revoked or not."""
    return await pool.fetchrow(SQL["find"], fingerprint)


async def find_for_share(connection: Executor, fingerprint: str) -> asyncpg.Record | None:
    """Return the allowlist's row of a key, locked against a revocation beside us."""
    return await connection.fetchrow(SQL["find_for_share"], fingerprint)


async def list_all(pool: Executor) -> list[asyncpg.Record]:
    """Return the allowlist, oldest first, revoked keys included."""
    return await pool.fetch(SQL["list_all"])


async def add(connection: Executor, key: NewKey) -> asyncpg.Record | None:
    """Admit a key; None when it, or a good key of its runner, is already there."""
    return await connection.fetchrow(
        SQL["add"],
        key.fingerprint,
        key.public_key,
        key.runner_id,
        key.description,
        key.added_by,
        key.not_after,
        key.max_leases,
        key.capability_caps,
        key.signer_identity,
        key.signer_issuer,
        key.signature_policy,
    )


async def revoke(connection: Executor, fingerprint: str, reason: str) -> asyncpg.Record | None:
    """Revoke a key; None when it is unknown or revoked already.

    Waits for the statements that hold a key's row now, and for none that comes later.
    """
    await connection.execute(SQL["keep_others_out"])
    return await connection.fetchrow(SQL["revoke"], fingerprint, reason)


async def revoked_among(
    pool: Executor, fingerprints: Sequence[str], jtis: Sequence[UUID]
) -> list[asyncpg.Record]:
    """Return which keys are not good (any more) and which tokens are revoked."""
    return await pool.fetch(SQL["revoked_among"], list(fingerprints), list(jtis))


async def all_revocations(pool: Executor, token_life: timedelta) -> list[asyncpg.Record]:
    """Return every revocation that a living token could meet, with its remaining life."""
    return await pool.fetch(SQL["all_revocations"], token_life)


async def revoke_token(pool: Executor, jti: UUID, dead_at: datetime, fingerprint: str) -> bool:
    """Revoke one token of a key until it expires by itself; False when it was revoked before."""
    return await pool.execute(SQL["revoke_token"], jti, dead_at, fingerprint) == "INSERT 0 1"
