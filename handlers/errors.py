"""One table: what went wrong -> status. And the problem document (RFC 9457) that tells of it."""

from typing import Any

import asyncpg

from auth import errors as auth
from broker import errors as broker
from broker.errors import Violation, code_of

# Where this service explains its codes, below its public URL (handlers/error_page.py).
ERRORS_PATH = "/errors"
RETRY_AFTER_S = 5

STATUS: dict[type[Exception], int] = {
    broker.InvalidJson: 400,
    broker.DuplicateKey: 400,
    broker.EmptyBody: 400,
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
    broker.Internal: 500,
    broker.Unavailable: 503,
    broker.Draining: 503,
    broker.Busy: 503,
}
# What the same request may meet with success later, as it is.
RETRYABLE = (
    broker.RequestTimeout,
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
    if _is_outage(error):
        return broker.Unavailable()
    return broker.Internal()


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


def _is_outage(error: BaseException) -> bool:
    """Return whether the database, not the request, is at fault.

    Connection failures, 08 (connection), 53 (resources), 57 (operator intervention, time-outs),
    55P03 (lock not available), 40 (deadlock, serialization) and 25006 (a read-only standby).
    """
    # InternalClientError: what asyncpg says of a connection that the server has just cut off.
    if isinstance(error, OSError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return True
    state = getattr(error, "sqlstate", None) or ""
    return state.startswith(("08", "53", "57", "40")) or state in ("55P03", "25006")
