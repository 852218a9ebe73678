"""What a bundle says beside its cells, against the job and against itself (step 5)."""

import copy
import json
from typing import Any

import pytest

from broker.errors import InvalidBundle, RunMismatch
from broker.jobs.job import Job
from broker.results.binding import check_binding
from broker.results.bundle import parse_result
from broker.results.manifest import check_agreement
from tests.support.result_factory import (
    MODEL_REF,
    failed_record,
    job_payload,
    manifest_for,
    put,
    rehashed,
    result_for,
)

RUN_ID = "0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11"
OTHER_RUN = "3d0f8a52-1b7e-4a57-8f0c-5f0f6a1c2b33"
Json = dict[str, Any]


def payload() -> Json:
    """A job as `queue add` makes it: its config is a whole config.yaml."""
    job = job_payload()
    job["config"] |= {
        "run": {"seed": 7, "name": RUN_ID, "timeout_s": 60},
        "models": [{"id": MODEL_REF, "gguf": "org/repo/a-Q4_0.gguf", "ctx": 4096}],
        "dataset": {"n": 2, "domains": ["qa"]},
        "prompts": copy.deepcopy(job["prompts"]),
        "server": {"port": 8080},
        "judge": {"enabled": True, "mode": "scored", "gguf": "org/repo/j.gguf"},
    }
    return job


def job() -> Job:
    return Job.from_payload(RUN_ID, payload())


@pytest.fixture
def result() -> Json:
    return result_for(RUN_ID, payload())


CONTRADICTIONS = {
    "/config/run/name": put(OTHER_RUN, "config", "run", "name"),
    "/config/run/seed": put(8, "config", "run", "seed"),
    "/provenance/seed": put(8, "provenance", "seed"),
    "/config/models/0/id": put("other", "config", "models", 0, "id"),
    "/config/models/0/gguf": put("org/repo/a-Q8_0.gguf", "config", "models", 0, "gguf"),
    "/config/models/0/ctx": put(512, "config", "models", 0, "ctx"),
    "/config/models/1/id": lambda r: r["config"]["models"].append({"id": "second"}),
    "/config/judge/mode": put("pairwise_all", "config", "judge", "mode"),
    "/config/judge/enabled": put(False, "config", "judge", "enabled"),
    "/config/judge/gguf": put("org/repo/kinder.gguf", "config", "judge", "gguf"),
    "/config/dataset/n": put(1, "config", "dataset", "n"),
    "/model_metadata/0/id": put("other", "model_metadata", 0, "id"),
    "/config/prompts/1/system": put("Cheat.", "config", "prompts", 1, "system"),
    "/model_scores/0/model_id": put("other", "model_scores", 0, "model_id"),
    "/tasks/0/user_prompt": put("1 + 1?", "tasks", 0, "user_prompt"),
    "/tasks/1/expected": put("5", "tasks", 1, "expected"),
    "/tasks/1/scorer": put("contains", "tasks", 1, "scorer"),
    "/tasks/2/expected": put("5", "tasks", 2, "expected"),
    "/tasks/2/tier": put("main", "tasks", 2, "tier"),
    "/records/1/domain": put("poetry", "records", 1, "domain"),
}


@pytest.mark.parametrize("place", CONTRADICTIONS)
def test_a_result_that_says_otherwise_of_its_job_is_refused_by_pointer(result, place) -> None:
    CONTRADICTIONS[place](result)
    rehashed(result)
    with pytest.raises(RunMismatch, match=r"result\.json is not of the job") as refused:
        check_binding(result, job())
    assert [violation.pointer for violation in refused.value.violations][:1] == [place]


# What honest harnesses write: more, less, what is their machine's own, numbers of another spelling.
HONEST = {
    "paths and servers of its own": lambda r: r["config"].update(
        server={"port": 1}, hardware={"gpus": 2}, cost={"eur": 1}
    ),
    "a folder of its own": put("/mnt/w/a-Q4_0.gguf", "config", "models", 0, "gguf"),
    "a judge's folder of its own": put("C:\\w\\j.gguf", "config", "judge", "gguf"),
    "a config of the model alone": put({"models": [{"id": MODEL_REF}]}, "config"),
    "sections of another shape": lambda r: r["config"].update(
        run=[], prompts="x", judge="x", dataset="x", models=[{"id": MODEL_REF, "gguf": 7}]
    ),
    "no metadata": put(None, "model_metadata"),
    "no tasks": put(None, "tasks"),
    "no tasks at all": put([], "tasks"),
    "a task that is not of the job": lambda r: r["tasks"].append({"id": "warm-up", "expected": 1}),
    "tasks without a name": put([{}, {"id": None}, {"id": ["task-0"]}], "tasks"),
    "a task told in part": put([{"id": "task-0", "scorer": None}], "tasks"),
    "another spelling of a number": put(7.0, "provenance", "seed"),
    "no seed": put(None, "provenance", "seed"),
    "a domain of its own for the floor": put("floor", "records", 4, "domain"),
    "no domain": put(None, "records", 0, "domain"),
    "no scores": put(None, "model_scores"),
    "scores without a name": put([{}, {"model_id": 1}], "model_scores"),
    "more members": put({"id": MODEL_REF, "alias": "a"}, "config", "models", 0),
}


@pytest.mark.parametrize("how", HONEST)
def test_what_a_harness_may_write_is_bound(result, how: str) -> None:
    HONEST[how](result)
    rehashed(result)
    check_binding(parse_result(json.dumps(result).encode()), job())


