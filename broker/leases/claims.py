"""Claims: a runner asks for the next run that fits its hardware.

The way of a claim: `claim()` looks; requests that wait together are served by one statement
(`db/sql/run_queue.sql`, `claim`), which checks the keys, gives back the lease of a claim that is
sent again, holds each runner to its lease limit and hands out the runs in the queue's order.
Nothing there and time to wait: the request waits among the parked claims, in memory, until there is
something that fits it.
"""

import asyncio
import itertools
import math
import random
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import asyncpg
import structlog

from auth.errors import InvalidToken
from auth.tokens import TOKEN_REVOKED, RunnerIdentity
from broker.concurrency.batching import Batcher
from broker.errors import (
    Busy,
    Conflict,
    Draining,
    KeyNotAllowed,
    KeyRevoked,
    LeaseLimit,
    RunnerPaused,
)
from broker.leases.cadence import Cadence
from broker.leases.lease_keys import LeaseKey, LeaseKeys
from broker.leases.lease_refusal import refusals
from broker.leases.matching import (
    Capabilities,
    Offer,
    Reason,
    count,
    due_in,
    failed_here,
    reasons,
)
from broker.leases.parked_claims import ParkedClaims
from broker.telemetry import Telemetry, failures_counted
from config.settings import Settings
from db import run_queue, runners
from db.run_queue import Claimant, LeaseGuard

# Two claims of one runner may race for a lease slot; the loser looks again and sees the winner.
RACES_MAX = 5
LOOK_AGAIN_S = 0.01  # times the number of looks before: the first is repeated at once
RETRY_AFTER_DEFAULT_S = 30
RETRY_AFTER_MOST_S = 300
# A wait that our stop cut short goes on at another process, at once.
RETRY_AFTER_DRAIN_S = 1
# Of so many runs that are granted, one may be of those that others overtook (`promote_aged`). They
# are looked for at most once a second, as the look costs a few milliseconds.
AGED_SHARE = 4
PROMOTE_PAUSE_S = 1.0
# A runner that asks why it gets nothing is told of so many runs per model, and not of a million.
EXPLAINED_MAX = 1000

log = structlog.get_logger()


