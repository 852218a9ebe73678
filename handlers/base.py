"""Base of all handlers: the order of checks, bodies, answers and problem documents.

The order: route, framing, method, credential, query (all before the body is read), media type,
size, JSON, schema, state. Bodies are streamed into our own buffer, so that a cap is a real 413 and
Tornado's multipart parser never sees a byte.
"""

import asyncio
import json
import random
import re
import time
from asyncio import Future
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any, ClassVar
from uuid import UUID, uuid4

import orjson
import structlog
from tornado.httputil import HTTPServerRequest
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

from auth.errors import AuthError, MissingToken
from broker.concurrency.shares import Shares
from broker.documents.schemas import load_schema
from broker.documents.strict_json import pointer, quote
from broker.documents.times import rfc3339
from broker.errors import (
    Busy,
    Draining,
    EmptyBody,
    Internal,
    InvalidRequest,
    KeyRevoked,
    MalformedRequest,
    MethodNotAllowed,
    RateLimited,
    RequestTimeout,
    TooLarge,
    UnsupportedMediaType,
    Violation,
    code_of,
)
from broker.services import Services
from handlers import rates
from handlers.addresses import Proxies, client_of
from handlers.connections import ClientStream
from handlers.errors import RETRY_AFTER_S, STATUS, describe_cause, problem, refusal_of

UUID_PATH = r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# W3C Trace Context, version 00: trace-id and parent-id, neither of them all zeros.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_OF_RUNS = ("/api/queue/", "/api/admin/queue/", "/api/admin/results/")
# How a request says where its body ends, by one of these.
_FRAMING = {
    "Content-Length": re.compile(r"[0-9]+"),
    "Transfer-Encoding": re.compile(r"chunked", re.IGNORECASE),
}
_JSON_TYPE = re.compile(r'application/json(?:\s*;\s*charset="?utf-8"?)?', re.IGNORECASE)
# A body of this size is read and dropped, whatever an address takes, so that its refusal arrives.
DROPPED_BYTES = 1024 * 1024
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
}

TOO_MANY = "This {} sends more requests than the service takes of one."

log = structlog.get_logger()


