"""Step 5: a result against the job that was handed out."""

import hashlib
from typing import Any

import pytest

from broker.errors import InvalidRequest, RunMismatch
from broker.jobs.job import Job, comparable_hash, harness_hash
from broker.results.binding import check_binding
from tests.support.result_factory import failed_record, job_payload, record, rehashed, result_for

RUN_ID = "0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11"
OTHER_RUN = "3d0f8a52-1b7e-4a57-8f0c-5f0f6a1c2b33"
PAYLOAD = job_payload()
JOB = Job.from_payload(RUN_ID, PAYLOAD)
JUDGED = {"task_id": "task-0", "prompt_id": "prompt-0", "model_id": JOB.model_ref}


@pytest.fixture
def result() -> dict[str, Any]:
    return result_for(RUN_ID, job_payload())


def refused_binding(result: dict[str, Any], job: Job = JOB) -> list[str]:
    with pytest.raises(RunMismatch) as refused:
        check_binding(result, job)
    return [violation.pointer for violation in refused.value.violations]


def test_a_complete_result_of_the_job_is_bound(result) -> None:
    check_binding(result, JOB)


def test_the_result_of_another_run_is_refused(result) -> None:
    assert refused_binding(result | {"run_id": OTHER_RUN}) == ["/run_id"]


def test_the_config_hash_is_that_of_the_results_own_config(result) -> None:
    """The harness hashes the config that it ran, with its machine's paths in it."""
    result["config"]["server"] = {"models_dir": "/home/me/models", "ctx": 4096}
    assert refused_binding(result) == ["/provenance/config_hash"]
    check_binding(rehashed(result), JOB)


def test_the_config_hash_is_made_as_the_harness_makes_it() -> None:
    """Python's json.dumps with sort_keys: blanks after colons and commas, ASCII escapes."""
    config = {"b": [1, 2.5, 1e22], "a": {"ü": None}}
    text = '{"a": {"\\u00fc": null}, "b": [1, 2.5, 1e+22]}'
    assert harness_hash(config) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_runs_of_one_config_are_comparable_whatever_they_are_called() -> None:
    one, other = ({"run": {"name": name, "seed": 7}, "n": 1} for name in (RUN_ID, OTHER_RUN))
    assert comparable_hash(one) == comparable_hash(other)
    assert comparable_hash(one) != comparable_hash({"run": {"name": RUN_ID, "seed": 8}, "n": 1})
    assert len(comparable_hash({})) == len(comparable_hash({"run": "x"})) == 64


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("model_id", "another-model"),
        ("task_id", "task-9"),
        ("prompt_id", "prompt-9"),
        ("prompt_id", "floor"),
        ("tier", "dumb_model"),
    ],
)
def test_a_record_outside_the_job_is_refused_by_pointer(result, member: str, value: str) -> None:
    result["run_status"] = "incomplete"
    result["records"][3][member] = value
    assert refused_binding(result) == [f"/records/3/{member}"]


@pytest.mark.parametrize(("member", "value"), [("prompt_id", "prompt-0"), ("tier", "main")])
def test_a_floor_cell_is_of_the_floor_tier_and_prompt(result, member: str, value: str) -> None:
    result["run_status"] = "incomplete"
    result["records"][4][member] = value
    assert refused_binding(result) == [f"/records/4/{member}"]


def test_the_same_cell_twice_is_refused_even_when_one_failed(result) -> None:
    result["records"].append(failed_record(PAYLOAD["tasks"][0], "prompt-0", JOB.model_ref, "oom"))
    assert refused_binding(result) == ["/records/5"]


def test_a_resumed_run_may_lack_floor_cells(result) -> None:
    """The harness drops a floor cell that failed before, and calls the run complete."""
    assert result["records"].pop()["tier"] == "dumb_model"
    check_binding(result | {"resumed_from": RUN_ID}, JOB)


