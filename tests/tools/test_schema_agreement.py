"""documents/schemas.py (jsonschema-rs, arrays taken apart) against the reference, jsonschema.

For each schema, documents made from it and broken: both must give the same verdict and, where
something is wrong, name the same places. They compare like this: of an unknown member, we name the
member and the reference its object, so the object counts; of what has 50 violations or more, of
which we tell the first 50, only the verdict counts.

`SCHEMA_DOCUMENTS=5000` makes so many documents of each schema.
"""

import json
import os
import random
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jsonschema
import pytest

from broker.documents import strict_json
from broker.documents.schemas import FOLDER, load_schema
from broker.documents.strict_json import MAX_VIOLATIONS, check_text, pointer
from broker.errors import InvalidJson
from tests.fuzz import parsers
from tests.support.schema_documents import documents

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
COUNT = int(os.environ.get("SCHEMA_DOCUMENTS", "300"))
# The reference needs a minute for an array that was repeated over and over. Lone surrogates are
# found before (`check_text`): jsonschema-rs is never given one.
LONGEST = 100_000
RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
UNKNOWN_MEMBER = "is not a known member"

CHECKER = jsonschema.FormatChecker()


@CHECKER.checks("date-time")
def _is_date_time(value: object) -> bool:
    """The reference has no check of its own without another package."""
    if not isinstance(value, str):
        return True
    try:
        return bool(RFC3339.fullmatch(value) and datetime.fromisoformat(value.upper()))
    except ValueError:
        return False


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """As ECMA-262 says it, and not Python, whose `$` also matches before a last newline."""
    assert pattern.endswith("$")
    if isinstance(value, str) and not re.search(pattern[:-1] + r"\Z", value):
        yield jsonschema.ValidationError(f"does not match {pattern}")


Reference = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _pattern})


def told_by_the_reference(name: str, document: Any) -> set[str]:
    """Return the places of what is wrong."""
    reference = Reference(load_schema(name).definition, format_checker=CHECKER)
    return {pointer(error.absolute_path) for error in reference.iter_errors(document)}


def told_by_us(name: str, document: Any) -> tuple[set[str], int]:
    """Return the places of what is wrong, and how many violations there are."""
    violations = load_schema(name).violations(document)
    places = {
        violation.pointer.rpartition("/")[0]
        if violation.detail.endswith(UNKNOWN_MEMBER)
        else violation.pointer
        for violation in violations
    }
    return places, len(violations)


@pytest.mark.parametrize("name", NAMES)
def test_both_say_the_same_of_thousands_of_documents(name: str) -> None:
    seed = random.randrange(10**6)  # noqa: S311 (no secret)
    print(f"seed {seed}")  # noqa: T201 (shown when it fails)
    valid = 0
    rng = random.Random(f"{seed}:{name}")  # noqa: S311
    for document in documents(rng, load_schema(name).definition, COUNT):
        if len(str(document)) > LONGEST or check_text(document):
            continue
        theirs, (ours, count) = told_by_the_reference(name, document), told_by_us(name, document)
        assert bool(theirs) == bool(ours), json.dumps(document)[:2000]
        # jsonschema-rs leaves a member without a name out of its path.
        if count < MAX_VIOLATIONS and '"": ' not in json.dumps(document):
            assert theirs == ours, json.dumps(document)[:2000]
        valid += not ours
    assert COUNT / 10 < valid < COUNT * 0.9, "too few of one kind say nothing"


@pytest.mark.parametrize("name", ["result", "manifest", "envelope"])
def test_both_say_the_same_of_the_fuzzers_corpus(name: str) -> None:
    for path in parsers.corpus(name):
        try:
            document = strict_json.parse(path.read_bytes())
        except InvalidJson:
            continue
        if not check_text(document):
            assert told_by_the_reference(name, document) == told_by_us(name, document)[0], path


@pytest.mark.parametrize(
    "path", ["accepted-honest", "accepted-legacy", "accepted-plain-digests"]
)  # fmt: skip
def test_both_shapes_of_a_manifest_fit(path: str) -> None:
    document = json.loads(parsers.good(f"manifest/{path}.json"))
    assert ("bundle" in document) == (path == "accepted-legacy")
    assert told_by_the_reference("manifest", document) == set()
    assert told_by_us("manifest", document) == (set(), 0)
