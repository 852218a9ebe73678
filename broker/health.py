"""Is this process fit to serve? Postgres and its migrations decide; all else only degrades."""

import asyncio
from dataclasses import dataclass
from typing import Any

import asyncpg
import structlog

from broker.admin.key_rings import KeyRings
from broker.concurrency.supervision import Supervisor
from broker.leases.expiry_listener import ExpiryListener
from broker.results.active_verifier import ActiveVerifier
from db.pool import LOST, NO_PRIMARY, describe, is_writable, missing_migration, replication_risk

LOOK_S = 2.0  # a balancer asks every few seconds and waits no longer

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Readiness:
    """Readiness: whether to send requests here, and the state of each part."""

    ready: bool
    checks: dict[str, Any]


class Health:
    """Looks at what the process stands on."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        lease_client: Any,  # a Topology's
        listener: ExpiryListener,
        trusted: ActiveVerifier,
        newest_migration: str,
        supervisor: Supervisor,
        key_rings: KeyRings,
    ) -> None:
        self._key_rings = key_rings
        self._supervisor = supervisor
        self._pool = pool
        self._lease_client = lease_client
        self._listener = listener
        self._trusted = trusted
        self._newest = newest_migration
        self._draining = False

    def drain(self) -> None:
        """From now on this process is not ready: the balancer should look elsewhere."""
        self._draining = True

    async def check_replication(self) -> None:
        """Warn when a failover of PostgreSQL may lose what was acknowledged."""
        try:
            risk = await replication_risk(self._pool)
        except LOST:  # /readyz tells
            return
        if risk is not None:
            log.warning("database.replication", problem=risk)

    async def readiness(self) -> Readiness:
        """Return what /readyz answers."""
        database = await self._database()
        checks = {
            "postgres": database,
            "redis": await self._redis(),
            "listener": "ok" if self._listener.healthy.is_set() else "degraded",
            "loops": self._loops(),
            "key_rings": f"degraded: {problem}" if (problem := self._key_rings.problem) else "ok",
            "loop_success_ages_s": self._supervisor.success_ages_s,
            "trust_root": self._trusted.root_state(),
            "trust_root_age_s": round(self._trusted.root_age_s()),
            "draining": self._draining,
        }
        return Readiness(database == "ok" and not self._draining, checks)

    def _loops(self) -> str:
        """Return "ok", or which background loops have ended, or have long done nothing."""
        problems = [f"{name} {what}" for name, what in self._supervisor.problems.items()]
        return f"degraded: {'; '.join(problems)}" if problems else "ok"

    async def _database(self) -> str:
        try:
            async with asyncio.timeout(LOOK_S):
                if not await is_writable(self._pool):
                    await self._pool.expire_connections()
                    return f"read-only: {NO_PRIMARY}"
                if await missing_migration(self._pool, self._newest):
                    return f"migration {self._newest} is missing: run `bakeoff-queue db migrate`"
        except Exception as error:  # whatever it is, it is the answer to the question
            return f"unreachable: {describe(error)}"
        return "ok"

    async def _redis(self) -> str:
        try:
            async with asyncio.timeout(LOOK_S):
                await self._lease_client.ping()
        except Exception as error:  # a Cluster's client raises more than RedisError
            return f"degraded: {describe(error)}"
        return "ok"
