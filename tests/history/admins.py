"""The storm's admin: keeps the queue filled, cancels runs, revokes keys and admits new ones."""

import asyncio
import json
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sandbox.runner.identity import public_key_text
from tests.history.network import Answer, Network, Request
from tests.history.plans import Plan
from tests.history.runners import JSON, Runner
from tests.support.fleet import run_of

BATCH = 4
# The admin's tools try until it is done, however long the servers are away.
PATIENCE = 400


@dataclass
class Admin:
    """One admin, who sends through the same network as everybody."""

    token: str
    rng: random.Random
    plan: Plan
    network: Network
    calm: asyncio.Event
    pending: Callable[[], int]  # how many runs wait, as far as is known
    runners: list[Runner] = field(default_factory=list)
    run_ids: list[str] = field(default_factory=list)

    async def live(self) -> None:
        """Enqueue, cancel and revoke until the storm is over."""
        while not self.calm.is_set():
            draw = self.rng.random()
            if draw < self.plan.revokes:
                await self._revoke()
            elif draw < self.plan.revokes + self.plan.cancels:
                await self._cancel()
            elif self.pending() < self.plan.pending:
                await self.enqueue(min(BATCH, self.plan.pending))
            await asyncio.sleep(self.rng.uniform(*self.plan.admin_every_s))

    async def enqueue(self, count: int) -> None:
        """Add runs under run_ids of our own, so that trying again adds none twice."""
        runs = [
            run_of(
                run_id=str(uuid.UUID(int=self.rng.getrandbits(128), version=4)),
                max_attempts=self.rng.choice((2, 5, 30, 30)),
                floor_tasks=None,
                prompts=[{"id": "plain", "system": ""}],
            )
            for _ in range(count)
        ]
        # Known before they are there: a cancel may come first.
        self.run_ids += [run["run_id"] for run in runs]
        await self._send("enqueue", "POST", "/queue", {"runs": runs})

    async def admit(self, runner: Runner) -> None:
        """Put a runner's key on the allowlist."""
        wanted = {
            "public_key": public_key_text(runner.key),
            "runner_id": runner.name,
            "max_leases": runner.leases,
        }
        answer = await self._send("admit", "POST", "/runner-keys", wanted)
        assert answer is not None
        # 409: a replay of old bytes may have come between; the name or the key is taken.
        assert answer.status in (200, 201, 409), answer

    async def _cancel(self) -> None:
        if self.run_ids:
            run_id = self.rng.choice(self.run_ids[-30:])
            await self._send("cancel", "POST", f"/queue/{run_id}/cancel", {"reason": "storm"})

    async def _revoke(self) -> None:
        """Revoke a runner's key; the runner finds out by itself."""
        runner = self.rng.choice(self.runners)
        path = f"/runner-keys/{runner.fingerprint}"
        await self._send("revoke", "DELETE", path, {"reason": "storm"}, runner)

    async def _send(
        self,
        verb: str,
        method: str,
        path: str,
        body: dict[str, Any],
        runner: Runner | None = None,
    ) -> Answer | None:
        headers = (JSON, ("Authorization", f"Bearer {self.token}"))
        request = Request(
            verb,
            runner.name if runner else "admin",
            runner.fingerprint if runner else "",
            method,
            f"/api/admin{path}",
            headers,
            json.dumps(body).encode(),
        )
        weather = self.runners[0].weather if self.runners else self.plan.weather
        return await self.network.call(request, self.rng, weather, PATIENCE)
