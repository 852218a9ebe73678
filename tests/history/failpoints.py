"""Named points in a server where it may be killed or held up; production code knows none of them.

Each wraps one function by name, so a renamed function is told at the start and not left untested.
A point is armed from outside, strikes once, and tells so before it strikes.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from broker.results.submissions import Submissions
from db import run_queue, runner_keys

# How long a killed statement may have been on its way: PostgreSQL decides whether it counts.
MID_STATEMENT_S = 0.001


@dataclass(frozen=True, slots=True)
class Strike:
    """What happens at a point: death, or nothing for `stall_s` seconds."""

    stall_s: float | None = None


class Failpoints:
    """The points that are armed in this process."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._armed: dict[str, Strike] = {}

    def arm(self, point: str, strike: Strike) -> None:
        """Let `point` strike the next time it is reached."""
        assert point in POINTS, point
        self._armed[point] = strike

    async def reach(self, point: str) -> None:
        """Strike if armed."""
        strike = self._armed.pop(point, None)
        if strike is None:
            return
        self._tell({"event": "struck", "point": point, "stall_s": strike.stall_s})
        if strike.stall_s is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            await asyncio.sleep(strike.stall_s)

    async def during(self, point: str, call: Awaitable[Any]) -> Any:
        """Await `call`; if armed, strike while it is under way."""
        task = asyncio.ensure_future(call)
        if point in self._armed:
            await asyncio.sleep(MID_STATEMENT_S)
            await self.reach(point)
        return await task


def install(points: Failpoints) -> None:
    """Wrap the functions that the points stand in."""
    for point, (owner, name, wrap) in POINTS.items():
        setattr(owner, name, wrap(points, point, getattr(owner, name)))


Wrapped = Callable[..., Awaitable[Any]]


def _before(points: Failpoints, point: str, function: Wrapped) -> Wrapped:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        await points.reach(point)
        return await function(*args, **kwargs)

    return wrapper


def _after(points: Failpoints, point: str, function: Wrapped) -> Wrapped:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        answer = await function(*args, **kwargs)
        if answer:
            await points.reach(point)
        return answer

    return wrapper


def _after_grant(points: Failpoints, point: str, function: Wrapped) -> Wrapped:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        rows = await function(*args, **kwargs)
        if any(row["queue_id"] is not None for row in rows):
            await points.reach(point)
        return rows

    return wrapper


def _during(points: Failpoints, point: str, function: Wrapped) -> Wrapped:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await points.during(point, function(*args, **kwargs))

    return wrapper


POINTS: dict[str, tuple[Any, str, Callable[[Failpoints, str, Wrapped], Wrapped]]] = {
    # The lease is given, its runner does not know yet.
    "claim_committed": (run_queue, "claim", _after_grant),
    "beat_committed": (run_queue, "beat", _after),
    "release_committed": (run_queue, "release", _after),
    "fail_committed": (run_queue, "fail", _after),
    # The bundle is verified, its transaction not yet open.
    "submit_verified": (Submissions, "_accept", _before),
    # The run is COMPLETE inside a transaction that never commits.
    "submit_unfinished": (run_queue, "complete", _after),
    # The result is stored, its sender does not know yet.
    "submit_committed": (Submissions, "_accept", _after),
    # The sweep's statement is on its way; the sweep has ended leases and told nobody.
    "sweep_under_way": (run_queue, "lapse", _during),
    "sweep_committed": (run_queue, "lapse", _after),
    # The key is revoked and its leases ended inside a transaction that never commits.
    "revoke_unfinished": (run_queue, "end_leases_of_key", _after),
    "revoke_under_way": (runner_keys, "revoke", _during),
    "enqueue_unfinished": (run_queue, "enqueue", _before),
}
