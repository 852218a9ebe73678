"""404 handler: names the path segment that is malformed."""

import re
from typing import Any

from broker.errors import NotFound
from broker.results.bundle import CAPS
from handlers.base import UUID_PATH, Handler

NO_ADDRESS = "There is no such address here."
_FILES = rf"/api/admin/results/{UUID_PATH}/files/[^/]+"
_NO_RUN = rf"(?:{UUID_PATH}|claim|heartbeats|requeue|bulk|pauses|pause|resume)(?:/|$)"
# Whole paths; the first match gives the detail. The path itself is not repeated in an answer.
_MALFORMED = (
    (re.compile(_FILES), f"A result has no such file: its files are {', '.join(CAPS)}."),
    (
        re.compile(rf"/api/(?:admin/)?(?:queue|results)/(?!{_NO_RUN})[^/]+(?:/.*)?"),
        "The run_id in this path is not a UUID in lower case, with its hyphens.",
    ),
    (
        re.compile(r"/api/admin/runner-keys/(?![0-9a-f]{64}$)[^/]+"),
        "The fingerprint in this path is not 64 hexadecimal digits in lower case.",
    ),
    (
        re.compile(r"/api/admin/runners/[^/]+(?:/(?:pause|resume|drain))?"),
        "The runner_id in this path is none: letters, digits, dot, underscore and hyphen.",
    ),
)


class NotFoundHandler(Handler):
    """Any path without a handler."""

    async def check(self) -> None:
        """Answer before anything is read."""
        await self.throttle()
        raise NotFound(detail_of(self.request.path))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer 404 also to methods that Tornado refuses first: there is nothing to allow."""
        if status_code == 405:
            error = NotFound(detail_of(self.request.path))
            super().write_error(404, exc_info=(NotFound, error, None))
        else:
            super().write_error(status_code, **kwargs)


def detail_of(path: str) -> str:
    """Return which segment of `path` is malformed, or that there is no such address."""
    return next((detail for shape, detail in _MALFORMED if shape.fullmatch(path)), NO_ADDRESS)
