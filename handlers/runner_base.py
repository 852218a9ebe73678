"""Requests of runners: a bearer runner token, checked before the body is read."""

from uuid import UUID

from auth.tokens import RunnerClaims
from db.run_queue import LeaseGuard
from handlers.base import Handler


class RunnerHandler(Handler):
    """A request of a runner that has registered."""

    runner: RunnerClaims

    async def authenticate(self) -> None:
        """Learn which runner sends this."""
        self.runner = await self.services.credentials.runner(self.bearer_token())
        self.services.liveness.saw(self.runner.runner_id, self.runner.instance_id)

    def guard(self, run_id: str, lease_id: str) -> LeaseGuard:
        """Return what this runner shows to touch a lease."""
        runner = self.runner
        return LeaseGuard(
            UUID(run_id), UUID(lease_id), runner.runner_id, runner.fingerprint, runner.instance_id
        )
