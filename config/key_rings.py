"""Key rings as a setting holds them: `kid:key[,kid:key]`, the first one signs.

An error names the setting, the kid and the fix, and never holds a key:
it is on a terminal and in a log.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import SecretStr

MIN_SECRET_BYTES = 32
SEED_BYTES = 32


@dataclass(frozen=True, slots=True)
class HeldKey:
    """A key of a ring without the key: its fingerprint, and whether it signs."""

    ring: str
    kid: str
    fingerprint: str
    signs: bool


def held_keys(ring: str, keys: Mapping[str, bytes]) -> list[HeldKey]:
    """Return the keys of the ring in their order: the first one signs.

    A fingerprint is the SHA-256 of the key with its ring and kid: equal keys look different.
    """
    return [
        HeldKey(ring, kid, hashlib.sha256(f"{ring}:{kid}:".encode() + key).hexdigest(), place == 0)
        for place, (kid, key) in enumerate(keys.items())
    ]


def parse_key_ring(ring: SecretStr) -> dict[str, bytes]:
    """Read `kid:secret[,kid:secret]`. Raises ValueError, which never holds a secret."""
    keys = {kid: secret.encode() for kid, secret in _entries("token_keys", ring)}
    for kid, secret in keys.items():
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(
                f"token_keys: the secret of {kid} is shorter than {MIN_SECRET_BYTES} bytes;"
                " make one with `openssl rand -hex 32`"
            )
    return keys


def parse_seed_ring(ring: SecretStr) -> dict[str, bytes]:
    """Read `kid:seed[,kid:seed]`, the seeds in hex. Raises ValueError, which never holds a seed."""
    return {kid: _seed(kid, text) for kid, text in _entries("receipt_keys", ring)}


def _seed(kid: str, text: str) -> bytes:
    if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * SEED_BYTES}}}", text):
        raise ValueError(
            f"receipt_keys: the seed of {kid} is not {SEED_BYTES} bytes in hex;"
            " make one with `openssl rand -hex 32`"
        )
    return bytes.fromhex(text)


def _entries(setting: str, ring: SecretStr) -> list[tuple[str, str]]:
    """Split `kid:secret[,kid:secret]`; each kid names one secret."""
    entries: list[tuple[str, str]] = []
    for position, entry in enumerate(filter(None, ring.get_secret_value().split(",")), start=1):
        kid, colon, secret = entry.strip().partition(":")
        if not kid or not colon:
            raise ValueError(f"{setting}: entry {position} is not of the form kid:secret")
        if kid in dict(entries):
            raise ValueError(f"{setting}: the kid {kid} appears twice")
        entries.append((kid, secret))
    return entries
