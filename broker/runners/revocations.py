"""Is this key, or this token, revoked? Redis answers fast; the authority answers when it cannot.

Redis holds `revoked:key:<fingerprint>` and `revoked:jti:<jti>`, each for as long as a token that it
concerns may live, and `revoked:loaded`, which says that the others are all there. A flushed or new
Redis lacks that one, so a flush cannot un-revoke: the authority is asked and Redis is filled again.
An answer is remembered for a second at most; the guards in SQL check the key once more, so a late
answer can never let a write through.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol
from uuid import UUID

import structlog

from auth.tokens import RunnerIdentity
from broker.concurrency.ttl_cache import TTLCache

LOADED = "revoked:loaded"
LOOK_S = 0.1  # so long may one look take
AWAY_S = 1.0  # between two tries whether a Redis that was too slow is back
FILL = "fill"

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


class RevocationSource(Protocol):
    """Interface of the authority on revocations: PostgreSQL, through credentials.py."""

    async def revoked_among(self, asked: Sequence[RunnerIdentity]) -> Sequence[bool]:
        """Return of each whether its key is not good (any more), or its token is revoked."""
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
    """Looks revocations up, and writes them.

    A Redis that is away, or slow, is left alone until it has proved itself again behind the
    answers: the batch that noticed it waits `LOOK_S`, and no other request waits at all.
    """

    def __init__(self, client: Any, authority: RevocationSource) -> None:
        """Ask `client`, of redis-py: a server's, a Sentinel's or a Cluster's."""
        self._client = client
        self._authority = authority
        self._remembered: TTLCache[UUID, bool] = TTLCache()
        self._away = False
        self._behind: set[asyncio.Task[None]] = set()

    def remembered(self, runner: RunnerIdentity) -> bool | None:
        """Return whether the token or its key is revoked, as of this second; None: unknown."""
        return self._remembered.get(runner.jti)

    async def revoked_among(self, asked: Sequence[RunnerIdentity]) -> Sequence[bool]:
        """Return of each whether the token, or the key it was given to, is revoked."""
        found = await self._ask(asked)
        self._remembered.put(
            (claims.jti, revoked) for claims, revoked in zip(asked, found, strict=True)
        )
        return found

    async def write(self, revocations: Sequence[Revoked]) -> None:
        """Tell Redis of revocations that are committed; best effort, the guards hold without it."""
        self._remembered.clear()
        try:
            await self._write(revocations)
        except Exception as error:  # a Cluster's client raises more than RedisError
            log.warning("revocations.unwritten", error=type(error).__name__)
            # It may be back in a moment, with all but these: not believed until it is filled again.
            self._leave_alone(error)

    async def settle(self) -> None:
        """Wait until Redis has been filled again, where that was begun."""
        while filling := [task for task in self._behind if task.get_name() == FILL]:
            await asyncio.wait(filling)

    async def close(self) -> None:
        """End what is done behind the answers."""
        for task in self._behind:
            task.cancel()
        await asyncio.gather(*self._behind, return_exceptions=True)

    async def _ask(self, asked: Sequence[RunnerIdentity]) -> Sequence[bool]:
        if not self._away:
            try:
                async with asyncio.timeout(LOOK_S):
                    loaded, found = await self._look(asked)
            except Exception as error:  # a Cluster's client raises more than RedisError
                self._leave_alone(error)
            else:
                if loaded:
                    return found
                self._do_behind(self._fill(), FILL)
        return await self._authority.revoked_among(asked)

    async def _look(self, asked: Sequence[RunnerIdentity]) -> tuple[bool, list[bool]]:
        """Return whether Redis holds all revocations, and what it says of each.

        Not MGET: in a Cluster the keys lie on different nodes (CROSSSLOT).
        """
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.execute_command("GET", LOADED)
            for claims in asked:
                pipeline.execute_command("GET", key_name(claims.fingerprint))
                pipeline.execute_command("GET", token_name(claims.jti))
            loaded, *found = await pipeline.execute()
        by_key, by_token = found[::2], found[1::2]
        return loaded is not None, [
            key is not None or token is not None
            for key, token in zip(by_key, by_token, strict=True)
        ]

    def _leave_alone(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            log.warning("revocations.unreachable", error=type(error).__name__)
            self._do_behind(self._watch(), "watch")

    async def _watch(self) -> None:
        """Return once Redis answers in time again, and holds what was revoked while it did not."""
        while True:
            await asyncio.sleep(AWAY_S)
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._look(())
                await self._fill_again()
            except Exception as error:
                log.debug("revocations.still_unreachable", error=type(error).__name__)
            else:
                self._away = False
                return

    async def _fill_again(self) -> None:
        await self._write(await self._authority.all_revocations())
        # Last, and for a while only: what expired or was evicted meanwhile is filled in again.
        await self._client.set(LOADED, 1, ex=60)

    async def _fill(self) -> None:
        try:
            await self._fill_again()
        except Exception as error:  # the next look finds it missing, and begins again
            log.warning("revocations.unwritten", error=type(error).__name__)

    async def _write(self, revocations: Sequence[Revoked]) -> None:
        async with self._client.pipeline(transaction=False) as pipeline:
            for each in revocations:
                pipeline.set(each.name, 1, px=max(1, int(each.remaining.total_seconds() * 1000)))
            await pipeline.execute()

    def _do_behind(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Start it, unless it is going on already."""
        if any(task.get_name() == name for task in self._behind):
            work.close()
            return
        task = asyncio.create_task(work, name=name)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
