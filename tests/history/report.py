"""What the checker prints: progress, a table of faults, violations, and JSON on the last line."""

import json
import sys
from collections import Counter
from collections.abc import Sequence

from tests.history.server_logs import summed_up
from tests.history.storm import Verdict

ERRORS = 20


def tell(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tell_verdict(name: str, verdict: Verdict) -> None:
    """Print what a storm came to, but for its faults."""
    states = ", ".join(f"{n} {state}" for state, n in sorted(verdict.states.items()))
    tell(f"{name}: {verdict.runs} runs ({states}) in {verdict.seconds:.0f} s")
    if verdict.lapse_lags_s:
        lags = verdict.lapse_lags_s
        tell(f"  deadline to lapse: p50 {_at(lags, 0.5)}, p99 {_at(lags, 0.99)} of {len(lags)}")
    if verdict.starts_s:
        starts = sorted(verdict.starts_s)
        tell(f"  fork to listening: p50 {_at(starts, 0.5)}, p99 {_at(starts, 0.99)}")
    for violation in verdict.violations:
        tell(f"  VIOLATION {violation.invariant}: {violation.count}")
        for row in violation.evidence:
            tell(f"    {row}")
    if verdict.violations and verdict.errors:
        tell("  what the servers logged:")
        for error, count in summed_up(verdict.errors).most_common(ERRORS):
            tell(f"    {count} x {error}")


def tell_faults(faults: Counter[str]) -> None:
    """Print the faults injected, by kind."""
    tell(f"{'faults injected':<32}{'count':>8}")
    for kind, count in sorted(faults.items()):
        tell(f"  {kind:<30}{count:>8}")
    tell(f"  {'all':<30}{sum(faults.values()):>8}")


def tell_last(*, seed: str, **facts: int) -> None:
    """Print the last line."""
    tell(json.dumps({**facts, "seed": int(seed) if seed.isdecimal() else seed}))


def _at(values: Sequence[float], share: float) -> str:
    return f"{values[min(len(values) - 1, int(share * len(values)))]:.2f} s"
