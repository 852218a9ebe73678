"""Replay real files of bakeoff through real servers: `make upstream DIR=...`.

DIR holds what the unmodified harness and its database left: `harness/*/` with the job that was
handed out and the bundle that came of it, and optionally schema.json, signers.yaml and
bakeoff-config.yaml with tasks.jsonl and floor_tasks.jsonl. Each bundle is signed as the harness's
`package --sign` does, submitted to a server on a fresh database and to one on a database that
bakeoff made, and exported for its archive. The last line counts.
"""

import argparse
import asyncio
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import structlog

from auth.errors import PolicyRefused
from auth.signers import load_policy
from broker.concurrency.workers import Workers
from config.settings import Settings
from db.migrate import migrate
from sandbox.services import servers
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.archive import problems
from tests.support.fleet import SIGNER, Fleet, Runner, open_fleet, settings_of, write_signers
from tests.support.schema_facts import facts, not_kept

FIXTURES = Path(__file__).parent / "fixtures"
PROGRAM = Path(sys.executable).with_name("bakeoff-queue")
# What a result can fill of bakeoff's tables, by the row that shows it.
FILLED = """
SELECT
    s.cpu_model, s.cpu_cores, s.cpu_threads, s.ram_gb, o.os_name, o.os_version, o.driver_version,
    o.runtime_version, g.gpu_model, g.vram_mb, g.tflops_fp16, h.peak_vram_mb, h.power_limit_w,
    h.measured_tflops, r.run_status, r.publisher_id, r.runner_id, r.runner_version,
    r.prompt_git_hash, count(c.prompt_id) AS cells, count(c.score) AS scores,
    count(c.gflops_per_token) AS gflops
FROM runs AS r
INNER JOIN run_hardware_metrics AS h ON r.run_id = h.run_id
LEFT JOIN system_hardware AS s ON h.system_hardware_id = s.system_hardware_id
LEFT JOIN system_software AS o ON h.system_software_id = o.system_software_id
LEFT JOIN gpu_hardware AS g ON h.gpu_hardware_id = g.gpu_hardware_id
INNER JOIN run_model_metrics AS c ON r.run_id = c.run_id
WHERE r.run_id = $1
GROUP BY r.run_id, h.run_id, s.system_hardware_id, o.system_software_id, g.gpu_hardware_id
"""


@dataclass
class Tally:
    """What became of the bundles; `problems` is what else was not as it should be."""

    submitted: int = 0
    accepted: int = 0
    exported: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """The line that the command ends with."""
        return json.dumps(
            {
                "submitted": self.submitted,
                "accepted": self.accepted,
                "exported": self.exported,
                "refused_wrongly": self.submitted - self.accepted,
            }
        )

    @property
    def good(self) -> bool:
        """Whether every bundle came through, and at least one was there."""
        whole = 0 < self.submitted == self.accepted == self.exported
        return whole and not self.problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a folder; 0 when all of it went through."""
    line = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    line.add_argument("folder", type=Path, metavar="DIR")
    folder: Path = line.parse_args(arguments).folder
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    tally = Tally()
    _check_policies(folder, tally)
    with _private_servers() as (postgres, redis, sigstore, scratch):
        for name, rows in (("fresh", None), ("adopted", FIXTURES / "upstream_rows.sql")):
            dsn = asyncio.run(_database(postgres, name, rows))
            migrate(dsn)
            asyncio.run(_compare_schema(folder, dsn, name, tally))
            settings = settings_of(dsn, redis, sigstore, write_signers(scratch))
            asyncio.run(_replay(folder, settings, sigstore, name, scratch / name, tally))
    for problem in tally.problems:
        print(f"PROBLEM {problem}", flush=True)
    print(tally.line, flush=True)
    return 0 if tally.good else 1


@contextmanager
def _private_servers() -> Iterator[tuple[servers.Postgres, servers.Redis, ThrowawaySigstore, Path]]:
    with (
        tempfile.TemporaryDirectory() as scratch,
        servers.postgres() as postgres,
        servers.redis() as redis,
    ):
        sigstore = ThrowawaySigstore.create(Path(scratch) / "sigstore")
        yield postgres, redis, sigstore, Path(scratch)


async def _database(postgres: servers.Postgres, name: str, rows: Path | None) -> str:
    """Make an empty database, or one as bakeoff makes and fills it; return its DSN."""
    connection = await asyncpg.connect(postgres.dsn)
    await connection.execute(f"CREATE DATABASE {name}_run")
    await connection.close()
    dsn = postgres.database_dsn(f"{name}_run")
    if rows:
        connection = await asyncpg.connect(dsn)
        await connection.execute((FIXTURES / "upstream_schema.sql").read_text())
        await connection.execute(rows.read_text())
        await connection.close()
    return dsn


def _check_policies(folder: Path, tally: Tally) -> None:
    """The archive's own signer policies must start this service."""
    for path in sorted(folder.glob("signers*.yaml")):
        try:
            policy = load_policy(path)
        except PolicyRefused as error:
            print(f"{path.name}: {error}", flush=True)
            if path.name == "signers.yaml":
                tally.problems.append(f"{path.name} is refused")
        else:
            print(f"{path.name}: {len(policy.signers)} signers", flush=True)
            for entry in policy.ignored:
                print(f"  warning: {entry}", flush=True)


