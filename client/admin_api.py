"""The admin API as the commands see it: a method per verb, and one failure per kind of refusal.

Exit codes: a problem document's 404 is 3 and its 409 is 4; no answer, or a gateway's 502, 503 and
504, is 5; every other refusal is 1. A bare 404 is not 3: without one of our codes it comes from a
proxy or a wrong --url, and says nothing about the thing that was asked for.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
import typer

from broker.documents import strict_json
from broker.errors import InvalidJson
from client.output import CommandFailed, ExitCode, usage_error

URL_VARIABLE = "BAKEOFF_QUEUE_URL"
TOKEN_VARIABLE = "BAKEOFF_QUEUE_TOKEN"  # noqa: S105 - the variable's name, not a token
TIMEOUT = httpx.Timeout(60, connect=5)  # s; a full batch of 1000 runs is one long transaction
RETRY_PAUSES_S = (0.5, 1.0)
PAGE = 100
ANSWER_DEPTH = 80  # a job as deep as an enqueue takes it, within an answer
BYTES = "application/octet-stream"

Url = Annotated[
    str, typer.Option("--url", envvar=URL_VARIABLE, help="Address of the service.", metavar="URL")
]
Token = Annotated[
    str,
    typer.Option(
        "--token",
        envvar=TOKEN_VARIABLE,
        help="Admin token; prefer the variable, other users can read a command's arguments.",
        metavar="TOKEN",
        show_default=False,
    ),
]
DEFAULT_URL = "http://127.0.0.1:8400"

_answered: ContextVar[list[str] | None] = ContextVar("answered", default=None)
_GATEWAY = {502, 503, 504}
_CODES = {404: ExitCode.NOT_FOUND, 409: ExitCode.CONFLICT} | dict.fromkeys(
    _GATEWAY, ExitCode.UNREACHABLE
)
_FIXES = {
    401: (
        f"unset {TOKEN_VARIABLE}, get a new token with `bakeoff-queue tokens mint --name NAME` on a"
        f" host that has the database's settings, and set {TOKEN_VARIABLE} to it"
    ),
    403: "use a token with that scope (`bakeoff-queue tokens mint --name NAME --scope SCOPE`)",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A 2xx answer: its status and the object it carries."""

    status: int
    body: dict[str, Any]


@contextmanager
def connect(url: str, token: str) -> Iterator["AdminClient"]:
    """Yield a client for the service at `url`. Raises CommandFailed for an unusable url or token.

    No connection is made before the first request.
    """
    token = token.strip()
    if not token:
        raise usage_error(
            "no admin token: get one with `bakeoff-queue tokens mint --name NAME` and set"
            f" {TOKEN_VARIABLE}"
            " (or use --token)"
        )
    if not (token.isascii() and token.isprintable()):
        raise usage_error("the admin token has characters that no token has: copy it again")
    with httpx.Client(
        base_url=_base_url(url), headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT
    ) as http:
        yield AdminClient(http)


@contextmanager
def connect_openly(url: str) -> Iterator["AdminClient"]:
    """Yield a client without a token, for what anybody may ask. Raises CommandFailed."""
    with httpx.Client(base_url=_base_url(url), timeout=TIMEOUT) as http:
        yield AdminClient(http)


def _base_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text.rstrip("/"))
        url.host.encode("idna")  # as the resolver will, whose UnicodeError nobody catches
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL("")
    usable = url.scheme in ("http", "https") and url.host and (url.port or 0) <= 65535
    # A password in the address would replace our bearer token, and be printed with every error;
    # what follows a ? or # would swallow the path of every request.
    if not usable or url.userinfo or "?" in text or "#" in text:
        raise usage_error(
            f"--url (or {URL_VARIABLE}) is no plain http or https address like {DEFAULT_URL}"
        )
    return url


