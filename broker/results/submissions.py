"""Submissions: a signed bundle becomes metric rows that can be trusted, or is told why not.

The numbers are those of the design's plan of a submit. Steps 1 to 5 run in a worker process, before
any transaction is open; step 6 is one transaction behind the lease's fence. This process never
holds a file or a parsed result: whatever their size, heartbeats do not wait for them.
"""

import asyncio
from uuid import UUID, uuid4

import asyncpg
import structlog

from auth.errors import AuthError, Unverifiable
from auth.tokens import RunnerIdentity
from broker.audit.log import Actor, record
from broker.concurrency.shares import RunnerShares
from broker.concurrency.workers import WorkerLost, Workers
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
    Unavailable,
    code_of,
)
from broker.leases.breaker import RunnerBreaker
from broker.leases.lease_keys import LeaseKey, LeaseKeys
from broker.leases.lease_refusal import FINISHED, raise_lease_error
from broker.results.active_verifier import ActiveVerifier
from broker.results.bundle import MANIFEST, RESULT
from broker.results.receipts import Receipts
from broker.results.signatures import Signature, signature_of
from broker.results.uploads import Spool, Upload
from broker.results.verify import VerificationTask, Verified, verify_files
from broker.telemetry import Telemetry, failures_counted, outcome_of
from config.settings import Settings
from db import metrics, models, run_queue, submissions
from db.pool import Executor, retries
from db.run_queue import LeaseGuard

# One transaction that waits for a lock must not hold up all others.
WRITING_MIN = 2

log = structlog.get_logger()


