"""One table: what went wrong -> status. And the problem document (RFC 9457) that tells of it."""

import errno
from typing import Any

import asyncpg

from auth import errors as auth
from broker import errors as broker
from broker.errors import Violation, code_of

# Where this service explains its codes, below its public URL (handlers/public.py).
ERRORS_PATH = "/errors"
RETRY_AFTER_S = 5

STATUS: dict[type[Exception], int] = {
    broker.InvalidJson: 400,
    broker.DuplicateKey: 400,
    broker.EmptyBody: 400,
    broker.MalformedRequest: 400,
    auth.MissingToken: 401,
    auth.InvalidToken: 401,
    auth.TokenExpired: 401,
    auth.BadSignature: 401,
    broker.ClockSkew: 401,
    broker.KeyNotAllowed: 403,
    broker.KeyRevoked: 403,
    broker.RunnerPaused: 403,
    auth.ScopeRequired: 403,
    broker.NotFound: 404,
    broker.MethodNotAllowed: 405,
    broker.LeaseLost: 409,
    broker.LeaseLimit: 409,
    broker.RunFinished: 409,
    broker.AlreadyComplete: 409,
    broker.NonceReused: 409,
    broker.Conflict: 409,
    broker.RequestTimeout: 408,
    broker.TooLarge: 413,
    broker.UnsupportedMediaType: 415,
    broker.InvalidRequest: 422,
    broker.UnknownQuantization: 422,
    broker.InvalidBundle: 422,
    broker.DigestMismatch: 422,
    broker.RunMismatch: 422,
    auth.SignatureInvalid: 422,
    auth.SignerNotAllowed: 422,
    auth.Unverifiable: 422,
    broker.RateLimited: 429,
    broker.Internal: 500,
    broker.Unavailable: 503,
    broker.Draining: 503,
    broker.Busy: 503,
}
# What the same request may meet with success later, as it is.
RETRYABLE = (
    broker.RequestTimeout,
    broker.RateLimited,
    broker.Unavailable,
    broker.Draining,
    broker.Busy,
    broker.Internal,
)


def refusal_of(error: BaseException) -> Exception:
    """Return the error of the table that tells of `error`; what is in no row is Internal."""
    if type(error) in STATUS:
        assert isinstance(error, Exception)
        return error
    if isinstance(error, asyncpg.DataError):
        return broker.InvalidRequest("A value is outside of what the database can store.")
    cause = _outage(error)
    return (
        broker.Unavailable(f"{cause}: send the same request again.")
        if cause
        else (broker.Internal())
    )


def describe_cause(error: BaseException) -> str:
    """Return what an operator needs to know of a failure: type, SQLSTATE, message, and its cause.

    PostgreSQL's details are not among them: they quote rows.
    """
    state = getattr(error, "sqlstate", None)
    text = " ".join(str(error).split())
    described = f"{type(error).__name__}{f' {state}' if state else ''}: {text}".removesuffix(": ")
    cause = error.__cause__
    return f"{described} <- {describe_cause(cause)}" if cause is not None else described


def problem(error: Exception, request_id: str, public_url: str) -> dict[str, Any]:
    """Return the problem document of an error of the table; its type is an address of ours."""
    code = code_of(error)
    document: dict[str, Any] = {
        "type": f"{public_url}{ERRORS_PATH}#{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": STATUS[type(error)],
        "detail": str(error),
        "code": code,
        "request_id": request_id,
        "retryable": isinstance(error, RETRYABLE),
    }
    violations: tuple[Violation, ...] = getattr(error, "violations", ())
    if violations:
        document["errors"] = [{"pointer": v.pointer, "detail": v.detail} for v in violations]
    if isinstance(error, broker.ClockSkew):
        document["skew_s"] = error.skew_s
    if isinstance(error, broker.LeaseLimit):
        document["held_run_ids"] = error.held
    return document


# What PostgreSQL's condition codes mean for the client, the longest prefix first. Runners read it,
# so it names no host, path or table: the log has the server's own words (`describe_cause`).
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_CONDITIONS = (
    ("53100", "The database's disk is full, and its operator has to make room"),
    ("53200", "The database is out of memory"),
    ("53300", "The database takes no more connections"),
    ("53", "The database has reached one of its limits"),
    ("55P03", "Another session holds a lock that this needs (a migration or maintenance)"),
    ("57014", "The database took too long over this"),
    ("57P", "The database is starting or stopping"),
    ("57", "The database's operator has interrupted this"),
    ("58", "The database cannot read or write its files, and its operator has to look"),
    ("40", "This met others in a deadlock, several times in a row"),
    ("25006", "The database is read-only at this moment (a standby, or a failover)"),
    ("08", "The database cannot be reached at this moment"),
)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _outage(error: BaseException) -> str | None:
    """Return what of the service, and not of the request, is at fault; None when nothing is known.

    The database, or a file or process of this machine. asyncpg.InternalClientError is what asyncpg
    says of a connection that the server has just cut off.
    """
    state = getattr(error, "sqlstate", None) or ""
    for prefix, words in _CONDITIONS:
        if state.startswith(prefix):
            return words
    if isinstance(error, TimeoutError):
        return "The database does not answer in time, or all connections to it are busy"
    if isinstance(error, ConnectionError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return "The database cannot be reached at this moment"
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return "A disk of this server is full, and its operator has to make room"
        return (
            "This server cannot use a file or process of its own"
            f" ({error.strerror or type(error).__name__}), and its operator has to look"
        )
    return None
