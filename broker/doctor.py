"""Checks of everything that the service stands on, each with its fix: `bakeoff-queue doctor`.

Works beside the server, from the settings alone: it also explains why a server does not start.
"""

import asyncio
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import asyncpg
import httpx

from auth.errors import PolicyRefused
from auth.signers import BundleVerifier, load_policy
from broker.admin.key_rings import KeyRings
from broker.leases.redis_topology import RedisUrlRefused, open_topology
from broker.results.active_verifier import ActiveVerifier
from broker.results.bundle import CAPS
from config.settings import PREFIX, Settings, SettingsRefused, secret_files
from db.migration_files import newest_version
from db.pool import describe, missing_migration, open_pool, replication_risk
from db.roles import can_change_the_audit
from db.run_queue import CHANNEL

State = Literal["ok", "warning", "failure"]
LOOK_S = 5.0
SKEW_MAX_S = 2.0
NOTIFY_S = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor: `fix` says what to do unless it is ok."""

    check: str
    state: State
    detail: str
    fix: str | None = None


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """Yield a finding per check, in the order in which they should be mended."""
    for finding in _settings(settings):
        yield finding
    for check in (_database, _redis, _public_url):
        try:
            async with asyncio.timeout(4 * LOOK_S):
                async for finding in check(settings):
                    yield finding
        except Exception as error:  # whatever it is, it is a finding
            yield Finding(check.__name__.strip("_"), "failure", describe(error))


def _settings(settings: Settings) -> list[Finding]:
    lacking = settings.missing_for_server
    found = [
        Finding("settings", "failure", problem, "set it; docs/settings.md lists all settings")
        for problem in lacking
    ] or [Finding("settings", "ok", "all that `serve` needs is set, and no name is unknown")]
    return [*found, *_secret_files(), _trust_root(settings), _signers(settings), _spool(settings)]


def _secret_files() -> list[Finding]:
    """Check the mode of each file that a `*_FILE` setting names."""
    found = []
    for name, path in sorted(secret_files().items()):
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            found.append(Finding("secret files", "failure", f"{name}: {path}: {error.strerror}"))
            continue
        if mode & 0o007:
            detail = f"{name}: {path} has mode {mode:04o}: others on this machine can read it"
            found.append(Finding("secret files", "warning", detail, f"chmod 600 {path}"))
    return found or [Finding("secret files", "ok", "readable by their owner only, or none is used")]


def _trust_root(settings: Settings) -> Finding:
    try:
        verifier = BundleVerifier(settings.trusted_root, load_policy(settings.signers_file))
    except PolicyRefused as error:
        return Finding("trust root", "failure", str(error), "put a good trusted_root.json there")
    state = ActiveVerifier(verifier, settings.trusted_root_stale_s).root_state()
    if state == "ok":
        return Finding("trust root", "ok", "recent enough")
    return Finding("trust root", "warning", state.removeprefix("degraded: "))


def _signers(settings: Settings) -> Finding:
    try:
        ignored = load_policy(settings.signers_file).ignored
    except PolicyRefused as error:
        return Finding("signer policy", "failure", str(error), f"mend {settings.signers_file}")
    if ignored:
        detail = "; ".join(f"{entry.where}: {entry.why}" for entry in ignored)
        return Finding("signer policy", "warning", f"entries are ignored: {detail}",
                       f"mend {settings.signers_file}")  # fmt: skip
    return Finding("signer policy", "ok", str(settings.signers_file))


def _spool(settings: Settings) -> Finding:
    folder = tempfile.gettempdir()
    free, needed = shutil.disk_usage(folder).free, settings.uploads_max * sum(CAPS.values())
    detail = (
        f"{free >> 20} MiB free in {folder}; {settings.uploads_max} uploads need {needed >> 20}"
    )
    if free < needed:
        return Finding("spool", "failure", detail, "free space there, or set TMPDIR elsewhere")
    return Finding("spool", "ok", detail)


async def _database(settings: Settings) -> AsyncIterator[Finding]:
    dsn = settings.database_url.get_secret_value()
    try:
        async with open_pool(dsn, 2) as pool:
            yield Finding("PostgreSQL", "ok", await pool.fetchval("SELECT version()"))
            for check in (_migrations, _role, _connections, _clock, _replication):
                yield await check(pool, settings)
            yield await _rings(pool, settings)
    except Exception as error:  # a driver raises much
        yield Finding(
            "PostgreSQL", "failure", describe(error),
            f"look at {PREFIX}DATABASE_URL, and whether the server runs",
        )  # fmt: skip
        return
    yield await _notifications(settings)


async def _migrations(pool: asyncpg.Pool, _: Settings) -> Finding:
    newest = newest_version()
    if await missing_migration(pool, newest):
        return Finding("migrations", "failure", f"{newest} is missing", "bakeoff-queue db migrate")
    return Finding("migrations", "ok", f"up to {newest}")


async def _role(pool: asyncpg.Pool, _: Settings) -> Finding:
    if await pool.fetchval("SELECT to_regclass('audit') IS NULL"):
        return Finding("role", "warning", "there is no table yet", "bakeoff-queue db migrate")
    if await can_change_the_audit(pool):
        return Finding(
            "role", "warning", "this role can change the audit trail",
            "bakeoff-queue db roles, then serve as a member of bakeoff_queue_service",
        )  # fmt: skip
    missing = await pool.fetchval(
        "SELECT string_agg(t, ', ') FROM unnest(ARRAY['run_queue', 'attempts', 'runners',"
        " 'submissions']) AS t WHERE NOT has_table_privilege(t, 'SELECT, INSERT, UPDATE')"
    )
    if missing:
        return Finding("role", "failure", f"no rights on {missing}", "bakeoff-queue db roles")
    return Finding("role", "ok", "may do what the service does, and cannot change the audit trail")


async def _connections(pool: asyncpg.Pool, settings: Settings) -> Finding:
    row = await pool.fetchrow(
        "SELECT current_setting('max_connections')::int"
        " - current_setting('superuser_reserved_connections')::int AS most,"
        " (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS used"
    )
    assert row is not None
    each = settings.database_pool_max + 1  # and the one that listens
    fit = row["most"] // each
    detail = f"{row['used']} of {row['most']} in use; a process takes up to {each}: {fit} fit"
    if fit < 1:
        return Finding("connections", "failure", detail,
                       f"lower {PREFIX}DATABASE_POOL_MAX or raise max_connections")  # fmt: skip
    if row["used"] > 0.8 * row["most"]:
        return Finding("connections", "warning", detail, "raise max_connections, or use PgBouncer")
    return Finding("connections", "ok", detail)


async def _clock(pool: asyncpg.Pool, _: Settings) -> Finding:
    before = datetime.now(UTC)
    theirs = await pool.fetchval("SELECT clock_timestamp()")
    skew = (theirs - before - (datetime.now(UTC) - before) / 2).total_seconds()
    return _skew("clock of PostgreSQL", skew)


def _skew(check: str, skew_s: float) -> Finding:
    detail = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
    if abs(skew_s) > SKEW_MAX_S:
        return Finding(check, "warning", detail, "let NTP set the clocks of both machines")
    return Finding(check, "ok", detail)


async def _replication(pool: asyncpg.Pool, _: Settings) -> Finding:
    risk = await replication_risk(pool)
    if risk is None:
        return Finding(
            "replication", "ok", "no failover loses what was acknowledged, or no standby"
        )
    detail, _sep, fix = risk.partition("; ")
    return Finding("replication", "warning", detail, fix)


async def _rings(pool: asyncpg.Pool, settings: Settings) -> Finding:
    rings = KeyRings(pool)
    try:
        await rings.hold(settings)
        await rings.run_once()
    except SettingsRefused as refused:
        return Finding("key rings", "failure", "; ".join(str(refused).splitlines()),
                       "give all processes the same rings; bakeoff-queue rings ls")  # fmt: skip
    except asyncpg.UndefinedTableError:
        return Finding("key rings", "warning", "there is no table yet", "bakeoff-queue db migrate")
    if rings.problem:
        return Finding("key rings", "warning", rings.problem, "bakeoff-queue rings ls")
    return Finding("key rings", "ok", "the same as those of the other processes")


async def _notifications(settings: Settings) -> Finding:
    """Send a NOTIFY through the database URL and receive it at the listening one."""
    listen = settings.database_listen_url or settings.database_url
    received = asyncio.Event()
    listener: Any = await asyncpg.connect(listen.get_secret_value(), timeout=LOOK_S)
    try:
        await listener.add_listener(CHANNEL, lambda *_: received.set())
        async with open_pool(settings.database_url.get_secret_value(), 1) as pool:
            await pool.execute("SELECT pg_notify($1, '')", CHANNEL)
            async with asyncio.timeout(NOTIFY_S):
                await received.wait()
    except TimeoutError:
        return Finding(
            "notifications", "failure", "a NOTIFY was not received: a pooler in transaction mode?",
            f"set {PREFIX}DATABASE_LISTEN_URL to the server itself, past PgBouncer",
        )  # fmt: skip
    finally:
        await listener.close()
    return Finding("notifications", "ok", "a NOTIFY arrives: parked claims are woken at once")


async def _redis(settings: Settings) -> AsyncIterator[Finding]:
    for name, url in (("lease", settings.redis_lease_url), ("token", settings.redis_token_url)):
        check = f"Redis ({name} keys)"
        try:
            topology = open_topology(url)
        except RedisUrlRefused as error:
            yield Finding(check, "failure", str(error), f"mend {PREFIX}REDIS_{name.upper()}_URL")
            continue
        try:
            async with asyncio.timeout(LOOK_S):
                for address in await topology.primaries():
                    client = topology.connect(address)
                    try:
                        async for finding in _node(client, f"{check} {address}", name == "lease"):
                            yield finding
                    finally:
                        await client.aclose()
        except Exception as error:  # a Cluster's client raises more than RedisError
            yield Finding(
                check, "warning", f"{describe(error)}: it costs latency only, PostgreSQL decides",
                f"look at {PREFIX}REDIS_{name.upper()}_URL, and whether the server runs",
            )  # fmt: skip
        finally:
            await topology.close()


async def _node(client: Any, check: str, has_leases: bool) -> AsyncIterator[Finding]:
    seconds, microseconds = await client.time()
    yield _skew(f"clock of {check}", seconds + microseconds / 1e6 - datetime.now(UTC).timestamp())
    told: dict[str, str] = {}
    for name in ("maxmemory-policy", "notify-keyspace-events", "maxmemory"):
        told |= await client.config_get(name)
    policy = told.get("maxmemory-policy", "")
    if policy != "noeviction" and told.get("maxmemory", "0") != "0":
        yield Finding(
            f"{check} eviction", "warning", f"maxmemory-policy is {policy}: keys may vanish early",
            "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
        )  # fmt: skip
    else:
        idle = policy not in ("", "noeviction")
        detail = f"{policy}, but no maxmemory: nothing is evicted" if idle else policy
        yield Finding(f"{check} eviction", "ok", detail or "cannot be asked")
    if not has_leases:
        return
    events = told.get("notify-keyspace-events", "")
    if not ({"E", "x"} <= set(events) or {"E", "A"} <= set(events)):
        yield Finding(
            f"{check} events", "failure",
            f"notify-keyspace-events is {events!r}: lapses are noticed by the sweep only",
            "redis-cli CONFIG SET notify-keyspace-events Ex, and the same line in redis.conf or"
            " CONFIG REWRITE, so that a restart keeps it (managed Redis: its parameter group)",
        )  # fmt: skip
        return
    server = await client.info("server")
    if not server.get("config_file"):
        yield Finding(
            f"{check} events", "warning",
            f"notify-keyspace-events is {events!r}, but this Redis has no configuration file: its"
            " next restart forgets it",
            "start Redis with a redis.conf (or a command line) that says"
            " notify-keyspace-events Ex",
        )  # fmt: skip
    else:
        yield Finding(f"{check} events", "ok", f"{events!r}, from {server['config_file']}")


async def _public_url(settings: Settings) -> AsyncIterator[Finding]:
    url = settings.public_url
    if not url:
        return
    address = f"{url.rstrip('/')}/.well-known/bakeoff-queue.json"
    fix = f"start the service, or mend {PREFIX}PUBLIC_URL: runners sign for that very address"
    try:
        async with httpx.AsyncClient(timeout=LOOK_S, trust_env=False) as http:
            answer = await http.get(address)
            said = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        yield Finding("public URL", "warning", f"{address}: {describe(error)}", fix)
        return
    if answer.status_code != 200 or said.get("name") != "bakeoff-queue":
        yield Finding("public URL", "failure", f"{address} is not this service", fix)
    elif said.get("public_url", url) != url:
        yield Finding("public URL", "failure", f"{address} says it is {said['public_url']}", fix)
    else:
        yield Finding("public URL", "ok", f"{url} answers")


def worst(findings: list[Finding]) -> State:
    """Return the worst state among findings."""
    states = {finding.state for finding in findings}
    return "failure" if "failure" in states else "warning" if "warning" in states else "ok"
