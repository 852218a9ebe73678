"""What bakeoff-results wants of an exported folder, by the facts we have of it.

We do not have bakeoff-results' own validator: this one is written from the design's page of facts
("Bundle"), with nothing of the code that writes the folders.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

REQUIRED = {"result.json", "manifest.json", "summary.md"}
OPTIONAL = {"dashboard.html", "signature.sigstore.json"}
MEMBERS = {"schema_version", "created_at", "run_id", "timestamp", "config_hash", "judge_mode",
           "model_ids", "run_status", "model_scores_summary", "files", "signature"}  # fmt: skip
HEX = re.compile(r"[0-9a-f]{64}")


def problems(archive: Path) -> list[str]:
    """Return what is wrong with a folder that holds `submissions/`; nothing else may be in it."""
    found = [f"{path.name} beside submissions" for path in archive.iterdir()
             if path.name != "submissions"]  # fmt: skip
    for publisher in (archive / "submissions").iterdir():
        for bundle in publisher.iterdir():
            found += [f"{publisher.name}/{bundle.name}: {problem}" for problem in _bundle(bundle)]
    return found


def _bundle(folder: Path) -> Iterator[str]:
    names = {path.name for path in folder.iterdir()}
    yield from (f"{name} is missing" for name in REQUIRED - names)
    yield from (f"{name} is unknown" for name in names - REQUIRED - OPTIONAL)
    if not names >= REQUIRED:
        return
    manifest = json.loads((folder / "manifest.json").read_bytes())
    result = json.loads((folder / "result.json").read_bytes())
    yield from (f"the manifest lacks {name}" for name in MEMBERS - manifest.keys())
    if manifest["schema_version"] != "bakeoff-results/v1":
        yield "the manifest is of another version"
    if not manifest["run_id"] == result["run_id"] == folder.name:
        yield "the run_id is not the same in manifest, result and folder"
    if manifest["run_status"] not in ("complete", "incomplete", "failed"):
        yield "the run_status is none"
    if manifest["files"].keys() != names - {"manifest.json"}:
        yield "the manifest lists other files"
    for name, entry in manifest["files"].items():
        digest = entry["sha256"] if isinstance(entry, dict) else entry
        content = (folder / name).read_bytes() if name in names else b""
        if not HEX.fullmatch(digest) or hashlib.sha256(content).hexdigest() != digest:
            yield f"{name} has another digest"
    signature = manifest["signature"]
    if (signature["kind"], signature["signed_file"]) != ("sigstore-bundle", "result.json"):
        yield "it is signed in another way"
    if signature["required"] and signature["path"] not in names:
        yield "the signature is missing"
