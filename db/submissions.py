"""Accepted bundles, byte for byte, and refusals; and the run's row in upstream's `runs`."""

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from db.pool import Executor, fetch_one, fetch_planned
from db.queries import load

SQL = load("submissions")
REFUSALS_KEPT = 200  # of a runner
# COPY's binary format: https://www.postgresql.org/docs/current/sql-copy.html
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
COPY_TRAILER = struct.pack("!h", -1)
COLUMNS = ("run_id", "name", "sha256", "content")
PIECE = 256 * 1024


@dataclass(frozen=True, slots=True)
class Accepted:
    """The row of an accepted result."""

    run_id: UUID
    receipt_id: UUID
    lease_seq: int
    runner_id: str
    fingerprint: str
    result_sha256: str
    trust: str
    signer_identity: str
    signer_issuer: str | None
    log_index: int | None
    logged_at: datetime | None
    model_metrics: int
    hardware_metrics: int
    accepted_at: datetime


@dataclass(frozen=True, slots=True)
class Wanted:
    """Filter of submissions; None is any."""

    state: str | None = None
    runner_id: str | None = None
    fingerprint: str | None = None
    trust: str | None = None
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a bundle as it was received, by its descriptor."""

    name: str
    sha256: str
    descriptor: int


async def add(
    connection: Executor,
    accepted: Accepted,
    receipt: Mapping[str, Any],
    files: Sequence[StoredFile],
) -> asyncpg.Record:
    """Record an accepted bundle with its signed receipt, and return its submission row."""
    row = await fetch_one(
        connection,
        SQL["add"],
        accepted.run_id,
        accepted.lease_seq,
        accepted.runner_id,
        accepted.fingerprint,
        accepted.result_sha256,
        accepted.signer_identity,
        accepted.signer_issuer,
        accepted.log_index,
        accepted.logged_at,
        accepted.model_metrics,
        accepted.hardware_metrics,
        accepted.accepted_at,
        accepted.receipt_id,
        receipt,
        accepted.trust,
    )
    await connection.copy_to_table(
        "submission_files", source=_copied(accepted.run_id, files), columns=COLUMNS, format="binary"
    )
    return row


async def _copied(run_id: UUID, files: Sequence[StoredFile]) -> AsyncIterator[bytes]:
    """Give rows of submission_files, piece by piece from the disk.

    As a parameter of an INSERT, a file would be in memory twice, and 16 MiB would hold the event
    loop for as long as it takes to copy them.
    """
    yield COPY_HEADER
    for file in files:
        size = os.fstat(file.descriptor).st_size
        texts = (run_id.bytes, file.name.encode(), file.sha256.encode())
        fields = b"".join(struct.pack("!i", len(text)) + text for text in texts)
        yield struct.pack("!h", len(COLUMNS)) + fields + struct.pack("!i", size)
        for offset in range(0, size, PIECE):
            yield os.pread(file.descriptor, PIECE, offset)
            await asyncio.sleep(0)  # while PostgreSQL keeps up, nothing else would give way
    yield COPY_TRAILER


async def find(pool: Executor, run_id: UUID) -> asyncpg.Record | None:
    """Return the accepted submission of a run."""
    return await pool.fetchrow(SQL["find"], run_id)


async def publish(
    connection: Executor,
    run_id: UUID,
    *,
    run_status: str,
    at: datetime,
    runner_id: str,
    runner_version: str | None,
    prompt_git_hash: str | None,
) -> None:
    """Bring upstream's `runs` row up to the accepted result."""
    await connection.execute(
        SQL["publish"],
        run_id,
        run_status,
        at,
        runner_id,
        runner_version,
        prompt_git_hash,
    )


async def refuse(
    pool: Executor, run_id: UUID, runner_id: str, fingerprint: str, code: str, detail: str
) -> None:
    """Count a refusal against the runner."""
    await pool.execute(SQL["refuse"], run_id, runner_id, fingerprint, code, detail, REFUSALS_KEPT)


async def accepted_of_key(connection: Executor, fingerprint: str) -> list[UUID]:
    """Return the runs whose accepted results this key brought."""
    return [row["run_id"] for row in await connection.fetch(SQL["accepted_of_key"], fingerprint)]


async def add_runs(connection: Executor, run_ids: Sequence[UUID]) -> set[UUID]:
    """Make `runs` rows and return the ids that were new."""
    return {row["run_id"] for row in await connection.fetch(SQL["add_runs"], list(run_ids))}


async def list_page(
    pool: asyncpg.Pool, wanted: Wanted, *, after: tuple[datetime, UUID] | None, limit: int
) -> list[asyncpg.Record]:
    """Return one page of the submissions that are wanted, oldest first, after the cursor."""
    of = (wanted.state, wanted.runner_id, wanted.fingerprint, wanted.trust, wanted.since)
    return await fetch_planned(pool, SQL["list_page"], *of, *(after or (None, None)), limit)


async def show(pool: Executor, run_id: UUID) -> asyncpg.Record | None:
    """Return a run's submission with its publisher, its model and the key that brought it."""
    return await pool.fetchrow(SQL["show"], run_id)


async def files(pool: Executor, run_id: UUID) -> list[asyncpg.Record]:
    """Return name, digest and size of each stored file."""
    return await pool.fetch(SQL["files"], run_id)


async def file_size(pool: Executor, run_id: UUID, name: str) -> int | None:
    """Return how many bytes a stored file has; None when there is no such file."""
    return await pool.fetchval(SQL["file_size"], run_id, name)


async def file_piece(
    pool: Executor, run_id: UUID, name: str, start: int, size: int
) -> bytes | None:
    """Return up to `size` bytes of a stored file; None when it is gone."""
    return await pool.fetchval(SQL["file_piece"], run_id, name, start, size)


async def history(pool: Executor, run_id: UUID) -> list[asyncpg.Record]:
    """Return the decisions about a result, oldest first."""
    return await pool.fetch(SQL["history"], run_id)


async def find_state(connection: Executor, run_id: UUID) -> str | None:
    """Return the state of a run's result; None when it has none."""
    return await connection.fetchval(SQL["find_state"], run_id)


async def moderate(
    connection: Executor, run_id: UUID, former: str, state: str, reason: str, by: str
) -> asyncpg.Record | None:
    """Change a result's state; None when its state is not `former` any more."""
    return await connection.fetchrow(SQL["moderate"], run_id, former, state, reason, by)


async def refusals(
    pool: Executor, run_id: UUID | None, runner_id: str | None, before: int, limit: int
) -> list[asyncpg.Record]:
    """Return refused submits before the cursor, the newest first."""
    return await pool.fetch(SQL["refusals"], run_id, runner_id, before, limit)


async def last_day(pool: Executor, runner_id: str) -> list[asyncpg.Record]:
    """Return (kind, name, number): a runner's leases and refusals of the last 24 hours."""
    return await pool.fetch(SQL["last_day"], runner_id)
