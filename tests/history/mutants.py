"""Three broken variants of the service, switched on only here: the checker must catch each.

A replaced fragment that is no longer in the SQL is an error, not a mutant that does nothing.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

from broker.leases.expiry_node import ExpiryNode
from broker.leases.lease_keys import PREFIX
from broker.leases.sweep import Sweep
from db import run_queue

FENCE = "AND q.lease_id = $2 AND q.claimed_by = $3"
NO_FENCE = "AND ($2::uuid IS NOT NULL AND $3::text IS NOT NULL)"
FLIP = """
UPDATE run_queue SET
    status = 'PENDING', lease_expires_at = NULL, lease_slot = NULL, claim_key = NULL,
    claim_digest = NULL
WHERE queue_id = $1 AND lease_seq = $2 AND status IN ('CLAIMED', 'IN_PROGRESS')
"""


def no_submit_fence() -> None:
    """`complete` accepts a result from anybody, whoever holds the lease by now."""
    statement = run_queue.SQL["complete"]
    assert statement.count(FENCE) == 1, "the fence of `complete` reads differently now"
    run_queue.SQL["complete"] = statement.replace(FENCE, NO_FENCE)


def trust_the_event() -> None:
    """An expired key makes its lease's run PENDING at once, whatever the deadline says."""
    take = ExpiryNode._take
    flips: set[asyncio.Task[None]] = set()

    def trusting(self: ExpiryNode, message: dict[str, Any]) -> None:
        take(self, message)
        name = message["data"] if message["type"] == "message" else b""
        if isinstance(name, bytes) and name.count(b":") == 2:
            task = asyncio.create_task(_flip(self, name.decode()))
            flips.add(task)
            task.add_done_callback(flips.discard)

    ExpiryNode._take = trusting


async def _flip(node: ExpiryNode, name: str) -> None:
    sweep = getattr(node._notify, "__self__", None)
    assert isinstance(sweep, Sweep), "the bell rings something else now"
    queue_id, _, lease_seq = name.removeprefix(PREFIX).partition(":")
    await sweep._pool.execute(FLIP, UUID(queue_id), int(lease_seq))


def no_claim_key() -> None:
    """The Idempotency-Key of a claim is ignored: each statement sees a new one."""
    claim = run_queue.claim

    async def forgetful(
        pool: Any, claimants: Sequence[run_queue.Claimant], **offer: Any
    ) -> list[Any]:
        fresh = [dataclasses.replace(each, claim_key=str(uuid4())) for each in claimants]
        return await claim(pool, fresh, **offer)

    run_queue.claim = forgetful


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant for mutant in (no_submit_fence, trust_the_event, no_claim_key)
}
