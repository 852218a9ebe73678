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


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/version", VersionHandler, given),
        URLSpec(r"/\.well-known/bakeoff-queue\.json", WellKnownHandler, given),
        URLSpec(r"/metrics", MetricsHandler, given),
    ]
