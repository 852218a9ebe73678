"""Accepted results as admins see them: listed, shown, and their stored bytes handed out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from broker.admin.moderation import STATES, told_state
from broker.documents.paging import (
    INT_MAX,
    bad_query,
    check_limit,
    read_cursor,
    read_numbers,
    write_cursor,
    write_numbers,
)
from broker.documents.times import parse_time
from broker.errors import NotFound
from broker.results.bundle import CAPS
from db import metrics, submissions
from db.submissions import Wanted

TRUSTS = ("sigstore", "runner-key")
PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ResultPage:
    """Some results, and where the next ones begin."""

    results: list[dict[str, Any]]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A stored file: its size, and its bytes in pieces."""

    size: int
    pieces: AsyncIterator[bytes]


class Results:
    """Reads accepted results."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def page(self, wanted: Wanted, cursor: str | None, limit: int) -> ResultPage:
        """Return `limit` results after `cursor`, in the order of acceptance.

        Raises InvalidRequest.
        """
        check_limit(limit)
        after = read_cursor(cursor) if cursor else None
        rows = await submissions.list_page(self._pool, wanted, after=after, limit=limit + 1)
        shown, more = rows[:limit], len(rows) > limit
        return ResultPage(
            [dict(row) for row in shown],
            write_cursor(shown[-1]["accepted_at"], shown[-1]["run_id"]) if more else None,
        )

    async def show(self, run_id: UUID) -> dict[str, Any]:
        """Return all that is known of a run's result, but its bytes and rows. Raises NotFound."""
        row = await submissions.show(self._pool, run_id)
        if row is None:
            raise _no_result(run_id)
        names = ("run_id", "runner_id", "publisher_id", "run_status", "model", "trust",
                 "result_sha256", "accepted_at", "receipt", "public_key")  # fmt: skip
        return {
            **{name: row[name] for name in names},
            **told_state(row),
            "changed_by": row["state_changed_by"],
            "attempt": row["lease_seq"],
            "key_fingerprint": row["key_fingerprint"],
            "key_revoked_at": row["key_revoked_at"],
            "signer": {
                "identity": row["signer_identity"],
                "issuer": row["signer_issuer"],
                "log_index": row["log_index"],
                "logged_at": row["logged_at"],
            },
            "rows": {
                "model_metrics": row["model_metrics"],
                "hardware_metrics": row["hardware_metrics"],
            },
            "files": [dict(file) for file in await submissions.files(self._pool, run_id)],
            "history": [
                {"at": past["at"], "by": past["actor"], **past["detail"]}
                for past in await submissions.history(self._pool, run_id)
            ],
        }

    async def rows(self, run_id: UUID, cursor: str | None, limit: int) -> dict[str, Any]:
        """Return what the leaderboard reads of a run's result: `limit` cells after `cursor`.

        A result has up to 100,000: all at once would hold the event loop. Raises InvalidRequest
        and NotFound.
        """
        check_limit(limit)
        (after,) = read_numbers(cursor, 1, INT_MAX) if cursor else (None,)
        if await submissions.find_state(self._pool, run_id) is None:
            raise _no_result(run_id)
        run = await metrics.run_of(self._pool, run_id)
        machine = await metrics.hardware_metrics_of(self._pool, run_id)
        found = await metrics.model_metrics_of(self._pool, run_id, after=after, limit=limit + 1)
        shown, more = found[:limit], len(found) > limit
        return {
            "run": dict(run) if run else None,
            "hardware": dict(machine) if machine else None,
            "model_metrics": [
                {name: value for name, value in cell.items() if name != "prompt_id"}
                for cell in shown
            ],
            "next_cursor": write_numbers(shown[-1]["prompt_id"]) if more else None,
        }

    async def open_file(self, run_id: UUID, name: str) -> StoredBytes:
        """Return a file of a result as it was received. Raises NotFound."""
        size = await submissions.file_size(self._pool, run_id, name) if name in CAPS else None
        if size is None:
            raise NotFound(f"There is no such file of a result of run {run_id}.")
        return StoredBytes(size, self._pieces(run_id, name, size))

    async def _pieces(self, run_id: UUID, name: str, size: int) -> AsyncIterator[bytes]:
        for start in range(0, size, PIECE_BYTES):
            piece = await submissions.file_piece(self._pool, run_id, name, start, PIECE_BYTES)
            if piece is None:  # the run was deleted meanwhile: the answer ends short of its length
                raise _no_result(run_id)
            yield piece


def wanted_by(asked: dict[str, str]) -> Wanted:
    """Return the filters of a query: state, runner_id, key, trust, since. Raises InvalidRequest."""
    for name, known in (("state", STATES), ("trust", TRUSTS)):
        if name in asked and asked[name] not in known:
            raise bad_query(f"/{name}", f"must be one of {', '.join(known)}")
    since = asked.get("since")
    return Wanted(
        state=asked.get("state"),
        runner_id=_text(asked, "runner_id"),
        fingerprint=_text(asked, "key"),
        trust=asked.get("trust"),
        since=parse_time(since, "/since") if since is not None else None,
    )


def _text(asked: dict[str, str], name: str) -> str | None:
    """Of a name that nobody can have, say so: an empty page would look like an answer."""
    if name in asked and not (asked[name].isprintable() and 1 <= len(asked[name]) <= 128):
        raise bad_query(f"/{name}", "must be printable text of at most 128 characters")
    return asked.get(name)


def _no_result(run_id: UUID) -> NotFound:
    return NotFound(f"There is no accepted result of run {run_id}.")
