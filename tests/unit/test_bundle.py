"""A bundle against itself: names, manifest and digests, the result's schema (steps 1, 2, 4)."""

import json
from typing import Any

import pytest

from broker.documents import strict_json
from broker.documents.schemas import Schema
from broker.errors import BrokerError, DigestMismatch, InvalidBundle, RunMismatch, Violation
from broker.jobs.job import MAX_CELLS
from broker.results import bundle
from broker.results.bundle import (
    CAPS,
    OPTIONAL,
    REQUIRED,
    SIGNATURE,
    SIGNATURES,
    check_names,
    parse_result,
)
from broker.results.manifest import check_manifest
from tests.support.result_factory import (
    bundle_files,
    digests,
    job_payload,
    manifest_for,
    result_for,
)

RUN_ID = "0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11"
OTHER_RUN = "3d0f8a52-1b7e-4a57-8f0c-5f0f6a1c2b33"


@pytest.fixture
def result() -> dict[str, Any]:
    return result_for(RUN_ID, job_payload())


@pytest.fixture
def files(result: dict[str, Any]) -> dict[str, bytes]:
    return bundle_files(result, b'{"a": "signature"}')


def pointers(error: pytest.ExceptionInfo[BrokerError]) -> list[str]:
    return [violation.pointer for violation in error.value.violations]


def rewritten(of: dict[str, bytes], /, **changes: Any) -> bytes:
    """The manifest with some members replaced; None removes one."""
    manifest = json.loads(of["manifest.json"]) | changes
    return json.dumps({k: v for k, v in manifest.items() if v is not None}).encode()


# Step 1: names


def test_every_file_has_a_cap() -> None:
    assert CAPS.keys() == REQUIRED | OPTIONAL | SIGNATURES
    assert CAPS["signature.sigstore.json"] == 128 * 1024


@pytest.mark.parametrize("extra", [[], ["dashboard.html"]])
def test_the_required_files_are_a_bundle_with_and_without_a_dashboard(extra: list[str]) -> None:
    check_names([*REQUIRED, SIGNATURE, *extra], SIGNATURE)


@pytest.mark.parametrize("missing", sorted({*REQUIRED, SIGNATURE}))
def test_a_missing_part_is_named(missing: str) -> None:
    with pytest.raises(InvalidBundle) as refused:
        check_names({*REQUIRED, SIGNATURE} - {missing}, SIGNATURE)
    assert [v.detail for v in refused.value.violations] == [f"{missing} is missing"]


@pytest.mark.parametrize(
    "name",
    [
        "bundle.tar",
        "bundle.zip",
        "../result.json",
        "a/result.json",
        "RESULT.JSON",
        "result.json\n",
        "",
    ],
)
def test_archives_paths_and_unknown_parts_are_refused(name: str) -> None:
    with pytest.raises(InvalidBundle) as refused:
        check_names([*REQUIRED, SIGNATURE, name], SIGNATURE)
    assert [v.detail for v in refused.value.violations] == [f"{json.dumps(name)} is unknown"]


def test_a_part_twice_is_refused() -> None:
    with pytest.raises(InvalidBundle) as refused:
        check_names([*REQUIRED, SIGNATURE, "result.json"], SIGNATURE)
    assert [v.detail for v in refused.value.violations] == ['"result.json" is there twice']


def test_many_unknown_parts_with_long_names_stay_a_short_answer() -> None:
    with pytest.raises(InvalidBundle) as refused:
        check_names([*REQUIRED, *("x" * 10_000 + str(n) for n in range(200))], SIGNATURE)
    assert len(refused.value.violations) == 50
    assert all(len(v.detail) <= 200 for v in refused.value.violations)


# Step 2: manifest and digests


def test_a_manifest_of_the_files_is_returned(files: dict[str, bytes]) -> None:
    manifest = check_manifest(files["manifest.json"], digests(files), RUN_ID)
    assert manifest["schema_version"] == "bakeoff-results/v1"


def test_digests_may_be_plain_hex(files: dict[str, bytes]) -> None:
    plain = {name: digest for name, digest in digests(files).items() if name != "manifest.json"}
    check_manifest(rewritten(files, files=plain), digests(files), RUN_ID)


def test_an_older_manifest_that_nests_the_run_is_understood(files: dict[str, bytes]) -> None:
    nested = {"run_id": RUN_ID, "timestamp": "2025-11-23T12:00:00Z"}
    older = rewritten(files, run_id=None, timestamp=None, bundle=nested, signature=None)
    check_manifest(older, digests(files), RUN_ID)


