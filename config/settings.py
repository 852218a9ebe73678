"""Every knob of the service, with its unit, its default and the reason for it.

One frozen `Settings`; nothing else reads the environment. Values come from, in this order:
arguments, `BAKEOFF_QUEUE_*` in the environment, `BAKEOFF_QUEUE_*_FILE` (a file that holds a
secret), and the `queue:` section of a YAML file, so that the settings can live in bakeoff's own
config.yaml. A mistyped name is an error in each of them.
"""

import difflib
import os
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from config import strict_yaml
from config.key_rings import HeldKey, held_keys, parse_key_ring, parse_seed_ring
from config.read_errors import describe_read_error
from config.tracing import INSTALL, is_installed
from config.urls import check_http_url, check_listen_address, check_url

PREFIX = "BAKEOFF_QUEUE_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
# Read by the command line's admin commands (cli/), not part of the service's settings.
CLIENT_VARIABLES = {f"{PREFIX}URL", f"{PREFIX}TOKEN"}
DAY_S = 86_400
REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster")
# PostgreSQL's intervals and Python's timedelta hold it; who wants to keep things for ever says so.
MAX_RETENTION_S = 1000 * 365 * DAY_S
NO_TOKEN_KEYS = (
    f"{PREFIX}TOKEN_KEYS is not set: give all processes the same key ring,"
    ' for instance "2026-01:$(openssl rand -hex 32)"'
)
NO_RECEIPT_KEYS = (
    f"{PREFIX}RECEIPT_KEYS is not set, and receipts are signed with them: give all processes the"
    ' same key ring, for instance "2026-01:$(openssl rand -hex 32)"'
)
NO_TRACING = f"{PREFIX}TRACING is set and OpenTelemetry is not installed: {INSTALL}, or unset it"


class SettingsRefused(Exception):
    """The settings are wrong; the message has a line for each, with the fix."""


