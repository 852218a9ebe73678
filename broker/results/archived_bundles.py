"""Bundles of the archive that may never have been in a queue, judged by themselves.

A run of one's own has any text as its run_id, often several models, comparisons of two of them,
and no signature. Its shapes are those of a submit, looser in exactly that; without a job there is
only the result itself to compare it with.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

from broker.documents.schemas import Schema, load_schema
from broker.documents.strict_json import MAX_VIOLATIONS, pointer
from broker.errors import InvalidBundle, RunMismatch, Violation
from broker.jobs.job import MAIN_TIER, harness_hash

_HASH = re.compile(r"[0-9a-f]{16}")
_TEXT = {"type": "string", "minLength": 1, "maxLength": 200}


@cache
def manifest_schema() -> Schema:
    """The manifest of a submit, of a run that is called anything, by any version of the harness."""
    definition = copy.deepcopy(load_schema("manifest").definition)
    definition["$defs"] |= {"run_id": _TEXT}
    definition["required"].remove("created_at")  # older ones have none
    return Schema(definition)


@cache
def result_schema() -> Schema:
    """The result of a submit, of a run that is called anything, by any version of the harness."""
    definition = copy.deepcopy(load_schema("result").definition)
    members = definition["properties"]
    members |= {"run_id": _TEXT, "run_status": {"enum": ["complete", "incomplete", "failed", None]}}
    members["provenance"]["properties"]["config_hash"] = {"type": ["string", "null"]}
    del members["provenance"]["required"]
    definition["required"] = ["run_id", "timestamp", "config", "provenance", "records"]
    definition["$defs"]["record"]["required"].remove("tier")
    return Schema(definition)


def parse_result(text: bytes, document: Any) -> dict[str, Any]:
    """Return a parsed result.json that fits the archive's shapes. Raises InvalidBundle."""
    result_schema().check(text, document, InvalidBundle)
    return document


def must_be_signed(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest asks for a signature."""
    return bool((manifest.get("signature") or {}).get("required"))


def refuse_unsigned() -> None:
    """Raise InvalidBundle: a bundle whose signature was taken away is not one without."""
    detail = Violation("/signature/required", "is true, and no signature is there")
    raise InvalidBundle("The bundle lacks its signature.", (detail,))


def can_hash(result: Mapping[str, Any]) -> bool:
    """Return whether the result has the harness's hash of its config, not an older version's."""
    return _HASH.fullmatch(result["provenance"].get("config_hash") or "") is not None


def check_hash(result: Mapping[str, Any]) -> None:
    """The hash is of the config beside it. Raises RunMismatch."""
    if result["provenance"]["config_hash"] != harness_hash(result["config"]):
        raise RunMismatch(
            "result.json contradicts itself.",
            (Violation("/provenance/config_hash", "is not the hash of /config"),),
        )


def check_cells(result: Mapping[str, Any]) -> None:
    """Records and judgements are of the result's models, and each cell is there once.

    A complete run has every main cell of each model. Raises RunMismatch.
    """
    models = {model["id"] for model in result["config"]["models"]}
    found = tuple(islice(_wrong_cells(result, models), MAX_VIOLATIONS))
    if found:
        raise RunMismatch("result.json contradicts itself.", found)


def _wrong_cells(result: Mapping[str, Any], models: set[str]) -> Iterator[Violation]:
    seen = set()
    for index, record in enumerate(result["records"]):
        cell = (*_cell(record), record.get("tier", MAIN_TIER))
        if record["model_id"] not in models:
            yield Violation(f"/records/{index}/model_id", "is not a model of /config")
        if cell in seen:
            yield Violation(f"/records/{index}", "an earlier record has the same cell")
        seen.add(cell)
    for index, judgement in enumerate(result.get("judgements") or ()):
        for member in ("model_id", "a_model", "b_model"):
            if judgement.get(member) is not None and judgement[member] not in models:
                place = pointer(("judgements", index, member))
                yield Violation(place, "is not a model of /config")
    if result.get("run_status") == "complete":
        wanted = {(*cell, model, MAIN_TIER) for cell in _grid(result) for model in models}
        if missing := len(wanted - seen):
            yield Violation("/records", f"a complete run has every main cell; {missing} missing")


def _cell(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["task_id"], entry["prompt_id"], entry["model_id"]


def _grid(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The main cells that the result itself says it has, of one model."""
    prompts = result["config"].get("prompts")
    for task in result.get("tasks") or ():
        for prompt in prompts if isinstance(prompts, list) else ():
            named = isinstance(prompt, dict) and isinstance(prompt.get("id"), str)
            if (
                named
                and isinstance(task.get("id"), str)
                and task.get("tier", MAIN_TIER) == MAIN_TIER
            ):
                yield task["id"], prompt["id"]