@stream_request_body
class Handler(RequestHandler):
    """A request, from its headers to its answer."""

    max_body_bytes = 8 * 1024
    event: ClassVar[str] = "http.request"  # of the log line that each request leaves
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {}  # of the query, by method

    def __init__(
        self, application: Application, request: HTTPServerRequest, services: Services
    ) -> None:
        self.services = services
        self.asked: dict[str, str] = {}  # the parameters of the query
        self._body = bytearray()
        self._too_large = False
        self._refused: Exception | None = None
        # Until the request is read to its end: Tornado closes the connection behind an answer that
        # comes earlier, also when there is no body, and the answer has to say so.
        self._unread = True
        self._arrived = time.monotonic()
        # Of the log line: whose request it is, and what came of it. Never a token or a lease_id.
        self.facts: dict[str, Any] = {}
        if trace := _TRACEPARENT.fullmatch(request.headers.get("Traceparent", "")):
            self.facts["trace_id"] = trace[1]
        wanted = request.headers.get("X-Request-Id", "")
        self.request_id = wanted if _SANE_REQUEST_ID.fullmatch(wanted) else str(uuid4())
        self._connection = connection_of(request)
        if self._connection is not None:
            self._connection.request = self
        self._held: list[tuple[Shares, str]] = []
        self._standing: rates.Standing | None = None
        services.in_flight.enter()
        self._in_flight = True
        super().__init__(application, request)

    def set_default_headers(self) -> None:
        """Send our headers on every answer, also on those Tornado makes."""
        self.clear_header("Server")
        for name, value in HEADERS.items():
            self.set_header(name, value)
        self.set_header("X-Request-Id", self.request_id)

    async def prepare(self) -> None:
        """Check what can be told before the body; tell a refusal once a small body is dropped.

        To hang up on a client that is still sending resets the connection, and the answer is lost
        with it: a runner would never learn that its token has expired. A request without a body has
        ended, and its connection serves the next one.
        """
        if self.services.in_flight.closed:
            raise Draining
        try:
            self._check_framing()
        except MalformedRequest:
            await self.throttle()
            raise
        try:
            await self.check()
        except Exception as error:
            if not self._drops_body():
                raise
            self._refused = error
            # Tornado calls the method when the body has ended.
            setattr(self, (self.request.method or "").lower(), self._refuse)
        self._unread = False

    async def check(self) -> None:
        """Check what can be told before the body: method, credential, query, media type, size."""
        try:
            if not self._implements(self.request.method or ""):
                raise MethodNotAllowed
            await self.authenticate()
        except (MethodNotAllowed, AuthError, KeyRevoked):
            await self.throttle()
            raise
        self.asked = self._query()
        if self.request.method in ("POST", "PUT", "PATCH"):
            self.check_media_type()
        self.check_length()

    async def authenticate(self) -> None:
        """Learn who sends this; handlers that anybody may use keep this one."""
        await self.throttle()

    async def throttle(self) -> None:
        """Count a request without a good token against its client's address.

        Raises RateLimited, after a delay, for one too many.
        """
        known: rates.ClientRates = self.settings["rates"]
        client = client_of(self.client_address)
        await self.limit(known.anonymous.take(client), "address")
        if known.anonymous.is_limited and not self.hold(known.in_flight, client):
            await self._delay("This address has too many requests in flight.", 1)
        if wait_s := await self.services.shared_rates.wait_s(client):
            await self._delay(TOO_MANY.format("address"), wait_s)

    async def limit(self, standing: rates.Standing | None, whose: str) -> None:
        """Tell the client where it stands. Raises RateLimited, after a delay, for one too many."""
        if standing is None:
            return
        self._standing = standing
        self._show_standing()
        if standing.wait_s:
            await self._delay(TOO_MANY.format(whose), standing.wait_s)

    def _show_standing(self) -> None:
        if self._standing is not None:
            for name, value in self._standing.headers.items():
                self.set_header(name, value)

    async def _delay(self, detail: str, retry_after_s: float) -> None:
        """Refuse, but not at once: the next request of a flood would come at once as well."""
        self.services.telemetry.rate_limited.labels(type(self).__name__).inc()
        await asyncio.sleep(rates.DELAY_S * random.uniform(1, 3))  # noqa: S311 (no secret)
        raise RateLimited(detail, retry_after_s)

    def hold(self, shares: Shares, holder: str) -> bool:
        """Take one of a holder's share until this request has been answered; False: none left."""
        if not self._in_flight:  # the client is gone, and nothing would be given back
            return True
        if not shares.take(holder):
            return False
        self._held.append((shares, holder))
        return True

    def check_media_type(self) -> None:
        """Raise UnsupportedMediaType unless the body is JSON in UTF-8, as it is."""
        if self.request.headers.get("Content-Encoding", "identity") != "identity":
            raise UnsupportedMediaType("Send the body without a Content-Encoding.")
        if not _JSON_TYPE.fullmatch(self.request.headers.get("Content-Type", "")):
            raise UnsupportedMediaType("Send application/json, in UTF-8.")

    def check_length(self) -> None:
        """Raise TooLarge for an announced length beyond the cap."""
        if int(self.request.headers.get("Content-Length", "0")[:20]) > self.max_body_bytes:
            raise self._beyond_cap()

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Take a piece of the body. One beyond the cap is dropped, and refused when it has ended:
        an exception here would close the connection without an answer."""
        if self._refused is not None:
            return
        if len(self._body) + len(chunk) > self.max_body_bytes:
            self._too_large = True
        else:
            self._body += chunk

    def read_json(self, schema: str) -> Any:
        """Return the body, which fits `broker/documents/json_schemas/<schema>.json`.

        Raises TooLarge, EmptyBody, InvalidJson, DuplicateKey or InvalidRequest.
        """
        return load_schema(schema).read(self.read_body(), InvalidRequest)

    def read_body(self) -> bytes:
        """Return the body as it came. Raises TooLarge or EmptyBody."""
        if self._too_large:
            raise self._beyond_cap()
        if not self._body:
            raise EmptyBody
        return bytes(self._body)

    @property
    def client_address(self) -> str:
        """The address of the client, behind the trusted proxies."""
        proxies: Proxies = self.settings["proxies"]
        forwarded = ",".join(self.request.headers.get_list("X-Forwarded-For"))
        return proxies.client_behind(self.request.remote_ip or "", forwarded)

    def bearer_token(self) -> str:
        """Return the token of the one Authorization header. Raises MissingToken."""
        headers = self.request.headers.get_list("Authorization")
        if len(headers) > 1:  # a proxy might have gone by the other one
            raise MissingToken("The Authorization header was sent twice: send it once.")
        scheme, _, token = (headers[0] if headers else "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise MissingToken
        return token

    def answer(self, status: int, body: dict[str, Any], members: str | None = None) -> None:
        """Send JSON, with the server's time in it.

        `members` is the text of a JSON object, whose members join the body's without being read.
        """
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        text = to_json({**body, "server_time": datetime.now(UTC)})
        if members is not None:
            text = text[:-1] + b"," + members.encode()[1:]
        self.finish(text)

    def compute_etag(self) -> str | None:
        """No ETag: nothing here may be cached, and `If-None-Match: *` must not empty an answer."""
        return None

    def _query(self) -> dict[str, str]:
        """Return the query's parameters. Raises InvalidRequest for one unknown or given twice.

        Also of a POST: one with `?dry_run=1` that we do not know would be carried out in earnest.
        """
        method = "GET" if self.request.method == "HEAD" else self.request.method or ""
        given, known = self.request.query_arguments, self.parameters.get(method, ())
        for name, values in given.items():
            if name in known and len(values) == 1:
                continue
            wrong = "is sent more than once" if name in known else "is unknown"
            takes = f"this address takes {', '.join(known) or 'none'}"
            raise InvalidRequest(
                f"The query's parameter {quote(name)} {wrong}: {takes}.",
                (Violation(pointer([name]), f"{wrong}: {takes}"),),
            )
        asked = {name: self.get_query_argument(name, strip=False) for name in given}
        for name, text in asked.items():
            # Tornado would strip it: `limit=+1` would be 1 for us, and not for who sent it.
            if text != text.strip():
                wrong = "has a blank or a control character at its start or end"
                detail = f"The query's parameter {quote(name)} {wrong}."
                raise InvalidRequest(detail, (Violation(pointer([name]), wrong),))
        return asked

    @property
    def doomed(self) -> bool:
        """Return whether this is refused, whatever still comes of its body."""
        return self._refused is not None or self._too_large

    def give_up_body(self) -> None:
        """Answer without the rest of the body, which does not come: the refusal, or 408."""
        self._unread = True
        error = self._refused or (self._beyond_cap() if self._too_large else RequestTimeout())
        self.send_error(STATUS[type(error)], exc_info=(type(error), error, None))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Send a problem document, whoever raised: we, Tornado, or a library below us."""
        error = told_as(kwargs.get("exc_info", (None, None, None))[1] or Internal())
        self.facts["code"] = self.facts["outcome"] = code_of(error)
        status = STATUS[type(error)]
        self.set_status(status)
        if status == 405:
            self.set_header("Allow", ", ".join(self._methods()))
        if status == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if status in (401, 403):
            self.services.telemetry.auth_failures.labels(code_of(error)).inc()
        if status == 503:
            self.set_header("Retry-After", str(RETRY_AFTER_S))
        self._show_standing()  # Tornado has dropped all headers
        if isinstance(error, RateLimited):
            self.set_header("Retry-After", str(error.retry_after_s))
        if self._unread:
            self.set_header("Connection", "close")
            if self._connection is not None:
                self._connection.lingers = True
        self.set_header("Content-Type", "application/problem+json")
        document = problem(error, self.request_id, self.services.settings.public_url)
        self.finish(to_json({**document, "server_time": datetime.now(UTC)}))

    def finish(self, chunk: str | bytes | dict[str, Any] | None = None) -> "Future[None]":
        """Send the answer; return what is done when its last byte is on the wire.

        Until then the request is in flight: a stop that counted it as answered before would close
        the connection in the middle of an answer that a slow client is still reading.
        """
        if self.services.in_flight.draining:
            self.set_header("Connection", "close")
        try:
            written = super().finish(chunk)
        except Exception:
            self._leave()  # it ended short of its length: Tornado has closed the connection
            raise
        written.add_done_callback(lambda _: self._leave())
        return written

    def on_connection_close(self) -> None:
        """The client hung up: there is nobody to answer, and no body to wait for."""
        super().on_connection_close()
        self._leave()

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        """Log the cause of a 5xx; of what we did not expect with its traceback."""
        if value is None:
            return
        told = told_as(value)
        if isinstance(told, Internal):
            log.error("http.failed", request_id=self.request_id, exc_info=(typ, value, tb))
        elif STATUS[type(told)] >= 500:
            planned = isinstance(told, Busy | Draining)
            (log.info if planned else log.warning)(
                "http.unavailable",
                request_id=self.request_id,
                route=type(self).__name__,
                code=code_of(told),
                cause=describe_cause(value),
            )

    def count_answer(self) -> None:
        """Count this request and its time. A method that nobody knows is one label, not many."""
        telemetry, route = self.services.telemetry, type(self).__name__
        method = self.request.method if self.request.method in self.SUPPORTED_METHODS else "other"
        telemetry.requests.labels(route, method, self.get_status()).inc()
        telemetry.request_seconds.labels(route).observe(time.monotonic() - self._arrived)

    def log_answer(self) -> None:
        """Write the one log line of this request: its event, who, which run, what came of it."""
        if getattr(self, "path_args", None) and self.request.path.startswith(_OF_RUNS):
            self.facts["run_id"] = self.path_args[0]
        self.facts.setdefault("outcome", "ok")
        log.info(
            self.event,
            request_id=self.request_id,
            route=type(self).__name__,
            method=self.request.method,
            status=self.get_status(),
            dur_ms=round((time.monotonic() - self._arrived) * 1000, 1),
            **self.facts,
        )

    def _check_framing(self) -> None:
        """Raise MalformedRequest unless it is clear where the body ends.

        Tornado would say so by a bare 400 behind our answer. Without these headers it reads no
        body, and closes the connection, as the answer comes before the request's end.
        """
        headers = self.request.headers
        framing = [(name, value) for name in _FRAMING for value in headers.get_list(name)]
        if len(framing) > 1 or not all(_FRAMING[name].fullmatch(value) for name, value in framing):
            for name in {name for name, _ in framing}:
                del headers[name]
            raise MalformedRequest

    def _drops_body(self) -> bool:
        """Return whether the end of the body is worth waiting for; who asks first is told."""
        headers = self.request.headers
        if headers.get("Expect", "").lower() == "100-continue":
            return False
        length = headers.get("Content-Length", "0")
        most = max(self.max_body_bytes, DROPPED_BYTES)
        return "Transfer-Encoding" in headers or int(length[:20]) <= most

    def _beyond_cap(self) -> TooLarge:
        return TooLarge(f"This address takes bodies of up to {self.max_body_bytes} bytes.")

    def _refuse(self, *_: str) -> None:
        """Raise what was refused before the body.

        Nothing keeps it: else handler, error and frames would hold each other until a full garbage
        collection, and those of a flood stop all answers for 100 ms and more.
        """
        delattr(self, (self.request.method or "").lower())
        error, self._refused = self._refused, None
        try:
            assert error is not None
            raise error
        finally:
            del error

    def _leave(self) -> None:
        if self._in_flight:
            self._in_flight = False
            self.services.in_flight.leave()
            for shares, holder in self._held:
                shares.give_back(holder)

    def _implements(self, method: str) -> bool:
        own = getattr(type(self), method.lower(), None)
        return own is not None and own is not RequestHandler._unimplemented_method

    def _methods(self) -> list[str]:
        return [method for method in self.SUPPORTED_METHODS if self._implements(method)]


