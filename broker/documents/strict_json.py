"""Strict JSON: RFC 8259 in UTF-8, without the readings on which two parsers differ.

A signed result is read by us today and by others years later. Whatever could be read in two
ways (a member named twice, NaN, a byte order mark) is refused, so that all see the same numbers.
"""

import json
import math
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from broker.errors import DuplicateKey, InvalidJson, Violation
from config.json_text import MAX_DIGITS, is_long, misfits, pointer

MAX_VIOLATIONS = 50

_SUSPICIOUS = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def parse(text: bytes, *, max_depth: int = 64) -> Any:
    """The value of a JSON text; `max_depth` counts nested arrays and objects.

    Raises DuplicateKey for a member named twice, InvalidJson for everything else that is not
    strict JSON. The messages hold a position or a member's name, never a value; a value that two
    parsers would read differently is told by its pointer.
    """
    decoded = _decode(text)
    try:
        value = _load(decoded, max_depth)
    except _Misread as misread:
        raise _misfit(decoded, max_depth, misread.refusal) from None
    if text.count(b"[") + text.count(b"{") > max_depth:
        _check_depth(value, max_depth)
    return value


class _Misread(Exception):
    """JSON that two parsers read differently; `refusal` does not say where yet."""

    def __init__(self, refusal: InvalidJson) -> None:
        super().__init__()
        self.refusal = refusal


def _load(text: str, max_depth: int) -> Any:
    with _told(max_depth):
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )


def _misfit(text: str, max_depth: int, refusal: InvalidJson) -> InvalidJson:
    """Return the refusal with a pointer to each place; the text is read again for it."""
    with _told(max_depth):
        found = list(islice(misfits(text, max_depth), MAX_VIOLATIONS))
    return type(refusal)(str(refusal), tuple(Violation(*each) for each in found))


@contextmanager
def _told(max_depth: int) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidJson(f"Not JSON at {where}: {error.msg}.") from None
    except RecursionError:  # the C scanner counts its own depth, so this cannot overrun the stack
        raise _too_deep(max_depth) from None


def _decode(text: bytes) -> str:
    if text.startswith(BOM_UTF8):
        raise InvalidJson("The text begins with a byte order mark: save it as UTF-8 without BOM.")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"The text is not UTF-8 at byte {error.start}.") from None


def _openings(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _check_depth(value: Any, max_depth: int) -> None:
    """Level by level, in Python: other threads may run meanwhile, and nothing recurses."""
    level = _containers([value])
    for _ in range(max_depth):
        level = _containers(
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
        )
    if level:
        raise _too_deep(max_depth)


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]


def _too_deep(max_depth: int) -> InvalidJson:
    return InvalidJson(f"Arrays and objects are nested deeper than {max_depth}.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _Misread(DuplicateKey(f"An object names the member {quote(twice)} twice."))
    return members


def _constant(name: str) -> float:
    raise _Misread(InvalidJson(f"{name} is not a JSON number."))


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Misread(InvalidJson("A number is too large for a double."))
    return value


def _int(digits: str) -> int:
    if is_long(digits):
        raise _Misread(InvalidJson(f"An integer has more than {MAX_DIGITS} digits."))
    return int(digits)


def holds_more(text: bytes, values: int) -> bool:
    """Return whether a JSON text has more members and entries than that, without parsing it.

    Each has a comma or a bracket before it; `{}` and `[]` count as two.
    """
    if _openings(text) <= values:  # those in strings counted too: nearly always enough
        return False
    # Strings end at a quotation mark that is not escaped. Of what is no JSON, as much is counted
    # as a parser would read.
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = plain.count(b'"') // 2  # of a member, its name and its value at most
    return strings > 2 * values or _openings(b"".join(plain.split(b'"')[::2])) > values


def suspicious(text: bytes) -> bool:
    """Return whether a parsed text can hold what `check_text` refuses (raw forms are not JSON)."""
    return _SUSPICIOUS.search(text) is not None


def check_text(value: Any) -> tuple[Violation, ...]:
    """The strings that PostgreSQL cannot store: with U+0000 or lone surrogates; the first 50."""
    return tuple(islice(_unstorable(value), MAX_VIOLATIONS))


def _unstorable(value: Any) -> Iterator[Violation]:
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, str) and _UNSTORABLE.search(item):
            yield Violation(pointer(path), "holds U+0000 or a lone surrogate")
        elif isinstance(item, dict):
            if any(_UNSTORABLE.search(name) for name in item):
                yield Violation(pointer(path), "a member's name holds U+0000 or a lone surrogate")
            stack += [((*path, name), child) for name, child in reversed(item.items())]
        elif isinstance(item, list):
            stack += [((*path, i), item[i]) for i in range(len(item) - 1, -1, -1)]


def quote(name: str) -> str:
    """A name from outside for a message: ASCII only, quoted, at most some 80 characters."""
    return json.dumps(name if len(name) <= 60 else name[:60] + "…")[:80]
