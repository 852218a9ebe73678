"""Every request of the runners and its answer; and whether the database knows what was promised."""

import json
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import httpx

GATEWAY = (502, 504)
# Two readings of the database's clock in one statement.
READINGS = timedelta(milliseconds=50)
CLAIMS = "SELECT run_id::text, lease_id::text FROM attempts"
SUBMITS = "SELECT run_id::text, result_sha256 FROM submissions"
BEATS = "SELECT lease_id::text, last_heartbeat FROM attempts"


@dataclass
class Tally:
    """What was asked, what was answered, what was promised."""

    requests: int = 0
    refused_for_now: int = 0
    withdrawn: int = 0
    lost: list[str] = field(default_factory=list)
    claims: set[tuple[str, str]] = field(default_factory=set)
    submits: set[tuple[str, str]] = field(default_factory=set)
    beats: dict[str, datetime] = field(default_factory=dict)

    def note(self, request: httpx.Request, response: httpx.Response) -> None:
        """Take an answer that has arrived whole."""
        path, status = request.url.path, response.status_code
        ours = response.headers.get("Content-Type", "").startswith("application/problem+json")
        if status in GATEWAY or (status >= 500 and not ours):
            self.lost.append(f"{path}: {status}")
        elif status >= 500:
            self.refused_for_now += 1
        elif status in (200, 201):
            self._keep(request, response.json())

    async def broken(self, pool: asyncpg.Pool, ttl: timedelta) -> list[str]:
        """Return the promises that the database does not know of; none, if all is well."""
        claims = {tuple(row) for row in await pool.fetch(CLAIMS)}
        submits = {tuple(row) for row in await pool.fetch(SUBMITS)}
        beats = {lease: at for lease, at in await pool.fetch(BEATS) if at is not None}
        found = [f"claim {each}" for each in self.claims - claims]
        found += [f"submit {each}" for each in self.submits - submits]
        return found + [
            f"heartbeat of {lease}"
            for lease, until in self.beats.items()
            if lease not in beats or beats[lease] < until - ttl - READINGS
        ]

    def _keep(self, request: httpx.Request, body: dict[str, Any]) -> None:
        path = request.url.path
        if path.endswith("/claim") and "lease_id" in body:
            self.claims.add((body["run_id"], body["lease_id"]))
        elif path.endswith("/submit"):
            self.submits.add((body["run_id"], body["result_sha256"]))
        elif path.endswith("/heartbeat"):
            lease_id = json.loads(request.content)["lease_id"]
            until = datetime.fromisoformat(body["lease_expires_at"])
            self.beats[lease_id] = max(until, self.beats.get(lease_id, until))


class RecordingClient(httpx.AsyncBaseTransport):
    """The runners' way to the server; what passes is told to the tally."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._way = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it, and read the answer to its end: half an answer is none."""
        self._tally.requests += 1
        arrived = False
        try:
            response = await self._way.handle_async_request(request)
            await response.aread()
            arrived = True
        except httpx.RequestError as error:
            arrived = True
            self._tally.lost.append(f"{request.url.path}: {type(error).__name__}")
            raise
        finally:
            if not arrived:  # the runner itself hung up: its run is done
                self._tally.withdrawn += 1
        self._tally.note(request, response)
        return response

    async def aclose(self) -> None:
        """Close the connections."""
        await self._way.aclose()
