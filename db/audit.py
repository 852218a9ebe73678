"""The audit trail: who did what to whom, from where and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from db.pool import Executor, fetch_one, fetch_planned
from db.queries import load

SQL = load("audit")


@dataclass(frozen=True, slots=True)
class Actor:
    """Actor of an audit row: `admin:<name>`, `runner:<id>`, `database:<role>` or `system`.

    `token_id` is the admin token they came with.
    """

    name: str
    address: str | None = None
    token_id: UUID | None = None


SYSTEM = Actor("system")


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the hash chain."""

    seq: int
    audit_id: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Filters:
    """Filter of audit rows; None is any."""

    actor: str | None = None
    action: str | None = None
    run_id: UUID | None = None
    runner_id: str | None = None


async def record(
    connection: Executor,
    by: Actor,
    action: str,
    target: str | None,
    *,
    run_id: UUID | None = None,
    runner_id: str | None = None,
    **detail: Any,
) -> bool:
    """Write one row; return whether the actor's token was still good.

    `target` is what the action was about: `key:`, `run:`, `runner:` or `token:` and its id.
    """
    done = await connection.execute(
        SQL["record"],
        by.name,
        action,
        target,
        by.address,
        run_id,
        runner_id,
        by.token_id,
        detail,
    )
    return done == "INSERT 0 1"


async def database_actor(pool: Executor) -> Actor:
    """Return who works in the database itself, without the API: by their role there."""
    return Actor(f"database:{await pool.fetchval('SELECT session_user')}")


async def look(pool: Executor) -> asyncpg.Record:
    """Return seq and hash of the chain's head, if there is one, and whether there is `more`."""
    return await fetch_one(pool, SQL["look"])


async def lock_chain(connection: Executor) -> bool:
    """Become the one writer of the chain until the transaction ends; False when there is one."""
    return bool(await connection.fetchval(SQL["lock_chain"]))


async def take_unchained(connection: Executor, limit: int) -> list[asyncpg.Record]:
    """Return rows that are to be chained now; `taken` is the number also of one that is gone."""
    return await connection.fetch(SQL["take_unchained"], limit)


async def chain(connection: Executor, entries: Sequence[Entry]) -> None:
    """Add entries to the chain."""
    columns = zip(*((each.seq, each.audit_id, each.hash) for each in entries), strict=True)
    await connection.execute(SQL["chain"], *map(list, columns))


async def newest(pool: Executor, action: str) -> datetime | None:
    """Return when an action was last done."""
    return await pool.fetchval(SQL["newest"], action)


async def list_page(
    pool: asyncpg.Pool, wanted: Filters, *, before: int | None, limit: int
) -> list[asyncpg.Record]:
    """Return one page of the trail, newest first, before the cursor."""
    of = (wanted.actor, wanted.action, wanted.run_id, wanted.runner_id)
    return await fetch_planned(pool, SQL["list_page"], before, *of, limit)


async def chain_page(pool: Executor, after: int, limit: int) -> list[asyncpg.Record]:
    """Return entries with their rows; `chained` is a row's number even if that is gone."""
    return await pool.fetch(SQL["chain_page"], after, limit)


async def unchained_page(
    pool: Executor, after: int, last: int | None, limit: int
) -> list[asyncpg.Record]:
    """Return rows that are in no entry, of those after `after` and up to `last`."""
    return await pool.fetch(SQL["unchained_page"], after, last, limit)


async def chained_at(pool: Executor, seq: int) -> int | None:
    """Return the number of the row that an entry chains."""
    return await pool.fetchval(SQL["chained_at"], seq)
