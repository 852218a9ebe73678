"""Composition root: open the services, make the app, serve, drain, close."""

import asyncio
import errno
import gc
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from importlib.metadata import version as installed_version

import asyncpg
import structlog
from tornado.netutil import bind_sockets
from tornado.web import Application

from auth.errors import PolicyRefused
from auth.receipts import ReceiptKeys
from auth.signers import BundleVerifier, load_policy
from auth.tokens import Tokens
from broker.admin.admin_tokens import TokenAdmin
from broker.admin.archiver import INTERVAL_S as ARCHIVER_S
from broker.admin.archiver import Archiver
from broker.admin.explain import Explain, stale_after
from broker.admin.key_rings import INTERVAL_S as KEY_RINGS_S
from broker.admin.key_rings import KeyRings
from broker.admin.model_needs import ModelNeeds
from broker.admin.moderation import Moderation
from broker.admin.pauses import Pauses
from broker.admin.queue_tally import QueueTally
from broker.admin.results import Results
from broker.admin.runner_keys import Allowlist
from broker.admin.runner_tokens import RunnerTokens
from broker.admin.runners import RunnerAdmin
from broker.admin.runs import QueueView
from broker.audit.chain import INTERVAL_S as AUDIT_CHAIN_S
from broker.audit.chain import AuditChain
from broker.audit.log import AuditLog
from broker.concurrency.cancel import cancel
from broker.concurrency.shares import RunnerShares
from broker.concurrency.supervision import Supervisor
from broker.concurrency.workers import Workers
from broker.documents.schemas import check_schemas
from broker.health import Health
from broker.in_flight import InFlight
from broker.jobs.enqueue import Enqueue
from broker.leases.breaker import RunnerBreaker
from broker.leases.cadence import Cadence
from broker.leases.claims import Claims
from broker.leases.expiry_listener import LOOK_S as LISTENER_LOOK_S
from broker.leases.expiry_listener import ExpiryListener
from broker.leases.heartbeats import Heartbeats
from broker.leases.lease_keys import LeaseKeys
from broker.leases.notifications import PROVE_EVERY_S, Wakeup
from broker.leases.redis_topology import RedisUrlRefused, Topology, open_topology
from broker.leases.releases import LeaseReleases
from broker.leases.sweep import Sweep
from broker.reload import ReadSettings, Reload
from broker.results.active_verifier import ActiveVerifier
from broker.results.receipts import Receipts
from broker.results.submissions import Submissions
from broker.runners.credentials import Credentials, PostgresRevocationSource
from broker.runners.liveness import INTERVAL_S as LIVENESS_S
from broker.runners.liveness import Liveness
from broker.runners.registration import Registry
from broker.runners.revocations import Revocations
from broker.runners.shared_rates import SharedRates
from broker.services import Services
from broker.telemetry import LOOP_TICK_S, Telemetry
from config.descriptors import TooFewDescriptors, connections_max, raise_limit
from config.logging import configure_logging, dropped_lines
from config.settings import PREFIX, Settings, SettingsRefused, load_settings
from config.tracing import open_tracing
from db.migration_files import newest_version
from db.pool import DatabaseUnready, check_migrated, describe, open_pool
from handlers import (
    admin_audit,
    admin_keys,
    admin_models,
    admin_queue,
    admin_results,
    admin_runners,
    admin_tokens,
    health,
    openapi,
    public,
    queue,
    runners,
    submit,
)
from handlers.addresses import Proxies
from handlers.base import log_request
from handlers.connections import PATROL_S, Limits, Server
from handlers.not_found import NotFoundHandler
from handlers.rates import ClientRates

CLOSE_S = 2

log = structlog.get_logger()


class ServerRefused(Exception):
    """The server cannot start; the message names what is wrong and the fix."""


class ServerLost(Exception):
    """The server has ended by itself: whoever started it should start it again."""


