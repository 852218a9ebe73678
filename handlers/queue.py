"""The queue as runners use it: claim, heartbeat, release, fail, and a look at an own run."""

import asyncio
import hashlib
import re
from typing import Any, ClassVar
from uuid import UUID, uuid4

import asyncpg
from tornado.http1connection import HTTP1Connection
from tornado.web import URLSpec

from broker.errors import BrokerError, InvalidRequest, Violation, code_of
from broker.leases.heartbeats import Renewal
from broker.leases.matching import Capabilities
from broker.leases.releases import Failure
from broker.results.bundle import CAPS
from broker.services import Services
from db.run_queue import Beat, Claimant
from handlers.base import UUID_PATH, Handler
from handlers.runner_base import RunnerHandler

UPLOAD = {
    "max_result_bytes": CAPS["result.json"],
    "max_dashboard_bytes": CAPS["dashboard.html"],
    "max_summary_bytes": CAPS["summary.md"],
    "max_manifest_bytes": CAPS["manifest.json"],
    "max_signature_bytes": CAPS["signature.sigstore.json"],
}
_KEY = re.compile(r"[\x21-\x7e]{1,200}")


class ClaimHandler(RunnerHandler):
    """POST /api/queue/claim."""

    event: ClassVar[str] = "run.claim"

    _claiming: asyncio.Task[None] | None = None

    async def post(self) -> None:
        """Hand out the next run that fits: 200 with the job, or 204 with Retry-After."""
        body = self.read_json("claim")
        key = idempotency_key(self) or str(uuid4())
        settings, runner = self.services.settings, self.runner
        offer = await self.services.registry.capabilities(runner, body.get("capabilities"))
        digest = hashlib.sha256(self._body).hexdigest()
        claimant = Claimant(
            runner.runner_id, runner.fingerprint, runner.instance_id, runner.jti, key, digest, offer
        )
        wait_s = min(body.get("wait_s", 0), settings.claim_wait_max_s)
        self._claiming = asyncio.current_task()
        try:
            row = await self.services.claims.claim(claimant, wait_s)
        except asyncio.CancelledError:
            return  # the runner hung up; what it would have been given goes to another
        finally:
            self._claiming = None
        self.facts["outcome"] = "empty" if row is None else "granted"
        if row is not None:
            await self._hand_out(row)
        elif body.get("explain"):
            await self._explain(offer)
        else:
            self.set_header("Retry-After", str(await self.services.claims.retry_after_s(offer)))
            self.set_status(204)

    def on_connection_close(self) -> None:
        """Stop waiting when the runner hangs up."""
        super().on_connection_close()
        if self._claiming is not None:
            self._claiming.cancel()

    async def _hand_out(self, row: asyncpg.Record) -> None:
        """Send the job; if it cannot be delivered, the lease is released at once."""
        connection = self.request.connection
        if isinstance(connection, HTTP1Connection) and connection.stream.closed():
            await self.services.claims.undo(row)
            return
        self.facts |= {"run_id": str(row["run_id"]), "lease_seq": row["lease_seq"]}
        # Given again, it may be asked for without end, and read by nobody.
        if row["granted_at"] is None:
            self.facts["outcome"] = "replayed"
            self.hold_replay()
        self.answer(200, claim_response(row, self.services), members=row["members"])

    async def _explain(self, offer: Capabilities) -> None:
        reasons = await self.services.claims.explain(self.runner.runner_id, offer)
        shown = [
            {"code": r.code, "count": r.count, "detail": r.detail, "nearest": r.nearest}
            for r in reasons
        ]
        self.answer(200, {"job": None, "reasons": shown})


class HeartbeatHandler(RunnerHandler):
    """POST /api/queue/{run_id}/heartbeat."""

    event: ClassVar[str] = "run.heartbeat"

    max_body_bytes = 4 * 1024

    async def post(self, run_id: str) -> None:
        """Renew a lease and say what its runner is to do."""
        body = self.read_json("heartbeat")
        renewal = await self.services.heartbeats.beat(_beat(self, run_id, body))
        self.answer(200, renewed(renewal, self.services))


class HeartbeatsHandler(RunnerHandler):
    """POST /api/queue/heartbeats: several leases in one request, each with its own outcome."""

    event: ClassVar[str] = "run.heartbeat"

    max_body_bytes = 32 * 1024

    async def post(self) -> None:
        """Renew what can be renewed; the others are told why not."""
        body = self.read_json("heartbeats")
        beats = [_beat(self, each["run_id"], each) for each in body["heartbeats"]]
        outcomes = await self.services.heartbeats.beat_all(beats)
        shown = [
            {"run_id": beat.run_id, **self._shown(outcome)}
            for beat, outcome in zip(beats, outcomes, strict=True)
        ]
        self.answer(200, {"heartbeats": shown})

    def _shown(self, outcome: Renewal | BrokerError) -> dict[str, Any]:
        if isinstance(outcome, BrokerError):
            return {"code": code_of(outcome), "detail": str(outcome)}
        return renewed(outcome, self.services)


