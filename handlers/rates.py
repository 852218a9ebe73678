"""Rates: a token bucket for each client, so that a flood is refused before it costs anything.

A refusal is delayed, by one to three times `DELAY_S`: a client that sends its next request after
each answer would otherwise send thousands a second, and the refusals alone would keep the process
busy. By a time of its own each: hundreds of connections would else be answered in one moment.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass

from broker.concurrency.shares import Shares

# A bucket holds what comes in so many seconds: a fleet behind one address may restart at once.
BURST_S = 10.0
# A runner has no such reason, and its burst is work for the database: 500 beats at once took 0.5 s.
RUNNER_BURST_S = 2.0
DELAY_S = 1.0
# Requests without a good token that one address may have in flight.
ANONYMOUS_MAX = 64
# The least recently seen is forgotten, and begins anew with a full bucket.
CLIENTS_MAX = 10_000


@dataclass(slots=True)
class Bucket:
    """The number of requests that a client may still send, as of a time."""

    left: float
    at: float


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a client stands: what it may still send, and when there is more."""

    limit: int
    remaining: int
    window_s: float  # in which a bucket fills
    wait_s: float  # 0: this request is within the rate

    @property
    def headers(self) -> dict[str, str]:
        """The headers that inform a client (draft-ietf-httpapi-ratelimit-headers-10)."""
        return {
            "RateLimit-Policy": f'"client";q={self.limit};w={int(self.window_s)}',
            "RateLimit": f'"client";r={self.remaining};t={max(1, round(self.wait_s))}',
        }


class ClientRates:
    """Counters of the clients of one process."""

    def __init__(self, anonymous_per_s: float, runner_per_s: float) -> None:
        self.anonymous = Rates(anonymous_per_s)  # by address
        self.runners = Rates(runner_per_s, RUNNER_BURST_S)  # by runner_id
        self.in_flight = Shares(ANONYMOUS_MAX)  # requests without a good token, by address


class Rates:
    """Buckets that fill by `per_s` tokens a second, up to `burst_s` seconds' worth."""

    def __init__(self, per_s: float, burst_s: float = BURST_S) -> None:
        """Let each client send `per_s` requests a second on average; 0: any number."""
        self._per_s = per_s
        self._burst_s = burst_s
        self._most = per_s * burst_s
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    @property
    def is_limited(self) -> bool:
        """Return whether there is a limit at all."""
        return self._per_s > 0

    def take(self, client: str) -> Standing | None:
        """Count a request of the client; return where it stands, None without a limit."""
        if not self._per_s:
            return None
        now = time.monotonic()
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = self._buckets[client] = Bucket(self._most, now)
            if len(self._buckets) > CLIENTS_MAX:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(client)
            bucket.left = min(self._most, bucket.left + (now - bucket.at) * self._per_s)
            bucket.at = now
        if bucket.left < 1:
            return Standing(int(self._most), 0, self._burst_s, (1 - bucket.left) / self._per_s)
        bucket.left -= 1
        return Standing(int(self._most), int(bucket.left), self._burst_s, 0)
