"""The demo runner's scorers: an answer and what was expected in, a quality in [0, 1] out.

`None` means "cannot be scored here": a judge's scorer, one we do not know, or an expectation that
the scorer cannot use. The harness writes that as `quality_heuristic: null`.

The patterns of `regex` come from the admin who enqueued the task and run without a time limit; a
runner that must not trust its admins would need one.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Scorer = Callable[[str, Any], float | None]


def score(scorer: str, text: str, expected: Any) -> float | None:
    """Return 1.0 when `text` is what `expected` asks for, 0.0 when not, None when unscorable.

    `expected` is a string or a number, or a list of them of which one is enough.
    """
    judge = SCORERS.get(scorer)
    return None if judge is None else judge(text, expected)


def exact(text: str, expected: Any) -> float | None:
    """The whole answer, without regard to case, outer blanks and a closing full stop."""
    return _verdict(_alternatives(expected), lambda one: _plain(text) == _plain(one))


def contains(text: str, expected: Any) -> float | None:
    """The expectation somewhere in the answer, without regard to case."""
    return _verdict(_alternatives(expected), lambda one: one.casefold() in text.casefold())


def regex(text: str, expected: Any) -> float | None:
    """A Python regular expression found somewhere in the answer; None when it does not compile."""
    try:
        patterns = [re.compile(one) for one in _alternatives(expected)]
    except re.error:
        return None
    return _verdict(patterns, lambda one: one.search(text) is not None)


SCORERS: dict[str, Scorer] = {"exact": exact, "contains": contains, "regex": regex}


def _verdict(wanted: list[T], fits: Callable[[T], bool]) -> float | None:
    return float(any(fits(one) for one in wanted)) if wanted else None


def _alternatives(expected: Any) -> list[str]:
    """The strings that would do. Empty ones go: every answer contains the empty string."""
    several = expected if isinstance(expected, list) else [expected]
    texts = [_text(one) for one in several]
    return [text for text in texts if text]


def _text(value: Any) -> str:
    """A string as it is, a number as JSON spells it; anything else can be no answer."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return str(value).strip()


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()
