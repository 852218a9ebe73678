"""A simulated fleet at its real rates against one server process: what 10,000 runners cost.

Every runner holds a lease and a connection, beats every 30 s, and ends its run after about 20
minutes with a small signed result and a claim of the next one; so 10,000 runners make 333
heartbeats and 8 submits and claims a second. The first beats are spread over the interval, as they
are in a fleet. Reported: the cores that the server, PostgreSQL and Redis used, the latencies of
each kind of request, how often one was sent again after a 503, and every answer that was not a
success in the end.

    make bench ONLY=fleet RUNNERS=10000 SECONDS=120
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
from rich.console import Console
from rich.table import Table

from bench.fleet_member import INTERVAL_S, SIGNER, Member, Seen
from bench.parked import raise_file_limit
from bench.support import procfs, report, seeding
from bench.support.env import BenchEnv, Server, open_env
from bench.support.seeding import JOB, BenchRunner, open_connection
from sandbox.runner.wire import Job
from sandbox.services.admin_token import new_token
from sandbox.services.sigstore_instance import ThrowawaySigstore

RESULT = report.LATEST.with_name("fleet.json")
TTL_S = 300
SPARE_FILES = 300
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


async def play(
    stage: BenchEnv, server: Server, sigstore: ThrowawaySigstore, runners: int, seconds: int
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
            chance,
        )
        for lease in leases
    ]
    lives = [asyncio.create_task(member.live()) for member in members]
    await asyncio.sleep(INTERVAL_S)  # until every runner has beaten once
    seen.forget_times()
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
            "resent": seen.resent[kind],
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
    token = await new_token(connection, "bench")
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
    table = Table(f"{found['runners']:,} runners", "per s", "p50 ms", "p99 ms", "resent")
    for kind, each in found["requests"].items():
        table.add_row(kind, *(f"{number:,}" for number in each.values()))
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
    with tempfile.TemporaryDirectory(prefix="bench-") as name, open_env() as stage:
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
