"""Background loops that are kept running: one that ends is restarted, and that is told.

A loop that ends unseen is the worst that can happen to the queue: without the sweep no dead lease
is ever given back, while every request is answered.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

from broker.telemetry import Telemetry
from db.pool import describe

FIRST_S, LONGEST_S = 1.0, 60.0

log = structlog.get_logger()


class Supervisor:
    """Runs loops; `problems` names those that are waiting to be restarted, and why they ended."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self.problems: dict[str, str] = {}

    def start(self, name: str, loop: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run a loop until the returned task is cancelled; it is never expected to return."""
        self._telemetry.loop_restarts.labels(name)  # shown from the start, as 0
        return asyncio.create_task(self._keep(name, loop), name=name)

    async def _keep(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        wait_s = FIRST_S
        while True:
            started = asyncio.get_running_loop().time()
            try:
                await loop()
                problem = "it returned"
            except Exception as error:  # whatever it is, the loop has to go on
                problem = f"{type(error).__name__}: {describe(error)}"
            if asyncio.get_running_loop().time() - started > LONGEST_S:
                wait_s = FIRST_S  # it ran well in between
            self.problems[name] = problem
            self._telemetry.loop_restarts.labels(name).inc()
            log.error("loop.ended", loop=name, problem=problem, restart_in_s=round(wait_s, 1))
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))  # noqa: S311 (jitter)
            wait_s = min(2 * wait_s, LONGEST_S)
            self.problems.pop(name, None)
