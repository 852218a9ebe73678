"""What the servers of a storm logged: only errors are, and sound code leaves no traceback."""

import json
import re
from collections import Counter

from tests.history.invariants import EXAMPLES, Violation

# A 500 is logged as http.failed, and a violation by itself (`no_internal_errors`) if it was seen.
# An event of ours without a traceback (sweep.held) is an alarm to operators, and meant so.
EXPECTED = re.compile(r"http\.failed\b.*|[a-z_]+\.[a-z_]+", re.DOTALL)
LINES = 14


def summed_up(log: str) -> Counter[str]:
    """Count the errors of the servers' logs; a traceback as its last lines."""
    errors: Counter[str] = Counter()
    for line in filter(None, log.splitlines()):
        try:
            event = json.loads(line)
            trace = event.get("exception", "").strip().splitlines()
            errors[" | ".join([event["event"], *(each.strip() for each in trace[-LINES:])])] += 1
        except (ValueError, KeyError, AttributeError):
            errors[line] += 1
    return errors


def violations(log: str) -> list[Violation]:
    """Return the errors that no client was told of: a background task that died, say."""
    errors = Counter(
        {error: n for error, n in summed_up(log).items() if not EXPECTED.fullmatch(error)}
    )
    evidence = tuple(f"{n} x {error}" for error, n in errors.most_common(EXAMPLES))
    return [Violation("no_errors_behind_the_answers", errors.total(), evidence)] if errors else []
