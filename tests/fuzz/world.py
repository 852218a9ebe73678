"""What is attacked: one real server process, its databases, and runners that hold runs."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
from nacl.signing import SigningKey

from config.settings import PREFIX
from db.migrate import migrate
from db.pool import open_pool
from sandbox.services import servers
from sandbox.services.admin_token import new_token
from sandbox.services.process_supervisor import ProcessSupervisor
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.fuzz.bundle import (
    OURS,
    STRANGERS,
    WORKFLOW,
    Bundle,
    EnvelopeSigner,
    Signer,
    SigstoreSigner,
    make_bundle,
)
from tests.fuzz.server_process import SABOTAGE
from tests.support.fleet import AUDIENCE, Fleet, Runner, run_of

ROOT = Path(__file__).parents[2]
LEASES = 64
POLICY = """schema_version: bakeoff-results-signers/v1
trusted_identities:
- {identity: runner@bakeoff.test, issuer: https://issuer.bakeoff.test}
"""
# Nothing lapses or expires during a campaign.
DAY_S = "86400"


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a run is, and which runner takes it."""

    runner: str
    tasks: int
    prompts: int
    weight: int  # of a hundred mutants, about so many are of this shape


# Mostly small ones: 100 KiB take as long as twenty of them.
SHAPES = (
    Shape("by-policy", 2, 2, 58),
    Shape("by-its-key", 2, 2, 16),
    Shape("by-workflow", 1, 1, 20),
    Shape("by-policy", 20, 5, 5),
    Shape("by-policy", 100, 20, 1),
)


@dataclass
class Servers:
    """Private servers, and where the campaign's files are."""

    dsn: str
    redis: servers.Redis
    sigstore: ThrowawaySigstore
    folder: Path

    @property
    def log(self) -> Path:
        """What the server processes log: errors only."""
        return self.folder / "server.log"


@dataclass
class World:
    """A server process under attack."""

    port: int
    fleet: Fleet
    runners: dict[str, Runner]
    signers: dict[str, tuple[Signer, tuple[Signer, ...]]]
    _claiming: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def take(self, shape: Shape) -> Bundle:
        """Enqueue a run of a shape, claim it, and return its honest bundle."""
        runner = self.runners[shape.runner]
        async with self._claiming:  # so that what is claimed is what was enqueued
            await self.fleet.enqueue(**_run(shape))
            job = await runner.take()
        signer, strangers = self.signers[shape.runner]
        return make_bundle(job, signer, strangers)

    async def loop(self) -> dict[str, Any]:
        """Return how long the server's loop was held at most, and by what."""
        return (await self.fleet.http.get("/fuzz/loop")).json()

    async def reset_loop(self) -> None:
        """Begin to measure."""
        await self.fleet.http.post("/fuzz/loop")


@contextmanager
def open_servers() -> Iterator[Servers]:
    """Yield private servers with a migrated database, and a Sigstore."""
    home = ProcessSupervisor(None)  # removes its folder however we end
    try:
        with servers.postgres() as postgres, servers.redis() as redis:
            migrate(postgres.dsn)
            sigstore = ThrowawaySigstore.create(home.folder / "sigstore")
            yield Servers(postgres.dsn, redis, sigstore, home.folder)
    finally:
        home.close()


@asynccontextmanager
async def open_world(under: Servers, sabotage: str = "") -> AsyncIterator[World]:
    """Run a server and sign the runners on."""
    policy = under.folder / "signers.yaml"
    policy.write_text(POLICY)
    with _server(under, policy, sabotage) as port:
        url = f"http://127.0.0.1:{port}"
        async with (
            open_pool(under.dsn, 2) as pool,
            httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http,
        ):
            token = await new_token(pool, "fuzz")
            services = cast("Any", None)  # they are in the other process
            fleet = Fleet(http, services, pool, under.sigstore, token, url)
            yield await _people(fleet, port, under.sigstore)


async def _people(fleet: Fleet, port: int, sigstore: ThrowawaySigstore) -> World:
    ours, workflow = SigstoreSigner(sigstore, OURS), SigstoreSigner(sigstore, WORKFLOW)
    others = tuple(SigstoreSigner(sigstore, subject) for subject in STRANGERS)
    signer = {"identity": WORKFLOW.identity, "issuer": WORKFLOW.issuer}
    wanted: dict[str, dict[str, Any]] = {
        "by-policy": {},
        "by-workflow": {"signer": signer},
        "by-its-key": {"signature_policy": "runner-key"},
    }
    runners = {
        name: await fleet.sign_on(f"{name}-{port}", max_leases=LEASES, **key)
        for name, key in wanted.items()
    }
    keyed = runners["by-its-key"]
    signers: dict[str, tuple[Signer, tuple[Signer, ...]]] = {
        "by-policy": (ours, (*others, workflow)),
        "by-workflow": (workflow, (*others, ours)),
        "by-its-key": (
            EnvelopeSigner(keyed.key, keyed.runner_id),
            (
                EnvelopeSigner(SigningKey.generate(), keyed.runner_id),
                EnvelopeSigner(keyed.key, runners["by-policy"].runner_id),
                EnvelopeSigner(runners["by-policy"].key, runners["by-policy"].runner_id),
            ),
        ),
    }
    return World(port, fleet, runners, signers)


def _run(shape: Shape) -> dict[str, Any]:
    task = {"domain": "math", "user_prompt": "2+2?", "expected": "4", "scorer": "exact"}
    tasks = [{"id": f"task-{n}", **task} for n in range(shape.tasks)]
    prompts = [{"id": f"prompt-{n}", "system": "Be brief."} for n in range(shape.prompts)]
    return {**run_of(), "tasks": tasks, "prompts": prompts}


@contextmanager
def _server(under: Servers, policy: Path, sabotage: str) -> Iterator[int]:
    """Run the server process and yield its port. It ends when its stdin closes."""
    settings = {
        "DATABASE_URL": under.dsn,
        "REDIS_LEASE_URL": under.redis.url(1),
        "REDIS_TOKEN_URL": under.redis.url(2),
        "TOKEN_KEYS": f"fuzz:{'k' * 32}",
        "RECEIPT_KEYS": f"fuzz:{'ab' * 32}",
        "PUBLIC_URL": AUDIENCE,
        "TRUSTED_ROOT": str(under.sigstore.trusted_root),
        "SIGNERS_FILE": str(policy),
        "LEASE_TTL_S": DAY_S,
        "LEASE_TTL_MIN_S": DAY_S,
        # Thousands of bad bundles of one runner, as fast as they are answered.
        "FAILING_RUNNER_PAUSE_S": "0",
        "ANONYMOUS_RATE": "0",
        "RUNNER_RATE": "0",
        # Its share is a quarter of these, and an honest bundle among the mutants must not wait.
        "VERIFY_MAX": "64",
        "UPLOADS_MAX": "64",
        "TOKEN_TTL_S": DAY_S,
        "MAX_RUNTIME_S": DAY_S,
    }
    own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    ours = {PREFIX + name: value for name, value in settings.items()}
    with under.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.server_process"],
            cwd=ROOT, env={**own, **ours, SABOTAGE: sabotage}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    with process:  # waits for its end
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            assert process.stdin is not None
            process.stdin.close()
