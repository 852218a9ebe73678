"""The audit trail: every action of an admin leaves a row, in the transaction that does it."""

from typing import Any

from auth.errors import InvalidToken
from db import audit
from db.audit import SYSTEM, Actor
from db.pool import Executor

__all__ = ["SYSTEM", "Actor", "record"]


async def record(
    connection: Executor, by: Actor, action: str, target: str | None = None, **detail: Any
) -> None:
    """Write the row of an action, with `run_id` and `runner_id` where it has them.

    Raises InvalidToken when the admin's token was revoked since the request began, which rolls the
    action back.
    """
    if not await audit.record(connection, by, action, target, **detail):
        raise InvalidToken("This admin token was revoked while it was used.")
