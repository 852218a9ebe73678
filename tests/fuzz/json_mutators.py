"""Mutations of JSON: of its values, and of its text, which a value's mutation cannot reach."""

import json
import random
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

Rng = random.Random

# A scalar in its place: what follows a colon, a comma or a bracket.
_SCALAR = re.compile(
    rb'(?<=[:\[,] )(?:"(?:[^"\\]|\\.)*+"|-?[0-9][0-9.eE+-]*+|true|false|null)(?=[,\]}])'
)
_MEMBER = re.compile(rb'"(?:[^"\\]|\\.){1,60}+": (?:"(?:[^"\\]|\\.){0,80}+"|-?[0-9.eE+-]++|true)')
_NUMBER = re.compile(rb"(?<=[:\[,] )-?[0-9]+(?:\.[0-9]+)?(?=[,\]}])")

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 24.5, -0.0, 2**31, 2**63, 2**64, 10**300, 1e308, 5e-324,
    "", " ", "0", "null", "x" * 600, "\x00", "\ud800", "\u202e", "\uffff", "é", "../result.json",
    "a/b~c", "2025-11-23", "complete", [], {}, [[]], [None], {"": {}}, {"sha256": 1},
    "00000000-0000-4000-8000-000000000000", "{0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11}",
)  # fmt: skip
ODD_TEXTS = (
    b"NaN", b"-Infinity", b"1e999", b"-0", b"01", b"+1", b".5", b"1.", b"0x10", b"'a'", b"",
    rb'"\u0000"', rb'"\ud800"', rb'"\udc00\ud800"', rb'"\ud83d\ude00"', rb'"\x41"', b'"\xff"',
    b'"\xc0\xaf"', b'"\xed\xa0\x80"', b'"\t"', b'"' + b"a" * 5000 + b'"', b"9" * 5000,
    b"-" + b"9" * 308, b"1" + b"0" * 309, b"1e-400", b"0." + b"3" * 2000, b"[" * 70 + b"]" * 70,
    b"[" * 20_000 + b"]" * 20_000, b'{"a":' * 2_000 + b"1" + b"}" * 2_000, b"[" * 60_000,
    b"[" + b"0," * 5_000 + b"0]", b'{"a": 1, "a": 2}', b"/**/1", b"true", b"tru", b"\x00",
)  # fmt: skip


def odd_value(rng: Rng, *more: Any) -> Any:
    """Return one of ODD_VALUES or of `more`, for the caller alone.

    A list that stood in two documents, or in itself, would be changed in both, or have no end.
    """
    return deepcopy(rng.choice([*ODD_VALUES, *more]))


def mutate_value(rng: Rng, value: Any) -> Any:
    """Change one place of a parsed document, in the document itself; return it."""
    holder, name = _place(rng, value)
    if holder is None:
        return odd_value(rng)
    rng.choice(_CHANGES)(rng, holder, name)
    return value


def mutate_text(rng: Rng, text: bytes) -> bytes:
    """Change one place of a JSON text, such that often no JSON is left."""
    return rng.choice(_TEXT_CHANGES)(rng, text)


def rewrite(rng: Rng, text: bytes) -> bytes:
    """Spell the same values in other words; the text as it is when it cannot be read."""
    try:
        value = json.loads(text)
        if rng.random() < 0.3 and isinstance(value, dict):
            value = dict(sorted(value.items(), reverse=rng.random() < 0.5))
        separators = rng.choice([None, (",", ":"), (" , ", " : "), (",\r\n", ":\t")])
        indent = rng.choice([None, None, 0, 1, "\t"])
        written = json.dumps(
            value, indent=indent, separators=separators, ensure_ascii=rng.random() < 0.5
        ).encode()
    except (ValueError, RecursionError):
        return text
    return rng.choice([b"", b"", b" ", b"\n"]) + written + rng.choice([b"", b"\n", b" \r\n\t"])


