"""Pauses of the queue or of one model: nothing of it is handed out; live leases go on."""

from typing import Any
from uuid import UUID

import asyncpg

from broker.audit.log import Admin, record
from broker.documents.times import time_to_come
from broker.errors import NotFound
from db import models, run_queue
from db.pool import Executor, retries


class Pauses:
    """Pauses and resumes the queue or a model."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def in_force(self) -> list[dict[str, Any]]:
        """Return the pauses that hold now: scope, model, reason, paused_at, until, paused_by."""
        return [dict(row.items()) for row in await run_queue.pauses(self._pool)]

    @retries
    async def pause(
        self, by: Admin, model: str | None, reason: str, until: str | None
    ) -> list[dict[str, Any]]:
        """Pause the models of this name or model_id, or the queue without one, until a time.

        Returns the pauses that hold now. Raises NotFound, and InvalidRequest for a past time.
        """
        end = time_to_come(until, "/until") if until else None
        async with self._pool.acquire() as connection, connection.transaction():
            for model_id in await _models(connection, model):
                done = await run_queue.pause(connection, model_id, reason, end, by.actor.name)
                await record(
                    connection, by.actor, "queue.pause", f"queue:{done['scope']}",
                    reason=reason, until=until, model=model,
                )  # fmt: skip
        return await self.in_force()

    @retries
    async def resume(
        self, by: Admin, model: str | None, reason: str | None
    ) -> list[dict[str, Any]]:
        """End the pause of the models of this name or model_id, or of the queue; return the rest.

        Raises NotFound.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            for model_id in await _models(connection, model):
                was_paused = await run_queue.resume(connection, model_id)
                await record(
                    connection, by.actor, "queue.resume", f"queue:{model_id or 'queue'}",
                    reason=reason, model=model, was_paused=was_paused,
                )  # fmt: skip
        return await self.in_force()


async def _models(connection: Executor, model: str | None) -> list[UUID | None]:
    if model is None:
        return [None]
    found = await models.named(connection, model)
    if not found:
        raise NotFound("There is no model of this name or model_id in the database.")
    return [*found]
