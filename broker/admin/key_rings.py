"""Key rings of all processes compared by fingerprint, so that a kid is one key everywhere.

Each process notes its keys' fingerprints in the database when it starts, at each reload, and every
minute. A kid that is known with another fingerprint is refused: half of the processes would refuse
what the other half signs, and receipts signed before would look forged. A process that lacks a key
which another one signs with says so in its log and at /readyz, and serves on: a ring is changed
process by process.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import asyncpg
import structlog

from broker.audit.log import Admin, record
from broker.errors import Conflict, NotFound
from config.key_rings import HeldKey
from config.settings import PREFIX, Settings, SettingsRefused
from db import key_rings
from db.pool import LOST, DatabaseUnready, retries, unready

INTERVAL_S = 60.0
# A key is in use while a process noted it so lately: one that missed two notes still counts.
LATELY = timedelta(seconds=3 * INTERVAL_S)

log = structlog.get_logger()


class KeyRings:
    """`hold()` takes up a process's rings; `run()` compares them with the others' from then on."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._keys: Sequence[HeldKey] = ()
        self.problem = ""

    async def hold(self, settings: Settings) -> None:
        """Note the keys of these settings, all or none.

        Raises SettingsRefused with a line for each kid that is another key elsewhere, or
        DatabaseUnready.
        """
        keys = settings.held_keys
        await self._note(keys)
        self._keys = keys

    async def run(self, succeeded: Callable[[], None]) -> None:
        """Compare every minute until cancelled."""
        while True:
            try:
                await self.run_once()
                succeeded()
            except DatabaseUnready as error:
                log.warning("key_rings.not_compared", error=str(error))
            await asyncio.sleep(INTERVAL_S)

    async def run_once(self) -> None:
        """Note the keys again, and log what differs from other processes when that changes."""
        try:
            await self._note(self._keys)
            problem = "; ".join(await self._lacking())
        except SettingsRefused as refused:  # a kid was freed and taken by another key meanwhile
            problem = "; ".join(str(refused).splitlines())
        if problem and problem != self.problem:
            log.warning("key_rings.differ", problem=problem)
        self.problem = problem

    async def _note(self, keys: Sequence[HeldKey]) -> None:
        try:
            await self._add(keys)
        except LOST as error:
            raise unready(error) from None

    @retries
    async def _add(self, keys: Sequence[HeldKey]) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            same = await key_rings.hold(connection, keys)
            if other := [key for key in keys if (key.ring, key.kid) not in same]:
                # Rolls back: the other kids of a ring that is refused may be as wrong.
                raise SettingsRefused("\n".join(map(_another, other)))

    async def _lacking(self) -> list[str]:
        held = {(key.ring, key.kid) for key in self._keys}
        try:
            signing = await key_rings.signing(self._pool, LATELY)
        except LOST as error:
            raise unready(error) from None
        return [_lacks(ring, kid) for ring, kid in signing if (ring, kid) not in held]


class RingAdmin:
    """Lists the known keys of the rings, and forgets one that no process holds any more."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def list_all(self) -> list[dict[str, Any]]:
        """Return every known key's ring, kid, fingerprint and times."""
        return [dict(row) for row in await key_rings.list_all(self._pool)]

    @retries
    async def forget(self, by: Admin, ring: str, kid: str, reason: str) -> dict[str, Any]:
        """Forget a kid, which may then be another key's. Raises NotFound or Conflict."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await key_rings.lock(connection, ring, kid, LATELY)
            if row is None:
                raise NotFound(f"{ring} has no kid {kid}; see `bakeoff-queue rings ls`.")
            if row["held"]:
                raise Conflict(
                    f"A process had {kid} in its ring at {row['held_at']:%Y-%m-%dT%H:%M:%SZ}: take"
                    f" it out of all rings, reload, and try again {LATELY.seconds} s later."
                )
            await key_rings.forget(connection, ring, kid)
            fingerprint = row["fingerprint"]
            await record(connection, by.actor, "ring.forget", f"ring:{ring}/{kid}",
                         fingerprint=fingerprint, reason=reason)  # fmt: skip
        return {"ring": ring, "kid": kid, "fingerprint": fingerprint}


def _another(key: HeldKey) -> str:
    return (
        f"{PREFIX}{key.ring.upper()}: the kid {key.kid} is another key here than in the processes"
        " that had it before: give the new key a new kid, or copy the ring of the other processes;"
        f" a kid that no process has any more is freed by `bakeoff-queue rings forget {key.ring}"
        f" {key.kid}`"
    )


def _lacks(ring: str, kid: str) -> str:
    return (
        f"{PREFIX}{ring.upper()} lacks the kid {kid}, which another process signed with in the last"
        f" {LATELY.seconds} s: give all processes the same ring, a new key first behind the others,"
        " then in front"
    )
