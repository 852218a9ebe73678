"""Moderation: what an admin decides about an accepted result, with a reason, on the record.

The rows and the bytes of a result stay whatever is decided: a state says whether readers of the
metrics shall count it (the view `accepted_results`), and every decision can be looked up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any
from uuid import UUID

import asyncpg

from broker.audit.log import Admin, record
from broker.errors import Conflict, NotFound
from db import submissions
from db.pool import retries

STATES = ("accepted", "superseded", "disputed", "revoked")
# From each state to which others. A revoked number has been declared wrong in public: to bring it
# back takes a dispute with its reason and then a second decision, both on record.
EDGES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "accepted": frozenset({"superseded", "disputed", "revoked"}),
        "superseded": frozenset({"accepted", "disputed", "revoked"}),
        "disputed": frozenset({"accepted", "superseded", "revoked"}),
        "revoked": frozenset({"disputed"}),
    }
)


@dataclass(frozen=True, slots=True)
class Decision:
    """A state that a result has now; `changed_at` is None when it had it before."""

    former: str
    state: str
    changed_at: datetime | None


class Moderation:
    """Changes the states of accepted results."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    @retries
    async def decide(
        self, by: Admin, run_id: UUID, state: str, reason: str, former: str | None = None
    ) -> Decision:
        """Give a result another state, with its audit row, in one transaction.

        `former` is the state the admin saw, the present one if None. A result that is in `state`
        already stays as it is. Raises NotFound; Conflict when its state is not `former` (another
        admin was faster), or when no decision leads from there to `state`.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            present = await submissions.find_state(connection, run_id)
            if present is None:
                raise NotFound(f"There is no accepted result of run {run_id}.")
            if present == state:
                return Decision(present, state, None)
            seen = former or present
            check_edge(seen, state)
            row = await submissions.moderate(connection, run_id, seen, state, reason, by.actor.name)
            if row is None:
                raise Conflict(
                    f"The result is not {seen} any more: look at it again (results show),"
                    " another admin was faster."
                )
            await record(
                connection,
                by.actor,
                "result.state",
                f"run:{run_id}",
                run_id=run_id,
                runner_id=row["runner_id"],
                former=seen,
                state=state,
                reason=reason,
            )
        return Decision(seen, state, row["state_changed_at"])


def check_edge(former: str, state: str) -> None:
    """Raise Conflict unless a decision may lead from one state to the other."""
    if state not in EDGES[former]:
        others = ", ".join(sorted(EDGES[former]))
        raise Conflict(f"A {former} result cannot become {state} directly, only: {others}.")


def told_state(submission: asyncpg.Record) -> dict[str, Any]:
    """Return what is shown of a submission's state beside its receipt."""
    return {
        "state": submission["state"],
        "reason": submission["state_reason"],
        "changed_at": submission["state_changed_at"],
    }