def flip(rng: Rng, data: bytes) -> bytes:
    """Flip bits of one to three bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: Rng, data: bytes) -> bytes:
    """Drop the end, the beginning, or a piece."""
    first, second = sorted(rng.choices(range(len(data) + 1), k=2))
    return rng.choice([data[:first], data[first:], data[:first] + data[second:]])


def splice(rng: Rng, data: bytes) -> bytes:
    """Repeat a piece somewhere else."""
    first, second = sorted(rng.choices(range(len(data) + 1), k=2))
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[first : min(second, first + 4096)] + data[at:]


def _place(rng: Rng, value: Any) -> tuple[Any, Any]:
    """A random walk from the root: whom the place belongs to, and its name there."""
    holder = name = None
    while isinstance(value, dict | list) and value and (holder is None or rng.random() < 0.75):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        holder, name = value, rng.choice(keys)
        value = holder[name]
    return holder, name


def _drop(_: Rng, holder: Any, name: Any) -> None:
    del holder[name]


def _replace(rng: Rng, holder: Any, name: Any) -> None:
    holder[name] = odd_value(rng)


def _retype(rng: Rng, holder: Any, name: Any) -> None:
    value = holder[name]
    holder[name] = rng.choice([str(value), [value], {"value": value}, value is None, repr(value)])


def _nudge(rng: Rng, holder: Any, name: Any) -> None:
    """A value of the same type, close by: what a forger would change."""
    value = holder[name]
    if isinstance(value, bool) or value is None:
        holder[name] = not value
    elif isinstance(value, int | float):
        holder[name] = rng.choice([value + 1, value - 1, -value, value * 1.0000001, value * 10])
    elif isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        inserted = rng.choice(["", " ", "x", "0", "\u200b", "\n"])
        holder[name] = rng.choice(
            [value[:at] + inserted + value[at + 1 :], value.upper(), value + inserted, value[::-1]]
        )
    elif isinstance(value, list):
        rng.shuffle(value)
    else:
        holder[name] = dict(reversed(value.items()))


def _repeat(rng: Rng, holder: Any, name: Any) -> None:
    if isinstance(holder, list):
        holder[name:name] = [deepcopy(holder[name]) for _ in range(rng.choice([1, 1, 1, 50]))]
    else:
        holder[f"{name}_"] = deepcopy(holder[name])


def _rename(rng: Rng, holder: Any, name: Any) -> None:
    if isinstance(holder, dict):
        new = rng.choice([name.upper(), name + " ", "", "\x00", "__proto__", "x" * 200, "a/b~c"])
        holder[new] = holder.pop(name)


def _swap(rng: Rng, holder: Any, name: Any) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[name], holder[other] = holder[other], holder[name]


def _add(rng: Rng, holder: Any, _: Any) -> None:
    if isinstance(holder, dict):
        holder[rng.choice(["extra", "signer", "score", "run_id", "Run_Id", "bundle"])] = odd_value(
            rng
        )
    else:
        holder.append(odd_value(rng))


_CHANGES: tuple[Callable[[Rng, Any, Any], None], ...] = (
    _drop, _replace, _replace, _retype, _nudge, _nudge, _nudge, _repeat, _rename, _swap, _add,
)  # fmt: skip


def _found(rng: Rng, what: re.Pattern[bytes], text: bytes) -> re.Match[bytes] | None:
    """A match after a random position, or else the first."""
    return what.search(text, rng.randrange(len(text) + 1)) or what.search(text)


def _scalar(rng: Rng, text: bytes) -> bytes:
    """Put an odd text in a value's place."""
    match = _found(rng, _SCALAR, text)
    if match is None:
        return rng.choice(ODD_TEXTS)
    return text[: match.start()] + rng.choice(ODD_TEXTS) + text[match.end() :]


def _member_twice(rng: Rng, text: bytes) -> bytes:
    """Name a member twice, with another value first or last."""
    match = _found(rng, _MEMBER, text)
    if match is None:
        return text
    member = match[0]
    other = member.split(b": ")[0] + b": " + rng.choice([b"1", b"null", b'"x"', b"{}"])
    twice = rng.choice([member + b", " + member, other + b", " + member, member + b", " + other])
    return text[: match.start()] + twice + text[match.end() :]


def _number_spelled_otherwise(rng: Rng, text: bytes) -> bytes:
    """Write a number in another way: often the same value, never the same bytes."""
    match = _found(rng, _NUMBER, text)
    if match is None:
        return text
    digits = match[0]
    ways = [digits + b"e0", digits + b"E+00", b"-" + digits, digits + b"0", digits + b".0"]
    return text[: match.start()] + rng.choice(ways) + text[match.end() :]


def _letter_escaped(rng: Rng, text: bytes) -> bytes:
    """Write a letter as its escape: the same text in other bytes."""
    at = rng.randrange(len(text) + 1)
    letter = text[at : at + 1]
    return text[:at] + rb"\u%04x" % ord(letter) + text[at + 1 :] if letter.isalpha() else text


def _wrapped(rng: Rng, text: bytes) -> bytes:
    """Something before or after the document."""
    before = rng.choice([b"", b"\xef\xbb\xbf", b"\x00", b"[", b"{}", b"\x1f\x8b\x08"])
    after = rng.choice([b"", b"{}", b"]", b"\x00", b",", b"//", text[:100], b"\xff"])
    return before + text + after


def _encoded(rng: Rng, text: bytes) -> bytes:
    """Another encoding of the same characters."""
    try:
        return text.decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"]))
    except ValueError:
        return text


_TEXT_CHANGES: tuple[Callable[[Rng, bytes], bytes], ...] = (
    flip, flip, cut, splice, rewrite, _scalar, _scalar, _scalar, _member_twice, _member_twice,
    _number_spelled_otherwise, _letter_escaped, _wrapped, _encoded,
)  # fmt: skip
