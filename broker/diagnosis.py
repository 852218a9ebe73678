"""Why a guard did not fit: one look after a statement that found no row."""

from typing import NoReturn

import asyncpg

from broker.errors import KeyRevoked, LeaseLost, NotFound, RunFinished
from db import run_queue
from db.run_queue import LeaseGuard

FINISHED = ("COMPLETE", "FAILED", "CANCELLED")


async def refuse_lease(pool: asyncpg.Pool, guard: LeaseGuard) -> NoReturn:
    """Raise what a lease's guard failed on: NotFound, KeyRevoked, RunFinished or LeaseLost.

    "Not yours" and "no longer live" are the same answer, so that nobody learns who holds what.
    """
    run = await run_queue.find_for_key(pool, guard.run_id, guard.fingerprint)
    if run is None:
        raise NotFound(f"There is no run {guard.run_id} in the queue.")
    if not run["key_good"]:
        raise KeyRevoked
    if run["status"] in FINISHED:
        raise RunFinished
    raise LeaseLost
