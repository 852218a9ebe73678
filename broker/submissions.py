"""Submissions: a signed bundle becomes metric rows that can be trusted, or is told why not.

The numbers are those of the design's plan of a submit. Steps 1 to 5 run in a worker, before any
transaction is open; step 6 is one transaction behind the lease's fence.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import structlog

from auth.errors import AuthError
from auth.signers import SignerEvidence
from auth.tokens import RunnerClaims
from broker import bundles, cells, task_rows
from broker.diagnosis import FINISHED, refuse_lease
from broker.errors import (
    AlreadyComplete,
    Busy,
    DigestMismatch,
    InvalidBundle,
    KeyRevoked,
    LeaseLost,
    NotFound,
    RunFinished,
    RunMismatch,
    code_of,
)
from broker.jobs import Job
from broker.lease_keys import LeaseKey, LeaseKeys
from broker.receipts import Receipts
from broker.signatures import Signature, signature_of
from broker.telemetry import Telemetry, failures_counted, outcome_of
from broker.trusted import Trusted
from broker.uploads import Spool, Upload
from config.settings import Settings
from db import admin, metrics, run_queue, submissions, tasks
from db.metrics import HardwareMetrics, ModelMetrics
from db.pool import Executor, retries
from db.run_queue import LeaseGuard

RESULT = "result.json"

Answer = TypeVar("Answer")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that passed steps 1 to 5. Only `Submissions.verify` makes one."""

    result: dict[str, Any]
    job: Job
    payload: Mapping[str, Any]
    upload: Upload
    trust: str
    signer: SignerEvidence

    @property
    def digest(self) -> str:
        """SHA-256 of result.json."""
        return self.upload.digests[RESULT]


