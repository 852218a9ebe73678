"""Turns a file into the runs of an enqueue request: bakeoff's config.yaml or the admin API's JSON.

A config becomes one run per entry of its `models`. Its dataset is `{n, domains}`: each runner's
harness makes the tasks of it and of the seed, so what it will make comes from its dry run, as a
file. The service checks every member of a run; here only what the conversion itself needs is
checked, and everything wrong with the models is said at once, before anything is sent.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from broker.jobs import quantizations
from client.descriptors import DescriptorFile, Undescribed, describe, read_folder
from client.documents import read_document
from client.output import CommandFailed

MAIN_TIER, FLOOR_TIER = "main", "dumb_model"
DOMAINS = ("qa", "code", "summarize", "classify")  # those that the harness can make tasks of
OUR_SECTION = "queue"  # the service's settings may live in the same file; a job has no use for them
# What the harness reads of a task's line; it passes over all else.
OF_A_TASK = ("id", "domain", "user_prompt", "expected", "scorer", "tier")

Run = dict[str, Any]


class JudgeMode(StrEnum):
    """How a judge judges the runs that are enqueued, where the config says otherwise."""

    SCORED = "scored"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Beside:
    """Options of `queue add` beside the config.yaml."""

    tasks: Path | None = None
    floor_tasks: Path | None = None
    models: Path | None = None
    judge_mode: JudgeMode | None = None
    # The quantizations of bakeoff's table: the server's, where there is one to ask.
    known: Collection[str] = field(default=quantizations.KNOWN, compare=False)


def read_runs(path: Path, beside: Beside, batch_id: str) -> list[Run]:
    """Return the runs that the file asks for, at least one.

    `batch_id` joins the runs of a config; runs in the admin API's form keep their own. Raises
    CommandFailed, whose lines name the file, the place and the fix.
    """
    document = read_document(path)
    runs = _admin_runs(document, path)
    if runs is None:
        runs = [run | {"batch_id": batch_id} for run in convert(document, path, beside)]
    elif beside != Beside():
        raise CommandFailed(f"{path}: holds runs, not a config: give the file alone")
    if not runs:
        raise CommandFailed(f"{path}: holds no runs")
    return runs


def _admin_runs(document: Any, path: Path) -> list[Run] | None:
    """`{"runs": [...]}`, a list of runs or one run; None for anything else."""
    if isinstance(document, dict) and "runs" in document:
        if extra := sorted(document.keys() - {"runs"}):
            raise CommandFailed(f"{path}: nothing may stand beside `runs`: remove {extra[0]}")
        document = document["runs"]
        if not isinstance(document, list):
            raise CommandFailed(f"{path}: `runs` must be a list")
    elif isinstance(document, dict) and "model" in document and "models" not in document:
        document = [document]
    if not isinstance(document, list):
        return None
    for index, run in enumerate(document):
        if not isinstance(run, dict):
            raise CommandFailed(f"{path}: runs[{index}] must be an object")
    return document


def convert(document: Any, path: Path, beside: Beside) -> list[Run]:
    """Return a run per model of the harness's config, which was read from `path`."""
    _require(document, path)
    config = {name: value for name, value in document.items() if name != OUR_SECTION}
    if beside.judge_mode:
        config["judge"] = _judge_by_mode(config.get("judge"), beside.judge_mode, path)
    _refuse_pairwise(config.get("judge"), path)
    job = {**_tasks(config, path, beside), "prompts": _prompts(config["prompts"], path)}
    descriptors = read_folder(beside.models) if beside.models else ()
    described = _describe_all(config["models"], path, descriptors, beside.known)
    judge = _describe_judge(config, path, described, descriptors, beside.known)
    return [
        {"model": descriptor, **judge, **job, "config": config | {"models": [entry]}}
        for entry, descriptor in described
    ]


def _require(document: Any, path: Path) -> None:
    sections = document if isinstance(document, dict) else {}
    missing = [name for name in ("models", "prompts", "dataset") if not sections.get(name)]
    if missing:
        raise CommandFailed(
            f"{path}: {' and '.join(missing)} missing or empty: expected bakeoff's config.yaml or"
            ' the admin API\'s {"runs": [...]}'
        )
    for name in ("models", "prompts"):
        if not isinstance(document[name], list):
            raise CommandFailed(f"{path}: `{name}` must be a list")


def _prompts(prompts: list[Any], path: Path) -> list[Any]:
    for index, prompt in enumerate(prompts):
        for member in ("id", "system"):
            if not isinstance(prompt, dict) or not isinstance(prompt.get(member), str):
                raise CommandFailed(f"{path}: prompts[{index}].{member} must be text: quote it")
    return prompts


def _tasks(config: Mapping[str, Any], path: Path, beside: Beside) -> dict[str, list[Any]]:
    """The tasks that the harness will make of this config, and its floor tasks."""
    dataset = config["dataset"]
    n = dataset.get("n") if isinstance(dataset, dict) else None
    domains = dataset.get("domains") if isinstance(dataset, dict) else None
    known = isinstance(domains, list) and domains and all(one in DOMAINS for one in domains)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1 or not known:
        raise CommandFailed(
            f"{path}: the harness reads `dataset` as n (a whole number) and domains (of"
            f" {', '.join(DOMAINS)}), and makes its tasks itself"
        )
    if beside.tasks is None:
        raise CommandFailed(
            f"{path}: the harness makes {n} tasks of dataset and run.seed, and a run must list"
            " them: give --tasks FILE, which `python -m bench.runner --dry-run` with this config"
            " writes to datasets/tasks-*.jsonl"
        )
    tasks = _read_tasks(beside.tasks, MAIN_TIER)
    if len(tasks) != n:
        raise CommandFailed(
            f"{beside.tasks}: has {len(tasks)} tasks, and {path} asks for n = {n}: take the file"
            " that the dry run of this very config writes"
        )
    for index, task in enumerate(tasks):
        if task.get("domain") not in domains:
            raise CommandFailed(f"{beside.tasks}: tasks[{index}].domain is not of {path}")
    return {"tasks": tasks} | _floor_tasks(config, path, beside)


