"""JSON Schema documents (`json_schemas/`), and what a document violates of them.

The schemas are checked by the reference implementation (jsonschema) when they are loaded, and
applied by jsonschema-rs. Its `iter_errors` finds all errors before it yields the first (600,000
of them: 10 s and 1.5 GB), so arrays are taken out of a schema and validated item by item here. And
each error has a copy of what it is about (6 of a hostile 16 MiB: 16 GB), so what no rule looks at
is left out before errors are asked for.
"""

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema_rs

from broker.documents import strict_json
from broker.documents.strict_json import MAX_VIOLATIONS, pointer, quote
from broker.errors import BrokerError, Violation

MAX_DETAIL = 200
FOLDER = Path(__file__).parent / "json_schemas"

Place = tuple[str | int, ...]
# Rules that ask for a container's type and length at most, and those that ask for its members.
_OF_SHAPE = frozenset({"$comment", "$defs", "$id", "$schema", "description", "exclusiveMinimum",
                       "format", "maxItems", "maxLength", "maximum", "minItems", "minLength",
                       "minimum", "pattern", "title", "type"})  # fmt: skip
_OF_MEMBERS = frozenset({"additionalProperties", "if", "properties", "required", "then"})


@cache
def load_schema(name: str) -> "Schema":
    """Return the schema json_schemas/<name>.json. Raises jsonschema.SchemaError."""
    return Schema(json.loads((FOLDER / f"{name}.json").read_text("utf-8")))


def check_schemas() -> None:
    """Load every schema there is: a broken one stops the start, and no request pays for loading.

    Raises jsonschema.SchemaError, or ValueError from jsonschema-rs.
    """
    for path in sorted(FOLDER.glob("*.json")):
        load_schema(path.stem)


class Schema:
    """A compiled schema, shared by all threads. Formats are asserted; arrays do not recurse."""

    def __init__(self, definition: dict[str, Any]) -> None:
        jsonschema.Draft202012Validator.check_schema(definition)
        self.definition = definition
        self._root = _Node(definition, definition.get("$defs", {}))

    def read(self, text: bytes, refusal: type[BrokerError]) -> Any:
        """The value of a JSON text that fits.

        Raises InvalidJson or DuplicateKey for the text, `refusal` with violations for the values.
        """
        document = strict_json.parse(text)
        self.check(text, document, refusal)
        return document

    def check(self, text: bytes, document: Any, refusal: type[BrokerError]) -> None:
        """Raise `refusal` with violations unless the parsed text fits and can be stored."""
        violations = strict_json.check_text(document) if strict_json.suspicious(text) else ()
        violations = violations or self.violations(document)
        if violations:
            raise refusal(violations=violations)

    def violations(self, document: Any) -> tuple[Violation, ...]:
        """Return the first 50 violations of a parsed document; empty when it fits.

        The details are at most 200 characters and never hold the document's values.
        """
        try:
            return tuple(islice(self._root.violations(document, ()), MAX_VIOLATIONS))
        except UnicodeEncodeError:  # jsonschema-rs cannot read lone surrogates
            return strict_json.check_text(document)


class _Node:
    """A schema without its arrays' items, and a node for the items of each array."""

    def __init__(self, schema: dict[str, Any], defs: dict[str, Any]) -> None:
        self._defs = defs
        self._arrays: list[tuple[tuple[str, ...], _Node]] = []
        self._shell = self._without_items(schema, ())
        self._validator = jsonschema_rs.Draft202012Validator(
            {**self._shell, "$defs": defs},
            validate_formats=True,
            ignore_unknown_formats=False,
            mask="the value",
            offline=True,
        )

    def violations(self, document: Any, place: Place) -> Iterator[Violation]:
        if not self._validator.is_valid(document):
            errors = list(self._validator.iter_errors(self._thin(self._shell, document)))
            # Were too much left out, it would be told at length, and never taken for one that fits.
            for error in errors or self._validator.iter_errors(document):
                yield from _told(error, place)
        for members, node in self._arrays:
            items = _reach(document, members)
            for index, item in enumerate(items if isinstance(items, list) else ()):
                yield from node.violations(item, (*place, *members, index))

    def _thin(self, schema: Any, value: Any) -> Any:
        """The value without what no rule of the schema looks at; whole when a rule is another."""
        if not isinstance(value, dict | list):
            return value
        rules = self._resolve(schema) if isinstance(schema, dict) else {}
        if not rules.keys() <= _OF_SHAPE | _OF_MEMBERS or not _looks_at_types(rules):
            return value
        if isinstance(value, list):
            return [None] * len(value)
        members, others = rules.get("properties", {}), rules.get("additionalProperties", True)
        return {
            name: self._thin(members[name], child) if name in members else None
            for name, child in value.items()
            if name in members or others is False  # which is told by the name
        }

    def _without_items(self, schema: Any, members: tuple[str, ...]) -> Any:
        """The schema to compile; on the way, each array's items become a node."""
        if not isinstance(schema, dict):
            return schema
        shell = dict(schema)
        if isinstance(schema.get("items"), dict) and "prefixItems" not in schema:
            self._arrays.append((members, _Node(self._resolve(shell.pop("items")), self._defs)))
        if "properties" in schema:
            shell["properties"] = {
                name: self._without_items(child, (*members, name))
                for name, child in schema["properties"].items()
            }
        return shell

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        """One step, and only for a bare reference: enough to see the arrays behind it."""
        target = schema.get("$ref", "")
        if target.startswith("#/$defs/") and len(schema) == 1:
            return self._defs[target.removeprefix("#/$defs/")]
        return schema


def _reach(document: Any, members: tuple[str, ...]) -> Any:
    for name in members:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _looks_at_types(rules: dict[str, Any]) -> bool:
    """Return whether no rule looks deeper into members than `_thin` does by `properties` alone."""
    then = [rules[name] for name in ("if", "then") if name in rules]
    looked_at = {name: rule for part in then for name, rule in part.get("properties", {}).items()}
    return (
        isinstance(rules.get("additionalProperties", True), bool)
        and all(part.keys() <= {"properties", "required"} for part in then)
        and all(rule.keys() <= {"type"} for rule in looked_at.values())
        and {*looked_at, *(name for part in then for name in part.get("required", ()))}
        <= rules.get("properties", {}).keys()
    )


def _told(error: jsonschema_rs.ValidationError, place: Place) -> Iterator[Violation]:
    """Unknown members are named one by one; all else is told in the library's masked words."""
    here = (*place, *error.instance_path)
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.AdditionalProperties):
        for name in error.kind.unexpected:
            yield Violation(pointer((*here, name)), f"{quote(name)} is not a known member")
    else:
        yield Violation(pointer(here), _short(error.message))


def _short(message: str) -> str:
    return message if len(message) <= MAX_DETAIL else message[: MAX_DETAIL - 1] + "…"
