"""What one submit of B8 costs: the time of each step, the schema check, and the memory."""

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema

from auth.signers import BundleVerifier
from bench.submits.actors import Actors
from bench.submits.bundle import BOUNDARY, digests_of, form
from broker.documents import strict_json
from broker.documents.schemas import load_schema
from broker.jobs import cells
from broker.jobs.job import Job
from broker.results import binding, bundle, manifest
from broker.results.uploads import Spool
from handlers.submit import Parts

SCHEMA_ROUNDS = 3


def steps(
    verifier: BundleVerifier, files: dict[str, bytes], job: dict[str, Any]
) -> dict[str, list[float]]:
    """Return the ms of steps 0 to 5, each taken apart and done five times."""
    text, signature = files["result.json"], files["signature.sigstore.json"]
    digests = digests_of(files)
    of = Job.from_payload(job["run_id"], job)
    document = strict_json.parse(text)
    body = form(job["lease_id"], files)
    does: dict[str, Callable[[], Any]] = {
        "0 receive, hash, spool": lambda: _receive(body),
        "1 names": lambda: bundle.check_names(list(digests), "signature.sigstore.json"),
        "2 manifest": lambda: manifest.check_manifest(files["manifest.json"], digests, of.run_id),
        "3 signature": lambda: verifier.verify(text, signature, None),
        "4 strict JSON": lambda: strict_json.parse(text),
        "4 schema": lambda: load_schema("result").violations(document),
        "5 binding": lambda: binding.check_binding(document, of),
        "rows": lambda: cells.metrics(document, of),
    }
    return {name: [_ms(do) for _ in range(5)] for name, do in does.items()}


def _receive(body: bytes) -> None:
    spool = Spool()
    parts = Parts(BOUNDARY.encode(), spool)
    for start in range(0, len(body), 65536):
        parts.feed(body[start : start + 65536])
    spool.close()


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


def remember(actors: Actors, pid: int, submits: int) -> dict[str, tuple[float, float, int]]:
    """Return the memory before, at most during, and after so many submissions."""
    actors.prepare(submits)
    before, most, done = memory_mb(pid), [memory_mb(pid)], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            most.append(memory_mb(pid))

    looking = threading.Thread(target=look)
    looking.start()
    actors.numbers()  # what enqueueing took is not asked for here
    accepted, busy, rate = actors.submit(600, submits)
    done.set()
    looking.join()
    print(f"{accepted} submissions of 2 MB, {rate:.1f}/s, {busy} x busy")
    time.sleep(2)
    return {"before": before, "most, during": max(most), "2 s after": memory_mb(pid)}
