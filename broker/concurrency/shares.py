"""Shares: how much of a scarce thing one holder may have at once, so that others find some too.

A runner's share is of this process: an honest runner has a connection or two, and one that takes
all it can get is refused before it takes what others need.
"""

from collections import Counter

# Of one runner key, at a time. 64 is the most leases that a runner may hold, each with a claim that
# may wait; and each lease has a heartbeat now and then.
REQUESTS_MAX = 128
PARKED_MAX = 64
# Answers with a job that was given before, which may have 15 MB each and be read slowly.
REPLAYS_MAX = 2


class Shares:
    """Counts what each holder has, and gives nobody more than `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: Counter[str] = Counter()

    def take(self, holder: str) -> bool:
        """Count one more of the holder's; False, and nothing is counted, when it has its share."""
        if self._held[holder] >= self.most:
            return False
        self._held[holder] += 1
        return True

    def give_back(self, holder: str) -> None:
        """Count one less of what `take` counted."""
        self._held[holder] -= 1
        if not self._held[holder]:
            del self._held[holder]


class RunnerShares:
    """The shares of a runner key in what this process has."""

    def __init__(self, uploads_max: int, verify_max: int) -> None:
        """`uploads_max` and `verify_max` are those of all runners; a quarter is one's share."""
        self.requests = Shares(REQUESTS_MAX)
        self.replays = Shares(REPLAYS_MAX)
        self.uploads = Shares(max(2, uploads_max // 4))
        self.verifications = Shares(max(1, verify_max // 4))
