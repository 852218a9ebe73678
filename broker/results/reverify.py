"""An accepted result verified again, years later, from its bytes: each check and what it found.

Nothing is believed because a submit believed it: the files are checked against each other as in the
plan of a submit (bundle.py), then against what was recorded. The certificate has expired
within minutes of signing; Sigstore's verifier asks whether it was valid when the log saw it.

A check that fails does not hide the next one, and one that could not be done says why.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from auth.errors import AuthError, SignerNotAllowed, Unverifiable
from auth.signers import SignerEvidence
from broker.documents.schemas import load_schema
from broker.errors import BrokerError, InvalidBundle, RunMismatch
from broker.jobs.job import Job
from broker.results import archived_bundles, binding, bundle
from broker.results.manifest import check_agreement, check_manifest
from broker.results.reverify_stored import (
    TOLD,
    Differs,
    Stored,
    check_digests,
    check_evidence,
    check_receipt,
    check_rows,
)
from broker.results.signatures import Signature

Value = TypeVar("Value")
Files = Mapping[str, bytes]
LEGACY = "a result of before, without records"
OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"
VERIFIED, UNSIGNED = "verified", "unsigned"  # of a whole bundle; else FAILED


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: its name, ok, failed or not checked, and what was found."""

    check: str
    outcome: str
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """The findings of one result."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """Verified; or failed; or unsigned: nothing failed, and no signature was checked."""
        if any(f.outcome == FAILED for f in self.findings):
            return FAILED
        signed = any(f.check == "signature" and f.outcome == OK for f in self.findings)
        return VERIFIED if signed else UNSIGNED

    @property
    def verified(self) -> bool:
        """Return whether nothing failed, and the signature was checked."""
        return self.outcome == VERIFIED

    def check(
        self, name: str, work: Callable[[], Value], told: Callable[[Value], str] = lambda _: ""
    ) -> Value | None:
        """Do a check and record what it found; return its value, None when it failed."""
        try:
            value = work()
        except (AuthError, BrokerError, Differs) as error:
            self.findings.append(Finding(name, FAILED, _reason(error)))
            return None
        self.findings.append(Finding(name, OK, told(value)))
        return value

    def skip(self, name: str, why: str) -> None:
        """Record that a check could not be done."""
        self.findings.append(Finding(name, NOT_CHECKED, why))


def reverify(
    files: Files, run_id: str, signature: Signature | None, stored: Stored | None
) -> Report:
    """Verify a bundle's files, and what is stored of them unless there is no server to ask.

    `signature` says who must have signed, and how; None when nobody said so.
    """
    report = Report()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if stored is not None:
        report.check(
            "stored bytes",
            lambda: check_digests(digests, stored.record),
            lambda _: "every digest is the one recorded at acceptance",
        )
    unsigned = stored is None and not files.keys() & bundle.SIGNATURES
    file = signature.file if signature else _signature_file(files)
    report.check(
        "files",
        lambda: bundle.check_names(list(files), None if unsigned else file),
        lambda _: f"{len(files)} files",
    )
    schema = archived_bundles.manifest_schema() if stored is None else None
    manifest = report.check(
        "manifest",
        lambda: check_manifest(files.get(bundle.MANIFEST, b""), digests, run_id, schema),
        lambda _: "every digest is the manifest's",
    )
    text = files.get(bundle.RESULT, b"")
    evidence = None
    if not unsigned:
        evidence = _check_signature(report, signature, text, files.get(file, b""))
    elif manifest is None:
        report.skip("signature", "the bundle has none, and no manifest that says whether it should")
    elif archived_bundles.must_be_signed(manifest):
        report.check("signature", archived_bundles.refuse_unsigned)
    else:
        report.skip("signature", "the bundle is not signed: nobody vouches for it")
    result = report.check(
        "result",
        lambda: _read_result(text, run_id, archived=stored is None),
        lambda of: (
            f"{of['run_status']}, {len(of['records'])} records" if "records" in of else LEGACY
        ),
    )
    _check_agreement(report, manifest, result)
    if stored is None:
        _check_by_itself(report, result)
    else:
        _check_stored(report, stored, result, evidence)
    return report


def _read_result(text: bytes, run_id: str, *, archived: bool) -> dict[str, Any]:
    """Read what a submit takes, and from the archive also the smaller results of before."""
    document = bundle.parse_strictly(text)
    if archived and isinstance(document, dict) and "records" not in document:
        result = load_schema("result_legacy").read(text, InvalidBundle)
    elif archived:
        result = archived_bundles.parse_result(text, document)
    else:
        result = bundle.parse_result(text)
    if result["run_id"] != run_id:
        raise RunMismatch(f"result.json is not of run {run_id}.")
    return result


def _check_by_itself(report: Report, result: dict[str, Any] | None) -> None:
    """Without a server there is no job: the result is compared with what it says itself."""
    if result is None or "records" not in result:
        report.skip("cells", "no records to look at")
        return
    if archived_bundles.can_hash(result):
        report.check(
            "config hash",
            lambda: archived_bundles.check_hash(result),
            lambda _: "is of the config beside it",
        )
    else:
        report.skip(
            "config hash", "it is of a form that this version of the harness does not write"
        )
    report.check(
        "cells",
        lambda: archived_bundles.check_cells(result),
        lambda _: f"{len(result['records'])} records of {len(result['config']['models'])} model(s)",
    )


def _check_agreement(
    report: Report, manifest: dict[str, Any] | None, result: dict[str, Any] | None
) -> None:
    if manifest is None or result is None:
        report.skip("agreement", "no manifest or no result to compare")
        return
    report.check(
        "agreement",
        lambda: check_agreement(manifest, result),
        lambda _: "what the manifest repeats of result.json is what that says",
    )


def _check_signature(
    report: Report, signature: Signature | None, result: bytes, signed: bytes
) -> SignerEvidence | None:
    if signature is None:
        report.skip("signature", "nobody said whose key must have signed (--public-key)")
        return None
    return report.check("signature", lambda: signature.verify(result, signed), _told_evidence)


def _check_stored(
    report: Report,
    stored: Stored,
    result: dict[str, Any] | None,
    evidence: SignerEvidence | None,
) -> None:
    record = stored.record
    if evidence is not None:
        report.check(
            "record",
            lambda: check_evidence(evidence, record),
            lambda _: "signer, log index and time are the recorded ones",
        )
    if result is None or stored.job is None:
        why = (
            "the run has left the queue, and its job with it" if result else "no result to compare"
        )
        report.skip("binding", why)
        report.skip("rows", why)
    else:
        _check_binding(report, stored, result, Job.from_payload(record["run_id"], {**stored.job}))
    if "sig" in record["receipt"]:
        whose = "" if stored.kept_keys else ", by the server's own word for its keys (see --keys)"
        report.check(
            "receipt",
            lambda: check_receipt(stored),
            lambda kid: f"signed with key {kid}{whose}",
        )
    else:
        report.skip("receipt", "it was given before receipts were signed")


def _check_binding(report: Report, stored: Stored, result: dict[str, Any], job: Job) -> None:
    def bound() -> bool:
        binding.check_binding(result, job)
        return True

    if report.check("binding", bound, lambda _: "every cell is of the job"):
        report.check(
            "rows",
            lambda: check_rows(result, job, stored),
            lambda count: f"{count} metric rows say what the result says",
        )
    else:
        report.skip("rows", "the result is not of this job")


def _signature_file(files: Files) -> str:
    return bundle.ENVELOPE if bundle.ENVELOPE in files else bundle.SIGNATURE


def _told_evidence(evidence: SignerEvidence) -> str:
    if evidence.integrated_at is None:
        return f"by {evidence.identity}"
    return (
        f"by {evidence.identity} of {evidence.issuer}, log index {evidence.log_index},"
        f" {evidence.integrated_at:%Y-%m-%dT%H:%M:%SZ}"
    )


def _reason(error: Exception) -> str:
    violations = getattr(error, "violations", ())
    told = [f"{v.pointer or '(whole file)'} {v.detail}" for v in violations[:TOLD]]
    if isinstance(error, SignerNotAllowed):
        told.append("name who must have signed: --identity and --issuer, or --signers FILE")
    if isinstance(error, Unverifiable):
        told.append("name the trust root of its time with --trusted-root")
    return "; ".join([str(error), *told])