class Settings(BaseSettings):
    """The service's settings. Durations are whole seconds and end in `_s`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    database_url: SecretStr = Field(
        SecretStr("postgres://localhost/bakeoff"),
        description="PostgreSQL 15-18, the authority: postgres://user:password@host/name, or"
        " several hosts, of which the one that takes changes is used: postgres://user@host1,host2/name",
    )
    database_listen_url: SecretStr | None = Field(
        None,
        description="Where to LISTEN and where `db migrate` works, if not at database_url:"
        " PostgreSQL itself. Through PgBouncer in transaction mode nothing is ever heard, and"
        " waiting claims find new runs late.",
    )
    redis_lease_url: str = Field(
        "redis://localhost:6379/1",
        repr=False,  # it may hold a password
        description="Redis for lease keys, in a logical database of their own: expiry events come"
        " late when one database holds many keys with a TTL. Forms: redis://, rediss://, unix://,"
        " redis+sentinel://[user:password@]host:port,host:port/SERVICE/DB,"
        " redis+cluster://[user:password@]host:port,host:port",
    )
    redis_token_url: str = Field(
        "redis://localhost:6379/2",
        repr=False,
        description="Redis for token revocations, in another database than the lease one's. A"
        " Cluster has only database 0: both may be in it, in URLs that differ (the hosts in another"
        " order); the keys' prefixes keep them apart.",
    )
    listen_address: str = Field(
        "127.0.0.1",
        description="Address or host name to listen on: 0.0.0.0 is every address of IPv4, :: of"
        " IPv6, and an empty one of both.",
    )
    listen_port: int = Field(8400, ge=0, le=65535, description="Port to listen on; 0 picks one.")
    connections_per_address: int = Field(
        512,
        ge=0,
        description="Connections that one client's address (of IPv6: its /64) may have open at a"
        " process; one more is closed at once. 0: any number. Trusted proxies are not counted.",
    )
    anonymous_rate: float = Field(
        20,
        ge=0,
        description="Requests a second without a good token that one client's address (of IPv6: its"
        " /64) may send to a process, registrations among them, and ten times as many at once; then"
        " 429. 0: any number.",
    )
    runner_rate: float = Field(
        50,
        ge=0,
        description="Requests a second that one runner may send to a process, and ten times as many"
        " at once; then 429. 0: any number.",
    )
    metrics_token: SecretStr = Field(
        SecretStr(""),
        description="Bearer token that /metrics wants, which Prometheus sends (`authorization:"
        " credentials_file`). None: anybody may read it who reaches this process.",
    )
    trusted_proxies: str = Field(
        "",
        description="Addresses or networks, with commas between them, of the proxies in front of"
        " this process, for instance 127.0.0.1: X-Forwarded-For is believed from them alone.",
    )
    public_url: str = Field(
        "http://127.0.0.1:8400",
        description="The address runners know us by, which they sign as the audience: http(s)://,"
        " the host, and the port or path if there is one.",
    )
    token_keys: SecretStr = Field(
        SecretStr(""),
        description="Key ring of the runner tokens: kid:secret[,kid:secret]; the first one signs,"
        " the others still verify. Each secret has 32 bytes or more.",
    )
    receipt_keys: SecretStr = Field(
        SecretStr(""),
        description="Ed25519 keys that sign receipts: kid:seed[,kid:seed], each seed 32 bytes in"
        " hex. The first one signs; the public keys of all are published, so that receipts of"
        " former keys can still be verified: to rotate, put a new one in front.",
    )
    token_ttl_s: int = Field(
        900,
        ge=30,
        description="Life of a runner token. Processes of this service take it 10 s longer, and 10"
        " s before it begins: so far their machines' clocks may be apart.",
    )
    clock_skew_s: int = Field(
        300, ge=1, description="How far signed_at of a registration may be from our clock."
    )
    lease_ttl_s: int = Field(
        300,
        ge=2,
        description="A lease that is silent for so long lapses: of a large fleet, where loaded GPU"
        " hosts miss beats.",
    )
    lease_ttl_min_s: int = Field(
        60,
        ge=2,
        description="The same of a small fleet. As heartbeats grow beyond 100 a second and process,"
        " answers stretch it to lease_ttl_s. Set both to the same for a fixed lease.",
    )
    heartbeat_interval_s: int = Field(
        30, ge=1, description="How often a runner beats, in a large fleet."
    )
    heartbeat_interval_min_s: int = Field(
        10, ge=1, description="The same in a small fleet; stretched likewise."
    )
    claim_wait_max_s: int = Field(
        50, ge=0, le=300, description="Longest wait of a claim; balancers cut at 60 s."
    )
    max_runtime_s: int = Field(86_400, ge=1, description="Longest life of one attempt at a run.")
    max_attempts: int = Field(5, ge=1, description="Failures after which a run is FAILED for good.")
    retry_backoff_s: int = Field(
        300, ge=0, description="A failed run waits this long times its attempt count."
    )
    aging_s: int = Field(
        86_400,
        ge=0,
        description="A run that younger ones overtake for longer comes to the front, and of equal"
        " priorities the largest that fits goes first. 0: strictly by priority, then by age.",
    )
    failing_runner_pause_s: int = Field(
        900, ge=0, description="Pause of a runner that failed three runs in a row, or the like."
    )
    max_leases: int = Field(1, ge=1, le=64, description="Leases a runner may hold at once.")
    sweep_interval_s: float = Field(5, gt=0, description="Between sweeps, with 20 % jitter.")
    sweep_degraded_s: float = Field(
        1, gt=0, description="Between sweeps while Redis gives no expiry events."
    )
    claim_recheck_s: float = Field(
        5, gt=0, description="Parked claims look again after this, in case a NOTIFY was lost."
    )
    trusted_root: Path | None = Field(
        None, description="Sigstore trusted_root.json; none means Sigstore's production root."
    )
    trusted_root_stale_s: int = Field(
        1_095 * 86_400,
        ge=1,
        description="A trust root whose newest key is older than this makes /readyz say degraded:"
        " bundles of a log that it does not know yet are unverifiable. Between two keys of"
        " Sigstore's own there have been up to 33 months.",
    )
    signers_file: Path = Field(
        Path(__file__).with_name("signers.yaml"),
        description="Who may sign bundles. The default is the commented example inside the"
        " installed package, next to its config/settings.py: copy it, name your signers, and set"
        " its path.",
    )
    workers: int = Field(
        0,
        ge=0,
        description="Processes that verify bundles, started when there is work for them and kept,"
        " with some 100 MB of memory each; 0: one for each core, at most 4. More than there are"
        " cores gain nothing.",
    )
    verify_max: int = Field(
        8, ge=1, description="Bundles verified or waiting to be, at a time; then 503 busy."
    )
    uploads_max: int = Field(
        16, ge=1, description="Bundles received at a time; each may take 34 MiB of disk."
    )
    database_pool_max: int = Field(10, ge=2, description="Connections to PostgreSQL per process.")
    drain_s: float = Field(20, ge=0, description="Longest wait for requests in flight at a stop.")
    drain_notice_s: float = Field(
        0,
        ge=0,
        description="How long /readyz answers 503 before we stop listening, so that the"
        " balancer has seen it; 0 suits a process without a balancer.",
    )
    archive_after_s: int = Field(
        7 * DAY_S,
        ge=3600,
        le=MAX_RETENTION_S,
        description="A run that ended this long ago moves out of the queue's table, with its"
        " ledger. Requests that come late come within hours; more than a week of finished runs"
        " would only make the table large.",
    )
    keep_failed_s: int = Field(
        180 * DAY_S,
        ge=3600,
        le=MAX_RETENTION_S,
        description="`prune` deletes archived FAILED and CANCELLED runs that ended longer ago:"
        " after half a year nobody asks why one failed, nor puts it back.",
    )
    keep_ledgers_s: int = Field(
        365 * DAY_S,
        ge=3600,
        le=MAX_RETENTION_S,
        description="`prune` deletes the attempts of COMPLETE runs that ended longer ago; the"
        " result names its runner, key and lease by itself.",
    )
    keep_refusals_s: int = Field(
        90 * DAY_S,
        ge=3600,
        le=MAX_RETENTION_S,
        description="`prune` deletes records of refused bundles that are older.",
    )
    keep_answers_s: int = Field(
        30 * DAY_S,
        ge=3600,
        le=MAX_RETENTION_S,
        description="`prune` deletes the remembered answers of admins' POSTs that are older: the"
        " same Idempotency-Key is then a new request, so it must outlast every client's retries.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, JSON elsewhere."
    )
    tracing: bool = Field(
        False,
        description="OpenTelemetry traces by OTLP over HTTP (extra `otel`); OTEL_* variables say"
        " where to and how many.",
    )
    sandbox_postgres: Path | None = Field(
        None, description="Folder of the PostgreSQL programs that demo, dev and tests start."
    )
    sandbox_redis: Path | None = Field(
        None, description="The redis-server that demo, dev and tests start."
    )

    @field_validator("public_url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        return check_http_url(value)

    @field_validator("listen_address")
    @classmethod
    def _listen_address(cls, value: str) -> str:
        return check_listen_address(value)

    @field_validator("database_url", "database_listen_url")
    @classmethod
    def _database_address(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_url(value.get_secret_value(), "postgres", "postgresql")
        return value

    @field_validator("redis_lease_url", "redis_token_url")
    @classmethod
    def _redis_address(cls, value: str) -> str:
        return check_url(value, *REDIS_SCHEMES)

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: str) -> str:
        parse_networks(value)
        return value

    @field_validator("token_keys")
    @classmethod
    def _key_ring(cls, value: SecretStr) -> SecretStr:
        parse_key_ring(value)
        return value

    @field_validator("receipt_keys")
    @classmethod
    def _seed_ring(cls, value: SecretStr) -> SecretStr:
        parse_seed_ring(value)
        return value

    @model_validator(mode="after")
    def _durations_fit(self) -> Self:
        if self.lease_ttl_s < 3 * self.heartbeat_interval_s:
            raise ValueError(
                f"lease_ttl_s ({self.lease_ttl_s}) must be at least 3 x heartbeat_interval_s"
                f" ({self.heartbeat_interval_s}): one lost beat must not cost a lease"
            )
        ttl_s = min(self.lease_ttl_min_s, self.lease_ttl_s)
        if ttl_s < 3 * min(self.heartbeat_interval_min_s, self.heartbeat_interval_s):
            raise ValueError(
                f"lease_ttl_min_s ({self.lease_ttl_min_s}) must be at least 3 x"
                f" heartbeat_interval_min_s ({self.heartbeat_interval_min_s})"
            )
        if self.redis_lease_url == self.redis_token_url:
            raise ValueError(
                "redis_lease_url and redis_token_url must name different logical databases"
            )
        return self

    @property
    def local_url(self) -> str:
        """Where a process on this machine answers, asked from this machine."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(  # noqa: S104 (compared)
            self.listen_address, self.listen_address
        )
        return f"http://{f'[{host}]' if ':' in host else host}:{self.listen_port}"

    @property
    def proxy_networks(self) -> list[IPv4Network | IPv6Network]:
        """The networks of the trusted proxies."""
        return parse_networks(self.trusted_proxies)

    @property
    def token_ring(self) -> dict[str, bytes]:
        """The token keys by kid, the signing one first."""
        return parse_key_ring(self.token_keys)

    @property
    def receipt_ring(self) -> dict[str, bytes]:
        """The seeds of the receipt keys by kid, the signing one first."""
        return parse_seed_ring(self.receipt_keys)

    @property
    def held_keys(self) -> list[HeldKey]:
        """The keys of both rings, by their fingerprints."""
        rings = {"token_keys": self.token_ring, "receipt_keys": self.receipt_ring}
        return [key for name, ring in rings.items() for key in held_keys(name, ring)]

    @property
    def verify_processes(self) -> int:
        """The largest number of processes that verify bundles."""
        return self.workers or min(os.cpu_count() or 1, 4)

    @property
    def missing_for_server(self) -> list[str]:
        """A line for each thing that only a server needs and that is not set, with the fix.

        A key made at the start would serve one process alone: behind a balancer, every other answer
        would be 401, and no two receipts would be signed alike.
        """
        needed = (
            (self.token_ring, NO_TOKEN_KEYS),
            (self.receipt_ring, NO_RECEIPT_KEYS),
            (not self.tracing or is_installed(), NO_TRACING),
        )
        return [line for given, line in needed if not given]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Say which source wins: arguments, environment, secret files, YAML."""
        return init_settings, env_settings, _SecretFiles(settings_cls), _QueueSection(settings_cls)


def parse_networks(text: str) -> list[IPv4Network | IPv6Network]:
    """Read `address[/bits][,...]`. Raises ValueError, which names the entry that is none."""
    networks = []
    for entry in filter(None, (each.strip() for each in text.split(","))):
        try:
            networks.append(ip_network(entry))
        except ValueError:
            raise ValueError(
                f"{entry} is neither an address nor a network such as 10.0.0.0/8"
            ) from None
    return networks


def load_settings(**arguments: Any) -> Settings:
    """Read the settings. Raises SettingsRefused with a line for each thing wrong."""
    problems = _unknown_variables()
    try:
        settings = Settings(**arguments)
    except SettingsRefused as refused:
        problems.append(str(refused))
    except ValidationError as error:
        problems += map(_explain, error.errors())
    else:
        if not problems:
            return settings
    raise SettingsRefused("\n".join(problems))


def secret_files() -> dict[str, Path]:
    """Return the files that hold values of settings, by the variable that names each."""
    own = {PREFIX + name.upper() for name in Settings.model_fields}
    given = (f"{name}_FILE" for name in own if f"{name}_FILE" not in own)
    return {name: Path(os.environ[name]) for name in given if name in os.environ}


def _unknown_variables() -> list[str]:
    names = {PREFIX + name.upper() for name in Settings.model_fields}
    known = names | {f"{name}_FILE" for name in names} | CLIENT_VARIABLES | {CONFIG_VARIABLE}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    bare = {name.removeprefix(PREFIX) for name in known}
    return [_unknown(name.removeprefix(PREFIX), bare, PREFIX) for name in unknown]


def _unknown(name: str, known: set[str], prefix: str = "") -> str:
    """Say so, with the name that was meant. What all names begin with makes none alike."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"{prefix}{name}: no such setting{hint}"


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return _unknown(name, set(Settings.model_fields))
    if isinstance(item["input"], _Unreadable):
        return item["input"].problem
    return f"{PREFIX}{name.upper()}: {message}" if name else message


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """In place of a value that was in a file: no setting takes it, so all else is checked too."""

    problem: str


