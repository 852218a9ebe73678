"""Comparison of a result with what is stored of it: digests, signer, metric rows, receipt.

Each check returns what it found, or raises `Differs` (or what the check beneath it raises).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from auth.receipts import verify_receipt
from auth.signers import SignerEvidence
from broker.errors import DigestMismatch
from broker.jobs import cells, task_rows
from broker.jobs.job import Job
from broker.results import bundle

TOLD = 5  # differences of one check


class Differs(Exception):
    """The stored data differ from the result; the message names the first differences."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The service's answers about a result, as the JSON of the admin API has them.

    `record` is the result's own page, `job` what was handed out (None: the run has left the queue),
    `rows` what the leaderboard reads; `public_url` and `receipt_keys` (kid to public key) are the
    well-known document's, the server's or a kept copy's.
    """

    record: Mapping[str, Any]
    job: Mapping[str, Any] | None
    rows: Mapping[str, Any]
    public_url: str | None
    receipt_keys: Mapping[str, str]
    kept_keys: bool = False  # a copy of the reader's, and not the server's own word


def check_digests(digests: Mapping[str, str], record: Mapping[str, Any]) -> None:
    """The files have the SHA-256 that was recorded at acceptance."""
    recorded = {file["name"]: file["sha256"] for file in record["files"]}
    _refuse(
        [
            f"{name}: SHA-256 {digests.get(name)} instead of the recorded {recorded.get(name)}"
            for name in sorted(recorded.keys() | digests.keys())
            if digests.get(name) != recorded.get(name)
        ]
    )
    if record["result_sha256"] != digests.get(bundle.RESULT):
        raise DigestMismatch("The accepted digest is not the one of result.json.")


def check_evidence(evidence: SignerEvidence, record: Mapping[str, Any]) -> None:
    """The signer, the log index and the time are those that were recorded."""
    signer = record["signer"]
    found = {
        "identity": evidence.identity,
        "issuer": evidence.issuer,
        "log_index": evidence.log_index,
        "logged_at": evidence.integrated_at,
    }
    recorded = {**signer, "logged_at": _moment(signer["logged_at"])}
    _refuse(_differences("signer", found, recorded))


def check_rows(result: dict[str, Any], job: Job, stored: Stored) -> int:
    """Compare the leaderboard's rows with the result; return their number."""
    names = {cell.prompt.content_sha256: cell for cell in task_rows.cells(stored.job or {})}
    digests = {(cell.task_id, cell.prompt_id): digest for digest, cell in names.items()}
    said = {
        digests[cell.task_id, cell.prompt_id]: {
            "score": cell.score,
            "pass_fail": cell.pass_fail,
            "failure_reason": cell.failure_reason,
            "failure_detail": cell.failure_detail,
            "gflops_per_token": cell.gflops_per_token,
        }
        for cell in cells.metrics(result, job)
    }
    kept = {row["content_sha256"]: row for row in stored.rows["model_metrics"]}
    differences = []
    for digest in said.keys() | kept.keys():
        cell = names.get(digest)
        name = f"{cell.task_id} x {cell.prompt_id}" if cell else f"prompt {digest[:16]}"
        if digest not in said or digest not in kept:
            differences.append(f"{name} is {'only' if digest in kept else 'not'} in the database")
        else:
            differences += _differences(name, said[digest], kept[digest])
    differences += _differences("hardware", cells.hardware(result), stored.rows["hardware"] or {})
    run = {"run_status": result["run_status"], "publisher_id": stored.record["runner_id"]}
    differences += _differences("run", run, stored.rows["run"] or {})
    _refuse(differences)
    return len(kept) + 1


def check_receipt(stored: Stored) -> str:
    """The receipt verifies and says what is recorded; return the kid it is signed with."""
    record = stored.record
    signed = verify_receipt(record["receipt"], stored.receipt_keys)
    names = ("run_id", "result_sha256", "trust", "rows", "runner_id", "key_fingerprint")
    differences = _differences("receipt", {name: record[name] for name in names}, signed)
    signer = {name: record["signer"][name] for name in ("identity", "issuer", "log_index")}
    differences += _differences("receipt's signer", signer, signed["signer"])
    server = {"public_url": stored.public_url}
    differences += _differences("receipt", server, signed)
    if _moment(signed.get("accepted_at")) != _moment(record["accepted_at"]):
        differences.append("receipt: accepted_at is another")
    _refuse(differences)
    return str(record["receipt"]["sig"]["kid"])


def _differences(of: str, said: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    return [
        f"{of}: {name} should be {value!r:.80}, and {kept.get(name)!r:.80} is stored"
        for name, value in said.items()
        if kept.get(name) != value
    ]


def _refuse(differences: list[str]) -> None:
    if differences:
        more = f"; and {len(differences) - TOLD} more" if len(differences) > TOLD else ""
        raise Differs("; ".join(sorted(differences)[:TOLD]) + more)


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
