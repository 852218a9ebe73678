"""Rate of an address over all processes: requests without a good token, counted in Redis.

Each process has its own buckets first (handlers/rates.py), which refuse a flood without a round
trip. This count keeps N processes from letting through N times as much. It fails open: while Redis
is down or slow it is bypassed, and the buckets of each process remain.
"""

import asyncio
import time
from typing import Any

WINDOW_S = 10
LOOK_S = 0.1
BYPASS_S = 5.0


class SharedRates:
    """Counts requests by address in windows of 10 seconds."""

    def __init__(self, client: Any, per_s: float) -> None:
        """Let an address send `per_s` requests a second on average; 0: any number.

        `client` is a Topology's.
        """
        self._client = client
        self._most = per_s * WINDOW_S
        self._bypassed_until = 0.0  # monotonic

    async def wait_s(self, address: str) -> float:
        """Count a request; return 0 within the rate, else the seconds until the next window."""
        if not self._most or time.monotonic() < self._bypassed_until:
            return 0.0
        now = time.time()
        window = int(now // WINDOW_S)
        name = f"rate:{address}:{window}"
        try:
            async with (
                asyncio.timeout(LOOK_S),
                self._client.pipeline(transaction=False) as pipeline,
            ):
                pipeline.execute_command("INCR", name)
                pipeline.execute_command("EXPIRE", name, 2 * WINDOW_S)
                count, _ = await pipeline.execute()
        except Exception:  # a Cluster's client raises more than RedisError
            self._bypassed_until = time.monotonic() + BYPASS_S
            return 0.0
        return 0.0 if count <= self._most else max(0.1, (window + 1) * WINDOW_S - now)
