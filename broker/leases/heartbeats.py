"""Heartbeats: a runner keeps its lease, and hears what to do with it.

The way of a heartbeat: those that wait together renew their leases in one guarded statement; then,
behind the answer, their TTL keys in Redis live on. No row back means the guard did not fit: one
look, for all that wait for one, tells which part.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

import asyncpg

from broker.concurrency.batching import Batcher
from broker.errors import BrokerError
from broker.leases.cadence import Cadence
from broker.leases.lease_keys import LeaseKey, LeaseKeys
from broker.leases.lease_refusal import refusals
from broker.telemetry import Telemetry, failures_counted, outcome_of
from config.settings import Settings
from db import run_queue
from db.run_queue import Beat, LeaseGuard

REFUSED_MAX = 16  # requests whose dead leases, up to 64 each, are looked at by one statement


@dataclass(frozen=True, slots=True)
class Renewal:
    """A lease that lives on: until when, and what its runner is to do."""

    lease_expires_at: datetime
    directive: str
    reason: str | None
    grace_s: int | None


class Heartbeats:
    """Renews leases."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        settings: Settings,
        keys: LeaseKeys,
        telemetry: Telemetry,
        cadence: Cadence,
    ) -> None:
        self._pool = pool
        self._cadence = cadence
        self._settings = settings
        self._keys = keys
        self._outcomes = telemetry.heartbeats
        self._batcher: Batcher[Beat, asyncpg.Record | None] = Batcher(self._serve)
        # Apart from the beats: whose lease is live does not wait until it is known why another's
        # is not. All dead leases of a request are one item, so that they are one statement.
        self._refusals: Batcher[Sequence[LeaseGuard], list[BrokerError]] = Batcher(
            self._diagnose, limit=REFUSED_MAX
        )

    async def beat(self, beat: Beat) -> Renewal:
        """Renew a lease. Raises LeaseLost, RunFinished, KeyRevoked or NotFound."""
        (outcome,) = await self.beat_all([beat])
        if isinstance(outcome, BrokerError):
            raise outcome
        return outcome

    async def beat_all(self, beats: Sequence[Beat]) -> list[Renewal | BrokerError]:
        """Renew leases; return of each, in order, its renewal or what `beat` would raise."""
        with failures_counted(self._outcomes):
            rows = await asyncio.gather(*(self._batcher.submit(beat) for beat in beats))
            lost = [_guard(beat) for beat, row in zip(beats, rows, strict=True) if row is None]
            refused = iter(await self._refusals.submit(lost) if lost else [])
        outcomes: list[Renewal | BrokerError] = [
            _renewal(row) if row else next(refused) for row in rows
        ]
        for outcome in outcomes:
            told = outcome_of(outcome) if isinstance(outcome, BrokerError) else "renewed"
            self._outcomes.labels(told).inc()
        return outcomes

    async def _serve(self, beats: Sequence[Beat]) -> list[asyncpg.Record | None]:
        # The same lease beaten twice in one batch: UPDATE ... FROM would renew it once and return
        # one row, so the second sender would be told that its lease is lost.
        by_lease = {(b.run_id, b.lease_id, b.runner_id, b.fingerprint): b for b in beats}
        rows = await run_queue.beat(
            self._pool,
            list(by_lease.values()),
            ttl=timedelta(seconds=self._cadence.ttl_s),
            max_runtime_s=self._settings.max_runtime_s,
        )
        self._cadence.count(len(rows))
        self._keys.put(LeaseKey(r["queue_id"], r["lease_seq"], r["remaining"]) for r in rows)
        places = {row["place"]: row for row in rows}
        found = {key: places.get(place) for place, key in enumerate(by_lease, start=1)}
        return [found[(b.run_id, b.lease_id, b.runner_id, b.fingerprint)] for b in beats]

    async def _diagnose(self, asked: Sequence[Sequence[LeaseGuard]]) -> list[list[BrokerError]]:
        found = iter(await refusals(self._pool, [guard for guards in asked for guard in guards]))
        return [list(islice(found, len(guards))) for guards in asked]


def _guard(beat: Beat) -> LeaseGuard:
    return LeaseGuard(
        beat.run_id, beat.lease_id, beat.runner_id, beat.fingerprint, beat.instance_id
    )


def _renewal(row: asyncpg.Record) -> Renewal:
    return Renewal(row["lease_expires_at"], *directive(row))


def directive(row: asyncpg.Record) -> tuple[str, str | None, int | None]:
    """Return what a runner is to do, why, and how many seconds it has left for it.

    A run that nears its longest life is told ahead: there is time to submit, or to let go.
    """
    left_s = max(0, int(row["remaining"].total_seconds()))
    if row["cancel_requested"]:
        return "cancel", row["cancel_reason"], left_s
    if row["last_call"]:
        return "cancel", "max_runtime_s is nearly reached: the lease ends then", left_s
    if row["draining"]:
        return "drain", "an admin asked this runner to finish and stop", None
    return "continue", None, None
