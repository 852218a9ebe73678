"""Public endpoints: version, public keys, metrics, and the page of error codes."""

from html import escape
from secrets import compare_digest

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from tornado.web import URLSpec

from auth.errors import InvalidToken
from broker.errors import code_of
from broker.services import Services
from handlers.errors import ERRORS_PATH, STATUS
from handlers.health import PlainHandler
from handlers.runners import BUNDLE_SCHEMAS

NAME = "bakeoff-queue"


class VersionHandler(PlainHandler):
    """/api/version: what runs here."""

    def get(self) -> None:
        """Answer the name and the version."""
        self.answer(200, {"name": NAME, "version": self.services.version})

    head = get


class WellKnownHandler(PlainHandler):
    """/.well-known/bakeoff-queue.json: what verifies our receipts and fills our queue."""

    async def get(self) -> None:
        """Answer our address, public keys (the signing one first), and the known quantizations."""
        self.answer(
            200,
            {
                "name": NAME,
                **self.services.receipts.published(),
                "bundle_schema_versions": BUNDLE_SCHEMAS,
                "quantizations": await self.services.registry.known_quantizations(),
            },
        )

    head = get


class MetricsHandler(PlainHandler):
    """/metrics: for Prometheus, which asks each process by itself."""

    async def authenticate(self) -> None:
        """Check the token of the settings, if there is one."""
        wanted = self.services.settings.metrics_token.get_secret_value()
        if not wanted:
            await self.throttle()
        elif not compare_digest(self.bearer_token().encode(), wanted.encode()):
            raise InvalidToken("This address takes the metrics token of the settings.")

    async def get(self) -> None:
        """Answer every counter, in Prometheus' text format."""
        await self.services.tally.refresh()
        self.set_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
        self.finish(self.services.telemetry.exposition())

    head = get


class ErrorPageHandler(PlainHandler):
    """/errors: every code, its status and what it means, for people."""

    def get(self) -> None:
        """Answer a page with an anchor per code."""
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.finish(_PAGE)

    head = get


def _page() -> str:
    rows = "\n".join(_row(error, status) for error, status in STATUS.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>bakeoff-queue: errors</title>'
        f"<h1>What the errors mean</h1>\n<dl>\n{rows}\n</dl></html>\n"
    )


def _row(error: type[Exception], status: int) -> str:
    code = code_of(error.__new__(error))
    meaning = escape(" ".join((error.__doc__ or "").split()))
    return f'<dt id="{code}"><code>{code}</code> ({status})</dt><dd>{meaning}</dd>'


_PAGE = _page()


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/version", VersionHandler, given),
        URLSpec(r"/\.well-known/bakeoff-queue\.json", WellKnownHandler, given),
        URLSpec(r"/metrics", MetricsHandler, given),
        URLSpec(ERRORS_PATH, ErrorPageHandler, given),
    ]
