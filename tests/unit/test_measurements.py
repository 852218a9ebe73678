"""Numbers that a result cannot have: refused with a pointer, and never passed over or cut."""

import json
from typing import Any

import pytest

from broker.errors import InvalidBundle
from broker.jobs.cells import HAIR
from broker.jobs.enqueue_request import _check
from broker.jobs.measurements import check_measurements
from broker.results.bundle import parse_result
from tests.support.fleet import run_of
from tests.support.result_factory import job_payload, put, result_for

RUN_ID = "0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11"
CELL = {"task_id": "task-0", "prompt_id": "prompt-0", "model_id": "m"}


def pointers(*path: Any, value: Any) -> list[str]:
    """Put a value into a result, read that as a submit does, and return what is refused."""
    result = result_for(RUN_ID, job_payload())
    result["judgements"] = [CELL | {"score": 3}]
    result["model_scores"] = [{"model_id": "m"}]
    result["config"]["hardware"] = {}
    put(value, *path)(result)
    try:
        check_measurements(parse_result(json.dumps(result).encode()))
    except InvalidBundle as refused:
        return [violation.pointer for violation in refused.violations]
    return []


# Each number that cells.py would pass over or cut, or that a reader of the file would believe.
OUTSIDE: list[tuple[tuple[Any, ...], Any]] = [
    *((("records", 0, "quality_heuristic"), value) for value in (-2 * HAIR, 1 + 2 * HAIR, 1e300)),
    *((("judgements", 0, "score"), value) for value in (0, 5.1, -3, 100)),
    (("judgements", 0, "judge_score"), 9),
    *(
        (("model_scores", 0, name), value)
        for name in ("completeness", "partial_score", "floor_score")
        for value in (-0.1, 83.3)
    ),
    *(
        (("model_scores", 0, name), -1)
        for name in ("cells_total", "cells_attempted", "cells_failed", "floor_cells_passed",
                     "floor_cells_total")
    ),
    *((("config", "hardware", "peak_tflops"), value) for value in (-1, "39", True, [1])),
    *(
        (("records", 0, name), -0.1)
        for name in ("wall_clock_seconds", "seconds_to_first_token", "tokens_per_second",
                     "energy_wh", "peak_vram_mb", "gpu_sm_utilization_pct", "gpu_event_seconds",
                     "gpu_weighted_seconds", "cpu_seconds_user", "cpu_seconds_sys",
                     "flops_per_token_theoretical", "tflops_utilization_pct")
    ),
    *((("records", 0, name), -1) for name in ("prompt_tokens", "completion_tokens")),
    *((("records", 0, "judge_score"), value) for value in (0, 6)),
    *(
        (("hardware", name), -1)
        for name in ("vram_mb", "power_limit_w", "cpu_cores", "cpu_threads", "ram_gb")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), OUTSIDE)
def test_a_number_that_cannot_be_is_refused_by_pointer(path: tuple[Any, ...], value: Any) -> None:
    assert pointers(*path, value=value) == ["/" + "/".join(map(str, path))]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((("records", 0, "quality_heuristic"), value) for value in (-HAIR, 0, 1, 1 + HAIR, None)),
        *((("judgements", 0, "score"), value) for value in (1, 5, 4.5, None)),
        (("judgements", 0), CELL | {"score": 0, "error": "no answer"}),
        (("judgements", 0), CELL | {"score": 9, "a_model": "m", "b_model": "n"}),
        (("model_scores", 0, "partial_score"), 1 + HAIR),
        (("model_scores", 0, "partial_score"), "a newer form"),
        *((("config", "hardware", "peak_tflops"), value) for value in (39.0, 0, None)),
        (("config", "hardware"), None),
    ],
)
def test_what_the_harness_may_write_is_taken(path: tuple[Any, ...], value: Any) -> None:
    assert pointers(*path, value=value) == []


def test_two_numbers_that_make_an_infinite_one_are_refused() -> None:
    huge = {"tokens_per_second": 1e200, "flops_per_token_theoretical": 1e200}
    record = result_for(RUN_ID, job_payload())["records"][0]
    told = pointers("records", 0, value=record | huge)
    assert told == ["/records/0/tokens_per_second"]
    tiny = {"tokens_per_second": 1, "flops_per_token_theoretical": 1e9}
    tiny["tflops_utilization_pct"] = 5e-324
    told = pointers("records", 0, value=record | tiny)
    assert told == ["/records/0/tflops_utilization_pct"]


@pytest.mark.parametrize(("peak", "refused"), [(-1, True), ("39", True), (0, False), (39.0, False)])
def test_a_config_whose_results_would_be_refused_is_not_enqueued(peak: Any, refused: bool) -> None:
    run = run_of(config={"hardware": {"peak_tflops": peak}}, model={"model_id": "x"})
    told = [violation.pointer for violation in _check(run, None, "/runs/0")]  # type: ignore[arg-type]
    assert told == (["/runs/0/config/hardware/peak_tflops"] if refused else [])