def test_the_harness_writes_its_local_time_without_a_zone(result) -> None:
    result["timestamp"] = "20251123-120000"
    assert parse_result(json.dumps(result).encode())["timestamp"] == "20251123-120000"


def test_a_failed_cell_may_lack_its_domain(result) -> None:
    result["records"][0] = failed_record(payload()["tasks"][0], "prompt-0", MODEL_REF, "oom")
    check_binding(result, job())


def test_a_job_that_says_nothing_is_not_contradicted(result) -> None:
    bare = payload()
    bare["config"] = {"models": [{"id": MODEL_REF}]}
    for task in bare["tasks"]:
        del task["domain"], task["expected"]
    check_binding(result, Job.from_payload(RUN_ID, bare))


def test_prompts_are_those_of_the_config_or_those_beside_it(result) -> None:
    """The admin API takes both; a harness may write either, and not a third."""
    both = payload()
    both["config"]["prompts"][0]["system"] = "As the config has it."
    for system in ("System 0.", "As the config has it."):
        result["config"] = copy.deepcopy(both["config"])
        result["config"]["prompts"][0]["system"] = system
        check_binding(rehashed(result), Job.from_payload(RUN_ID, both))
    result["config"]["prompts"][0]["system"] = "A third."
    with pytest.raises(RunMismatch):
        check_binding(result, Job.from_payload(RUN_ID, both))


def test_a_floor_task_of_the_same_id_is_told_apart_by_what_it_says(result) -> None:
    twins = payload()
    twins["floor_tasks"] = [{**twins["tasks"][0], "tier": "dumb_model", "expected": "ok"}]
    result = copy.deepcopy(result_for(RUN_ID, twins))
    result["records"][-1]["domain"] = "of the floor"
    check_binding(result, Job.from_payload(RUN_ID, twins))
    result["tasks"][2]["expected"] = "never"
    with pytest.raises(RunMismatch) as refused:
        check_binding(result, Job.from_payload(RUN_ID, twins))
    assert [violation.pointer for violation in refused.value.violations] == ["/tasks/2/expected"]


# The manifest


def manifest_of(result: Json, **changes: Any) -> Json:
    return manifest_for(result, {}) | changes


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"run_status": "failed"}, "/run_status"),
        ({"config_hash": "d1" * 32}, "/config_hash"),
        ({"model_ids": [MODEL_REF, "other"]}, "/model_ids/1"),
        ({"timestamp": "2025-11-23T12:00:01Z"}, "/timestamp"),
        ({"timestamp": "2025-11-23T12:00:00+02:00"}, "/timestamp"),
        (
            {"bundle": {"run_id": RUN_ID, "timestamp": "2024-11-23T12:00:00Z"}},
            "/bundle/timestamp",
        ),
        # The archive compares this one as a text.
        (
            {"bundle": {"run_id": RUN_ID, "timestamp": "2025-11-23T13:00:00+01:00"}},
            "/bundle/timestamp",
        ),
        ({"timestamp": "2025-02-31T00:00:00Z"}, "/timestamp"),
    ],
)
def test_a_manifest_that_contradicts_its_result_is_refused_by_pointer(
    result, changes: Json, place: str
) -> None:
    with pytest.raises(InvalidBundle, match=r"manifest\.json contradicts result\.json") as refused:
        check_agreement(manifest_of(result, **changes), result)
    assert [violation.pointer for violation in refused.value.violations] == [place]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run_status": None, "config_hash": None, "model_ids": None},
        {"model_ids": []},
        {"timestamp": "2025-11-23 12:00:00.25Z"},
        {"timestamp": "2025-11-23T13:00:00+01:00"},
        {"timestamp": "2025-11-23T13:00:00"},
        {"timestamp": "20251123-120000"},
        {"judge_mode": "any", "model_scores_summary": [{"model_id": 1}], "signer": {"a": 1}},
    ],
)
def test_what_a_manifest_may_say_or_leave_out(result, changes: Json) -> None:
    check_agreement(manifest_of(result, **changes), result)


def test_an_older_manifest_agrees_by_what_it_has(result) -> None:
    nested = {"run_id": RUN_ID, "timestamp": result["timestamp"]}
    check_agreement({"bundle": nested, "files": {}}, result)


def test_a_job_without_a_config_hash_leaves_the_manifest_free(result) -> None:
    result["provenance"]["config_hash"] = None
    check_agreement(manifest_of(result, config_hash="d1" * 32), result)


def test_a_legacy_result_names_no_models_that_a_manifest_could_miss() -> None:
    legacy = {"run_id": RUN_ID, "timestamp": "some day", "provenance": {}, "models": ["a"]}
    manifest = {"model_ids": ["b"], "run_status": "complete", "timestamp": "some day"}
    check_agreement(manifest, legacy)
    with pytest.raises(InvalidBundle):
        check_agreement(manifest | {"timestamp": "another day"}, legacy)


@pytest.mark.parametrize(
    "time", ["9999-13-01T00:00:00Z", "2025-00-10T00:00:00Z", "2025-01-32T00:00:00Z",
             "2025-01-01T24:00:00Z", "2025-01-01T00:60:00Z", "2025-01-01T00:00:61Z",
             "20251301-000000", "20250100-000000", "20250101-240000", "20250101-006000",
             "20250101", "20250101-0000", "2025-01-01-000000", " 20250101-000000"],
)  # fmt: skip
def test_a_time_that_no_clock_shows_is_refused(result, time: str) -> None:
    with pytest.raises(InvalidBundle) as refused:
        parse_result(json.dumps(result | {"timestamp": time}).encode())
    assert [violation.pointer for violation in refused.value.violations] == ["/timestamp"]