class Submissions:
    """Takes results in."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        settings: Settings,
        keys: LeaseKeys,
        trusted: ActiveVerifier,
        receipts: Receipts,
        workers: Workers,
        telemetry: Telemetry,
        breaker: RunnerBreaker,
        shares: RunnerShares,
    ) -> None:
        self._pool = pool
        self._shares = shares
        self._keys = keys
        self._breaker = breaker
        self._trusted = trusted
        self._receipts = receipts
        self._workers = workers
        self._telemetry = telemetry
        self._room = settings.verify_max
        self._turns = asyncio.Semaphore(settings.verify_processes)
        # Thousands of rows each: of many at once, PostgreSQL would let every heartbeat wait.
        self._writing = asyncio.Semaphore(max(WRITING_MIN, settings.verify_processes))
        self._uploads_free = settings.uploads_max

    async def admit(self, runner: RunnerIdentity, run_id: UUID) -> asyncpg.Record:
        """Step 0: may this runner hand in a result of this run at all? Return the run.

        Asked before the body is read. Raises NotFound, KeyRevoked, RunFinished, AlreadyComplete
        or LeaseLost.
        """
        run = await run_queue.find_for_key(self._pool, run_id, runner.fingerprint)
        if run is None:
            raise _no_run(run_id)
        if not run["key_good"]:
            raise KeyRevoked
        # Before the holder is looked at: a run that ended without a result has none any more.
        if run["status"] in FINISHED and run["status"] != "COMPLETE":
            raise RunFinished
        if run["claimed_by"] != runner.runner_id:
            raise AlreadyComplete if run["status"] == "COMPLETE" else LeaseLost
        return run

    @property
    def uploads_free(self) -> int:
        """Return how many more uploads may begin."""
        return self._uploads_free

    def open_spool(self, runner_id: str) -> Spool:
        """Return where one upload of a runner may be stored.

        Raises Busy when as many as fit are coming in, or this runner's share of them.
        """
        if self._uploads_free == 0:
            raise Busy("As many bundles as fit are being received: send this one again shortly.")
        if not self._shares.uploads.take(runner_id):
            raise Busy(
                f"{self._shares.uploads.most} bundles of this runner are being received, which is"
                " its share: finish one of them first."
            )
        self._uploads_free -= 1
        return Spool()

    def close_spool(self, runner_id: str, spool: Spool) -> None:
        """Forget an upload that `open_spool` made room for."""
        spool.close()
        self._shares.uploads.give_back(runner_id)
        self._uploads_free += 1

    async def submit(
        self, runner: RunnerIdentity, run: asyncpg.Record, upload: Upload
    ) -> tuple[asyncpg.Record, bool]:
        """Steps 1 to 6; return the submission's row and whether this call made it.

        Raises what each step refuses by (see `verify`), LeaseLost, RunFinished, AlreadyComplete,
        KeyRevoked, and Busy when as many bundles as fit are being verified.
        """
        outcomes = self._telemetry.submissions
        self._telemetry.submission_bytes.observe(upload.size)
        with failures_counted(outcomes):
            row, created = await self._submit(runner, run, upload)
        outcomes.labels("accepted" if created else "replayed").inc()
        return row, created

    async def refuse(self, runner: RunnerIdentity, run_id: UUID, error: Exception) -> None:
        """Count an upload that was refused before it was whole, and record why."""
        self._telemetry.submissions.labels(outcome_of(error)).inc()
        await self._record_refusal(runner, run_id, error)

    async def _submit(
        self, runner: RunnerIdentity, run: asyncpg.Record, upload: Upload
    ) -> tuple[asyncpg.Record, bool]:
        before = await self._replayed(runner, run["run_id"], upload)
        if before is not None:
            return before, False
        try:
            verified = await self.verify(runner, run, upload)
        except (AuthError, InvalidBundle, DigestMismatch, RunMismatch) as error:
            await self._record_refusal(runner, run["run_id"], error)
            raise
        accepted = await self._accept(_guard(runner, run, upload), verified, upload)
        if not any(cells.rows for cells in verified.cells):
            await self._breaker.check(runner.runner_id)  # a result, and nothing measured
        return accepted

    async def verify(self, runner: RunnerIdentity, run: asyncpg.Record, upload: Upload) -> Verified:
        """The lease, and steps 1 to 5 in a worker. Changes nothing.

        Raises LeaseLost, RunFinished, KeyRevoked, InvalidBundle, DigestMismatch, SignatureInvalid,
        SignerNotAllowed, Unverifiable, RunMismatch, Busy, or Unavailable when the worker is lost.
        """
        if run["lease_id"] != upload.lease_id:
            await raise_lease_error(self._pool, _guard(runner, run, upload))
        # Once: what has begun ends with this verifier, also after a reload.
        signature = signature_of(run, runner.runner_id, self._trusted.verifier)
        try:
            return await self._in_worker(runner.runner_id, run["run_id"], signature, upload)
        except Unverifiable as error:
            raise Unverifiable(
                f"{error}: ask this server's operator to refresh it, and submit again"
            ) from None

    async def receipt(self, run_id: UUID) -> asyncpg.Record | None:
        """Return the accepted submission of a run."""
        return await submissions.find(self._pool, run_id)

    def warm(self) -> None:
        """Have a worker ready, behind the start of the server."""
        self._workers.warm()

    async def _in_worker(
        self, runner_id: str, run_id: UUID, signature: Signature, upload: Upload
    ) -> Verified:
        if self._room == 0:
            raise Busy
        if not self._shares.verifications.take(runner_id):
            raise Busy(
                "As many bundles of this runner as are its share are being verified: send this one"
                " again in a few seconds."
            )
        self._room -= 1
        try:
            async with self._turns:
                with self._telemetry.verify_seconds.time():
                    handed = VerificationTask(str(run_id), await self._job(run_id), signature)
                    return await self._verify(handed, upload)
        except WorkerLost as error:
            self._telemetry.workers_lost.inc()
            log.error("worker.lost", run_id=str(run_id), problem=str(error))
            raise Unavailable(
                "The process that verified this bundle was lost: send it again in a few seconds."
            ) from error
        finally:
            self._room += 1
            self._shares.verifications.give_back(runner_id)

    async def _verify(self, handed: VerificationTask, upload: Upload) -> Verified:
        """Steps 1 to 5 in a worker. Raises what `verify.verify` raises, and WorkerLost."""
        # Only what the steps read. Descriptors, not bytes: the files have no names, and a copy of
        # 16 MiB would go through this process.
        read = (MANIFEST, RESULT, handed.signature.file)
        files = {name: upload.files[name].fileno() for name in read if name in upload.files}
        return await self._workers.call(verify_files, handed, upload.digests, files=files)

    async def _job(self, run_id: UUID) -> str:
        """Return a job as text, in the turn of its worker: so many are in memory, and no more."""
        job = await run_queue.job_of(self._pool, run_id)
        if job is None:
            raise _no_run(run_id)
        return job

    async def _replayed(
        self, runner: RunnerIdentity, run_id: UUID, upload: Upload
    ) -> asyncpg.Record | None:
        """Return the submission that this upload already is; raise if it is another one."""
        before = await submissions.find(self._pool, run_id)
        if before is None:
            return None
        same = before["result_sha256"] == upload.digests.get(RESULT)
        if not same or before["runner_id"] != runner.runner_id:
            raise AlreadyComplete
        return before

    @retries
    async def _accept(
        self, guard: LeaseGuard, verified: Verified, upload: Upload
    ) -> tuple[asyncpg.Record, bool]:
        """Step 6: one transaction behind the fence."""
        async with (
            self._writing,
            self._pool.acquire() as connection,
            connection.transaction(),
        ):
            run = await run_queue.complete(connection, guard, verified.digest)
            row = None
            if run is not None:
                row = await _write_rows(connection, guard, run, verified, upload, self._receipts)
        if run is None or row is None:
            return await self._refused_by_fence(guard, verified), False
        self._keys.drop([LeaseKey(run["queue_id"], run["lease_seq"])])
        return row, True

    async def _refused_by_fence(self, guard: LeaseGuard, verified: Verified) -> asyncpg.Record:
        """Return the receipt if the same bundle got in beside us; raise what the fence refused."""
        before = await submissions.find(self._pool, guard.run_id)
        if before is None:
            await raise_lease_error(self._pool, guard)
        same = before["result_sha256"] == verified.digest
        if not same or before["runner_id"] != guard.runner_id:
            raise AlreadyComplete
        return before

    async def _record_refusal(self, runner: RunnerIdentity, run_id: UUID, error: Exception) -> None:
        """Record that this runner's bundle was refused, and why."""
        log.info("submit.refused", run_id=str(run_id), runner_id=runner.runner_id,
                 code=code_of(error))  # fmt: skip
        await submissions.refuse(
            self._pool, run_id, runner.runner_id, runner.fingerprint, code_of(error), str(error)
        )
        await self._breaker.check(runner.runner_id)


