"""The run_queue table: one function per statement of `sql/run_queue.sql`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from db.audit import Actor
from db.pool import Executor, fetch_one, fetch_planned
from db.queries import load

SQL = load("run_queue")
# What NOTIFY is sent on when a run becomes claimable.
CHANNEL = "bakeoff_queue"
PIECE_LENGTH = 2 * 1024 * 1024  # characters of jobs in one statement, the last job's aside
# Of a run's leases that were released, those before its newest so many are forgotten.
LEASES_KEPT = 100
# A cursor before every run.
FIRST_PAGE = (datetime(1, 1, 1, tzinfo=UTC), UUID(int=0))
# One behind every run, for the list from the newest backwards.
LAST_PAGE = (datetime(9999, 1, 1, tzinfo=UTC), UUID(int=2**128 - 1))
NEWEST_FIRST = (
    SQL["list_page"]
    .replace("(q.created_at, q.run_id) > (", "(q.created_at, q.run_id) < (")
    .replace("ORDER BY q.created_at, q.run_id", "ORDER BY q.created_at DESC, q.run_id DESC")
)
# Runs ahead of one that are counted, for each model.
AHEAD_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Capabilities of a runner: whole GB of VRAM, and quantizations in a fixed order."""

    vram_gb: int
    quantizations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Claimant:
    """One request of a claim statement: who asks, for what, and under which Idempotency-Key."""

    runner_id: str
    fingerprint: str
    instance_id: UUID
    token: UUID
    claim_key: str
    claim_digest: str
    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat: the lease it renews, and who says so."""

    run_id: UUID
    lease_id: UUID
    runner_id: str
    fingerprint: str
    instance_id: UUID
    progress: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class LeaseGuard:
    """Proof that a lease is a runner's: the run, the secret lease_id, its name and its key.

    `instance_id` is the process that shows it: a lease is handed back by the one that holds it.
    """

    run_id: UUID
    lease_id: UUID
    runner_id: str
    fingerprint: str
    instance_id: UUID


@dataclass(frozen=True, slots=True)
class QueuedRun:
    """One row to enqueue; `job` is JSON text, which only PostgreSQL reads."""

    run_id: UUID
    model_id: UUID
    judge_model_id: UUID  # the model itself where no model judges
    job: str
    config_hash: str
    priority: int
    not_before: datetime | None
    max_attempts: int
    max_runtime_s: int | None
    batch_id: UUID | None


async def claim(
    pool: Executor,
    claimants: Sequence[Claimant],
    *,
    ttl: timedelta,
    max_leases: int,
    max_runtime_s: int,
    by_fit: bool = False,
) -> list[asyncpg.Record]:
    """Hand a run to each claimant where one fits; a record per claimant, in order.

    With `by_fit`, of runs of equal priority the one that needs the most VRAM goes first.

    Raises asyncpg.UniqueViolationError when two claims of one runner raced: claim again.
    """
    kinds: dict[Capabilities, int] = {}
    for claimant in claimants:
        kinds.setdefault(claimant.capabilities, len(kinds) + 1)
    return await pool.fetch(
        SQL["claim"],
        [kind.vram_gb for kind in kinds],
        [",".join(kind.quantizations) for kind in kinds],
        [c.runner_id for c in claimants],
        [c.fingerprint for c in claimants],
        [c.claim_key for c in claimants],
        [c.claim_digest for c in claimants],
        [kinds[c.capabilities] for c in claimants],
        ttl,
        max_leases,
        max_runtime_s,
        by_fit,
        [c.token for c in claimants],
        [c.instance_id for c in claimants],
    )


async def promote_aged(pool: Executor, aging: timedelta, limit: int) -> list[asyncpg.Record]:
    """Bring runs to the front that were overtaken for longer than `aging`; return them."""
    return await pool.fetch(SQL["promote_aged"], aging, limit)


async def avoided_by(pool: Executor, runner_id: str) -> list[asyncpg.Record]:
    """Return run_id and until of the PENDING runs that a runner failed and is not given now."""
    return await pool.fetch(SQL["avoided_by"], runner_id)


async def take_over(
    pool: Executor,
    run_id: UUID,
    *,
    runner_id: str,
    fingerprint: str,
    instance_id: UUID,
    token: UUID,
    claim_key: str,
    ttl: timedelta,
    max_runtime_s: int,
) -> str | None:
    """Give a live lease of a runner to another of its processes; None when it holds none.

    Returns the key under which `claim` gives it again: `claim_key`, or its own if it had it.
    """
    return await pool.fetchval(
        SQL["take_over"],
        run_id,
        runner_id,
        fingerprint,
        instance_id,
        claim_key,
        ttl,
        max_runtime_s,
        token,
    )


async def held_by(pool: Executor, runner_id: str) -> list[asyncpg.Record]:
    """Return the live leases of a runner, oldest first."""
    return await pool.fetch(SQL["held_by"], runner_id)


async def offers(pool: Executor, count_to: int) -> list[asyncpg.Record]:
    """Return what the queue has by model, its runs counted up to `count_to`."""
    return await pool.fetch(SQL["offers"], count_to)


async def promote_due(pool: Executor, limit: int) -> int:
    """Put up to `limit` deferred runs that have come due into the queue; return how many."""
    return int((await pool.execute(SQL["promote_due"], limit)).split()[-1])


async def beat(
    pool: Executor, beats: Sequence[Beat], *, ttl: timedelta, max_runtime_s: int
) -> list[asyncpg.Record]:
    """Renew leases; a record with its `place` (from 1) for each beat that found its lease."""
    return await pool.fetch(
        SQL["beat"],
        [b.run_id for b in beats],
        [b.lease_id for b in beats],
        [b.runner_id for b in beats],
        [b.fingerprint for b in beats],
        [b.progress for b in beats],
        ttl,
        max_runtime_s,
        [b.instance_id for b in beats],
    )


async def release(
    pool: Executor, guard: LeaseGuard, reason: str, *, untouched_since: datetime | None = None
) -> asyncpg.Record | None:
    """Hand a lease back; None when the guard does not fit.

    With `untouched_since`, the row's updated_at, only if nothing has touched the row since.
    """
    return await pool.fetchrow(
        SQL["release"], *_guard(guard), reason, untouched_since, LEASES_KEPT, guard.instance_id
    )


async def fail(
    pool: Executor,
    guard: LeaseGuard,
    *,
    failure_code: str,
    detail: str,
    backoff_s: int,
    retry_after_s: int,
) -> asyncpg.Record | None:
    """End a lease by a failure; None when the guard does not fit."""
    return await pool.fetchrow(
        SQL["fail"],
        *_guard(guard),
        failure_code,
        detail,
        backoff_s,
        retry_after_s,
        guard.instance_id,
    )


async def overdue_share(pool: Executor) -> tuple[int, int]:
    """Return how many leases are live, and how many of them are overdue."""
    row = await fetch_one(pool, SQL["overdue_share"])
    return row["live"], row["overdue"]


async def tally(pool: Executor) -> list[asyncpg.Record]:
    """Return the number of runs per state, and how long the oldest claimable one has waited."""
    return await pool.fetch(SQL["tally"])


async def lapse(pool: Executor, limit: int) -> list[asyncpg.Record]:
    """End up to `limit` overdue leases and return them."""
    return await pool.fetch(SQL["lapse"], limit)


async def complete(
    connection: Executor, guard: LeaseGuard, result_sha256: str
) -> asyncpg.Record | None:
    """Mark the run COMPLETE and close its attempt; None when the guard does not fit."""
    row = await connection.fetchrow(SQL["complete"], *_guard(guard), result_sha256)
    if row is not None:
        await connection.execute(
            SQL["complete_attempt"],
            guard.run_id,
            row["lease_seq"],
            row["completed_at"],
            row["started_at"],
            row["last_heartbeat"],
            row["progress"],
        )
    return row


async def find(pool: Executor, run_id: UUID) -> asyncpg.Record | None:
    """Return a run with its model, without its job."""
    return await pool.fetchrow(SQL["find"], run_id)


async def job_of(pool: Executor, run_id: UUID) -> str | None:
    """Return the job of a run as JSON text."""
    return await pool.fetchval(SQL["job_of"], run_id)


async def find_for_key(pool: Executor, run_id: UUID, fingerprint: str) -> asyncpg.Record | None:
    """Return a run without its job, and whether the key is good and who may sign for it."""
    return await pool.fetchrow(SQL["find_for_key"], run_id, fingerprint)


async def why_refused(pool: Executor, guards: Sequence[LeaseGuard]) -> list[asyncpg.Record]:
    """Return of each guard its run's status (None: no such run), and whether its key is good and
    another process of the same runner holds the lease."""
    return await pool.fetch(
        SQL["why_refused"],
        [g.run_id for g in guards],
        [g.fingerprint for g in guards],
        [g.lease_id for g in guards],
        [g.runner_id for g in guards],
    )


async def enqueue(connection: Executor, runs: Sequence[QueuedRun]) -> None:
    """Add runs, and wake the claims that wait when the transaction commits."""
    before = 0
    for some in _in_pieces(runs):
        await connection.execute(
            SQL["enqueue"],
            [r.run_id for r in some],
            [r.model_id for r in some],
            [r.judge_model_id for r in some],
            [r.job for r in some],
            [r.config_hash for r in some],
            [r.priority for r in some],
            [r.not_before for r in some],
            [r.max_attempts for r in some],
            [r.max_runtime_s for r in some],
            [r.batch_id for r in some],
            before,
        )
        before += len(some)
    await connection.execute(SQL["announce"])


async def same_config(
    connection: Executor, config_hashes: Sequence[str], but: Sequence[UUID]
) -> dict[str, asyncpg.Record]:
    """Return the newest run of each of these configs, by its hash, except the runs `but`."""
    rows = await connection.fetch(SQL["same_config"], list(config_hashes), list(but))
    return {row["config_hash"]: row for row in rows}


async def enqueued(connection: Executor, run_ids: Sequence[UUID]) -> list[asyncpg.Record]:
    """Return queue_id, run_id and status of what is queued under these run_ids."""
    return await connection.fetch(SQL["enqueued"], list(run_ids))


async def compared(connection: Executor, runs: Sequence[QueuedRun]) -> dict[UUID, list[str]]:
    """Return those of these runs that are queued, each with what differs: its job's members,
    `model` and `judge`."""
    found = {}
    for some in _in_pieces(runs):
        rows = await connection.fetch(
            SQL["compared"],
            [r.run_id for r in some],
            [r.model_id for r in some],
            [r.judge_model_id for r in some],
            [r.job for r in some],
        )
        found |= {row["run_id"]: row["differs"] for row in rows}
    return found


def _in_pieces(runs: Sequence[QueuedRun]) -> Iterator[list[QueuedRun]]:
    """Give runs in pieces that one statement takes: to send 32 MiB at once holds the event loop."""
    some: list[QueuedRun] = []
    length = 0
    for run in runs:
        some.append(run)
        length += len(run.job)
        if length >= PIECE_LENGTH:
            yield some
            some, length = [], 0
    if some:
        yield some


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Filter of runs; None leaves a member open. Both ends of `id_range` are included."""

    status: str | None = None
    model: str | None = None  # its name or model_id
    runner_id: str | None = None  # that holds a lease, or held one
    batch_id: UUID | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None
    text: str | None = None  # in the model's name or the error
    id_range: tuple[UUID, UUID] | None = None


