"""Listings a page at a time: the cursor is where the last row of a page stands.

By time and id, by a number of the database, or by a runner's name.
"""

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

from broker.errors import InvalidRequest, Violation

PAGE_MAX = 1000
INT_MAX = 2**31 - 1  # PostgreSQL's
BIGINT_MAX = 2**63 - 1
MAX_DIGITS = 18  # of a number that fits into it
# As the allowlist takes them (schemas/runner_key.json).
_RUNNER_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def check_limit(limit: int) -> None:
    """Raise InvalidRequest unless a page may have so many rows."""
    if not 1 <= limit <= PAGE_MAX:
        raise bad_query("/limit", f"must be between 1 and {PAGE_MAX}")


def read_whole(at: str, text: str) -> int:
    """Return a whole number of the query. Raises InvalidRequest for anything else."""
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise bad_query(at, "must be a whole number")
    return int(text)


def write_cursor(at: datetime, run_id: UUID) -> str:
    """Return the cursor of the row that stands here."""
    # Whole numbers only: a microsecond early, and the next page would begin with this one's rows.
    microseconds = (at - _EPOCH) // timedelta(microseconds=1)
    return base64.urlsafe_b64encode(f"{microseconds}:{run_id}".encode()).decode()


def read_cursor(cursor: str) -> tuple[datetime, UUID]:
    """Return where the page after it begins. Raises InvalidRequest for what we did not give."""
    try:
        text = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True).decode()
        microseconds, _, run_id = text.partition(":")
        at = _EPOCH + timedelta(microseconds=int(microseconds)), UUID(run_id)
        forged = write_cursor(*at) != cursor  # int() and UUID() read more than we write
    except (ValueError, OverflowError, binascii.Error):
        raise _not_ours() from None
    if forged:
        raise _not_ours()
    return at


def write_numbers(*numbers: int) -> str:
    """Return the cursor of the row that has these numbers."""
    return base64.urlsafe_b64encode(":".join(map(str, numbers)).encode()).decode()


def read_numbers(cursor: str, count: int, most: int = BIGINT_MAX) -> tuple[int, ...]:
    """Return the numbers of the row before the page. Raises InvalidRequest as `read_cursor`."""
    try:
        text = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
        numbers = tuple(int(number) for number in text.split(b":"))
    except (ValueError, binascii.Error):
        raise _not_ours() from None
    fits = len(numbers) == count and all(0 <= number <= most for number in numbers)
    if not fits or write_numbers(*numbers) != cursor:
        raise _not_ours()
    return numbers


def write_name(runner_id: str) -> str:
    """Return the cursor of the runner of this name."""
    return base64.urlsafe_b64encode(runner_id.encode()).decode()


def read_name(cursor: str) -> str:
    """Return the name of the runner before the page. Raises InvalidRequest as `read_cursor`."""
    try:
        name = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        raise _not_ours() from None
    # PostgreSQL takes no U+0000, and a name has at most 128 characters.
    if not _RUNNER_ID.fullmatch(name) or write_name(name) != cursor:
        raise _not_ours()
    return name


def _not_ours() -> InvalidRequest:
    return bad_query("/cursor", "is not a cursor this queue gave: start from the first page")


def bad_query(at: str, detail: str) -> InvalidRequest:
    """Return the refusal of a member of the query."""
    return InvalidRequest(f"{at.strip('/')} {detail}.", (Violation(at, detail),))
