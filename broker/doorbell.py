"""Wake what is parked: a bell that nobody can miss between a look and a wait."""

import asyncio


class Doorbell:
    """`listen()` before looking; `ring()` wakes everybody who listened since the last ring."""

    def __init__(self) -> None:
        self._rung: asyncio.Event = asyncio.Event()

    def listen(self) -> asyncio.Event:
        """Return the event of the next ring. Taken before the look, no ring in between is lost."""
        return self._rung

    def ring(self) -> None:
        """Wake everybody who listens."""
        self._rung.set()
        self._rung = asyncio.Event()
