"""Rules of bakeoff-results beyond our own schemas: one bundle against them stops its site.

The rules are those of its validator (schema bakeoff-results/v1) and of what its site's build takes
for granted. They are checked at submit, where the runner can still mend it, and at export, for
results that were accepted before they were known.
"""

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from math import isnan
from typing import Any

from broker.documents.strict_json import MAX_VIOLATIONS
from broker.errors import InvalidBundle, Violation

MAX_VRAM_GB = 1e9
NO_COMMIT = (
    "is missing, and the archive asks which commit of the harness ran: run it from a git checkout,"
    " or set provenance.source_repository and provenance.source_commit, before it is signed"
)


def check_archivable(manifest: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Raise InvalidBundle for what the archive would refuse; each violation names its fix."""
    for name, found in (("result.json", _of_result(result)), ("manifest.json", _signer(manifest))):
        violations = tuple(islice(found, MAX_VIOLATIONS))
        if violations:
            raise InvalidBundle(f"The archive of results would refuse this {name}.", violations)


def _of_result(result: Mapping[str, Any]) -> Iterator[Violation]:
    return chain(_commit(result["provenance"]), _models(result), _shown(result))


def _commit(provenance: Mapping[str, Any]) -> Iterator[Violation]:
    """The commit of the harness: git's, or a repository with a commit."""
    git = provenance.get("git")
    if isinstance(git, dict) and _text(git.get("sha")):
        return
    repository = any(_text(provenance.get(name)) for name in ("source_repository", "repository"))
    commit = any(_text(provenance.get(name)) for name in ("source_commit", "commit"))
    if not (repository and commit):
        yield Violation("/provenance/git/sha", NO_COMMIT)


def _models(result: Mapping[str, Any]) -> Iterator[Violation]:
    """The archive reads the first of these lists that is there; our schema checks config.models."""
    ids = result.get("model_ids")
    if isinstance(ids, list) and all(_text(name) for name in ids):
        if not ids:
            yield Violation("/model_ids", "is empty: leave it out, or name the model")
        return
    listed = result.get("models")
    if not isinstance(listed, list):
        return
    if not listed:
        yield Violation("/models", "is empty: leave it out, or name the model")
    for index, model in enumerate(listed):
        name = model.get("id", model.get("model_id")) if isinstance(model, dict) else None
        if not (isinstance(name, str) and name.strip()):
            yield Violation(
                f"/models/{index}/id", "is missing: the archive lists models by their id"
            )


def _shown(result: Mapping[str, Any]) -> Iterator[Violation]:
    """Yield the texts that the archive's pages show unchanged, where they are present."""
    hardware = result.get("hardware") or {}
    if not isinstance(hardware.get("device_name", ""), str):
        yield Violation("/hardware/device_name", "is not text: the archive's page shows it")
    if not _counts(hardware.get("vram_gb")):
        yield Violation(
            "/hardware/vram_gb", "is beyond any machine: the archive's page sorts by it"
        )
    if not isinstance(result.get("config_hash") or "", str):
        yield Violation("/config_hash", "is not text: the archive's page shows it")


def _counts(vram_gb: Any) -> bool:
    """Return whether the page can make whole megabytes of a value."""
    if isinstance(vram_gb, str):
        try:
            vram_gb = float(vram_gb.replace("GB", "").strip())
        except ValueError:
            return True
    return not isinstance(vram_gb, int | float) or isnan(vram_gb) or abs(vram_gb) < MAX_VRAM_GB


def _signer(manifest: Mapping[str, Any]) -> Iterator[Violation]:
    signer = manifest.get("signer")
    if signer is None:
        return
    if not any(_text(signer.get(name)) for name in ("identity", "subject", "repository")):
        yield Violation("/signer/identity", "is missing: name who signed, or leave `signer` out")
    if not (signer.get("issuer") is None or _text(signer["issuer"])):
        yield Violation("/signer/issuer", "is not text: give the URL of who vouched for the signer")
    if not isinstance(signer.get("policy"), str | dict | None):
        yield Violation("/signer/policy", "is neither text nor an object: leave it out")


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""
