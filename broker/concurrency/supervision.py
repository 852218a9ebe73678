"""Background loops that are kept running: one that ends is restarted, and that is told.

A loop that ends unseen is the worst that can happen to the queue: without the sweep no dead lease
is ever given back, while every request is answered. So each loop also says when it last did its
work: one that hangs has not ended, and is told of as well.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from broker.concurrency.cancel import asked_to_stop, cancel
from broker.telemetry import Telemetry
from db.pool import describe

FIRST_S, LONGEST_S = 1.0, 60.0
# A loop is late when it has done nothing for so many of its intervals, and for a minute at least.
LATE, LATE_MIN_S = 3, 60.0
# A vital loop that ended so often without doing its work in between, over 3 minutes, is given up.
GIVE_UP = 8

# What a loop calls whenever it has done its work.
Succeeded = Callable[[], None]
Loop = Callable[[Succeeded], Awaitable[None]]

log = structlog.get_logger()


@dataclass(slots=True)
class _Kept:
    """A loop that is kept running; times are monotonic."""

    run: Loop
    every_s: float | None
    vital: bool
    since: float  # its last success, or its start
    succeeded: bool = False
    problem: str = ""
    failures: int = 0  # since its last success


class Supervisor:
    """Runs loops; `lost` is set when one of them cannot be kept running: the process has to end."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._loops: dict[str, _Kept] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self.lost = asyncio.Event()

    def start(
        self, name: str, run: Loop, *, every_s: float | None = None, vital: bool = False
    ) -> None:
        """Keep a loop running until `close`; it is never expected to return.

        `every_s` says how often it does its work; None for one that waits for somebody to ask.
        `vital`: a process in which it cannot be kept running is of no use, and ends.
        """
        self._loops[name] = kept = _Kept(run, every_s, vital, time.monotonic())
        self._telemetry.loop_restarts.labels(name)  # shown from the start, as 0
        self._telemetry.loop_success.labels(name)
        task = asyncio.create_task(self._keep(name, kept), name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    async def close(self) -> None:
        """End all loops."""
        self._closing = True
        await cancel(*self._tasks)

    @property
    def problems(self) -> dict[str, str]:
        """The problem of each loop that has ended, or is late, by its name."""
        found = {}
        for name, loop in self._loops.items():
            silent_s = time.monotonic() - loop.since
            if loop.problem:
                found[name] = f"ended: {loop.problem}"
            elif loop.every_s is not None and silent_s > max(LATE * loop.every_s, LATE_MIN_S):
                found[name] = f"has done nothing for {silent_s:.0f} s"
        return found

    @property
    def success_ages_s(self) -> dict[str, int | None]:
        """How long ago each loop last did its work; None: never yet."""
        now = time.monotonic()
        return {
            name: round(now - loop.since) if loop.succeeded else None
            for name, loop in self._loops.items()
        }

    async def _keep(self, name: str, loop: _Kept) -> None:
        success = self._telemetry.loop_success.labels(name)

        def succeeded() -> None:
            loop.since, loop.succeeded, loop.failures = time.monotonic(), True, 0
            success.set_to_current_time()

        while True:
            loop.problem = ""
            loop.problem = await _problem_of(loop.run, succeeded)
            wait_s = min(FIRST_S * 2**loop.failures, LONGEST_S)
            loop.failures += 1
            self._telemetry.loop_restarts.labels(name).inc()
            if loop.vital and loop.failures >= GIVE_UP:
                return
            log.error("loop.ended", loop=name, problem=loop.problem, restart_in_s=round(wait_s, 1))
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))  # noqa: S311 (jitter)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Tell of a loop that is kept running no longer: the end of the process, if not by it."""
        if self._closing:
            return
        name = task.get_name()
        if not task.cancelled() and (error := task.exception()):
            self._loops[name].problem = f"{type(error).__name__}: {describe(error)}"
        problem = self._loops[name].problem or "it was cancelled"
        self._loops[name].problem = problem
        log.critical("loop.lost", loop=name, problem=problem, fix="this process ends: restart it")
        self.lost.set()


async def _problem_of(run: Loop, succeeded: Succeeded) -> str:
    """Run a loop until it ends; return why. Raises CancelledError when we are asked to stop."""
    try:
        await run(succeeded)
    except asyncio.CancelledError:
        if asked_to_stop():
            raise
        return "it was cancelled from within"
    except BaseException as error:  # a panic in a library's Rust is of no public class
        return f"{type(error).__name__}: {describe(error)}"
    return "it returned"