async def list_page(
    pool: asyncpg.Pool,
    wanted: RunFilter,
    *,
    after: tuple[datetime, UUID] | None,
    limit: int,
    newest_first: bool = False,
) -> list[asyncpg.Record]:
    """Return one page of the queue after the cursor, oldest first or newest first."""
    created_at, run_id = after or (LAST_PAGE if newest_first else FIRST_PAGE)
    first, last = wanted.id_range or (None, None)
    return await fetch_planned(
        pool,
        NEWEST_FIRST if newest_first else SQL["list_page"],
        wanted.status, created_at, run_id, limit,
        wanted.model, wanted.runner_id, wanted.batch_id, wanted.created_from,
        wanted.created_before, wanted.text, first, last,
    )  # fmt: skip


async def count(pool: Executor, wanted: RunFilter) -> int:
    """Return how many runs are meant."""
    first, last = wanted.id_range or (None, None)
    created_at, run_id = FIRST_PAGE
    (row,) = await pool.fetch(
        f"SELECT count(*) AS runs FROM ({SQL['list_page']}) AS m",  # noqa: S608 (our own statement)
        wanted.status, created_at, run_id, None,
        wanted.model, wanted.runner_id, wanted.batch_id, wanted.created_from,
        wanted.created_before, wanted.text, first, last,
    )  # fmt: skip
    return row["runs"]


