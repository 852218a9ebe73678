"""A simulated fleet at its real rates against one server process: what 10,000 runners cost.

Every runner holds a lease and a connection, beats every 30 s, and ends its run after about 20
minutes with a small signed result and a claim of the next one; so 10,000 runners make 333
heartbeats and 8 submits and claims a second. The first beats are spread over the interval, as they
are in a fleet. Reported: the cores that the server, PostgreSQL and Redis used, the latencies of
each kind of request, and every answer that was not a success.

    make fleet RUNNERS=10000 SECONDS=120
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
from rich.console import Console
from rich.table import Table

from auth import admin_tokens
from bench import procfs, report, seeding
from bench.parked import raise_file_limit
from bench.seeding import JOB, BenchRunner, open_connection
from bench.stage import Server, Stage, open_stage
from db import admin
from sandbox.answers import BuiltInRules, execute
from sandbox.result_bundle import Rig, build_bundle
from sandbox.runner_wire import Job
from sandbox.sigstore_instance import EmailSubject, ThrowawaySigstore

RESULT = report.LATEST.with_name("fleet.json")
INTERVAL_S = 30
RUN_S = 20 * 60
TTL_S = 300
SPARE_FILES = 300
ANSWER_S = 30
SIGNER = EmailSubject("fleet@bakeoff.test", "https://issuer.bakeoff.test")
LAST = 1000  # behind all others: nobody claims it
MODEL = {
    "name": "fleet-model",
    "parameter_count_b": 1.0,
    "architecture": "Dense",
    "quantization": "q8_0",
    "file_format": "GGUF",
    "sources": [{"source_type": "direct_url", "url": "https://models.example/fleet"}],
}
SIGNERS = f"""\
schema_version: bakeoff-results-signers/v1
trusted_identities:
- {{identity: {SIGNER.email}, issuer: {SIGNER.issuer}}}
"""


@dataclass
class Seen:
    """What the fleet was answered."""

    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    bad: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, began: float, status: int) -> bool:
        """Take an answer; return whether it is a success."""
        self.ms[kind].append((time.perf_counter() - began) * 1000)
        if status not in (200, 201):
            self.bad[f"{kind}: {status}"] += 1
        return status in (200, 201)


class Connection:
    """A kept connection that sends requests as bytes."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._head = f"Host: bench\r\nAuthorization: Bearer {token}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, kind: str, **headers: str) -> tuple[int, bytes]:
        """POST a body of a media type; return the status and the answer's body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        lines = [f"POST {path} HTTP/1.1\r\n{self._head}Content-Type: {kind}"]
        lines += [f"Content-Length: {len(body)}", *(f"{n}: {v}" for n, v in headers.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        async with asyncio.timeout(ANSWER_S):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            answer = await reader.readexactly(int(length or 0))
        if b"connection: close" in head:
            self.close()
        return int(head.split()[1]), answer

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Member:
    """One runner of the fleet."""

    def __init__(
        self, port: int, token: str, job: Job, seen: Seen, sigstore: ThrowawaySigstore
    ) -> None:
        self._connection = Connection(port, token)
        self._job = job
        self._seen = seen
        self._sigstore = sigstore

    async def live(self, chance: random.Random) -> None:
        """Beat, end runs and claim new ones, until cancelled."""
        try:
            await asyncio.sleep(chance.uniform(0, INTERVAL_S))
            while True:
                began = time.perf_counter()
                try:
                    await self._beat()
                    if chance.random() < INTERVAL_S / RUN_S:
                        await self._finish()
                except (OSError, EOFError, TimeoutError) as error:
                    self._seen.bad[f"no answer: {type(error).__name__}"] += 1
                    self._connection.close()
                await asyncio.sleep(max(0.0, began + INTERVAL_S - time.perf_counter()))
        finally:
            self._connection.close()

    async def _beat(self) -> None:
        body = json.dumps({"lease_id": self._job.lease_id}).encode()
        await self._post("heartbeat", f"/api/queue/{self._job.run_id}/heartbeat", body)

    async def _finish(self) -> None:
        """Submit the run's result, and claim the next."""
        body, kind = await _bundle(self._job, self._sigstore)
        await self._post("submit", f"/api/queue/{self._job.run_id}/submit", body, kind)
        answer = await self._post(
            "claim", "/api/queue/claim", b"{}", **{"Idempotency-Key": str(uuid.uuid4())}
        )
        if answer is not None:
            self._job = Job.from_body(json.loads(answer))

    async def _post(
        self, what: str, path: str, body: bytes, kind: str = "application/json", **headers: str
    ) -> bytes | None:
        began = time.perf_counter()
        status, answer = await self._connection.post(path, body, kind, **headers)
        return answer if self._seen.note(what, began, status) else None


