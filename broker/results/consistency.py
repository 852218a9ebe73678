"""Consistency of a bundle beside its cells: with the job, and of the manifest with the result.

Only what both sides say is compared, and only what is the same on every machine: a harness may add
members, leave them out, and name its own paths, server and costs. Rows are made from the job and
the records alone, so what is passed over here misleads a reader of the files, and no row.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from broker.documents.strict_json import pointer
from broker.errors import Violation
from broker.jobs.job import MAIN_TIER, Job

Place = tuple[str | int, ...]
HANDED_OUT = "is not what was handed out"
OF_RESULT = "is not what result.json says"
# Of a model in the config, what its answers depend on and no machine may choose.
_OF_A_MODEL = ("id", "mode", "enabled", "ctx", "num_params", "num_active_params")
_JUDGE, _DATASET = ("config", "judge"), ("config", "dataset")


def job_mismatches(result: Mapping[str, Any], job: Job) -> Iterator[Violation]:
    """Where a result's words about its run, model, tasks and prompts are not the job's."""
    config = result["config"]
    seed = _members(job.config.get("run")).get("seed")
    run = {"name": job.run_id, "seed": seed}
    yield from _unlike(run, config.get("run"), ("config", "run"), HANDED_OUT)
    yield from _unlike({"seed": seed}, result["provenance"], ("provenance",), HANDED_OUT)
    for place, listed, member in (
        (("config", "models"), config["models"], "id"),
        (("model_scores",), result.get("model_scores"), "model_id"),
        (("model_metadata",), result.get("model_metadata"), "id"),
    ):
        for index, model in enumerate(_ids(listed, member)):
            if model not in (job.model_ref, None):
                yield Violation(pointer((*place, index, member)), "is not the job's model")
    for index, model in enumerate(config["models"]):
        yield from _other_weights(job.config["models"][0], model, ("config", "models", index))
    yield from _other_weights(_members(job.config.get("judge")), config.get("judge"), _JUDGE)
    yield from _unlike(
        _members(job.config.get("dataset")), config.get("dataset"), _DATASET, HANDED_OUT
    )
    # A config.yaml has its prompts; the admin API takes them beside it, and both are handed out.
    prompts = [*job.prompts, *_listed(job.config.get("prompts"))]
    yield from _unlike_by_id(prompts, config.get("prompts"), ("config", "prompts"))
    yield from _unlike_by_id([*job.tasks, *job.floor_tasks], result.get("tasks"), ("tasks",))
    yield from _other_domains(result, job)


def _other_weights(handed: Mapping[str, Any], again: Any, place: Place) -> Iterator[Violation]:
    """A model or judge with another file, context or size; its folder is the machine's own."""
    same = {name: handed.get(name) for name in _OF_A_MODEL}
    yield from _unlike(same, again, place, HANDED_OUT)
    ran, asked = (_file_name(_members(model).get("gguf")) for model in (again, handed))
    if ran is not None and asked is not None and ran != asked:
        yield Violation(pointer((*place, "gguf")), "is another file than was handed out")


def result_mismatches(
    manifest: Mapping[str, Any], result: Mapping[str, Any]
) -> Iterator[Violation]:
    """Where the manifest's copies of what result.json says are not copies."""
    config_hash = result["provenance"].get("config_hash")
    said = {"run_status": result.get("run_status"), "config_hash": config_hash}
    yield from _unlike(said, manifest, (), OF_RESULT)
    if not _same_time(manifest.get("timestamp"), result["timestamp"]):
        yield Violation("/timestamp", OF_RESULT)
    # The archive compares this one as a text.
    if _members(manifest.get("bundle")).get("timestamp") not in (None, result["timestamp"]):
        yield Violation("/bundle/timestamp", OF_RESULT)
    models = _models_of(result)
    for index, model in enumerate(manifest.get("model_ids") or ()):
        if models and model not in models:
            yield Violation(pointer(("model_ids", index)), "is not a model of result.json")


def _other_domains(result: Mapping[str, Any], job: Job) -> Iterator[Violation]:
    domains = {task["id"]: task.get("domain") for task in job.tasks}
    for index, record in enumerate(result["records"]):
        domain = domains.get(record["task_id"]) if record["tier"] == MAIN_TIER else None
        if None not in (domain, record.get("domain")) and record["domain"] != domain:
            yield Violation(pointer(("records", index, "domain")), "is not this task's domain")


def _unlike_by_id(
    handed: list[Mapping[str, Any]], listed: Any, place: Place
) -> Iterator[Violation]:
    """An entry must be like one of those that were handed out by its id, if there are any.

    A floor task may have the id of another task.
    """
    by_id: dict[str, list[Mapping[str, Any]]] = {}
    for named, one in zip(_ids(handed, "id"), handed, strict=True):
        if named is not None:
            by_id.setdefault(named, []).append(one)
    for index, (named, entry) in enumerate(zip(_ids(listed, "id"), _listed(listed), strict=True)):
        found = by_id.get(named, []) if named is not None else []
        tried = (list(_unlike(one, entry, (*place, index), HANDED_OUT)) for one in found)
        yield from min(tried, key=len, default=[])


def _unlike(said: Mapping[str, Any], again: Any, place: Place, detail: str) -> Iterator[Violation]:
    """The members that both have, null being none, with another value."""
    told = _members(again)
    for name, value in said.items():
        if value is not None and told.get(name) is not None and told[name] != value:
            yield Violation(pointer((*place, name)), detail)


def _models_of(result: Mapping[str, Any]) -> set[str | None]:
    """Every model that a result names; of a legacy result that is not known."""
    named = {record["model_id"] for record in result.get("records") or ()}
    named.update(_ids(_members(result.get("config")).get("models"), "id"))
    named.update(_ids(result.get("model_scores"), "model_id"))
    return named - {None}


def _same_time(told: str | None, said: str) -> bool:
    """Return whether two times may be one: to the second, and by the clock if one has no offset."""
    if told is None or told == said:
        return True
    try:
        one, other = (datetime.fromisoformat(time).replace(microsecond=0) for time in (told, said))
    except ValueError:  # no day of the calendar, or a legacy result's: then it is the same text
        return False
    if (one.tzinfo is None) != (other.tzinfo is None):
        return True  # of which offset the other one is, nobody can say
    return one == other


def _file_name(gguf: Any) -> str | None:
    return re.split(r"[\\/]", gguf)[-1] if isinstance(gguf, str) else None


def _members(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _ids(listed: Any, member: str) -> list[str | None]:
    """Return the id of each entry of a list; None where it has none."""
    named = [_members(entry).get(member) for entry in _listed(listed)]
    return [name if isinstance(name, str) else None for name in named]
