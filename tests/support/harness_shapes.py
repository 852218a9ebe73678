"""Bundles in the shapes that bakeoff's unmodified harness writes, with texts of our own.

Member by member as its runs left them: a machine with a GPU, one whose GPU nobody recognised, and
a run that was resumed after a floor cell had failed. The config is a whole config.yaml.
"""

import copy
import hashlib
import json
from typing import Any

from broker.jobs.job import harness_hash

Json = dict[str, Any]
MODEL = {
    "name": "m1",
    "parameter_count_b": 8.0,
    "architecture": "Dense",
    "quantization": "Q4_K_M",
    "file_format": "GGUF",
    "sources": [{"source_type": "local_file", "url": "m1-Q4_K_M.gguf"}],
}
JUDGE = {**MODEL, "name": "j", "sources": [{"source_type": "local_file", "url": "j-Q4_K_M.gguf"}]}
CONFIG = {
    "run": {"name": "ab-run-001", "seed": 7, "timeout_s": 20, "warmup": True},
    "server": {"models_dir": "~/.lmstudio/models", "image": "llama.cpp:server", "ctx": 4096},
    "dataset": {"n": 3, "domains": ["qa", "code"]},
    "models": [
        {"id": "m1", "alias": "m1", "gguf": "org/repo/m1-Q4_K_M.gguf", "num_params": 8_000_000_000}
    ],
    "prompts": [{"id": "plain", "system": "Be brief."}],
    "judge": {"enabled": True, "mode": "scored", "gguf": "org/repo/j-Q4_K_M.gguf"},
    "hardware": {"id": "a-box", "peak_tflops": 39.0},
    "cost": {"enabled": True, "kwh_rate_usd": 0.15, "gpu_index": 0, "sample_hz": 10},
    "output": {"dir": "results", "emit_json": True},
}  # fmt: skip
RUN = {
    "model": MODEL,
    "judge": JUDGE,
    "tasks": [
        {"id": "t0000", "domain": "qa", "user_prompt": "Capital of Peru?", "expected": "Lima",
         "scorer": "contains"},
        {"id": "t0001", "domain": "code", "user_prompt": "Write a sort.", "expected": None,
         "scorer": "judge"},
        {"id": "t0002", "domain": "code", "user_prompt": "Write a loop.", "expected": None,
         "scorer": "judge"},
    ],
    "floor_tasks": [
        {"id": "t_dumb_00", "domain": "arithmetic", "user_prompt": "3 + 3?", "expected": "6",
         "scorer": "exact"},
        {"id": "t_dumb_01", "domain": "arithmetic", "user_prompt": "9 - 2?", "expected": "7",
         "scorer": "exact"},
    ],
    "prompts": CONFIG["prompts"],
    "config": CONFIG,
}  # fmt: skip
KINDS = ("gpu", "no-gpu", "resumed")


def harness_result(job: Json, kind: str = "gpu") -> Json:
    """Return what the harness writes of a job on a machine of its own."""
    config = copy.deepcopy(job["config"])
    config["server"]["models_dir"] = "/srv/models"
    result = {
        "run_id": job["run_id"],
        "timestamp": "20261125-223225",
        "run_status": "complete",
        "config": config,
        "provenance": _provenance(config),
        "model_metadata": [
            {"id": "m1", "alias": "m1", "gguf": "org/repo/m1-Q4_K_M.gguf", "repo_id": "org/repo",
             "filename": "m1-Q4_K_M.gguf", "quantization": "Q4_K_M", "ctx": 4096,
             "n_cpu_moe": None}
        ],
        "tasks": job["tasks"],
        "records": [
            *(_floor(task) for task in job["floor_tasks"]),
            *(_main(task, gpu=kind != "no-gpu") for task in job["tasks"]),
        ],
        "model_scores": [
            {"model_id": "m1", "status": "complete", "cells_total": 3, "cells_attempted": 3,
             "cells_failed": 0, "completeness": 1.0, "partial_score": 1 / 3,
             "dominant_failure_code": None, "floor_score": 1.0, "floor_cells_passed": 2,
             "floor_cells_total": 2}
        ],
        "judgements": [
            {"mode": "scored", "task_id": "t0001", "prompt_id": "plain", "model_id": "m1",
             "score": 4, "judge_raw": "4"},
            {"mode": "scored", "task_id": "t0002", "prompt_id": "plain", "model_id": "m1",
             "score": None, "error": "Connection refused"},
        ],
        "resumed_from": None,
        "hardware": _hardware(gpu=kind != "no-gpu"),
    }  # fmt: skip
    if kind == "resumed":  # a floor cell that failed before is dropped, and not run again
        result["resumed_from"] = job["run_id"]
        del result["records"][0]
        for record in result["records"]:
            record["resumed_from"] = job["run_id"]
    return result


