"""The life of a runner: claim a run, beat while computing, submit, and claim the next.

The heartbeat and the work run side by side. The heartbeat ends the work for three reasons only: a
refusal by one of the server's codes, a `cancel` directive, or the runner being stopped. Silence
from the server never does: the lease may be good, and hours of work with it.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from sandbox.runner.answers import Executor, cells_of, execute
from sandbox.runner.client import Report, RunnerClient
from sandbox.runner.receipts import ReceiptDoubtful, digest, read_receipt
from sandbox.runner.result_bundle import Hardware, Sign, build_bundle
from sandbox.runner.wire import Job, Offer, Problem

# The run or the lease is not ours any more: nothing that we compute for it can be accepted.
ENDED = frozenset({"lease_lost", "run_finished", "already_complete", "not_found"})
BARRED = frozenset({"key_revoked", "key_not_allowed"})


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """When to stop by ourselves, and how long to wait when there is nothing to do."""

    once: bool = False
    until_idle: int | None = None
    wait_s: int = 20
    idle_s: float = 5.0


@dataclass(slots=True)
class Progress:
    """How far the work on one run is; the heartbeat tells the server."""

    total: int
    done: int = 0
    submitting: bool = False

    def step(self, done: int) -> None:
        """Note that `done` cells have been asked."""
        self.done = done

    def as_json(self) -> dict[str, Any]:
        """Return the heartbeat's `progress`."""
        note = "submitting" if self.submitting else "asking"
        return {"done": self.done, "total": self.total, "note": note}