class ReleaseHandler(RunnerHandler):
    """POST /api/queue/{run_id}/release."""

    event: ClassVar[str] = "run.release"

    async def post(self, run_id: str) -> None:
        """Take a lease back; no attempt is burnt."""
        body = self.read_json("release")
        guard = self.guard(run_id, body["lease_id"])
        self.answer(200, await self.services.releases.release(guard, body["reason"]))


class FailHandler(RunnerHandler):
    """POST /api/queue/{run_id}/fail."""

    event: ClassVar[str] = "run.fail"

    async def post(self, run_id: str) -> None:
        """Take a failed run back; it waits, and is FAILED when its attempts are used up."""
        body = self.read_json("fail")
        failure = Failure(body["failure_code"], body["detail"], int(body.get("retry_after_s", 0)))
        guard = self.guard(run_id, body["lease_id"])
        self.answer(200, await self.services.releases.fail(guard, failure))


class ResumeHandler(RunnerHandler):
    """POST /api/queue/{run_id}/resume."""

    event: ClassVar[str] = "run.resume"

    async def post(self, run_id: str) -> None:
        """Give a live lease, with its job, to the process that asks: 200 as a claim."""
        self.read_json("resume")
        row = await self.services.claims.resume(self.runner, UUID(run_id))
        self.hold_replay()
        self.answer(200, claim_response(row, self.services), members=row["members"])


class OwnRunHandler(RunnerHandler):
    """GET /api/queue/{run_id}."""

    async def get(self, run_id: str) -> None:
        """Show a run to the runner that works, or worked, on it."""
        self.answer(200, await self.services.queue.own_run(self.runner, UUID(run_id)))


def idempotency_key(handler: Handler) -> str | None:
    """Return the Idempotency-Key header. Raises InvalidRequest for one that cannot be a key."""
    keys = handler.request.headers.get_list("Idempotency-Key")
    key = keys[0] if keys else None
    if len(keys) > 1 or (key is not None and not _KEY.fullmatch(key)):
        detail = "must be 1 to 200 visible ASCII characters, and sent once"
        raise InvalidRequest(
            f"The Idempotency-Key header {detail}.", (Violation("", f"Idempotency-Key {detail}"),)
        )
    return key


def claim_response(row: asyncpg.Record, services: Services) -> dict[str, Any]:
    """Return what a claim hands out beside `members`: the lease, and our limits."""
    return {
        "queue_id": row["queue_id"],
        "run_id": row["run_id"],
        "attempt": row["lease_seq"],
        "lease_id": row["lease_id"],
        "lease_expires_at": row["lease_expires_at"],
        "lease_ttl_s": services.cadence.ttl_s,
        "heartbeat_interval_s": services.cadence.interval_s,
        "upload": UPLOAD,
    }


def renewed(renewal: Renewal, services: Services) -> dict[str, Any]:
    """Return what a heartbeat answers."""
    answer: dict[str, Any] = {
        "lease_expires_at": renewal.lease_expires_at,
        "lease_ttl_s": services.cadence.ttl_s,
        "heartbeat_interval_s": services.cadence.interval_s,
        "directive": renewal.directive,
    }
    if renewal.reason is not None:
        answer["reason"] = renewal.reason
    if renewal.grace_s is not None:
        answer["grace_s"] = renewal.grace_s
    return answer


def _beat(handler: RunnerHandler, run_id: str, body: dict[str, Any]) -> Beat:
    runner = handler.runner
    return Beat(
        UUID(run_id),
        UUID(body["lease_id"]),
        runner.runner_id,
        runner.fingerprint,
        runner.instance_id,
        body.get("progress"),
    )


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/queue/claim", ClaimHandler, given),
        URLSpec(r"/api/queue/heartbeats", HeartbeatsHandler, given),
        URLSpec(rf"/api/queue/{UUID_PATH}/heartbeat", HeartbeatHandler, given),
        URLSpec(rf"/api/queue/{UUID_PATH}/release", ReleaseHandler, given),
        URLSpec(rf"/api/queue/{UUID_PATH}/fail", FailHandler, given),
        URLSpec(rf"/api/queue/{UUID_PATH}/resume", ResumeHandler, given),
        URLSpec(rf"/api/queue/{UUID_PATH}", OwnRunHandler, given),
    ]