class Submissions:
    """Takes results in."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        settings: Settings,
        keys: LeaseKeys,
        trusted: Trusted,
        receipts: Receipts,
        workers: ThreadPoolExecutor,
        telemetry: Telemetry,
    ) -> None:
        self._pool = pool
        self._keys = keys
        self._trusted = trusted
        self._receipts = receipts
        self._workers = workers
        self._telemetry = telemetry
        self._free = settings.verify_workers
        self._uploads_free = settings.uploads_max

    async def admit(self, claims: RunnerClaims, run_id: UUID) -> asyncpg.Record:
        """Step 0: may this runner hand in a result of this run at all? Return the run.

        Asked before the body is read. Raises NotFound, KeyRevoked, RunFinished, AlreadyComplete
        or LeaseLost.
        """
        run = await run_queue.find(self._pool, run_id, claims.fingerprint)
        if run is None:
            raise NotFound(f"There is no run {run_id} in the queue.")
        if not run["key_good"]:
            raise KeyRevoked
        # Before the holder is looked at: a run that ended without a result has none any more.
        if run["status"] in FINISHED and run["status"] != "COMPLETE":
            raise RunFinished
        if run["claimed_by"] != claims.runner_id:
            raise AlreadyComplete if run["status"] == "COMPLETE" else LeaseLost
        return run

    @property
    def uploads_free(self) -> int:
        """How many more uploads there is room for."""
        return self._uploads_free

    def open_spool(self) -> Spool:
        """Return where one upload may be stored. Raises Busy when as many as fit are coming in."""
        if self._uploads_free == 0:
            raise Busy("As many bundles as fit are being received: send this one again shortly.")
        self._uploads_free -= 1
        return Spool()

    def close_spool(self, spool: Spool) -> None:
        """Forget an upload that `open_spool` made room for."""
        spool.close()
        self._uploads_free += 1

    async def submit(
        self, claims: RunnerClaims, run: asyncpg.Record, upload: Upload
    ) -> tuple[asyncpg.Record, bool]:
        """Steps 1 to 6; return the submission's row and whether this call made it.

        Raises what each step refuses by (see `verify`), LeaseLost, RunFinished, AlreadyComplete,
        KeyRevoked, and Busy when as many bundles as fit are being verified.
        """
        outcomes = self._telemetry.submissions
        self._telemetry.submission_bytes.observe(upload.size)
        with failures_counted(outcomes):
            row, created = await self._submit(claims, run, upload)
        outcomes.labels("accepted" if created else "given_again").inc()
        return row, created

    async def refuse(self, claims: RunnerClaims, run_id: UUID, error: Exception) -> None:
        """Count an upload that was refused before it was whole, and record why."""
        self._telemetry.submissions.labels(outcome_of(error)).inc()
        await self._record_refusal(claims, run_id, error)

    async def _submit(
        self, claims: RunnerClaims, run: asyncpg.Record, upload: Upload
    ) -> tuple[asyncpg.Record, bool]:
        before = await self._replayed(claims, run["run_id"], upload)
        if before is not None:
            return before, False
        try:
            verified = await self.verify(claims, run, upload)
        except (AuthError, InvalidBundle, DigestMismatch, RunMismatch) as error:
            await self._record_refusal(claims, run["run_id"], error)
            raise
        return await self._accept(_guard(claims, run, upload), verified)

    async def verify(self, claims: RunnerClaims, run: asyncpg.Record, upload: Upload) -> Verified:
        """The lease, and steps 1 to 5 in a worker. Changes nothing.

        Raises LeaseLost, RunFinished, KeyRevoked, InvalidBundle, DigestMismatch, SignatureInvalid,
        SignerNotAllowed, Unverifiable, RunMismatch or Busy.
        """
        if run["lease_id"] != upload.lease_id:
            await refuse_lease(self._pool, _guard(claims, run, upload))
        # Once: what has begun ends with this verifier, also after a reload.
        signature = signature_of(run, claims.runner_id, self._trusted.verifier)
        return await self._in_worker(lambda: _verify(signature, upload, run))

    async def receipt(self, run_id: UUID) -> asyncpg.Record | None:
        """Return the accepted submission of a run."""
        return await submissions.find(self._pool, run_id)

    async def _in_worker(self, work: Callable[[], Answer]) -> Answer:
        if self._free == 0:
            raise Busy
        self._free -= 1
        try:
            with self._telemetry.verify_seconds.time():
                return await asyncio.get_running_loop().run_in_executor(self._workers, work)
        finally:
            self._free += 1

    async def _replayed(
        self, claims: RunnerClaims, run_id: UUID, upload: Upload
    ) -> asyncpg.Record | None:
        """Return the submission that this upload already is; raise if it is another one."""
        before = await submissions.find(self._pool, run_id)
        if before is None:
            return None
        same = before["result_sha256"] == upload.digests.get(RESULT)
        if not same or before["runner_id"] != claims.runner_id:
            raise AlreadyComplete
        return before

    @retries
    async def _accept(self, guard: LeaseGuard, verified: Verified) -> tuple[asyncpg.Record, bool]:
        """Step 6: one transaction behind the fence."""
        async with self._pool.acquire() as connection, connection.transaction():
            run = await run_queue.complete(connection, guard, verified.digest)
            row = None
            if run is not None:
                row = await _write_rows(connection, guard, run, verified, self._receipts)
        if run is None or row is None:
            return await self._refused_by_fence(guard, verified), False
        self._keys.drop([LeaseKey(run["queue_id"], run["lease_seq"])])
        return row, True

    async def _refused_by_fence(self, guard: LeaseGuard, verified: Verified) -> asyncpg.Record:
        """Return the receipt if the same bundle got in beside us; raise what the fence refused."""
        before = await submissions.find(self._pool, guard.run_id)
        if before is None:
            await refuse_lease(self._pool, guard)
        same = before["result_sha256"] == verified.digest
        if not same or before["runner_id"] != guard.runner_id:
            raise AlreadyComplete
        return before

    async def _record_refusal(self, claims: RunnerClaims, run_id: UUID, error: Exception) -> None:
        """Record that this runner's bundle was refused, and why."""
        log.info("submit.refused", run_id=str(run_id), runner_id=claims.runner_id,
                 code=code_of(error))  # fmt: skip
        await submissions.refuse(
            self._pool, run_id, claims.runner_id, claims.fingerprint, code_of(error), str(error)
        )


