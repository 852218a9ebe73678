"""Requests of runners: a bearer runner token, checked before the body is read."""

from uuid import UUID

from auth.tokens import RunnerIdentity
from broker.errors import RateLimited
from db.run_queue import LeaseGuard
from handlers.base import Handler


class RunnerHandler(Handler):
    """A request of a runner that has registered."""

    runner: RunnerIdentity

    async def authenticate(self) -> None:
        """Learn which runner sends this."""
        self.runner = await self.services.credentials.runner(self.bearer_token())
        runner_id = self.runner.runner_id
        self.facts |= {"runner_id": runner_id, "key_fp": self.runner.fingerprint[:16]}
        self.services.liveness.saw(runner_id, self.runner.instance_id)
        await self.limit(self.settings["rates"].runners.take(runner_id), "runner")
        if not self.hold(self.services.shares.requests, runner_id):
            await self._delay("This runner has too many requests in flight.", 1)

    def hold_replay(self) -> None:
        """Take of this runner's share of jobs that are given again. Raises RateLimited."""
        if not self.hold(self.services.shares.replays, self.runner.runner_id):
            raise RateLimited("Read the answers that this job was given in before.", 1)

    def guard(self, run_id: str, lease_id: str) -> LeaseGuard:
        """Return what this runner shows to touch a lease."""
        runner = self.runner
        return LeaseGuard(
            UUID(run_id), UUID(lease_id), runner.runner_id, runner.fingerprint, runner.instance_id
        )
