"""Rings the claims' bell when Postgres says that a run became claimable, in any process."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from db.pool import CONNECT_S, SESSION, Primary, ReadOnly, is_writable
from db.run_queue import CHANNEL

RETRY_S = 1.0
# A connection that a router forgot is open and silent for ever, and so is one to a server that is
# the primary no more, where no run is enqueued: it is asked.
PROVE_EVERY_S, PROVE_S = 30.0, 5.0

log = structlog.get_logger()


class Wakeup:
    """One connection of its own that listens; it reconnects for ever.

    The DSN must reach PostgreSQL itself: through PgBouncer in transaction mode LISTEN hears
    nothing, and the claims' slow re-check is all that is left.
    """

    def __init__(self, dsn: str, notify: Callable[[], None]) -> None:
        """Listen at `dsn`, and call `notify` for all that is heard."""
        self._primary = Primary(dsn)
        self._notify = notify

    async def run(self, succeeded: Callable[[], None]) -> None:
        """Listen until cancelled."""
        while True:
            try:
                await self._listen(succeeded)
            except Exception as error:  # the claims' slow re-check goes on without the bell
                log.warning("wakeup.lost", error=type(error).__name__)
            await asyncio.sleep(RETRY_S)

    async def _listen(self, succeeded: Callable[[], None]) -> None:
        connection = await self._primary.connect(server_settings=SESSION, timeout=CONNECT_S)
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        try:
            await connection.add_listener(CHANNEL, lambda *_: self._notify())
            self._notify()  # what was enqueued before we listened was not heard
            while not lost.is_set():
                async with asyncio.timeout(PROVE_S):
                    if not await is_writable(connection):
                        raise ReadOnly
                succeeded()
                with suppress(TimeoutError):
                    async with asyncio.timeout(PROVE_EVERY_S):
                        await lost.wait()
        finally:
            connection.terminate()
