"""From outcomes to the four files of a bundle, in bakeoff's formats.

The demo has no GPU: the hardware snapshot is a plausible card of the declared size, and memory,
energy and FLOP figures follow from the model's size. `provenance.warnings` says so in each result.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from sandbox.answers import Outcome, Reply
from sandbox.runner_wire import Job

SCHEMA_VERSION = "bakeoff-results/v1"
# A demo has no harness checkout; forty zeros would look like a missing one.
DEMO_GIT_SHA = "d" * 40
WARNING = "demo runner: hardware, memory and energy figures are modelled, not measured"
# (GB as sold, card, power limit in W), from the makers' data sheets; the first that is large enough
GPUS = (
    (8, "NVIDIA GeForce RTX 4060", 115),
    (12, "NVIDIA GeForce RTX 4070", 200),
    (16, "NVIDIA GeForce RTX 4080", 320),
    (24, "NVIDIA GeForce RTX 4090", 450),
    (48, "NVIDIA RTX 6000 Ada Generation", 300),
    (80, "NVIDIA H100 80GB HBM3", 700),
)
Sign = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Rig:
    """The machine that the result claims to be from."""

    vram_gb: int

    @property
    def gpu(self) -> tuple[int, str, int]:
        """The smallest known card that has the declared memory, else the largest."""
        return next((gpu for gpu in GPUS if gpu[0] >= self.vram_gb), GPUS[-1])

    def snapshot(self) -> dict[str, Any]:
        """Return the result's `hardware` object."""
        _, model, watts = self.gpu
        return {
            "gpu_model": model,
            "vram_mb": self.vram_gb * 1024,
            "power_limit_w": watts,
            "cpu_model": "AMD Ryzen 9 7950X",
            "cpu_cores": 16,
            "ram_gb": 64,
            "os_name": "Ubuntu",
            "os_version": "24.04",
            "driver_version": "570.86.15",
        }


def build_bundle(
    job: Job, outcomes: Sequence[Outcome], executor: dict[str, str], rig: Rig, sign: Sign
) -> dict[str, bytes]:
    """Return the bundle's files by name. `sign` makes the Sigstore bundle over result.json."""
    result = build_result(job, outcomes, executor, rig)
    files = {"result.json": _pretty(result), "summary.md": build_summary(job, outcomes).encode()}
    files["signature.sigstore.json"] = sign(files["result.json"])
    files["manifest.json"] = _pretty(build_manifest(result, files))
    return files


def build_result(
    job: Job, outcomes: Sequence[Outcome], executor: dict[str, str], rig: Rig
) -> dict[str, Any]:
    """Return the harness's result payload: every cell once, also the failed ones."""
    return {
        "run_id": job.run_id,
        "timestamp": _now(),
        "run_status": "complete",
        "config": job.config,
        "provenance": _provenance(job, executor),
        "model_metadata": [_model_metadata(job)],
        "tasks": [*job.tasks, *job.floor_tasks],
        "records": [_record(job, outcome, rig) for outcome in outcomes],
        "model_scores": [model_score(job.model_ref, outcomes)],
        "judgements": [],
        "resumed_from": None,
        "hardware": rig.snapshot(),
    }