def _floor_tasks(config: Mapping[str, Any], path: Path, beside: Beside) -> dict[str, list[Any]]:
    """The harness runs them before all others unless the config switches them off."""
    tier = config.get("dumb_model_tier")
    enabled = not isinstance(tier, dict) or bool(tier.get("enabled", True))
    if enabled and beside.floor_tasks is None:
        raise CommandFailed(
            f"{path}: the harness always runs its floor tasks: give --floor-tasks FILE (its"
            " datasets/dumb_model_tasks.jsonl), or set dumb_model_tier.enabled to false"
        )
    if not enabled and beside.floor_tasks is not None:
        raise CommandFailed(f"{path}: switches the floor tasks off: leave --floor-tasks out")
    if beside.floor_tasks is None:
        return {}
    return {"floor_tasks": _read_tasks(beside.floor_tasks, FLOOR_TIER)}


def _read_tasks(path: Path, tier: str) -> list[dict[str, Any]]:
    listed = read_document(path)
    if not isinstance(listed, list) or not listed:
        raise CommandFailed(f"{path}: must list tasks, as JSON Lines or as a list")
    tasks = []
    for index, task in enumerate(listed):
        if not isinstance(task, dict) or not isinstance(task.get("id"), str):
            raise CommandFailed(f"{path}: tasks[{index}].id must be text")
        if task.get("tier", tier) != tier:
            raise CommandFailed(f"{path}: tasks[{index}] is of tier {task['tier']}, not of {tier}")
        tasks.append({name: task[name] for name in OF_A_TASK if name in task})
    return tasks


def _judge_by_mode(judge: Any, mode: JudgeMode, path: Path) -> dict[str, Any]:
    if mode is JudgeMode.OFF:
        return {**(judge if isinstance(judge, dict) else {}), "enabled": False}
    if not _judges(judge):
        raise CommandFailed(f"{path}: no judge is enabled: leave --judge-mode out, or enable one")
    return {**judge, "mode": mode.value}


def _judges(judge: Any) -> bool:
    return isinstance(judge, dict) and bool(judge.get("enabled"))


def _refuse_pairwise(judge: Any, path: Path) -> None:
    """A run has one model, so a judge that compares models judges nothing in it."""
    if _judges(judge) and judge.get("mode", "pairwise_all") == "pairwise_all":
        raise CommandFailed(
            f"{path}: judge.mode is pairwise_all, which compares models with each other, and each"
            " model becomes a run of its own: all judged cells would score 0. Set judge.mode to"
            " scored, or give --judge-mode scored (or off)"
        )


def _describe_all(
    models: list[Any],
    path: Path,
    descriptors: Sequence[DescriptorFile],
    known: Collection[str],
) -> list[tuple[Mapping[str, Any], dict[str, Any]]]:
    described, problems, seen = [], [], set()
    for index, model in enumerate(models):
        place = f"models[{index}]"
        try:
            name = _model_id(model, seen)
            place += f" ({name})"
            described.append((model, describe(model, descriptors, known)))
        except Undescribed as error:
            problems += [f"{place}: {problem}" for problem in error.problems]
    if problems:
        bad = len(models) - len(described)
        raise CommandFailed(
            f"{path}: {bad} of {len(models)} models cannot be enqueued, so nothing was",
            details=problems,
        )
    return described


def _describe_judge(
    config: Mapping[str, Any],
    path: Path,
    described: Sequence[tuple[Mapping[str, Any], dict[str, Any]]],
    descriptors: Sequence[DescriptorFile],
    known: Collection[str],
) -> dict[str, Any]:
    """`{"judge": its descriptor}` where one judges: it takes VRAM after the model."""
    judge: Mapping[str, Any] = config.get("judge") or {}
    if not _judges(judge):
        return {}
    gguf = judge.get("gguf")
    for model, descriptor in described:
        if gguf and model.get("gguf") == gguf:
            return {"judge": descriptor}
    # Not its alias: in most configs that is "judge".
    name = judge.get("id") or Path(str(gguf or "")).stem or "judge"
    try:
        return {"judge": describe({**judge, "id": name}, descriptors, known)}
    except Undescribed as error:
        raise CommandFailed(
            f"{path}: the judge needs VRAM as well (the larger of both counts), and cannot be"
            " described, so nothing was enqueued",
            details=[f"judge: {problem}" for problem in error.problems],
        ) from None


def _model_id(model: Any, seen: set[str]) -> str:
    name = model.get("id") if isinstance(model, dict) else None
    if not isinstance(name, str) or not name:
        raise Undescribed("no id, or one that is not text: set it, in quotes")
    if name in seen:
        raise Undescribed("this id is taken by an earlier model: results are told apart by it")
    seen.add(name)
    return name
