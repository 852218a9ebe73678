"""`results verify --dir` on bundles that never were in a queue: what it checks without a job."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.cli_admin import Outcome, Shell
from tests.support.fleet import SIGNER
from tests.support.harness_shapes import CONFIG, RUN, Json, harness_files, harness_result, written
from tests.support.result_factory import put, rehashed

Change = Callable[[Json], object]
WHO = ("--identity", SIGNER.identity, "--issuer", SIGNER.issuer)


def standalone() -> Json:
    """Return a run of one's own: a name, two models, and a judge that compares them."""
    job = {**RUN, "run_id": "ab-run-001", "config": copy.deepcopy(CONFIG)}
    result = harness_result(job)
    result["config"]["models"].append({**result["config"]["models"][0], "id": "m2"})
    result["config"]["judge"]["mode"] = "pairwise_all"
    result["records"] += [{**record, "model_id": "m2"} for record in result["records"]]
    result["model_scores"] += [{**score, "model_id": "m2"} for score in result["model_scores"]]
    pair = {"mode": "pairwise", "a_model": "m1", "b_model": "m2", "order": "BA", "winner": "TIE",
            "judge_raw": "TIE", "prompt_id": "plain"}  # fmt: skip
    result["judgements"] = [{**pair, "task_id": task["id"]} for task in RUN["tasks"]]
    return rehashed(result)


@pytest.fixture
def judged(tmp_path: Path, capsys: pytest.CaptureFixture[str], sigstore: ThrowawaySigstore) -> Any:
    """Write the files of a bundle into a folder of the archive, and verify it."""

    def verify(files: dict[str, bytes]) -> Outcome:
        folder = tmp_path / "submissions" / "somebody" / "ab-run-001"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        trust = ("--trusted-root", sigstore.trusted_root)
        return Shell(capsys)("results", "verify", "--dir", tmp_path, "--json", *trust, *WHO)

    return verify


def checks(outcome: Outcome) -> dict[str, str]:
    """Return the outcome of each check."""
    return {check["check"]: check["outcome"] for check in outcome.json["results"][0]["checks"]}


def test_an_unsigned_run_of_ones_own_is_told_apart_from_a_bad_one(judged) -> None:
    outcome = judged(harness_files(standalone()))
    assert outcome.code == 7
    assert outcome.json["results"][0]["outcome"] == "unsigned"
    assert outcome.json["results"][0]["verified"] is False
    found = checks(outcome)
    assert found.pop("signature") == "not checked"
    assert set(found.values()) == {"ok"}
    assert "not signed: nobody vouches for it" in outcome.err[1]


def test_signed_it_verifies(judged, sigstore: ThrowawaySigstore) -> None:
    result = standalone()
    outcome = judged(harness_files(result, sigstore.sign(written(result), SIGNER)))
    assert (outcome.code, set(checks(outcome).values())) == (0, {"ok"})


@pytest.mark.parametrize("time", ["20261125-223225", "2026-11-25T22:32:25Z", "2026-11-25T22:32:25"])
def test_both_forms_of_its_time_are_read(judged, time: str) -> None:
    assert judged(harness_files(standalone() | {"timestamp": time})).code == 7


def test_a_record_of_an_older_harness_has_no_tier_and_no_hash_of_todays_form(judged) -> None:
    result = standalone()
    result["records"] = [one for one in result["records"] if one["tier"] == "main"]
    for record in result["records"]:
        del record["tier"]
    result["provenance"]["config_hash"] = "sha256:abc"
    found = checks(judged(harness_files(result)))
    assert (found["config hash"], found["cells"]) == ("not checked", "ok")


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (put(1, "config", "server", "ctx"), "config hash"),
        (put("m3", "records", 3, "model_id"), "cells"),
        (put("m3", "judgements", 0, "b_model"), "cells"),
        (lambda result: result["records"].append(result["records"][0]), "cells"),
        (lambda result: result["records"].pop(), "cells"),
        (put({}, "records"), "result"),
        (put("yesterday", "timestamp"), "result"),
        (put([], "config", "models"), "result"),
        (put({"task_id": "t", "prompt_id": "p"}, "judgements", 0), "result"),
    ],
)
def test_a_result_that_contradicts_itself_fails(judged, change: Change, check: str) -> None:
    result = standalone()
    files = harness_files(result)
    change(result)
    files["result.json"] = written(result)
    outcome = judged(relisted(files))
    assert outcome.code == 1
    assert outcome.json["results"][0]["outcome"] == "failed"
    assert checks(outcome)[check] == "failed"


def relisted(files: dict[str, bytes], **signature: Any) -> dict[str, bytes]:
    """Return the files with a manifest that has their digests."""
    manifest = json.loads(files["manifest.json"])
    listed = {name: content for name, content in files.items() if name != "manifest.json"}
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest()} for name, content in listed.items()
    }
    manifest["signature"] |= signature
    return {**listed, "manifest.json": written(manifest)}


def test_a_signature_that_was_taken_away_is_missed(judged) -> None:
    files = harness_files(standalone())
    required = judged(relisted(files, required=True))
    assert (required.code, checks(required)["signature"]) == (1, "failed")
    named = judged(relisted(files, path="signature.sigstore.json"))
    assert (named.code, checks(named)["manifest"]) == (1, "failed")


def test_a_signature_that_is_there_is_verified_whatever_the_manifest_says(
    judged, sigstore: ThrowawaySigstore
) -> None:
    files = harness_files(standalone(), sigstore.sign(b"{}", SIGNER))
    outcome = judged(relisted(files, path=None, required=False))
    assert (outcome.code, checks(outcome)["signature"]) == (1, "failed")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.md", b"other"),
        ("manifest.json", b"{}"),
        ("result.json", b""),
        ("result.json", b"[]"),
        ("result.json", b"{"),
        ("result.json", b"[" * 5000),
        ("result.json", b'{"run_id": 1e999}'),
    ],
)
def test_whatever_the_files_hold_a_check_fails_and_nothing_breaks(
    judged, name: str, content: bytes
) -> None:
    outcome = judged({**harness_files(standalone()), name: content})
    assert (outcome.code, outcome.json["results"][0]["outcome"]) == (1, "failed")


def test_one_bad_bundle_among_unsigned_ones_is_a_failure(judged, tmp_path: Path) -> None:
    other = tmp_path / "submissions" / "somebody" / "other"
    other.mkdir(parents=True)
    for name, content in {**harness_files(standalone()), "summary.md": b"?"}.items():
        (other / name).write_bytes(content)
    outcome = judged(harness_files(standalone()))
    told = [result["outcome"] for result in outcome.json["results"]]
    assert (outcome.code, told) == (1, ["unsigned", "failed"])