async def explain(
    pool: Executor, run_id: UUID, *, stale_after: timedelta, max_leases: int
) -> asyncpg.Record | None:
    """Return all that decides whether a run can be handed out now; None when there is none."""
    return await pool.fetchrow(SQL["explain"], run_id, stale_after, max_leases, AHEAD_MAX)


async def backlog(pool: Executor, count_to: int, stale_after: timedelta) -> list[asyncpg.Record]:
    """Return the PENDING runs by model, counted up to `count_to`, and whether the fleet fits."""
    return await pool.fetch(SQL["backlog"], count_to, stale_after)


async def pause(
    connection: Executor, model_id: UUID | None, reason: str, until: datetime | None, by: str
) -> asyncpg.Record:
    """Pause a model, or the queue without one; return the pause."""
    return await fetch_one(
        connection, SQL["pause"], str(model_id or "queue"), model_id, reason, until, by
    )


async def resume(connection: Executor, model_id: UUID | None) -> bool:
    """End a pause and wake waiting claims; return whether there was one."""
    row = await connection.fetchrow(SQL["resume"], str(model_id or "queue"))
    return row is not None and row["was_paused"]


async def pauses(pool: Executor) -> list[asyncpg.Record]:
    """Return the pauses that hold now."""
    return await pool.fetch(SQL["pauses"])


