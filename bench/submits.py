"""B8 of the design's performance page: what 2 MB results cost the heartbeats beside them.

Heartbeats (200/s, open loop, timed from when each was due) while nothing else happens, while 8
submits of 2 MB are always in flight, and while unrelated processes do the same verification: the
last tells how much of a slower heartbeat is only two cores being shared. Three processes: this one
submits, one beats, one serves. Rounds are taken in turn. Besides: the schema check against
`jsonschema` on the same result, the time of each step of a submit, the server's memory before,
during and after 200 submissions, and the longest time that anything held its event loop.

    make bench-submits
"""

import asyncio
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
from nacl.signing import SigningKey
from rich.console import Console
from rich.table import Table
from tornado.netutil import bind_sockets
from tornado.web import RequestHandler

from auth import admin_tokens
from auth.signers import BundleVerifier, load_policy
from bench import report
from bench.report import Figure, Limit
from broker import bundles, cells, strict_json
from broker.documents import load_schema
from broker.jobs import Job
from broker.submissions import Submissions
from broker.uploads import Spool
from config.logging import configure_logging
from config.settings import PREFIX, load_settings
from db import admin, migrate
from db.pool import open_pool
from handlers.submit import Parts
from sandbox import servers
from sandbox.runner_identity import Identity, public_key_text
from sandbox.sigstore_instance import ThrowawaySigstore
from server import make_app, make_server, open_services
from tests.fleet import SIGNER, SMALL
from tests.result_factory import bundle_files, result_for

AT_ONCE = 8
SCHEMA_ROUNDS = 3
BEATS_PER_S, BEATERS = 200, 4
BUSY_WAIT_S = 0.1
TARGET_BEATS, TARGET_SCHEMA, TARGET_MEMORY, TARGET_HOLD_MS = 3.0, 30.0, 1.2, 250
PUBLIC_URL = "http://bench.test"
BOUNDARY = "bench-submits-boundary"
ADMIN = "/api/admin"
YARDSTICKS = 4  # unrelated processes that verify
FORK: ForkContext = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Amount:
    """How much to measure."""

    rounds: int
    round_s: float
    submits: int  # prepared for a round; what one does not use, the next one does
    memory_submits: int


FULL = Amount(rounds=3, round_s=5.0, submits=150, memory_submits=200)
QUICK = Amount(rounds=1, round_s=1.0, submits=16, memory_submits=8)


# The server process


class Holds:
    """The longest that one callback held the event loop."""

    def __init__(self) -> None:
        self.worst: tuple[float, float, str] = (0.0, 0.0, "")
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            run(handle)
            took = time.perf_counter() - wall
            if took > self.worst[0]:
                self.worst = (took, time.thread_time() - cpu, repr(handle)[:300])

        setattr(asyncio.Handle, "_run", timed)  # noqa: B010 (a method of theirs)