def _no_run(run_id: UUID) -> NotFound:
    return NotFound(f"There is no run {run_id} in the queue.")


def _guard(runner: RunnerIdentity, run: asyncpg.Record, upload: Upload) -> LeaseGuard:
    return LeaseGuard(
        run["run_id"], upload.lease_id, runner.runner_id, runner.fingerprint, runner.instance_id
    )


async def _write_rows(
    connection: Executor,
    guard: LeaseGuard,
    run: asyncpg.Record,
    verified: Verified,
    upload: Upload,
    receipts: Receipts,
) -> asyncpg.Record:
    """Write metrics, hardware, submission, `runs` and the audit row of an accepted result."""
    for cells in verified.cells:
        await metrics.add_model_metrics(connection, guard.run_id, run["model_id"], cells)
    await metrics.add_hardware_metrics(connection, guard.run_id, verified.hardware)
    if verified.hardware.peak_vram_mb is not None:
        await models.lower_need(connection, guard.run_id, verified.hardware.peak_vram_mb)
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
        model_metrics=sum(cells.rows for cells in verified.cells),
        hardware_metrics=1,
        accepted_at=run["completed_at"],
    )
    files = [
        submissions.StoredFile(name, digest, upload.files[name].fileno())
        for name, digest in upload.digests.items()
    ]
    row = await submissions.add(connection, accepted, receipts.give(accepted), files)
    await submissions.publish(
        connection,
        guard.run_id,
        run_status=verified.run_status,
        at=run["completed_at"],
        runner_id=guard.runner_id,
        runner_version=verified.runner_version,
        prompt_git_hash=verified.prompt_git_hash,
    )
    await record(
        connection,
        Actor(f"runner:{guard.runner_id}"),
        "submit.accept",
        f"run:{guard.run_id}",
        run_id=guard.run_id,
        runner_id=guard.runner_id,
        result_sha256=verified.digest,
        lease_seq=run["lease_seq"],
    )
    return row
