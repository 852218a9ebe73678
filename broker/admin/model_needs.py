"""Learned VRAM needs: list what failures and results taught, and forget it."""

from typing import Any
from uuid import UUID

import asyncpg

from broker.audit.log import Admin, record
from broker.errors import NotFound
from db import models
from db.pool import retries


class ModelNeeds:
    """Lists and resets the needs that were raised by `oom` failures."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def list(self) -> list[dict[str, Any]]:
        """Return model_id, name, quantization, rule_gb, need_gb, learned_from and learned_at."""
        return [dict(row.items()) for row in await models.learned_needs(self._pool)]

    @retries
    async def forget(self, by: Admin, model_id: UUID, reason: str) -> None:
        """Let upstream's rule count again for a model. Raises NotFound for an unknown model."""
        async with self._pool.acquire() as connection, connection.transaction():
            forgotten = await models.forget_need(connection, model_id)
            if forgotten is None:
                raise NotFound(f"There is no model {model_id} in the database.")
            if forgotten["need_gb"] is not None:
                await record(
                    connection, by.actor, "model.need.forget", f"model:{model_id}",
                    need_gb=forgotten["need_gb"], reason=reason,
                )  # fmt: skip
