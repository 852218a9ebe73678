"""The services that `demo` and `dev` share: private servers, a throwaway Sigstore, our processes.

`open_stack` is the way in. What must be kept (keys, the Sigstore, the admin token) lies in the
data folder if there is one; all else in a folder of a leash, which removes it however we end.
"""

import asyncio
import contextlib
import os
import queue
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from auth import admin_tokens
from auth.errors import InvalidToken
from auth.signer_policy import SCHEMA_VERSION
from client.admin_api import AdminClient
from client.harness_config import Beside
from config.settings import PREFIX, Settings
from db import admin
from db.migrate import migrate
from db.pool import open_pool
from sandbox.runner.identity import load_key, public_key_text
from sandbox.services import servers
from sandbox.services.admin_token import new_token
from sandbox.services.children import ENDED, Child, Event, Tell, held
from sandbox.services.process_supervisor import ProcessSupervisor, SandboxError, ServerFailed
from sandbox.services.sigstore_instance import ThrowawaySigstore

READY_S = 30.0
LOOK_S = 0.05
ISSUER = "https://issuer.demo.test"
CATALOGUE = Path(__file__).parents[1] / "catalogue"
CATALOGUE_FILES = Beside(
    CATALOGUE / "tasks.jsonl", CATALOGUE / "floor_tasks.jsonl", CATALOGUE / "models"
)


@dataclass(frozen=True, slots=True)
class DemoRunner:
    """A runner of ours: its runner_id, and what it offers."""

    name: str
    vram_gb: int
    quantizations: tuple[str, ...] = ("q4_k_m", "q5_k_m", "q6_k", "q8_0", "fp16")

    @property
    def identity(self) -> str:
        """The e-mail address in its certificates."""
        return f"{self.name}@demo.test"


@dataclass(frozen=True, slots=True)
class Stack:
    """Running services; `kept` holds what a restart needs, `scratch` is gone at the end."""

    postgres: servers.Postgres
    redis: servers.Redis
    sigstore: ThrowawaySigstore
    kept: Path
    scratch: Path

    @contextmanager
    def server(self, name: str, tell: Tell, knobs: Mapping[str, Any]) -> Iterator["Server"]:
        """Start a server process with these settings; it may not be ready yet."""
        server = Server(tell)
        child = Child(name, ["server"], self._settings(knobs), self.scratch, server.hear)
        with held(child):
            server.child = child
            yield server

    def runner_command(self, runner: DemoRunner, server: str, audience: str) -> list[str]:
        """Return `sandbox.runner.main` and its arguments."""
        options = {
            "server": server,
            "audience": audience,
            "key": self.key_file(runner),
            "sigstore": self.sigstore.folder,
            "identity": runner.identity,
            "issuer": ISSUER,
            "vram-gb": runner.vram_gb,
            "quantizations": ",".join(runner.quantizations),
            "name": runner.name,
        }
        return ["sandbox.runner.main", *(f"--{name}={value}" for name, value in options.items())]

    def key_file(self, runner: DemoRunner) -> Path:
        """Where the runner's private key is."""
        return self.kept / f"{runner.name}.key"

    def admit(self, api: AdminClient, runner: DemoRunner) -> None:
        """Put the runner's key (made if there is none) on the allowlist, bound to its signer."""
        path = self.key_file(runner)
        try:
            key = load_key(path)
        except ValueError:
            raise SandboxError(f"{path} holds no runner key: remove it") from None
        signer = {"identity": runner.identity, "issuer": ISSUER}
        wanted = {
            "public_key": public_key_text(key),
            "runner_id": runner.name,
            "description": "demo runner",
            "signer": signer,
        }
        api.post("/api/admin/runner-keys", wanted)

    def admin_token(self) -> str:
        """Return the admin token of the kept file; a new one if the database does not know it."""
        path = self.kept / "admin-token"
        token, digest = _kept_token(path)
        if not asyncio.run(_is_known(self.postgres.dsn, digest)):
            token = asyncio.run(_new_token(self.postgres.dsn))
            _write_private(path, token)
        return token

    def _settings(self, knobs: Mapping[str, Any]) -> dict[str, str]:
        settings = {
            "database_url": self.postgres.dsn,
            "redis_lease_url": self.redis.url(1),
            "redis_token_url": self.redis.url(2),
            "token_keys_file": self.kept / "token-keys",
            "receipt_keys_file": self.kept / "receipt-keys",
            "trusted_root": self.sigstore.trusted_root,
            "signers_file": self.kept / "signers.yaml",
            "log_format": "json",
            **knobs,
        }
        return {f"{PREFIX}{name.upper()}": str(value) for name, value in settings.items()}


