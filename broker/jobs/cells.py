"""A result's cells as metric rows: upstream's cell rule, in one place.

Takes results that passed `bundles.parse_result` and `binding.check_binding`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import fmean, median
from typing import Any

from broker.jobs.job import MAIN_TIER, Job

EXACT_SCORERS = frozenset({"exact", "contains", "regex"})
HARDWARE = (
    "gpu_model",
    "vram_mb",
    "power_limit_w",
    "cpu_model",
    "cpu_cores",
    "cpu_threads",
    "ram_gb",
    "os_name",
    "os_version",
    "driver_version",
)
OF_THE_GPU = ("vram_mb", "tflops_fp16")  # columns of gpu_hardware, where a row has a model
HAIR = 1e-6  # so far beside [0, 1], a quality is a rounding of the scorer's, and not another scale
UNNAMED_FAILURE = "unknown"  # upstream's code for an error without one
JUDGE_FAILED = "infra_error"


@dataclass(frozen=True, slots=True)
class CellMetrics:
    """One row of run_model_metrics; `score` is in [0, 1], null when the cell failed."""

    task_id: str
    prompt_id: str
    score: float | None
    pass_fail: bool | None
    failure_reason: str | None
    failure_detail: str | None
    gflops_per_token: float | None


@dataclass(frozen=True, slots=True)
class _Judged:
    """The judgement of a cell: a score, nominally 1 to 5, or the reason that there is none."""

    score: float | None
    problem: str | None


def metrics(result: dict[str, Any], job: Job) -> tuple[CellMetrics, ...]:
    """One entry per record, floor cells included, in the records' order."""
    scorers = job.scorers()
    judged = _judgements(result)
    return tuple(
        _metrics(record, judged.get(_key(record)), scorers[record["task_id"], record["tier"]])
        for record in result["records"]
    )


def hardware(result: dict[str, Any]) -> dict[str, Any]:
    """The columns of run_hardware_metrics and the rows it points to; None where unknown.

    A machine whose GPU is not recognised has no GPU row, so nothing is known of one. Numbers of
    integer columns are made whole: JSON's 16.0 is an integer, but not to an int column.
    """
    told = result.get("hardware") or {}
    machine: dict[str, Any] = {name: told.get(name) for name in HARDWARE}
    for name in ("vram_mb", "cpu_cores", "cpu_threads"):
        if machine[name] is not None:
            machine[name] = round(machine[name])
    provenance = result["provenance"]
    machine["runtime_version"] = provenance.get("llama_swap_version") or provenance.get(
        "server_image"
    )
    machine["tflops_fp16"] = _peak_tflops(result)
    if not machine["gpu_model"]:
        machine |= dict.fromkeys(("gpu_model", *OF_THE_GPU))
    machine["peak_vram_mb"] = _peak_vram_mb(result)
    machine["measured_tflops"] = _measured_tflops(result)
    return machine


def judge_score(entry: Mapping[str, Any]) -> float | None:
    """A judgement's score, nominally 1 to 5; harness versions spell the member differently."""
    score = entry.get("judge_score")
    return entry.get("score") if score is None else score


def failed(record: Mapping[str, Any]) -> bool:
    """Return whether a record or judgement failed: it has a code or an error, even an empty one."""
    return record.get("failure_code") is not None or record.get("error") is not None


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["task_id"], entry["prompt_id"], entry["model_id"]


def _judgements(result: dict[str, Any]) -> dict[tuple[str, str, str], _Judged]:
    """Return the judgement of each cell; a score counts more than an attempt that failed."""
    judged: dict[tuple[str, str, str], _Judged] = {}
    for entry in result.get("judgements") or ():
        score = None if failed(entry) else judge_score(entry)
        if score is not None:
            judged[_key(entry)] = _Judged(score, None)
        else:
            judged.setdefault(_key(entry), _Judged(None, entry.get("error") or "no score"))
    return judged


def _metrics(record: dict[str, Any], judged: _Judged | None, scorer: str) -> CellMetrics:
    quality, flops = _quality(record), record.get("flops_per_token_theoretical")
    failure, detail = _failure(record)
    score = None if failure else _score(quality, record.get("judge_score"), judged)
    if not failure and score is None:
        assert judged is not None
        failure, detail = JUDGE_FAILED, f"the judge failed: {judged.problem}"
    verdict = not failure and scorer in EXACT_SCORERS
    return CellMetrics(
        task_id=record["task_id"],
        prompt_id=record["prompt_id"],
        score=score,
        pass_fail=quality == 1.0 if verdict else None,
        failure_reason=failure,
        failure_detail=detail,
        gflops_per_token=None if flops is None else flops / 1e9,
    )


def _quality(record: dict[str, Any]) -> float | None:
    """The scorer's verdict from 0 to 1, a hair beside it cut off; else as it is."""
    quality = record.get("quality_heuristic")
    if quality is not None and -HAIR <= quality <= 1 + HAIR:
        return min(max(quality, 0), 1)
    return quality


def _failure(record: dict[str, Any]) -> tuple[str | None, str | None]:
    """The reason and detail of a cell that failed."""
    detail = record.get("failure_detail")
    if not failed(record):
        return None, detail
    return record.get("failure_code") or UNNAMED_FAILURE, detail or record.get("error")


def _score(quality: float | None, of_record: float | None, judged: _Judged | None) -> float | None:
    """Upstream's rule for a cell that did not fail; None when only a judge that failed could say.

    The harness's own partial_score leaves judgements out: there such a cell counts 0.
    """
    if quality is not None and 0 <= quality <= 1:
        return float(quality)
    if of_record is None and judged is not None:
        if judged.score is None:
            return None
        of_record = judged.score
    return 0.0 if of_record is None else float(min(max((of_record - 1) / 4, 0), 1))


def _peak_vram_mb(result: dict[str, Any]) -> int | None:
    """The most video memory any cell took, in whole MB; None when no cell measured it."""
    measured = [record.get("peak_vram_mb") for record in result["records"]]
    return max((round(peak) for peak in measured if peak is not None), default=None)


def _reached(record: Mapping[str, Any]) -> float | None:
    """The TFLOPS of a main cell: tokens per second by FLOP per token; None when not measured."""
    speed, flops = record.get("tokens_per_second"), record.get("flops_per_token_theoretical")
    if record["tier"] != MAIN_TIER or failed(record) or speed is None or flops is None:
        return None
    reached = float(speed) * float(flops) / 1e12
    return reached if isfinite(reached) else None  # of two absurd numbers, none is stored


def _measured_tflops(result: dict[str, Any]) -> float | None:
    """The mean over the main cells that measured it."""
    return fmean(reached) if (reached := [*_all_reached(result)]) else None


def _all_reached(result: dict[str, Any]) -> list[float]:
    return [one for record in result["records"] if (one := _reached(record)) is not None]


def _peak_tflops(result: dict[str, Any]) -> float | None:
    """The GPU's peak by which the harness told its utilization, else the config's.

    The harness looks a card that it recognises up in a table and uses `hardware.peak_tflops` only
    for others: the config of a run that many machines may take was written on one of them.
    """
    peaks = [
        100 * reached / share
        for record in result["records"]
        if (reached := _reached(record)) is not None
        and (share := record.get("tflops_utilization_pct"))
    ]
    if peaks and isfinite(median(peaks)):
        return round(median(peaks), 3)
    told = result["config"].get("hardware")
    peak = told.get("peak_tflops") if isinstance(told, dict) else None
    usable = isinstance(peak, int | float) and not isinstance(peak, bool) and peak > 0
    return float(peak) if usable and peak is not None else None