async def change(
    connection: Executor,
    run_id: UUID,
    priority: int | None,
    not_before: datetime | None,
    *,
    sets_not_before: bool,
) -> asyncpg.Record | None:
    """Change a PENDING run's priority or earliest start and wake waiting claims; None: not so."""
    row = await connection.fetchrow(SQL["set"], run_id, priority, sets_not_before, not_before)
    if row is not None:
        await connection.execute(SQL["announce"])
    return row


async def cancel(connection: Executor, run_id: UUID, reason: str) -> str | None:
    """Cancel a PENDING run or ask for it on a live one; return its state, None when neither."""
    for name in ("cancel_pending", "cancel_live"):
        status = await connection.fetchval(SQL[name], run_id, reason)
        if status is not None:
            return status
    return None


async def requeue(connection: Executor, run_id: UUID, *, pending: bool = False) -> str | None:
    """Put a FAILED or CANCELLED run back; return its state, None when it is in another.

    With `pending`, also one that waits: without its failures, and for nothing.
    """
    return await connection.fetchval(SQL["requeue"], run_id, pending)


async def again(connection: Executor, run_id: UUID) -> UUID | None:
    """Add a run like a COMPLETE one whose result is not complete; return it, None for others."""
    return await connection.fetchval(SQL["again"], run_id)


async def failed_by(
    connection: Executor, runner_id: str, within: timedelta, limit: int
) -> list[UUID]:
    """Return the runs that a runner failed so recently, and that wait or have failed since."""
    rows = await connection.fetch(SQL["failed_by"], runner_id, within, limit)
    return [row["run_id"] for row in rows]


async def end_leases_of_key(
    connection: Executor, fingerprint: str, reason: str, by: Actor
) -> list[asyncpg.Record]:
    """End every lease of a revoked key, with audit rows, and return those that were live."""
    return await _end_leases(connection, fingerprint, reason, by, "revoked", None)


async def hand_back_all(
    connection: Executor, fingerprint: str, instance_id: UUID, reason: str, by: Actor
) -> list[asyncpg.Record]:
    """Hand back what a process of a key's runner holds and return it, oldest first."""
    return await _end_leases(connection, fingerprint, reason, by, "released", instance_id)


async def _end_leases(
    connection: Executor,
    fingerprint: str,
    reason: str,
    by: Actor,
    how: str,
    instance_id: UUID | None,
) -> list[asyncpg.Record]:
    who = (by.name, by.address, by.token_id)
    return await connection.fetch(
        SQL["end_leases_of_key"], fingerprint, reason, *who, how, LEASES_KEPT, instance_id
    )


def _guard(guard: LeaseGuard) -> tuple[UUID, UUID, str, str]:
    return guard.run_id, guard.lease_id, guard.runner_id, guard.fingerprint
