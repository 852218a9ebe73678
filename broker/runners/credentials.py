"""Credentials: a runner by its token, an admin by theirs."""

from collections.abc import Sequence
from datetime import timedelta

import asyncpg

from auth import admin_tokens
from auth.errors import InvalidToken, ScopeRequired
from auth.tokens import TOKEN_REVOKED, RunnerIdentity, Tokens
from broker.audit.log import Actor, Admin
from broker.concurrency.batching import Batcher
from broker.errors import KeyRevoked
from broker.runners.revocations import Revocations, Revoked
from db import admin, runner_keys


class PostgresRevocationSource:
    """Source of revocations in PostgreSQL, used when Redis cannot answer."""

    def __init__(self, pool: asyncpg.Pool, token_life: timedelta) -> None:
        self._pool = pool
        self._token_life = token_life

    async def revoked_among(self, asked: Sequence[RunnerIdentity]) -> Sequence[bool]:
        """Return of each whether its key is not good (any more), or its token is revoked."""
        fingerprints = [runner.fingerprint for runner in asked]
        rows = await runner_keys.revoked_among(
            self._pool, fingerprints, [runner.jti for runner in asked]
        )
        bad = {row["fingerprint"] or row["jti"] for row in rows}
        return [runner.fingerprint in bad or runner.jti in bad for runner in asked]

    async def all_revocations(self) -> Sequence[Revoked]:
        """Return every revocation that a living token could meet."""
        rows = await runner_keys.all_revocations(self._pool, self._token_life)
        return [Revoked(row["fingerprint"], row["jti"], row["remaining"]) for row in rows]


class Credentials:
    """Turns a bearer token into somebody."""

    def __init__(self, pool: asyncpg.Pool, tokens: Tokens, revocations: Revocations) -> None:
        self._pool = pool
        self._tokens = tokens
        self._revocations = revocations
        self._good_admins: set[bytes] = set()  # digests, of tokens that admins made: few
        # One look for all requests that wait together.
        self._batcher: Batcher[RunnerIdentity, bool] = Batcher(revocations.revoked_among)

    async def runner(self, token: str) -> RunnerIdentity:
        """Return the runner of a token. Raises InvalidToken, TokenExpired or KeyRevoked."""
        runner = self._tokens.read(token)
        await self.check_revoked(runner)
        return runner

    async def check_revoked(self, runner: RunnerIdentity) -> None:
        """Raise InvalidToken or KeyRevoked if a token was revoked, as of this second.

        Asked again after an upload, which takes minutes. The statement of a claim sees it itself.
        """
        revoked = self._revocations.remembered(runner)
        if revoked is None:
            revoked = await self._batcher.submit(runner)
        if revoked:
            key = await runner_keys.find(self._pool, runner.fingerprint)
            if key is None or key["revoked_at"] is not None:
                raise KeyRevoked
            raise InvalidToken(TOKEN_REVOKED)

    def was_good(self, token: str) -> bool:
        """Return whether this admin token was good when it was last looked up in this process."""
        return admin_tokens.digest(token) in self._good_admins

    async def settle(self) -> None:
        """Wait until Redis knows all revocations again, where it had forgotten them."""
        await self._revocations.settle()

    async def admin(self, token: str, scope: str, address: str | None = None) -> Admin:
        """Return the admin of a token. Raises InvalidToken, or ScopeRequired without `scope`."""
        digest = admin_tokens.digest(token)
        row = await admin.find_token(self._pool, digest)
        if row is None:
            self._good_admins.discard(digest)
            raise InvalidToken("This admin token is unknown, expired or revoked.")
        self._good_admins.add(digest)
        if scope not in row["scopes"]:
            raise ScopeRequired(f"The token lacks the scope {scope}, which this address needs.")
        actor = Actor(f"admin:{row['name']}", address, row["token_id"])
        return Admin(row["name"], tuple(row["scopes"]), actor)
