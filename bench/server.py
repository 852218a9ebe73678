"""The server process of the benchmarks: the real application with a yardstick beside it.

POST /bench/noop does what every request of a runner costs (HTTP, credential, JSON, schema) and
nothing else. The port is the process's first line on stdout.
"""

import asyncio

from tornado.netutil import bind_sockets
from tornado.web import URLSpec

from config.logging import configure_logging
from config.settings import load_settings
from handlers.runner_base import RunnerHandler
from server import make_app, make_server, open_services


class NoopHandler(RunnerHandler):
    """POST /bench/noop."""

    async def post(self) -> None:
        """Answer nothing, after all the checks."""
        self.read_json("claim")
        self.answer(200, {})


async def serve() -> None:
    """Serve until the process is ended."""
    settings = load_settings()
    configure_logging("error", "json")
    async with open_services(settings) as services:
        app = make_app(services)
        app.add_handlers(".*", [URLSpec("/bench/noop", NoopHandler, {"services": services})])
        sockets = bind_sockets(0, "127.0.0.1")
        make_server(app).add_sockets(sockets)
        print(sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
