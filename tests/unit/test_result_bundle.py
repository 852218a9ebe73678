"""The demo runner's bundle, against what results.md asks of every bundle."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from auth.signers import BundleVerifier, Signer, load_policy
from broker.jobs.job import Job as HandedOut
from broker.results.archive_rules import check_archivable
from broker.results.binding import check_binding
from broker.results.bundle import SIGNATURE, check_names, parse_result
from broker.results.manifest import check_agreement, check_manifest
from sandbox.runner.answers import BuiltInRules, CellFailed, Outcome, cells_of, execute
from sandbox.runner.result_bundle import WARNING, Hardware, build_bundle, build_result, model_score
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore
from tests.support import harness_shapes
from tests.support.runner_stage import BODY, JOB, RUN_ID

RULES = BuiltInRules()
ROOT = Path(__file__).parents[2]
NAMES = {"result.json", "manifest.json", "summary.md", "signature.sigstore.json"}


def sign(blob: bytes) -> bytes:
    """Stands where Sigstore signs, and tells over which bytes it was asked to."""
    return json.dumps({"over": hashlib.sha256(blob).hexdigest()}).encode()


@pytest.fixture
def outcomes(io_loop) -> list[Outcome]:
    return io_loop.run_sync(lambda: execute(JOB, RULES, lambda _: None))


@pytest.fixture
def bundle(outcomes: list[Outcome]) -> dict[str, bytes]:
    return build_bundle(JOB, outcomes, RULES.provenance, Hardware(24), sign)


def test_the_bundle_has_the_four_files(bundle: dict[str, bytes]) -> None:
    assert set(bundle) == NAMES


def test_the_manifest_names_every_file_but_itself_with_its_digest(bundle) -> None:
    files = json.loads(bundle["manifest.json"])["files"]
    assert files == {
        name: {"sha256": hashlib.sha256(bundle[name]).hexdigest()}
        for name in NAMES - {"manifest.json"}
    }


def test_the_signature_is_over_the_exact_bytes_of_the_result(bundle) -> None:
    signed = json.loads(bundle["signature.sigstore.json"])["over"]
    assert signed == hashlib.sha256(bundle["result.json"]).hexdigest()
    assert json.loads(bundle["manifest.json"])["signature"] == {
        "kind": "sigstore-bundle",
        "path": "signature.sigstore.json",
        "signed_file": "result.json",
        "required": True,
    }


def test_result_and_manifest_name_the_claimed_run(bundle) -> None:
    result, manifest = json.loads(bundle["result.json"]), json.loads(bundle["manifest.json"])
    assert result["run_id"] == manifest["run_id"] == RUN_ID
    assert result["timestamp"] == manifest["timestamp"]
    assert re.fullmatch(r"\d{8}-\d{6}", result["timestamp"])
    text = json.dumps(JOB.config, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert result["provenance"]["config_hash"] == manifest["config_hash"] == digest
    assert manifest["schema_version"] == "bakeoff-results/v1"


def test_each_cell_is_recorded_once_under_the_harness_name_of_the_model(bundle) -> None:
    result = json.loads(bundle["result.json"])
    cells = [(one["task_id"], one["prompt_id"], one["tier"]) for one in result["records"]]
    assert cells == [(one.task["id"], one.prompt_id, one.tier) for one in cells_of(JOB)]
    named = [*result["records"], *result["model_scores"]]
    assert {one["model_id"] for one in named} == {"llama-70b"}
    assert result["tasks"] == JOB.tasks, "the main tasks alone"
    (metadata,) = result["model_metadata"]
    assert (metadata["id"], metadata["filename"]) == ("llama-70b", "llama.gguf")
    floor, main = result["records"][0], result["records"][-1]
    assert "tokens_per_second" in main
    assert "tokens_per_second" not in floor, "of a floor cell the harness measures little"


def shape(document: dict[str, Any]) -> dict[str, Any]:
    """Which members each object of a result has, by its place."""
    records = {one["tier"]: set(one) for one in document["records"]}
    one_of = {name: set(document[name][0]) for name in ("model_metadata", "model_scores")}
    objects = {name: set(document[name]) for name in ("provenance", "hardware")}
    return {"": set(document), **records, **one_of, **objects}


def test_the_result_has_the_members_that_the_harness_writes(bundle) -> None:
    job = {**harness_shapes.RUN, "run_id": RUN_ID, "config": harness_shapes.CONFIG}
    real = shape(harness_shapes.harness_result(job))
    real["provenance"].add("executor")  # ours: it says that there was no model
    assert shape(json.loads(bundle["result.json"])) == real


def test_the_manifest_has_the_members_that_the_harness_writes(bundle) -> None:
    job = {**harness_shapes.RUN, "run_id": RUN_ID, "config": harness_shapes.CONFIG}
    real = harness_shapes.harness_files(harness_shapes.harness_result(job), b"{}")
    manifest = json.loads(bundle["manifest.json"])
    assert set(manifest) == set(json.loads(real["manifest.json"]))
    (score,) = json.loads(bundle["result.json"])["model_scores"]
    names = ("model_id", "status", "partial_score", "floor_score", "dominant_failure_code")
    assert manifest["model_scores_summary"] == [{name: score[name] for name in names}]
    assert (manifest["judge_mode"], manifest["model_ids"]) == ("none", ["llama-70b"])
    assert manifest["run_status"] == "complete"


def test_the_files_are_written_as_the_harness_writes_json(outcomes: list[Outcome]) -> None:
    reply = outcomes[1].reply
    assert reply is not None
    foreign = replace(outcomes[1], reply=replace(reply, text="Troms\u00f8"))
    told = [outcomes[0], foreign, *outcomes[2:]]
    files = build_bundle(JOB, told, RULES.provenance, Hardware(24), sign)
    for name in ("result.json", "manifest.json"):
        assert files[name] == harness_shapes.written(json.loads(files[name]))
    assert files["result.json"].isascii()


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[timedelta]:
    """A clock eleven hours ahead of UTC."""
    monkeypatch.setenv("TZ", "EAST-11")
    time.tzset()
    yield timedelta(hours=11)
    monkeypatch.undo()
    time.tzset()


def test_the_timestamp_is_local_and_the_manifests_time_is_not(
    outcomes: list[Outcome], far_east: timedelta
) -> None:
    files = build_bundle(JOB, outcomes, RULES.provenance, Hardware(24), sign)
    manifest = json.loads(files["manifest.json"])
    local = datetime.strptime(manifest["timestamp"], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    created = datetime.fromisoformat(manifest["created_at"])
    assert abs(local - created - far_east) < timedelta(seconds=5)
    assert abs(created - datetime.now(UTC)) < timedelta(seconds=60)


def test_what_the_model_has_not_set_comes_from_the_server_section(outcomes) -> None:
    models = [{"id": "m", "alias": "M", "gguf": "org/repo/M-F16.gguf", "n_cpu_moe": 9}]
    config = {**JOB.config, "server": {"ctx": 4096, "image": "llama.cpp:server"}, "models": models}
    result = build_result(replace(JOB, config=config), outcomes, RULES.provenance, Hardware(24))
    assert result["provenance"]["server_image"] == "llama.cpp:server"
    assert result["model_metadata"] == [
        {
            "id": "m",
            "alias": "M",
            "gguf": "org/repo/M-F16.gguf",
            "repo_id": "org/repo",
            "filename": "M-F16.gguf",
            "quantization": "F16",
            "ctx": 4096,
            "n_cpu_moe": 9,
        }
    ]
    models[0]["ctx"] = 8192
    result = build_result(replace(JOB, config=config), outcomes, RULES.provenance, Hardware(24))
    assert result["model_metadata"][0]["ctx"] == 8192


def test_the_result_says_that_no_model_and_no_gpu_were_there(bundle) -> None:
    provenance = json.loads(bundle["result.json"])["provenance"]
    assert provenance["executor"] == {"kind": "built-in rules"}
    assert provenance["warnings"][0] == WARNING


def test_a_failed_cell_has_only_its_ids_and_what_went_wrong(outcomes: list[Outcome]) -> None:
    broken = replace(outcomes[1], reply=None, quality=None, failure=CellFailed("timeout", "late"))
    told = [outcomes[0], broken, *outcomes[2:]]
    result = build_result(JOB, told, RULES.provenance, Hardware(24))
    assert result["records"][1] == {
        "task_id": "capital",
        "domain": "geography",
        "prompt_id": "terse",
        "model_id": "llama-70b",
        "tier": "main",
        "failure_code": "timeout",
        "failure_detail": "late",
        "error": "late",
    }
    assert result["run_status"] == "incomplete"


def test_a_run_in_which_nothing_was_answered_has_failed(outcomes: list[Outcome]) -> None:
    late = CellFailed("timeout", "late")
    broken = [replace(one, reply=None, quality=None, failure=late) for one in outcomes]
    assert build_result(JOB, broken, RULES.provenance, Hardware(24))["run_status"] == "failed"


def test_a_failed_cell_counts_as_zero_and_the_floor_is_kept_apart(outcomes) -> None:
    right = [replace(one, quality=1.0) for one in outcomes]
    right[1] = replace(right[1], quality=None, failure=CellFailed("timeout", "late"))
    assert model_score("m", right) == {
        "model_id": "m",
        "status": "incomplete",
        "cells_total": 4,
        "cells_attempted": 3,
        "cells_failed": 1,
        "completeness": 0.75,
        "partial_score": 0.75,
        "dominant_failure_code": "timeout",
        "floor_score": 1.0,
        "floor_cells_passed": 1,
        "floor_cells_total": 1,
    }


@pytest.mark.parametrize(
    ("codes", "dominant"),
    [
        (("malformed_output", "timeout"), "timeout"),
        (("malformed_output", "timeout", "malformed_output"), "malformed_output"),
    ],
)
def test_of_two_equally_frequent_failures_the_harness_names_the_earlier_of_its_list(
    outcomes: list[Outcome], codes: tuple[str, ...], dominant: str
) -> None:
    failed = [
        replace(one, reply=None, quality=None, failure=CellFailed(code, "-"))
        for one, code in zip(outcomes[1:], codes, strict=False)
    ]
    told = [outcomes[0], *failed, *outcomes[1 + len(failed) :]]
    assert model_score("m", told)["dominant_failure_code"] == dominant


def test_a_failed_floor_cell_leaves_the_run_complete(outcomes: list[Outcome]) -> None:
    late = CellFailed("timeout", "late")
    floor = replace(outcomes[0], reply=None, quality=None, failure=late)
    score = model_score("m", [floor, *outcomes[1:]])
    assert (score["status"], score["cells_failed"]) == ("complete", 0)
    assert score["dominant_failure_code"] is None
    assert (score["floor_score"], score["floor_cells_total"]) == (0.0, 1)


def test_a_job_without_floor_tasks_has_no_floor_score(outcomes) -> None:
    score = model_score("m", outcomes[1:])
    names = ("floor_score", "floor_cells_passed", "floor_cells_total")
    assert [score[name] for name in names] == [None] * 3
    told = build_bundle(JOB, outcomes[1:], RULES.provenance, Hardware(24), sign)[
        "summary.md"
    ].decode()
    assert ", no floor tasks.\n" in told


def test_the_summary_shows_each_score_and_what_failed(outcomes: list[Outcome]) -> None:
    shown = [replace(one, quality=1.0) for one in outcomes]
    shown[1] = replace(shown[1], failure=CellFailed("timeout", "late"))
    shown[2] = replace(shown[2], quality=None)
    text = build_bundle(JOB, shown, RULES.provenance, Hardware(24), sign)["summary.md"].decode()
    assert text.startswith("# Llama-3.3-70B-Instruct (q4_k_m)\n")
    assert ", floor 1 of 1.\n" in text
    assert "| capital | terse | failed: timeout |" in text
    assert "| capital | kind | not scored |" in text
    assert "| sum | kind | 1.00 |" in text


@pytest.mark.parametrize(
    ("vram_gb", "model"),
    [(8, "RTX 4060"), (10, "RTX 4070"), (24, "RTX 4090"), (48, "RTX 6000"), (640, "H100")],
)
def test_the_hardware_is_a_card_of_the_declared_size(vram_gb: int, model: str) -> None:
    snapshot = Hardware(vram_gb).snapshot()
    assert model in snapshot["gpu_model"]
    assert snapshot["vram_mb"] == vram_gb * 1024


def test_a_mixture_of_experts_is_measured_by_its_active_parameters(outcomes) -> None:
    job = replace(JOB, model={**JOB.model, "active_parameter_count_b": 10.0})
    record = build_result(job, outcomes, RULES.provenance, Hardware(24))["records"][1]
    assert record["flops_per_token_theoretical"] == 20e9
    assert record["peak_vram_mb"] == 5888  # 10e9 * 4 bits * 1.15
    assert build_result(JOB, outcomes, {}, Hardware(24))["records"][1]["peak_vram_mb"] == 24 * 1024


def accept(bundle: dict[str, bytes]) -> dict:
    """The server's own checks of a bundle, the signature apart."""
    digests = {name: hashlib.sha256(raw).hexdigest() for name, raw in bundle.items()}
    check_names(list(bundle), SIGNATURE)
    manifest = check_manifest(bundle["manifest.json"], digests, RUN_ID)
    result = parse_result(bundle["result.json"])
    check_binding(result, HandedOut.from_payload(RUN_ID, BODY))
    check_agreement(manifest, result)
    check_archivable(manifest, result)
    return result


