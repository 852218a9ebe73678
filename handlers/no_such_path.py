"""What is told of a path that is none of ours: which part of it is not what stands there."""

import re
from typing import Any

from broker.errors import NotFound
from broker.results.bundle import CAPS
from handlers.base import UUID_PATH, Handler

NO_ADDRESS = "There is no such address here."
_FILES = rf"/api/admin/results/{UUID_PATH}/files/[^/]+"
_NO_RUN = rf"(?:{UUID_PATH}|claim|heartbeats|requeue)(?:/|$)"
# Of whole paths; the first that fits tells. The path itself is not repeated in an answer.
_TELLING = (
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


class NoSuchPath(Handler):
    """Every path that is not ours."""

    async def check(self) -> None:
        """Answer before anything is read."""
        await self.throttle()
        raise NotFound(told_of(self.request.path))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer 404 also to methods that Tornado refuses first: there is nothing to allow."""
        if status_code == 405:
            error = NotFound(told_of(self.request.path))
            super().write_error(404, exc_info=(NotFound, error, None))
        else:
            super().write_error(status_code, **kwargs)


def told_of(path: str) -> str:
    """Return why there is nothing at `path`, as far as its shape tells."""
    return next((detail for shape, detail in _TELLING if shape.fullmatch(path)), NO_ADDRESS)