class Claims:
    """Hands out runs. One per process; any number of processes share the queue."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        settings: Settings,
        keys: LeaseKeys,
        telemetry: Telemetry,
        cadence: Cadence,
        parked_max: int,
    ) -> None:
        self._pool = pool
        self._cadence = cadence
        self._settings = settings
        self._keys = keys
        self._telemetry = telemetry
        self._batcher: Batcher[Claimant, asyncpg.Record] = Batcher(
            self._claim_runs,
            undelivered=self._undelivered,
            # Two requests of a runner in one statement would be given the same lease slot.
            exclusive_key=lambda claimant: claimant.runner_id,
        )
        self._offers: Batcher[int, list[Offer]] = Batcher(self._look_around)
        self._places = itertools.count()
        self._releases: set[asyncio.Task[None]] = set()
        self._draining = False
        self._granted = 0  # since overtaken runs had their share
        self._promote_at = 0.0  # loop time
        self.parked = ParkedClaims(self._offers.submit, settings.claim_recheck_s, parked_max)

    async def claim(self, claimant: Claimant, wait_s: float) -> asyncpg.Record | None:
        """Return the run for `claimant`, as `claim` of run_queue.sql has it, or None.

        Waits up to `wait_s` seconds for one. Raises KeyNotAllowed, KeyRevoked, InvalidToken (the
        token was revoked), RunnerPaused, LeaseLimit, Conflict when the Idempotency-Key was used
        with another body, and Draining when this process is stopping: a balancer then asks another
        one, where the claim may wait.
        """
        outcomes = self._telemetry.claims
        with failures_counted(outcomes):
            row = await self._claim(claimant, wait_s)
        if row is None:
            outcomes.labels("empty").inc()
        else:
            outcomes.labels("granted" if row["granted_at"] else "replayed").inc()
            if row["waited"] is not None:
                self._telemetry.queue_wait_seconds.observe(row["waited"].total_seconds())
        return row

    async def _claim(self, claimant: Claimant, wait_s: float) -> asyncpg.Record | None:
        if self._draining:
            raise Draining
        loop = asyncio.get_running_loop()
        until, place, woken = loop.time() + wait_s, next(self._places), False
        while True:
            seen_generation = (
                self.parked.generation
            )  # before the look: what rings meanwhile is not lost
            try:
                row = await self._batcher.submit(claimant)
                await self._refuse(claimant, row)
            except BaseException:
                if woken:
                    self.parked.notify()  # the run that this claim was woken for is the next one's
                raise
            if woken and row["granted_at"] is None and (row["queue_id"] or row["draining"]):
                self.parked.notify()  # likewise, of one that drains now or got its own lease again
            if row["queue_id"] is not None:
                return row
            left_s = until - loop.time()
            # A draining runner gets nothing: in the room it would be woken before all others.
            if left_s <= 0 or row["draining"] or self._draining or self.parked.is_full:
                return None
            woken = await self.parked.wait(
                place, claimant.runner_id, claimant.capabilities, seen_generation, left_s
            )

    async def resume(self, runner: RunnerIdentity, run_id: UUID) -> asyncpg.Record:
        """Return a run that this runner holds as `claim` does, for a process that lost its job.

        The lease is from now on that of this process, under another lease_id. Raises LeaseLost,
        RunFinished, KeyRevoked or NotFound.
        """
        key = await run_queue.take_over(
            self._pool,
            run_id,
            runner_id=runner.runner_id,
            fingerprint=runner.fingerprint,
            instance_id=runner.instance_id,
            token=runner.jti,
            claim_key=f"resume {run_id}",  # with a blank: no Idempotency-Key has one
            ttl=timedelta(seconds=self._cadence.ttl_s),
            max_runtime_s=self._settings.max_runtime_s,
        )
        if key is not None:
            who = runner.runner_id, runner.fingerprint, runner.instance_id, runner.jti
            # Nothing fits it: when the lease ends between the statements, no other run is granted.
            row = await self._batcher.submit(Claimant(*who, key, "", Capabilities(0, ())))
            if row["queue_id"] is not None:
                return row
        none = UUID(int=0)  # the runner shows no lease_id
        who = runner.runner_id, runner.fingerprint, runner.instance_id
        (refusal,) = await refusals(self._pool, [LeaseGuard(run_id, none, *who)])
        raise refusal

    async def retry_after_s(self, capabilities: Capabilities) -> int:
        """Return the seconds until a deferred run that fits comes due; 30 when there is none.

        Never more than some minutes: what is enqueued meanwhile would find the runner asleep.
        """
        if self._draining:
            return RETRY_AFTER_DRAIN_S
        due = due_in(await self._offers.submit(1), capabilities)
        if due is None:
            return RETRY_AFTER_DEFAULT_S
        return min(max(1, math.ceil(due.total_seconds())), RETRY_AFTER_MOST_S)

    async def explain(self, runner_id: str, capabilities: Capabilities) -> list[Reason]:
        """Return why this runner, of these capabilities, gets nothing."""
        offers = await self._offers.submit(EXPLAINED_MAX)
        avoided = await run_queue.avoided_by(self._pool, runner_id)
        found = [*reasons(offers, capabilities), *failed_here([row["until"] for row in avoided])]
        if await runners.is_draining(self._pool, runner_id):
            detail = "an admin asked this runner to finish and stop: it gets nothing until resumed"
            return [Reason("draining", count(offers), detail, None), *found]
        return found

    async def undo(self, row: asyncpg.Record) -> None:
        """Release the lease of a claim whose answer could not be delivered.

        It stays if the runner may have it all the same: the claim was sent more than once, and
        another answer gave it the same lease.
        """
        if row["granted_at"] is None:
            return
        holder = row["holder"], row["holder_key"], row["holder_instance"]
        guard = LeaseGuard(row["run_id"], row["lease_id"], *holder)
        reason = "the claim's answer was not delivered"
        ended = await run_queue.release(
            self._pool, guard, reason, untouched_since=row["granted_at"]
        )
        if ended is not None:
            self._keys.drop([LeaseKey(row["queue_id"], row["lease_seq"])])

    def drain(self) -> None:
        """Answer every parked claim at once: nothing for now, try again."""
        self._draining = True
        self.parked.release_all()

    async def close(self) -> None:
        """Wait for the releases of undelivered claims."""
        await asyncio.gather(*self._releases)

    async def _look_around(self, bounds: Sequence[int]) -> list[list[Offer]]:
        """One look at what the queue has, for all who ask together, by the largest bound."""
        rows = await run_queue.offers(self._pool, max(bounds))
        return [[Offer.from_row(row) for row in rows]] * len(bounds)

    async def _claim_runs(self, claimants: Sequence[Claimant]) -> list[asyncpg.Record]:
        """Serve those that wait together, by one statement; by more while others hold the rows."""
        rows: dict[int, asyncpg.Record] = {}
        waiting = dict(enumerate(claimants))
        await self._promote_aged()
        for look in range(RACES_MAX):
            self._telemetry.claim_batch_size.observe(len(waiting))
            try:
                with self._telemetry.claim_seconds.time():
                    found = await run_queue.claim(
                        self._pool,
                        list(waiting.values()),
                        ttl=timedelta(seconds=self._cadence.ttl_s),
                        max_leases=self._settings.max_leases,
                        max_runtime_s=self._settings.max_runtime_s,
                        by_fit=self._settings.aging_s > 0,
                    )
            except asyncpg.UniqueViolationError:
                continue
            except Exception:
                if not any(row["queue_id"] for row in rows.values()):
                    raise
                break  # what an earlier look granted is committed: its runners must hear of it
            rows.update(zip(waiting, found, strict=True))
            granted = {i: rows[i] for i in waiting if rows[i]["queue_id"] is not None}
            self._keys.put(
                LeaseKey(row["queue_id"], row["lease_seq"], row["remaining"])
                for row in granted.values()
            )
            self._granted += len(granted)
            # While others hold rows that we could take, those who got nothing look again.
            waiting = {i: c for i, c in waiting.items() if i not in granted}
            if not waiting or not found[0]["contended"]:
                break
            # Not at once: what holds the rows is about to commit, and five looks are soon spent.
            await asyncio.sleep(look * random.uniform(0, LOOK_AGAIN_S))  # noqa: S311 (jitter)
        else:
            if not any(row["queue_id"] for row in rows.values()):
                raise Busy("Many claims race for the same runs: claim again.")
        return [rows[i] for i in range(len(claimants))]

    async def _promote_aged(self) -> None:
        """Bring overtaken runs to the front: one for each AGED_SHARE granted since the last time.

        Before a claim, so that the runs that overtake are seen. Failures are only logged: the claim
        goes on, and a later one tries again.
        """
        now = asyncio.get_running_loop().time()
        due = self._granted // AGED_SHARE
        if not self._settings.aging_s or not due or now < self._promote_at:
            return
        self._promote_at = now + PROMOTE_PAUSE_S
        self._granted = 0
        try:
            aging = timedelta(seconds=self._settings.aging_s)
            for row in await run_queue.promote_aged(self._pool, aging, due):
                log.info("run.promoted", run_id=str(row["run_id"]), priority=row["priority"])
        except Exception as error:
            log.warning("claim.not_promoted", error=type(error).__name__)

    def _undelivered(self, row: asyncpg.Record) -> None:
        if row["queue_id"] is not None:
            task = asyncio.create_task(self._undo_behind(row))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _undo_behind(self, row: asyncpg.Record) -> None:
        """Undo a claim that nobody waits for any more: a failure is told to the log alone."""
        try:
            await self.undo(row)
        except Exception as error:  # nobody waits for this any more
            # Nobody beats for this lease, so it lapses.
            log.warning(
                "claim.release_failed", run_id=str(row["run_id"]), error=type(error).__name__
            )

    async def _refuse(self, claimant: Claimant, row: asyncpg.Record) -> None:
        """Raise what stands between the claimant and a run; return when nothing does."""
        if row["queue_id"] is not None:
            if row["claim_digest"] != claimant.claim_digest:
                raise Conflict("This Idempotency-Key was used with another body: draw a new one.")
        elif not row["key_known"]:
            raise KeyNotAllowed
        elif not row["key_good"]:
            raise KeyRevoked
        elif row["token_ended"]:
            raise InvalidToken(TOKEN_REVOKED)
        elif row["paused"]:
            raise RunnerPaused(row["pause_reason"])
        elif not row["entitled"] and not row["draining"]:
            held = await run_queue.held_by(self._pool, claimant.runner_id)
            raise LeaseLimit([str(lease["run_id"]) for lease in held])