@asynccontextmanager
async def open_services(
    settings: Settings, workers: Workers | None = None
) -> AsyncIterator[Services]:
    """Yield everything the handlers need, opened from `settings`, closed at the end.

    `workers` are lent by a caller who closes them; without, they are opened and closed here.
    Raises ServerRefused, DatabaseUnready or PolicyRefused. Redis may be away: that costs latency
    only.
    """
    if settings.missing_for_server:
        raise ServerRefused("; ".join(settings.missing_for_server))
    check_schemas()
    version = installed_version("bakeoff-queue")
    async with AsyncExitStack() as stack:
        if settings.tracing:
            stack.enter_context(open_tracing(version))
        dsn = settings.database_url.get_secret_value()
        verifier = BundleVerifier(settings.trusted_root, load_policy(settings.signers_file))
        trusted = ActiveVerifier(verifier, settings.trusted_root_stale_s)
        telemetry = Telemetry(version)
        pool = await stack.enter_async_context(open_pool(dsn, settings.database_pool_max))
        await check_migrated(pool, newest_version())
        key_rings = await _hold_rings(pool, settings)
        leases = await _open_redis(stack, "REDIS_LEASE_URL", settings.redis_lease_url)
        revoked = await _open_redis(stack, "REDIS_TOKEN_URL", settings.redis_token_url)

        tokens = Tokens(settings.token_ring, timedelta(seconds=settings.token_ttl_s))
        revocations = Revocations(revoked.client, PostgresRevocationSource(pool, tokens.life))
        receipt_keys = ReceiptKeys(settings.receipt_ring)
        audit_chain = AuditChain(pool, receipt_keys, settings.public_url)
        receipts = Receipts(receipt_keys, settings.public_url, audit_chain)
        keys = LeaseKeys(leases.client, telemetry.redis_up.set)
        stack.push_async_callback(keys.flush)  # when all who put keys have ended
        cadence = Cadence(settings)
        claims = Claims(pool, settings, keys, telemetry, cadence, _parked_max(settings))
        if workers is None:
            workers = Workers()
            stack.push_async_callback(workers.close)
        sweep = Sweep(pool, settings, keys, telemetry)
        listener = ExpiryListener(leases, sweep, telemetry.listener_gaps.inc)
        liveness = Liveness(pool, settings)
        listen_url = settings.database_listen_url or settings.database_url
        wakeup = Wakeup(listen_url.get_secret_value(), claims.parked.notify)
        in_flight = InFlight()
        telemetry.watch_pool(pool.get_size, pool.get_idle_size)
        telemetry.watch(
            waiters=lambda: len(claims.parked),
            http_in_flight=lambda: in_flight.count,
            breaker_open=lambda: sweep.held,
            listener_connected=listener.healthy.is_set,
            trust_root_age_seconds=trusted.root_age_s,
        )
        telemetry.watch_dropped_lines(dropped_lines)
        supervisor = Supervisor(telemetry)
        stack.push_async_callback(supervisor.close)
        # Without these two, requests are taken and promises broken: dead leases stay, claims wait.
        supervisor.start("sweep", sweep.run, every_s=settings.sweep_interval_s, vital=True)
        look = settings.claim_recheck_s
        supervisor.start("parked_claims", claims.parked.run, every_s=look, vital=True)
        supervisor.start("expiry_listener", listener.run, every_s=LISTENER_LOOK_S)
        supervisor.start("liveness", liveness.run, every_s=LIVENESS_S)
        supervisor.start("wakeup", wakeup.run, every_s=PROVE_EVERY_S)
        supervisor.start("loop_lag", telemetry.watch_loop, every_s=LOOP_TICK_S)
        supervisor.start("archiver", Archiver(pool, settings).run, every_s=ARCHIVER_S)
        supervisor.start("audit_chain", audit_chain.run, every_s=AUDIT_CHAIN_S)
        supervisor.start("key_rings", key_rings.run, every_s=KEY_RINGS_S)
        stack.push_async_callback(claims.close)
        stack.push_async_callback(revocations.close)
        breaker = RunnerBreaker(pool, settings)
        shares = RunnerShares(settings.uploads_max, settings.verify_max)
        yield Services(
            settings=settings,
            credentials=Credentials(pool, tokens, revocations),
            registry=Registry(pool, settings, tokens, revocations, keys),
            cadence=cadence,
            claims=claims,
            heartbeats=Heartbeats(pool, settings, keys, telemetry, cadence),
            releases=LeaseReleases(pool, settings, keys, breaker),
            submissions=Submissions(
                pool, settings, keys, trusted, receipts, workers, telemetry, breaker, shares
            ),
            allowlist=Allowlist(pool, tokens, revocations, keys),
            enqueue=Enqueue(pool, settings, workers),
            queue=QueueView(pool),
            explain=Explain(pool, settings),
            pauses=Pauses(pool),
            results=Results(pool),
            moderation=Moderation(pool),
            model_needs=ModelNeeds(pool),
            in_flight=in_flight,
            liveness=liveness,
            runner_admin=RunnerAdmin(pool, settings),
            runner_tokens=RunnerTokens(pool, tokens, revocations),
            shares=shares,
            shared_rates=SharedRates(revoked.client, settings.anonymous_rate),
            tokens=TokenAdmin(pool),
            audit=AuditLog(pool),
            health=Health(
                pool, leases.client, listener, trusted, newest_version(), supervisor, key_rings
            ),
            receipts=receipts,
            reload=Reload(settings, trusted, tokens, receipt_keys, key_rings),
            telemetry=telemetry,
            tally=QueueTally(pool, telemetry, stale_after(settings)),
            supervisor=supervisor,
            version=version,
        )


