"""B8 of the design's performance page: what 2 MB results cost the heartbeats beside them.

Heartbeats (200/s, open loop, timed from when each was due) while nothing else happens, while 8
submits of 2 MB are always in flight, and while unrelated processes do the same verification: the
last tells how much of a slower heartbeat is only two cores being shared. Three processes: this one
submits, one beats, one serves. Rounds are taken in turn. Besides: the schema check against
`jsonschema` on the same result, the time of each step of a submit, the server's memory before,
during and after 200 submissions, and the longest time that anything held its event loop.

    make bench ONLY=submits
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from auth.signers import BundleVerifier, load_policy
from bench.submits.actors import Actors
from bench.submits.beside import Beats, verifying_elsewhere
from bench.submits.bundle import bundle_of, run_of, verify
from bench.submits.costs import remember, schema_ratio, steps
from bench.submits.table import show
from bench.support import report
from bench.support.env import PUBLIC_URL
from bench.support.report import Figure
from config.settings import PREFIX
from db import migrate
from sandbox.services import servers
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import SIGNER


@dataclass(frozen=True, slots=True)
class Amount:
    """How much to measure."""

    rounds: int
    round_s: float
    submits: int  # prepared for a round; what one does not use, the next one does
    memory_submits: int


FULL = Amount(rounds=3, round_s=5.0, submits=150, memory_submits=200)
QUICK = Amount(rounds=1, round_s=1.0, submits=16, memory_submits=8)


def measure(actors: Actors, pid: int, verifier: BundleVerifier, amount: Amount) -> Figure:
    """Measure all, print the tables, and return the figure."""
    console = Console()
    actors.prepare(1)
    actors.submit(60, 1)  # what the first submit costs is not what a submit costs
    memory = remember(actors, pid, amount.memory_submits)
    hold = actors.numbers()
    actors.admin("/queue", {"runs": [run_of(60, 40)]})
    job = actors.runners[1].claim()
    files = bundle_of(job, actors.sigstore)
    taken = steps(verifier, files, job)
    ours, theirs = schema_ratio(files["result.json"])
    beats = Beats(actors.runners[0], actors.leases(20))
    rounds: dict[str, list[list[float]]] = {"idle": [], "8 submits": [], "unrelated load": []}
    rates, holds = [], [hold]
    try:
        for _ in range(amount.rounds):
            actors.prepare(amount.submits)
            actors.numbers()
            rounds["idle"].append(
                beats.during(amount.round_s, lambda: time.sleep(amount.round_s))[0]
            )
            submit = lambda: actors.submit(amount.round_s, amount.submits)  # noqa: E731
            latencies, (done, busy, rate) = beats.during(amount.round_s, submit)
            rounds["8 submits"].append(latencies)
            rates.append(rate)
            print(f"round: {done} submits, {rate:.1f}/s, {busy} x busy")
            holds.append(actors.numbers())
            with verifying_elsewhere(lambda: verify(verifier, files, job)):
                rounds["unrelated load"].append(
                    beats.during(amount.round_s, lambda: time.sleep(amount.round_s))[0]
                )
    finally:
        beats.close()
    for name in ("verify", "accept"):
        label = "1-5 as the server waits" if name == "verify" else "6 transaction"
        taken[label] = [ms for each in holds for ms in each["times"][name]]
    return show(console, rounds, rates, taken, (ours, theirs), memory, holds)


def bench(amount: Amount) -> Figure:
    """Start private servers and one server process, measure, and end them."""
    with (
        servers.postgres() as postgres,
        servers.redis() as redis,
        tempfile.TemporaryDirectory(prefix="bakeoff-queue-bench-") as name,
    ):
        print(f"PostgreSQL {postgres.version}")
        migrate.migrate(postgres.dsn)
        sigstore = ThrowawaySigstore.create(Path(name))
        signers = Path(name) / "signers.yaml"
        signers.write_text(
            "schema_version: bakeoff-results-signers/v1\ntrusted_identities:\n"
            f"- {{identity: {SIGNER.email}, issuer: {SIGNER.issuer}}}\n"
        )
        settings = {
            "DATABASE_URL": postgres.dsn,
            "REDIS_LEASE_URL": redis.url(1),
            "REDIS_TOKEN_URL": redis.url(2),
            "TOKEN_KEYS": f"bench:{'k' * 32}",
            "RECEIPT_KEYS": f"bench:{'ab' * 32}",
            "PUBLIC_URL": PUBLIC_URL,
            "TRUSTED_ROOT": str(sigstore.trusted_root),
            "SIGNERS_FILE": str(signers),
            "LEASE_TTL_S": "3600",
            "LEASE_TTL_MIN_S": "3600",
        }
        own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        with subprocess.Popen(
            [sys.executable, "-m", "bench.submits.server"],
            env={**own, **{PREFIX + name: value for name, value in settings.items()}},
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdout is not None
            try:
                actors = Actors(int(server.stdout.readline()), postgres.dsn, sigstore)
                verifier = BundleVerifier(sigstore.trusted_root, load_policy(signers))
                return measure(actors, server.pid, verifier, amount)
            finally:
                server.terminate()


def main() -> int:
    """Measure it."""
    wanted = report.options()
    report.introduce()
    return report.publish(bench(QUICK if wanted.quick else FULL), wanted)


if __name__ == "__main__":
    sys.exit(main())
