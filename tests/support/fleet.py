"""A running server and its people: an admin, and runners that speak HTTP like real ones."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import redis.asyncio
from nacl.signing import SigningKey
from pydantic import SecretStr
from tornado.netutil import bind_sockets

from broker.concurrency.workers import Workers
from broker.leases.lease_keys import LeaseKeys
from broker.leases.sweep import Sweep
from broker.services import Services
from broker.telemetry import Telemetry
from config.settings import Settings
from db.pool import open_pool
from db.run_queue import CHANNEL, Capabilities, Claimant
from handlers.connections import Server
from sandbox.runner.identity import Identity, public_key_text
from sandbox.services import servers
from sandbox.services.admin_token import new_token
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore
from server import make_app, make_server, open_services
from tests.support import traffic
from tests.support.result_factory import bundle_files, result_for

AUDIENCE = "http://queue.test"
SIGNER = EmailSubject("runner@bakeoff.test", "https://issuer.bakeoff.test")
CAPABILITIES = {"vram_gb": 24, "quantizations": ["q4_k_m", "q8_0"]}
SMALL = {
    "name": "SmolLM2-1.7B-Instruct",
    "parameter_count_b": 1.71,
    "architecture": "Dense",
    "quantization": "q8_0",
    "file_format": "GGUF",
    "sources": [{"source_type": "huggingface", "url": "https://huggingface.co/HuggingFaceTB/S"}],
}

# Of all servers in this process: nothing of a request stays in a worker, and each takes a second
# to start. conftest.py closes them.
WORKERS = Workers()


@dataclass
class Fleet:
    """One server process in this test's event loop, and what a test does to it."""

    http: httpx.AsyncClient
    services: Services
    pool: asyncpg.Pool
    sigstore: ThrowawaySigstore
    admin_token: str
    url: str
    server: Server | None = None  # None: in a process of its own

    async def admin(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send an admin's request."""
        headers = {"Authorization": f"Bearer {self.admin_token}", **request.pop("headers", {})}
        return await self.http.request(method, f"/api/admin{path}", headers=headers, **request)

    async def admit(self, runner_id: str = "runner-a", **key: Any) -> "Runner":
        """Put a new key on the allowlist and return the runner that owns it."""
        runner = Runner(self, runner_id)
        wanted = {"public_key": public_key_text(runner.key), "runner_id": runner_id, **key}
        answer = await self.admin("POST", "/runner-keys", json=wanted)
        assert answer.status_code == 201, answer.text
        return runner

    async def sign_on(self, runner_id: str = "runner-a", **key: Any) -> "Runner":
        """Admit a runner and register it."""
        runner = await self.admit(runner_id, **key)
        answer = await runner.register()
        assert answer.status_code == 201, answer.text
        return runner

    async def enqueue(self, **changes: Any) -> str:
        """Enqueue one run and return its run_id."""
        answer = await self.admin("POST", "/queue", json={"runs": [run_of(**changes)]})
        assert answer.status_code == 201, answer.text
        return answer.json()["runs"][0]["run_id"]

    async def row(self, run_id: str) -> asyncpg.Record:
        """Return a run's row as the database has it."""
        row = await self.pool.fetchrow("SELECT * FROM run_queue WHERE run_id = $1", run_id)
        assert row is not None
        return row

    async def ledger(self, run_id: str) -> list[asyncpg.Record]:
        """Return a run's attempts as the database has them."""
        return await self.pool.fetch(
            "SELECT * FROM attempts WHERE run_id = $1 ORDER BY lease_seq", run_id
        )

    async def revoke(self, runner: "Runner", reason: str = "test") -> None:
        """Revoke a runner's key."""
        path = f"/runner-keys/{runner.fingerprint}"
        answer = await self.admin("DELETE", path, json={"reason": reason})
        assert answer.status_code == 200, answer.text

    async def cancel(self, run_id: str, reason: str = "test") -> None:
        """Cancel a run, or ask its runner to."""
        answer = await self.admin("POST", f"/queue/{run_id}/cancel", json={"reason": reason})
        assert answer.is_success, answer.text

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy]:
        """Yield a connection in a transaction beside the server's, which the test commits."""
        async with self.pool.acquire() as connection, connection.transaction():
            yield connection

    async def sweep(self) -> int:
        """Let one pass of a sweep run; return how many leases it ended. See `quiet_sweep`."""
        settings = self.services.settings
        async with redis.asyncio.from_url(settings.redis_lease_url) as client:
            keys = LeaseKeys(client)
            ended = await Sweep(self.pool, settings, keys, Telemetry("test")).run_once()
            await keys.flush()
        return ended

    async def cut_database(self) -> None:
        """Cut every connection to this test's database but the one that does it."""
        await self.pool.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    @asynccontextmanager
    async def rings(self) -> AsyncIterator[asyncio.Queue[str]]:
        """Yield a queue that gets an item whenever a run becomes claimable (NOTIFY)."""
        heard: asyncio.Queue[str] = asyncio.Queue()
        async with self.pool.acquire() as connection:
            listener = lambda *ring: heard.put_nowait(ring[2])  # noqa: E731 (removed by identity)
            await connection.add_listener(CHANNEL, listener)
            try:
                yield heard
            finally:
                await connection.remove_listener(CHANNEL, listener)

    async def until_blocked(self, statements: int = 1) -> None:
        """Wait until so many statements of the server wait for a lock."""
        async with asyncio.timeout(10):
            while statements > await self.blocked():  # noqa: ASYNC110 (there is no signal)
                await asyncio.sleep(0.005)

    async def blocked(self) -> int:
        """Return how many statements of the server wait for a lock."""
        return await self.pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

    async def overdue(self, run_id: str) -> None:
        """Let a run's lease be past its deadline."""
        await self.pool.execute(
            "UPDATE run_queue SET lease_expires_at = clock_timestamp() - interval '1 second'"
            " WHERE run_id = $1",
            run_id,
        )


