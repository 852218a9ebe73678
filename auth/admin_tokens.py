"""Admin tokens: 32 random bytes, shown once, stored as SHA-256.

The digest is looked up by its bytes: finding a row needs a preimage, so timing tells nothing.
"""

import hashlib
import secrets

from auth.errors import InvalidToken

PREFIX = "bqa_"
SCOPES = ("read", "operate", "admin")


def make() -> tuple[str, bytes]:
    """Return a new token and the digest to store."""
    token = PREFIX + secrets.token_urlsafe(32)
    return token, digest(token)


def digest(token: str) -> bytes:
    """Return the digest a token is stored under. Raises InvalidToken for what is none of ours."""
    if not token.startswith(PREFIX) or not token.isascii():
        raise InvalidToken("This address needs an admin token (it starts with bqa_).")
    return hashlib.sha256(token.encode()).digest()