def test_a_complete_run_has_every_main_cell(result) -> None:
    del result["records"][1]
    with pytest.raises(RunMismatch) as refused:
        check_binding(result, JOB)
    assert [v.pointer for v in refused.value.violations] == ["/records"]
    assert refused.value.violations[0].detail.endswith('missing: "task-0" x "prompt-1"')


def test_the_first_missing_cells_are_named_and_the_rest_counted(result) -> None:
    with pytest.raises(RunMismatch) as refused:
        check_binding(result | {"records": []}, Job.from_payload(RUN_ID, job_payload(tasks=4)))
    detail = refused.value.violations[0].detail
    assert '"task-2" x "prompt-0" and 3 more' in detail


def test_a_failed_cell_is_a_cell(result) -> None:
    result["records"][0] = failed_record(PAYLOAD["tasks"][0], "prompt-0", JOB.model_ref, "oom")
    check_binding(result, JOB)


@pytest.mark.parametrize("status", ["incomplete", "failed"])
def test_an_unfinished_run_may_lack_cells(result, status: str) -> None:
    check_binding(result | {"run_status": status, "records": []}, JOB)


def test_only_the_first_50_records_at_fault_are_told(result) -> None:
    stranger = {"id": "task-9", "domain": "d", "tier": "main"}
    result["records"] = [record(stranger, f"p{n}", JOB.model_ref) for n in range(80)]
    assert refused_binding(result) == [f"/records/{n}/task_id" for n in range(50)]


@pytest.mark.parametrize(
    ("member", "value"), [("task_id", "task-9"), ("prompt_id", "floor"), ("model_id", "other")]
)
def test_a_judgement_outside_the_job_is_refused(result, member: str, value: str) -> None:
    result["judgements"] = [JUDGED | {"score": 3}, JUDGED | {member: value}]
    assert refused_binding(result) == [f"/judgements/1/{member}"]


def test_a_judgement_of_a_floor_cell_is_one_of_the_job(result) -> None:
    floor = {"task_id": "floor-0", "prompt_id": "floor", "model_id": JOB.model_ref}
    check_binding(result | {"judgements": [JUDGED | {"score": 3}, floor | {"score": 2}]}, JOB)


def test_a_cell_scored_twice_by_the_judge_is_refused(result) -> None:
    result["judgements"] = [JUDGED | {"judge_score": 1}, JUDGED | {"score": 5}]
    assert refused_binding(result) == ["/judgements/1"]


def test_a_comparison_of_two_models_is_none_of_a_run_of_one(result) -> None:
    pair = {"mode": "pairwise", "task_id": "task-0", "prompt_id": "prompt-0", "winner": "A"}
    judged = pair | {"a_model": JOB.model_ref, "b_model": "other"}
    assert refused_binding(result | {"judgements": [judged]}) == ["/judgements/0/b_model"]
    assert refused_binding(result | {"judgements": [pair | {"a_model": "other"}]}) == [
        "/judgements/0/a_model",
        "/judgements/0/b_model",
    ]


def test_a_judge_may_fail_before_it_scores(result) -> None:
    check_binding(result | {"judgements": [JUDGED | {"score": None}, JUDGED | {"score": 5}]}, JOB)


@pytest.mark.parametrize("judgements", [None, []])
def test_a_run_without_a_judge_is_bound(result, judgements: list[Any] | None) -> None:
    check_binding(result | {"judgements": judgements}, JOB)


# The job


def test_a_job_lists_its_cells_in_order() -> None:
    cells = [tuple(cell) for cell in Job.from_payload(RUN_ID, job_payload(tasks=1)).cells()]
    assert cells == [
        ("task-0", "prompt-0", "main"),
        ("task-0", "prompt-1", "main"),
        ("floor-0", "floor", "dumb_model"),
    ]


def test_a_job_with_more_cells_than_a_result_may_hold_is_refused_early() -> None:
    Job.from_payload(RUN_ID, job_payload(tasks=300, prompts=333, floor_tasks=100))
    with pytest.raises(InvalidRequest):
        Job.from_payload(RUN_ID, job_payload(tasks=300, prompts=333, floor_tasks=101))