def make_app(services: Services) -> Application:
    """Return the application: every address of every module."""
    modules = (
        runners, queue, submit, admin_keys, admin_queue, admin_audit, admin_models, admin_runners,
        admin_results, admin_tokens, health, public, openapi,
    )  # fmt: skip
    return Application(
        [route for module in modules for route in module.routes(services)],
        default_handler_class=NotFoundHandler,
        default_handler_args={"services": services},
        log_function=log_request,
        proxies=Proxies(services.settings.proxy_networks),
        rates=ClientRates(services.settings.anonymous_rate, services.settings.runner_rate),
    )


def make_server(app: Application, services: Services) -> Server:
    """Return the HTTP server with our limits, and let its patrol run."""
    settings = services.settings
    limits = Limits(
        connections_max(settings), settings.connections_per_address, app.settings["proxies"]
    )
    server = Server(app, limits, services.telemetry)
    services.telemetry.watch(http_connections=lambda: len(server.streams))
    services.supervisor.start("patrol", server.patrol, every_s=PATROL_S)
    return server


async def serve(settings: Settings, read_settings: ReadSettings = load_settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. At SIGHUP, reload what `read_settings` returns.

    Raises ServerRefused, DatabaseUnready or PolicyRefused when it cannot start, and ServerLost,
    drained, when a background loop cannot be kept running.
    """
    stop, hangup = _stop_signal(), _hangup_signal()
    raise_limit()
    async with open_services(settings) as services:
        await services.audit.check_role()
        await services.health.check_replication()
        reloads = partial(services.reload.run, hangup, read_settings)
        services.supervisor.start("reload", reloads)
        server = make_server(make_app(services), services)
        sockets = _bind(settings)
        freeze_start()
        server.add_sockets(sockets)
        port = sockets[0].getsockname()[1]
        fit = connections_max(settings)
        # A runner has one connection for its claim or its beat, a second one while it uploads.
        log.info("server.listening", address=settings.listen_address, port=port,
                 connections_max=fit, runners_fit=fit // 2)  # fmt: skip
        services.submissions.warm()
        await _first_of(stop, services.supervisor.lost)
        await drain(settings, services, server)
        if services.supervisor.lost.is_set():
            raise ServerLost("a background loop cannot be kept running: see loop.lost in the log")


def freeze_start() -> None:
    """Take what the start has made out of the garbage collector's sight.

    It stays until the end, and a full collection that goes through it stops all answers for 200 ms.
    """
    gc.collect()
    gc.freeze()


async def drain(settings: Settings, services: Services, server: Server) -> None:
    """Take no more work, finish what is in flight, close.

    A request on a kept-alive connection is served, with an answer that ends the connection, until
    nothing is in flight; one that comes later is refused or cut before anything is done for it.
    The order matters: the balancer looks elsewhere first (/readyz), parked claims are answered at
    once, and only then do we stop listening; closing connections first would cut answers off.
    """
    log.info("server.draining")
    services.health.drain()
    services.in_flight.drain()
    server.conn_params.no_keep_alive = True
    services.claims.drain()
    await asyncio.sleep(settings.drain_notice_s)
    server.stop()
    if cut := await services.in_flight.close(settings.drain_s):
        log.warning("server.drain_cut", in_flight=cut)
    try:
        # Tornado waits for the handlers of the connections it closes, and one may be stuck.
        async with asyncio.timeout(CLOSE_S):
            await server.close_all_connections()
    except TimeoutError:
        log.warning("server.close_cut")
    log.info("server.stopped")


def main() -> None:
    """Serve from the settings; what stops the start is one line and exit code 1."""
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        asyncio.run(serve(settings))
    except (SettingsRefused, ServerRefused, ServerLost, DatabaseUnready, PolicyRefused) as error:
        sys.exit(f"bakeoff-queue: {error}")


def _parked_max(settings: Settings) -> int:
    """Return how many claims may wait: not all connections, or no heartbeat would get through."""
    try:
        return connections_max(settings) * 9 // 10
    except TooFewDescriptors as error:
        raise ServerRefused(str(error)) from None


async def _hold_rings(pool: asyncpg.Pool, settings: Settings) -> KeyRings:
    """Return the rings of the settings, compared with those of all processes before us."""
    key_rings = KeyRings(pool)
    try:
        await key_rings.hold(settings)
    except SettingsRefused as error:
        raise ServerRefused("; ".join(str(error).splitlines())) from None
    return key_rings


async def _open_redis(stack: AsyncExitStack, setting: str, url: str) -> Topology:
    """Return the Redis of `url`. One that is away is told of, and does not stop the start."""
    try:
        topology = open_topology(url)
    except RedisUrlRefused as error:
        raise ServerRefused(f"{PREFIX}{setting} is not a Redis URL: {error}") from None
    stack.push_async_callback(topology.close)
    try:
        await topology.client.ping()
    except Exception as error:  # a Cluster's client raises more than RedisError
        log.warning(
            "redis.unreachable",
            error=describe(error),
            fix=f"start Redis or correct {PREFIX}{setting}; until then lapses are noticed later",
        )
    return topology


async def _first_of(*events: asyncio.Event) -> None:
    """Return when one of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    await cancel(*waits)


def _stop_signal() -> asyncio.Event:
    """Return what the first SIGTERM or SIGINT sets; the second ends the process at once."""
    loop, stop, numbers = (
        asyncio.get_running_loop(),
        asyncio.Event(),
        (signal.SIGTERM, signal.SIGINT),
    )

    def ask() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        loop.add_signal_handler(number, ask)
    return stop


def _hangup_signal() -> asyncio.Event:
    """Return what every SIGHUP sets; from here on none ends the process, as it does by default."""
    hangup = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
    return hangup


def _bind(settings: Settings) -> list[socket.socket]:
    try:
        return bind_sockets(settings.listen_port, settings.listen_address)
    except OSError as error:
        fix = {
            errno.EADDRINUSE: "set BAKEOFF_QUEUE_LISTEN_PORT to a free port",
            errno.EACCES: "set BAKEOFF_QUEUE_LISTEN_PORT to a port above 1023, or allow this one",
        }.get(error.errno or 0, "set BAKEOFF_QUEUE_LISTEN_ADDRESS to an address of this machine")
        raise ServerRefused(
            f"cannot listen on {settings.listen_address} port {settings.listen_port}:"
            f" {error.strerror}; {fix}"
        ) from None


if __name__ == "__main__":
    main()
