"""A result's cells as metric rows: upstream's cell rule, in one place.

Takes results that passed `bundles.parse_result` and `bundles.check_binding`.
"""

from dataclasses import dataclass
from typing import Any

from broker.jobs import Job

EXACT_SCORERS = frozenset({"exact", "contains", "regex"})
HARDWARE = (
    "gpu_model",
    "vram_mb",
    "power_limit_w",
    "cpu_model",
    "cpu_cores",
    "ram_gb",
    "os_name",
    "os_version",
    "driver_version",
)


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


def metrics(result: dict[str, Any], job: Job) -> tuple[CellMetrics, ...]:
    """One entry per record, floor cells included, in the records' order."""
    scorers = job.scorers()
    judged = _judged(result)
    return tuple(
        _metrics(record, judged.get(_key(record)), scorers[record["task_id"], record["tier"]])
        for record in result["records"]
    )


def peak_vram_mb(result: dict[str, Any]) -> int | None:
    """The most video memory any cell took, in whole MB; None when no cell measured it."""
    measured = [record.get("peak_vram_mb") for record in result["records"]]
    return max((round(peak) for peak in measured if peak is not None), default=None)


def hardware(result: dict[str, Any]) -> dict[str, Any]:
    """The machine as the result tells it: always the members of HARDWARE, None where unknown.

    vram_mb and cpu_cores are made whole: JSON's 16.0 is an integer, but not to an int column.
    """
    told = result.get("hardware") or {}
    machine: dict[str, Any] = {name: told.get(name) for name in HARDWARE}
    for name in ("vram_mb", "cpu_cores"):
        if machine[name] is not None:
            machine[name] = round(machine[name])
    return machine


def judge_score(judgement: dict[str, Any]) -> float | None:
    """A judgement's score, nominally 1 to 5; harness versions spell the member differently."""
    score = judgement.get("judge_score")
    return judgement.get("score") if score is None else score


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["task_id"], entry["prompt_id"], entry["model_id"]


def _judged(result: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    scores = ((_key(entry), judge_score(entry)) for entry in result.get("judgements") or ())
    return {key: score for key, score in scores if score is not None}


def _metrics(record: dict[str, Any], judged: float | None, scorer: str) -> CellMetrics:
    failure, quality = record.get("failure_code"), record.get("quality_heuristic")
    flops = record.get("flops_per_token_theoretical")
    verdict = failure is None and scorer in EXACT_SCORERS
    return CellMetrics(
        task_id=record["task_id"],
        prompt_id=record["prompt_id"],
        score=None if failure else _score(quality, judged),
        pass_fail=quality == 1.0 if verdict else None,
        failure_reason=failure,
        failure_detail=record.get("failure_detail"),
        gflops_per_token=None if flops is None else flops / 1e9,
    )


def _score(quality: float | None, judged: float | None) -> float:
    """Upstream's rule for a cell that did not fail."""
    if quality is not None and 0 <= quality <= 1:
        return float(quality)
    if judged is not None:
        return float(min(max((judged - 1) / 4, 0), 1))
    return 0.0
