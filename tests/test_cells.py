"""Metric rows from a result's cells, by upstream's rule."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.cells import HARDWARE, hardware, metrics, peak_vram_mb
from broker.jobs import Job
from tests.result_factory import failed_record, job_payload, result_for

RUN_ID = "0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11"


def one_cell(
    scorer: str = "exact", judgements: list[dict[str, Any]] | None = None, **changes: Any
) -> tuple[dict[str, Any], Job]:
    """A result of a job with a single cell, its record changed."""
    payload = job_payload(tasks=1, prompts=1, floor_tasks=0, scorer=scorer)
    job = Job.from_payload(RUN_ID, payload)
    ids = {"task_id": "task-0", "prompt_id": "prompt-0", "model_id": job.model_ref}
    judged = [ids | judgement for judgement in judgements or []]
    result = result_for(RUN_ID, payload, judgements=judged)
    result["records"][0] |= changes
    return result, job


def test_there_is_a_row_for_every_cell_and_the_floor_in_order() -> None:
    payload = job_payload()
    rows = metrics(result_for(RUN_ID, payload), Job.from_payload(RUN_ID, payload))
    assert [(row.task_id, row.prompt_id) for row in rows] == [
        ("task-0", "prompt-0"),
        ("task-0", "prompt-1"),
        ("task-1", "prompt-0"),
        ("task-1", "prompt-1"),
        ("floor-0", "floor"),
    ]


@pytest.mark.parametrize(
    ("quality", "judgements", "score"),
    [
        (0, [], 0.0),
        (1, [], 1.0),
        (0.25, [{"score": 5}], 0.25),
        (None, [{"score": 3}], 0.5),
        (None, [{"judge_score": 2}], 0.25),
        (None, [{"judge_score": 2, "score": 5}], 0.25),
        (None, [{"judge_score": None, "score": 5}], 1.0),
        (None, [{"score": None}, {"score": 4}], 0.75),
        (None, [{"score": 9}], 1.0),
        (None, [{"score": -3}], 0.0),
        (None, [{"score": 3, "task_id": "task-9"}], 0.0),
        (None, [{"score": 3, "prompt_id": "floor"}], 0.0),
        (None, [{"score": 3, "model_id": "other"}], 0.0),
        (1.01, [{"score": 2}], 0.25),
        (-1, [], 0.0),
        (None, [], 0.0),
    ],
)
def test_the_cell_rule(quality, judgements, score: float) -> None:
    result, job = one_cell(judgements=judgements, quality_heuristic=quality)
    assert metrics(result, job)[0].score == score


def test_a_failed_cell_has_no_score_and_says_why() -> None:
    result, job = one_cell(judgements=[{"score": 5}])
    task = result["tasks"][0]
    result["records"] = [failed_record(task, "prompt-0", job.model_ref, "timeout")]
    row = metrics(result, job)[0]
    assert (row.score, row.pass_fail) == (None, None)
    assert (row.failure_reason, row.failure_detail) == ("timeout", "timeout in a test")
    assert row.gflops_per_token is None


def test_a_failed_cell_that_also_has_a_quality_has_no_score() -> None:
    result, job = one_cell(failure_code="refusal", quality_heuristic=1.0)
    row = metrics(result, job)[0]
    assert (row.score, row.pass_fail) == (None, None)


@pytest.mark.parametrize("scorer", ["exact", "contains", "regex"])
@pytest.mark.parametrize(
    ("quality", "passed"), [(1.0, True), (1, True), (0.99, False), (0, False), (None, False)]
)
def test_exact_scorers_pass_or_fail(scorer: str, quality, passed: bool) -> None:
    result, job = one_cell(scorer, quality_heuristic=quality)
    assert metrics(result, job)[0].pass_fail is passed


def test_other_scorers_have_no_verdict() -> None:
    assert metrics(*one_cell("judge"))[0].pass_fail is None


def test_the_scorer_is_the_jobs_and_not_what_the_result_says() -> None:
    result, job = one_cell("judge")
    result["tasks"][0] = result["tasks"][0] | {"scorer": "exact"}
    assert metrics(result, job)[0].pass_fail is None


def test_a_floor_task_of_the_same_name_has_its_own_scorer() -> None:
    payload = job_payload(tasks=1, prompts=1, floor_tasks=1, scorer="judge")
    payload["floor_tasks"][0]["id"] = "task-0"
    rows = metrics(result_for(RUN_ID, payload), Job.from_payload(RUN_ID, payload))
    assert [row.pass_fail for row in rows] == [None, True]


@pytest.mark.parametrize(("flops", "gflops"), [(2.7e8, 0.27), (0, 0.0), (None, None)])
def test_flops_become_gflops(flops, gflops) -> None:
    assert metrics(*one_cell(flops_per_token_theoretical=flops))[0].gflops_per_token == gflops


_NUMBERS = (
    st.none()
    | st.integers(-(10**307), 10**307)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(0, 1)
)


@given(quality=_NUMBERS, judged=_NUMBERS, code=st.sampled_from([None, "oom", "unknown"]))
def test_a_score_is_always_null_or_within_0_and_1(quality, judged, code) -> None:
    result, job = one_cell(
        judgements=[{"score": judged}], quality_heuristic=quality, failure_code=code
    )
    row = metrics(result, job)[0]
    assert (row.score is None) == (code is not None)
    if row.score is not None:
        assert isinstance(row.score, float)
        assert 0.0 <= row.score <= 1.0
        if quality is not None and 0 <= quality <= 1:
            assert row.score == quality


@given(lower=st.floats(1, 5), upper=st.floats(1, 5))
def test_a_better_judgement_is_never_a_worse_score(lower: float, upper: float) -> None:
    lower, upper = sorted((lower, upper))
    worse, better = (
        metrics(*one_cell(judgements=[{"score": judged}], quality_heuristic=None))[0].score or 0.0
        for judged in (lower, upper)
    )
    assert worse <= better


@given(flops=st.floats(min_value=0, allow_infinity=False) | st.integers(0, 10**308 - 1))
def test_gflops_stay_finite(flops: float) -> None:
    gflops = metrics(*one_cell(flops_per_token_theoretical=flops))[0].gflops_per_token
    assert gflops is not None
    assert 0 <= gflops < float("inf")


def test_peak_memory_is_the_most_any_cell_took_in_whole_megabytes() -> None:
    payload = job_payload()
    result = result_for(RUN_ID, payload)
    result["records"][2]["peak_vram_mb"] = 2047.6
    result["records"][3]["peak_vram_mb"] = None
    del result["records"][4]["peak_vram_mb"]
    assert peak_vram_mb(result) == 2048


@pytest.mark.parametrize("records", [[], [{"peak_vram_mb": None}], [{}]])
def test_unmeasured_memory_is_null(records: list[Any]) -> None:
    assert peak_vram_mb({"records": records}) is None


@pytest.mark.parametrize("told", [{}, {"hardware": None}, {"hardware": {}}])
def test_an_untold_machine_is_all_null(told: dict[str, Any]) -> None:
    assert hardware(told) == dict.fromkeys(HARDWARE)


def test_the_machine_is_told_by_known_members_and_whole_numbers() -> None:
    told = {"vram_mb": 24563.9, "cpu_cores": 16.0, "ram_gb": 63.5, "serial_number": "secret"}
    machine = hardware({"hardware": told})
    assert machine.keys() == set(HARDWARE)
    assert (machine["vram_mb"], machine["cpu_cores"], machine["ram_gb"]) == (24564, 16, 63.5)
    assert all(isinstance(machine[name], int) for name in ("vram_mb", "cpu_cores"))
