"""Turns a file into the runs of an enqueue request: bakeoff's config.yaml or the admin API's JSON.

A config becomes one run per entry of its `models`. The service checks every member of a run; here
only what the conversion itself needs is checked, and everything wrong with the models is said at
once, before anything is sent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.descriptors import DescriptorFile, Undescribed, describe, read_folder
from cli.documents import read_document
from cli.output import CommandFailed

FLOOR_TIER = "dumb_model"
OUR_SECTION = "queue"  # the service's settings may live in the same file; a job has no use for them

Run = dict[str, Any]


def read_runs(path: Path, models_folder: Path | None, batch_id: str) -> list[Run]:
    """Return the runs that the file asks for, at least one.

    `batch_id` joins the runs of a config; runs in the admin API's form keep their own. Raises
    CommandFailed, whose lines name the file, the place and the fix.
    """
    document = read_document(path)
    runs = _admin_runs(document, path)
    if runs is None:
        descriptors = read_folder(models_folder) if models_folder else ()
        runs = [run | {"batch_id": batch_id} for run in convert(document, path, descriptors)]
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


def convert(document: Any, path: Path, descriptors: Sequence[DescriptorFile]) -> list[Run]:
    """Return a run per model of the harness's config, which was read from `path`."""
    _require(document, path)
    job = {**_tasks(document["dataset"], path), "prompts": _prompts(document["prompts"], path)}
    config = {name: value for name, value in document.items() if name != OUR_SECTION}
    described = _describe_all(document["models"], path, descriptors)
    return [
        {"model": descriptor, **job, "config": config | {"models": [entry]}}
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


def _tasks(dataset: Any, config_path: Path) -> dict[str, list[Any]]:
    """The tasks of an inline dataset, or of the file it names, relative to the config."""
    place = config_path
    if isinstance(dataset, dict) and "tasks" not in dataset and "path" in dataset:
        dataset = dataset["path"]
    if isinstance(dataset, str):
        place = config_path.parent / dataset
        dataset = read_document(place)
    if isinstance(dataset, list):
        dataset = {"tasks": dataset}
    if not isinstance(dataset, dict) or not dataset.get("tasks"):
        raise CommandFailed(f"{place}: the dataset has no tasks: give `tasks: [...]` or a list")
    return _by_tier(dataset["tasks"], dataset.get("floor_tasks") or [], place)


def _by_tier(tasks: Any, floor: Any, place: Path) -> dict[str, list[Any]]:
    for name, listed in (("tasks", tasks), ("floor_tasks", floor)):
        if not isinstance(listed, list):
            raise CommandFailed(f"{place}: `{name}` must be a list")
        for index, task in enumerate(listed):
            if not isinstance(task, dict) or not isinstance(task.get("id"), str):
                raise CommandFailed(f"{place}: {name}[{index}].id must be text: quote it")
    main = [task for task in tasks if task.get("tier") != FLOOR_TIER]
    if not main:
        raise CommandFailed(f"{place}: all tasks are {FLOOR_TIER}: a run needs one of tier main")
    floor = [task for task in tasks if task.get("tier") == FLOOR_TIER] + floor
    return {"tasks": main} | ({"floor_tasks": floor} if floor else {})


def _describe_all(
    models: list[Any], path: Path, descriptors: Sequence[DescriptorFile]
) -> list[tuple[Mapping[str, Any], dict[str, Any]]]:
    described, problems, seen = [], [], set()
    for index, model in enumerate(models):
        place = f"models[{index}]"
        try:
            name = _model_id(model, seen)
            place += f" ({name})"
            described.append((model, describe(model, descriptors)))
        except Undescribed as error:
            problems += [f"{place}: {problem}" for problem in error.problems]
    if problems:
        bad = len(models) - len(described)
        raise CommandFailed(
            f"{path}: {bad} of {len(models)} models cannot be enqueued, so nothing was",
            details=problems,
        )
    return described


def _model_id(model: Any, seen: set[str]) -> str:
    name = model.get("id") if isinstance(model, dict) else None
    if not isinstance(name, str) or not name:
        raise Undescribed("no id, or one that is not text: set it, in quotes")
    if name in seen:
        raise Undescribed("this id is taken by an earlier model: results are told apart by it")
    seen.add(name)
    return name
