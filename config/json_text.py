"""JSON text: where it holds what two parsers read differently, as RFC 6901 pointers.

Reads a text a second time, after a strict parser has refused it: NaN and Infinity, numbers too
large for a double or of too many digits, and members that are named twice.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_DIGITS = 308  # every such integer is also a finite double, and int() stays cheap
NO_NUMBER, TOO_LARGE = "is not a JSON number", "is too large for a double"
TOO_LONG = f"has more than {MAX_DIGITS} digits"
TWICE = "is named twice"

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

_Link = tuple[Any, str | int] | None  # the way to a value, from its end: (way to its parent, name)


@dataclass(frozen=True, slots=True)
class _Misfit:
    """A number in a text that no JSON number may be."""

    detail: str


@dataclass(frozen=True, slots=True)
class _Doubled:
    """An object that names a member twice."""

    pairs: list[tuple[str, Any]]


_NO_NUMBER, _TOO_LARGE, _TOO_LONG = _Misfit(NO_NUMBER), _Misfit(TOO_LARGE), _Misfit(TOO_LONG)


def misfits(text: str, max_depth: int) -> Iterator[tuple[str, str]]:
    """Yield pointer and reason of each value that is not strict JSON, in the text's order.

    Raises json.JSONDecodeError for what is no JSON at all, RecursionError for a text that is
    nested deeper than `max_depth`.
    """
    value = json.loads(
        text,
        object_pairs_hook=_object,
        parse_constant=lambda _: _NO_NUMBER,
        parse_float=lambda digits: _TOO_LARGE if math.isinf(float(digits)) else None,
        parse_int=lambda digits: _TOO_LONG if is_long(digits) else None,
    )
    stack: list[tuple[_Link, int, Any]] = [(None, 0, value)]
    while stack:
        link, depth, item = stack.pop()
        if isinstance(item, _Misfit):
            yield _pointer_of(link), item.detail
        elif isinstance(item, dict | list | _Doubled):
            if depth == max_depth:
                raise RecursionError
            stack += [((link, name), depth + 1, child) for name, child in _children(item)][::-1]


def pointer(path: Iterable[str | int]) -> str:
    """An RFC 6901 pointer that can always be sent: long or unstorable names are abridged."""
    return "".join("/" + _token(str(name)) for name in path)


def is_long(digits: str) -> bool:
    """Return whether an integer has more digits than any double."""
    return len(digits.removeprefix("-")) > MAX_DIGITS


def _children(item: dict[str, Any] | list[Any] | _Doubled) -> Iterator[tuple[str | int, Any]]:
    if isinstance(item, list):
        yield from enumerate(item)
    elif isinstance(item, dict):
        yield from item.items()
    else:
        seen: set[str] = set()
        for name, child in item.pairs:
            if name in seen:
                yield name, _Misfit(TWICE)
            seen.add(name)
            yield name, child


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Doubled:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _Doubled(pairs)


def _pointer_of(link: _Link) -> str:
    path = []
    while link is not None:
        link, name = link
        path.append(name)
    return pointer(reversed(path))


def _token(name: str) -> str:
    short = name if len(name) <= 100 else name[:100] + "…"
    return _UNSTORABLE.sub("\ufffd", short).replace("~", "~0").replace("/", "~1")
