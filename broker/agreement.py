"""What a bundle says beside its cells: it must not contradict the job, nor the manifest the result.

Only what both sides say is compared, and only what is the same on every machine: a harness may add
members, leave them out, and name its own paths, server and costs. Rows are made from the job and
the records alone, so what is passed over here misleads a reader of the files, and no row.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from broker.errors import Violation
from broker.jobs import MAIN_TIER, Job
from broker.strict_json import pointer

Place = tuple[str | int, ...]
HANDED_OUT = "is not what was handed out"
OF_RESULT = "is not what result.json says"


def unlike_the_job(result: Mapping[str, Any], job: Job) -> Iterator[Violation]:
    """Where a result's words about its run, model, tasks and prompts are not the job's."""
    config = result["config"]
    seed = _members(job.config.get("run")).get("seed")
    run = {"name": job.run_id, "seed": seed}
    yield from _unlike(run, config.get("run"), ("config", "run"), HANDED_OUT)
    yield from _unlike({"seed": seed}, result["provenance"], ("provenance",), HANDED_OUT)
    models = {job.model_ref, *_ids(job.config.get("models"), "id")}
    for place, listed, member in (
        (("config", "models"), config.get("models"), "id"),
        (("model_scores",), result.get("model_scores"), "model_id"),
    ):
        for index, model in enumerate(_ids(listed, member)):
            if model not in models | {None}:
                yield Violation(pointer((*place, index, member)), "is not the job's model")
    # A config.yaml has its prompts; the admin API takes them beside it, and both are handed out.
    prompts = [*job.prompts, *_listed(job.config.get("prompts"))]
    yield from _unlike_by_id(prompts, config.get("prompts"), ("config", "prompts"))
    yield from _unlike_by_id([*job.tasks, *job.floor_tasks], result.get("tasks"), ("tasks",))
    yield from _other_domains(result, job)


def unlike_the_result(
    manifest: Mapping[str, Any], result: Mapping[str, Any]
) -> Iterator[Violation]:
    """Where the manifest's copies of what result.json says are not copies."""
    config_hash = result["provenance"].get("config_hash")
    said = {"run_status": result.get("run_status"), "config_hash": config_hash}
    yield from _unlike(said, manifest, (), OF_RESULT)
    for place, told in (((), manifest), (("bundle",), _members(manifest.get("bundle")))):
        if not _same_time(told.get("timestamp"), result["timestamp"]):
            yield Violation(pointer((*place, "timestamp")), OF_RESULT)
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
    """Whether two times may be one: to the second, and by the clock if one has no offset."""
    if told is None:
        return True
    try:
        one, other = (datetime.fromisoformat(time).replace(microsecond=0) for time in (told, said))
    except ValueError:  # no day of the calendar, or of a legacy result, whose times have no rule
        return True
    if (one.tzinfo is None) != (other.tzinfo is None):
        return True  # of which offset the other one is, nobody can say
    return one == other


def _members(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _ids(listed: Any, member: str) -> list[str | None]:
    """What each entry of a list is called; None where it is called nothing."""
    named = [_members(entry).get(member) for entry in _listed(listed)]
    return [name if isinstance(name, str) else None for name in named]