async def _compare_schema(folder: Path, dsn: str, name: str, tally: Tally) -> None:
    path = folder / "schema.json"
    if not path.exists():
        return
    connection = await asyncpg.connect(dsn)
    lost = not_kept(json.loads(path.read_text()), await facts(connection))
    await connection.close()
    print(f"{name}: {len(lost)} differences from {path.name}", flush=True)
    tally.problems += [f"{name} database: {line}" for line in lost]


async def _replay(
    folder: Path, settings: Settings, sigstore: ThrowawaySigstore, name: str, archive: Path,
    tally: Tally,
) -> None:  # fmt: skip
    async with _open(settings, sigstore) as (fleet, runner):
        for path in sorted(folder.glob("harness/*/job.json")):
            await _hand_in(fleet, runner, path.parent, name, tally)
        await _export(fleet, archive, name, tally)
        await _verify_standalone(folder, tally)


@asynccontextmanager
async def _open(
    settings: Settings, sigstore: ThrowawaySigstore
) -> AsyncIterator[tuple[Fleet, Runner]]:
    workers = Workers()
    async with open_fleet(settings, sigstore, workers) as fleet:
        runner = await fleet.admit("upstream", max_leases=64)
        runner.capabilities = {"vram_gb": 80, "quantizations": ["Q4_K_M", "Q8_0", "F16", "BF16"]}
        await runner.register()
        yield fleet, runner
    await workers.close()


async def _hand_in(fleet: Fleet, runner: Runner, place: Path, name: str, tally: Tally) -> None:
    """Enqueue the run as it was, claim it, and submit what the harness made of it."""
    job = json.loads((place / "job.json").read_bytes())
    where = f"{name}: {place.name}"
    added = await fleet.admin("POST", "/queue", json={"runs": [run_of_job(job)]})
    tally.submitted += 1
    if not added.is_success:
        print(f"{where}: not enqueued: {added.text}", flush=True)
        return
    claimed = await runner.take()
    for member in ("run_id", "config", "tasks", "floor_tasks", "prompts"):
        if claimed[member] != job[member]:
            tally.problems.append(f"{where}: the job's {member} is handed out otherwise")
    answer = await runner.submit(claimed, signed(place, fleet.sigstore))
    if answer.status_code != 201:
        print(f"{where}: refused: {answer.text}", flush=True)
        return
    tally.accepted += 1
    row = await fleet.pool.fetchrow(FILLED, job["run_id"])
    assert row is not None
    empty = [column for column, value in row.items() if value is None]
    counts = f"{row['cells']} cells, {row['scores']} scores"
    print(f"{where}: accepted, {counts}; NULL: {', '.join(empty) or 'nothing'}", flush=True)


async def _export(fleet: Fleet, archive: Path, name: str, tally: Tally) -> None:
    """Export all that was accepted, by the command, and look at it as the archive does."""
    environment = {**os.environ, "BAKEOFF_QUEUE_URL": fleet.url,
                   "BAKEOFF_QUEUE_TOKEN": fleet.admin_token}  # fmt: skip
    command = (PROGRAM, "results", "export", "--since", "2000-01-01T00:00:00Z", archive, "--json")
    done = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env=environment
    )
    printed, _ = await done.communicate()
    for result in json.loads(printed or b'{"results": []}')["results"]:
        tally.exported += result["outcome"] == "written"
        print(f"{name}: {result['run_id']} {result['outcome']}: {result['detail']}", flush=True)
    tally.problems += [f"{name} archive: {problem}" for problem in problems(archive)]


async def _verify_standalone(folder: Path, tally: Tally) -> None:
    """Verify the bundles that were in no queue: none may fail, and unsigned is no failure."""
    for path in sorted(folder.glob("harness/*/manifest.json")):
        if path.with_name("job.json").exists():
            continue
        command = (PROGRAM, "results", "verify", "--dir", path.parent, "--json")
        done = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        printed, _ = await done.communicate()
        outcome = json.loads(printed)["results"][0]["outcome"]
        print(f"{path.parent.name}: {outcome} by `results verify --dir`", flush=True)
        if outcome == "failed":
            tally.problems.append(f"{path.parent.name} fails to verify")


def run_of_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the enqueue entry of a job that was handed out; its model as a descriptor.

    A judge, of which a job tells the file alone, is taken to be as large as the model.
    """
    model = job["model"]
    descriptor = {name: value for name, value in model.items() if name != "model_id"}
    run = {
        "run_id": job["run_id"],
        "model": descriptor,
        **{name: job[name] for name in ("tasks", "floor_tasks", "prompts", "config")},
    }
    judge = job["config"].get("judge") or {}
    if judge.get("enabled"):
        source = {"source_type": "local_file", "url": judge["gguf"].rpartition("/")[2]}
        run["judge"] = {**descriptor, "name": "judge", "model_hash": None, "sources": [source]}
    return run


def signed(place: Path, sigstore: ThrowawaySigstore) -> dict[str, bytes]:
    """Return a bundle as the harness's `package --sign` leaves it: the manifest comes last."""
    names = ("result.json", "summary.md", "dashboard.html")
    files = {name: (place / name).read_bytes() for name in names if (place / name).exists()}
    files["signature.sigstore.json"] = sigstore.sign(files["result.json"], SIGNER)
    manifest = json.loads((place / "manifest.json").read_bytes())
    for name, digest in manifest["files"].items():
        if hashlib.sha256(files[name]).hexdigest() != digest["sha256"]:
            raise ValueError(f"{place / name} is not what its manifest says")
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    manifest["signature"] |= {"path": "signature.sigstore.json", "required": True}
    files["manifest.json"] = json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n"
    return files


if __name__ == "__main__":
    sys.exit(main())
