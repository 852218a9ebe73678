"""The attacked server: the real application in a process of its own, and a meter of its loop.

Its port is the first line on stdout; it ends when stdin closes. Every answer to a submit carries
how long the loop was held at most so far (X-Held-Ms), so that the mutants in flight at a long
moment are known. GET /fuzz/loop tells by what, POST /fuzz/loop begins anew.
BAKEOFF_FUZZ_SABOTAGE names a check to leave out: the oracle must notice.
"""

import asyncio
import os
import sys
from typing import Any

from tornado.netutil import bind_sockets
from tornado.web import RequestHandler, URLSpec

from config.logging import configure_logging
from config.settings import load_settings
from handlers.submit import SubmitHandler
from server import make_app, make_server, open_services
from tests.fuzz.loop_meter import LoopMeter
from tests.fuzz.sabotage import SABOTAGES

SABOTAGE = "BAKEOFF_FUZZ_SABOTAGE"


class LoopHandler(RequestHandler):
    """GET and POST /fuzz/loop."""

    def initialize(self, meter: LoopMeter) -> None:
        """Keep the meter."""
        self._meter = meter

    def get(self) -> None:
        """Tell the longest moment and what it was."""
        self.write({"worst_ms": self._meter.worst_ms, "what": self._meter.what})

    def post(self) -> None:
        """Forget the longest moment."""
        self._meter.reset()


def tell_with_every_answer(meter: LoopMeter) -> None:
    """Put the longest moment so far into the answers to submits."""
    finish = SubmitHandler.finish

    def finish_and_tell(self: SubmitHandler, chunk: Any = None) -> Any:
        self.set_header("X-Held-Ms", f"{meter.worst_ms:.1f}")
        return finish(self, chunk)

    SubmitHandler.finish = finish_and_tell  # type: ignore[method-assign]


async def serve() -> None:
    """Serve until stdin closes."""
    settings = load_settings()
    configure_logging("error", "json")
    meter = LoopMeter()
    meter.install()
    tell_with_every_answer(meter)
    if sabotage := os.environ.get(SABOTAGE):
        SABOTAGES[sabotage]()
    async with open_services(settings) as services:
        app = make_app(services)
        app.add_handlers(".*", [URLSpec("/fuzz/loop", LoopHandler, {"meter": meter})])
        sockets = bind_sockets(0, "127.0.0.1")
        make_server(app, services).add_sockets(sockets)
        ticks = asyncio.create_task(meter.watch())
        sys.stdout.write(f"{sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        os.dup2(2, 1)  # nobody reads what is logged from here on: a full pipe would hold the loop
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        await reader.read()  # until whoever started us is gone
        ticks.cancel()


if __name__ == "__main__":
    asyncio.run(serve())
