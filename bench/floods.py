"""B12: what an honest heartbeat notices of floods from another address, by its p99.

A flooder, in a process of its own at 127.0.0.1, sends over each of its connections as soon as it
has been answered. The honest runners, at 127.0.0.2, send `BEATS_S` heartbeats a second, whether
the last ones have been answered or not. Each flood is measured from its first request on, with the
rates of the settings' defaults, and, for a third of the time, without them, as a ratio to the quiet
process.

    make bench ONLY=floods
"""

import asyncio
import base64
import contextlib
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from nacl.signing import SigningKey
from rich.console import Console
from rich.table import Table

from bench.support import report, seeding
from bench.support.env import BenchEnv, open_env
from bench.support.report import Figure, Limit, Options
from bench.support.seeding import Lease, open_connection

BEATS_S = 20
LEASES = 50
LIFE = timedelta(hours=1)
HONEST = "127.0.0.2"
MOST = 5.0
JUNK = json.dumps(
    {
        "registration": {
            "purpose": "register",
            "audience": "http://queue.test",
            # Usable, and on nobody's allowlist: the database is asked for it.
            "public_key": base64.b64encode(bytes(SigningKey(bytes(32)).verify_key)).decode(),
            "hostname": "junk",
            "instance_id": "00000000-0000-4000-8000-000000000000",
            "capabilities": {"vram_gb": 24, "quantizations": ["q8_0"]},
            "signed_at": "2026-01-01T00:00:00Z",
            "nonce": "0123456789abcdef",
        },
        "sig": {"sha256": "0" * 64, "signature": "A" * 88},
    }
)


def post(path: str, body: str = "{}", token: str = "") -> bytes:
    """Return a POST as bytes."""
    bearer = f"Authorization: Bearer {token}\r\n" if token else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: queue.test\r\nContent-Type: application/json\r\n{bearer}"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def get(path: str, token: str = "") -> bytes:
    """Return a GET as bytes."""
    bearer = f"Authorization: Bearer {token}\r\n" if token else ""
    return f"GET {path} HTTP/1.1\r\nHost: queue.test\r\n{bearer}\r\n".encode()


def beat(lease: Lease) -> bytes:
    """Return the heartbeat of a lease."""
    body = f'{{"lease_id": "{lease.lease_id}"}}'
    return post(f"/api/queue/{lease.run_id}/heartbeat", body, lease.runner.token)


def floods(lease: Lease) -> dict[str, tuple[int, bytes]]:
    """Return each flood: its connections, and what they send; `lease` is a greedy runner's."""
    register = post("/api/runners/register", JUNK)
    return {
        "registrations, 64 connections": (64, register),
        "registrations, 256 connections": (256, register),
        "unknown paths, 256": (256, get("/wp-login.php")),
        "/metrics, 64": (64, get("/metrics")),
        "/readyz, 256": (256, get("/readyz")),
        "wrong admin tokens, 256": (256, get("/api/admin/queue", "bqa_" + "A" * 43)),
        "wrong runner tokens, 256": (256, post("/api/queue/claim", token="a.b.c")),  # noqa: S106
        "one runner's heartbeats, 100": (100, beat(lease)),
        "one runner's claims, 256": (256, post("/api/queue/claim", token=lease.runner.token)),
    }