@pytest.mark.parametrize("name", ["result.json", "summary.md", "signature.sigstore.json"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_changed_byte_in_any_file_is_a_digest_mismatch(files, name: str, nested: bool) -> None:
    changed = files | {name: files[name] + b" "}
    listed = {k: v for k, v in digests(files).items() if k != "manifest.json"}
    manifest = files["manifest.json"] if nested else rewritten(files, files=listed)
    with pytest.raises(DigestMismatch) as refused:
        check_manifest(manifest, digests(changed), RUN_ID)
    assert pointers(refused) == [f"/files/{name}/sha256" if nested else f"/files/{name}"]


def test_a_dashboard_is_digested_like_the_rest(files, result) -> None:
    files["dashboard.html"] = b"<p>"
    others = {name: content for name, content in files.items() if name != "manifest.json"}
    manifest = json.dumps(manifest_for(result, others)).encode()
    check_manifest(manifest, digests(files), RUN_ID)
    with pytest.raises(DigestMismatch):
        check_manifest(manifest, digests(files | {"dashboard.html": b"<b>"}), RUN_ID)


def test_a_submitted_file_the_manifest_does_not_list_is_refused(files) -> None:
    with pytest.raises(InvalidBundle) as refused:
        check_manifest(files["manifest.json"], digests(files | {"dashboard.html": b""}), RUN_ID)
    assert pointers(refused) == ["/files"]


@pytest.mark.parametrize("name", ["manifest.json", "dashboard.html", "../../etc/passwd"])
def test_a_listed_file_that_is_not_there_is_refused(files, name: str) -> None:
    listed = json.loads(files["manifest.json"])["files"] | {name: {"sha256": "a" * 64}}
    with pytest.raises(InvalidBundle) as refused:
        check_manifest(rewritten(files, files=listed), digests(files), RUN_ID)
    assert pointers(refused) == ["/files/" + name.replace("/", "~1")]


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": OTHER_RUN},
        {"bundle": {"run_id": OTHER_RUN, "timestamp": "2025-11-23T12:00:00Z"}},
        {
            "run_id": None,
            "timestamp": None,
            "bundle": {"run_id": OTHER_RUN, "timestamp": "2025-11-23T12:00:00Z"},
        },
    ],
)
def test_the_manifest_of_another_run_is_a_run_mismatch(files, changes: dict[str, Any]) -> None:
    with pytest.raises(RunMismatch):
        check_manifest(rewritten(files, **changes), digests(files), RUN_ID)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"schema_version": "bakeoff-results/v2"}, "/schema_version"),
        ({"files": None}, ""),
        ({"signature": {"kind": "pgp", "signed_file": "result.json"}}, "/signature/kind"),
        (
            {"signature": {"kind": "sigstore-bundle", "signed_file": "summary.md"}},
            "/signature/signed_file",
        ),
    ],
)
def test_a_manifest_outside_its_schema_is_refused_by_pointer(files, changes, place: str) -> None:
    with pytest.raises(InvalidBundle) as refused:
        check_manifest(rewritten(files, **changes), digests(files), RUN_ID)
    assert pointers(refused) == [place]


@pytest.mark.parametrize("text", [b"", b"[]", b'{"run_id": "a", "run_id": "a"}', b"\xff\xfe{\x00"])
def test_a_manifest_that_is_not_strict_json_is_an_invalid_bundle(files, text: bytes) -> None:
    with pytest.raises(InvalidBundle, match=r"manifest\.json"):
        check_manifest(text, digests(files), RUN_ID)


# Step 4: the result's text and schema


def test_a_valid_result_is_returned(files, result) -> None:
    assert parse_result(files["result.json"]) == result


@pytest.mark.parametrize(
    "number", [b"NaN", b"Infinity", b"1e999", b"9" * 5000], ids=["nan", "inf", "overflow", "long"]
)
def test_a_score_that_is_no_finite_number_is_refused(files, number: bytes) -> None:
    text = files["result.json"].replace(
        b'"quality_heuristic": 1.0', b'"quality_heuristic": ' + number
    )
    with pytest.raises(InvalidBundle, match=r"result\.json"):
        parse_result(text)


@pytest.mark.parametrize("text", [rb"\u0000", rb"\ud800"])
def test_an_unstorable_character_in_an_answer_is_refused_by_pointer(files, text: bytes) -> None:
    broken = files["result.json"].replace(b'"text": "4"', b'"text": "' + text + b'"', 1)
    with pytest.raises(InvalidBundle) as refused:
        parse_result(broken)
    assert pointers(refused) == ["/records/0/text"]


def test_schema_violations_come_with_pointers(result) -> None:
    result["records"][3]["quality_heuristic"] = "1.0"
    result["records"][4].pop("model_id")
    with pytest.raises(InvalidBundle) as refused:
        parse_result(json.dumps(result).encode())
    assert pointers(refused) == ["/records/3/quality_heuristic", "/records/4"]


def test_more_records_than_any_job_has_are_refused(result) -> None:
    records = [{}] * (MAX_CELLS + 1)
    with pytest.raises(InvalidBundle) as refused:
        parse_result(json.dumps(result | {"records": records}).encode())
    assert pointers(refused)[:2] == ["/records", "/records/0"]


def test_far_more_records_than_the_job_has_cells_are_counted_before_any_is_looked_at(
    result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Schema, "check", None)  # whoever calls it fails
    text = json.dumps(result | {"records": [{}] * 100_000}).encode()
    with pytest.raises(RunMismatch) as refused:
        parse_result(text, 24)
    assert refused.value.violations == (
        Violation("/records", "has 100000 records: send one for each of the 24 cells"),
    )


def test_a_few_records_too_many_are_named_one_by_one_later(result) -> None:
    """50 are, so 51 are counted only."""
    cells = len(result["records"])
    result["records"] += result["records"][:1] * 50
    text = json.dumps(result).encode()
    assert parse_result(text, cells) == result
    with pytest.raises(RunMismatch):
        parse_result(text, cells - 1)


def test_a_million_tiny_records_are_refused_before_they_are_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strict_json, "json", None)  # whoever parses fails
    text = b'{"records":[' + b",".join([b'{"a":1}'] * 1_000_000) + b"]}"
    with pytest.raises(InvalidBundle) as refused:
        parse_result(text, 24)
    assert str(refused.value) == ("result.json has more than 1000000 values.")
    assert refused.value.violations == (bundle.TOO_MANY,)
    assert "/records" in bundle.TOO_MANY.detail


def test_a_small_legacy_payload_is_not_a_submission() -> None:
    legacy = {"run_id": RUN_ID, "timestamp": "2025-11-23T12:00:00Z", "models": [], "hardware": {}}
    with pytest.raises(InvalidBundle):
        parse_result(json.dumps(legacy).encode())
