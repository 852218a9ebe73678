"""Counts the requests that are being answered, so that a stop can wait for them."""

import asyncio


class InFlight:
    """`enter` and `leave` each request; `wait_idle` returns when none is left."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """A request has arrived."""
        self.count += 1
        self._idle.clear()

    def leave(self) -> None:
        """Its answer has been written, or its connection is gone."""
        self.count -= 1
        if self.count == 0:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until nothing is being answered."""
        await self._idle.wait()