@dataclass
class Runner:
    """A runner with a key of its own."""

    fleet: Fleet
    runner_id: str
    key: SigningKey = field(default_factory=SigningKey.generate)
    capabilities: dict[str, Any] = field(default_factory=lambda: dict(CAPABILITIES))
    token: str = ""
    instance_id: uuid.UUID = field(default_factory=uuid.uuid4)

    @property
    def fingerprint(self) -> str:
        """How the allowlist names the key."""
        return hashlib.sha256(bytes(self.key.verify_key)).hexdigest()

    @property
    def headers(self) -> dict[str, str]:
        """What every request of this runner carries."""
        return {"Authorization": f"Bearer {self.token}"}

    async def register(self, body: bytes | None = None) -> httpx.Response:
        """Register, and keep the token."""
        identity = Identity(
            self.key, AUDIENCE, "gpu-1.example", self.capabilities, str(self.instance_id)
        )
        answer = await self.fleet.http.post(
            "/api/runners/register",
            content=body or identity.sign_registration(),
            headers={"Content-Type": "application/json"},
        )
        if answer.is_success:
            self.token = answer.json()["access_token"]
        return answer

    def claimant(
        self,
        key: str = "k",
        digest: str = "digest",
        *,
        vram_gb: int = 24,
        quantizations: tuple[str, ...] = ("q8_0",),
    ) -> Claimant:
        """Return what a claim of this runner is to the statement that serves it."""
        offer = Capabilities(vram_gb, quantizations)
        return Claimant(
            self.runner_id, self.fingerprint, self.instance_id, uuid.uuid4(), key, digest, offer
        )

    def at(self, fleet: Fleet) -> "Runner":
        """Return the same runner, speaking to another server of the fleet."""
        return replace(self, fleet=fleet)

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """POST JSON as this runner."""
        return await self.fleet.http.post(path, json=body, headers={**self.headers, **headers})

    async def claim(self, *, key: str | None = None, **body: Any) -> httpx.Response:
        """Claim, under an Idempotency-Key of its own if none is given."""
        return await self.post(
            "/api/queue/claim", body, **{"Idempotency-Key": key or str(uuid.uuid4())}
        )

    async def take(self) -> dict[str, Any]:
        """Claim and return the job, which must be there."""
        answer = await self.claim()
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def heartbeat(self, job: dict[str, Any], **body: Any) -> httpx.Response:
        """Beat for a job's lease."""
        wanted = {"lease_id": job["lease_id"], **body}
        return await self.post(f"/api/queue/{job['run_id']}/heartbeat", wanted)

    async def release(self, job: dict[str, Any]) -> httpx.Response:
        """Hand a lease back."""
        wanted = {"lease_id": job["lease_id"], "reason": "test"}
        return await self.post(f"/api/queue/{job['run_id']}/release", wanted)

    async def fail(self, job: dict[str, Any], code: str = "oom", **body: Any) -> httpx.Response:
        """Report a failure."""
        wanted = {"lease_id": job["lease_id"], "failure_code": code, "detail": "test", **body}
        return await self.post(f"/api/queue/{job['run_id']}/fail", wanted)

    def bundle(self, job: dict[str, Any], **changes: Any) -> dict[str, bytes]:
        """Return a signed bundle with a complete result of a job."""
        result = result_for(job["run_id"], job, **changes)
        unsigned = bundle_files(result, b"")
        signature = self.fleet.sigstore.sign(unsigned["result.json"], SIGNER)
        return bundle_files(result, signature)

    async def submit(
        self,
        job: dict[str, Any],
        files: dict[str, bytes] | None = None,
        *,
        lease_id: str | None = None,
        query: str = "",
    ) -> httpx.Response:
        """Submit a bundle for a job, a complete and signed one if none is given."""
        files = self.bundle(job) if files is None else files
        return await self.fleet.http.post(
            f"/api/queue/{job['run_id']}/submit{query}",
            data={"lease_id": lease_id or job["lease_id"]},
            files={name: (name, content) for name, content in files.items()},
            headers=self.headers,
        )


