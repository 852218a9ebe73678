"""Is this key, or this token, revoked? Redis answers fast; the authority answers when it cannot.

Redis holds `revoked:key:<fingerprint>` and `revoked:jti:<jti>`, each for as long as a token that it
concerns may live, and `revoked:loaded`, which says that the others are all there. A flushed or new
Redis lacks that one, so a flush cannot un-revoke: the authority is asked and Redis is filled again.
An answer is remembered for a second at most; the guards in SQL check the key once more, so a late
answer can never let a write through.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol
from uuid import UUID

import structlog

from auth.tokens import RunnerClaims

REMEMBERED_S = 1.0
REMEMBERED_MAX = 50_000
LOADED = "revoked:loaded"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Revoked:
    """One revocation: of a key or of a token, and how long anything it concerns may live."""

    fingerprint: str | None
    jti: UUID | None
    remaining: timedelta

    @property
    def name(self) -> str:
        """Its key in Redis."""
        return key_name(self.fingerprint) if self.fingerprint else token_name(self.jti)


class Authority(Protocol):
    """Who knows for certain: Postgres, through `broker/credentials.py`."""

    async def is_revoked(self, claims: RunnerClaims) -> bool:
        """Return whether the key is not good (any more), or the token is revoked."""
        ...

    async def all_revocations(self) -> Sequence[Revoked]:
        """Return every revocation that a living token could meet."""
        ...


def key_name(fingerprint: str) -> str:
    """Return the Redis key that says a runner key is revoked."""
    return f"revoked:key:{fingerprint}"


def token_name(jti: UUID | None) -> str:
    """Return the Redis key that says a token is revoked."""
    return f"revoked:jti:{jti}"


class Revocations:
    """Looks revocations up, and writes them."""

    def __init__(self, client: Any, authority: Authority) -> None:
        """Ask `client`, of redis-py: a server's, a Sentinel's or a Cluster's."""
        self._client = client
        self._authority = authority
        self._remembered: dict[UUID, tuple[float, bool]] = {}

    async def is_revoked(self, claims: RunnerClaims) -> bool:
        """Return whether the token, or the key it was given to, is revoked."""
        known = self._remembered.get(claims.jti)
        if known is not None and time.monotonic() - known[0] < REMEMBERED_S:
            return known[1]
        revoked = await self._ask(claims)
        if len(self._remembered) >= REMEMBERED_MAX:
            self._remembered.clear()
        self._remembered[claims.jti] = (time.monotonic(), revoked)
        return revoked

    async def write(self, revocations: Sequence[Revoked]) -> None:
        """Tell Redis of revocations that are committed; best effort, the guards hold without it."""
        self._remembered.clear()
        await self._try(self._write, revocations)

    async def _ask(self, claims: RunnerClaims) -> bool:
        names = [key_name(claims.fingerprint), token_name(claims.jti), LOADED]
        try:
            by_key, by_token, loaded = await self._get(names)
        except Exception as error:  # a Cluster's client raises more than RedisError
            log.warning("revocations.unreachable", error=type(error).__name__)
            return await self._authority.is_revoked(claims)
        if loaded is None:
            await self._try(self._fill, await self._authority.all_revocations())
            return await self._authority.is_revoked(claims)
        return by_key is not None or by_token is not None

    async def _get(self, names: Sequence[str]) -> Sequence[bytes | None]:
        """Not MGET: in a Cluster the keys lie on different nodes (CROSSSLOT)."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.get(name)
            return await pipeline.execute()

    async def _fill(self, revocations: Sequence[Revoked]) -> None:
        await self._write(revocations)
        # Last, and for a while only: what expired or was evicted meanwhile is filled in again.
        await self._client.set(LOADED, 1, ex=60)

    async def _write(self, revocations: Sequence[Revoked]) -> None:
        async with self._client.pipeline(transaction=False) as pipeline:
            for each in revocations:
                pipeline.set(each.name, 1, px=max(1, int(each.remaining.total_seconds() * 1000)))
            await pipeline.execute()

    async def _try(
        self, write: Callable[[Sequence[Revoked]], Awaitable[None]], what: Sequence[Revoked]
    ) -> None:
        try:
            await write(what)
        except Exception as error:  # a Cluster's client raises more than RedisError
            log.warning("revocations.unwritten", error=type(error).__name__)
