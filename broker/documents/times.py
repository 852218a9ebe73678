"""Times as text: RFC 3339, always with an offset."""

from datetime import UTC, datetime

from broker.errors import InvalidRequest, Violation


def rfc3339(moment: datetime) -> str:
    """Return an instant in UTC, as every answer spells it."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def parse_time(text: str, at: str) -> datetime:
    """Return the instant in UTC. Raises InvalidRequest that points to `at`.

    The schema has checked the form; what is left is what the form allows and no clock shows, such
    as a leap second or the year 0000.
    """
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no offset")
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        detail = "is not an RFC 3339 time we can store, such as 2026-01-31T12:00:00Z"
        raise InvalidRequest(f"{at} {detail}.", (Violation(at, detail),)) from None


def time_to_come(text: str, at: str) -> datetime:
    """Return the instant in UTC. Raises InvalidRequest when it has passed, too."""
    moment = parse_time(text, at)
    if moment <= datetime.now(UTC):
        detail = "has passed: give a time to come"
        raise InvalidRequest(f"{at} {detail}.", (Violation(at, detail),))
    return moment