class Server:
    """A server process: `url()` waits until it is ready."""

    child: Child

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._ports: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def hear(self, event: Event) -> None:
        """Take an event of the process and pass it on."""
        if event.name == "server.listening":
            self._ports.put(event.facts["port"])
        elif event.name == ENDED:
            self._ports.put(None)
        self._tell(event)

    def url(self) -> str:
        """Return the address once /readyz answers 200. Raises ServerFailed."""
        deadline = time.monotonic() + READY_S
        with contextlib.suppress(queue.Empty):
            if (port := self._ports.get(timeout=READY_S)) is None:
                words = self.child.last_words.removeprefix("bakeoff-queue: ")
                raise ServerFailed(f"{self.child.name} ended as it started: {words}")
            url = f"http://127.0.0.1:{port}"
            while time.monotonic() < deadline:
                if _is_ready(url):
                    return url
                time.sleep(LOOK_S)
        raise ServerFailed(f"{self.child.name} was not ready within {READY_S:g} s")


@contextmanager
def open_stack(
    settings: Settings, data: Path | None, runners: tuple[DemoRunner, ...]
) -> Iterator[Stack]:
    """Yield migrated private servers and what our processes need to run on them.

    Takes the sandbox_* of `settings` only. Raises SandboxError or DatabaseUnready.
    """
    kept = {"data": data.resolve() if data else None}
    with ExitStack() as stack:
        postgres = stack.enter_context(
            servers.postgres(binaries=settings.sandbox_postgres, durable=data is not None, **kept)
        )
        redis = stack.enter_context(servers.redis(binary=settings.sandbox_redis, **kept))
        home = ProcessSupervisor(None)
        stack.callback(home.close)
        migrate(postgres.dsn)
        folder = kept["data"] or home.folder
        for name in ("token-keys", "receipt-keys"):
            _keep(folder / name, f"demo:{secrets.token_hex(32)}")
        _keep(folder / "signers.yaml", _signer_policy(runners))
        sigstore = _sigstore(folder / "sigstore")
        yield Stack(postgres, redis, sigstore, folder, home.folder)


@contextmanager
def admin_api(url: str, token: str) -> Iterator[AdminClient]:
    """Yield the admin API at `url`. The environment's proxies are not meant for it."""
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as http:
        yield AdminClient(http)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.RequestError:
        return False


def _signer_policy(runners: tuple[DemoRunner, ...]) -> str:
    identities = [{"identity": runner.identity, "issuer": ISSUER} for runner in runners]
    return yaml.safe_dump({"schema_version": SCHEMA_VERSION, "trusted_identities": identities})


def _sigstore(folder: Path) -> ThrowawaySigstore:
    """The instance in `folder`; made under another name first, so that a half one is never used."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
        ThrowawaySigstore.create(unfinished)
        unfinished.rename(folder)
    return ThrowawaySigstore.load(folder)


def _keep(path: Path, text: str) -> None:
    if not path.exists():
        _write_private(path, text)


def _write_private(path: Path, text: str) -> None:
    """Write a file that only we may read; whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
    unfinished.rename(path)


def _kept_token(path: Path) -> tuple[str, bytes]:
    with contextlib.suppress(OSError, ValueError, InvalidToken):
        token = path.read_text().strip()
        return token, admin_tokens.digest(token)
    return admin_tokens.make()


async def _is_known(dsn: str, digest: bytes) -> bool:
    async with open_pool(dsn, 1) as pool:
        return await admin.find_token(pool, digest) is not None


async def _new_token(dsn: str) -> str:
    async with open_pool(dsn, 1) as pool:
        return await new_token(pool, "sandbox")
