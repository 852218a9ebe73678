"""How long the event loop of this process was held, to the longest moment.

Two looks at it. Every callback of the loop is timed by itself. And a ticker that asks for 5 ms
tells how late it came: that also sees a worker's thread that keeps the interpreter's lock while no
callback runs. Neither counts the time in which the loop's thread could have run and no processor
was free, because the machine is busy with others: Linux keeps account of it. The rest counts,
waiting for a disk or a lock too.
"""

import asyncio
import os
import time

TICK_S = 0.005
# Per thread: nanoseconds on a processor, nanoseconds of waiting for one, and how often.
ACCOUNT = "/proc/thread-self/schedstat"


class LoopMeter:
    """The longest that the loop was held since `reset`, and by what."""

    def __init__(self) -> None:
        self.worst_ms = 0.0
        self.what = ""
        self._account: int | None = None

    def reset(self) -> None:
        """Forget what was measured: a start imports and compiles, which no request pays."""
        self.worst_ms, self.what = 0.0, ""

    def install(self) -> None:
        """Time every callback of the loop that this thread will run."""
        if os.path.exists(ACCOUNT):  # noqa: PTH110 (once, before there is a loop)
            self._account = os.open(ACCOUNT, os.O_RDONLY)
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            started, waited = time.perf_counter(), self._waited()
            run(handle)
            self._note(started, waited, handle)

        asyncio.Handle._run = timed  # type: ignore[method-assign]

    async def watch(self) -> None:
        """Tick for ever."""
        while True:
            started, waited = time.perf_counter() + TICK_S, self._waited()
            await asyncio.sleep(TICK_S)
            self._note(started, waited, "the ticker was late")

    def _note(self, started: float, waited: float, what: object) -> None:
        took = time.perf_counter() - started
        if took * 1000 > self.worst_ms:  # only then: to ask costs more than most callbacks
            held = (took - (self._waited() - waited)) * 1000
            if held > self.worst_ms:
                self.worst_ms, self.what = held, f"{what!r}"[:300]

    def _waited(self) -> float:
        """Return the seconds that this thread has waited for a processor so far."""
        if self._account is None:
            return 0.0
        return int(os.pread(self._account, 100, 0).split()[1]) / 1e9
