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

from db.pool import Executor, fetch_one
from db.queries import load

SQL = load("submissions")
# COPY's binary format: https://www.postgresql.org/docs/current/sql-copy.html
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
COPY_TRAILER = struct.pack("!h", -1)
COLUMNS = ("run_id", "name", "sha256", "content")
PIECE = 256 * 1024


@dataclass(frozen=True, slots=True)
class Accepted:
    """What is recorded of an accepted result."""

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
    await pool.execute(SQL["refuse"], run_id, runner_id, fingerprint, code, detail)


async def accepted_of_key(connection: Executor, fingerprint: str) -> list[UUID]:
    """Return the runs whose accepted results this key brought."""
    return [row["run_id"] for row in await connection.fetch(SQL["accepted_of_key"], fingerprint)]


async def add_runs(connection: Executor, run_ids: Sequence[UUID]) -> set[UUID]:
    """Make `runs` rows and return the ids that were new."""
    return {row["run_id"] for row in await connection.fetch(SQL["add_runs"], list(run_ids))}
