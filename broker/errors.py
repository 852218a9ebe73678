"""Why the broker refused.

An exception's docstring is its message; `handlers/errors.py` gives it a status.
"""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a document: where (RFC 6901 pointer) and what."""

    pointer: str
    detail: str


def code_of(error: Exception) -> str:
    """Return the code that runners and admins see: the class's name in snake case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


class BrokerError(Exception):
    """The request was understood and refused."""

    def __init__(self, detail: str | None = None, violations: tuple[Violation, ...] = ()) -> None:
        super().__init__(detail or " ".join((self.__doc__ or "").split()))
        self.violations = violations


class InvalidJson(BrokerError):
    """The body is not strict JSON (RFC 8259, UTF-8, no duplicates, no NaN)."""


class DuplicateKey(InvalidJson):
    """A JSON object names the same member twice."""


class InvalidRequest(BrokerError):
    """The body does not fit the schema of this address."""


class InvalidBundle(BrokerError):
    """The bundle's files or their contents are not what a bundle holds."""


class DigestMismatch(BrokerError):
    """A file's SHA-256 is not the one its manifest names."""


class RunMismatch(BrokerError):
    """The result is not of the run, or not of the job, that was handed out."""


class UnknownQuantization(InvalidRequest):
    """A quantization is not one that upstream's table knows."""


class NotFound(BrokerError):
    """There is no such thing here."""


class ClockSkew(BrokerError):
    """signed_at is too far from the server's clock: set the machine's clock and sign again."""

    def __init__(self, skew_s: float) -> None:
        super().__init__(
            f"signed_at is {abs(skew_s):.0f} s {'behind' if skew_s < 0 else 'ahead of'} the"
            " server's clock: set the machine's clock (NTP) and sign again."
        )
        self.skew_s = round(skew_s)


class KeyNotAllowed(BrokerError):
    """This runner key is not on the allowlist: ask an admin to add it."""


class KeyRevoked(BrokerError):
    """This runner key has been revoked, or its time is over: ask an admin."""


class RunnerPaused(BrokerError):
    """This runner is paused: ask an admin to resume it."""

    def __init__(self, reason: str | None) -> None:
        told = f": {reason}" if reason else ""
        super().__init__(f"This runner is paused{told}. Ask an admin to resume it.")


class NonceReused(BrokerError):
    """This nonce was used by another registration: draw a new one."""


class LeaseLost(BrokerError):
    """This lease is not live, or not yours: stop the work on this run and claim again."""


class LeaseLimit(BrokerError):
    """The runner holds as many leases as it may: finish or release one first."""

    def __init__(self, held: list[str]) -> None:
        super().__init__(
            "The runner holds as many leases as it may: finish or release one first"
            f" ({', '.join(held) or 'another claim is in flight'})."
        )
        self.held = held


class RunFinished(BrokerError):
    """The run has ended: stop the work on it and claim again."""


class AlreadyComplete(BrokerError):
    """Another result was accepted for this run: stop the work on it and claim again."""


class Conflict(BrokerError):
    """The request contradicts what is there."""


class RateLimited(BrokerError):
    """Too many requests: send this one again after Retry-After."""

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = max(1, math.ceil(retry_after_s))


class Busy(BrokerError):
    """As many bundles as fit are being verified: send this one again in a few seconds."""


class Draining(BrokerError):
    """This process is stopping: send the request again, another one will take it."""


class RequestTimeout(BrokerError):
    """The body came too slowly, less than 15 KiB in 30 s, and was given up: send it again."""


class TooLarge(BrokerError):
    """The body, or a part of it, is larger than this address takes."""


class UnsupportedMediaType(BrokerError):
    """The body is not of the media type that this address takes."""


class MalformedRequest(BrokerError):
    """The request does not say where its body ends: send one Content-Length, of digits alone."""


class EmptyBody(BrokerError):
    """The request has no body: this address takes a JSON object."""


class MethodNotAllowed(BrokerError):
    """This address does not take that method; the Allow header names those it takes."""


class Unavailable(BrokerError):
    """The database cannot be reached at this moment: send the same request again."""


class Internal(BrokerError):
    """Something went wrong on our side; it is logged under this request_id."""
