"""Why a credential or a signature was refused.

An exception's docstring is its message; `handlers/errors.py` gives it a status.
"""


class AuthError(Exception):
    """The request could not be trusted."""

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail or " ".join((self.__doc__ or "").split()))


class MissingToken(AuthError):
    """Send `Authorization: Bearer <token>`: this address needs a token."""


class InvalidToken(AuthError):
    """The token is not one of ours, or not for this address: register again."""


class TokenExpired(AuthError):
    """The token has expired: register again, your leases stay yours."""


class InvalidKey(AuthError):
    """The public key is not the standard base64 of a usable Ed25519 point."""


class BadSignature(AuthError):
    """The signature does not fit the signed text and the key it names."""


class ScopeRequired(AuthError):
    """The token lacks the scope that this address needs."""


class SignatureInvalid(AuthError):
    """The signature does not verify over result.json: over its exact bytes, with Sigstore."""


class SignerNotAllowed(AuthError):
    """The bundle is signed, but not by the signer this runner key is bound to."""


class Unverifiable(AuthError):
    """The bundle names a log that the trust root does not hold: refresh it and submit again."""


class PolicyRefused(AuthError):
    """The signer policy could never match a certificate, or would match too much."""
