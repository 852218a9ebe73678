"""The tokens that runners were given: which of them live, and the revocation of a single one.

A stolen token is taken back without the key: its runner registers again, and keeps its leases.
"""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg

from auth.tokens import Tokens
from broker.audit.log import Admin, record
from broker.errors import NotFound
from broker.runners.revocations import Revocations, Revoked
from db import runner_keys, runners
from db.pool import retries


class RunnerTokens:
    """Lists and revokes the tokens of a runner."""

    def __init__(self, pool: asyncpg.Pool, tokens: Tokens, revocations: Revocations) -> None:
        self._pool = pool
        self._life = tokens.life
        self._revocations = revocations

    async def list_living(self, runner_id: str) -> list[dict[str, Any]]:
        """Return {jti, key_fingerprint, issued_at, expires_at, address, revoked} of each token.

        Newest first; none for a runner that nobody knows.
        """
        rows = await runners.living_tokens(self._pool, runner_id, self._life)
        return [dict(row) for row in rows]

    @retries
    async def revoke(self, by: Admin, runner_id: str, jti: UUID, reason: str) -> dict[str, Any]:
        """Revoke a living token of a runner; return {runner_id, jti, expires_at}.

        Revoking again changes nothing. Raises NotFound.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            rows = await runners.living_tokens(connection, runner_id, self._life)
            token = next((row for row in rows if row["jti"] == jti), None)
            if token is None:
                raise NotFound(f"No token {jti} of {runner_id} lives.")
            key = token["key_fingerprint"]
            if await runner_keys.revoke_token(connection, jti, token["expires_at"], key):
                await record(
                    connection, by.actor, "runner_token.revoke", f"runner-token:{jti}",
                    runner_id=runner_id, reason=reason,
                )  # fmt: skip
        remaining = token["expires_at"] - datetime.now(UTC)
        await self._revocations.write([Revoked(None, jti, remaining)])
        return {"runner_id": runner_id, "jti": jti, "expires_at": token["expires_at"]}
