"""Documents for a JSON schema: some that fit, made from the schema, and broken ones.

Only the keywords that our schemas use are known; another one fails, and says so.
"""

import random
from collections.abc import Iterator
from typing import Any

from tests.fuzz.json_mutators import mutate_value

Rng = random.Random
Json = dict[str, Any]

# What this generator reads; the names only annotate.
KEYWORDS = frozenset({
    "$schema", "$id", "$defs", "$ref", "$comment", "title", "description", "type", "enum", "const",
    "format", "pattern", "properties", "required", "additionalProperties", "propertyNames",
    "minProperties", "maxProperties",
    "items", "minItems", "maxItems", "minLength", "maxLength", "minimum",
    "maximum", "exclusiveMinimum", "anyOf", "if", "then", "else", "not",
})  # fmt: skip
FORMATS = {
    "uuid": ["0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11", "0B6F1F64-4C3F-4F0E-9F6B-2F6A0C1D7E11"],
    "date-time": ["2026-11-24T12:00:00Z", "2026-11-24t12:00:00.25+01:00"],
    "date": ["2026-11-24", "2024-02-29"],
}
# A text for each pattern: all of them begin with ^ and end with $.
PATTERNS = {
    "^[0-9a-f]{8}-": "0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11",
    "^[^": "Llama 3.3 é 70B",
    "^[0-9a-f]{64}$": "0a" * 32,
    "^(sha256:)?[0-9a-f]{64}$": "sha256:" + "0a" * 32,
    "^[0-9a-f]{16}$": "0a" * 8,
    "^([0-9]{4}": "20251123-120000",
    "^[A-Za-z0-9_-]{16,128}$": "nonce_0123456789-abc",
    "^[A-Za-z0-9": "a",
    "^[a-z0-9_]": "q4_k_m",
}
ODD_TEXTS = (
    "", "\n", "x\n", "a" * 300, "A", "é", "\U0001f600", "e\u0301", "\u2028", "\u200e", "\x7f", "-",
    "0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11\n", "{0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11}",
    "0a" * 32 + "\n", "2025-11-23", "2025-02-30", "2025-11-23T12:00:00Z\n", "2025-11-23T25:00:00Z",
    "2025-11-23T12:00:00", "2025-11-23 12:00:00Z", "20251123T120000Z", "20251123-246000",
    "\uff11", "0b6f1f644c3f4f0e",
)  # fmt: skip
ODD_NUMBERS = (0, -1, 1, 1.0, 1.5, -0.0, 1e300, 10**300, 2**31 - 1, 2**31, 2**63, 5e-324, True)


def documents(rng: Rng, schema: Json, count: int) -> Iterator[Any]:
    """Yield so many documents: one that fits, then the same one with places changed."""
    for number in range(count):
        document = _value(rng, schema, schema)
        for _ in range(0 if number % 4 == 0 else rng.choice([1, 1, 2, 3])):
            document = _broken(rng, document)
        yield document


def _broken(rng: Rng, document: Any) -> Any:
    if rng.random() < 0.5:
        return mutate_value(rng, document)
    places = list(_scalars(document))
    if places:
        holder, name = rng.choice(places)
        odd = ODD_TEXTS if isinstance(holder[name], str) else ODD_NUMBERS
        holder[name] = rng.choice(odd)
    return document


def _scalars(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict | list):
        return
    for name, child in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(child, dict | list):
            yield from _scalars(child)
        else:
            yield value, name


def _value(rng: Rng, schema: Any, root: Json) -> Any:
    """A value that fits a schema, most of the time."""
    if schema is True:
        return rng.choice([None, 1, "x", {"any": [1]}])
    unknown = schema.keys() - KEYWORDS
    assert not unknown, f"teach tests/support/schema_documents.py the keywords {unknown}"
    if "$ref" in schema:
        return _value(rng, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "if" in schema:
        branch = schema.get(rng.choice(["then", "else"]), {})
        return _value(rng, _merged(schema, branch), root)
    if "anyOf" in schema:
        rest = {name: of for name, of in schema.items() if name != "anyOf"}
        return _value(rng, _merged(rest, rng.choice(schema["anyOf"])), root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kinds = schema.get("type", "object" if "properties" in schema else "string")
    kind = rng.choice(kinds) if isinstance(kinds, list) else kinds
    return _MAKERS[kind](rng, schema, root)


def _merged(schema: Json, branch: Json) -> Json:
    merged = {name: of for name, of in schema.items() if name not in ("if", "then", "else")}
    for name, of in branch.items():
        if name == "properties":
            of = {**merged.get(name, {}), **of}
        elif name == "required":
            of = [*merged.get(name, []), *of]
        merged[name] = of
    return merged


def _object(rng: Rng, schema: Json, root: Json) -> Json:
    properties: Json = schema.get("properties", {})
    names = [n for n in properties if n in schema.get("required", ()) or rng.random() < 0.6]
    made = {name: _value(rng, properties[name], root) for name in names}
    if properties and len(names) < schema.get("minProperties", 0):
        names = rng.sample([*properties], schema["minProperties"])
        made = {name: _value(rng, properties[name], root) for name in names}
    made |= {name: "x" for name in schema.get("required", ()) if name not in made}
    more = schema.get("additionalProperties", True)
    if more is not False and rng.random() < 0.4:
        made["more"] = _value(rng, more, root)
    return made


def _array(rng: Rng, schema: Json, root: Json) -> list[Any]:
    least = schema.get("minItems", 0)
    most = min(schema.get("maxItems", 3), max(least, 3))
    size = rng.randint(least, most)
    return [_value(rng, schema.get("items", True), root) for _ in range(size)]


def _string(rng: Rng, schema: Json, _: Json) -> str:
    if "format" in schema:
        return rng.choice(FORMATS[schema["format"]])
    if "pattern" in schema:
        return next(of for start, of in PATTERNS.items() if schema["pattern"].startswith(start))
    least, most = schema.get("minLength", 0), schema.get("maxLength", 20)
    size = rng.choice([least, min(most, least + 3), min(most, 300)])
    return rng.choice("ab é\U0001f600") * size


def _number(rng: Rng, schema: Json, _: Json) -> float:
    least = schema.get("minimum", schema.get("exclusiveMinimum", -5))
    most = schema.get("maximum", least + 1000)
    return rng.choice([least, most, least + 1, (least + most) // 2, float(most)])


_MAKERS = {
    "object": _object,
    "array": _array,
    "string": _string,
    "number": _number,
    "integer": _number,
    "boolean": lambda rng, _schema, _root: rng.random() < 0.5,
    "null": lambda *_: None,
}