def test_the_server_accepts_the_bundle(bundle: dict[str, bytes]) -> None:
    assert accept(bundle)["run_status"] == "complete"


def test_the_server_accepts_failed_and_unscored_cells(outcomes: list[Outcome]) -> None:
    late = replace(outcomes[0], reply=None, quality=None, failure=CellFailed("timeout", "late"))
    unscored = replace(outcomes[1], quality=None)
    mixed = [late, unscored, *outcomes[2:]]
    result = accept(build_bundle(JOB, mixed, RULES.provenance, Hardware(24), sign))
    assert result["records"][0]["failure_code"] == "timeout"


def test_a_task_needs_no_domain_and_no_expectation(io_loop) -> None:
    bare = {"id": "bare", "user_prompt": "Why?", "scorer": "judge", "tier": "main"}
    job = replace(JOB, tasks=[bare], floor_tasks=[])
    asked = io_loop.run_sync(lambda: execute(job, RULES, lambda _: None))
    records = build_result(job, asked, RULES.provenance, Hardware(24))["records"]
    assert [(one["domain"], one["quality_heuristic"]) for one in records] == [(None, None)] * 2


def test_the_signature_of_a_throwaway_sigstore_verifies(outcomes, tmp_path: Path) -> None:
    sigstore = ThrowawaySigstore.create(tmp_path / "sigstore")
    subject = EmailSubject("runner@example.org", "https://accounts.example.org")
    bundle = build_bundle(
        JOB, outcomes, RULES.provenance, Hardware(24), lambda blob: sigstore.sign(blob, subject)
    )
    policy = load_policy(ROOT / "config" / "signers.yaml")
    signer = Signer(subject.identity, subject.issuer)
    evidence = BundleVerifier(sigstore.trusted_root, policy).verify(
        bundle["result.json"], bundle["signature.sigstore.json"], signer
    )
    assert (evidence.identity, evidence.issuer) == (signer.identity, signer.issuer)