def code_of(answer: httpx.Response) -> tuple[int, str]:
    """Return a refusal's status and the code of its problem document."""
    assert answer.headers["Content-Type"] == "application/problem+json", answer.text
    return answer.status_code, answer.json()["code"]


def about(seconds: float) -> Any:
    """Return what equals so long a time, the run of one statement aside."""
    return pytest.approx(timedelta(seconds=seconds), abs=timedelta(milliseconds=50))


def quiet_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the servers' own sweeps wait for ever: the test says when one runs."""

    async def never(self: Sweep) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Sweep, "_wait", never)


def model_of(parameters_b: float, quantization: str = "fp16", **changes: Any) -> dict[str, Any]:
    """Return the descriptor of a model of its own name and source (which is its identity)."""
    name = f"model-{parameters_b}-{quantization}"
    return {
        **SMALL,
        "name": name,
        "sources": [{"source_type": "direct_url", "url": f"https://models.example/{name}"}],
        "parameter_count_b": parameters_b,
        "quantization": quantization,
        **changes,
    }


def run_of(**changes: Any) -> dict[str, Any]:
    """Return an enqueue entry that fits, with `changes` to it; None removes a member."""
    run: dict[str, Any] = {
        "model": SMALL,
        "tasks": [
            {"id": "sum", "domain": "math", "user_prompt": "2+2?", "expected": "4",
             "scorer": "exact"},
            {"id": "capital", "domain": "geo", "user_prompt": "Capital of France?",
             "expected": "Paris", "scorer": "contains"},
        ],
        "floor_tasks": [
            {"id": "echo", "domain": "floor", "user_prompt": "Say ok", "scorer": "contains"}
        ],
        "prompts": [{"id": "plain", "system": ""}, {"id": "terse", "system": "Be brief."}],
        "config": {"run": {"seed": 7}, "models": [{"id": "smollm2-1.7b"}]},
        **changes,
    }  # fmt: skip
    return {name: value for name, value in run.items() if value is not None}


def settings_of(
    dsn: str,
    redis_server: servers.Redis,
    sigstore: ThrowawaySigstore,
    policy: Path,
    **changes: Any,
) -> Settings:
    """Return settings for these servers, with any of them changed."""
    given: dict[str, Any] = {
        "database_url": SecretStr(dsn),
        "redis_lease_url": redis_server.url(1),
        "redis_token_url": redis_server.url(2),
        "listen_port": 0,
        "public_url": AUDIENCE,
        "token_keys": SecretStr(f"test:{'k' * 32}"),
        "receipt_keys": SecretStr(f"test:{'ab' * 32}"),
        "trusted_root": sigstore.trusted_root,
        "signers_file": policy,
        "database_pool_max": 4,
        # A test sends thousands of requests from one address, and as one runner.
        "anonymous_rate": 0,
        "runner_rate": 0,
        # Never shorter than lease_ttl_s and heartbeat_interval_s: fixed, whatever those are.
        "lease_ttl_min_s": 10**6,
        "heartbeat_interval_min_s": 10**5,
    }
    return Settings(**{**given, **changes})


def write_signers(folder: Path) -> Path:
    """Write a signer policy that admits one e-mail identity of the throwaway Sigstore."""
    path = folder / "signers.yaml"
    path.write_text(
        "schema_version: bakeoff-results-signers/v1\n"
        "trusted_identities:\n"
        "- {identity: runner@bakeoff.test, issuer: https://issuer.bakeoff.test}\n"
    )
    return path


@asynccontextmanager
async def open_fleet(
    settings: Settings, sigstore: ThrowawaySigstore, workers: Workers = WORKERS
) -> AsyncIterator[Fleet]:
    """Serve `settings` on a free port and yield what a test needs."""
    dsn = settings.database_url.get_secret_value()
    async with open_pool(dsn, 4) as pool, open_services(settings, workers) as services:
        server = make_server(make_app(services), services)
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        token = await new_token(pool, "test")
        try:
            async with httpx.AsyncClient(
                base_url=url, timeout=30, trust_env=False, event_hooks={"response": [traffic.hold]}
            ) as http:
                yield Fleet(http, services, pool, sigstore, token, url, server)
        finally:
            server.stop()
            await server.close_all_connections()
