"""Is the process up, and is it fit to serve? Anybody may ask; nobody logs the asking."""

from tornado.web import URLSpec

from broker.services import Services
from handlers.base import Handler
from handlers.errors import RETRY_AFTER_S

METHODS = "GET, HEAD, OPTIONS"


class PlainHandler(Handler):
    """A question without a body that anybody may ask."""

    def log_answer(self) -> None:
        """Write nothing: balancers ask every second."""

    def options(self) -> None:
        """Say which methods there are."""
        self.set_header("Allow", METHODS)
        self.set_status(204)


class HealthHandler(PlainHandler):
    """/healthz: the process answers."""

    def get(self) -> None:
        """Answer."""
        self.answer(200, {"status": "ok"})

    head = get


class ReadyHandler(PlainHandler):
    """/readyz: send requests here, or elsewhere."""

    async def get(self) -> None:
        """Answer 200, or 503 with what is wrong."""
        readiness = await self.services.health.readiness()
        status = "ready" if readiness.ready else "unready"
        if not readiness.ready:
            self.set_header("Retry-After", str(RETRY_AFTER_S))
        self.answer(200 if readiness.ready else 503, {"status": status, **readiness.checks})

    head = get


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    return [URLSpec(r"/healthz", HealthHandler, given), URLSpec(r"/readyz", ReadyHandler, given)]
