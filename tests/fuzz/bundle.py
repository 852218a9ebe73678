"""Honest bundles, which the mutators start from and the oracle knows."""

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from nacl.signing import SigningKey

from auth.keys import canonical_json
from sandbox.services.sigstore_ca import EmailSubject, Subject, WorkflowSubject
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.result_factory import digests, manifest_for, result_for

RESULT, MANIFEST, SUMMARY = "result.json", "manifest.json", "summary.md"
SIGSTORE, ENVELOPE, DASHBOARD = (
    "signature.sigstore.json",
    "signature.ed25519.json",
    "dashboard.html",
)
Files = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class SigstoreSigner:
    """Signs by a certificate."""

    sigstore: ThrowawaySigstore
    subject: Subject
    file: str = SIGSTORE
    kind: str = "sigstore-bundle"

    def sign(self, result: bytes) -> bytes:
        """Return a Sigstore bundle."""
        return self.sigstore.sign(result, self.subject)


@dataclass(frozen=True, slots=True)
class EnvelopeSigner:
    """Signs by the runner key itself."""

    key: SigningKey
    runner_id: str
    file: str = ENVELOPE
    kind: str = "ed25519-envelope"

    def sign(self, result: bytes) -> bytes:
        """Return bakeoff's envelope; what is no JSON is signed as a text."""
        try:
            value = json.loads(result)
        except (ValueError, RecursionError):
            value = result.decode("latin-1")
        digest = hashlib.sha256(canonical_json(value)).digest()
        sig = {
            "sha256": digest.hex(),
            "signature": base64.b64encode(self.key.sign(digest).signature).decode(),
            "runner_id": self.runner_id,
            "signed_at": "2026-11-24T12:00:00Z",
        }
        return json.dumps({"sig": sig}).encode()


# Each signs results as one runner key is expected to, or as a stranger.
Signer = SigstoreSigner | EnvelopeSigner


@dataclass(frozen=True, slots=True)
class Bundle:
    """The honest bundle of one claimed run; it stands for the run in everything that follows."""

    job: dict[str, Any]
    files: Files
    signer: Signer
    strangers: tuple[Signer, ...]  # who may not sign for this runner

    @property
    def run_id(self) -> str:
        """The claimed run."""
        return self.job["run_id"]

    @property
    def lease_id(self) -> str:
        """The lease on it."""
        return self.job["lease_id"]


def make_bundle(job: dict[str, Any], signer: Signer, strangers: tuple[Signer, ...]) -> Bundle:
    """Return a bundle with a complete result of a job, signed and listed."""
    result = result_for(job["run_id"], job)
    files = {RESULT: json.dumps(result).encode(), SUMMARY: b"# Summary\n"}
    files[signer.file] = signer.sign(files[RESULT])
    manifest = manifest_for(result, files)
    manifest["signature"] |= {"kind": signer.kind, "path": signer.file}
    return Bundle(job, {**files, MANIFEST: json.dumps(manifest).encode()}, signer, strangers)


def sealed(files: Files) -> Files:
    """Return the files with a manifest that lists them as they are now, if it can be read."""
    try:
        manifest = json.loads(files[MANIFEST])
        others = {name: content for name, content in files.items() if name != MANIFEST}
        manifest["files"] = {name: {"sha256": of} for name, of in digests(others).items()}
        return {**files, MANIFEST: json.dumps(manifest).encode()}
    except (LookupError, TypeError, ValueError, RecursionError):
        return files


OURS = EmailSubject("runner@bakeoff.test", "https://issuer.bakeoff.test")
WORKFLOW = WorkflowSubject("bakeoff-org/bench")
STRANGERS: tuple[Subject, ...] = (
    EmailSubject("mallory@bakeoff.test", "https://issuer.bakeoff.test"),
    EmailSubject("runner@bakeoff.test", "https://issuer.mallory.test"),
    EmailSubject("Runner@bakeoff.test", "https://issuer.bakeoff.test"),
    EmailSubject("runner@bakeoff.test.mallory.test", "https://issuer.bakeoff.test"),
    WorkflowSubject("mallory/bench"),
    WorkflowSubject("bakeoff-org/bench", source_repository="mallory/bench"),
    WorkflowSubject("bakeoff-org/bench", source_ref="refs/heads/dev"),
    WorkflowSubject("bakeoff-org/bench", ref="refs/heads/dev"),
    WorkflowSubject("bakeoff-org/bench", issuer="https://ci.mallory.test"),
)
