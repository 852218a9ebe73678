"""The faulty network between runners and servers: HTTP/1.1, a connection per request.

What can happen to a request: it comes late, never, or twice (at once, to two servers, or again much
later); its sender hangs up; its answer is lost after the server acted. Whoever sends it tries
again with the same bytes, a bounded number of times (P4).
"""

import asyncio
import hashlib
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from tests.history.invariants import Seen, Sent

TRIES = 7
# Young enough that a run it names may be in somebody else's hands, and not finished.
REMEMBERED = 150
TIMEOUT_S = (3.0, 8.0)
LATE_S = 8.0
LOST = (ConnectionError, OSError, TimeoutError, asyncio.IncompleteReadError)


@dataclass(frozen=True, slots=True)
class Weather:
    """How likely each misfortune of a request is."""

    delay: float = 0.0
    drop_request: float = 0.0
    drop_answer: float = 0.0
    hang_up: float = 0.0
    twice_at_once: float = 0.0
    twice_later: float = 0.0


CALM = Weather()
MISFORTUNES = ("drop_request", "drop_answer", "hang_up", "twice_at_once", "twice_later")


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it is sent, every time: who sends it and what, and what the log tells of it."""

    verb: str
    runner_id: str
    fingerprint: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    claim_key: str | None = None
    run_id: str | None = None
    lease_id: str | None = None
    result_sha256: str | None = None

    @property
    def bytes(self) -> bytes:
        """The whole request, as it goes over the wire."""
        head = [f"{self.method} {self.path} HTTP/1.1", "Host: queue.test", "Connection: close"]
        head += [f"{name}: {value}" for name, value in self.headers]
        head += [f"Content-Length: {len(self.body)}", "", ""]
        return "\r\n".join(head).encode() + self.body


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    body: dict[str, Any]

    @property
    def code(self) -> str | None:
        """The code of a problem document."""
        return self.body.get("code")


class Network:
    """Carries requests to servers, or not; keeps what their senders saw."""

    def __init__(self, ports: Callable[[], list[int]], faults: Counter[str]) -> None:
        self._ports = ports
        self._faults = faults
        self._strays: set[asyncio.Task[None]] = set()
        self.seen: list[Seen] = []
        self.about_leases: set[Sent] = set()
        self.sent: deque[Request] = deque(maxlen=REMEMBERED)  # what may be replayed

    async def call(
        self, request: Request, rng: random.Random, weather: Weather, tries: int = TRIES
    ) -> Answer | None:
        """Send until answered with something final; None when every try was lost."""
        self.sent.append(request)
        if request.lease_id is not None:
            lease_id = UUID(request.lease_id)
            about = Sent(request.verb, request.runner_id, lease_id, request.result_sha256)
            self.about_leases.add(about)
        for attempt in range(tries):
            answer = await self._try(request, rng, weather)
            if answer is not None and answer.status not in (429, 500, 503):
                return answer
            await asyncio.sleep(rng.uniform(0.02, 0.25) * min(attempt + 1, 4))
        return None

    async def replay(self, request: Request, rng: random.Random) -> None:
        """Send old bytes once more; whoever sent them first does not wait for the answer."""
        self._faults["net_replay"] += 1
        await self._exchange(request, rng)

    async def settle(self) -> None:
        """Let what is still on its way arrive, or be lost."""
        for task in self._strays:
            task.cancel()
        await asyncio.gather(*self._strays, return_exceptions=True)

    async def _try(self, request: Request, rng: random.Random, weather: Weather) -> Answer | None:
        misfortune = _draw(rng, weather)
        delay = rng.uniform(0, 0.6) if rng.random() < weather.delay else 0.0
        if misfortune:
            self._faults[f"net_{misfortune}"] += 1
        if delay:
            self._faults["net_delay"] += 1
            await asyncio.sleep(delay)
        match misfortune:
            case "drop_request":
                return None
            case "hang_up":
                return await self._hang_up(request, rng)
            case "drop_answer":
                await self._exchange(request, rng, lost=True)
                return None
            case "twice_at_once":
                both = await asyncio.gather(*(self._exchange(request, rng) for _ in range(2)))
                return both[0] or both[1]
            case "twice_later":
                self._later(request, rng)
        return await self._exchange(request, rng)

    def _later(self, request: Request, rng: random.Random) -> None:
        async def arrive(wait_s: float) -> None:
            await asyncio.sleep(wait_s)
            await self._exchange(request, rng)

        task = asyncio.create_task(arrive(rng.uniform(0, LATE_S)))
        self._strays.add(task)
        task.add_done_callback(self._strays.discard)

    async def _hang_up(self, request: Request, rng: random.Random) -> None:
        """Send, and close before the answer."""
        try:
            async with asyncio.timeout(3):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port(rng))
                writer.write(request.bytes)
                await writer.drain()
                await asyncio.sleep(rng.uniform(0, 0.03))
                writer.close()
                await writer.wait_closed()
        except LOST:
            return

    async def _exchange(
        self, request: Request, rng: random.Random, *, lost: bool = False
    ) -> Answer | None:
        """One try to one server; None when there was no answer. `lost`: it is not seen."""
        sent_at = datetime.now(UTC)
        try:
            async with asyncio.timeout(rng.uniform(*TIMEOUT_S)):
                answer = await _talk(self._port(rng), request.bytes)
        except LOST:
            return None
        if not lost:
            self.seen += _noted(request, sent_at, answer)
        return answer

    def _port(self, rng: random.Random) -> int:
        return rng.choice(self._ports())


async def _talk(port: int, request: bytes) -> Answer:
    """Send bytes, read one answer. Raises one of LOST when there is none, or half of one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with _closing(writer):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        line, *headers = head.decode("latin-1").split("\r\n")
        lengths = [h.partition(":")[2] for h in headers if h.lower().startswith("content-length:")]
        body = await reader.readexactly(int(lengths[0]) if lengths else 0)
        return Answer(int(line.split()[1]), json.loads(body) if body else {})


@contextmanager
def _closing(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    finally:
        writer.transport.abort()


def _draw(rng: random.Random, weather: Weather) -> str | None:
    left = rng.random()
    for name in MISFORTUNES:
        left -= getattr(weather, name)
        if left < 0:
            return name
    return None


def _noted(request: Request, sent_at: datetime, answer: Answer) -> list[Seen]:
    """What the log says of an answer: one row; of an enqueue, one per run."""
    body = answer.body
    seen = Seen(
        verb=request.verb,
        runner_id=request.runner_id,
        fingerprint=request.fingerprint,
        request=hashlib.sha256(request.bytes).hexdigest(),
        sent_at=sent_at,
        received_at=datetime.now(UTC),
        status=answer.status,
        code=answer.code,
        claim_key=request.claim_key,
        run_id=_uuid(request.run_id or body.get("run_id")),
        lease_id=_uuid(request.lease_id or body.get("lease_id")),
        result_sha256=request.result_sha256,
        receipt_sha256=body.get("result_sha256"),
        receipt_id=_uuid(body.get("receipt_id")),
    )
    if request.verb == "enqueue" and answer.status == 201:
        return [replace(seen, run_id=UUID(run["run_id"])) for run in body["runs"]]
    return [seen]


def _uuid(text: str | None) -> UUID | None:
    return UUID(text) if text else None
