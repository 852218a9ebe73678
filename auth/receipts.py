"""Receipts signed by the server, so that a runner can prove what was accepted, to anybody.

The scheme is bakeoff's signing module's, as for registrations (`auth/keys.py`): Ed25519 over the 32
raw bytes of the SHA-256 of canonical JSON. Signed is the whole receipt as it was given, but for
`sig` itself and the `server_time` that every answer carries.
"""

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from nacl.signing import SigningKey

from auth.errors import BadSignature
from auth.keys import RunnerKey, canonical_json

ALGORITHM = "Ed25519"
# Signed with the rest, so that nothing else these keys may ever sign passes for a receipt.
PURPOSE = "receipt"
UNSIGNED = frozenset({"sig", "server_time"})


class ReceiptKeys:
    """Signs receipts with the first key of a ring; the others are only published.

    `ring` maps kid to the 32-byte seed of a key; it is not empty.
    """

    def __init__(self, ring: Mapping[str, bytes]) -> None:
        self.use(ring)

    def use(self, ring: Mapping[str, bytes]) -> None:
        """From now on sign with, and publish, the keys of this ring."""
        self._keys = {kid: SigningKey(seed) for kid, seed in ring.items()}

    def sign(self, receipt: Mapping[str, Any], purpose: str = PURPOSE) -> dict[str, Any]:
        """Return `receipt`, which holds only what JSON holds, with its `purpose` and `sig`."""
        kid, key = next(iter(self._keys.items()))
        signed = {**receipt, "purpose": purpose}
        digest = hashlib.sha256(canonical_json(signed)).digest()
        signature = base64.b64encode(key.sign(digest).signature).decode()
        return {**signed, "sig": {"kid": kid, "sha256": digest.hex(), "signature": signature}}

    def published(self) -> list[dict[str, str]]:
        """Return the public keys as the well-known document lists them, the signing one first."""
        return [
            {
                "kid": kid,
                "alg": ALGORITHM,
                "public_key": base64.b64encode(bytes(key.verify_key)).decode(),
            }
            for kid, key in self._keys.items()
        ]


def verify_receipt(
    receipt: Mapping[str, Any], public_keys: Mapping[str, str], purpose: str = PURPOSE
) -> dict[str, Any]:
    """Return what is signed of `receipt`, by one of `public_keys` (kid to standard base64).

    Raises BadSignature, or InvalidKey when the named key is not one.
    """
    sig = receipt.get("sig")
    if not isinstance(sig, dict) or not all(
        isinstance(sig.get(name), str) for name in ("kid", "sha256", "signature")
    ):
        raise BadSignature("The receipt has no sig {kid, sha256, signature}.")
    if sig["kid"] not in public_keys:
        raise BadSignature(f"The receipt is signed by a key that is not listed: {sig['kid']}.")
    signed = {name: value for name, value in receipt.items() if name not in UNSIGNED}
    key = RunnerKey.parse(public_keys[sig["kid"]])
    try:
        key.verify(signed, sig["sha256"], sig["signature"])
    except BadSignature as error:
        raise BadSignature(
            f"The receipt, or its sig, was changed after it was signed. {error}"
        ) from None
    if signed.get("purpose") != purpose:
        raise BadSignature("What is signed is no receipt: its purpose is another.")
    return signed
