"""Accepted signers of a verification: by the command's options, else by the settings.

Nothing that a server says is accepted instead: it could name the signer of what it made up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auth.errors import InvalidKey, PolicyRefused
from auth.keys import RunnerKey
from auth.signers import BundleVerifier, Signer, SignerPolicy, load_policy
from broker.errors import InvalidBundle
from broker.results import bundle
from broker.results.signatures import (
    AnyRunnerKeySignature,
    RunnerKeySignature,
    Signature,
    SigstoreSignature,
)
from cli.settings import read_settings
from client.output import CommandFailed, note, usage_error


@dataclass(frozen=True, slots=True)
class TrustOptions:
    """A trust root and signers: as the options name them, and else as the settings do."""

    trusted_root: Path | None
    identity: str | None
    issuer: str | None
    signers: Path | None
    public_keys: tuple[str, ...]
    _verifiers: dict[Signer | None, BundleVerifier] = field(default_factory=dict)

    def of_stored(self, record: Mapping[str, Any]) -> Signature | None:
        """Return how a stored result must be signed; None when no key was given for it."""
        if record["trust"] == "runner-key":
            return self._by_key(str(record["runner_id"]))
        return self._sigstore(self._named())

    def of_folder(self, files: Mapping[str, bytes]) -> Signature | None:
        """Return how an exported result must be signed; None when no key was given for it."""
        if bundle.ENVELOPE not in files:
            return self._sigstore(self._named())
        return self._by_key(_runner_id(files[bundle.ENVELOPE]))

    def _by_key(self, runner_id: str) -> Signature | None:
        ways = tuple(RunnerKeySignature(_key(text), runner_id) for text in self.public_keys)
        return AnyRunnerKeySignature(ways) if ways else None

    def _named(self) -> Signer | None:
        return Signer(self.identity, self.issuer) if self.identity and self.issuer else None

    def _sigstore(self, signer: Signer | None) -> Signature:
        """Return a verification by this signer, or by any of the policy's."""
        if signer not in self._verifiers:
            root = self.trusted_root or read_settings().trusted_root
            try:
                policy = SignerPolicy((signer,)) if signer else self._policy()
                self._verifiers[signer] = BundleVerifier(root, policy)
            except PolicyRefused as error:
                raise CommandFailed(str(error)) from None
        return SigstoreSignature(self._verifiers[signer], signer)

    def _policy(self) -> SignerPolicy:
        policy = load_policy(self.signers or read_settings().signers_file)
        for entry in policy.ignored:
            note(f"warning: the signer policy's {entry}")
        return policy


def _key(text: str) -> RunnerKey:
    try:
        return RunnerKey.parse(text)
    except InvalidKey as error:
        raise usage_error(f"the runner key: {error}") from None


def _runner_id(envelope: bytes) -> str:
    """Return whose envelope it says it is. No signature covers that: the key alone says who."""
    try:
        return bundle.parse_envelope(envelope)["sig"]["runner_id"]
    except InvalidBundle:
        return ""  # the check of the signature will say what is wrong with it
