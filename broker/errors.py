"""Why the broker refused.

An exception's docstring is its message; `handlers/errors.py` gives it a status.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a document: where (RFC 6901 pointer) and what."""

    pointer: str
    detail: str


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
