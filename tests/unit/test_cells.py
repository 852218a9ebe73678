"""Metric rows from a result's cells, by upstream's rule."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.jobs.cells import HAIR, hardware, metrics
from broker.jobs.job import Job
from db.metrics import HardwareMetrics
from tests.support.result_factory import failed_record, job_payload, result_for

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
        (1 + 1e-9, [{"score": 2}], 1.0),
        (-1e-9, [{"score": 2}], 0.0),
        (1 + 2e-6, [{"score": 2}], 0.25),
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


@pytest.mark.parametrize(("judge_score", "score"), [(1, 0.0), (2, 0.25), (4.5, 0.875), (5, 1.0)])
def test_a_record_may_carry_the_judges_score_itself(judge_score: float, score: float) -> None:
    """It counts before a judgement, and after a quality of its own."""
    for judgements in ([], [{"score": 3}], [{"score": None, "error": "gone"}]):
        told = {"quality_heuristic": None, "judge_score": judge_score}
        assert metrics(*one_cell("judge", judgements, **told))[0].score == score
    own = metrics(*one_cell(quality_heuristic=0.5, judge_score=judge_score))[0]
    assert own.score == 0.5


@pytest.mark.parametrize(
    "judgement",
    [{"score": None, "error": "connection refused"}, {"score": 4, "error": "cut off"}, {}],
)
def test_a_judge_that_failed_leaves_no_score_and_says_why(judgement: dict[str, Any]) -> None:
    """A cell that nobody judged is no bad answer of the model."""
    row = metrics(*one_cell("judge", [judgement], quality_heuristic=None))[0]
    assert (row.score, row.pass_fail, row.failure_reason) == (None, None, "infra_error")
    assert row.failure_detail == f"the judge failed: {judgement.get('error', 'no score')}"
    again = metrics(*one_cell("judge", [judgement, {"score": 4}], quality_heuristic=None))[0]
    assert (again.score, again.failure_reason) == (0.75, None), "it was judged after all"
    needless = metrics(*one_cell("exact", [judgement], quality_heuristic=1.0))[0]
    assert (needless.score, needless.failure_reason) == (1.0, None)


@pytest.mark.parametrize("error", ["", "boom"])
def test_an_error_without_a_code_is_a_failure(error: str) -> None:
    row = metrics(*one_cell(error=error, quality_heuristic=1.0))[0]
    assert (row.score, row.pass_fail, row.failure_reason) == (None, None, "unknown")
    assert (row.failure_detail or "") == error


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


@example(quality=-HAIR / 2, judged=None, code=None)
@given(quality=_NUMBERS, judged=_NUMBERS, code=st.sampled_from([None, "oom", "unknown"]))
def test_a_score_is_always_null_or_within_0_and_1(quality, judged, code) -> None:
    result, job = one_cell(
        judgements=[{"score": judged}], quality_heuristic=quality, failure_code=code
    )
    row = metrics(result, job)[0]
    unscored = judged is None and not (quality is not None and -HAIR <= quality <= 1 + HAIR)
    assert (row.score is None) == (code is not None or unscored)
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
    assert hardware(result)["peak_vram_mb"] == 2048


def untold(**members: Any) -> dict[str, Any]:
    """A result that measured nothing and says of its machine what `members` say."""
    return {"records": [], "provenance": {}, "config": {}, **members}


@pytest.mark.parametrize("told", [{}, {"hardware": None}, {"hardware": {}}])
def test_an_untold_machine_is_all_null(told: dict[str, Any]) -> None:
    machine = hardware(untold(**told))
    assert machine == dict.fromkeys(field.name for field in fields(HardwareMetrics))


def test_the_machine_is_told_by_known_members_and_whole_numbers() -> None:
    told = {"gpu_model": "G", "vram_mb": 24563.9, "cpu_cores": 16.0, "cpu_threads": 32.0,
            "ram_gb": 63.5, "serial_number": "secret"}  # fmt: skip
    machine = hardware(untold(hardware=told))
    assert machine.keys() == {field.name for field in fields(HardwareMetrics)}
    assert (machine["vram_mb"], machine["ram_gb"]) == (24564, 63.5)
    assert (machine["cpu_cores"], machine["cpu_threads"]) == (16, 32)
    assert all(isinstance(machine[name], int) for name in ("vram_mb", "cpu_cores", "cpu_threads"))


@pytest.mark.parametrize("model", [None, ""])
def test_of_a_gpu_that_is_not_recognised_nothing_is_known(model: str | None) -> None:
    told = {"gpu_model": model, "vram_mb": 8192, "power_limit_w": 90.0}
    machine = hardware(untold(hardware=told, config={"hardware": {"peak_tflops": 39.0}}))
    assert [machine[name] for name in ("gpu_model", "vram_mb", "tflops_fp16")] == [None] * 3
    assert machine["power_limit_w"] == 90.0


@pytest.mark.parametrize(
    ("provenance", "version"),
    [
        ({"llama_swap_version": "148", "server_image": "x:vulkan"}, "148"),
        ({"llama_swap_version": None, "server_image": "x:vulkan"}, "x:vulkan"),
        ({"server_image": None}, None),
    ],
)
def test_the_runtime_is_llama_swap_or_the_servers_image(provenance, version) -> None:
    assert hardware(untold(provenance=provenance))["runtime_version"] == version


def measured(*, speed: Any = 50.0, flops: Any = 2e10, share: Any = 1.25, **more: Any) -> Any:
    """A result whose main cells reached a speed; the floor cells count for nothing."""
    result = result_for(RUN_ID, job_payload(), **more)
    for record in result["records"]:
        record |= {"tokens_per_second": speed, "flops_per_token_theoretical": flops,
                   "tflops_utilization_pct": share}  # fmt: skip
    result["records"][-1]["tokens_per_second"] = 1e6
    return result


def test_tflops_are_what_the_main_cells_reached_and_the_peak_that_they_are_a_share_of() -> None:
    """The config's peak is that of the machine it was written on, which is often another one."""
    config = {"models": [{"id": "m"}], "hardware": {"peak_tflops": 39.0}}
    machine = hardware(measured(config=config))
    assert machine["measured_tflops"] == pytest.approx(1.0)
    assert machine["tflops_fp16"] == 80.0
    assert hardware(measured(share=None, config=config))["tflops_fp16"] == 39.0


@pytest.mark.parametrize("peak", [None, 0, -1, True, "39", [39]])
def test_a_peak_that_is_no_number_is_unknown(peak: Any) -> None:
    config = {"models": [{"id": "m"}], "hardware": {"peak_tflops": peak}}
    assert hardware(measured(share=None, config=config))["tflops_fp16"] is None


@pytest.mark.parametrize(("speed", "flops"), [(None, 2e10), (50.0, None), (1e300, 1e300)])
def test_what_was_not_measured_is_unknown(speed: Any, flops: Any) -> None:
    machine = hardware(measured(speed=speed, flops=flops))
    assert (machine["measured_tflops"], machine["tflops_fp16"]) == (None, None)


@given(share=st.floats(min_value=0, allow_infinity=False))
def test_a_peak_stays_finite(share: float) -> None:
    peak = hardware(measured(share=share))["tflops_fp16"]
    assert peak is None or 0 <= peak < float("inf")
