"""Why a guard did not fit: one look after a statement that found no row."""

from collections.abc import Sequence
from typing import NoReturn

import asyncpg

from broker.errors import BrokerError, KeyRevoked, LeaseLost, NotFound, RunFinished
from db import run_queue
from db.run_queue import LeaseGuard

FINISHED = ("COMPLETE", "FAILED", "CANCELLED")


async def raise_lease_error(pool: asyncpg.Pool, guard: LeaseGuard) -> NoReturn:
    """Raise what a lease's guard failed on: NotFound, KeyRevoked, RunFinished or LeaseLost."""
    (refusal,) = await refusals(pool, [guard])
    raise refusal


async def refusals(pool: asyncpg.Pool, guards: Sequence[LeaseGuard]) -> list[BrokerError]:
    """Return what each of these guards failed on, by one statement for all of them.

    "Not yours" and "no longer live" are the same answer, so that nobody learns who holds what.
    """
    rows = await run_queue.why_refused(pool, guards)
    return [_refusal(guard, row) for guard, row in zip(guards, rows, strict=True)]


def _refusal(guard: LeaseGuard, row: asyncpg.Record) -> BrokerError:
    if row["status"] is None:
        return NotFound(f"There is no run {guard.run_id} in the queue.")
    if not row["key_good"]:
        return KeyRevoked()
    if row["other_process"]:
        return LeaseLost(
            "Another process of this runner holds this lease: to take it over,"
            f" POST /api/queue/{guard.run_id}/resume."
        )
    return RunFinished() if row["status"] in FINISHED else LeaseLost()