async def serve() -> None:
    """Serve the real application, and GET /bench/numbers, until the process is ended."""
    holds, times = Holds(), {"verify": [], "accept": []}
    for name, verb in (("verify", "verify"), ("accept", "_accept")):
        setattr(Submissions, verb, _timed(getattr(Submissions, verb), times[name]))

    class Numbers(RequestHandler):
        def get(self) -> None:
            wall, cpu, where = holds.worst
            self.write(
                {"hold_ms": wall * 1e3, "hold_cpu_ms": cpu * 1e3, "where": where, "times": times}
            )
            holds.worst = (0.0, 0.0, "")
            for each in times.values():
                each.clear()

    if switch_s := os.environ.get("BENCH_SWITCH_S"):
        sys.setswitchinterval(float(switch_s))
    settings = load_settings()
    configure_logging("error", "json")
    async with open_services(settings) as services:
        app = make_app(services)
        app.add_handlers(".*", [("/bench/numbers", Numbers)])
        sockets = bind_sockets(0, "127.0.0.1")
        make_server(app).add_sockets(sockets)
        print(sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()


def _timed(verb: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    async def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return await verb(*arguments, **options)
        finally:
            times.append((time.perf_counter() - started) * 1e3)

    return timed


# The people


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    body: Any


def ask(
    line: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: dict[str, str]
) -> Answer:
    """Send a request and return the answer."""
    line.request(method, path, body, headers)
    answer = line.getresponse()
    text = answer.read()
    return Answer(answer.status, json.loads(text) if text else None)


@dataclass
class Runner:
    """A registered runner."""

    port: int
    headers: dict[str, str]

    def claim(self) -> dict[str, Any]:
        """Claim a run, which must be there."""
        with closing(self.port) as line:
            headers = {**self.headers, "Idempotency-Key": str(uuid.uuid4())}
            answer = ask(line, "POST", "/api/queue/claim", b"{}", headers)
        assert answer.status == 200, answer
        return answer.body


@contextlib.contextmanager
def closing(port: int) -> Iterator[http.client.HTTPConnection]:
    """Yield a connection to the server."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        yield line
    finally:
        line.close()


class Town:
    """An admin, runners, and bundles that wait to be submitted."""

    def __init__(self, port: int, dsn: str, sigstore: ThrowawaySigstore) -> None:
        self.port = port
        self._sigstore = sigstore
        self._token = asyncio.run(_admin_token(dsn))
        self.runners = [self._runner(f"bench-{number}") for number in range(5)]
        self.ready: list[tuple[str, bytes, dict[str, str]]] = []

    def admin(self, path: str, body: dict[str, Any]) -> Any:
        """POST as the admin."""
        headers = {
            "Authorization": f"Bearer {self._token}",
            "Content-Type": "application/json",
            "Idempotency-Key": str(uuid.uuid4()),
        }
        with closing(self.port) as line:
            answer = ask(line, "POST", ADMIN + path, json.dumps(body).encode(), headers)
        assert answer.status == 201, answer
        return answer.body

    def leases(self, count: int) -> list[dict[str, Any]]:
        """Return runs that the first runner holds, for the heartbeats."""
        self.admin("/queue", {"runs": [run_of(1, 1) for _ in range(count)]})
        return [self.runners[0].claim() for _ in range(count)]

    def prepare(self, count: int) -> None:
        """Have `count` bundles of 2 MB ready to be submitted."""
        missing = count - len(self.ready)
        for start in range(0, missing, 50):
            runs = [run_of(60, 40) for _ in range(min(50, missing - start))]
            self.admin("/queue", {"runs": runs})
            for number in range(len(runs)):
                runner = self.runners[1 + number % 4]
                job = runner.claim()
                files = bundle_of(job, self._sigstore)
                headers = {
                    **runner.headers,
                    "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
                }
                path = f"/api/queue/{job['run_id']}/submit"
                self.ready.append((path, form(job["lease_id"], files), headers))

    def submit(self, seconds: float, most: int) -> tuple[int, int, float]:
        """Keep AT_ONCE submits in flight; return how many were accepted, told busy, and per s."""
        started = time.perf_counter()
        taken, busy, lock = itertools.count(), itertools.count(), threading.Lock()

        def work() -> None:
            with closing(self.port) as line:
                while time.perf_counter() < started + seconds:
                    with lock:
                        if not self.ready or most <= next(taken):
                            return
                        path, body, headers = self.ready.pop()
                    while (answer := ask(line, "POST", path, body, headers)).status == 503:
                        next(busy)
                        time.sleep(BUSY_WAIT_S)
                    assert answer.status == 201, answer

        before = len(self.ready)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for worker in [pool.submit(work) for _ in range(AT_ONCE)]:
                worker.result()
        done = before - len(self.ready)
        return done, next(busy), done / (time.perf_counter() - started)

    def numbers(self) -> dict[str, Any]:
        """Return what the server has measured since it was asked last."""
        with closing(self.port) as line:
            return ask(line, "GET", "/bench/numbers", b"", {}).body

    def _runner(self, name: str) -> Runner:
        key = SigningKey.generate()
        wanted = {"public_key": public_key_text(key), "runner_id": name, "max_leases": 64}
        self.admin("/runner-keys", wanted)
        identity = Identity(key, PUBLIC_URL, "bench", {"vram_gb": 24, "quantizations": ["q8_0"]})
        headers = {"Content-Type": "application/json"}
        with closing(self.port) as line:
            path = "/api/runners/register"
            answer = ask(line, "POST", path, identity.sign_registration(), headers)
        return Runner(
            self.port, {**headers, "Authorization": f"Bearer {answer.body['access_token']}"}
        )


async def _admin_token(dsn: str) -> str:
    token, digest = admin_tokens.make()
    async with open_pool(dsn, 2) as pool:
        await admin.add_token(pool, digest, "bench", admin_tokens.SCOPES, None)
    return token


def run_of(tasks: int, prompts: int) -> dict[str, Any]:
    """Return an enqueue entry with so many cells."""
    task = {"domain": "math", "user_prompt": "2+2?", "expected": "4", "scorer": "exact"}
    return {
        "model": SMALL,
        "tasks": [{**task, "id": f"task-{n}"} for n in range(tasks)],
        "prompts": [{"id": f"prompt-{n}", "system": f"System {n}."} for n in range(prompts)],
        "config": {"run": {"seed": 7}, "models": [{"id": "smollm2-1.7b"}]},
    }


def bundle_of(job: dict[str, Any], sigstore: ThrowawaySigstore) -> dict[str, bytes]:
    """Return a signed bundle with a complete result of some 2.2 MB."""
    result = result_for(job["run_id"], job)
    for record in result["records"]:
        record["text"] = "The answer is four, as 2 and 2 make 4 in every base above it. " * 4
    unsigned = bundle_files(result, b"")
    return bundle_files(result, sigstore.sign(unsigned["result.json"], SIGNER))


def form(lease_id: str, files: dict[str, bytes]) -> bytes:
    """Return a bundle as multipart/form-data."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="'
    parts = [f'{head}lease_id"\r\n\r\n{lease_id}\r\n'.encode()]
    for name, content in files.items():
        parts += [f'{head}{name}"; filename="{name}"\r\n\r\n'.encode(), content, b"\r\n"]
    return b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


# Beside the submits: heartbeats, and the yardstick


class Beats:
    """A process that beats; `during` returns the latencies in ms while `work` runs."""

    def __init__(self, runner: Runner, jobs: list[dict[str, Any]]) -> None:
        self._ours, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_beat, args=(theirs, runner, jobs), daemon=True)
        self._process.start()

    def during(self, seconds: float, work: Callable[[], Any]) -> tuple[list[float], Any]:
        """Beat for so long while `work` runs in this process."""
        self._ours.send(seconds)
        done = work()
        return self._ours.recv(), done

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _beat(orders: Connection, runner: Runner, jobs: list[dict[str, Any]]) -> None:
    while True:
        seconds = orders.recv()
        taken: list[float] = []
        start = time.perf_counter() + 0.1
        threads = [
            threading.Thread(target=_beater, args=(runner, jobs, start, seconds, n, taken))
            for n in range(BEATERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        orders.send(taken)


def _beater(
    runner: Runner, jobs: list[dict[str, Any]], start: float, seconds: float, which: int,
    taken: list[float],
) -> None:  # fmt: skip
    with closing(runner.port) as line:
        for number in range(which, int(seconds * BEATS_PER_S), BEATERS):
            due = start + number / BEATS_PER_S
            time.sleep(max(0.0, due - time.perf_counter()))
            job = jobs[number % len(jobs)]
            body = json.dumps({"lease_id": job["lease_id"]}).encode()
            path = f"/api/queue/{job['run_id']}/heartbeat"
            answer = ask(line, "POST", path, body, runner.headers)
            assert answer.status == 200, answer
            taken.append((time.perf_counter() - due) * 1e3)


@contextlib.contextmanager
def verifying_elsewhere(work: Callable[[], Any]) -> Iterator[None]:
    """Let unrelated processes do the same verification again and again."""

    def loop() -> None:
        os.nice(10)  # as the server's own workers
        while True:
            work()

    processes = [FORK.Process(target=loop, daemon=True) for _ in range(YARDSTICKS)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


# Measures


def steps(
    verifier: BundleVerifier, files: dict[str, bytes], job: dict[str, Any]
) -> dict[str, list[float]]:
    """Return the ms of steps 0 to 5, each taken apart and done five times."""
    text, signature = files["result.json"], files["signature.sigstore.json"]
    digests = _digests(files)
    of = Job.from_payload(job["run_id"], job)
    document = strict_json.parse(text)
    body = form(job["lease_id"], files)
    does: dict[str, Callable[[], Any]] = {
        "0 receive, hash, spool": lambda: _receive(body),
        "1 names": lambda: bundles.check_names(list(digests), "signature.sigstore.json"),
        "2 manifest": lambda: bundles.check_manifest(files["manifest.json"], digests, of.run_id),
        "3 signature": lambda: verifier.verify(text, signature, None),
        "4 strict JSON": lambda: strict_json.parse(text),
        "4 schema": lambda: load_schema("result").violations(document),
        "5 binding": lambda: bundles.check_binding(document, of),
        "rows": lambda: cells.metrics(document, of),
    }
    return {name: [_ms(do) for _ in range(5)] for name, do in does.items()}


def _receive(body: bytes) -> None:
    spool = Spool()
    parts = Parts(BOUNDARY.encode(), spool)
    for start in range(0, len(body), 65536):
        parts.feed(body[start : start + 65536])
    spool.close()


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    manifest = json.loads(files["manifest.json"])["files"]
    digests = {name: entry["sha256"] for name, entry in manifest.items()}
    return {**digests, "manifest.json": ""}


def _ms(do: Callable[[], Any]) -> float:
    started = time.perf_counter()
    do()
    return (time.perf_counter() - started) * 1e3


def schema_ratio(text: bytes) -> tuple[float, float]:
    """Return the ms that our schema check and `jsonschema` take for one result, in turn."""
    document = json.loads(text)
    ours = load_schema("result")
    theirs = jsonschema.Draft202012Validator(
        ours.definition, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    taken: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(SCHEMA_ROUNDS):
        taken["ours"].append(_ms(lambda: ours.violations(document)))
        taken["theirs"].append(_ms(lambda: list(theirs.iter_errors(document))))
    return statistics.median(taken["ours"]), statistics.median(taken["theirs"])


def memory_mb(pid: int) -> tuple[float, float, int]:
    """Return the RSS of a process, the PSS of its children, and how many those are."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    kib = [_kib(child, "smaps_rollup", "Pss") for child in children]
    return _kib(str(pid), "status", "VmRSS") / 1024, sum(kib) / 1024, len(children)


def _kib(pid: str, file: str, name: str) -> int:
    with contextlib.suppress(OSError):  # it may end meanwhile
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0


def remember(town: Town, pid: int, submits: int) -> dict[str, tuple[float, float, int]]:
    """Return the memory before, at most during, and after so many submissions."""
    town.prepare(submits)
    before, most, done = memory_mb(pid), [memory_mb(pid)], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            most.append(memory_mb(pid))

    looking = threading.Thread(target=look)
    looking.start()
    town.numbers()  # what enqueueing took is not asked for here
    accepted, busy, rate = town.submit(600, submits)
    done.set()
    looking.join()
    print(f"{accepted} submissions of 2 MB, {rate:.1f}/s, {busy} x busy")
    time.sleep(2)
    return {"before": before, "most, during": max(most), "2 s after": memory_mb(pid)}


def p(latencies: list[float], percent: int) -> float:
    """Return a percentile."""
    return statistics.quantiles(latencies, n=100)[percent - 1]


def measure(town: Town, pid: int, verifier: BundleVerifier, amount: Amount) -> Figure:
    """Measure all, print the tables, and return the figure."""
    console = Console()
    town.prepare(1)
    town.submit(60, 1)  # what the first submit costs is not what a submit costs
    memory = remember(town, pid, amount.memory_submits)
    hold = town.numbers()
    town.admin("/queue", {"runs": [run_of(60, 40)]})
    job = town.runners[1].claim()
    files = bundle_of(job, town._sigstore)
    taken = steps(verifier, files, job)
    ours, theirs = schema_ratio(files["result.json"])

    def verify() -> None:
        of = Job.from_payload(job["run_id"], job)
        bundles.check_manifest(files["manifest.json"], _digests(files), of.run_id)
        text = files["result.json"]
        verifier.verify(text, files["signature.sigstore.json"], None)
        document = bundles.parse_result(text)
        bundles.check_binding(document, of)
        cells.metrics(document, of)

    beats = Beats(town.runners[0], town.leases(20))
    rounds: dict[str, list[list[float]]] = {"idle": [], "8 submits": [], "unrelated load": []}
    rates, holds = [], [hold]
    try:
        for _ in range(amount.rounds):
            town.prepare(amount.submits)
            town.numbers()
            rounds["idle"].append(
                beats.during(amount.round_s, lambda: time.sleep(amount.round_s))[0]
            )
            submit = lambda: town.submit(amount.round_s, amount.submits)  # noqa: E731
            latencies, (done, busy, rate) = beats.during(amount.round_s, submit)
            rounds["8 submits"].append(latencies)
            rates.append(rate)
            print(f"round: {done} submits, {rate:.1f}/s, {busy} x busy")
            holds.append(town.numbers())
            with verifying_elsewhere(verify):
                rounds["unrelated load"].append(
                    beats.during(amount.round_s, lambda: time.sleep(amount.round_s))[0]
                )
    finally:
        beats.close()
    for name in ("verify", "accept"):
        label = "1-5 as the server waits" if name == "verify" else "6 transaction"
        taken[label] = [ms for each in holds for ms in each["times"][name]]
    return show(console, rounds, rates, taken, (ours, theirs), memory, holds)


def show(
    console: Console,
    rounds: dict[str, list[list[float]]],
    rates: list[float],
    taken: dict[str, list[float]],
    schema: tuple[float, float],
    memory: dict[str, tuple[float, float, int]],
    holds: list[dict[str, Any]],
) -> Figure:
    """Print the tables and return the figure."""
    table = Table("heartbeats, 200/s", "p50 ms", "p99 ms", "spread of p99", "p99 ratio to idle")
    medians = {
        name: {n: statistics.median(p(each, n) for each in lists) for n in (50, 99)}
        for name, lists in rounds.items()
    }
    idle = medians["idle"][99]
    rows: dict[str, Any] = {}
    for name, lists in rounds.items():
        spread = [p(each, 99) for each in lists]
        ratio = medians[name][99] / idle
        rows[name] = {**{f"p{n}_ms": round(v, 2) for n, v in medians[name].items()}}
        table.add_row(
            name, f"{medians[name][50]:.2f}", f"{medians[name][99]:.2f}",
            f"{min(spread):.1f} to {max(spread):.1f}", f"{ratio:.2f}",
        )  # fmt: skip
    console.print(table)
    table = Table("step, a 2.2 MB result", "median ms", "most ms", "times")
    for name, each in taken.items():
        table.add_row(name, f"{statistics.median(each):.2f}", f"{max(each):.2f}", str(len(each)))
    rows["steps_ms"] = {name: round(statistics.median(each), 2) for name, each in taken.items()}
    console.print(table)
    table = Table("memory", "server RSS MB", "workers PSS MB", "no.")
    for name, (rss, pss, count) in memory.items():
        table.add_row(name, f"{rss:.1f}", f"{pss:.1f}", str(count))
    rows["memory_mb"] = {name: [round(mb, 1) for mb in each[:2]] for name, each in memory.items()}
    console.print(table)
    worst = max(holds, key=lambda each: each["hold_ms"])
    console.print(
        f"longest hold of the event loop {worst['hold_ms']:.1f} ms ({worst['hold_cpu_ms']:.1f} ms"
        f" of CPU): {worst['where']}", markup=False, highlight=False,
    )  # fmt: skip
    ours, theirs = schema
    console.print(f"schema check {ours:.2f} ms, jsonschema {theirs:.1f} ms: {theirs / ours:.0f} x")
    grown = memory["2 s after"][0] / memory["before"][0]
    rows |= {
        "submits_per_s": round(statistics.median(rates), 1),
        "unrelated_load_p99_to_idle": round(medians["unrelated load"][99] / idle, 2),
    }
    return Figure(
        "B8",
        f"heartbeats' p99 while {AT_ONCE} submits of 2 MB are in flight",
        medians["8 submits"][99],
        "ms",
        {
            "idle_p99": Limit(medians["8 submits"][99] / idle, TARGET_BEATS, most=True),
            "jsonschema": Limit(theirs / ours, TARGET_SCHEMA),
            "memory_after": Limit(grown, TARGET_MEMORY, most=True),
            "hold_ms": Limit(worst["hold_ms"], TARGET_HOLD_MS, most=True),
        },
        rows,
    )


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
        }
        own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        with subprocess.Popen(
            [sys.executable, "-m", "bench.submits", "serve"],
            env={**own, **{PREFIX + name: value for name, value in settings.items()}},
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdout is not None
            try:
                town = Town(int(server.stdout.readline()), postgres.dsn, sigstore)
                verifier = BundleVerifier(sigstore.trusted_root, load_policy(signers))
                return measure(town, server.pid, verifier, amount)
            finally:
                server.terminate()


def main() -> int:
    """Measure, or be the server process."""
    if sys.argv[1:] == ["serve"]:
        asyncio.run(serve())
        return 0
    wanted = report.options()
    report.introduce()
    return report.publish(bench(QUICK if wanted.quick else FULL), wanted)


if __name__ == "__main__":
    sys.exit(main())
