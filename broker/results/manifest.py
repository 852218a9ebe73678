"""manifest.json of a bundle: it names the submitted files, and agrees with result.json.

Only result.json is signed, and what the manifest says of it is checked against it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from broker.documents.schemas import Schema, load_schema
from broker.documents.strict_json import pointer, quote
from broker.errors import DigestMismatch, InvalidBundle, RunMismatch, Violation
from broker.results import consistency
from broker.results.bundle import MANIFEST, read_file, refuse


def check_manifest(
    manifest: bytes, digests: Mapping[str, str], run_id: str, schema: Schema | None = None
) -> dict[str, Any]:
    """Step 2: the manifest is of this run and names exactly the submitted files.

    `digests` are the SHA-256 (lower-case hex) of the files as received, by name. The signature
    must be listed too: a runner signs result.json first and writes the manifest last. `schema` is
    that of a submit, if none is given. Raises InvalidBundle, DigestMismatch or RunMismatch; returns
    the manifest.
    """
    document = read_file(MANIFEST, manifest, schema or load_schema("manifest"))
    refuse(RunMismatch, _other_run(document, run_id), "manifest.json is of another run.")
    submitted = {name: digest for name, digest in digests.items() if name != MANIFEST}
    refuse(InvalidBundle, _other_files(document["files"], submitted))
    refuse(InvalidBundle, _other_signature(document, submitted))
    refuse(DigestMismatch, _other_digests(document["files"], submitted))
    return document


def check_agreement(manifest: dict[str, Any], result: dict[str, Any]) -> None:
    """Step 5: what the manifest repeats of result.json is what that says. Raises InvalidBundle.

    Only result.json is signed. Whoever changes the manifest afterwards cannot be told from its
    author, but must not make it say the opposite.
    """
    told = "manifest.json contradicts result.json."
    refuse(InvalidBundle, consistency.result_mismatches(manifest, result), told)


def _other_run(manifest: dict[str, Any], run_id: str) -> Iterator[Violation]:
    """Both spellings count where both are given: two readers must not see two runs."""
    if manifest.get("run_id", run_id) != run_id:
        yield Violation("/run_id", "is not the claimed run")
    if manifest.get("bundle", {}).get("run_id", run_id) != run_id:
        yield Violation("/bundle/run_id", "is not the claimed run")


def _other_files(files: dict[str, Any], submitted: Mapping[str, str]) -> Iterator[Violation]:
    for name in sorted(submitted.keys() - files.keys()):
        yield Violation("/files", f"{quote(name)} was submitted and is not listed")
    for name in files:
        if name not in submitted:
            yield Violation(
                pointer(("files", name)), "is listed and is not another file of the bundle"
            )


def _other_signature(manifest: dict[str, Any], submitted: Mapping[str, str]) -> Iterator[Violation]:
    """Yield the signature's path when no such file was submitted: later verifiers start from it."""
    path = (manifest.get("signature") or {}).get("path")
    if path is not None and path not in submitted:
        yield Violation("/signature/path", "is not a file of the bundle")


def _other_digests(files: dict[str, Any], submitted: Mapping[str, str]) -> Iterator[Violation]:
    for name, digest in submitted.items():
        entry = files[name]
        nested = isinstance(entry, dict)
        if (entry["sha256"] if nested else entry) != digest:
            place = ("files", name, "sha256") if nested else ("files", name)
            yield Violation(pointer(place), f"is not the SHA-256 of {name} as received")