def harness_files(result: Json, signature: bytes | None = None) -> dict[str, bytes]:
    """Return the bundle of `package`, and of `package --sign` when there is a signature."""
    files = {"result.json": written(result), "summary.md": b"# Run\n"}
    if signature is not None:
        files["signature.sigstore.json"] = signature
    manifest = {
        "schema_version": "bakeoff-results/v1",
        "created_at": "2026-11-25T22:32:28Z",
        "run_id": result["run_id"],
        "timestamp": result["timestamp"],
        "config_hash": result["provenance"]["config_hash"],
        "judge_mode": result["config"]["judge"]["mode"],
        "model_ids": [model["id"] for model in result["config"]["models"]],
        "run_status": result["run_status"],
        "model_scores_summary": [
            {name: score[name] for name in ("model_id", "status", "partial_score")}
            for score in result["model_scores"]
        ],
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
        },
        "signature": {
            "kind": "sigstore-bundle",
            "path": "signature.sigstore.json" if signature is not None else None,
            "signed_file": "result.json",
            "required": signature is not None,
        },
    }
    return files | {"manifest.json": written(manifest)}


def written(document: Json) -> bytes:
    """Return JSON as the harness writes it."""
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def _provenance(config: Json) -> Json:
    return {
        "git": {"sha": "ad48ac3", "branch": "main", "dirty": False},
        "config_hash": harness_hash(config),
        "seed": 7,
        "python": "3.11.7 (main) [GCC 12.2.0]",
        "platform": "Linux-6.18-x86_64-with-glibc2.36",
        "packages": {"httpx": "0.28.1", "pyyaml": "6.0.4", "huggingface_hub": None},
        "podman_version": None,
        "llama_swap_version": None,
        "server_image": "llama.cpp:server",
        "warnings": ["podman version unavailable", "llama-swap version unavailable"],
    }


def _floor(task: Json) -> Json:
    return {
        "task_id": task["id"],
        "domain": task["domain"],
        "prompt_id": "floor",
        "model_id": "m1",
        "hardware_id": None,
        "tier": "dumb_model",
        "text": task["expected"],
        "wall_clock_seconds": 0.0656,
        "quality_heuristic": 1.0,
        "failure_code": None,
        "failure_detail": None,
        "error": None,
    }


def _main(task: Json, *, gpu: bool) -> Json:
    return {
        "task_id": task["id"],
        "domain": task["domain"],
        "prompt_id": "plain",
        "model_id": "m1",
        "hardware_id": "nvidia-geforce-rtx-4090" if gpu else "a-box",
        "text": "Lima",
        "prompt_tokens": 7,
        "completion_tokens": 6,
        "wall_clock_seconds": 0.0829,
        "seconds_to_first_token": 0.0827,
        "tokens_per_second": 50.0,
        "energy_wh": 0.0005 if gpu else None,
        "peak_vram_mb": 6120.0 if gpu else None,
        "gpu_sm_utilization_pct": 87.0 if gpu else None,
        "gpu_event_seconds": None,
        "gpu_weighted_seconds": 0.0722 if gpu else None,
        "cpu_seconds_user": 0.047,
        "cpu_seconds_sys": 0.0,
        "flops_per_token_theoretical": 16_000_000_000,
        "tflops_utilization_pct": 100 * 0.8 / (82.6 if gpu else 39.0),
        "quality_heuristic": 1.0 if task["scorer"] == "contains" else None,
        "tier": "main",
        "failure_code": None,
        "failure_detail": None,
        "error": None,
    }


def _hardware(*, gpu: bool) -> Json:
    return {
        "gpu_model": "NVIDIA GeForce RTX 4090" if gpu else None,
        "vram_mb": 24564 if gpu else None,
        "power_limit_w": 450.0 if gpu else None,
        "cpu_model": "AMD EPYC",
        "cpu_cores": 2,
        "cpu_threads": 4,
        "ram_gb": 23.54,
        "os_name": "Linux",
        "os_version": "#1 SMP PREEMPT_DYNAMIC",
        "driver_version": "570.86.15" if gpu else None,
    }
