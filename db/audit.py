"""The audit trail: who did what to whom, from where and why."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from db.pool import Executor
from db.queries import load

SQL = load("audit")


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: `admin:<name>`, `runner:<id>`, `database:<role>` or `system`; from which address.

    `token_id` is the admin token they came with.
    """

    name: str
    address: str | None = None
    token_id: UUID | None = None


SYSTEM = Actor("system")


async def record(
    connection: Executor,
    by: Actor,
    action: str,
    target: str | None,
    *,
    run_id: UUID | None = None,
    runner_id: str | None = None,
    **detail: Any,
) -> bool:
    """Write one row; return whether the actor's token was still good.

    `target` is what the action was about: `key:`, `run:`, `runner:` or `token:` and its id.
    """
    done = await connection.execute(
        SQL["record"],
        by.name,
        action,
        target,
        by.address,
        run_id,
        runner_id,
        by.token_id,
        detail,
    )
    return done == "INSERT 0 1"


async def database_actor(pool: Executor) -> Actor:
    """Return who works in the database itself, without the API: by their role there."""
    return Actor(f"database:{await pool.fetchval('SELECT session_user')}")