def build_manifest(result: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """Return the manifest over `files`: everything in the bundle but the manifest itself."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created_at": _now(),
        "run_id": result["run_id"],
        "timestamp": result["timestamp"],
        "config_hash": result["provenance"]["config_hash"],
        "judge_mode": result["config"].get("judge", {}).get("mode", "none"),
        "model_ids": [score["model_id"] for score in result["model_scores"]],
        "run_status": result["run_status"],
        "model_scores_summary": result["model_scores"],
        "files": {name: {"sha256": hashlib.sha256(raw).hexdigest()} for name, raw in files.items()},
        "signature": {
            "kind": "sigstore-bundle",
            "path": "signature.sigstore.json",
            "signed_file": "result.json",
            "required": True,
        },
    }


def build_summary(job: Job, outcomes: Sequence[Outcome]) -> str:
    """Return summary.md: the cells' scores as a table for people."""
    score = model_score(job.model_ref, outcomes)
    floor = f"{score['floor_cells_passed']} of {score['floor_cells_total']}"
    rows = [f"| {one.cell.task['id']} | {one.cell.prompt_id} | {_shown(one)} |" for one in outcomes]
    lines = [
        f"# {job.model['name']} ({job.model['quantization']})",
        "",
        f"Run {job.run_id}: score {score['partial_score']:.2f}, floor {floor}.",
        "",
        "| task | prompt | score |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def model_score(model_ref: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the one entry of `model_scores`. A failed cell counts as 0, by the harness's rule."""
    main = [one for one in outcomes if one.cell.tier == "main"]
    floor = [one for one in outcomes if one.cell.tier == "dumb_model"]
    failures = Counter(one.failure.code for one in main if one.failure)
    return {
        "model_id": model_ref,
        "status": "complete",
        "cells_total": len(main),
        "cells_attempted": len(main),
        "cells_failed": failures.total(),
        "completeness": 1.0,
        "partial_score": _mean(main),
        "dominant_failure_code": failures.most_common(1)[0][0] if failures else None,
        "floor_score": _mean(floor),
        "floor_cells_passed": sum(one.quality == 1.0 for one in floor),
        "floor_cells_total": len(floor),
    }


def _mean(outcomes: Sequence[Outcome]) -> float:
    return fmean(one.quality or 0.0 for one in outcomes) if outcomes else 0.0


def _record(job: Job, outcome: Outcome, rig: Rig) -> dict[str, Any]:
    """A failed cell has its ids, its tier and what went wrong; nothing that was not measured."""
    cell = outcome.cell
    ids = {"task_id": cell.task["id"], "prompt_id": cell.prompt_id, "model_id": job.model_ref}
    if outcome.failure is not None:
        detail = str(outcome.failure)
        failed = {"failure_code": outcome.failure.code, "failure_detail": detail, "error": detail}
        return {**ids, "tier": cell.tier, **failed}
    assert outcome.reply is not None
    answered = {
        "domain": cell.task.get("domain"),
        "hardware_id": re.sub(r"\W+", "-", rig.gpu[1].lower()),
        "text": outcome.reply.text,
        "quality_heuristic": outcome.quality,
        "tier": cell.tier,
        "failure_code": None,
        "failure_detail": None,
        "error": None,
    }
    return {**ids, **answered, **_measurements(job, outcome.seconds, outcome.reply, rig)}


def _measurements(job: Job, seconds: float, reply: Reply, rig: Rig) -> dict[str, Any]:
    active_b = job.model.get("active_parameter_count_b") or job.model["parameter_count_b"]
    needed_mb = active_b * _bits(job.model["quantization"]) / 8 * 1.15 * 1024
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "wall_clock_seconds": round(seconds, 6),
        "seconds_to_first_token": None,
        "tokens_per_second": round(reply.completion_tokens / max(seconds, 0.001), 3),
        "energy_wh": round(rig.gpu[2] * seconds / 3600, 6),
        "peak_vram_mb": min(round(needed_mb), rig.vram_gb * 1024),
        "gpu_sm_utilization_pct": None,
        "gpu_event_seconds": None,
        "gpu_weighted_seconds": None,
        "cpu_seconds_user": None,
        "cpu_seconds_sys": None,
        "flops_per_token_theoretical": 2e9 * active_b,
        "tflops_utilization_pct": None,
    }


def _provenance(job: Job, executor: dict[str, str]) -> dict[str, Any]:
    return {
        "config_hash": job.config_hash,
        "seed": job.config.get("run", {}).get("seed"),
        "git": {"sha": DEMO_GIT_SHA, "branch": "demo", "dirty": False},
        "warnings": [WARNING],
        "executor": executor,
    }


def _model_metadata(job: Job) -> dict[str, Any]:
    return {"id": job.model_ref, "gguf": job.config["models"][0].get("gguf")}


def _bits(quantization: str) -> int:
    """Bits per weight as the name says: q4_k_m 4, iq2_xs 2, fp16 16. Sixteen when it does not."""
    found = re.search(r"\d+", quantization)
    return int(found[0]) if found else 16


def _shown(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"failed: {outcome.failure.code}"
    return "not scored" if outcome.quality is None else f"{outcome.quality:.2f}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _pretty(value: dict[str, Any]) -> bytes:
    """Indented UTF-8; a number that JSON does not know would be refused later: refuse it here."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
