"""The load generator where there is no wrk: the same plan file, the same last line.

A process of its own, so that it does not share the server's interpreter lock.

    python -m bench.support.client PORT CONNECTIONS SECONDS PLAN PREFIX
"""

import asyncio
import json
import statistics
import sys
import time
from itertools import count
from pathlib import Path


class Load:
    """Requests of a plan on a few connections, and what they took."""

    def __init__(self, port: int, plan: Path, prefix: str) -> None:
        self._port = port
        self._lines = [line.split("\t") for line in plan.read_text().splitlines()]
        self._prefix = prefix
        self._numbers = count()
        self._times: list[float] = []
        self._refused = 0
        self._broken = 0

    async def send(self, connections: int, seconds: float) -> dict[str, float]:
        """Send for so long; return what wrk's script prints."""
        began = time.perf_counter()
        until = began + seconds
        await asyncio.gather(*(self._connection(until) for _ in range(connections)))
        taken = time.perf_counter() - began
        cuts = statistics.quantiles(self._times or [0.0, 0.0], n=100)
        return {
            "requests": len(self._times), "seconds": taken,
            "p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000,
            "refused": self._refused, "broken": self._broken,
        }  # fmt: skip

    async def _connection(self, until: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while time.perf_counter() < until:
                began = time.perf_counter()
                writer.write(self._next())
                await self._read(reader)
                self._times.append(time.perf_counter() - began)
        except (OSError, EOFError):
            self._broken += 1
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 2"):
            self._refused += 1
        if b"content-length: " in head:
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))

    def _next(self) -> bytes:
        number = next(self._numbers)
        path, token, body = self._lines[number % len(self._lines)]
        lines = (
            f"POST {path} HTTP/1.1", "Host: bench", f"Authorization: Bearer {token}",
            "Content-Type: application/json", f"Content-Length: {len(body)}",
            f"Idempotency-Key: {self._prefix}{number + 1}", "", body,
        )  # fmt: skip
        return "\r\n".join(lines).encode()


def main() -> None:
    """Send, and print one line of JSON."""
    port, connections, seconds, plan, prefix = sys.argv[1:]
    load = Load(int(port), Path(plan), prefix)
    print(json.dumps(asyncio.run(load.send(int(connections), float(seconds)))))


if __name__ == "__main__":
    main()
