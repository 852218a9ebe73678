"""Counts the requests that are being answered, so that a stop can wait for them.

A stop has two steps. Draining: requests are served as ever, and each answer tells its client to
leave this connection. Closed: what still comes in is refused before anything is done for it.
"""

import asyncio


class InFlight:
    """`enter` and `leave` each request; `wait_idle` returns when none is left."""

    def __init__(self) -> None:
        self.count = 0
        self.draining = False
        self.closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """A request has arrived."""
        self.count += 1
        self._idle.clear()

    def leave(self) -> None:
        """Its answer is on the wire to the last byte, or its connection is gone."""
        self.count -= 1
        if self.count == 0:
            self._idle.set()

    def drain(self) -> None:
        """From now on each answer tells its client to use another connection."""
        self.draining = True

    async def wait_idle(self) -> None:
        """Wait until nothing is being answered."""
        while self.count:  # the last one may have left, and the next come, before we are woken
            await self._idle.wait()

    async def close(self, within_s: float) -> int:
        """Wait `within_s` seconds at most until nothing is being answered, then refuse the rest.

        Returns how many requests did not end in time. No request comes between the last look and
        the refusing: one that did would be cut off with its work done.
        """
        try:
            async with asyncio.timeout(within_s):
                await self.wait_idle()
        except TimeoutError:
            pass
        self.closed = True
        return self.count