@dataclass(frozen=True, slots=True)
class AdminClient:
    """The requests of the admin API. All raise CommandFailed, ready to be shown."""

    http: httpx.Client
    retry_pauses_s: Sequence[float] = RETRY_PAUSES_S

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """Return the object at `path`; query members that are None are left out."""
        sent = {name: value for name, value in query.items() if value is not None}
        return self._send(self._request("GET", path, query=sent)).body

    def pages(self, path: str, limit: int, **query: Any) -> Iterator[dict[str, Any]]:
        """Yield the pages of a listing until it ends or `limit` items have been asked for."""
        cursor, left = None, limit
        while left > 0:
            size = min(left, PAGE)
            page = self.get(path, **query, limit=size, cursor=cursor)
            yield page
            cursor, left = next_cursor(page, cursor), left - size
            if not cursor:
                return

    def download(self, path: str) -> bytes:
        """Return the bytes at `path` as they are."""
        request = self._request("GET", path)
        response = self._answer(request)
        if response.is_success and response.headers.get("Content-Type") == BYTES:
            return response.content
        _read(response)
        raise _not_ours(response)

    def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Send a change once. A lost answer is not retried: it may have been carried out."""
        return self._send(self._request("POST", path, body=body))

    def post_once(self, path: str, body: Mapping[str, Any], key: str) -> Answer:
        """Send a change that the service carries out at most once per `key`, so retry it."""
        request = self._request("POST", path, body=body, headers={"Idempotency-Key": key})
        return self._send(request, self.retry_pauses_s)

    def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Change what `path` names. Sent again it changes nothing more, so it is retried."""
        request = self._request("PATCH", path, body=body)
        return self._send(request, self.retry_pauses_s).body

    def delete(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Delete what `path` names."""
        return self._send(self._request("DELETE", path, body=body)).body

    def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Request:
        if body is None:
            return self.http.build_request(method, path, params=query)
        # Escaped to ASCII: a lone surrogate in a file reaches the service, which refuses it by
        # its pointer, where httpx's own encoding would end in a UnicodeEncodeError.
        return self.http.build_request(
            method,
            path,
            content=json.dumps(body, allow_nan=False).encode("ascii"),
            headers={"Content-Type": "application/json", **(headers or {})},
        )

    def _send(self, request: httpx.Request, pauses_s: Sequence[float] = ()) -> Answer:
        for pause_s in pauses_s:
            try:
                return _read(self.http.send(request))
            except httpx.RequestError:
                time.sleep(pause_s)
        return _read(self._answer(request))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        try:
            return self.http.send(request)
        except httpx.RequestError as error:
            raise CommandFailed(
                f"{self.http.base_url} cannot be reached ({error or type(error).__name__}):"
                f" is the service up, and is --url (or {URL_VARIABLE}) right?",
                code=ExitCode.UNREACHABLE,
            ) from None


@contextmanager
def refusing_unreadable() -> Iterator[None]:
    """Tell in one line of an answer that a command could not use: its members are another's.

    A command reads what our service answers, whose members it does not check one by one. An error
    before any answer is a fault of ours, and keeps its traceback.
    """
    last: list[str] = []
    reset = _answered.set(last)
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        if not last:
            raise
        what = f"{type(error).__name__}: {error}"[:200]
        raise CommandFailed(
            f"{last[-1]} was answered with JSON that is not bakeoff-queue's ({what}): is --url (or"
            f" {URL_VARIABLE}) right, and the service of this version?"
        ) from error
    finally:
        _answered.reset(reset)


def next_cursor(page: Mapping[str, Any], last: str | None) -> str | None:
    """Return where a listing goes on. Raises ValueError for a page that leads to itself."""
    cursor = page.get("next_cursor")
    if cursor is not None and (not isinstance(cursor, str) or cursor == last):
        raise ValueError("next_cursor leads nowhere")
    return cursor


def _read(response: httpx.Response) -> Answer:
    body = _object(response)
    if response.is_success and body is not None:
        return Answer(response.status_code, body)
    problem = response.headers.get("Content-Type", "").startswith("application/problem+json")
    if body is None or not problem or not isinstance(body.get("code"), str):
        raise _not_ours(response)
    raise _refusal(response, body)


def _object(response: httpx.Response) -> dict[str, Any] | None:
    if (answered := _answered.get()) is not None:
        request = response.request
        answered.append(f"{request.method} {request.url.copy_with(query=None)}")
    try:
        body = strict_json.parse(response.content, max_depth=ANSWER_DEPTH)
    except InvalidJson:
        return None
    return body if isinstance(body, dict) else None


def _not_ours(response: httpx.Response) -> CommandFailed:
    status = response.status_code
    return CommandFailed(
        f"{response.request.method} {response.request.url} was answered {status}, but not by"
        f" bakeoff-queue: is --url (or {URL_VARIABLE}) right?",
        code=ExitCode.UNREACHABLE if status in _GATEWAY else ExitCode.FAILURE,
    )


def _refusal(response: httpx.Response, problem: Mapping[str, Any]) -> CommandFailed:
    """Turn a problem document (RFC 9457) into a line, its `errors[]` into further lines."""
    status = response.status_code
    reason = problem.get("detail") or problem.get("title") or "refused"
    line = f"{reason} [{problem['code']}, {status} at {response.request.url.path}"
    if problem.get("request_id"):
        line += f", request {problem['request_id']}"
    return CommandFailed(
        "; ".join([f"{line}]", *_fix(response)]),
        code=_CODES.get(status, ExitCode.FAILURE),
        details=[_violation(item) for item in problem.get("errors") or ()],
    )


def _fix(response: httpx.Response) -> list[str]:
    if wait := response.headers.get("Retry-After"):
        return [f"try again in {wait} s"]
    fix = _FIXES.get(response.status_code)
    return [fix] if fix else []


def _violation(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    return f"{item.get('pointer') or '(whole body)'}: {item.get('detail')}"
