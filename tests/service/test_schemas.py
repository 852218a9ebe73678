"""Schemas: what they refuse, how it is told, and that two implementations agree on it."""

import copy
import json
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any

import jsonschema
import pytest

from broker.documents import schemas
from broker.documents.schemas import FOLDER, Schema, load_schema
from broker.documents.strict_json import pointer
from broker.errors import DuplicateKey, InvalidBundle, InvalidJson, InvalidRequest, Violation
from config.settings import Settings
from server import open_services
from tests.support.result_factory import bundle_files, failed_record, job_payload, result_for

RUN_ID = "0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11"
PAYLOAD = job_payload()
RESULT = result_for(RUN_ID, PAYLOAD)
MANIFEST = json.loads(bundle_files(RESULT, b"{}")["manifest.json"])
FAILED = failed_record(PAYLOAD["tasks"][0], "prompt-0", "m", "oom")


class Absent(Enum):
    """A member that is left out; an enum, so that every process names the test the same."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


def changed(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy with one place replaced, or removed."""
    copied = copy.deepcopy(document)
    place = copied
    for name in path[:-1]:
        place = place[name]
    if value is ABSENT:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copied


GOOD = [
    ("result", RESULT),
    ("result", changed(RESULT, ("hardware",), None)),
    ("result", changed(RESULT, ("hardware", "gpu_model"), None)),
    ("result", changed(RESULT, ("judgements",), ABSENT)),
    ("result", changed(RESULT, ("timestamp",), "2025-11-23T12:00:00.123456")),
    ("result", changed(RESULT, ("records", 0), FAILED)),
    ("result", changed(RESULT, ("records", 0, "quality_heuristic"), None)),
    ("result", changed(RESULT, ("records", 0, "quality_heuristic"), -1)),
    ("result", changed(RESULT, ("records", 0, "completion_tokens"), 24.0)),
    ("result", changed(RESULT, ("records", 0, "a_newer_measurement"), {"any": [1]})),
    ("result", changed(RESULT, ("a_newer_member",), 1)),
    ("result", changed(RESULT, ("records",), [])),
    ("manifest", MANIFEST),
    ("manifest", changed(MANIFEST, ("signature",), ABSENT)),
    ("manifest", changed(MANIFEST, ("files", "summary.md"), "a" * 64)),
]
R0 = ("records", 0)
BAD = [
    ("result", (), []),
    ("result", ("run_id",), ABSENT),
    ("result", ("run_id",), "{" + RUN_ID + "}"),
    ("result", ("run_id",), "urn:uuid:" + RUN_ID),
    ("result", ("run_id",), RUN_ID + "\n"),
    ("result", ("timestamp",), ABSENT),
    ("result", ("timestamp",), "yesterday"),
    ("result", ("run_status",), "done"),
    ("result", ("config",), []),
    ("result", ("provenance",), ABSENT),
    ("result", ("records",), ABSENT),
    ("result", ("records",), {}),
    ("result", R0, "x"),
    ("result", (*R0, "task_id"), ABSENT),
    ("result", (*R0, "prompt_id"), 3),
    ("result", (*R0, "model_id"), ""),
    ("result", (*R0, "tier"), "gold"),
    ("result", (*R0, "text"), ABSENT),
    ("result", (*R0, "text"), None),
    ("result", (*R0, "quality_heuristic"), ABSENT),
    ("result", (*R0, "quality_heuristic"), "1.0"),
    ("result", (*R0, "quality_heuristic"), True),
    ("result", (*R0, "completion_tokens"), 24.5),
    ("result", (*R0, "completion_tokens"), "24"),
    ("result", (*R0, "prompt_tokens"), True),
    ("result", (*R0, "prompt_tokens"), -1),
    ("result", (*R0, "energy_wh"), -0.1),
    ("result", (*R0, "peak_vram_mb"), 10**300),
    ("result", (*R0, "failure_code"), "gremlins"),
    ("result", R0, {**FAILED, "tier": None}),
    ("result", ("hardware", "vram_mb"), -1),
    ("result", ("hardware", "cpu_cores"), 1.5),
    ("result", ("hardware", "cpu_cores"), 2**31),
    ("result", ("judgements",), [{"score": 3}]),
    ("manifest", ("schema_version",), "bakeoff-results/v2"),
    ("manifest", ("schema_version",), ABSENT),
    ("manifest", ("created_at",), ABSENT),
    ("manifest", ("run_id",), ABSENT),
    ("manifest", ("files",), ABSENT),
    ("manifest", ("files", "result.json"), {}),
    ("manifest", ("files", "result.json"), "A" * 64),
    ("manifest", ("files", "result.json", "sha256"), "a" * 63),
    ("manifest", ("files", "result.json", "sha256"), "a" * 64 + "\n"),
    ("manifest", ("signature", "kind"), "pgp"),
    ("manifest", ("signature", "signed_file"), "summary.md"),
]