def told_as(raised: BaseException) -> Exception:
    """Return the error of our table that tells of what was raised, also by Tornado."""
    if isinstance(raised, HTTPError) and raised.status_code < 500:
        if raised.status_code == 405:
            return MethodNotAllowed()
        return InvalidRequest("The request could not be read.")
    return refusal_of(raised)


def read_flag(name: str, text: str) -> bool:
    """Read a switch of the query. Raises InvalidRequest for all but 0 and 1.

    `true` must not be taken for 0: what was meant as a try would be done in earnest.
    """
    if text not in ("0", "1"):
        detail = "must be 0 or 1"
        raise InvalidRequest(f"{name} {detail}.", (Violation(pointer([name]), detail),))
    return text == "1"


def connection_of(request: HTTPServerRequest) -> ClientStream | None:
    """Return the connection of a request; None where it is not one of our server's."""
    stream = getattr(request.connection, "stream", None)
    return stream if isinstance(stream, ClientStream) else None


def log_request(handler: RequestHandler) -> None:
    """Tornado's hook after each answer."""
    if isinstance(handler, Handler):
        handler.count_answer()
        handler.log_answer()


def to_json(body: Any) -> bytes:
    """Write JSON; times end in Z, and integers may be of any size."""
    try:
        return orjson.dumps(body, default=_write_value, option=orjson.OPT_UTC_Z)
    except TypeError:
        return json.dumps(body, default=_write_value, ensure_ascii=False).encode()


def _write_value(value: object) -> str:
    if isinstance(value, datetime):
        return rfc3339(value)
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
