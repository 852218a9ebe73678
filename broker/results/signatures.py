"""How a runner key's results are signed: the two kinds of step 3, and which one a key has.

Each names the file that holds it (`file`), what is recorded of an accepted result (`trust`), and
verifies: returns who signed result.json, or raises.
"""

from contextlib import suppress
from dataclasses import dataclass

import asyncpg

from auth.envelopes import verify_envelope
from auth.errors import SignatureInvalid, SignerNotAllowed
from auth.keys import RunnerKey
from auth.signers import BundleVerifier, Signer, SignerEvidence
from broker.results import bundle


@dataclass(frozen=True, slots=True)
class SigstoreSignature:
    """A Sigstore bundle over the exact bytes, by `expected` or else a signer of the policy."""

    verifier: BundleVerifier
    expected: Signer | None
    file: str = bundle.SIGNATURE
    trust: str = "sigstore"

    def verify(self, result: bytes, signature: bytes) -> SignerEvidence:
        """Raises SignatureInvalid, SignerNotAllowed or Unverifiable."""
        return self.verifier.verify(result, signature, self.expected)


@dataclass(frozen=True, slots=True)
class RunnerKeySignature:
    """An Ed25519 envelope by the runner key itself."""

    key: RunnerKey
    runner_id: str
    file: str = bundle.ENVELOPE
    trust: str = "runner-key"

    def verify(self, result: bytes, signature: bytes) -> SignerEvidence:
        """Raises SignatureInvalid, SignerNotAllowed, or InvalidBundle for what cannot be read.

        The scheme signs the document, so its text is read strictly first: of two readings, nobody
        could say which one was signed.
        """
        sig = bundle.parse_envelope(signature)["sig"]
        return verify_envelope(bundle.parse_strictly(result), sig, self.key, self.runner_id)


@dataclass(frozen=True, slots=True)
class AnyRunnerKeySignature:
    """An Ed25519 envelope by one of the keys that were given."""

    ways: tuple[RunnerKeySignature, ...]
    file: str = bundle.ENVELOPE
    trust: str = "runner-key"

    def verify(self, result: bytes, signature: bytes) -> SignerEvidence:
        """Return who signed; raises what the last key's verification raised."""
        *others, last = self.ways
        for way in others:
            with suppress(SignatureInvalid, SignerNotAllowed):
                return way.verify(result, signature)
        return last.verify(result, signature)


Signature = SigstoreSignature | RunnerKeySignature | AnyRunnerKeySignature


def signature_of(key: asyncpg.Record, runner_id: str, verifier: BundleVerifier) -> Signature:
    """Return the kind that the allowlist's row `key` asks for."""
    if key["signature_policy"] == "runner-key":
        return RunnerKeySignature(RunnerKey(key["public_key"]), runner_id)
    expected = None
    if key["signer_identity"] is not None:
        expected = Signer(key["signer_identity"], key["signer_issuer"])
    return SigstoreSignature(verifier, expected)
