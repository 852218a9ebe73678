"""Runners as admins see and manage them: list, pause, resume, drain."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from broker.admin.explain import stale_after
from broker.audit.log import Admin, record
from broker.documents.paging import (
    BIGINT_MAX,
    check_limit,
    read_name,
    read_numbers,
    write_name,
    write_numbers,
)
from broker.documents.times import time_to_come
from broker.errors import NotFound
from broker.runners.registration import capped
from config.settings import Settings
from db import runners, submissions
from db.pool import Executor, retries

_SHOWN = (
    "runner_id", "hostname", "version", "registered_at", "started_at", "last_heartbeat",
    "second_process_seen_at",
    "key_fingerprint", "paused_at", "paused_until", "pause_reason", "drain_requested_at",
    "current_runs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunnerPage:
    """Some runners, and where the next ones begin."""

    runners: list[dict[str, Any]]
    next_cursor: str | None


class RunnerAdmin:
    """Looks at the fleet, and steers single runners."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self._pool = pool
        self._settings = settings
        self._stale_after = stale_after(settings)

    async def page(self, cursor: str | None, limit: int) -> RunnerPage:
        """Return `limit` runners that have registered after `cursor`, by name.

        Raises InvalidRequest.
        """
        check_limit(limit)
        after = read_name(cursor) if cursor else None
        rows = await runners.list_page(self._pool, after=after, limit=limit + 1)
        shown, more = rows[:limit], len(rows) > limit
        return RunnerPage(
            [self._shown(row) for row in shown],
            write_name(shown[-1]["runner_id"]) if more else None,
        )

    async def show(self, runner_id: str) -> dict[str, Any]:
        """Return one runner, with its last 24 hours. Raises NotFound."""
        row = await runners.show(self._pool, runner_id)
        if row is None:
            raise NotFound(f"No runner {runner_id} has registered here.")
        day: dict[str, dict[str, int]] = {"attempts": {}, "refusals": {}}
        for each in await submissions.last_day(self._pool, runner_id):
            day[each["kind"]][each["name"]] = each["number"]
        return {**self._shown(row), "last_day": day}

    async def refusals(
        self, run_id: UUID | None, runner_id: str | None, cursor: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return `limit` refused submits, the newest first, and the next cursor.

        Raises InvalidRequest.
        """
        check_limit(limit)
        (before,) = read_numbers(cursor, 1) if cursor else (BIGINT_MAX,)
        rows = await submissions.refusals(self._pool, run_id, runner_id, before, limit + 1)
        shown = [dict(row.items()) for row in rows[:limit]]
        more = write_numbers(shown[-1]["refusal_id"]) if len(rows) > limit else None
        return shown, more

    async def pause(
        self, by: Admin, runner_id: str, reason: str, until: str | None
    ) -> dict[str, Any]:
        """Give a runner nothing new until then, or until it is resumed.

        Raises NotFound, and InvalidRequest when `until` is not a time to come.
        """
        end = time_to_come(until, "/until") if until else None
        return await self._manage(
            by, runner_id, "pause", lambda c: runners.pause(c, runner_id, reason, end), reason
        )

    async def resume(self, by: Admin, runner_id: str, reason: str | None) -> dict[str, Any]:
        """Undo a pause or a drain. Raises NotFound."""
        return await self._manage(
            by, runner_id, "resume", lambda c: runners.resume(c, runner_id), reason
        )

    async def drain(self, by: Admin, runner_id: str, reason: str | None) -> dict[str, Any]:
        """Let a runner finish what it holds, and no more. Raises NotFound."""
        return await self._manage(
            by, runner_id, "drain", lambda c: runners.drain(c, runner_id), reason
        )

    @retries
    async def _manage(
        self,
        by: Admin,
        runner_id: str,
        verb: str,
        change: Callable[[Executor], Awaitable[bool]],
        reason: str | None,
    ) -> dict[str, Any]:
        async with self._pool.acquire() as connection, connection.transaction():
            if not await change(connection):
                raise NotFound(f"No runner {runner_id} has registered here.")
            await record(
                connection,
                by.actor,
                f"runner.{verb}",
                f"runner:{runner_id}",
                runner_id=runner_id,
                reason=reason,
            )
        return await self.show(runner_id)

    def _shown(self, row: asyncpg.Record) -> dict[str, Any]:
        return {
            **{name: row[name] for name in _SHOWN},
            "state": self._state(row),
            "capabilities": capped(row["capabilities"], row["capability_caps"]),
            "max_leases": row["max_leases"] or self._settings.max_leases,
        }

    def _state(self, row: asyncpg.Record) -> str:
        """Return the first that holds, the most telling one first."""
        if row["revoked_at"] is not None:
            return "revoked"
        if row["paused"]:
            return "paused"
        if row["signed_off"]:
            return "signed_off"
        if row["status"] == "DEAD" or row["silent_for"] > self._stale_after:
            return "stale"
        if row["drain_requested_at"] is not None:
            return "draining"
        return "busy" if row["current_runs"] else "idle"
