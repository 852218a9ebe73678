"""One simulated runner of the fleet: its connection, its requests, and what it was answered."""

import asyncio
import json
import random
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx

from sandbox.runner.answers import BuiltInRules, execute
from sandbox.runner.result_bundle import Hardware, build_bundle
from sandbox.runner.wire import Job
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore

INTERVAL_S = 30
RUN_S = 20 * 60
ANSWER_S = 30
RESENDS_MAX = 5  # then the 503 counts as what it is
JITTER = 0.5  # of the Retry-After, on top of it
SIGNER = EmailSubject("fleet@bakeoff.test", "https://issuer.bakeoff.test")


@dataclass
class Seen:
    """What the fleet was answered."""

    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    resent: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)

    def forget_times(self) -> None:
        """Begin to measure; what was not a success before counts as well."""
        self.ms.clear()
        self.resent.clear()

    def note(self, kind: str, began: float, status: int) -> bool:
        """Take an answer; return whether it is a success."""
        self.ms[kind].append((time.perf_counter() - began) * 1000)
        if status not in (200, 201):
            self.bad[f"{kind}: {status}"] += 1
        return status in (200, 201)


class Answer(NamedTuple):
    """What came back: the status, the body, and how long a 503 asks to wait."""

    status: int
    body: bytes
    retry_after_s: int


class Connection:
    """A kept connection that sends requests as bytes."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._head = f"Host: bench\r\nAuthorization: Bearer {token}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, kind: str, **headers: str) -> Answer:
        """POST a body of a media type and return the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        lines = [f"POST {path} HTTP/1.1\r\n{self._head}Content-Type: {kind}"]
        lines += [f"Content-Length: {len(body)}", *(f"{n}: {v}" for n, v in headers.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        async with asyncio.timeout(ANSWER_S):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            answer = await reader.readexactly(_number(head, b"content-length"))
        if b"connection: close" in head:
            self.close()
        return Answer(int(head.split()[1]), answer, _number(head, b"retry-after"))

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _number(head: bytes, name: bytes) -> int:
    return int(head.partition(name + b": ")[2].partition(b"\r\n")[0] or 0)


class Member:
    """One runner of the fleet."""

    def __init__(
        self, port: int, token: str, job: Job, seen: Seen, sigstore: ThrowawaySigstore,
        chance: random.Random,
    ) -> None:  # fmt: skip
        self._connection = Connection(port, token)
        self._job = job
        self._seen = seen
        self._sigstore = sigstore
        self._chance = chance

    async def live(self) -> None:
        """Beat, end runs and claim new ones, until cancelled."""
        try:
            await asyncio.sleep(self._chance.uniform(0, INTERVAL_S))
            while True:
                began = time.perf_counter()
                try:
                    await self._beat()
                    if self._chance.random() < INTERVAL_S / RUN_S:
                        await self._finish()
                except (OSError, EOFError, TimeoutError) as error:
                    self._seen.bad[f"no answer: {type(error).__name__}"] += 1
                    self._connection.close()
                await asyncio.sleep(max(0.0, began + INTERVAL_S - time.perf_counter()))
        finally:
            self._connection.close()

    async def _beat(self) -> None:
        body = json.dumps({"lease_id": self._job.lease_id}).encode()
        await self._post("heartbeat", f"/api/queue/{self._job.run_id}/heartbeat", body)

    async def _finish(self) -> None:
        """Submit the run's result, and claim the next."""
        body, kind = await _bundle(self._job, self._sigstore)
        await self._post("submit", f"/api/queue/{self._job.run_id}/submit", body, kind)
        answer = await self._post(
            "claim", "/api/queue/claim", b"{}", **{"Idempotency-Key": str(uuid.uuid4())}
        )
        if answer is not None:
            self._job = Job.from_body(json.loads(answer))

    async def _post(
        self, what: str, path: str, body: bytes, kind: str = "application/json", **headers: str
    ) -> bytes | None:
        """Send, and send the same bytes again when told 503, as a real runner does.

        The time is from the first sending to the last answer, the waits in it. Returns the
        answer's body if it is a success.
        """
        began = time.perf_counter()
        answer = await self._connection.post(path, body, kind, **headers)
        for _ in range(RESENDS_MAX):
            if answer.status != 503:
                break
            # Not all at the same moment: those who were told so together would be told so again.
            await asyncio.sleep(answer.retry_after_s * self._chance.uniform(1, 1 + JITTER))
            self._seen.resent[what] += 1
            answer = await self._connection.post(path, body, kind, **headers)
        return answer.body if self._seen.note(what, began, answer.status) else None


async def _bundle(job: Job, sigstore: ThrowawaySigstore) -> tuple[bytes, str]:
    """Return a multipart body with a signed result of the job, and its media type."""
    rules = BuiltInRules()
    outcomes = await execute(job, rules, lambda _: None)
    sign = lambda blob: sigstore.sign(blob, SIGNER)  # noqa: E731 (build_bundle calls it)
    files = build_bundle(job, outcomes, rules.provenance, Hardware(24), sign)
    form = httpx.Request(
        "POST",
        "http://multipart.invalid",
        data={"lease_id": job.lease_id},
        files={name: (name, content) for name, content in files.items()},
    )
    return form.read(), form.headers["Content-Type"]