async def _bundle(job: Job, sigstore: ThrowawaySigstore) -> tuple[bytes, str]:
    """Return a multipart body with a signed result of the job, and its media type."""
    rules = BuiltInRules()
    outcomes = await execute(job, rules, lambda _: None)
    sign = lambda blob: sigstore.sign(blob, SIGNER)  # noqa: E731 (build_bundle calls it)
    files = build_bundle(job, outcomes, rules.provenance, Rig(24), sign)
    form = httpx.Request(
        "POST",
        "http://multipart.invalid",
        data={"lease_id": job.lease_id},
        files={name: (name, content) for name, content in files.items()},
    )
    return form.read(), form.headers["Content-Type"]


async def play(
    stage: Stage, server: Server, sigstore: ThrowawaySigstore, runners: int, seconds: int
) -> dict[str, Any]:
    """Let the fleet live for a while, and return what was seen."""
    async with open_connection(stage.dsn) as connection:
        models = await seeding.add_models(connection, "q8_0", 1)
        await seeding.add_runs(connection, models, 3 * runners)
        first, *others = await seeding.sign_on(connection, runners + 1)
        leases = await seeding.lease(connection, others, timedelta(seconds=TTL_S))
        job = await _first_job(connection, server.port, first)
    print(f"server pid {server.pid}, {runners:,} runners", flush=True)
    seen, chance = Seen(), random.Random(1)  # noqa: S311 (repeatable, not secret)
    members = [
        Member(
            server.port,
            lease.runner.token,
            replace(job, run_id=str(lease.run_id), lease_id=str(lease.lease_id)),
            seen,
            sigstore,
        )
        for lease in leases
    ]
    lives = [asyncio.create_task(member.live(chance)) for member in members]
    await asyncio.sleep(INTERVAL_S)  # until every runner has beaten once
    seen.ms.clear()
    before, began = procfs.cpu_by_program(), time.monotonic()
    await asyncio.sleep(seconds)
    taken = time.monotonic() - began
    cores = procfs.cores_between(before, procfs.cpu_by_program(), taken)
    resident = procfs.resident_kib(server.pid) / 1024
    kinds = {
        kind: {
            "per_s": round(len(times) / taken, 1),
            "p50_ms": round(statistics.median(times), 2),
            "p99_ms": round(report.percentile(times, 99), 2),
        }
        for kind, times in seen.ms.items()
    }
    for life in lives:
        life.cancel()
    await asyncio.gather(*lives, return_exceptions=True)
    return {
        "machine": report.machine(),
        "runners": runners,
        "seconds": round(taken, 1),
        "cores": {name: round(used, 3) for name, used in cores.items()},
        "server_mb": round(resident, 1),
        "requests": kinds,
        "not_a_success": dict(seen.bad),
    }


async def _first_job(connection: asyncpg.Connection, port: int, runner: BenchRunner) -> Job:
    """Enqueue a run as an admin, so that its tasks and prompts have rows, and claim one like it."""
    token, digest = admin_tokens.make()
    await admin.add_token(connection, digest, "bench", admin_tokens.SCOPES, None)
    run = {name: JOB[name] for name in ("tasks", "floor_tasks", "prompts", "config")}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        answer = await http.post(
            "/api/admin/queue",
            json={"runs": [{"model": MODEL, **run, "priority": LAST}]},
            headers={"Authorization": f"Bearer {token}"},
        )
        assert answer.status_code == 201, answer.text
        bearer = {"Authorization": f"Bearer {runner.token}"}
        answer = await http.post("/api/queue/claim", json={}, headers=bearer)
        assert answer.status_code == 200, answer.text
        return Job.from_body(answer.json())


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table(f"{found['runners']:,} runners", "per s", "p50 ms", "p99 ms")
    for kind, each in found["requests"].items():
        table.add_row(kind, *(f"{each[name]:,}" for name in ("per_s", "p50_ms", "p99_ms")))
    Console().print(table)
    table = Table("program", "cores")
    for name, used in found["cores"].items():
        table.add_row(name, f"{used:.2f}")
    Console().print(table)
    print(f"server memory {found['server_mb']} MB; not a success: {found['not_a_success'] or 0}")


def main() -> int:
    """Play it on a private stage; keep the figures in bench/results/fleet.json."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runners", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=120, help="after a warm-up of 30 s")
    given = parser.parse_args()
    report.introduce()
    runners = min(given.runners, raise_file_limit(given.runners + SPARE_FILES) - SPARE_FILES)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, open_stage() as stage:
        sigstore = ThrowawaySigstore.create(Path(name))
        signers = Path(name, "signers.yaml")
        signers.write_text(SIGNERS)
        server = stage.serve(
            trusted_root=sigstore.trusted_root, signers_file=signers, lease_ttl_s=TTL_S
        )
        found = asyncio.run(play(stage, server, sigstore, runners, given.seconds))
    show(found)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if found["not_a_success"] else 0


if __name__ == "__main__":
    sys.exit(main())