def _guard(claims: RunnerClaims, run: asyncpg.Record, upload: Upload) -> LeaseGuard:
    return LeaseGuard(run["run_id"], upload.lease_id, claims.runner_id, claims.fingerprint)


def _verify(signature: Signature, upload: Upload, run: asyncpg.Record) -> Verified:
    job = Job.from_payload(str(run["run_id"]), run["job"])
    # 1. Required files are there, and no others.
    bundles.check_names(list(upload.digests), signature.file)
    # 2. Every file is the one the manifest names, and the manifest is of this run.
    bundles.check_manifest(upload.read("manifest.json"), upload.digests, job.run_id)
    # 3. The signature holds over result.json, by the signer of this runner.
    text = upload.read(RESULT)
    signer = signature.verify(text, upload.read(signature.file))
    # 4. Strict JSON of the result's schema.
    result = bundles.parse_result(text)
    # 5. The result belongs to the job that was handed out.
    bundles.check_binding(result, job)
    return Verified(result, job, run["job"], upload, signature.trust, signer)


async def _write_rows(
    connection: Executor,
    guard: LeaseGuard,
    run: asyncpg.Record,
    verified: Verified,
    receipts: Receipts,
) -> asyncpg.Record:
    """Write metrics, hardware, submission, `runs` and the audit row of an accepted result."""
    model_metrics = await _model_metrics(connection, verified)
    await metrics.add_model_metrics(connection, guard.run_id, run["model_id"], model_metrics)
    await metrics.add_hardware_metrics(connection, guard.run_id, _hardware(verified.result))
    accepted = submissions.Accepted(
        run_id=guard.run_id,
        receipt_id=uuid4(),
        lease_seq=run["lease_seq"],
        runner_id=guard.runner_id,
        fingerprint=guard.fingerprint,
        result_sha256=verified.digest,
        trust=verified.trust,
        signer_identity=verified.signer.identity,
        signer_issuer=verified.signer.issuer,
        log_index=verified.signer.log_index,
        logged_at=verified.signer.integrated_at,
        model_metrics=len(model_metrics),
        hardware_metrics=1,
        accepted_at=run["completed_at"],
    )
    upload = verified.upload
    files = [
        submissions.StoredFile(name, digest, upload.read(name))
        for name, digest in upload.digests.items()
    ]
    row = await submissions.add(connection, accepted, receipts.give(accepted), files)
    await submissions.publish(
        connection,
        guard.run_id,
        run_status=verified.result["run_status"],
        at=run["completed_at"],
        runner_id=guard.runner_id,
        provenance=_provenance(verified.result),
    )
    await admin.audit(
        connection,
        f"runner:{guard.runner_id}",
        "submit.accept",
        run_id=guard.run_id,
        runner_id=guard.runner_id,
        result_sha256=verified.digest,
        lease_seq=run["lease_seq"],
    )
    return row


async def _model_metrics(connection: Executor, verified: Verified) -> list[ModelMetrics]:
    """Return a row per cell of the result, with the prompt_id its text has in upstream's table."""
    digests = {
        (cell.task_id, cell.prompt_id): cell.prompt.content_sha256
        for cell in task_rows.cells(verified.payload)
    }
    prompt_ids = await tasks.prompt_ids(connection, list(digests.values()))
    return [
        ModelMetrics(
            prompt_ids[digests[cell.task_id, cell.prompt_id]],
            cell.score,
            cell.pass_fail,
            cell.failure_reason,
            cell.failure_detail,
            cell.gflops_per_token,
        )
        for cell in cells.metrics(verified.result, verified.job)
    ]


def _hardware(result: dict[str, Any]) -> HardwareMetrics:
    return HardwareMetrics(
        **cells.hardware(result), peak_vram_mb=cells.peak_vram_mb(result), measured_tflops=None
    )


def _provenance(result: Mapping[str, Any]) -> dict[str, str | None]:
    provenance = result["provenance"]
    return {
        "runner_version": provenance.get("runner_version"),
        "prompt_git_hash": (provenance.get("git") or {}).get("sha"),
    }
