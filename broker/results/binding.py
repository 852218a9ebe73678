"""Binding of a result to its job: step 5 of a submit.

The result is of the claimed run, and each record and judgement is of one cell of the job.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

from broker.documents.strict_json import pointer, quote
from broker.errors import RunMismatch, Violation
from broker.jobs.cells import failed, judge_score
from broker.jobs.job import Cell, Job, harness_hash
from broker.results import consistency
from broker.results.bundle import refuse

NAMED_MISSING = 5  # of the cells a complete result lacks
OTHER_HASH = (
    "is not the hash of /config: the first 16 hex digits of SHA-256 over json.dumps(config,"
    " sort_keys=True); hand in result.json as the harness wrote it"
)
_ANOTHER_RUN = Violation("/run_id", "is not the claimed run")


def check_binding(result: dict[str, Any], job: Job) -> None:
    """Step 5: the result is of this run, and all its cells are cells of the job, once each.

    Nor does it say of the job what was not handed out. Raises RunMismatch with the first 50
    violations.
    """
    if result["run_id"] != job.run_id:
        refuse(RunMismatch, [_ANOTHER_RUN], "result.json is of another run.")
    unlike = consistency.job_mismatches(result, job)
    refuse(RunMismatch, chain(_unbound(result, job), unlike), "result.json is not of the job.")


def _unbound(result: dict[str, Any], job: Job) -> Iterator[Violation]:
    if result["provenance"]["config_hash"] != harness_hash(result["config"]):
        yield Violation("/provenance/config_hash", OTHER_HASH)
    grid = _Grid.of(job)
    seen: set[Cell] = set()
    for index, record in enumerate(result["records"]):
        yield from grid.foreign(("records", index), record)
        cell = Cell(record["task_id"], record["prompt_id"], record["tier"])
        if cell in seen:
            yield Violation(pointer(("records", index)), "an earlier record has the same cell")
        seen.add(cell)
    if result["run_status"] == "complete":
        yield from _missing(job, seen)
    yield from _unbound_judgements(result.get("judgements") or (), grid)


def _missing(job: Job, seen: set[Cell]) -> Iterator[Violation]:
    """Floor cells may be missing: the harness does not repeat those that failed when it resumes."""
    missing = [cell for cell in job.main_cells() if cell not in seen]
    if missing:
        first = missing[:NAMED_MISSING]
        named = "; ".join(f"{quote(cell.task_id)} x {quote(cell.prompt_id)}" for cell in first)
        more = f" and {len(missing) - NAMED_MISSING} more" if len(missing) > NAMED_MISSING else ""
        yield Violation("/records", f"a complete run has every main cell; missing: {named}{more}")


def _unbound_judgements(judgements: Iterable[dict[str, Any]], grid: "_Grid") -> Iterator[Violation]:
    """A cell judged twice would have the score that its reader likes better."""
    scored: set[tuple[str, str]] = set()
    for index, judgement in enumerate(judgements):
        yield from grid.foreign(("judgements", index), judgement)
        if "model_id" not in judgement or failed(judgement) or judge_score(judgement) is None:
            continue
        cell = (judgement["task_id"], judgement["prompt_id"])
        if cell in scored:
            yield Violation(pointer(("judgements", index)), "an earlier judgement scores this cell")
        scored.add(cell)


@dataclass(frozen=True, slots=True)
class _Grid:
    """The job's cells, and the parts of them by which to say what is wrong with another."""

    model_ref: str
    cells: frozenset[Cell]
    pairs: frozenset[tuple[str, str]]
    tasks: frozenset[str]

    @classmethod
    def of(cls, job: Job) -> Self:
        cells = frozenset(job.cells())
        pairs = frozenset((cell.task_id, cell.prompt_id) for cell in cells)
        return cls(job.model_ref, cells, pairs, frozenset(cell.task_id for cell in cells))

    def foreign(self, place: tuple[str, int], entry: dict[str, Any]) -> Iterator[Violation]:
        """Yield the parts of a record or judgement (which has no tier) that are not of the job."""
        task_id, prompt_id, tier = entry["task_id"], entry["prompt_id"], entry.get("tier")
        pairwise = entry.get("a_model") is not None  # of two models, one is always another
        for member in ("a_model", "b_model") if pairwise else ("model_id",):
            if entry.get(member) != self.model_ref:
                yield Violation(pointer((*place, member)), "is not the job's model")
        if task_id not in self.tasks:
            yield Violation(pointer((*place, "task_id")), "is not a task of the job")
        elif (task_id, prompt_id) not in self.pairs:
            yield Violation(pointer((*place, "prompt_id")), "is not a prompt of this task's cells")
        elif place[0] == "records" and (task_id, prompt_id, tier) not in self.cells:
            yield Violation(pointer((*place, "tier")), "is not the tier of this cell")
