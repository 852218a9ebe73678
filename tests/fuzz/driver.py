"""Submits mutants, judges the answers, and counts.

Each worker has runs of its own and one connection, and sends one mutant at a time: as many as the
server verifies at once, so that it is never busy. Which run a mutant is for and how it is changed
follow from the seed and its number, and not from what happened before.
"""

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.bundle import RESULT, Bundle
from tests.fuzz.mutants import Mutant, make, make_control
from tests.fuzz.oracle import Pair, read_form, why_not_accepted, why_not_stored
from tests.fuzz.wire import Answer, Wire
from tests.fuzz.world import SHAPES, Shape, World

WORKERS = 4
SPARES = 1  # runs of each shape and worker besides: to take parts from
ANSWER_S = 30.0
# What is no whole request gets no answer at all, or soon.
UNENDED_S = 0.25
HELD_MS = 250.0
KEPT = 50  # failing mutants that are written down


@dataclass
class Campaign:
    """What came of a campaign."""

    seed: str
    mutants: int = 0
    held_ms: float = 0.0
    held_by: str = ""
    codes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, answer)
    violations: Counter[str] = field(default_factory=Counter)
    evidence: list[str] = field(default_factory=list)

    @property
    def accepted_changed(self) -> int:
        """How many were accepted that must not be."""
        return self.violations["accepted_changed"] + self.violations["stored_changed"]

    @property
    def status_5xx(self) -> int:
        """How many answers were the server's fault; 503 with Retry-After is not."""
        return self.violations["status_5xx"]

    @property
    def busy(self) -> int:
        """How many were told to come again."""
        return sum(count for (_, code), count in self.codes.items() if code == "503 busy")

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.violations.total()


@dataclass
class _Stored:
    """A run that was submitted to in earnest, for the judgement of what is in the database."""

    bundle: Bundle
    signed: list[Pair] = field(default_factory=list)


