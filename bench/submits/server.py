"""The server process of B8: the real application, and what it measures of itself.

GET /bench/numbers tells the longest hold of the event loop and how long each bundle's verification
and transaction took, since it was asked last. The port is the first line on stdout.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tornado.netutil import bind_sockets
from tornado.web import RequestHandler

from broker.results.submissions import Submissions
from config.logging import configure_logging
from config.settings import load_settings
from server import make_app, make_server, open_services


class Holds:
    """The longest that one callback held the event loop."""

    def __init__(self) -> None:
        self.worst: tuple[float, float, str] = (0.0, 0.0, "")
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            run(handle)
            took = time.perf_counter() - wall
            if took > self.worst[0]:
                self.worst = (took, time.thread_time() - cpu, repr(handle)[:300])

        setattr(asyncio.Handle, "_run", timed)  # noqa: B010 (a method of theirs)


async def serve() -> None:
    """Serve the real application, and GET /bench/numbers, until the process is ended."""
    holds, times = Holds(), {"verify": [], "accept": []}
    for name, verb in (("verify", "verify"), ("accept", "_accept")):
        setattr(Submissions, verb, _timed(getattr(Submissions, verb), times[name]))

    class Numbers(RequestHandler):
        def get(self) -> None:
            wall, cpu, where = holds.worst
            self.write(
                {"hold_ms": wall * 1e3, "hold_cpu_ms": cpu * 1e3, "where": where, "times": times}
            )
            holds.worst = (0.0, 0.0, "")
            for each in times.values():
                each.clear()

    if switch_s := os.environ.get("BENCH_SWITCH_S"):
        sys.setswitchinterval(float(switch_s))
    settings = load_settings()
    configure_logging("error", "json")
    async with open_services(settings) as services:
        app = make_app(services)
        app.add_handlers(".*", [("/bench/numbers", Numbers)])
        sockets = bind_sockets(0, "127.0.0.1")
        make_server(app, services).add_sockets(sockets)
        print(sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()


def _timed(verb: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    async def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return await verb(*arguments, **options)
        finally:
            times.append((time.perf_counter() - started) * 1e3)

    return timed


if __name__ == "__main__":
    asyncio.run(serve())
