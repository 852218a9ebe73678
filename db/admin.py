"""Admin tokens and remembered answers."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from db.pool import Executor, fetch_one
from db.queries import load

SQL = load("admin")


async def add_token(
    connection: Executor,
    token_sha256: bytes,
    name: str,
    scopes: Sequence[str],
    expires_at: datetime | None,
    minted_by: str,
) -> asyncpg.Record | None:
    """Store a token's digest and return its row; None when a living token has the name."""
    return await connection.fetchrow(
        SQL["add_token"], token_sha256, name, list(scopes), expires_at, minted_by
    )


async def find_token(pool: Executor, token_sha256: bytes) -> asyncpg.Record | None:
    """Return the living token of this digest."""
    return await pool.fetchrow(SQL["find_token"], token_sha256)


async def list_tokens(pool: Executor) -> list[asyncpg.Record]:
    """Return every token's row, without its digest."""
    return await pool.fetch(SQL["list_tokens"])


async def lock_keepers(connection: Executor) -> set[UUID]:
    """Return the living tokens that may revoke others, locked until the transaction ends."""
    return {row["token_id"] for row in await connection.fetch(SQL["lock_keepers"])}


async def lock_token(connection: Executor, token_id: UUID) -> asyncpg.Record | None:
    """Return a token's row, locked until the transaction ends."""
    return await connection.fetchrow(SQL["lock_token"], token_id)


async def revoke_token(
    connection: Executor, token_id: UUID, by: str, reason: str
) -> asyncpg.Record:
    """Revoke a living token, and return its row."""
    return await fetch_one(connection, SQL["revoke_token"], token_id, by, reason)


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