class Driver:
    """Attacks a world. `keep`: the folder that failing mutants are written to."""

    def __init__(
        self, world: World, seed: str, keep: Path, told: Callable[[Campaign], None] = lambda _: None
    ) -> None:
        self._world = world
        self._keep = keep
        self._told = told
        self._real: dict[str, _Stored] = {}
        self.campaign = Campaign(seed)

    async def run(self, numbers: range) -> Campaign:
        """Submit these mutants and return what came of it."""
        async with asyncio.TaskGroup() as group:
            for worker in range(WORKERS):
                group.create_task(self._work(worker, numbers))
        await self._judge_stored()
        loop = await self._world.loop()
        self.campaign.held_ms, self.campaign.held_by = loop["worst_ms"], loop["what"]
        if self.campaign.held_ms > HELD_MS and not self.campaign.violations["held"]:
            self._violation("held", self.campaign.held_by)
        return self.campaign

    async def _work(self, worker: int, numbers: range) -> None:
        own = [number for number in numbers if number % WORKERS == worker]
        bundles: dict[Shape, list[Bundle]] = {}
        async with Wire(self._world.port) as wire:
            await self._warm(wire)
            for number in own:
                shape = _shape(self.campaign.seed, number)
                if shape not in bundles:  # a short campaign has no need of large ones
                    bundles[shape] = [await self._world.take(shape) for _ in range(1 + SPARES)]
                mutant = make(self.campaign.seed, number, bundles[shape])
                if await self._submit(wire, bundles[shape][0], mutant, shape):
                    bundles[shape][0] = await self._world.take(shape)
                self._told(self.campaign)

    async def _warm(self, wire: Wire) -> None:
        """What only the first request pays is no mutant's: imports, and a worker's start."""
        bundle = await self._world.take(SHAPES[0])
        request = self._request(bundle, make_control(bundle), SHAPES[0])
        await wire.exchange(request, last=False, patience_s=ANSWER_S)
        await self._world.reset_loop()

    def _request(self, bundle: Bundle, mutant: Mutant, shape: Shape) -> bytes:
        query = "" if mutant.real else "?validate_only=1"
        lines = [
            f"POST /api/queue/{bundle.run_id}/submit{query} HTTP/1.1",
            "Host: queue.test",
            f"Authorization: Bearer {self._world.runners[shape.runner].token}",
            f"Content-Type: {mutant.request.content_type}",
            f"X-Request-Id: mutant-{mutant.number}",
            *mutant.request.headers,
        ]
        head = "\r\n".join([*lines, "", ""])
        return head.encode("utf-8", "surrogateescape") + mutant.request.body

    async def _submit(self, wire: Wire, bundle: Bundle, mutant: Mutant, shape: Shape) -> bool:
        """Send a mutant and judge the answer; return whether its run cannot be used again."""
        self.campaign.mutants += 1
        if mutant.real:
            stored = self._real.setdefault(bundle.run_id, _Stored(bundle))
            stored.signed += mutant.signed
        sent, request = mutant.request, self._request(bundle, mutant, shape)
        try:
            answer = await wire.exchange(
                request, last=sent.last, patience_s=ANSWER_S if sent.whole else UNENDED_S
            )
        except TimeoutError:
            answer = None
        self.campaign.codes[mutant.kind, _code(answer)] += 1
        for name, detail in self._faults(bundle, mutant, answer):
            self._violation(name, f"mutant {mutant.number} ({mutant.kind}): {detail}")
            self._write_down(mutant, request, name, detail, answer)
        # An answer that did not come may have been a receipt.
        return mutant.real and (answer is None or answer.status == 201)

    def _faults(
        self, bundle: Bundle, mutant: Mutant, answer: Answer | None
    ) -> list[tuple[str, str]]:
        """Return what is wrong with an answer, by the invariant that it breaks."""
        if answer is None:
            return [("unanswered", "no answer")] if mutant.request.whole else []
        faults = []
        if answer.status >= 500 and _code(answer) != "503 busy":
            faults.append(("status_5xx", _shown(answer)))
        if answer.status in (200, 201):
            wrong = why_not_accepted(
                bundle, mutant.request.content_type, mutant.request.readings, mutant.signed
            )
            if wrong is None:
                wrong = _other_digest(mutant, answer)
            if wrong is not None:
                faults.append(("accepted_changed", f"{answer.status}, {wrong}"))
        elif mutant.honest:
            faults.append(("honest_refused", _shown(answer)))
        elif not _is_problem(answer) and mutant.request.whole and _is_http(mutant):
            faults.append(("not_a_problem_document", _shown(answer)))
        held = float(answer.headers.get("x-held-ms", 0))
        if held > max(HELD_MS, self.campaign.held_ms):
            self.campaign.held_ms = held
            faults.append(("held", f"the loop was held {held} ms, with this in flight or before"))
        return faults

    async def _judge_stored(self) -> None:
        """Judge what is in the database, also where no answer came."""
        pool = self._world.fleet.pool
        for run_id, stored in self._real.items():
            rows = await pool.fetch(
                "SELECT name, content, sha256 FROM submission_files WHERE run_id = $1", run_id
            )
            files = {row["name"]: row["content"] for row in rows}
            digests = {row["name"]: row["sha256"] for row in rows}
            if not files:
                continue
            wrong = why_not_stored(stored.bundle, files, stored.signed)
            if digests != {name: hashlib.sha256(of).hexdigest() for name, of in files.items()}:
                wrong = "the digests stored are not those of the files"
            if wrong is not None:
                self._violation("stored_changed", f"run {run_id}: {wrong}")

    def _violation(self, name: str, detail: str) -> None:
        self.campaign.violations[name] += 1
        if self.campaign.violations[name] <= KEPT:
            self.campaign.evidence.append(f"{name}: {detail}")

    def _write_down(
        self, mutant: Mutant, request: bytes, name: str, detail: str, answer: Answer | None
    ) -> None:
        """Keep a failing mutant: as it was sent, and how to make it again."""
        if self.campaign.violations[name] > KEPT:
            return
        folder = self._keep / f"{self.campaign.seed}-{mutant.number}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "request.http").write_bytes(request)
        about = {
            "seed": self.campaign.seed,
            "number": mutant.number,
            "again": f"python -m tests.fuzz --seed {self.campaign.seed} --only {mutant.number}",
            "kind": mutant.kind,
            "violation": name,
            "detail": detail,
            "answer": answer and f"{answer.status} {answer.body.decode(errors='replace')}",
        }
        (folder / "mutant.json").write_text(json.dumps(about, indent=2) + "\n")


def _shape(seed: str, number: int) -> Shape:
    """Which run a mutant is for."""
    rng = random.Random(f"{seed}:{number}:shape")  # noqa: S311 (repeatable on purpose)
    [shape] = rng.choices(SHAPES, weights=[shape.weight for shape in SHAPES])
    return shape


def _code(answer: Answer | None) -> str:
    if answer is None:
        return "no answer"
    if answer.status < 400:
        return str(answer.status)
    if not _is_problem(answer):
        return f"{answer.status} (not ours)"
    return f"{answer.status} {json.loads(answer.body)['code']}"


def _is_problem(answer: Answer) -> bool:
    return answer.headers.get("content-type") == "application/problem+json"


def _is_http(mutant: Mutant) -> bool:
    """Whether the request's head is HTTP; what is not is told so by Tornado, in its own words."""
    kind = mutant.request.content_type
    return kind.isascii() and kind.isprintable()


def _shown(answer: Answer) -> str:
    return f"{answer.status} {answer.body[:300].decode(errors='replace')}"


def _other_digest(mutant: Mutant, answer: Answer) -> str | None:
    """What the server says that it took must be what it was sent."""
    said = json.loads(answer.body)["result_sha256"]
    for body in mutant.request.readings:
        result = read_form(mutant.request.content_type, body)[RESULT]
        if hashlib.sha256(result).hexdigest() != said:
            return "the answer names another result_sha256"
    return None
