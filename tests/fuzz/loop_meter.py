"""How long the event loop of this process was held, to the longest moment.

Two looks at it. Every callback of the loop is timed by itself. And a ticker that asks for 5 ms
tells how late it came: that also sees a worker's thread that keeps the interpreter's lock while no
callback runs. What the ticker misses while this process is not running at all, because the machine
is busy with others, is not the loop's: the process's CPU time is the most that counts.
"""

import asyncio
import time

TICK_S = 0.005


class LoopMeter:
    """The longest that the loop was held since `reset`, and by what."""

    def __init__(self) -> None:
        self.worst_ms = 0.0
        self.what = ""

    def reset(self) -> None:
        """Forget what was measured: a start imports and compiles, which no request pays."""
        self.worst_ms, self.what = 0.0, ""

    def install(self) -> None:
        """Time every callback of every loop of this process."""
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            started, used = time.perf_counter(), time.thread_time()
            run(handle)
            took = (time.perf_counter() - started) * 1000
            if took > self.worst_ms:
                worked = (time.thread_time() - used) * 1000
                self._note(took, f"a callback that worked {worked:.1f} ms of it: {handle!r}")

        asyncio.Handle._run = timed  # type: ignore[method-assign]

    async def watch(self) -> None:
        """Tick for ever."""
        while True:
            before, used = time.perf_counter(), time.process_time()
            await asyncio.sleep(TICK_S)
            late = time.perf_counter() - before - TICK_S
            held = min(late, time.process_time() - used) * 1000
            if held > self.worst_ms:
                self._note(held, "the ticker was late: a thread kept the interpreter's lock")

    def _note(self, milliseconds: float, what: str) -> None:
        self.worst_ms, self.what = milliseconds, what[:300]
