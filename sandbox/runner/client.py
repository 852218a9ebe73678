"""A runner's verbs over HTTP, and the patience that they need.

A message that got no answer from the server itself is sent again, byte for byte and under the
same Idempotency-Key, until the server has spoken or the caller is cancelled. A stale token is
renewed on the way: the lease belongs to the runner, not to the token.
"""

import asyncio
import itertools
import uuid
from collections.abc import Callable
from typing import Any

import httpx

from sandbox.runner.identity import Identity
from sandbox.runner.wire import (
    ANSWER_S,
    Answer,
    Backoff,
    Job,
    Message,
    Offer,
    Problem,
    Unanswered,
    read_answer,
)

# Both say "register again"; every other 401 would come back unchanged.
STALE_TOKEN = frozenset({"token_expired", "invalid_token"})
RENEWALS = 3
WELL_KNOWN = "/.well-known/bakeoff-queue.json"
Report = Callable[..., None]


class RunnerClient:
    """The runner's verbs. Raises Problem when the server refuses; waits while it is silent."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        identity: Identity,
        report: Report,
        backoff: Backoff | None = None,
    ) -> None:
        self._http = http
        self._identity = identity
        self._report = report
        self._backoff = backoff or Backoff()
        self._token: str | None = None
        self._renewing = asyncio.Lock()

    @property
    def audience(self) -> str:
        """The server we mean: registrations are signed for it, receipts given in its name."""
        return self._identity.audience

    @property
    def registered(self) -> bool:
        """Return whether the server has ever given this process a token."""
        return self._token is not None

    async def register(self) -> dict[str, Any]:
        """Prove possession of the key and take a token; return the server's answer."""
        headers = {"Content-Type": "application/json"}
        message = Message(
            "POST", "/api/runners/register", self._identity.sign_registration(), headers
        )
        answer = await self._deliver(message, token=None)
        self._token = answer.body["access_token"]
        return answer.body

    async def published(self) -> dict[str, Any]:
        """Return what the server publishes: its address, and the keys that sign its receipts."""
        return (await self._deliver(Message("GET", WELL_KNOWN), token=None)).body

    async def sign_off(self) -> None:
        """Give the token back; the server releases what is still held."""
        await self._send(Message("DELETE", "/api/runners/me"))

    async def claim(self, *, wait_s: int = 0, explain: bool = False) -> Offer:
        """Ask for a run. One Idempotency-Key per call, so a lost answer costs no second lease."""
        body = {"explain": True} if explain else {"wait_s": wait_s}
        message = Message.of_json("/api/queue/claim", body, answer_s=wait_s + ANSWER_S)
        message.headers["Idempotency-Key"] = str(uuid.uuid4())
        answer = await self._send(message)
        job = Job.from_body(answer.body) if "run_id" in answer.body else None
        return Offer(job, answer.body.get("reasons") or [], answer.retry_after_s or 0.0)

    async def heartbeat(self, job: Job, progress: dict[str, Any]) -> dict[str, Any]:
        """Renew the lease; the answer has the directive and the next interval."""
        return await self._on_run(job.run_id, "heartbeat", job.lease_id, progress=progress)

    async def release(self, run_id: str, lease_id: str, reason: str) -> None:
        """Hand the run back; no attempt is burnt."""
        await self._on_run(run_id, "release", lease_id, reason=reason)

    async def fail(self, job: Job, failure_code: str, detail: str) -> None:
        """Say that this machine could not run it; `detail` is cut at 1000 characters."""
        body = {"failure_code": failure_code, "detail": detail[:1000]}
        await self._on_run(job.run_id, "fail", job.lease_id, **body)

    async def submit(self, job: Job, files: dict[str, bytes]) -> dict[str, Any]:
        """Hand the bundle in and return the receipt. The multipart body is encoded only once."""
        form = httpx.Request(
            "POST",
            "http://multipart.invalid",
            data={"lease_id": job.lease_id},
            files={name: (name, content) for name, content in files.items()},
        )
        headers = {"Content-Type": form.headers["Content-Type"]}
        path = f"/api/queue/{job.run_id}/submit"
        answer = await self._send(Message("POST", path, form.read(), headers, answer_s=60.0))
        return answer.body

    async def _on_run(self, run_id: str, verb: str, lease_id: str, **body: Any) -> dict[str, Any]:
        message = Message.of_json(f"/api/queue/{run_id}/{verb}", {"lease_id": lease_id, **body})
        return (await self._send(message)).body

    async def _send(self, message: Message) -> Answer:
        """Deliver with our token, and register again when the token is what was refused.

        A few times only: a server that refuses every token it gives would keep us for ever.
        """
        for _ in range(RENEWALS):
            token = self._token
            try:
                return await self._deliver(message, token)
            except Problem as problem:
                if problem.code not in STALE_TOKEN:
                    raise
            await self._renew(token)
        return await self._deliver(message, self._token)

    async def _renew(self, refused: str | None) -> None:
        """Register once for all the requests that came back with the same stale token."""
        async with self._renewing:
            if self._token == refused:
                await self.register()

    async def _deliver(self, message: Message, token: str | None) -> Answer:
        for attempt in itertools.count():
            try:
                return await self._once(message, token)
            except Unanswered as silence:
                wait_s = self._backoff.wait_s(attempt, silence.retry_after_s)
                self._report("retrying", path=message.path, why=str(silence), wait_s=wait_s)
                await asyncio.sleep(wait_s)
        raise AssertionError("the count never ends")

    async def _once(self, message: Message, token: str | None) -> Answer:
        credential = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            response = await self._http.request(
                message.method,
                message.path,
                content=message.content,
                headers={**message.headers, **credential},
                timeout=httpx.Timeout(10.0, read=message.answer_s),
            )
        except httpx.RequestError as error:
            raise Unanswered(type(error).__name__) from error
        return read_answer(response)