def reference(name: str) -> jsonschema.Draft202012Validator:
    definition = load_schema(name).definition
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return jsonschema.Draft202012Validator(definition, format_checker=checker)


def label(value: Any) -> str | None:
    return None if isinstance(value, dict) else str(value)[:30]


@pytest.mark.parametrize(("name", "document"), GOOD)
def test_both_implementations_accept_what_fits(name: str, document: Any) -> None:
    assert load_schema(name).violations(document) == ()
    assert reference(name).is_valid(document)


@pytest.mark.parametrize(("name", "path", "value"), BAD, ids=label)
def test_both_implementations_refuse_what_does_not(name: str, path, value: Any) -> None:
    document = changed(RESULT if name == "result" else MANIFEST, path, value) if path else value
    violations = load_schema(name).violations(document)
    assert not reference(name).is_valid(document)
    place = pointer(path[:-1] if value is ABSENT else path)
    assert any(v.pointer == place or v.pointer.startswith(place + "/") for v in violations)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_schema_is_one_to_the_reference_and_compiles(path) -> None:
    assert load_schema(path.stem) is load_schema(path.stem)


@pytest.mark.gen_test
async def test_a_broken_schema_stops_the_start(
    make_settings: Callable[..., Settings],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "no_schema.json").write_text('{"type": "nothing"}')
    monkeypatch.setattr(schemas, "FOLDER", tmp_path)
    with pytest.raises(jsonschema.SchemaError, match="nothing"):
        async with open_services(make_settings()):
            pass


def test_a_schema_that_is_none_is_refused_when_loaded() -> None:
    with pytest.raises(jsonschema.SchemaError):
        Schema({"type": "strnig"})


def test_an_unknown_format_is_refused_when_loaded() -> None:
    with pytest.raises(ValueError, match="uiud"):
        Schema({"format": "uiud"})


@pytest.mark.parametrize("wrong", ["2025-11-23", "2025-13-01T00:00:00Z", "2025-11-23T12:00:00"])
def test_date_time_is_asserted(wrong: str) -> None:
    schema = Schema({"format": "date-time"})
    assert schema.violations("2025-11-23T12:00:00Z") == ()
    assert schema.violations(wrong)


NESTED = Schema(
    {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "runs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {"$ref": "#/$defs/run"},
            },
            "deep": {"properties": {"list": {"type": "array", "items": {"type": "integer"}}}},
            "pair": {"prefixItems": [{"type": "string"}], "items": {"type": "integer"}},
        },
        "$defs": {
            "run": {
                "type": "object",
                "required": ["id"],
                "properties": {"id": {}, "ids": {"type": "array", "items": {"type": "string"}}},
            }
        },
    }
)


@pytest.mark.parametrize(
    ("document", "places"),
    [
        ({"runs": []}, ["/runs"]),
        ({"runs": [{"id": 1}] * 4}, ["/runs"]),
        ({"runs": {}}, ["/runs"]),
        ({"runs": [{"id": 1}, {}, 3]}, ["/runs/1", "/runs/2"]),
        ({"runs": [{"id": 1, "ids": ["a", 2, 3]}]}, ["/runs/0/ids/1", "/runs/0/ids/2"]),
        ({"deep": {"list": [1, True]}}, ["/deep/list/1"]),
        ({"pair": ["a", 1, "b"]}, ["/pair/2"]),
        ({"a/b": 1, "m~n": 2}, ["/a~1b", "/m~0n"]),
        ({"runs": [{"id": 1}], "deep": {"list": []}, "pair": ["a", 1]}, []),
    ],
)
def test_violations_point_into_nested_arrays(document: Any, places: list[str]) -> None:
    assert [violation.pointer for violation in NESTED.violations(document)] == places


