"""The audit trail: every action of an admin leaves a row, in the transaction that does it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from auth.errors import InvalidToken
from broker.documents.paging import bad_query, check_limit, read_numbers, read_whole, write_numbers
from broker.documents.times import rfc3339
from broker.errors import InvalidRequest
from db import audit, roles
from db.audit import SYSTEM, Actor, Filters
from db.pool import LOST, Executor

__all__ = ["SYSTEM", "Actor", "Admin", "AuditLog", "record", "shown"]

FILTERS = ("actor", "action", "run_id", "runner_id")
# What is shown of a row, and hashed: all of it.
ROW = ("audit_id", "at", "actor", "action", "target", "address", "token_id", "run_id", "runner_id",
       "detail")  # fmt: skip

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Admin:
    """A verified admin: the name of the token, what it may do, and how the audit names them."""

    name: str
    scopes: tuple[str, ...]
    actor: Actor


async def record(
    connection: Executor, by: Actor, action: str, target: str | None = None, **detail: Any
) -> None:
    """Write the row of an action, with `run_id` and `runner_id` where it has them.

    Raises InvalidToken when the admin's token was revoked since the request began, which rolls the
    action back.
    """
    if not await audit.record(connection, by, action, target, **detail):
        raise InvalidToken("This admin token was revoked while it was used.")


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows or entries, and where the next ones begin."""

    rows: list[dict[str, Any]]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class ChainPage:
    """Some entries of the chain, the rows beside them that are in none, and the next cursor."""

    entries: list[dict[str, Any]]
    unchained: list[dict[str, Any]]
    next_cursor: str | None


class AuditLog:
    """Reads the trail and its chain."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def page(self, asked: Mapping[str, str], cursor: str | None, limit: int) -> Page:
        """Return `limit` rows before `cursor`, newest first. Raises InvalidRequest."""
        check_limit(limit)
        (before,) = read_numbers(cursor, 1) if cursor else (None,)
        rows = await audit.list_page(self._pool, _filters(asked), before=before, limit=limit + 1)
        page, more = rows[:limit], len(rows) > limit
        return Page(
            [{**shown(row), **_entry(row)} for row in page],
            write_numbers(page[-1]["audit_id"]) if more else None,
        )

    async def chain(self, after: str | None, cursor: str | None, limit: int) -> ChainPage:
        """Return `limit` entries after `cursor`, in the order of the chain; the first page `after`.

        The cursor is the last entry's number and the newest row of all entries before: between it
        and this page's newest lie the rows that are in no entry. Raises InvalidRequest.
        """
        check_limit(limit)
        seq, newest = read_numbers(cursor, 2) if cursor else await self._start(after)
        rows = await audit.chain_page(self._pool, seq, limit)
        whole = len(rows) == limit
        reached = max([newest, *(row["chained"] for row in rows)])
        beside = await audit.unchained_page(self._pool, newest, reached if whole else None, limit)
        return ChainPage(
            [_chained(row) for row in rows],
            [shown(row) for row in beside],
            write_numbers(rows[-1]["seq"], reached) if whole else None,
        )

    async def check_role(self) -> None:
        """Warn when our role could change the trail: it should be that of the service."""
        try:
            strong = await roles.can_change_the_audit(self._pool)
        except LOST:  # /readyz tells
            return
        if strong:
            log.warning(
                "audit.can_be_changed",
                problem="the database role of this process may change and delete audit rows",
                fix=f"run `bakeoff-queue db roles` and serve as a member of {roles.SERVICE}",
            )

    async def _start(self, after: str | None) -> tuple[int, int]:
        seq = read_whole("/after", after or "0")
        return seq, await audit.chained_at(self._pool, seq) or 0


def shown(row: asyncpg.Record) -> dict[str, Any]:
    """Return a row as the API shows it and the chain hashes it: of what JSON holds alone."""
    return {name: _text(row[name]) for name in ROW}


def _chained(row: asyncpg.Record) -> dict[str, Any]:
    """Return an entry with its row, None if that is gone."""
    return {
        "seq": row["seq"],
        "audit_id": row["chained"],
        "hash": row["hash"].hex(),
        "row": None if row["audit_id"] is None else shown(row),
    }


def _entry(row: asyncpg.Record) -> dict[str, Any]:
    digest = row["hash"]
    return {"seq": row["seq"], "hash": None if digest is None else digest.hex()}


def _text(value: Any) -> Any:
    if isinstance(value, datetime):
        return rfc3339(value)
    return str(value) if isinstance(value, UUID) else value


def _filters(asked: Mapping[str, str]) -> Filters:
    if "\0" in "".join(asked.get(name, "") for name in FILTERS):
        raise InvalidRequest("A filter has a character that no name has.")
    return Filters(
        asked.get("actor"), asked.get("action"), _run_id(asked.get("run_id")),
        asked.get("runner_id"),
    )  # fmt: skip


def _run_id(text: str | None) -> UUID | None:
    if text is None:
        return None
    try:
        run_id = UUID(text)
    except ValueError:
        run_id = None
    if run_id is None or str(run_id) != text:
        raise bad_query("/run_id", "must be a UUID in lower case")
    return run_id
