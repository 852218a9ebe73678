"""Admin tokens, remembered answers and the audit trail."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from db.pool import Executor, fetch_one
from db.queries import load

SQL = load("admin")


async def add_token(
    pool: Executor,
    token_sha256: bytes,
    name: str,
    scopes: Sequence[str],
    expires_at: datetime | None,
) -> asyncpg.Record:
    """Store a token's digest and return its row."""
    return await fetch_one(pool, SQL["add_token"], token_sha256, name, list(scopes), expires_at)


async def find_token(pool: Executor, token_sha256: bytes) -> asyncpg.Record | None:
    """Return the living token of this digest."""
    return await pool.fetchrow(SQL["find_token"], token_sha256)


async def list_tokens(pool: Executor) -> list[asyncpg.Record]:
    """Return every token's row, without its digest."""
    return await pool.fetch(SQL["list_tokens"])


async def revoke_token(pool: Executor, token_id: UUID) -> str | None:
    """Revoke a token and return its name; None when it is unknown or revoked already."""
    return await pool.fetchval(SQL["revoke_token"], token_id)


async def lock_answer(connection: Executor, actor: str, key: str) -> None:
    """Wait until no other transaction works on this actor's Idempotency-Key."""
    await connection.execute(SQL["lock_answer"], actor, key)


async def find_answer(connection: Executor, actor: str, key: str) -> asyncpg.Record | None:
    """Return what this actor was answered under this Idempotency-Key."""
    return await connection.fetchrow(SQL["find_answer"], actor, key)


async def remember_answer(
    connection: Executor, actor: str, key: str, request_sha256: str, answer: Any
) -> None:
    """Keep an answer for the same request sent again."""
    await connection.execute(SQL["remember_answer"], actor, key, request_sha256, answer)


async def audit(
    connection: Executor,
    actor: str,
    action: str,
    *,
    run_id: UUID | None = None,
    runner_id: str | None = None,
    **detail: Any,
) -> None:
    """Write one row of the audit trail."""
    await connection.execute(SQL["audit"], actor, action, run_id, runner_id, detail)
