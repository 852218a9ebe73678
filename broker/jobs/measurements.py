"""Numbers of a result that no cell, share or measurement can have: refused at submit.

The cell rule (cells.py) would pass over them or cut them to its scale, and the rows would
say what nobody measured. They are checked at submit only, where the runner can still mend them:
what was accepted earlier is read as it was then.
"""

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from math import isfinite
from typing import Any, TypeGuard

from broker.documents.strict_json import MAX_VIOLATIONS, pointer
from broker.errors import InvalidBundle, Violation
from broker.jobs.cells import HAIR, failed

SHARES = ("completeness", "partial_score", "floor_score")  # of model_scores
COUNTS = ("cells_total", "cells_attempted", "cells_failed", "floor_cells_passed",
          "floor_cells_total")  # fmt: skip
JUDGE_MEMBERS = ("judge_score", "score")  # the spellings of a judgement's score

Place = tuple[str | int, ...]


def check_measurements(result: Mapping[str, Any]) -> None:
    """Raise InvalidBundle with a pointer to each number that cannot be; the first 50."""
    found = chain(
        (v for i, record in enumerate(result["records"]) for v in _record(record, i)),
        (v for i, one in enumerate(result.get("judgements") or ()) for v in _judgement(one, i)),
        (v for i, one in enumerate(result.get("model_scores") or ()) for v in _model(one, i)),
        check_peak_tflops(result["config"], "/config"),
    )
    violations = tuple(islice(found, MAX_VIOLATIONS))
    if violations:
        raise InvalidBundle("result.json has numbers that cannot be.", violations)


def _record(record: Mapping[str, Any], index: int) -> Iterator[Violation]:
    place = ("records", index)
    yield from _share(record.get("quality_heuristic"), (*place, "quality_heuristic"))
    speed, flops = record.get("tokens_per_second"), record.get("flops_per_token_theoretical")
    if speed is None or flops is None:
        return
    flop_per_s = float(speed) * float(flops)
    if not isfinite(flop_per_s):
        told = "times flops_per_token_theoretical is beyond any machine"
        yield Violation(pointer((*place, "tokens_per_second")), told)
    elif (share := record.get("tflops_utilization_pct")) and not isfinite(flop_per_s / share):
        told = "is beneath any machine's share of its peak"
        yield Violation(pointer((*place, "tflops_utilization_pct")), told)


def _judgement(judgement: Mapping[str, Any], index: int) -> Iterator[Violation]:
    """A score of one answer is from 1 to 5; what a comparison, or a failure, has beside is not."""
    if judgement.get("a_model") is not None or failed(judgement):
        return
    for member in JUDGE_MEMBERS:
        score = judgement.get(member)
        if score is not None and not 1 - HAIR <= score <= 5 + HAIR:
            yield Violation(pointer(("judgements", index, member)), "is outside of 1 to 5")


def _model(scores: Mapping[str, Any], index: int) -> Iterator[Violation]:
    for member in SHARES:
        yield from _share(scores.get(member), ("model_scores", index, member))
    for member in COUNTS:
        if _is_number(count := scores.get(member)) and count < 0:
            yield Violation(pointer(("model_scores", index, member)), "is below 0")


def _share(value: Any, place: Place) -> Iterator[Violation]:
    if _is_number(value) and not -HAIR <= value <= 1 + HAIR:
        yield Violation(pointer(place), "is outside of 0 to 1")


def check_peak_tflops(config: Mapping[str, Any], at: str) -> Iterator[Violation]:
    """A config's own word for its GPU, also of one that is enqueued; 0 is unknown, as null is."""
    hardware = config.get("hardware")
    told = hardware.get("peak_tflops") if isinstance(hardware, dict) else None
    if told is not None and not (_is_number(told) and told >= 0):
        yield Violation(f"{at}/hardware/peak_tflops", "is not a number from 0 on, or null")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