class _SecretFiles(PydanticBaseSettingsSource):
    """`BAKEOFF_QUEUE_<NAME>_FILE` names a file whose text is the value of `<NAME>`."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        path = os.environ.get(f"{PREFIX}{field_name.upper()}_FILE")
        # A field that itself ends in _file has its own variable of that spelling.
        if path is None or f"{field_name}_file" in Settings.model_fields:
            return None, field_name, False
        try:
            return Path(path).read_text("utf-8").strip(), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{PREFIX}{field_name.upper()}_FILE: cannot read {path}"
            return _Unreadable(f"{problem}: {describe_read_error(error)}"), field_name, False

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(f, name)[0] for name, f in _fields(self).items()}
        return {name: value for name, value in found.items() if value is not None}


class _QueueSection(PydanticBaseSettingsSource):
    """The `queue:` section of the YAML file that `BAKEOFF_QUEUE_CONFIG` names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = os.environ.get(CONFIG_VARIABLE)
        return _read_queue_section(Path(path)) if path else {}


def _fields(source: PydanticBaseSettingsSource) -> dict[str, FieldInfo]:
    return source.settings_cls.model_fields


def _read_queue_section(path: Path) -> dict[str, Any]:
    try:
        document = strict_yaml.load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise SettingsRefused(
            f"{CONFIG_VARIABLE}: cannot read {path}: {describe_read_error(error)}"
        ) from None
    section = (document or {}).get("queue", {}) if isinstance(document or {}, dict) else None
    if not isinstance(section, dict):
        raise SettingsRefused(f"{path}: `queue:` must hold the settings by name")
    return section