class Runner:
    """One machine's life: `live()` until there is a reason to stop, then `leave()`."""

    def __init__(
        self,
        client: RunnerClient,
        executor: Executor,
        sign: Sign,
        hardware: Hardware,
        say: Report,
        patience: RunnerOptions,
    ) -> None:
        self._client = client
        self._executor = executor
        self._sign = sign
        self._rig = hardware
        self._say = say
        self._patience = patience
        self._held: Job | None = None
        self._draining = False

    async def live(self) -> None:
        """Register, then work until drained, done or idle enough. Raises Problem when refused."""
        welcome = await self._client.register()
        self._say("registered", runner_id=welcome["runner_id"])
        await self._hand_back(welcome.get("held_leases") or [])
        wait_s = min(self._patience.wait_s, welcome.get("claim_wait_max_s", 0))
        idle = 0
        while not self._draining and idle != self._patience.until_idle:
            offer = await self._offer(wait_s, explain=idle == 0)
            idle = idle + 1 if offer.job is None else 0
            if offer.job is not None:
                await self._work(offer.job)
            elif idle != self._patience.until_idle:
                await asyncio.sleep(min(offer.retry_after_s, self._patience.idle_s))
            if offer.job is not None and self._patience.once:
                return

    async def leave(self) -> None:
        """Release what is held and sign off. Nothing to do when we never got in."""
        if not self._client.registered:
            return
        if self._held is not None:
            await self._release(self._held, "shutdown")
        await self._client.sign_off()
        self._say("signed_off")

    async def _hand_back(self, leases: list[dict[str, Any]]) -> None:
        """Leases of an earlier process with our key: its work is gone, so let others have it."""
        for lease in leases:
            await self._client.release(lease["run_id"], lease["lease_id"], "restarted")
            self._say("released", run_id=lease["run_id"], reason="restarted")

    async def _offer(self, wait_s: int, *, explain: bool) -> Offer:
        """Claim; when empty, ask once why. The question is a claim too, and may bring a job."""
        try:
            offer = await self._client.claim(wait_s=wait_s)
            if offer.job is None and explain:
                why = await self._client.claim(explain=True)
                self._say("idle", reasons=why.reasons, retry_after_s=offer.retry_after_s)
                offer = why if why.job else offer
        except Problem as refusal:
            if refusal.code in {"runner_paused", "lease_limit"}:
                self._say("idle", reasons=[{"code": refusal.code, "detail": refusal.detail}])
                return Offer(None, retry_after_s=self._patience.idle_s)
            raise
        return offer

    async def _work(self, job: Job) -> None:
        """Compute and beat until the work is over or the heartbeat says that it is pointless."""
        self._held = job
        self._say("claimed", run_id=job.run_id, model=job.model["name"], attempt=job.attempt)
        progress = Progress(total=sum(1 for _ in cells_of(job)))
        work = asyncio.create_task(self._compute(job, progress))
        beats = asyncio.create_task(self._beat(job, progress))
        try:
            await asyncio.wait({work, beats}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            beats.cancel()
            await asyncio.gather(work, beats, return_exceptions=True)
        if not work.cancelled():
            work.result()
        elif beats.result() == "cancel":
            await self._release(job, "cancelled")
        self._held = None

    async def _beat(self, job: Job, progress: Progress) -> str:
        """Renew the lease at the server's pace, from the claim on; return why to give up."""
        pause_s = job.heartbeat_interval_s
        while True:
            try:
                answer = await self._client.heartbeat(job, progress.as_json())
            except Problem as refusal:
                self._say(refusal.code, run_id=job.run_id, during="heartbeat")
                # While submitting, "finished" may mean that our own bundle was accepted and only
                # the receipt got lost: the submit itself learns what is true.
                if refusal.code in ENDED | BARRED and not progress.submitting:
                    return refusal.code
            else:
                directive = answer["directive"]
                self._say("heartbeat", run_id=job.run_id, directive=directive, **progress.as_json())
                self._draining = self._draining or directive == "drain"
                if directive == "cancel":
                    return directive
                pause_s = answer["heartbeat_interval_s"]
            await asyncio.sleep(pause_s)

    async def _compute(self, job: Job, progress: Progress) -> None:
        """Ask every cell and hand the bundle in. What goes wrong on this machine is a `fail`."""
        try:
            outcomes = await execute(job, self._executor, progress.step)
            provenance = self._executor.provenance
            files = build_bundle(job, outcomes, provenance, self._rig, self._sign)
        except Exception as error:
            await self._fail(job, f"{type(error).__name__}: {error}")
            return
        progress.submitting = True
        await self._submit(job, files)

    async def _submit(self, job: Job, files: dict[str, bytes]) -> None:
        try:
            receipt = await self._client.submit(job, files)
        except Problem as refusal:
            self._say("refused", run_id=job.run_id, code=refusal.code, errors=refusal.errors)
            if refusal.code not in ENDED | BARRED:
                await self._fail(job, f"the bundle was refused: {refusal}")
            return
        await self._check(receipt, job, files["result.json"])
        sha256 = receipt["result_sha256"]
        self._say("submitted", run_id=job.run_id, result_sha256=sha256)

    async def _check(self, receipt: dict[str, Any], job: Job, result: bytes) -> None:
        """Say so when the receipt would prove nothing in a dispute; the result is in either way."""
        try:
            read_receipt(
                receipt,
                await self._client.published(),
                run_id=job.run_id,
                result_sha256=digest(result),
                public_url=self._client.audience,
            )
        except (ReceiptDoubtful, Problem) as error:
            self._say("receipt_doubtful", run_id=job.run_id, why=str(error))

    async def _fail(self, job: Job, detail: str) -> None:
        self._say("failed", run_id=job.run_id, detail=detail)
        try:
            await self._client.fail(job, "infra_error", detail)
        except Problem as refusal:
            self._say(refusal.code, run_id=job.run_id, during="fail")

    async def _release(self, job: Job, reason: str) -> None:
        """Hand the run back. A lease that is gone already is as good."""
        self._held = None
        try:
            await self._client.release(job.run_id, job.lease_id, reason)
        except Problem as refusal:
            self._say(refusal.code, run_id=job.run_id, during="release")
        else:
            self._say("released", run_id=job.run_id, reason=reason)
