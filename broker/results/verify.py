"""Steps 1 to 5 of a submit: a bundle is verified, and what becomes rows is taken from it.

Runs in a worker process (broker/concurrency/workers.py): pure work over bytes, without database or
clock.
What it returns is small whatever the result's size is, and the parsed result ends here.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any
from uuid import UUID

import orjson

from auth.signers import SignerEvidence
from broker.jobs import cells, task_rows
from broker.jobs.job import Job
from broker.jobs.measurements import check_measurements
from broker.results import binding, bundle
from broker.results.archive_rules import check_archivable
from broker.results.manifest import check_agreement, check_manifest
from broker.results.signatures import Signature
from broker.results.uploads import Upload
from db.metrics import HardwareMetrics, MetricsText

CELLS_PER_TEXT = 2000  # rows of one statement: some 50 ms of PostgreSQL, far from its time-out


@dataclass(frozen=True, slots=True)
class VerificationTask:
    """Input of a verification: the run, its job (JSON text as stored), how a result is signed."""

    run_id: str
    job: str
    signature: Signature


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that passed steps 1 to 5. Only `verify` makes one."""

    digest: str  # SHA-256 of result.json
    trust: str
    signer: SignerEvidence
    run_status: str
    runner_version: str | None
    prompt_git_hash: str | None
    hardware: HardwareMetrics
    cells: tuple[MetricsText, ...]


def verify_files(
    files: Mapping[str, io.BufferedReader], handed: VerificationTask, digests: Mapping[str, str]
) -> Verified:
    """Verify a bundle in a worker, by its open files and the digests of all that were sent."""
    return verify(handed, Upload(UUID(int=0), dict(digests), dict(files), 0))


def verify(handed: VerificationTask, upload: Upload) -> Verified:
    """Verify a bundle.

    Raises InvalidBundle, DigestMismatch, RunMismatch, SignatureInvalid, SignerNotAllowed or
    Unverifiable.
    """
    signature, payload = handed.signature, json.loads(handed.job)
    job = Job.from_payload(handed.run_id, payload)
    # 1. Required files are there, and no others.
    bundle.check_names(list(upload.digests), signature.file)
    # 2. Every file is the one the manifest names, and the manifest is of this run.
    manifest = check_manifest(upload.read(bundle.MANIFEST), upload.digests, job.run_id)
    # 3. The signature holds over result.json, by the signer of this runner.
    text = upload.read(bundle.RESULT)
    signer = signature.verify(text, upload.read(signature.file))
    # 4. Strict JSON of the result's schema, and numbers that can be.
    result = bundle.parse_result(text, job.cell_count)
    check_measurements(result)
    # 5. The result belongs to the job that was handed out, and the manifest to the result.
    binding.check_binding(result, job)
    check_agreement(manifest, result)
    # What is accepted here is exported one day: the archive must take it.
    check_archivable(manifest, result)
    provenance = result["provenance"]
    return Verified(
        digest=upload.digests[bundle.RESULT],
        trust=signature.trust,
        signer=signer,
        run_status=result["run_status"],
        runner_version=provenance.get("runner_version"),
        prompt_git_hash=(provenance.get("git") or {}).get("sha"),
        hardware=HardwareMetrics(**cells.hardware(result)),
        cells=tuple(_texts(cells.metrics(result, job), payload)),
    )


def _texts(
    metrics: tuple[cells.CellMetrics, ...], payload: Mapping[str, Any]
) -> Iterator[MetricsText]:
    """Give the rows as PostgreSQL reads them, each with the digest of its prompt."""
    digests = {
        (cell.task_id, cell.prompt_id): cell.prompt.content_sha256
        for cell in task_rows.cells(payload)
    }
    rows = (
        {
            "content_sha256": digests[cell.task_id, cell.prompt_id],
            "score": cell.score,
            "pass_fail": cell.pass_fail,
            "failure_reason": cell.failure_reason,
            "failure_detail": cell.failure_detail,
            "gflops_per_token": cell.gflops_per_token,
        }
        for cell in metrics
    )
    while some := list(islice(rows, CELLS_PER_TEXT)):
        yield MetricsText(len(some), orjson.dumps(some).decode())
