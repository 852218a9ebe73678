"""Checks that an attacked server leaves out, to show that the oracle notices.

A module of its own: what it puts in the place of a check goes to the worker processes as a pickle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import asyncpg

from auth.signers import BundleVerifier, SignerEvidence
from broker.results import submissions
from broker.results.signatures import Signature, signature_of


@dataclass(frozen=True, slots=True)
class Unlooked:
    """A signature of the kind that the key has, which nobody verifies."""

    file: str
    trust: str

    def verify(self, _result: bytes, _signature: bytes) -> SignerEvidence:
        """Believe it."""
        return SignerEvidence("nobody", None, None, None)


def _without_signatures() -> None:
    def believed(key: asyncpg.Record, runner_id: str, verifier: BundleVerifier) -> Signature:
        real = signature_of(key, runner_id, verifier)
        return cast("Signature", Unlooked(real.file, real.trust))

    submissions.signature_of = believed


SABOTAGES: dict[str, Callable[[], None]] = {"signatures": _without_signatures}
