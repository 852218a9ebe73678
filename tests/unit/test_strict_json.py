"""JSON text and JSON values: the classes of security.md that a parser decides."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.documents.strict_json import check_text, holds_more, parse, pointer, suspicious
from broker.errors import DuplicateKey, InvalidJson, Violation

NOT_UTF8 = {
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-16 without a mark": '{"a": 1}'.encode("utf-16-le"),
    "overlong slash": b'"\xc0\xaf"',
    "raw surrogate": b'"\xed\xa0\x80"',
    "Latin-1": b'"caf\xe9"',
    "byte order mark": b"\xef\xbb\xbf{}",
}
NOT_NUMBERS = {
    "NaN": b'{"score": NaN}',
    "Infinity": b"[Infinity]",
    "-Infinity": b"-Infinity",
    "overflow to infinity": b"1e999",
    "negative overflow": b"[-1e999]",
    "5,000-digit integer": b"9" * 5000,
    "309-digit integer": b"1" + b"0" * 308,
    "leading zero": b"01",
    "plus": b"+1",
    "hexadecimal": b"0x10",
    "full-width digits": "\uff11\uff12".encode(),
}
NOT_JSON = {
    "empty": b"",
    "spaces": b"  \n",
    "trailing text": b"{} x",
    "two values": b"{}{}",
    "trailing comma": b"[1,]",
    "single quotes": b"{'a': 1}",
    "comment": b"{} // no",
    "unterminated": b'{"a": "b',
    "raw newline in a string": b'"a\nb"',
    "raw NUL in a string": b'"\x00"',
    "raw NUL after it": b"{}\x00",
    "bad escape": rb'"\x41"',
    "half an escape": rb'"\ud8"',
    "non-breaking space": "\u00a0{}".encode(),
}
REFUSED = NOT_UTF8 | NOT_NUMBERS | NOT_JSON


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_text_that_is_not_strict_json_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidJson) as refused:
        parse(text)
    assert type(refused.value) is InvalidJson
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "text",
    [b'{"a":1,"a":1}', rb'{"a":1,"\u0061":2}', b'[{"x":{"a":1,"b":2,"a":3}}]', b'{"":1,"":2}'],
)
def test_a_member_named_twice_is_refused_at_any_depth(text: bytes) -> None:
    with pytest.raises(DuplicateKey, match="twice"):
        parse(text)


def test_the_same_name_in_two_objects_is_fine() -> None:
    assert parse(b'[{"a":1},{"a":{"a":2}}]') == [{"a": 1}, {"a": {"a": 2}}]


@pytest.mark.parametrize("opened", [b"[", b'{"a":'])
def test_depth_64_is_read_and_depth_65_is_refused(opened: bytes) -> None:
    closed = b"]" if opened == b"[" else b"}"
    assert parse(opened * 64 + b"1" + closed * 64)
    with pytest.raises(InvalidJson, match="deeper than 64"):
        parse(opened * 65 + b"1" + closed * 65)


@pytest.mark.parametrize("opened", [b"[", b'{"a":'])
@pytest.mark.parametrize("closed", [b"", b"]"])
def test_100_000_brackets_are_refused_as_depth(opened: bytes, closed: bytes) -> None:
    with pytest.raises(InvalidJson, match="deeper than 64"):
        parse(opened * 100_000 + b"1" + closed * 100_000)


def test_many_shallow_arrays_are_not_depth() -> None:
    assert len(parse(b"[" + b"[],{}," * 1000 + b"1]")) == 2001


def test_brackets_inside_strings_are_not_depth() -> None:
    assert parse(b'"' + b"[{" * 1000 + b'"') == "[{" * 1000


def texts_of(values: int) -> dict[str, bytes]:
    """Texts that hold so many values, an even number that 20 divides; half of them containers."""
    half = values // 2
    return {
        "a huge array": b"[" + b"1," * (values - 1) + b"1]",
        "many members": b"{" + b",".join(b'"%d":1' % n for n in range(values - 1)) + b',"":1}',
        "objects": b"[" + b",".join([b"{}"] * half) + b"]",
        "deep nesting": b"[" + b",".join([b"[" * 9 + b"]" * 9] * (values // 10)) + b"]",
        "strings that end late": b"[" + b",".join([rb'"\\\",[{"'] * values) + b"]",
        "strings that end soon": b"[" + b",".join([rb'"\\"'] * values) + b"]",
    }


@pytest.mark.parametrize("kind", texts_of(20))
def test_values_are_counted_without_parsing(kind: str) -> None:
    text = texts_of(1000)[kind]
    assert parse(text)
    assert not holds_more(text, 1000)
    assert holds_more(text, 999)


@pytest.mark.parametrize("inside", [",", "[", "{", r"\",", r"\\,", r"\\\"[", r"\u0022,"])
def test_what_looks_like_a_value_in_a_string_is_none(inside: str) -> None:
    text = f'["{inside * 1000}", "{inside}"]'
    assert len(json.loads(text)) == 2
    assert not holds_more(text.encode(), 2)
    assert holds_more(text.encode(), 1)


@given(
    st.recursive(st.text('\\",[{a'), lambda of: st.lists(of) | st.dictionaries(st.text('\\",'), of))
)
def test_of_any_value_no_fewer_members_and_entries_are_counted_than_it_has(value: object) -> None:
    def count(of: object) -> int:
        inner = of.values() if isinstance(of, dict) else of if isinstance(of, list) else ()
        return len(list(inner)) + sum(map(count, inner))

    text = json.dumps(value).encode()
    assert not count(value) or holds_more(text, count(value) - 1)
    assert not holds_more(text, 2 * count(value) + 1)


def test_a_refusal_tells_line_and_column() -> None:
    with pytest.raises(InvalidJson, match="line 2, column 7"):
        parse(b'{"a": 1,\n "b": oops}')


def test_a_byte_order_mark_is_told_with_the_fix() -> None:
    with pytest.raises(InvalidJson, match="save it as UTF-8 without BOM"):
        parse(b"\xef\xbb\xbf{}")


def test_a_refusal_never_holds_a_value_and_abridges_a_name() -> None:
    secret = "s3cret-" * 100
    for text in (f'["{secret}" 1]', f'{{"a": "{secret}", "a": "{secret}"}}', f'"{secret}'):
        with pytest.raises(InvalidJson) as refused:
            parse(text.encode())
        assert "s3cret" not in str(refused.value)
    with pytest.raises(DuplicateKey) as twice:
        parse(f'{{"{secret}": 1, "{secret}": 2}}'.encode())
    assert len(str(twice.value)) < 200


# Each kind of value that is refused for how it could be read, and each with its place.
MISFITS = {
    "NaN": "is not a JSON number",
    "-Infinity": "is not a JSON number",
    "1e999": "is too large for a double",
    "9" * 309: "has more than 308 digits",
    '{"a": 1, "b": 2, "a": 3}': "is named twice",
}


@pytest.mark.parametrize(("written", "detail"), MISFITS.items())
@pytest.mark.parametrize(
    ("text", "place"),
    [("{}", ""), ('{{"x": [1, {{"y": {}}}]}}', "/x/1/y"), ('[[], {{"a/b": {}}}]', "/1/a~1b")],
)
def test_what_two_parsers_read_differently_is_told_by_pointer(
    text: str, place: str, written: str, detail: str
) -> None:
    with pytest.raises(InvalidJson) as refused:
        parse(text.format(written).encode())
    told = place + ("/a" if "twice" in detail else "")
    assert refused.value.violations == (Violation(told, detail),)


def test_every_place_is_told_in_order_and_the_first_50() -> None:
    with pytest.raises(InvalidJson) as refused:
        parse(b'{"a": {"b": 1, "b": [NaN, 2, 1e999]}, "c": NaN}')
    assert [v.pointer for v in refused.value.violations] == ["/a/b", "/a/b/0", "/a/b/2", "/c"]
    with pytest.raises(InvalidJson) as refused:
        parse(b"[" + b"NaN," * 80 + b"1]")
    assert [v.pointer for v in refused.value.violations] == [f"/{i}" for i in range(50)]


def test_a_place_is_looked_for_within_the_depth_that_is_read() -> None:
    for text in (b"[NaN," + b"[" * 70 + b"NaN" + b"]" * 71, b"[NaN," + b"[" * 100_000):
        with pytest.raises(InvalidJson, match="deeper than 64"):
            parse(text)
    with pytest.raises(InvalidJson, match="Not JSON at line 1, column 7"):
        parse(b"[NaN, oops]")


@pytest.mark.parametrize("sign", ["", "-"])
def test_308_digits_are_read_with_either_sign_and_309_are_not(sign: str) -> None:
    assert parse(f"{sign}{'9' * 308}".encode()) == int(f"{sign}{'9' * 308}")
    with pytest.raises(InvalidJson, match="308 digits"):
        parse(f"{sign}{'9' * 309}".encode())


def test_what_python_and_json_both_know_comes_through_unchanged() -> None:
    value = {"a": [1, -2.5, 1e300, True, None, "é\U0001f600"], "": {"deep": [[]]}, "n": 10**307}
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (rb'"\u0000"', [""]),
        (rb'{"a": ["x", "b\u0000c"]}', ["/a/1"]),
        (rb'{"a": "\ud800"}', ["/a"]),
        (rb'{"a": "\uDFFF"}', ["/a"]),
        (rb'{"a": "\uD8aF"}', ["/a"]),
        (rb'[{"k\u0000": "\udc00"}]', ["/0", "/0/k\ufffd"]),
        (rb'{"x/y": {"~": "\u0000"}}', ["/x~1y/~0"]),
    ],
)
def test_strings_postgres_cannot_store_are_told_by_pointer(text: bytes, places: list[str]) -> None:
    assert suspicious(text)
    assert [violation.pointer for violation in check_text(parse(text))] == places


def test_only_the_first_50_unstorable_strings_are_told_in_order() -> None:
    assert [v.pointer for v in check_text(["\x00"] * 80)] == [f"/{i}" for i in range(50)]


def test_a_pair_of_surrogates_is_one_character_and_fine() -> None:
    assert check_text(parse(rb'"\ud83d\ude00"')) == ()


def test_unstorable_names_can_be_told_in_json() -> None:
    for violation in check_text({"\ud800\x00": {"\ud800": "\x00"}}):
        assert isinstance(violation, Violation)
        json.dumps(violation.pointer, ensure_ascii=False).encode("utf-8")
        assert "\x00" not in violation.pointer


def test_a_pointer_escapes_and_abridges_names() -> None:
    assert pointer(("a/b", "m~n", 3, "")) == "/a~1b/m~0n/3/"
    assert len(pointer(("x" * 10_000,))) < 110


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**307), 10**307)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(_VALUES)
def test_every_json_value_survives_and_nothing_unstorable_escapes_suspicion(value) -> None:
    text = json.dumps(value).encode()
    read = json.loads(text)  # not `value`: two lone surrogates side by side become a character
    assert parse(text) == read
    assert suspicious(text) or check_text(read) == ()


@given(st.binary(max_size=60) | st.text('[]{}",:\\u0d8eE+-.1 \x00').map(str.encode))
def test_no_text_raises_anything_but_invalid_json(text: bytes) -> None:
    with suppress(InvalidJson):
        parse(text)
