"""An enqueue's body becomes what is written of it: checked, hashed, and as JSON text.

Runs in a worker process (broker/concurrency/workers.py): pure work over bytes, without database or
clock.
What many rows or megabytes are made of comes back as text that only PostgreSQL reads.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from uuid import UUID, uuid4

from auth.keys import digest_of
from broker.documents.schemas import load_schema
from broker.documents.strict_json import MAX_VIOLATIONS
from broker.documents.times import parse_time
from broker.errors import InvalidRequest, UnknownQuantization, Violation
from broker.jobs import model_rows, task_rows
from broker.jobs.job import MAX_CELLS, as_stored, comparable_hash
from broker.jobs.measurements import check_peak_tflops
from broker.jobs.model_rows import Lookups, ModelRows
from db.models import NewCreator, NewModel, NewSource
from db.run_queue import QueuedRun
from db.tasks import NewPrompt, NewTask

DEFAULT_PRIORITY = 100
MODELS = ("model", "judge")
PAIRWISE = "pairwise_all"  # the harness's default
JUDGE_NOT_COUNTED = (
    "config.judge is enabled and the run names no judge: its VRAM need is its model's alone. Give"
    " the judge's descriptor or model_id as `judge`, and the larger of both counts."
)
# Of different tasks and prompts, in one transaction: whoever enqueues the same ones waits for it.
MAX_CELLS_TOGETHER = 2 * MAX_CELLS
# What one statement takes: some 50 ms of PostgreSQL, and no long hold of the server's event loop.
TEXT_ROWS = 2000
TEXT_LENGTH = 1024 * 1024
_WRITE = json.JSONEncoder(ensure_ascii=False, default=str).encode  # str: of a UUID


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that passed every check that needs no transaction; `at` is its place in the body.

    `models` are its model and its judge, each with its place; a row where it came as a descriptor,
    and not by its id.
    """

    row: QueuedRun
    at: str
    models: tuple[tuple[str, UUID, NewModel | None], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows that a body adds, sorted by their keys; sources, tasks and prompts are JSON texts.

    In one order in every transaction, or two enqueues of the same rows could deadlock.
    """

    request_sha256: str
    runs: tuple[PreparedRun, ...]
    creators: tuple[NewCreator, ...]
    models: tuple[NewModel, ...]
    sources: tuple[str, ...]
    tasks: tuple[str, ...]
    prompts: tuple[str, ...]


def prepare(body: bytes, lookups: Lookups, max_attempts: int) -> Prepared:
    """Read an enqueue's body; a run that says nothing else is tried `max_attempts` times.

    Raises InvalidJson, DuplicateKey, InvalidRequest or UnknownQuantization with every violation.
    """
    runs = load_schema("enqueue").read(body, InvalidRequest)["runs"]
    _check_all(runs, lookups)
    request_sha256 = digest_of(runs)
    different = _different(runs)
    described = {
        (i, part): model_rows.rows(run[part], lookups)
        for i, run in enumerate(runs)
        for part in MODELS
        if part in run and "model_id" not in run[part]
    }
    by_id = {each.model.model_id: each for each in described.values()}
    models = [by_id[model_id] for model_id in sorted(by_id)]
    creators = {each.creator.creator_id: each.creator for each in models if each.creator}
    tasks, prompts = _rows(different)
    return Prepared(
        request_sha256,
        tuple(_run(run, described, max_attempts, i) for i, run in enumerate(runs)),
        tuple(creators[key] for key in sorted(creators)),
        tuple(each.model for each in models),
        tuple(_texts(NewSource, (source for each in models for source in each.sources))),
        tuple(_texts(NewTask, (tasks[key] for key in sorted(tasks)))),
        tuple(_texts(NewPrompt, (prompts[key] for key in sorted(prompts)))),
    )


def _check_all(runs: Sequence[Mapping[str, Any]], lookups: Lookups) -> None:
    wrong = _twice([run.get("run_id") for run in runs], "/runs", "run_id")
    wrong += [v for i, run in enumerate(runs) for v in _check(run, lookups, f"/runs/{i}")]
    if any(violation.pointer.endswith("/quantization") for violation in wrong):
        raise UnknownQuantization(None, tuple(wrong[:MAX_VIOLATIONS]))
    if wrong:
        raise InvalidRequest(None, tuple(wrong[:MAX_VIOLATIONS]))


def _check(run: Mapping[str, Any], lookups: Lookups, at: str) -> list[Violation]:
    wrong = _check_judge(run["config"].get("judge"), "judge" in run, at)
    for part in MODELS:
        if part in run and "model_id" not in run[part]:
            wrong += model_rows.check(run[part], lookups, f"{at}/{part}")
    wrong += _twice([task["id"] for task in run["tasks"]], f"{at}/tasks")
    wrong += _twice([task["id"] for task in run.get("floor_tasks", ())], f"{at}/floor_tasks")
    wrong += _twice([prompt["id"] for prompt in run["prompts"]], f"{at}/prompts")
    # What no result can hold is refused before a runner computes it.
    wrong += check_peak_tflops(run["config"], f"{at}/config")
    if _count(run) > MAX_CELLS:
        wrong.append(Violation(f"{at}/tasks", f"a run has at most {MAX_CELLS} cells"))
    return wrong


def _check_judge(judge: Any, named: bool, at: str) -> list[Violation]:
    """A judge that compares models has nothing to compare in a run, which has one model."""
    if not _judges(judge):
        if named:
            detail = "is given, and config.judge is not enabled: leave it out, or enable it"
            return [Violation(f"{at}/judge", detail)]
        return []
    if judge.get("mode", PAIRWISE) == PAIRWISE:
        detail = (
            f"is {PAIRWISE}, which compares the answers of several models, and a run has one: all"
            " judged cells would score 0; set it to scored, or set judge.enabled to false"
        )
        return [Violation(f"{at}/config/judge/mode", detail)]
    return []


def _judges(judge: Any) -> bool:
    return isinstance(judge, dict) and bool(judge.get("enabled"))


def _twice(ids: Sequence[str | None], at: str, member: str = "id") -> list[Violation]:
    """Yield each id that occurs twice: a result could not name which of both it means."""
    first = {each: i for i, each in reversed(list(enumerate(ids)))}
    return [
        Violation(f"{at}/{i}/{member}", f"is the {member} of {at}/{first[each]} too")
        for i, each in enumerate(ids)
        if each is not None and first[each] != i
    ]


def _count(run: Mapping[str, Any]) -> int:
    return len(run["tasks"]) * len(run["prompts"]) + len(run.get("floor_tasks", ()))


def _different(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return one run of each set of tasks and prompts: a thousand models may share one.

    Raises InvalidRequest for more cells than one transaction should write.
    """
    found: dict[str, Mapping[str, Any]] = {}
    count = 0
    for i, run in enumerate(runs):
        cells_of = digest_of([run["tasks"], run.get("floor_tasks", []), run["prompts"]])
        if cells_of in found:
            continue
        found[cells_of] = run
        count += _count(run)
        if count > MAX_CELLS_TOGETHER:
            detail = (
                f"the runs up to this one have more than {MAX_CELLS_TOGETHER} different cells:"
                " enqueue them in several requests"
            )
            raise InvalidRequest(None, (Violation(f"/runs/{i}/tasks", detail),))
    return list(found.values())


def _rows(
    runs: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, NewTask], dict[str, NewPrompt]]:
    """Return the tasks and the prompts of runs, by the digests that name them."""
    tasks, prompts = {}, {}
    for run in runs:
        for cell in task_rows.cells(as_stored(_tasks(run))):
            tasks[cell.task.natural_key_hash] = cell.task
            prompts[cell.prompt.content_sha256] = cell.prompt
    return tasks, prompts


