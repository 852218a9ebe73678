"""The people of B8: an admin, runners, and the submits that they keep in flight."""

import asyncio
import contextlib
import http.client
import itertools
import json
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from nacl.signing import SigningKey

from bench.submits.bundle import BOUNDARY, bundle_of, form, run_of
from bench.support.env import PUBLIC_URL
from db.pool import open_pool
from sandbox.runner.identity import Identity, public_key_text
from sandbox.services.admin_token import new_token
from sandbox.services.sigstore_instance import ThrowawaySigstore

AT_ONCE = 8
BUSY_WAIT_S = 0.1
ADMIN = "/api/admin"


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    body: Any


def ask(
    line: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: dict[str, str]
) -> Answer:
    """Send a request and return the answer."""
    line.request(method, path, body, headers)
    answer = line.getresponse()
    text = answer.read()
    return Answer(answer.status, json.loads(text) if text else None)


@dataclass
class Runner:
    """A registered runner."""

    port: int
    headers: dict[str, str]

    def claim(self) -> dict[str, Any]:
        """Claim a run, which must be there."""
        with closing(self.port) as line:
            headers = {**self.headers, "Idempotency-Key": str(uuid.uuid4())}
            answer = ask(line, "POST", "/api/queue/claim", b"{}", headers)
        assert answer.status == 200, answer
        return answer.body


@contextlib.contextmanager
def closing(port: int) -> Iterator[http.client.HTTPConnection]:
    """Yield a connection to the server."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        yield line
    finally:
        line.close()


class Actors:
    """An admin, runners, and bundles that wait to be submitted."""

    def __init__(self, port: int, dsn: str, sigstore: ThrowawaySigstore) -> None:
        self.port = port
        self.sigstore = sigstore
        self._token = asyncio.run(_admin_token(dsn))
        self.runners = [self._runner(f"bench-{number}") for number in range(5)]
        self.ready: list[tuple[str, bytes, dict[str, str]]] = []

    def admin(self, path: str, body: dict[str, Any]) -> Any:
        """POST as the admin."""
        headers = {
            "Authorization": f"Bearer {self._token}",
            "Content-Type": "application/json",
            "Idempotency-Key": str(uuid.uuid4()),
        }
        with closing(self.port) as line:
            answer = ask(line, "POST", ADMIN + path, json.dumps(body).encode(), headers)
        assert answer.status == 201, answer
        return answer.body

    def leases(self, count: int) -> list[dict[str, Any]]:
        """Return runs that the first runner holds, for the heartbeats."""
        self.admin("/queue", {"runs": [run_of(1, 1) for _ in range(count)]})
        return [self.runners[0].claim() for _ in range(count)]

    def prepare(self, count: int) -> None:
        """Have `count` bundles of 2 MB ready to be submitted."""
        missing = count - len(self.ready)
        for start in range(0, missing, 50):
            runs = [run_of(60, 40) for _ in range(min(50, missing - start))]
            self.admin("/queue", {"runs": runs})
            for number in range(len(runs)):
                runner = self.runners[1 + number % 4]
                job = runner.claim()
                files = bundle_of(job, self.sigstore)
                headers = {
                    **runner.headers,
                    "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
                }
                path = f"/api/queue/{job['run_id']}/submit"
                self.ready.append((path, form(job["lease_id"], files), headers))

    def submit(self, seconds: float, most: int) -> tuple[int, int, float]:
        """Keep AT_ONCE submits in flight; return how many were accepted, told busy, and per s."""
        started = time.perf_counter()
        taken, busy, lock = itertools.count(), itertools.count(), threading.Lock()

        def work() -> None:
            with closing(self.port) as line:
                while time.perf_counter() < started + seconds:
                    with lock:
                        if not self.ready or most <= next(taken):
                            return
                        path, body, headers = self.ready.pop()
                    while (answer := ask(line, "POST", path, body, headers)).status == 503:
                        next(busy)
                        time.sleep(BUSY_WAIT_S)
                    assert answer.status == 201, answer

        before = len(self.ready)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for worker in [pool.submit(work) for _ in range(AT_ONCE)]:
                worker.result()
        done = before - len(self.ready)
        return done, next(busy), done / (time.perf_counter() - started)

    def numbers(self) -> dict[str, Any]:
        """Return what the server has measured since it was asked last."""
        with closing(self.port) as line:
            return ask(line, "GET", "/bench/numbers", b"", {}).body

    def _runner(self, name: str) -> Runner:
        key = SigningKey.generate()
        wanted = {"public_key": public_key_text(key), "runner_id": name, "max_leases": 64}
        self.admin("/runner-keys", wanted)
        identity = Identity(key, PUBLIC_URL, "bench", {"vram_gb": 24, "quantizations": ["q8_0"]})
        headers = {"Content-Type": "application/json"}
        with closing(self.port) as line:
            path = "/api/runners/register"
            answer = ask(line, "POST", path, identity.sign_registration(), headers)
        return Runner(
            self.port, {**headers, "Authorization": f"Bearer {answer.body['access_token']}"}
        )


async def _admin_token(dsn: str) -> str:
    async with open_pool(dsn, 2) as pool:
        return await new_token(pool, "bench")
