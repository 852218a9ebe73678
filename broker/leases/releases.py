"""Release and fail: a runner gives a lease back before its time.

Each is one guarded statement. A request that is sent again finds its lease ended, and is answered
from the attempts with what the first one was told.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg
import structlog

from broker.errors import InvalidRequest, Violation
from broker.leases.breaker import RunnerBreaker
from broker.leases.lease_keys import LeaseKey, LeaseKeys
from broker.leases.lease_refusal import raise_lease_error
from config.settings import Settings
from db import attempts, models, run_queue
from db.run_queue import LeaseGuard

FAILURE_CODES = ("timeout", "infra_error", "load_failure", "oom", "unknown")
# What a model does is a result of the run, not a failure of it.
RESULT_CODES = ("refusal", "malformed_output", "capability_gap")
# What each answers.
RELEASED = ("status",)
FAILED = ("status", "attempt_count", "retry_after")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed, and how long the runner thinks the run should wait."""

    code: str
    detail: str
    retry_after_s: int


class LeaseReleases:
    """Ends leases for the runners that hold them."""

    def __init__(
        self, pool: asyncpg.Pool, settings: Settings, keys: LeaseKeys, breaker: RunnerBreaker
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._keys = keys
        self._breaker = breaker

    async def release(self, guard: LeaseGuard, reason: str) -> dict[str, Any]:
        """Hand a lease back without burning an attempt; return {status}.

        Raises LeaseLost, RunFinished, KeyRevoked or NotFound.
        """
        row = await run_queue.release(self._pool, guard, reason)
        if row is None:
            return await self._answered(guard, ("released", "cancelled"), RELEASED)
        self._keys.drop([LeaseKey(row["queue_id"], row["lease_seq"])])
        await self._breaker.check(guard.runner_id)
        return {"status": row["status"]}

    async def fail(self, guard: LeaseGuard, failure: Failure) -> dict[str, Any]:
        """End a lease by a failure; return {status, attempt_count, retry_after}.

        Raises InvalidRequest for codes that belong into a result, LeaseLost, RunFinished,
        KeyRevoked or NotFound.
        """
        if failure.code in RESULT_CODES:
            detail = f"{failure.code} is a result of the model: submit it in result.json"
            raise InvalidRequest(detail + ".", (Violation("/failure_code", detail),))
        row = await run_queue.fail(
            self._pool,
            guard,
            failure_code=failure.code,
            detail=failure.detail,
            backoff_s=self._settings.retry_backoff_s,
            retry_after_s=failure.retry_after_s,
        )
        if row is None:
            return await self._answered(guard, ("failed", "cancelled"), FAILED)
        self._keys.drop([LeaseKey(row["queue_id"], row["lease_seq"])])
        if failure.code == "oom":
            await self._learn_need(guard)
        await self._breaker.check(guard.runner_id)
        return {name: row[name] for name in FAILED}

    async def _learn_need(self, guard: LeaseGuard) -> None:
        """Raise the model's need above the VRAM that was not enough; failures are only logged."""
        try:
            raised = await models.raise_need(self._pool, guard.run_id, guard.runner_id)
        except Exception as error:
            log.warning("model.need_not_learned", run_id=str(guard.run_id), error=repr(error))
            return
        if raised is not None:
            log.info("model.need_raised", run_id=str(guard.run_id), runner_id=guard.runner_id,
                     model_id=str(raised["model_id"]), need_gb=raised["need_gb"])  # fmt: skip

    async def _answered(
        self, guard: LeaseGuard, hows: tuple[str, ...], members: tuple[str, ...]
    ) -> dict[str, Any]:
        """Return what the lease's end was answered the first time; raise if it ended otherwise.

        A run to be cancelled ends as `cancelled` by a release and by a failure: `members`, those of
        the answer, tell which it was.
        """
        ended = await attempts.ended_lease(
            self._pool, guard.run_id, guard.lease_id, guard.runner_id
        )
        if ended is None or ended["how"] not in hows or set(ended["outcome"] or ()) != set(members):
            await raise_lease_error(self._pool, guard)
        outcome = dict(ended["outcome"])
        # A time again, so that it is written as the first answer wrote it.
        if outcome.get("retry_after") is not None:
            outcome["retry_after"] = datetime.fromisoformat(outcome["retry_after"])
        return outcome
