"""The judge: may these bytes be accepted for this run? By its own reading of everything.

It knows what was honestly signed for the run and by whom, and shares no code with the server: its
multipart reader, its JSON and its base64 are stricter than any reader must be. What it cannot read
without a doubt must not be accepted either, since the next reader may see another bundle in it.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema

from tests.fuzz.bundle import DASHBOARD, ENVELOPE, MANIFEST, RESULT, SUMMARY, Bundle

SCHEMAS = Path(__file__).parents[2] / "broker" / "documents" / "json_schemas"
Files = dict[str, bytes]
Pair = tuple[bytes, bytes]  # result.json and its signature's file

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_PARAMETER = re.compile(rf'\s*;\s*({_TOKEN})=("(?:[^"\\\r\n]|\\.)*"|[^\s";,\\]+)')
_END_OF_HEADERS = b"\r\n\r\n"


class Unreadable(Exception):
    """It can be read in more than one way, or in none."""


def why_not_accepted(
    bundle: Bundle, content_type: str, readings: Sequence[bytes], signed: Iterable[Pair]
) -> str | None:
    """Return why accepting one of these bodies for the bundle's run would be wrong, None if right.

    `readings`: the bodies that a reader of HTTP may see in the request; all must be right.
    `signed`: what the allowed signer signed besides the bundle's own result.
    """
    if not readings:
        return "the request has no whole body"
    for body in readings:
        try:
            parts = read_form(content_type, body)
            if parts.pop("lease_id", None) != bundle.lease_id.encode():
                return "another lease"
        except Unreadable as error:
            return f"unreadable: {error}"
        if wrong := why_not_stored(bundle, parts, signed):
            return wrong
    return None


def why_not_stored(bundle: Bundle, files: Files, signed: Iterable[Pair]) -> str | None:
    """Return why these files must not be a result of the bundle's run, None if they may."""
    try:
        wrong = _wrong_names(bundle, files) or _wrong_manifest(bundle, files)
        wrong = wrong or _wrong_result(bundle, files, signed)
        return wrong or _contradiction(read_json(files[MANIFEST]), read_json(files[RESULT]))
    except Unreadable as error:
        return f"unreadable: {error}"


def _wrong_names(bundle: Bundle, files: Files) -> str | None:
    needed = {RESULT, MANIFEST, SUMMARY, bundle.signer.file}
    return None if needed <= files.keys() <= needed | {DASHBOARD} else "other files than a bundle's"


def _wrong_manifest(bundle: Bundle, files: Files) -> str | None:
    manifest = read_json(files[MANIFEST])
    told = [manifest, manifest.get("bundle") or {}]
    runs = {each["run_id"] for each in told if "run_id" in each}
    if runs != {bundle.run_id}:
        return "the manifest is of another run"
    listed = {
        name: of["sha256"] if isinstance(of, dict) else of for name, of in manifest["files"].items()
    }
    digests = {name: hashlib.sha256(of).hexdigest() for name, of in files.items()}
    del digests[MANIFEST]
    return None if listed == digests else "the manifest's digests are not those of the files"


def _wrong_result(bundle: Bundle, files: Files, signed: Iterable[Pair]) -> str | None:
    result, signature = files[RESULT], files[bundle.signer.file]
    honest = [(bundle.files[RESULT], bundle.files[bundle.signer.file]), *signed]
    facts_of = _envelope_facts if bundle.signer.file == ENVELOPE else _sigstore_facts
    facts = facts_of(result, signature)
    known = []
    for one in honest:
        try:
            known.append(facts_of(*one))
        except Unreadable:
            continue  # signed, and nothing that can be accepted
    if facts not in known:
        return "nobody who may signed this result, or the evidence of it was changed"
    return None if result == bundle.files[RESULT] else _wrong_by_itself(bundle, result)


