"""Valid jobs, results and bundles for tests to start from, and to break one thing at a time."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from broker.jobs.job import harness_hash

MODEL_REF = "smollm2-135m-q4"
CONFIG_HASH = "c0" * 32  # of the job: what makes runs comparable


def job_payload(
    *,
    tasks: int = 2,
    prompts: int = 2,
    floor_tasks: int = 1,
    scorer: str = "exact",
    config_hash: str | None = CONFIG_HASH,
) -> dict[str, Any]:
    """A payload as run_queue.job stores it, with so many tasks, prompts and floor tasks."""
    return {
        "tasks": [_task(f"task-{n}", "main", scorer) for n in range(tasks)],
        "floor_tasks": [_task(f"floor-{n}", "dumb_model", "contains") for n in range(floor_tasks)],
        "prompts": [{"id": f"prompt-{n}", "system": f"System {n}."} for n in range(prompts)],
        "config": {"run": {"seed": 7}, "models": [{"id": MODEL_REF}]},
        "config_hash": config_hash,
    }


def result_for(run_id: str, payload: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A complete result of the job, every cell answered; `changes` replace top-level members."""
    model = payload["config"]["models"][0]["id"]
    records = [
        record(task, prompt["id"], model)
        for task in payload["tasks"]
        for prompt in payload["prompts"]
    ]
    records += [record(task, "floor", model) for task in payload.get("floor_tasks", ())]
    return {
        "run_id": run_id,
        "timestamp": "2025-11-23T12:00:00Z",
        "run_status": "complete",
        "config": payload["config"],
        "provenance": {
            "config_hash": harness_hash(changes.get("config", payload["config"])),
            "seed": 7,
            "git": {"sha": "0123456789abcdef", "branch": "main", "dirty": False},
            "warnings": [],
        },
        "model_metadata": [{"id": model}],
        "tasks": [*payload["tasks"], *payload.get("floor_tasks", ())],
        "records": records,
        "model_scores": [{"model_id": model, "status": "complete", "completeness": 1.0}],
        "judgements": [],
        "resumed_from": None,
        "hardware": hardware(),
        **changes,
    }


def rehashed(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result as the harness would write it with its config: `config_hash` is of that."""
    result["provenance"]["config_hash"] = harness_hash(result["config"])
    return result


def put(value: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
    """Return a change that puts a value at a place of a document."""

    def change(document: Any) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return change


def bundle_files(result: dict[str, Any], signature: bytes) -> dict[str, bytes]:
    """The required files of a bundle with the right digests; the manifest comes last."""
    files = {
        "result.json": json.dumps(result).encode(),
        "summary.md": b"# Summary\n",
        "signature.sigstore.json": signature,
    }
    return files | {"manifest.json": json.dumps(manifest_for(result, files)).encode()}


def manifest_for(result: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """The manifest that lists these files."""
    return {
        "schema_version": "bakeoff-results/v1",
        "created_at": "2025-11-23T12:00:01Z",
        "run_id": result["run_id"],
        "timestamp": result["timestamp"],
        "config_hash": result["provenance"].get("config_hash"),
        "judge_mode": "disabled",
        "model_ids": [score["model_id"] for score in result["model_scores"]],
        "run_status": result["run_status"],
        "model_scores_summary": [],
        "files": {name: {"sha256": digest} for name, digest in digests(files).items()},
        "signature": {
            "kind": "sigstore-bundle",
            "path": "signature.sigstore.json",
            "signed_file": "result.json",
            "required": True,
        },
    }


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """Each file's SHA-256 as lower-case hex."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def record(task: dict[str, Any], prompt_id: str, model: str, **changes: Any) -> dict[str, Any]:
    """A cell that went well, as the harness writes it."""
    return {
        "task_id": task["id"],
        "domain": task["domain"],
        "prompt_id": prompt_id,
        "model_id": model,
        "hardware_id": "box-1",
        "text": "4",
        "prompt_tokens": 12,
        "completion_tokens": 1,
        "wall_clock_seconds": 0.5,
        "seconds_to_first_token": 0.1,
        "tokens_per_second": 60.0,
        "energy_wh": None,
        "peak_vram_mb": 1200.4,
        "gpu_sm_utilization_pct": 71.5,
        "gpu_event_seconds": 0.4,
        "gpu_weighted_seconds": 0.3,
        "cpu_seconds_user": 0.1,
        "cpu_seconds_sys": 0.0,
        "flops_per_token_theoretical": 2.7e8,
        "tflops_utilization_pct": None,
        "quality_heuristic": 1.0,
        "tier": task["tier"],
        "failure_code": None,
        "failure_detail": None,
        "error": None,
        **changes,
    }


def failed_record(task: dict[str, Any], prompt_id: str, model: str, code: str) -> dict[str, Any]:
    """A cell that failed: only the ids, the tier and why."""
    return {
        "task_id": task["id"],
        "prompt_id": prompt_id,
        "model_id": model,
        "tier": task["tier"],
        "failure_code": code,
        "failure_detail": f"{code} in a test",
        "error": None,
    }


def hardware() -> dict[str, Any]:
    """A machine of which all but one value is known."""
    return {
        "gpu_model": "NVIDIA GeForce RTX 4090",
        "vram_mb": 24564,
        "power_limit_w": 450,
        "cpu_model": "AMD Ryzen 9 7950X",
        "cpu_cores": 16,
        "cpu_threads": None,
        "ram_gb": 64,
        "os_name": "Ubuntu",
        "os_version": "24.04",
        "driver_version": None,
    }


def _task(task_id: str, tier: str, scorer: str) -> dict[str, Any]:
    return {
        "id": task_id,
        "domain": "arithmetic",
        "user_prompt": "2 + 2?",
        "expected": "4",
        "scorer": scorer,
        "tier": tier,
    }
