"""What anybody may ask about this service: its version, its public keys, its metrics."""

from secrets import compare_digest

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from tornado.web import URLSpec

from auth.errors import InvalidToken
from broker.services import Services
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
    """/.well-known/bakeoff-queue.json: what it takes to verify our receipts."""

    def get(self) -> None:
        """Answer our address and public keys, also the former ones, the signing one first."""
        published = self.services.receipts.published()
        self.answer(200, {"name": NAME, **published, "bundle_schema_versions": BUNDLE_SCHEMAS})

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


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/version", VersionHandler, given),
        URLSpec(r"/\.well-known/bakeoff-queue\.json", WellKnownHandler, given),
        URLSpec(r"/metrics", MetricsHandler, given),
    ]
