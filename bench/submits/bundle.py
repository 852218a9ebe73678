"""What B8 submits: a run of many cells, its signed bundle of 2 MB, the form that carries it.

And its verification by hand, for who verifies without a server.
"""

import json
from typing import Any

from auth.signers import BundleVerifier
from broker.jobs import cells
from broker.jobs.job import Job
from broker.results import binding, bundle, manifest
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import SIGNER, SMALL
from tests.support.result_factory import bundle_files, result_for

BOUNDARY = "bench-submits-boundary"


def run_of(tasks: int, prompts: int) -> dict[str, Any]:
    """Return an enqueue entry with so many cells."""
    task = {"domain": "math", "user_prompt": "2+2?", "expected": "4", "scorer": "exact"}
    return {
        "model": SMALL,
        "tasks": [{**task, "id": f"task-{n}"} for n in range(tasks)],
        "prompts": [{"id": f"prompt-{n}", "system": f"System {n}."} for n in range(prompts)],
        "config": {"run": {"seed": 7}, "models": [{"id": "smollm2-1.7b"}]},
    }


def bundle_of(job: dict[str, Any], sigstore: ThrowawaySigstore) -> dict[str, bytes]:
    """Return a signed bundle with a complete result of some 2.2 MB."""
    result = result_for(job["run_id"], job)
    for record in result["records"]:
        record["text"] = "The answer is four, as 2 and 2 make 4 in every base above it. " * 4
    unsigned = bundle_files(result, b"")
    return bundle_files(result, sigstore.sign(unsigned["result.json"], SIGNER))


def form(lease_id: str, files: dict[str, bytes]) -> bytes:
    """Return a bundle as multipart/form-data."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="'
    parts = [f'{head}lease_id"\r\n\r\n{lease_id}\r\n'.encode()]
    for name, content in files.items():
        parts += [f'{head}{name}"; filename="{name}"\r\n\r\n'.encode(), content, b"\r\n"]
    return b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


def digests_of(files: dict[str, bytes]) -> dict[str, str]:
    """Return what the server knows of a bundle's files when it checks the manifest."""
    manifest = json.loads(files["manifest.json"])["files"]
    digests = {name: entry["sha256"] for name, entry in manifest.items()}
    return {**digests, "manifest.json": ""}


def verify(verifier: BundleVerifier, files: dict[str, bytes], job: dict[str, Any]) -> None:
    """Do what the server does for a bundle between receiving and accepting it."""
    of = Job.from_payload(job["run_id"], job)
    manifest.check_manifest(files["manifest.json"], digests_of(files), of.run_id)
    text = files["result.json"]
    verifier.verify(text, files["signature.sigstore.json"], None)
    document = bundle.parse_result(text)
    binding.check_binding(document, of)
    cells.metrics(document, of)
