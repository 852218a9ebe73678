"""The fingerprints of the rings' keys, which all processes share."""

from collections.abc import Sequence
from datetime import timedelta

import asyncpg

from config.key_rings import HeldKey
from db.pool import Executor
from db.queries import load

SQL = load("key_rings")


async def hold(connection: Executor, keys: Sequence[HeldKey]) -> set[tuple[str, str]]:
    """Note that these keys are held; return (ring, kid) of those that are what they were before."""
    columns = zip(*((k.ring, k.kid, k.fingerprint, k.signs) for k in keys), strict=True)
    return {tuple(row) for row in await connection.fetch(SQL["hold"], *map(list, columns))}


async def signing(connection: Executor, within: timedelta) -> list[tuple[str, str]]:
    """Return (ring, kid) of the keys that a process signed with so lately."""
    return [tuple(row) for row in await connection.fetch(SQL["signing"], within)]


async def list_all(pool: Executor) -> list[asyncpg.Record]:
    """Return every known key's fingerprint and times."""
    return await pool.fetch(SQL["list"])


async def lock(
    connection: Executor, ring: str, kid: str, within: timedelta
) -> asyncpg.Record | None:
    """Return a key's row, locked, and whether it was held so lately."""
    return await connection.fetchrow(SQL["lock"], ring, kid, within)


async def forget(connection: Executor, ring: str, kid: str) -> None:
    """Forget a key: its kid may be another one's."""
    await connection.execute(SQL["forget"], ring, kid)
