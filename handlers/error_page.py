"""/errors: where the `type` of each problem document leads. One line per code, from our table."""

from html import escape

from tornado.web import URLSpec

from broker.errors import code_of
from broker.services import Services
from handlers.errors import ERRORS_PATH, STATUS
from handlers.health import PlainHandler


class ErrorPageHandler(PlainHandler):
    """/errors: every code, its status and what it means, for people."""

    def get(self) -> None:
        """Answer a page with an anchor per code."""
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.finish(_PAGE)

    head = get


def _page() -> str:
    rows = "\n".join(_row(error, status) for error, status in STATUS.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>bakeoff-queue: errors</title>'
        f"<h1>What the errors mean</h1>\n<dl>\n{rows}\n</dl></html>\n"
    )


def _row(error: type[Exception], status: int) -> str:
    code = code_of(error.__new__(error))
    meaning = escape(" ".join((error.__doc__ or "").split()))
    return f'<dt id="{code}"><code>{code}</code> ({status})</dt><dd>{meaning}</dd>'


_PAGE = _page()


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    return [URLSpec(ERRORS_PATH, ErrorPageHandler, {"services": services})]
