"""Explains why a run is not running: ordered checks with numbers, each with the verb that helps.

The same checks answer `GET /api/admin/queue/{run_id}/explain` and `bakeoff-queue queue explain`, so
that no two of them give different reasons.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import asyncpg

from broker.documents.times import rfc3339
from broker.errors import NotFound
from config.settings import Settings
from db import run_queue

State = Literal["ok", "waits", "blocks"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a run: `blocks` keeps it from running, `waits` ends by itself."""

    code: str
    state: State
    detail: str
    fix: str | None = None


class Explain:
    """Explains runs."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self._pool = pool
        self._max_leases = settings.max_leases
        self._stale_after = stale_after(settings)

    async def run(self, run_id: UUID) -> dict[str, Any]:
        """Return {run_id, status, verdict, checks, position, estimated_start_s} of a run.

        `verdict` is the first check that blocks, else the first that waits, else "nothing wrong".
        `position` (from 1) and the estimate are those of a PENDING run that a live runner fits.
        Raises NotFound.
        """
        row = await run_queue.explain(
            self._pool, run_id, stale_after=self._stale_after, max_leases=self._max_leases
        )
        if row is None:
            raise NotFound(f"There is no run {run_id} in the queue.")
        checks = list(_checks(row))
        pending = row["status"] == "PENDING"
        return {
            "run_id": run_id,
            "status": row["status"],
            "model": row["model_name"],
            "quantization": row["quantization"],
            "need_gb": row["need_gb"],
            "verdict": _verdict(checks),
            "checks": [asdict(check) for check in checks],
            "position": row["ahead"] + 1 if pending and row["capable"] else None,
            "estimated_start_s": _estimate(row) if pending else None,
        }


def stale_after(settings: Settings) -> timedelta:
    """Return the silence after which a runner counts as stale."""
    return timedelta(seconds=settings.lease_ttl_s + settings.claim_wait_max_s)


def _verdict(checks: list[Check]) -> str:
    for state in ("blocks", "waits"):
        for check in checks:
            if check.state == state:
                return check.detail
    return "nothing wrong"


def _checks(row: asyncpg.Record) -> Iterator[Check]:
    if row["status"] != "PENDING":
        yield _not_pending(row)
        return
    if row["pause_reason"] is not None:
        yield Check(
            "paused", "blocks", f"the queue or the model is paused: {row['pause_reason']}",
            f"bakeoff-queue queue resume, or queue resume --model {row['model_name']!r}",
        )  # fmt: skip
    else:
        yield Check("paused", "ok", "neither the queue nor the model is paused")
    due = row["retry_after"]
    if due is not None and due > row["now"]:
        yield Check(
            "not_before", "waits", f"not before {rfc3339(due)}",
            f"bakeoff-queue queue set {row['run_id']} --not-before now",
        )  # fmt: skip
    else:
        yield Check("not_before", "ok", "its time has come")
    left = row["max_attempts"] - row["attempt_count"]
    yield Check("attempts", "ok", f"{left} of {row['max_attempts']} attempts are left")
    yield from _fleet(row)


def _not_pending(row: asyncpg.Record) -> Check:
    status = row["status"]
    if status in ("CLAIMED", "IN_PROGRESS"):
        until = (
            f", its lease ends at {rfc3339(row['lease_expires_at'])}"
            if row["lease_expires_at"]
            else ""
        )
        return Check("running", "ok", f"{row['claimed_by']} works on it{until}")
    if status == "FAILED":
        return Check(
            "attempts", "blocks",
            f"all {row['max_attempts']} attempts are used up: {row['error_detail'] or 'failed'}",
            f"bakeoff-queue queue requeue {row['run_id']} --reason WHY --yes",
        )  # fmt: skip
    if status == "CANCELLED":
        return Check(
            "cancelled", "blocks", f"an admin cancelled it: {row['cancel_reason']}",
            f"bakeoff-queue queue requeue {row['run_id']} --reason WHY --yes",
        )  # fmt: skip
    return Check("complete", "ok", "its result was accepted")


def _fleet(row: asyncpg.Record) -> Iterator[Check]:
    need, wanted = row["need_gb"], _quantizations(row)
    if not row["live"]:
        yield Check(
            "no_runner", "blocks",
            f"no runner is alive; {row['runners']} have registered" if row["runners"]
            else "no runner has registered",
            "start a runner; bakeoff-queue runners ls shows when each was last seen",
        )  # fmt: skip
    elif need > row["largest_live_gb"]:
        yield Check(
            "vram", "blocks",
            f"needs {need} GB; the largest live runner has {row['largest_live_gb']}, the largest"
            f" ever seen {row['largest_gb']}",
            "start a larger runner, or choose a smaller quantization; `models needs` shows what was"
            " learned beyond the rule",
        )  # fmt: skip
    else:
        yield Check("vram", "ok", f"needs {need} GB; the largest live runner has "
                    f"{row['largest_live_gb']}")  # fmt: skip
    if row["live"] and not row["supporting_live"]:
        ever = f"; {row['supporting']} that are not alive do" if row["supporting"] else ""
        yield Check(
            "quantization", "blocks", f"no live runner supports {wanted}{ever}",
            "start a runner with that quantization, or raise the key's capability caps",
        )  # fmt: skip
    elif row["live"]:
        yield Check("quantization", "ok", f"{row['supporting_live']} live runners support {wanted}")
    if row["live"] and need <= row["largest_live_gb"] and row["supporting_live"]:
        yield from _capable(row)


def _capable(row: asyncpg.Record) -> Iterator[Check]:
    counts = {name: row[name] for name in ("busy", "stale", "paused", "draining", "deferred")}
    told = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    total = f"{row['capable']} capable runners" if row["capable"] != 1 else "1 capable runner"
    detail = f"{total}: {told}" if told else total
    if row["free"]:
        yield Check("capable", "ok", f"{detail}{',' if told else ':'} {row['free']} free")
    elif row["capable"] == row["stale"]:
        yield Check(
            "capable", "blocks",
            f"{total}, none of them alive" if row["capable"]
            else "no runner has both the VRAM and the quantization",
            "start one: `bakeoff-queue runners ls` shows what each has",
        )  # fmt: skip
    elif row["busy"]:
        yield Check("capable", "waits", f"{detail}: it waits until one is free")
    elif row["deferred"]:
        yield Check(
            "capable", "waits", f"{detail}: it failed there, and others get it first",
            f"bakeoff-queue queue requeue {row['run_id']} --reason WHY --yes",
        )  # fmt: skip
    else:
        yield Check(
            "capable", "blocks", detail, "bakeoff-queue runners resume RUNNER (or start another)"
        )
    ahead = f"{row['ahead']}{' or more' if row['ahead_more'] else ''}"
    soon = _estimate(row)
    about = f", starts in about {_duration(soon)} at the last hour's rate" if soon else ""
    yield Check(
        "position", "waits" if row["ahead"] and not row["free"] else "ok",
        f"position {row['ahead'] + 1}: {ahead} runs are ahead{about}",
        f"bakeoff-queue queue set {row['run_id']} --priority 1" if row["ahead"] else None,
    )  # fmt: skip


def _quantizations(row: asyncpg.Record) -> str:
    names = dict.fromkeys((row["quantization"], row["judge_quantization"]))
    return " and ".join(names)


def _estimate(row: asyncpg.Record) -> int | None:
    """Return the seconds until a run starts at the last hour's rate; None without a rate."""
    if not row["claimed_last_hour"] or not row["capable"]:
        return None
    return round(row["ahead"] * 3600 / row["claimed_last_hour"])


def _duration(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
