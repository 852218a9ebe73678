"""The server process of the benchmarks: the real application with its yardsticks beside it.

POST /bench/noop does what every request of a runner costs (HTTP, credential, JSON, schema) and
nothing else; /bench/noop/heartbeat does it with a heartbeat's body. POST /bench/naive-claim is a
claim without the broker: one statement per request. The port is the first line on stdout.
"""

import asyncio
import hashlib
from datetime import timedelta
from uuid import uuid4

import asyncpg
from tornado.netutil import bind_sockets
from tornado.web import URLSpec

from broker.leases.claims import RACES_MAX
from config.logging import configure_logging
from config.settings import load_settings
from db import run_queue
from db.pool import open_pool
from db.run_queue import Claimant
from handlers.queue import claim_response, idempotency_key
from handlers.runner_base import RunnerHandler
from server import freeze_start, make_app, make_server, open_services


class NoopHandler(RunnerHandler):
    """POST /bench/noop."""

    schema = "claim"

    async def post(self) -> None:
        """Answer nothing, after all the checks."""
        self.read_json(self.schema)
        self.answer(200, {})


class NoopHeartbeatHandler(NoopHandler):
    """POST /bench/noop/heartbeat."""

    schema = "heartbeat"


class NaiveClaimHandler(RunnerHandler):
    """POST /bench/naive-claim: the claim statement for this request alone, and no Redis key."""

    pool: asyncpg.Pool  # as large as the application's own

    async def post(self) -> None:
        """Hand out the next run that fits: 200 with the job, or 204."""
        body = self.read_json("claim")
        key = idempotency_key(self) or str(uuid4())
        settings, runner = self.services.settings, self.runner
        offer = await self.services.registry.capabilities(runner, body.get("capabilities"))
        digest = hashlib.sha256(self._body).hexdigest()
        claimant = Claimant(
            runner.runner_id, runner.fingerprint, runner.instance_id, runner.jti, key, digest, offer
        )
        for _ in range(RACES_MAX):
            (row,) = await run_queue.claim(
                self.pool,
                [claimant],
                ttl=timedelta(seconds=settings.lease_ttl_s),
                max_leases=settings.max_leases,
                max_runtime_s=settings.max_runtime_s,
            )
            if row["queue_id"] is not None:
                self.answer(200, claim_response(row, self.services), members=row["members"])
                return
            if not row["contended"]:
                break
        self.set_status(503)


async def serve() -> None:
    """Serve until the process is ended."""
    settings = load_settings()
    configure_logging("error", "json")
    dsn = settings.database_url.get_secret_value()
    async with (
        open_pool(dsn, settings.database_pool_max) as pool,
        open_services(settings) as services,
    ):
        given = {"services": services}
        NaiveClaimHandler.pool = pool
        app = make_app(services)
        yardsticks = [
            URLSpec("/bench/noop", NoopHandler, given),
            URLSpec("/bench/noop/heartbeat", NoopHeartbeatHandler, given),
            URLSpec("/bench/naive-claim", NaiveClaimHandler, given),
        ]
        app.add_handlers(".*", yardsticks)
        sockets = bind_sockets(0, "127.0.0.1")
        freeze_start()
        freeze_start()
        make_server(app, services).add_sockets(sockets)
        print(sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
