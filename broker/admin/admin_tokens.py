"""Admin tokens: minted, listed and revoked, by an admin or by whoever can write to the database."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from auth import admin_tokens
from auth.errors import ScopeRequired
from broker.audit.log import Admin, record
from broker.documents.times import time_to_come
from broker.errors import Conflict, InvalidRequest, NotFound, Violation
from db import admin
from db.pool import retries

DEFAULT_LIFE = timedelta(days=90)
LONGEST_LIFE = timedelta(days=366)


class TokenAdmin:
    """Gives admin tokens, and takes them back."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def list_all(self) -> list[dict[str, Any]]:
        """Return every token, oldest first, revoked ones included; never the secret or digest."""
        return [dict(row) for row in await admin.list_tokens(self._pool)]

    @retries
    async def mint(self, by: Admin, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Make a token and return its row with the secret, which is shown this once.

        Raises InvalidRequest, ScopeRequired for a scope that `by` has not, or Conflict when a
        living token has the name.
        """
        scopes = list(dict.fromkeys(wanted["scopes"]))
        _check_scopes(by, scopes)
        expires_at = _expiry(wanted.get("expires_at"))
        token, digest = admin_tokens.make()
        async with self._pool.acquire() as connection, connection.transaction():
            row = await admin.add_token(
                connection, digest, wanted["name"], scopes, expires_at, by.actor.name
            )
            if row is None:
                raise Conflict("A token has this name: revoke that one first, or take another.")
            await record(
                connection,
                by.actor,
                "token.mint",
                f"token:{row['token_id']}",
                name=row["name"],
                scopes=scopes,
                expires_at=expires_at.isoformat(),
            )
        return {**row, "token": token}

    @retries
    async def revoke(self, by: Admin, token_id: UUID, reason: str) -> dict[str, Any]:
        """Revoke a token; return {token_id, name, revoked_at}. Revoking again changes nothing.

        Raises NotFound, or Conflict for the last living token with the scope `admin`.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            keepers = await admin.lock_keepers(connection)
            if keepers == {token_id}:
                raise Conflict("It is the last token with the scope admin: mint another one first.")
            row = await admin.lock_token(connection, token_id)
            if row is None:
                raise NotFound(f"There is no token {token_id}.")
            if row["revoked_at"] is None:
                # Before the revocation: a token may revoke itself.
                await record(
                    connection, by.actor, "token.revoke", f"token:{token_id}",
                    name=row["name"], reason=reason,
                )  # fmt: skip
                row = await admin.revoke_token(connection, token_id, by.actor.name, reason)
        return dict(row)


def _check_scopes(by: Admin, scopes: Sequence[str]) -> None:
    """A token gives no more than it has: who may mint does not thereby gain all scopes."""
    lacking = [scope for scope in scopes if scope not in by.scopes]
    if lacking:
        raise ScopeRequired(f"The token lacks the scope {lacking[0]}, so it cannot give it.")


def _expiry(text: str | None) -> datetime:
    now = datetime.now(UTC)
    if text is None:
        return now + DEFAULT_LIFE
    at = time_to_come(text, "/expires_at")
    if at > now + LONGEST_LIFE:
        detail = f"is more than {LONGEST_LIFE.days} days from now"
        raise InvalidRequest(f"expires_at {detail}.", (Violation("/expires_at", detail),))
    return at