async def read_answer(reader: asyncio.StreamReader) -> int:
    """Read one answer; return its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    await reader.readexactly(length)
    return int(head.split(b" ", 2)[1])


async def flood(port: int, connections: int, request: bytes) -> None:
    """Send in a closed loop until cancelled, over a new connection where one is closed.

    Says "flooding" on stdout once all connections have been opened.
    """
    opened = asyncio.Barrier(connections + 1)

    async def one() -> None:
        first = True
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError, IndexError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                if first:
                    first = False
                    await opened.wait()
                try:
                    while True:
                        writer.write(request)
                        await read_answer(reader)
                finally:
                    writer.close()

    async def say() -> None:
        await opened.wait()
        print("flooding", flush=True)

    await asyncio.gather(say(), *(one() for _ in range(connections)))


@asynccontextmanager
async def flooding(port: int, connections: int, request: bytes) -> AsyncIterator[None]:
    """Flood from another process for as long as the block runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.floods", str(port), str(connections), request.hex()),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        # Its own start takes a core: that would be measured as the flood's.
        assert process.stdout is not None
        if await process.stdout.readline() != b"flooding\n":
            raise RuntimeError(f"the flooder ended before its {connections} connections were open")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Honest:
    """Runners that beat at their rate, over a connection each."""

    def __init__(self, port: int, leases: Sequence[Lease]) -> None:
        self._port = port
        self._requests = [beat(lease) for lease in leases]
        self.taken_ms: list[float] = []
        self.lost = 0

    async def measure(self, seconds: float) -> float:
        """Beat for so long; return the p99 in ms. A beat that fails counts as what it took."""
        self.taken_ms, self.lost = [], 0
        begun, beats = time.monotonic(), []
        for number in range(int(seconds * BEATS_S)):
            await asyncio.sleep(begun + number / BEATS_S - time.monotonic())
            request = self._requests[number % len(self._requests)]
            beats.append(asyncio.create_task(self._beat(request)))
        await asyncio.gather(*beats)
        return report.percentile(self.taken_ms, 99)

    async def _beat(self, request: bytes) -> None:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(30):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self._port, local_addr=(HONEST, 0)
                )
                writer.write(request)
                status = await read_answer(reader)
                writer.close()
            self.lost += status != 200
        except (OSError, asyncio.IncompleteReadError):
            self.lost += 1
        self.taken_ms.append((time.perf_counter() - began) * 1000)


async def measure(stage: BenchEnv, wanted: Options) -> Figure:
    """Seed, measure each flood with the rates and without, and return the figure."""
    async with open_connection(stage.dsn) as connection:
        models = await seeding.add_models(connection, "q8_0", 1)
        await seeding.add_runs(connection, models, LEASES + 1)
        runners = await seeding.sign_on(connection, LEASES + 1)
        leases = await seeding.lease(connection, runners, LIFE)
    kinds = floods(leases[-1])
    if wanted.quick:
        kinds = dict(list(kinds.items())[:1])
    arms = {
        "limited": {"anonymous_rate": 20, "runner_rate": 50, "connections_per_address": 512},
        "unlimited": {},
    }
    ratios: dict[str, dict[str, float]] = {}
    table = Table("flood", *(f"{arm}: p99 ms, worst, x quiet, lost" for arm in arms))
    rows: dict[str, list[str]] = {kind: [] for kind in ("quiet", *kinds)}
    for arm, settings in arms.items():
        server = stage.serve(**settings)
        honest = Honest(server.port, leases[:-1])
        await honest.measure(min(2, wanted.seconds))  # warm
        quiet = statistics.median([await honest.measure(wanted.seconds / 3) for _ in range(3)])
        rows["quiet"].append(f"{quiet:.1f}")
        ratios[arm] = {}
        seconds = wanted.seconds if settings else wanted.seconds / 3
        for kind, (connections, request) in kinds.items():
            async with flooding(server.port, connections, request):
                p99 = await honest.measure(seconds)
            ratios[arm][kind] = p99 / quiet
            rows[kind].append(
                f"{p99:.1f}, {max(honest.taken_ms):.0f}, {p99 / quiet:.1f}, {honest.lost}"
            )
            print(f"{arm}: {kind}: {rows[kind][-1]}", flush=True)
    for kind, cells in rows.items():
        table.add_row(kind, *cells)
    Console().print(table)
    return Figure(
        "B12",
        "p99 of an honest heartbeat in the worst flood, to that of a quiet process",
        max(ratios["limited"].values()),
        "x quiet",
        {kind: Limit(ratio, MOST, most=True) for kind, ratio in ratios["limited"].items()},
        {"unlimited": ratios["unlimited"]},
    )


def main() -> int:
    """Measure on a private stage; with a port, connections and a request, flood that port."""
    if len(sys.argv) == 4 and sys.argv[1].isdecimal():
        _, port, connections, request = sys.argv
        asyncio.run(flood(int(port), int(connections), bytes.fromhex(request)))
        return 0
    wanted = report.options(seconds=30)
    report.introduce()
    with open_env() as stage:
        figure = asyncio.run(measure(stage, wanted))
    return report.publish(figure, wanted)


if __name__ == "__main__":
    sys.exit(main())