def _run(
    run: Mapping[str, Any],
    described: Mapping[tuple[int, str], ModelRows],
    max_attempts: int,
    place: int,
) -> PreparedRun:
    run_id = UUID(run["run_id"]) if "run_id" in run else uuid4()
    job, at = _job(run, run_id), f"/runs/{place}"
    not_before = run.get("not_before")
    found = []
    for part in MODELS:
        if part in run:
            rows = described.get((place, part))
            model = rows.model if rows else None
            model_id = model.model_id if model else UUID(run[part]["model_id"])
            found.append((f"{at}/{part}", model_id, model))
    unjudged = _judges(run["config"].get("judge")) and "judge" not in run
    row = QueuedRun(
        run_id=run_id,
        model_id=found[0][1],
        judge_model_id=found[-1][1],
        job=_WRITE(job),
        config_hash=job["config_hash"],
        priority=int(run.get("priority", DEFAULT_PRIORITY)),
        not_before=parse_time(not_before, f"{at}/not_before") if not_before else None,
        max_attempts=int(run.get("max_attempts", max_attempts)),
        max_runtime_s=int(run["max_runtime_s"]) if "max_runtime_s" in run else None,
        batch_id=UUID(run["batch_id"]) if "batch_id" in run else None,
    )
    return PreparedRun(row, at, tuple(found), (JUDGE_NOT_COUNTED,) if unjudged else ())


def _job(run: Mapping[str, Any], run_id: UUID) -> dict[str, Any]:
    """Return the job as it will be handed out.

    The harness writes config.run.name into its result, so that is the run_id.
    """
    config = as_stored(run["config"])
    config["run"] = {**config.get("run", {}), "name": str(run_id)}
    config.setdefault("models", [{"id": run["model"].get("name", run["model"].get("model_id"))}])
    return {**as_stored(_tasks(run)), "config": config, "config_hash": comparable_hash(config)}


def _tasks(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tasks": [{**task, "tier": "main"} for task in run["tasks"]],
        "floor_tasks": [{**task, "tier": "dumb_model"} for task in run.get("floor_tasks", ())],
        "prompts": run["prompts"],
    }


def _texts(of: type[Any], rows: Iterable[Any]) -> Iterator[str]:
    """Give rows of a dataclass as JSON arrays, each of as much as one statement takes."""
    names = [field.name for field in fields(of)]
    some: list[str] = []
    length = 0
    for row in rows:
        some.append(_WRITE({name: getattr(row, name) for name in names}))
        length += len(some[-1])
        if len(some) == TEXT_ROWS or length >= TEXT_LENGTH:
            yield f"[{','.join(some)}]"
            some, length = [], 0
    if some:
        yield f"[{','.join(some)}]"
