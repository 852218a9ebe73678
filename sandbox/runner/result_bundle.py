"""From outcomes to the four files of a bundle, member by member as bakeoff's harness writes them.

Also what is easily taken for an oversight is the harness's: `timestamp` without a zone, a
`config_hash` of 16 digits over its own config, nulls for what a machine does not tell, floor
records of few members, failed ones of fewer, and `tasks` without the floor tasks. So whoever can
read the demo's results can read a real one.

The demo has no GPU: the hardware snapshot is a plausible card of the declared size, and memory,
energy and FLOP figures follow from the model's size. `provenance.warnings` says so in each result.
"""

import hashlib
import json
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from broker.jobs.job import harness_hash
from sandbox.runner.answers import Outcome, Reply
from sandbox.runner.wire import Job

SCHEMA_VERSION = "bakeoff-results/v1"
# A demo has no harness checkout; seven zeros would look like a missing one.
DEMO_GIT_SHA = "ddddddd"
WARNING = "demo runner: hardware, memory and energy figures are modelled, not measured"
# (GB as sold, card, power limit in W, FP16 TFLOPS), from the makers' data sheets; the first that is
# large enough
GPUS = (
    (8, "NVIDIA GeForce RTX 4060", 115, 15.1),
    (12, "NVIDIA GeForce RTX 4070", 200, 29.1),
    (16, "NVIDIA GeForce RTX 4080", 320, 48.7),
    (24, "NVIDIA GeForce RTX 4090", 450, 82.6),
    (48, "NVIDIA RTX 6000 Ada Generation", 300, 91.1),
    (80, "NVIDIA H100 80GB HBM3", 700, 198.9),
)
# The harness's order, by which it names one of several codes that are equally frequent.
FAILURES = (
    *("timeout", "refusal", "malformed_output", "oom", "load_failure"),
    *("capability_gap", "infra_error", "cancelled", "unknown"),
)
SUMMARIZED = ("model_id", "status", "partial_score", "floor_score", "dominant_failure_code")
Sign = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine that the result claims to be from."""

    vram_gb: int

    @property
    def gpu(self) -> tuple[int, str, int, float]:
        """The smallest known card that has the declared memory, else the largest."""
        return next((gpu for gpu in GPUS if gpu[0] >= self.vram_gb), GPUS[-1])

    @property
    def hardware_id(self) -> str:
        """The card's name as the harness writes it into each record."""
        return re.sub(r"[^a-z0-9]+", "-", self.gpu[1].lower()).strip("-")

    def snapshot(self) -> dict[str, Any]:
        """Return the result's `hardware` object."""
        _, model, watts, _ = self.gpu
        return {
            "gpu_model": model,
            "vram_mb": self.vram_gb * 1024,
            "power_limit_w": float(watts),
            "cpu_model": "AMD Ryzen 9 7950X",
            "cpu_cores": 16,
            "cpu_threads": 32,
            "ram_gb": 62.71,
            "os_name": "Linux",
            "os_version": "#1 SMP PREEMPT_DYNAMIC demo",
            "driver_version": "570.86.15",
        }


def build_bundle(
    job: Job, outcomes: Sequence[Outcome], executor: dict[str, str], hardware: Hardware, sign: Sign
) -> dict[str, bytes]:
    """Return the bundle's files by name. `sign` makes the Sigstore bundle over result.json."""
    result = build_result(job, outcomes, executor, hardware)
    files = {"result.json": _pretty(result), "summary.md": build_summary(job, outcomes).encode()}
    files["signature.sigstore.json"] = sign(files["result.json"])
    files["manifest.json"] = _pretty(build_manifest(result, files))
    return files


def build_result(
    job: Job, outcomes: Sequence[Outcome], executor: dict[str, str], hardware: Hardware
) -> dict[str, Any]:
    """Return the harness's result payload: every cell once, also the failed ones."""
    score = model_score(job.model_ref, outcomes)
    return {
        "run_id": job.run_id,
        "timestamp": datetime.now().strftime("%Y%m%d-%H%M%S"),  # noqa: DTZ005 (local: upstream's)
        "run_status": score["status"],
        "config": job.config,
        "provenance": _provenance(job, executor),
        "model_metadata": [_model_metadata(job)],
        "tasks": job.tasks,
        "records": [_record(job, outcome, hardware) for outcome in outcomes],
        "model_scores": [score],
        "judgements": [],
        "resumed_from": None,
        "hardware": hardware.snapshot(),
    }