def _sigstore_facts(result: bytes, signature: bytes) -> tuple[Any, ...]:
    """The exact bytes, and what is recorded or verified again years later."""
    bundle = read_json(signature)
    try:
        material, message = bundle["verificationMaterial"], bundle["messageSignature"]
        [entry] = material["tlogEntries"]
        return (
            result,
            _bytes(_certificate(material)["rawBytes"]),
            _bytes(message["signature"]),
            _bytes(entry["canonicalizedBody"]),
            _bytes(entry["inclusionPromise"]["signedEntryTimestamp"]),
            int(entry["logIndex"]),
            int(entry["integratedTime"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise Unreadable(f"the signature: {error!r}") from None


def _certificate(material: dict[str, Any]) -> dict[str, Any]:
    """The signing certificate; older bundles have it in a chain."""
    if "x509CertificateChain" in material and "certificate" not in material:
        return material["x509CertificateChain"]["certificates"][0]
    return material["certificate"]


def _envelope_facts(result: bytes, signature: bytes) -> tuple[Any, ...]:
    """The values (the scheme signs no bytes), and who signed them how."""
    sig = read_json(signature)
    try:
        sig = sig["sig"]
        values = json.dumps(read_json(result), sort_keys=True)
        return values, sig["sha256"], _bytes(sig["signature"]), sig["runner_id"]
    except (LookupError, TypeError, ValueError) as error:
        raise Unreadable(f"the envelope: {error!r}") from None


def _wrong_by_itself(bundle: Bundle, result: bytes) -> str | None:
    """A result that was signed and is not the honest one: is it one of this run at all?"""
    value = read_json(result)
    for error in _reference().iter_errors(_what_is_new(bundle, value)):
        return f"the result does not fit its schema at {error.json_path}"
    job = bundle.job
    if value["run_id"] != bundle.run_id:
        return "the result is of another run"
    text = json.dumps(value["config"], sort_keys=True).encode()
    if value["provenance"]["config_hash"] != hashlib.sha256(text).hexdigest()[:16]:
        return "the result has another hash than its configuration"
    model = job["config"]["models"][0]["id"]
    main = {(t["id"], p["id"], "main", model) for t in job["tasks"] for p in job["prompts"]}
    wanted = main | {(t["id"], "floor", "dumb_model", model) for t in job["floor_tasks"]}
    names = ("task_id", "prompt_id", "tier", "model_id")
    cells = [tuple(record[name] for name in names) for record in value["records"]]
    if len(set(cells)) < len(cells) or not wanted >= set(cells):
        return "the result has a cell twice, or one that is not of the job"
    if value["run_status"] == "complete" and not main <= set(cells):
        return "the result is complete and lacks a main cell"
    return _wrong_words(job, value)


def _wrong_words(job: dict[str, Any], value: dict[str, Any]) -> str | None:
    """What a result says of its job, beside the records, and was not handed out."""
    config, seed = value["config"], job["config"].get("run", {}).get("seed")
    told = config.get("run")
    run = told if isinstance(told, dict) else {}
    if run.get("name") not in (None, job["run_id"]):
        return "the result's config is of another run"
    if any(one["id"] != job["config"]["models"][0]["id"] for one in config["models"]):
        return "the result's config is of another model"
    if any(each not in (None, seed) for each in (run.get("seed"), value["provenance"].get("seed"))):
        return "the result is of another seed"
    handed = {one["id"]: one for one in [*job["tasks"], *job["floor_tasks"], *job["prompts"]]}
    prompts = config.get("prompts")
    listed = [*(value.get("tasks") or ()), *(prompts if isinstance(prompts, list) else ())]
    for one in listed:
        name = one.get("id") if isinstance(one, dict) else None
        if isinstance(name, str) and name in handed:
            of = handed[name]
            if any(of.get(k) is not None and one[k] not in (None, of[k]) for k in of.keys() & one):
                return "the result has a task or prompt that was not handed out like this"
    return None


def _contradiction(manifest: dict[str, Any], result: dict[str, Any]) -> str | None:
    """What the manifest repeats of the result, and is not there. Times it may spell otherwise."""
    hashes = (manifest.get("config_hash"), result["provenance"].get("config_hash"))
    if None not in hashes and hashes[0] != hashes[1]:
        return "the manifest has another configuration than the result"
    if manifest.get("run_status") not in (None, result["run_status"]):
        return "the manifest has another outcome than the result"
    names = (json.dumps(name) for name in manifest.get("model_ids") or ())
    if any(name not in json.dumps(result) for name in names):
        return "the manifest has a model that the result does not name"
    return None


def _what_is_new(bundle: Bundle, value: Any) -> Any:
    """The result without the honest records, which fit: the reference takes a second for 2,000."""
    if not isinstance(value, dict) or not isinstance(value.get("records"), list):
        return value
    known = {json.dumps(record) for record in read_json(bundle.files[RESULT])["records"]}
    records = [record for record in value["records"] if json.dumps(record) not in known]
    return {**value, "records": records}


@cache
def _reference() -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / "result.json").read_text())
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return jsonschema.Draft202012Validator(schema, format_checker=checker)


# Readers


def read_json(text: bytes) -> Any:
    """Return a JSON text's value. Raises Unreadable for all that two parsers may read apart."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_members, parse_constant=_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogate
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"JSON: {error}") from None
    if "\x00" in json.dumps(value, ensure_ascii=False) or b"\\u0000" in text:
        raise Unreadable("JSON: U+0000")
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise Unreadable("JSON: a member twice")
    return dict(pairs)


def _constant(name: str) -> Any:
    raise Unreadable(f"JSON: {name}")


def _bytes(text: Any) -> bytes:
    raw = base64.b64decode(text, validate=True)
    if base64.b64encode(raw).decode() != text:
        raise Unreadable("base64 that is not canonical")
    return raw


def read_form(content_type: str, body: bytes) -> Files:
    """Return the parts of a multipart/form-data body (RFC 2046, RFC 7578) by name.

    Raises Unreadable.
    """
    kind, parameters = _parameters(content_type)
    boundary = parameters.get("boundary", "").encode("latin-1")
    if kind != "multipart/form-data" or not 1 <= len(boundary) <= 70:
        raise Unreadable("not multipart/form-data with a boundary")
    # Whatever is before the first boundary's line or follows the last one is nobody's.
    line = re.compile(rb"\n--" + re.escape(boundary) + rb"(?:(--)|[ \t]*\r\n)")
    later = re.compile(rb"\r" + line.pattern)
    body = b"\r\n" + body
    marks = []
    match = line.search(body)
    while match:
        marks.append(match)
        # The blank line that ends a part's headers does not begin a delimiter.
        end = body.find(_END_OF_HEADERS, match.end() - 2)
        if match[1] or end < 0:
            break
        match = later.search(body, end + len(_END_OF_HEADERS))
    if len(marks) < 2 or not marks[-1][1]:
        raise Unreadable("no part, or no last boundary")
    parts: Files = {}
    for start, end in pairwise(marks):
        name, content = _read_part(body[start.end() - 2 : end.start()])
        if name in parts:
            raise Unreadable("a part twice")
        parts[name] = content
    return parts


def _read_part(text: bytes) -> tuple[str, bytes]:
    head, found, content = text.partition(_END_OF_HEADERS)
    if not found:
        raise Unreadable("a part's headers do not end")
    lines = [line for line in head.decode("latin-1").split("\r\n") if line]
    headers = [line.partition(":") for line in lines]
    named = [value for name, _, value in headers if name.lower() == "content-disposition"]
    if len(named) != 1:
        raise Unreadable("a part has not one Content-Disposition")
    kind, parameters = _parameters(named[0].strip(" \t"))
    if kind != "form-data" or not parameters.get("name"):
        raise Unreadable("a part has no name")
    return parameters["name"].encode("latin-1").decode("utf-8", "replace"), content


def _parameters(text: str) -> tuple[str, dict[str, str]]:
    """Read `kind; name=value; name="value"`."""
    kind = re.match(r"[^\s;]+", text)
    if kind is None:
        raise Unreadable("an empty header")
    at, parameters = kind.end(), {}
    while match := _PARAMETER.match(text, at):
        name, value = match[1].lower(), match[2]
        if name in parameters:
            raise Unreadable(f"the parameter {name} twice")
        quoted = value.startswith('"')
        parameters[name] = re.sub(r"\\(.)", r"\1", value[1:-1]) if quoted else value
        at = match.end()
    if text[at:].strip(" \t;"):
        raise Unreadable("a header's parameters")
    return kind[0].lower(), parameters
