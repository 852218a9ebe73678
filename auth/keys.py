"""Ed25519 runner keys, bakeoff's canonical JSON, and the signature over it.

The scheme is bakeoff's signing module's: SHA-256 over canonical JSON, then Ed25519 over the 32 raw
digest bytes. Verification is PyNaCl's alone: the `cryptography` package accepts forged signatures
under small-order keys.
"""

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Self

import nacl.bindings
import nacl.exceptions
import nacl.signing

from auth.errors import BadSignature, InvalidKey

KEY_BYTES = 32
SIGNATURE_BYTES = 64


def canonical_json(value: Any) -> bytes:
    """Return `value` as bakeoff signs it: sorted keys, no spaces, ASCII-escaped, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest_of(value: Any) -> str:
    """Return the lower-case hex SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def decode_base64(text: str, size: int) -> bytes:
    """Return the `size` bytes that `text` spells in standard base64.

    Only the one canonical spelling passes (re-encoding gives the same text): two spellings of one
    key would be two rows of the allowlist. Raises ValueError otherwise.
    """
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("it is not standard base64 (RFC 4648, section 4)") from None
    if len(raw) != size:
        raise ValueError(f"it spells {len(raw)} bytes where {size} belong")
    if base64.b64encode(raw).decode() != text:
        raise ValueError("its base64 is not canonical: encode the bytes again")
    return raw


@dataclass(frozen=True, slots=True)
class RunnerKey:
    """A runner's Ed25519 public key: 32 raw bytes that name a usable point."""

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a public key as it travels: standard base64 of 32 bytes. Raises InvalidKey.

        libsodium's point check refuses what is no point of the curve, what is not canonical
        (y >= p) and small-order points, under which one signature verifies for many messages.
        """
        try:
            raw = decode_base64(text, KEY_BYTES)
        except ValueError as error:
            raise InvalidKey(f"The public key is refused: {error}.") from None
        if not nacl.bindings.crypto_core_ed25519_is_valid_point(raw):
            raise InvalidKey("The public key is refused: it is no usable Ed25519 point.")
        return cls(raw)

    @property
    def text(self) -> str:
        """The key in standard base64."""
        return base64.b64encode(self.raw).decode()

    @property
    def fingerprint(self) -> str:
        """The lower-case hex SHA-256 of the raw key: how addresses and logs name it."""
        return hashlib.sha256(self.raw).hexdigest()

    def verify(self, value: Any, sha256: str, signature: str) -> None:
        """Check bakeoff's signature over the canonical JSON of `value`. Raises BadSignature."""
        digest = hashlib.sha256(canonical_json(value)).digest()
        if digest.hex() != sha256:
            raise BadSignature(
                "sig.sha256 is not the SHA-256 of the canonical JSON of what was signed: that was"
                " changed afterwards, or written otherwise."
            )
        try:
            raw = decode_base64(signature, SIGNATURE_BYTES)
            nacl.signing.VerifyKey(self.raw).verify(digest, raw)
        except ValueError as error:
            raise BadSignature(f"sig.signature is refused: {error}.") from None
        except nacl.exceptions.BadSignatureError:
            raise BadSignature from None
