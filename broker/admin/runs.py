"""The queue as admins and runners see it, and the cancel of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg

from auth.tokens import RunnerIdentity
from broker.admin.moderation import told_state
from broker.audit.log import Admin, record
from broker.documents.paging import bad_query, check_limit, read_cursor, write_cursor
from broker.documents.times import parse_time, time_to_come
from broker.errors import Conflict, InvalidRequest, NotFound, RunFinished, code_of
from broker.leases.lease_refusal import FINISHED
from db import archive, attempts, run_queue, submissions
from db.pool import Executor, retries
from db.run_queue import RunFilter

REQUEUED_MAX = 1000  # runs in one call
BULK_MAX = 1000  # likewise, of a filter
CHANGED = ("priority", "not_before", "reason")
FILTERS = ("status", "model", "runner", "batch", "from", "before", "text", "id")

TEXT_MAX = 200
_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

STATUSES = ("PENDING", "CLAIMED", "IN_PROGRESS", "COMPLETE", "FAILED", "CANCELLED")
# What a run's page shows of its row; lease_id stays inside, and the job has a place of its own.
_ROW = (
    "run_id", "queue_id", "status", "priority", "attempt_count", "max_attempts", "claimed_by",
    "claimed_at", "started_at", "completed_at", "created_at", "retry_after", "error_detail",
    "batch_id", "progress", "cancel_requested_at", "cancel_reason", "lease_seq",
    "lease_expires_at", "last_heartbeat", "result_sha256", "config_hash", "max_runtime_s",
    "quantization", "judge_model", "need_gb",
)  # fmt: skip
_LISTED = (
    "run_id", "queue_id", "status", "priority", "attempt_count", "max_attempts", "claimed_by",
    "claimed_at", "created_at", "completed_at", "retry_after", "error_detail", "batch_id",
    "progress", "cancel_requested_at", "lease_seq", "lease_expires_at", "quantization", "need_gb",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Page:
    """Some runs, and where the next ones begin."""

    runs: list[dict[str, Any]]
    next_cursor: str | None


class QueueView:
    """Reads the queue, and cancels runs."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def page(
        self, wanted: RunFilter, cursor: str | None, limit: int, *, newest_first: bool = False
    ) -> Page:
        """Return `limit` runs after `cursor`, oldest or newest first. Raises InvalidRequest."""
        check_limit(limit)
        after = read_cursor(cursor) if cursor else None
        rows = await run_queue.list_page(
            self._pool, wanted, after=after, limit=limit + 1, newest_first=newest_first
        )
        shown, more = rows[:limit], len(rows) > limit
        return Page(
            [{**_shown(row, _LISTED), "model": row["model_name"]} for row in shown],
            write_cursor(shown[-1]["created_at"], shown[-1]["run_id"]) if more else None,
        )

    async def job(self, run_id: UUID) -> str:
        """Return a run's job as JSON text, which may have megabytes. Raises NotFound."""
        text = await run_queue.job_of(self._pool, run_id)
        if text is None:
            raise _no_run(run_id)
        return text

    async def run(self, run_id: UUID) -> dict[str, Any]:
        """Return a run with its attempts and its receipt, without its job. Raises NotFound."""
        row = await self._find(run_id)
        submission = await submissions.find(self._pool, run_id)
        return {
            **_shown(row, _ROW),
            "model": row["model_name"],
            "attempts": shown_attempts(await attempts.of_run(self._pool, run_id)),
            "receipt": submission["receipt"] if submission else None,
            "result": told_state(submission) if submission else None,
        }

    async def own_run(self, runner: RunnerIdentity, run_id: UUID) -> dict[str, Any]:
        """Return a run as the runner that works, or worked, on it sees it. Raises NotFound.

        A lease_id is shown to its holder only. A run that was never this runner's is not found.
        """
        row = await self._find(run_id)
        mine = await attempts.of_run(self._pool, run_id, runner.runner_id)
        submission = await submissions.find(self._pool, run_id)
        own = submission is not None and submission["runner_id"] == runner.runner_id
        # Attempts of an accepted result may have been pruned; the result stays this runner's.
        if not mine and not own:
            raise NotFound(f"There is no run {run_id} of yours.")
        holds = row["claimed_by"] == runner.runner_id and row["lease_expires_at"] is not None
        lease = {
            "lease_id": row["lease_id"],
            "lease_expires_at": row["lease_expires_at"],
            "attempt": row["lease_seq"],
        }
        return {
            "run_id": run_id,
            "status": row["status"],
            "lease": lease if holds else None,
            "attempts": shown_attempts(mine),
            "receipt": submission["receipt"] if submission and own else None,
            "result": told_state(submission) if submission and own else None,
        }

    @retries
    async def cancel(self, by: Admin, run_id: UUID, reason: str) -> str:
        """Cancel a run, or ask its runner to stop; return its state. Raises NotFound, RunFinished.

        Cancelling again changes nothing.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            status = await run_queue.cancel(connection, run_id, reason)
            if status is not None:
                await record(
                    connection,
                    by.actor,
                    "queue.cancel",
                    f"run:{run_id}",
                    run_id=run_id,
                    reason=reason,
                )
                return status
        row = await self._find(run_id)
        if row["status"] == "CANCELLED":
            return "CANCELLED"
        if row["status"] in FINISHED:
            raise RunFinished(f"The run is {row['status']} already.")
        # It changed hands between the two statements: once more, from where it is now.
        return await self.cancel(by, run_id, reason)

    @retries
    async def requeue(self, by: Admin, run_id: UUID, reason: str) -> dict[str, Any]:
        """Put a run without a whole result back into the queue; return {run_id, status}.

        FAILED and CANCELLED runs are PENDING again, archived ones too, and one that is PENDING
        stays as it is. Of a COMPLETE run whose result is incomplete or failed a new run is made
        (`new_run_id`), and the result is superseded. Raises NotFound; RunFinished for a complete
        result, Conflict for a run that somebody works on or whose result was decided about.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            status = await run_queue.requeue(connection, run_id)
            if status is None and await archive.bring_back(connection, run_id):
                status = await run_queue.requeue(connection, run_id)
            if status is not None:
                await _record_requeue(connection, by, run_id, reason)
                return {"run_id": run_id, "status": status}
            new_run_id = await run_queue.again(connection, run_id)
            if new_run_id is not None:
                why = f"requeued as {new_run_id}: {reason}"
                superseded = await submissions.moderate(
                    connection, run_id, "accepted", "superseded", why, by.actor.name
                )
                if superseded is None:
                    raise Conflict("The result was decided about already: see `results show`.")
                await _record_requeue(connection, by, run_id, reason, new_run_id=str(new_run_id))
                return {"run_id": run_id, "status": "COMPLETE", "new_run_id": new_run_id}
        row = await self._find(run_id)
        if row["status"] == "COMPLETE":
            raise RunFinished("The run is COMPLETE: its result was accepted.")
        if row["status"] in ("CLAIMED", "IN_PROGRESS"):
            raise Conflict("A runner works on the run: cancel it, or wait for its lease to end.")
        if row["status"] == "PENDING":
            return {"run_id": run_id, "status": "PENDING"}
        # It ended between the two statements: once more, from where it is now.
        return await self.requeue(by, run_id, reason)

    @retries
    async def change(self, by: Admin, run_id: UUID, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Set the priority and the earliest start (null: now) of a PENDING run.

        Returns {run_id, status, priority, retry_after}. Raises NotFound, InvalidRequest for a time
        that has passed, RunFinished, or Conflict while a runner works on it.
        """
        if not {"priority", "not_before"} & wanted.keys():
            raise InvalidRequest("Give the new priority or not_before: there is nothing to change.")
        not_before = wanted.get("not_before")
        async with self._pool.acquire() as connection, connection.transaction():
            row = await run_queue.change(
                connection,
                run_id,
                wanted.get("priority"),
                time_to_come(not_before, "/not_before") if not_before else None,
                sets_not_before="not_before" in wanted,
            )
            if row is not None:
                await record(
                    connection, by.actor, "queue.set", f"run:{run_id}", run_id=run_id,
                    **{name: wanted[name] for name in CHANGED if name in wanted},
                )  # fmt: skip
                return dict(row.items())
        status = (await self._find(run_id))["status"]
        if status in FINISHED:
            raise RunFinished(f"The run is {status} already.")
        raise Conflict(f"The run is {status}: only a PENDING run has a place in the queue.")

    async def change_many(self, by: Admin, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Cancel, requeue or change up to BULK_MAX runs that fit a filter, one after the other.

        Without `expected`, only counts: {matched}. With it, {matched, done, results: [{run_id,
        status} or {run_id, code, detail}]}. Raises Conflict when another number fits by now, and
        InvalidRequest.
        """
        runs = read_filter(wanted["filter"], "/filter")
        matched = await run_queue.count(self._pool, runs)
        if (expected := wanted.get("expected")) is None:
            return {"matched": matched}
        if expected != matched:
            raise Conflict(f"{matched} runs fit the filter by now, not {expected}: look again.")
        await record(
            self._pool, by.actor, "queue.bulk", "queue", change=wanted["action"],
            filter=wanted["filter"], reason=wanted["reason"], matched=matched,
        )  # fmt: skip
        rows = await run_queue.list_page(self._pool, runs, after=None, limit=BULK_MAX)
        results = [await self._change_one(by, row["run_id"], wanted) for row in rows]
        done = sum("code" not in result for result in results)
        return {"matched": matched, "done": done, "results": results}

    async def _change_one(
        self, by: Admin, run_id: UUID, wanted: Mapping[str, Any]
    ) -> dict[str, Any]:
        try:
            if wanted["action"] == "cancel":
                status = await self.cancel(by, run_id, wanted["reason"])
                return {"run_id": run_id, "status": status}
            if wanted["action"] == "requeue":
                return await self.requeue(by, run_id, wanted["reason"])
            changes = {name: wanted[name] for name in CHANGED if name in wanted}
            return await self.change(by, run_id, changes)
        except (NotFound, Conflict, RunFinished) as error:  # of this run alone
            return {"run_id": run_id, "code": code_of(error), "detail": str(error)}

    @retries
    async def requeue_failed_by(
        self, by: Admin, runner_id: str, within_s: int, reason: str
    ) -> list[UUID]:
        """Undo what a runner's failures and lapses of the last seconds did to runs; return these.

        They are PENDING, without failures, and wait for nothing: up to REQUEUED_MAX in one call.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            found = await run_queue.failed_by(
                connection, runner_id, timedelta(seconds=within_s), REQUEUED_MAX
            )
            done = []
            for run_id in found:
                if await run_queue.requeue(connection, run_id, pending=True) is not None:
                    await _record_requeue(connection, by, run_id, reason, failed_by=runner_id)
                    done.append(run_id)
            await record(
                connection, by.actor, "queue.requeue_failed", f"runner:{runner_id}",
                runner_id=runner_id, reason=reason, within_s=within_s, runs=len(done),
            )  # fmt: skip
        return done

    async def _find(self, run_id: UUID) -> asyncpg.Record:
        row = await run_queue.find(self._pool, run_id)
        if row is None:
            raise _no_run(run_id)
        return row


async def _record_requeue(
    connection: Executor, by: Admin, run_id: UUID, reason: str, **detail: str
) -> None:
    target = f"run:{run_id}"
    await record(
        connection, by.actor, "queue.requeue", target, run_id=run_id, reason=reason, **detail
    )


def _shown(row: asyncpg.Record, names: Sequence[str]) -> dict[str, Any]:
    """Return a run's members; a runner whose lease has lapsed holds it no more."""
    shown = _pick(row, names)
    if row["status"] == "PENDING":
        shown |= {"claimed_by": None, "claimed_at": None}
    return shown


def read_filter(asked: Mapping[str, str], at: str = "") -> RunFilter:
    """Return the runs that a query, or the filter of a body at the pointer `at`, means.

    `id` is the beginning of a run_id. Raises InvalidRequest that points to the member.
    """
    status = asked.get("status")
    if status is not None and status not in STATUSES:
        raise bad_query(f"{at}/status", f"must be one of {', '.join(STATUSES)}")
    begun, before = (
        parse_time(asked[name], f"{at}/{name}") if name in asked else None
        for name in ("from", "before")
    )
    batch = asked.get("batch")
    if batch is not None and not _UUID.fullmatch(batch):
        raise bad_query(f"{at}/batch", "must be a UUID in lower case, with its hyphens")
    return RunFilter(
        status=status,
        model=_storable(asked, "model", at),
        runner_id=_storable(asked, "runner", at),
        batch_id=UUID(batch) if batch else None,
        created_from=begun,
        created_before=before,
        text=_storable(asked, "text", at),
        id_range=_id_range(asked["id"], f"{at}/id") if "id" in asked else None,
    )


def _storable(asked: Mapping[str, str], name: str, at: str) -> str | None:
    """Return a text of the filter; PostgreSQL has no U+0000."""
    text = asked.get(name)
    if text is not None and ("\0" in text or not 1 <= len(text) <= TEXT_MAX):
        raise bad_query(f"{at}/{name}", f"must be 1 to {TEXT_MAX} characters, without U+0000")
    return text


def _id_range(beginning: str, at: str) -> tuple[UUID, UUID]:
    """Return the first and the last UUID that begin so."""
    digits = beginning.replace("-", "")
    if not re.fullmatch("[0-9a-f]{1,32}", digits) or not str(
        UUID(digits.ljust(32, "0"))
    ).startswith(beginning):
        raise bad_query(at, "must be the beginning of a UUID in lower case")
    return UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))


def shown_attempts(rows: Sequence[asyncpg.Record]) -> list[dict[str, Any]]:
    """Return a run's attempts as they are shown."""
    return [{"attempt": row["lease_seq"], **_without(row, "lease_seq")} for row in rows]


def _no_run(run_id: UUID) -> NotFound:
    return NotFound(f"There is no run {run_id} in the queue.")


def _pick(row: asyncpg.Record, names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _without(row: asyncpg.Record, name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}
