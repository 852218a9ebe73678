"""Runner tokens: JWT (RFC 7519), HS256, signed by the first key of a ring.

A token says which runner, which of its processes and which key; whether the key is still good is
asked elsewhere (`broker/runners/revocations.py` and the guards in SQL).
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import jwt
import structlog

from auth import admin_tokens
from auth.errors import InvalidToken, TokenExpired

ISSUER = "bakeoff-queue"
AUDIENCE = "runner"
ALGORITHM = "HS256"
CLAIMS = ["iss", "aud", "sub", "jti", "iat", "nbf", "exp", "key_fp", "ins"]
# The one spelling of a compact JWS: base64url without padding (RFC 7515, section 2).
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_MAX_LENGTH = 2048
# How far the clocks of the machines that run this service may be apart. Without it a token that one
# machine made is from the future on another, and "register again" brings the next such token.
LEEWAY = timedelta(seconds=10)

log = structlog.get_logger()
TOKEN_REVOKED = "The token has been revoked: register again."  # noqa: S105 (a message)


@dataclass(frozen=True, slots=True)
class RunnerIdentity:
    """The runner that a verified token names."""

    runner_id: str
    fingerprint: str
    instance_id: UUID
    jti: UUID
    expires_at: datetime

    @property
    def dead_at(self) -> datetime:
        """When no process takes it any more, by the database's clock or any other of ours."""
        return self.expires_at + 2 * LEEWAY


class Tokens:
    """Makes and reads runner tokens.

    `ring` maps kid to secret, the signing one first; it is not empty.
    """

    def __init__(self, ring: dict[str, bytes], ttl: timedelta) -> None:
        self._ring = ring
        self._ttl = ttl

    @property
    def life(self) -> timedelta:
        """How long after a token was made some process may still take it: see `dead_at`."""
        return self._ttl + 2 * LEEWAY

    def use(self, ring: dict[str, bytes]) -> None:
        """From now on sign and verify with the keys of this ring, which is not empty."""
        self._ring = ring

    def mint(
        self, runner_id: str, fingerprint: str, instance_id: UUID, jti: UUID, issued_at: datetime
    ) -> str:
        """Return the token for a process of a runner; the same arguments give the same token."""
        kid, secret = next(iter(self._ring.items()))
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": runner_id,
            "jti": str(jti),
            "iat": int(issued_at.timestamp()),
            "nbf": int(issued_at.timestamp()),
            "exp": int((issued_at + self._ttl).timestamp()),
            "key_fp": fingerprint,
            "ins": str(instance_id),
        }
        return jwt.encode(claims, secret, algorithm=ALGORITHM, headers={"kid": kid})

    def read(self, token: str) -> RunnerIdentity:
        """Return what a token says. Raises InvalidToken or TokenExpired.

        It is taken `LEEWAY` longer than it was promised to be, by this machine's clock.
        """
        if token.startswith(admin_tokens.PREFIX):
            raise InvalidToken("This is an admin token; this address takes a runner's.")
        if len(token) > _MAX_LENGTH or not _COMPACT.fullmatch(token):
            raise InvalidToken("The bearer token is not a compact JWT: register to get one.")
        try:
            claims = jwt.decode(
                token,
                key=self._secret(token),
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                leeway=LEEWAY,
                options={
                    "require": CLAIMS,
                    "strict_aud": True,  # a list of audiences is not ours
                    "verify_signature": True,
                    "verify_exp": True,
                    "verify_nbf": True,
                    "verify_iat": True,
                    "verify_aud": True,
                    "verify_iss": True,
                },
            )
        except jwt.ExpiredSignatureError:
            raise TokenExpired from None
        except jwt.ImmatureSignatureError:
            fix = "set the clocks of all machines that run this service (NTP)"
            log.warning("tokens.from_the_future", leeway_s=LEEWAY.total_seconds(), fix=fix)
            raise InvalidToken(
                "The token begins in the future: the clocks of this service's machines differ."
                " Tell its operator; to register again will not help for long."
            ) from None
        except (jwt.PyJWTError, ValueError, OverflowError):
            raise InvalidToken from None
        return self._claims(claims)

    def _secret(self, token: str) -> bytes:
        """Return the key the token names; its kid is a dictionary key and nothing else."""
        header = jwt.get_unverified_header(token)
        kid = header.get("kid")
        if header.get("alg") != ALGORITHM or "crit" in header or not isinstance(kid, str):
            raise InvalidToken
        if kid not in self._ring:
            raise InvalidToken("The token was signed with a key we do not use: register again.")
        return self._ring[kid]

    def _claims(self, claims: dict[str, Any]) -> RunnerIdentity:
        texts = (claims["sub"], claims["key_fp"], claims["ins"], claims["jti"])
        times = (claims["iat"], claims["exp"])
        if not all(isinstance(text, str) for text in texts):
            raise InvalidToken
        if not all(type(time) is int for time in times):
            raise InvalidToken
        # A life longer than ours was not given by us, even if our key signed it.
        if claims["exp"] - claims["iat"] > self._ttl.total_seconds() + 1:
            raise InvalidToken
        try:
            instance_id, jti = UUID(claims["ins"]), UUID(claims["jti"])
        except ValueError:
            raise InvalidToken from None
        expires_at = datetime.fromtimestamp(claims["exp"], UTC)
        return RunnerIdentity(claims["sub"], claims["key_fp"], instance_id, jti, expires_at)
