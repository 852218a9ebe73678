"""Ending tasks for certain."""

import asyncio
import contextlib
from typing import Any

CANCEL_AGAIN_S = 0.2


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """End the tasks; cancelled while it connects, redis-py may swallow that: once is not enough.

    Whoever waits here is ending something: a cancellation of its own does not leave it half done.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # asked for, or asyncio complains that nobody did


def asked_to_stop() -> bool:
    """Return whether somebody cancelled this task, and not only something that it awaits."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
