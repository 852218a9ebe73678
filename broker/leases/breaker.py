"""Runner breaker: pauses a machine that fails, hands back or gets refused everything it takes."""

import asyncpg
import structlog

from config.settings import Settings
from db import runners

log = structlog.get_logger()


class RunnerBreaker:
    """Checks a runner's last leases after each one that ended badly."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self._pool = pool
        self._settings = settings

    async def check(self, runner_id: str) -> None:
        """Pause the runner for a while if its last leases or bundles were all bad.

        Never raises: the request that ended the lease has been carried out, and the next bad end
        checks again.
        """
        try:
            reason = await runners.pause_failing(
                self._pool, runner_id, self._settings.failing_runner_pause_s
            )
        except Exception as error:
            log.warning(
                "runner.check_failed", runner_id=runner_id, error=f"{type(error).__name__}: {error}"
            )
            return
        if reason is not None:
            log.warning("runner.paused", runner_id=runner_id, reason=reason)