def test_a_million_errors_cost_no_more_than_the_first_fifty() -> None:
    seen = []

    class Records(list):
        def __iter__(self):
            return (seen.append(item) or item for item in list.__iter__(self))

    broken = changed(RESULT, ("records",), Records({"n": n} for n in range(50_000)))
    assert len(load_schema("result").violations(broken)) == 50
    assert len(seen) < 50


HOSTILE = {
    "deep nesting": ("x", [[[[[[[]]]]]]] * 6000),
    "many members": ("x", {str(n): n for n in range(7000)}),
    "a huge array": ("warnings", [10**10] * 7000),
    "long strings": ("x", ["y" * 7000] * 10),
    "many numbers": ("config", {"x": [0.123456] * 7000}),
}


class Spy:
    """A compiled schema, and of what it was asked to find all errors."""

    def __init__(self, validator: Any) -> None:
        self.is_valid = validator.is_valid
        self._validator = validator
        self.looked_at: list[Any] = []

    def iter_errors(self, document: Any) -> Any:
        self.looked_at.append(document)
        return self._validator.iter_errors(document)


@pytest.mark.parametrize("place", [(), ("provenance",), ("hardware",), R0], ids=pointer)
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_rule_looks_at_is_not_copied_for_each_error(
    kind: str, place: tuple[str | int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = Schema(load_schema("result").definition)
    spies = []
    for node in (schema._root, *(node for _, node in schema._root._arrays)):
        spies.append(Spy(node._validator))
        monkeypatch.setattr(node, "_validator", spies[-1])
    name, bulk = HOSTILE[kind]
    broken = changed(changed(RESULT, (*place, name), bulk), ("run_id",), ABSENT)
    broken = changed(broken, (*R0, "tier"), "gold")
    missing = [""] if kind != "many numbers" or place else ["", "/config"]
    assert [v.pointer for v in schema.violations(broken)] == [*missing, "/records/0/tier"]
    looked_at = [document for spy in spies for document in spy.looked_at]
    assert len(looked_at) == 2
    assert len(json.dumps(looked_at)) < 50_000 < len(json.dumps(broken))  # an array has a length


def test_a_document_that_does_not_fit_never_does_by_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schemas._Node, "_thin", lambda self, rules, value: RESULT)
    broken = changed(RESULT, ("run_status",), "done")
    assert [v.pointer for v in load_schema("result").violations(broken)] == ["/run_status"]


def test_details_are_short_and_never_hold_a_value() -> None:
    secret = "s3cret" * 1000
    for path in [("run_id",), ("run_status",), ("records",), (*R0, "tier"), (*R0, "prompt_tokens")]:
        for violation in load_schema("result").violations(changed(RESULT, path, secret)):
            assert "s3cret" not in violation.detail
            assert len(violation.detail) <= 200
    unknown = NESTED.violations({secret: 1})
    assert len(unknown[0].detail) <= 200
    assert len(unknown[0].pointer) <= 200


def test_a_lone_surrogate_is_a_violation_and_not_a_crash() -> None:
    surrogate = changed(RESULT, ("run_id",), "\ud800")
    assert [v.pointer for v in load_schema("result").violations(surrogate)] == ["/run_id"]


def test_reading_goes_from_text_to_a_value_that_fits() -> None:
    schema = Schema({"type": "object", "properties": {"a": {"type": "string"}}})
    assert schema.read(b'{"a": "b"}', InvalidRequest) == {"a": "b"}
    with pytest.raises(InvalidJson):
        schema.read(b"NaN", InvalidRequest)
    with pytest.raises(DuplicateKey):
        schema.read(b'{"a": "b", "a": "b"}', InvalidRequest)
    with pytest.raises(InvalidBundle) as refused:
        schema.read(b'{"a": 1}', InvalidBundle)
    assert refused.value.violations == (Violation("/a", 'the value is not of type "string"'),)


@pytest.mark.parametrize("text", [rb'{"extra": "\u0000"}', rb'{"extra": ["\ud800"]}'])
def test_reading_refuses_unstorable_text_where_no_schema_looks(text: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Schema({"type": "object"}).read(text, InvalidRequest)
    assert refused.value.violations[0].pointer.startswith("/extra")


def test_one_schema_serves_many_threads() -> None:
    schema = load_schema("result")
    broken = changed(RESULT, (*R0, "tier"), "gold")
    with ThreadPoolExecutor(8) as pool:
        counts = list(
            pool.map(lambda n: len(schema.violations((RESULT, broken)[n % 2])), range(400))
        )
    assert counts == [0, 1] * 200