def build_manifest(result: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """Return the manifest over `files`: everything in the bundle but the manifest itself."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "run_id": result["run_id"],
        "timestamp": result["timestamp"],
        "config_hash": result["provenance"]["config_hash"],
        "judge_mode": (result["config"].get("judge") or {}).get("mode"),
        "model_ids": [model["id"] for model in result["config"]["models"]],
        "run_status": result["run_status"],
        "model_scores_summary": [
            {name: score[name] for name in SUMMARIZED} for score in result["model_scores"]
        ],
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
    floor = "no floor tasks"
    if score["floor_cells_total"]:
        floor = f"floor {score['floor_cells_passed']} of {score['floor_cells_total']}"
    rows = [f"| {one.cell.task['id']} | {one.cell.prompt_id} | {_shown(one)} |" for one in outcomes]
    lines = [
        f"# {job.model['name']} ({job.model['quantization']})",
        "",
        f"Run {job.run_id}: score {score['partial_score']:.2f}, {floor}.",
        "",
        "| task | prompt | score |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def model_score(model_ref: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the one entry of `model_scores`, by the harness's rule: a failed cell counts as 0."""
    main = [one for one in outcomes if one.cell.tier == "main"]
    floor = [one for one in outcomes if one.cell.tier == "dumb_model"]
    failures = Counter(one.failure.code for one in main if one.failure)
    attempted = len(main) - failures.total()
    passed = sum(one.quality == 1.0 for one in floor)
    unfinished = "incomplete" if attempted else "failed"
    return {
        "model_id": model_ref,
        "status": "complete" if attempted == len(main) else unfinished,
        "cells_total": len(main),
        "cells_attempted": attempted,
        "cells_failed": failures.total(),
        "completeness": attempted / len(main),
        "partial_score": sum(one.quality or 0.0 for one in main) / len(main),
        "dominant_failure_code": max(FAILURES, key=failures.__getitem__) if failures else None,
        "floor_score": passed / len(floor) if floor else None,
        "floor_cells_passed": passed if floor else None,
        "floor_cells_total": len(floor) or None,
    }


def _record(job: Job, outcome: Outcome, hardware: Hardware) -> dict[str, Any]:
    cell = outcome.cell
    place = {
        "task_id": cell.task["id"],
        "domain": cell.task.get("domain"),
        "prompt_id": cell.prompt_id,
        "model_id": job.model_ref,
        "tier": cell.tier,
    }
    if outcome.failure is not None:
        detail = str(outcome.failure)
        failed = {"failure_code": outcome.failure.code, "failure_detail": detail, "error": detail}
        return {**place, **failed}
    assert outcome.reply is not None
    answered = {
        **place,
        "hardware_id": hardware.hardware_id,
        "text": outcome.reply.text,
        "wall_clock_seconds": outcome.seconds,
        "quality_heuristic": outcome.quality,
        "failure_code": None,
        "failure_detail": None,
        "error": None,
    }
    if cell.tier != "main":  # of a floor cell the harness measures nothing else
        return answered
    return {**answered, **_measurements(job, outcome.seconds, outcome.reply, hardware)}


def _measurements(job: Job, seconds: float, reply: Reply, hardware: Hardware) -> dict[str, Any]:
    _, _, watts, peak_tflops = hardware.gpu
    active_b = job.model.get("active_parameter_count_b") or job.model["parameter_count_b"]
    needed_mb = active_b * _bits(job.model["quantization"]) / 8 * 1.15 * 1024
    speed = reply.completion_tokens / max(seconds, 0.001)
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "seconds_to_first_token": None,
        "tokens_per_second": speed,
        "energy_wh": watts * seconds / 3600,
        "peak_vram_mb": float(min(round(needed_mb), hardware.vram_gb * 1024)),
        "gpu_sm_utilization_pct": None,
        "gpu_event_seconds": None,
        "gpu_weighted_seconds": None,
        "cpu_seconds_user": 0.0,
        "cpu_seconds_sys": 0.0,
        "flops_per_token_theoretical": round(2e9 * active_b),
        "tflops_utilization_pct": 100 * speed * 2e9 * active_b / (peak_tflops * 1e12),
    }


def _provenance(job: Job, executor: dict[str, str]) -> dict[str, Any]:
    server = job.config.get("server") or {}
    return {
        "git": {"sha": DEMO_GIT_SHA, "branch": "demo", "dirty": False},
        "config_hash": harness_hash(job.config),
        "seed": job.config.get("run", {}).get("seed"),
        "python": sys.version,
        "platform": platform.platform(),
        "packages": {"httpx": None, "pyyaml": None, "huggingface_hub": None},
        "podman_version": None,
        "llama_swap_version": None,
        "server_image": server.get("image"),
        "warnings": [WARNING, "podman version unavailable", "llama-swap version unavailable"],
        "executor": executor,
    }


def _model_metadata(job: Job) -> dict[str, Any]:
    model = job.config["models"][0]
    parts = (model.get("gguf") or "").split("/")
    named = re.search(r"(?:IQ|Q|BF|F)\d\w*", parts[-1], re.IGNORECASE)
    server = job.config.get("server") or {}
    return {
        "id": job.model_ref,
        "alias": model.get("alias"),
        "gguf": model.get("gguf"),
        "repo_id": "/".join(parts[:2]) if len(parts) >= 3 else None,
        "filename": parts[-1] or None,
        "quantization": named[0].upper() if named else None,
        "ctx": model.get("ctx") or server.get("ctx"),
        "n_cpu_moe": model.get("n_cpu_moe"),
    }


def _bits(quantization: str) -> int:
    """Bits per weight as the name says: q4_k_m 4, iq2_xs 2, fp16 16. Sixteen when it does not."""
    found = re.search(r"\d+", quantization)
    return int(found[0]) if found else 16


def _shown(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"failed: {outcome.failure.code}"
    return "not scored" if outcome.quality is None else f"{outcome.quality:.2f}"


def _pretty(value: dict[str, Any]) -> bytes:
    """Write JSON as the harness does. Raises ValueError for NaN, which would be refused later."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
