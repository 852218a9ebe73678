"""Cadence of heartbeats: short while the fleet is small, stretched as it grows.

A short lease lets a dead runner's run come back within a minute (Woodpecker 60 s, Buildkite 240,
Gitea 600, GitLab 3,600); 10,000 runners that beat every 10 s would keep a process busy with nothing
else. Each process counts the heartbeats that it answers, and puts into its answers the shortest
interval that keeps them below `BEATS_PER_S`, with a lease to match.
"""

import time
from collections import deque

from config.settings import Settings

# Heartbeats a second of one process: a fifth of a core (docs/performance.md).
BEATS_PER_S = 100.0
WINDOW_S = 60.0
# Counted in pieces: of a window, the oldest piece is forgotten at a time.
PIECE_S = 5.0


class Cadence:
    """Answers the interval and the life of a lease, by the heartbeats of the last minute."""

    def __init__(self, settings: Settings) -> None:
        """Stay between the shortest and the longest interval and lease of the settings."""
        self._longest_s = settings.heartbeat_interval_s
        self._shortest_s = min(settings.heartbeat_interval_min_s, self._longest_s)
        self._longest_ttl_s = settings.lease_ttl_s
        self._shortest_ttl_s = min(settings.lease_ttl_min_s, self._longest_ttl_s)
        self._pieces: deque[list[float]] = deque()  # [when it began, beats, beats x interval]
        self._interval_s = self._shortest_s

    @property
    def interval_s(self) -> int:
        """Seconds between two heartbeats of a lease."""
        return self._interval_s

    @property
    def ttl_s(self) -> int:
        """Seconds that a lease lives after a heartbeat."""
        if self._longest_s == self._shortest_s:
            return self._longest_ttl_s
        share = (self._interval_s - self._shortest_s) / (self._longest_s - self._shortest_s)
        return round(self._shortest_ttl_s + share * (self._longest_ttl_s - self._shortest_ttl_s))

    def count(self, beats: int, now: float | None = None) -> None:
        """Count heartbeats that were answered, and choose the interval of the next answers."""
        now = time.monotonic() if now is None else now
        if not self._pieces or now - self._pieces[-1][0] >= PIECE_S:
            self._pieces.append([now, 0, 0])
        self._pieces[-1][1] += beats
        # A beat stands for a lease that beats every `interval`: so many leases there are.
        self._pieces[-1][2] += beats * self._interval_s
        while now - self._pieces[0][0] > WINDOW_S:
            self._pieces.popleft()
        leases = sum(piece[2] for piece in self._pieces) / max(WINDOW_S, now - self._pieces[0][0])
        wanted = leases / BEATS_PER_S
        self._interval_s = max(self._shortest_s, min(self._longest_s, round(wanted)))
