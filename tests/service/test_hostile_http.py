"""Hostile HTTP: whatever comes in, a problem document goes out, and never a 500.

What Tornado itself cannot read as a request (its start line, its headers, its framing) never
reaches a handler: that is answered with a bare 400, and the connection is closed.
"""

import asyncio
import itertools
import json
import random
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from config.settings import Settings
from handlers import connections
from handlers.base import HEADERS
from handlers.errors import ERRORS_PATH, STATUS
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import make_app
from tests.support.fleet import AUDIENCE, Fleet, Runner, code_of, open_fleet, run_of
from tests.support.raw_http import Line, exchange, head, line_to
from tests.support.routes import FILLED, RUN, served

MakeSettings = Callable[..., Settings]
KIB = 1024
JSON_TYPE = "Content-Type: application/json"
RUNNER_ROUTES = (
    "/api/queue/claim",
    "/api/queue/heartbeats",
    f"/api/queue/{RUN}/heartbeat",
    f"/api/queue/{RUN}/release",
    f"/api/queue/{RUN}/fail",
)
ADMIN_ROUTES = ("/api/admin/runner-keys", "/api/admin/queue", f"/api/admin/queue/{RUN}/cancel")
POSTS = (*RUNNER_ROUTES, *ADMIN_ROUTES, "/api/runners/register")


@asynccontextmanager
async def guarded(
    settings: Settings, sigstore: ThrowawaySigstore
) -> AsyncIterator[tuple[Fleet, Runner]]:
    """Yield a fleet and a runner; at the end, nothing may have failed inside."""
    with capture_logs() as logs:
        async with open_fleet(settings, sigstore) as fleet:
            yield fleet, await fleet.sign_on()
    assert [line for line in logs if line["log_level"] in ("error", "critical")] == []
    assert [line for line in logs if line.get("status", 0) == 500] == []


def token_for(runner: Runner, path: str) -> str:
    """The header by which an address lets us in."""
    token = runner.fleet.admin_token if path.startswith("/api/admin") else runner.token
    return f"Authorization: Bearer {token}"


async def send(runner: Runner, path: str, body: bytes, *headers: str) -> httpx.Response:
    """POST a body as it is, with a good token; JSON unless a header says otherwise."""
    typed = () if any(each.startswith("Content-Type") for each in headers) else (JSON_TYPE,)
    length = f"Content-Length: {len(body)}"
    start = head("POST", path, token_for(runner, path), length, *typed, *headers)
    answer = await exchange(runner.fleet.url, start + body)
    assert answer is not None
    return answer


def assert_ours(answer: Any) -> None:
    """An answer has our headers, and a refusal is a whole problem document."""
    for name, value in HEADERS.items():
        assert answer.headers[name] == value, name
    assert "Server" not in answer.headers
    assert "Etag" not in answer.headers
    assert answer.headers["X-Request-Id"]
    if answer.status_code >= 400:
        assert answer.headers["Content-Type"] == "application/problem+json"
        document = answer.json()
        assert document["status"] == answer.status_code
        assert document["request_id"] == answer.headers["X-Request-Id"]
        assert document["type"] == f"{AUDIENCE}{ERRORS_PATH}#{document['code']}"
        assert {"title", "detail", "retryable", "server_time"} <= document.keys()
        assert answer.status_code not in (429, 503) or int(answer.headers["Retry-After"]) > 0


# Framing


@pytest.mark.gen_test
async def test_a_body_beyond_the_cap_is_413_announced_or_chunked(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        for path in ("/api/queue/claim", "/api/runners/register", "/api/admin/runner-keys"):
            cap = 1024 * KIB if "admin" in path else 8 * KIB
            padding = b" " * (cap + 1)
            at_cap = await send(runner, path, b"{" + b" " * (cap - 2) + b"}")
            assert at_cap.status_code in (204, 422), at_cap.text
            assert code_of(await send(runner, path, padding)) == (413, "too_large")
            assert code_of(await chunked(runner, path, padding)) == (413, "too_large")
            for length in (10**8, 2**63, 10**40):
                start = head("POST", path, token_for(runner, path), JSON_TYPE,
                             f"Content-Length: {length}")  # fmt: skip
                answer = await exchange(fleet.url, start)
                assert answer is not None
                assert code_of(answer) == (413, "too_large"), length
                assert answer.headers["Connection"] == "close", length
                assert_ours(answer)


async def chunked(runner: Runner, path: str, body: bytes) -> httpx.Response:
    """POST a body without an announced length."""
    start = head("POST", path, token_for(runner, path), JSON_TYPE, "Transfer-Encoding: chunked")
    answer = await exchange(
        runner.fleet.url, start + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    )
    assert answer is not None
    return answer


@pytest.mark.gen_test
async def test_a_post_without_a_body_is_told_so(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        for path in POSTS:
            assert code_of(await send(runner, path, b"")) == (400, "empty_body"), path
            none = await exchange(fleet.url, head("POST", path, token_for(runner, path), JSON_TYPE))
            assert none is not None
            assert code_of(none) == (400, "empty_body"), path
            assert_ours(none)


@pytest.mark.gen_test
async def test_what_is_no_request_gets_a_bare_400_and_the_line_is_cut(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    both = ("Content-Length: 2", "Transfer-Encoding: chunked")
    async with guarded(make_settings(), sigstore) as (fleet, _):
        for request in (
            b"HELLO\r\n\r\n",
            b"GET /healthz\r\n\r\n",
            b"GET /healthz HTTP/9.9\r\n\r\n",
            b"GET  /healthz HTTP/1.1\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost queue\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
            head("POST", "/api/runners/register", JSON_TYPE, *both) + b"0\r\n\r\n",
            head("POST", "/api/runners/register", JSON_TYPE, "Transfer-Encoding: gzip"),
            head("POST", "/api/runners/register", JSON_TYPE, both[1]) + b"zz\r\n{}\r\n0\r\n\r\n",
        ):
            answer = await exchange(fleet.url, request)
            assert answer is not None, request
            assert answer.status_code == 400, request
        assert (await fleet.http.get("/healthz")).status_code == 200


UNCLEAR = (
    *((f"Content-Length: {length}",)
      for length in ("abc", "-1", "+2", "", "0x2", "2 2", "1_0", "\xb2", "2, 2", "2, 3", "2;")),
    ("Content-Length: 2", "Content-Length: 2"),
    ("Content-Length: 2", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: gzip",),
    ("Transfer-Encoding: chunked, chunked",),
    ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
)  # fmt: skip


@pytest.mark.gen_test
async def test_a_request_of_unclear_length_is_400_and_nothing_behind_it_is_read(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        app = make_app(fleet.services)
        requests = [(at, path, ("Content-Length: abc",)) for at, path in served(app)]
        requests += [("POST", "/api/queue/claim", framing) for framing in UNCLEAR]
        for method, pattern, framing in requests:
            path = pattern.format_map(FILLED)
            start = head(method, path, token_for(runner, path), JSON_TYPE, *framing)
            async with line_to(fleet.url) as line:
                await line.send(start + b"{}" + head("GET", "/healthz"))
                answer = await line.answer(method)
                assert answer is not None, (method, path)
                assert answer.status_code == 400, (method, path)
                assert answer.headers["Connection"] == "close"
                if method != "HEAD":
                    assert_ours(answer)
                    assert answer.json()["code"] == "malformed_request"
                assert await line.answer() is None, (method, path)
        assert (await fleet.http.get("/healthz")).status_code == 200


# The query


@pytest.mark.gen_test
async def test_every_address_refuses_a_parameter_that_it_does_not_know(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """Before its body is read, and nothing is carried out: `?dryrun=1` was not asked in vain."""
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        queued = json.dumps({"runs": [run_of()]}).encode()
        tables = ("run_queue", "runner_keys", "admin_tokens", "runners",
                  "audit WHERE actor <> 'system'")  # fmt: skip
        count = " + ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        before = await fleet.pool.fetchval(f"SELECT {count}")
        known = 0
        for method, path in served(make_app(fleet.services)):
            at, length = path.format_map(FILLED), f"Content-Length: {len(queued)}"
            for query, name in (("?dryrun=1", "dryrun"), ("?dryrun", "dryrun"), ("?=1", "")):
                start = head(method, at + query, token_for(runner, at), JSON_TYPE, length)
                async with line_to(fleet.url) as line:
                    await line.send(start + queued)
                    answer = await line.answer(method)
                assert answer is not None, (method, path)
                assert answer.status_code == 422, (method, path)
                if method == "HEAD":
                    continue
                told = answer.json()
                assert [error["pointer"] for error in told["errors"]] == [f"/{name}"]
                detail = told["errors"][0]["detail"]
                assert detail.startswith("is unknown: this address takes "), (method, path)
                known += not detail.endswith("takes none")
        assert known == 3 * (len(TAKING) + 1)  # a POST to the queue takes dry_run
        assert await fleet.pool.fetchval(f"SELECT {count}") == before


# What takes parameters, and which; docs/api.md and docs/runners.md name the same.
TAKING = {
    "/api/admin/queue": {
        "status",
        "model",
        "runner",
        "batch",
        "from",
        "before",
        "text",
        "id",
        "order",
        "cursor",
        "limit",
    },
    "/api/admin/refusals": {"run_id", "runner_id", "cursor", "limit"},
    "/api/admin/runners": {"cursor", "limit"},
    "/api/admin/results": {"state", "runner_id", "key", "trust", "since", "cursor", "limit"},
    "/api/admin/results/{run_id}/rows": {"cursor", "limit"},
    "/api/admin/audit": {"actor", "action", "run_id", "runner_id", "cursor", "limit"},
    "/api/admin/audit/chain": {"after", "cursor", "limit"},
    "/api/queue/{run_id}/submit": {"validate_only"},
}


@pytest.mark.gen_test
async def test_each_address_says_which_parameters_it_takes(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        for path, names in TAKING.items():
            at = path.format_map(FILLED)
            method = "POST" if at.endswith("/submit") else "GET"
            start = head(method, f"{at}?x=1", token_for(runner, at), JSON_TYPE)
            answer = await exchange(fleet.url, start)
            assert answer is not None
            _, _, told = answer.json()["errors"][0]["detail"].partition("takes ")
            assert set(told.split(", ")) == names, path


@pytest.mark.gen_test
async def test_an_idempotency_key_that_is_sent_twice_is_refused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """Joined with a comma they would be a key that nobody has chosen."""
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        await fleet.enqueue()
        before = await fleet.pool.fetchval("SELECT count(*) FROM run_queue")
        bodies = {"/api/queue/claim": b"{}",
                  "/api/admin/queue": json.dumps({"runs": [run_of()]}).encode()}  # fmt: skip
        for path, body in bodies.items():
            for second in ("a", "b"):
                keys = ("Idempotency-Key: a", f"Idempotency-Key: {second}")
                answer = await send(runner, path, body, *keys)
                assert code_of(answer) == (422, "invalid_request"), path
                assert "sent once" in answer.json()["detail"]
        assert await fleet.pool.fetchval("SELECT count(*) FROM run_queue") == before
        assert not (await runner.claim()).json()["attempt"] > 1, "nothing had been claimed"


@pytest.mark.gen_test
async def test_headers_beyond_16_kib_cut_the_line(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (fleet, _):
        assert await exchange(fleet.url, head("GET", "/healthz", f"X: {'x' * 17 * KIB}")) is None
        below = await exchange(fleet.url, head("GET", "/healthz", f"X: {'x' * 15 * KIB}"))
        assert below is not None
        assert below.status_code == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"POST /api/queue/cl", None), (b"", None), (b"{", 408)],
    ids=["half a header", "nothing more", "half a body"],
)
@pytest.mark.gen_test
async def test_a_client_that_falls_silent_is_hung_up_on_and_told_if_it_can_be(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    sent: bytes,
    status: int | None,
) -> None:
    for name in ("WINDOW_S", "HEAD_S", "IDLE_S", "PATROL_S"):
        monkeypatch.setattr(connections, name, 0.05)
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        path = "/api/queue/claim"
        whole = head("POST", path, token_for(runner, path), JSON_TYPE, "Content-Length: 10")
        async with line_to(fleet.url) as line:
            await line.send(whole + sent if status else sent)
            answer = await line.answer()
            assert (answer and answer.status_code) == status
            assert await line.answer() is None
        await fleet.services.in_flight.wait_idle()


@pytest.mark.gen_test
async def test_a_refusal_that_needs_no_body_arrives_although_the_client_still_sends(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (fleet, _):
        body = b" " * 8 * KIB
        length = f"Content-Length: {len(body)}"
        for path in RUNNER_ROUTES:
            async with line_to(fleet.url) as line:
                await line.send(head("POST", path, JSON_TYPE, length))
                await turns(line, body)
                answer = await line.answer()
                assert answer is not None
                assert code_of(answer) == (401, "missing_token")
                # And the connection is as good as before.
                await line.send(head("GET", "/healthz"))
                healthy = await line.answer()
                assert healthy is not None
                assert healthy.status_code == 200


async def turns(line: Line, body: bytes) -> None:
    """Send a body in pieces, letting the server act between them."""
    for start in range(0, len(body), KIB):
        await asyncio.sleep(0.001)
        await line.send(body[start : start + KIB])


@pytest.mark.gen_test
async def test_a_client_that_asks_before_it_sends_is_refused_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        path, asks = "/api/queue/claim", ("Expect: 100-continue", "Content-Length: 2", JSON_TYPE)
        refused = await exchange(fleet.url, head("POST", path, *asks))
        assert refused is not None
        assert code_of(refused) == (401, "missing_token")
        async with line_to(fleet.url) as line:
            await line.send(head("POST", path, token_for(runner, path), *asks))
            go_on = await line.answer()
            assert go_on is not None
            assert go_on.status_code == 100
            await line.send(b"{}")
            answer = await line.answer()
            assert answer is not None
            assert answer.status_code == 204


# Method, path


@pytest.mark.gen_test
async def test_a_method_that_an_address_does_not_take_is_405_with_those_it_takes(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    takes = {
        "/healthz": "GET, HEAD, OPTIONS",
        "/readyz": "GET, HEAD, OPTIONS",
        "/api/runners/register": "POST",
        "/api/runners/me": "GET, DELETE",
        **dict.fromkeys(RUNNER_ROUTES, "POST"),
        f"/api/queue/{RUN}": "GET",
        f"/api/queue/{RUN}/submit": "POST",
        "/api/admin/runner-keys": "GET, POST",
        f"/api/admin/runner-keys/{'0' * 64}": "GET, DELETE",
        "/api/admin/queue": "GET, POST",
        f"/api/admin/queue/{RUN}": "GET, PATCH",
        f"/api/admin/queue/{RUN}/cancel": "POST",
    }
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "post", "BREW")
    async with guarded(make_settings(), sigstore) as (fleet, _):
        for path, allowed in takes.items():
            for method in methods:
                if method in allowed.split(", "):
                    continue
                # A HEAD's answer announces a body that does not come.
                if method == "HEAD":
                    answer: Any = await fleet.http.head(path)
                else:
                    answer = await exchange(fleet.url, head(method, path))
                assert answer is not None, (method, path)
                assert answer.status_code == 405, (method, path)
                given = answer.headers["Allow"].split(", ")
                assert sorted(given) == sorted(allowed.split(", ")), (method, path)
                if method != "HEAD":
                    assert code_of(answer) == (405, "method_not_allowed")
                    assert_ours(answer)


@pytest.mark.gen_test
async def test_a_path_that_is_not_ours_is_404_whatever_the_method(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    known = str(uuid.uuid4())
    odd = (
        f"{{{known}}}", f"urn:uuid:{known}", known.upper().replace("0", "A"),
        known.replace("-", ""),
        "%EF%BC%91" + known[1:], known + "%0a", known + "%00", known + "/", "..%2f..%2fetc",
        "..", "%2e%2e", "null", "-1", "' OR 1=1--".replace(" ", "%20"), "a" * 4000, "%ff", "%",
    )  # fmt: skip
    paths = [f"/api/queue/{each}/heartbeat" for each in odd]
    paths += [f"/api/admin/queue/{each}" for each in odd if each != known]
    paths += ["/", "//", "/api", "/api/", "/api/queue", "/API/queue/claim", "/api/queue/claim/",
              "/../etc/passwd", "/healthz/", "/healthz%00", "/static/x", "/favicon.ico", "*",
              "http://evil.test/nothing", "/api//queue/claim", "/api/queue/claim;x=1"]  # fmt: skip
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        for path in paths:
            for method in ("GET", "POST", "BREW"):
                token = token_for(runner, path)
                answer = await exchange(fleet.url, head(method, path, token, JSON_TYPE))
                assert answer is not None, path
                assert code_of(answer) == (404, "not_found"), (method, path)
                assert "Allow" not in answer.headers
                assert_ours(answer)
        unknown = await runner.heartbeat({"run_id": known, "lease_id": known})
        assert code_of(unknown) == (404, "not_found")


# Media type


@pytest.mark.gen_test
async def test_a_body_that_is_not_json_in_utf_8_by_its_type_is_415(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    bad = (
        "Content-Type: text/plain", "Content-Type: ", "Content-Type: application/problem+json",
        "Content-Type: application/jsonp", "Content-Type: application/json; charset=latin-1",
        "Content-Type: application/x-www-form-urlencoded", "Content-Type: application/json, a/b",
        "Content-Type: application/json; charset=utf-16",
        "Content-Type: multipart/form-data; boundary=x",
    )  # fmt: skip
    good = ("application/json", "APPLICATION/JSON", "application/json; charset=UTF-8",
            'application/json;charset="utf-8"')  # fmt: skip
    async with guarded(make_settings(), sigstore) as (_, runner):
        for path, typed in itertools.product(POSTS, bad):
            answer = await send(runner, path, b"{}", typed)
            assert code_of(answer) == (415, "unsupported_media_type"), (path, typed)
        for path in POSTS:
            packed = await send(runner, path, b"{}", "Content-Encoding: gzip")
            assert code_of(packed) == (415, "unsupported_media_type"), path
        for typed in good:
            answer = await send(runner, "/api/queue/claim", b"{}", f"Content-Type: {typed}")
            assert answer.status_code == 204, typed


# JSON


NOT_JSON = {
    "nothing but blanks": b"  \n",
    "half an object": b'{"a": ',
    "trailing text": b"{} x",
    "two values": b"{}{}",
    "a comment": b"{/* */}",
    "a trailing comma": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-16 without a mark": '{"a": 1}'.encode("utf-16-le"),
    "UTF-32": '{"a": 1}'.encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "an overlong form": b'{"a": "\xc0\xaf"}',
    "a raw surrogate": b'{"a": "\xed\xa0\x80"}',
    "Latin-1": b'{"a": "\xe9"}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a number beyond a double": b'{"a": 1e999}',
    "an integer of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a raw control character": b'{"a": "\x00"}',
    "a raw newline in a text": b'{"a": "\n"}',
    "a leading zero": b'{"a": 01}',
    "2,000 brackets": b"[" * 2000,
    "2,000 brackets, closed": b"[" * 2000 + b"]" * 2000,
    "nested 65 deep": b'{"a":' * 65 + b"1" + b"}" * 65,
}
TWICE = {
    "at the top": b'{"a": 1, "a": 1}',
    "below": b'{"a": {"b": [{"c": 1, "c": 2}]}}',
    "in two spellings": b'{"a": 1, "\\u0061": 1}',
}


def placed(answer: httpx.Response) -> bool:
    """Whether a refusal says where: by pointers, by line and column, or of the whole text."""
    told = answer.json()
    if "not a JSON number" in told["detail"] or re.search("too large|digits", told["detail"]):
        return [error["pointer"] for error in told["errors"]] == ["/a"]
    return bool(re.search(r"line \d+, column \d+|at byte|begins with|deeper than", told["detail"]))


@pytest.mark.gen_test
async def test_a_text_that_is_not_strict_json_is_400(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (_, runner):
        for path in ("/api/queue/claim", "/api/admin/queue", "/api/runners/register"):
            for name, text in NOT_JSON.items():
                answer = await send(runner, path, text)
                assert code_of(answer) == (400, "invalid_json"), (path, name)
                assert placed(answer), (path, name)
            for name, text in TWICE.items():
                answer = await send(runner, path, text)
                assert code_of(answer) == (400, "duplicate_key"), (path, name)
                assert answer.json()["errors"], (path, name)
        deep = await send(runner, "/api/admin/queue", b"[" * 100_000)
        assert code_of(deep) == (400, "invalid_json")


@pytest.mark.gen_test
async def test_a_value_that_does_not_fit_is_422_with_a_pointer_and_is_not_echoed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    beat, fail = f"/api/queue/{RUN}/heartbeat", f"/api/queue/{RUN}/fail"
    claim, lease = "/api/queue/claim", {"lease_id": RUN}
    values: list[tuple[str, str, Any]] = [
        (path, "", top) for path in POSTS for top in ([], "text", 7, None, True)
    ]
    values += [
        (claim, "/colour", {"colour": "EVIL"}),
        (claim, "/a~1b~0c", {"a/b~c": "EVIL"}),
        (claim, "/wait_s", {"wait_s": "EVIL"}),
        (claim, "/wait_s", {"wait_s": True}),
        (claim, "/wait_s", {"wait_s": 24.5}),
        (claim, "/wait_s", {"wait_s": -1}),
        (claim, "/wait_s", {"wait_s": 51}),
        (claim, "/wait_s", {"wait_s": 10**300}),
        (claim, "/explain", {"explain": "EVIL"}),
        (claim, "/capabilities/vram_gb", {"capabilities": {"vram_gb": "24",
                                                           "quantizations": ["q8_0"]}}),
        (claim, "/capabilities/quantizations/0", {"capabilities": {
            "vram_gb": 24, "quantizations": ["EVIL\n"]}}),
        (beat, "/lease_id", {"lease_id": "EVIL"}),
        (beat, "/lease_id", {"lease_id": RUN + "\n"}),
        (beat, "/progress/note", {**lease, "progress": {"note": "EVIL" * 51}}),
        (beat, "/progress/note", {**lease, "progress": {"note": "EVIL\u0000"}}),
        (beat, "/progress/note", {**lease, "progress": {"note": json.loads('"EVIL\\ud800"')}}),
        (fail, "/failure_code", {**lease, "failure_code": "EVIL", "detail": ""}),
        (fail, "/failure_code", {**lease, "failure_code": "refusal", "detail": ""}),
        (fail, "/detail", {**lease, "failure_code": "oom", "detail": "EVIL" * 251}),
        (fail, "/retry_after_s", {**lease, "failure_code": "oom", "detail": "",
                                  "retry_after_s": 2**63}),
    ]  # fmt: skip
    async with guarded(make_settings(), sigstore) as (_, runner):
        for path, pointer, value in values:
            answer = await send(runner, path, json.dumps(value).encode())
            assert code_of(answer) == (422, "invalid_request"), (path, value, answer.text)
            assert pointer in [error["pointer"] for error in answer.json()["errors"]], value
            assert "EVIL" not in answer.text, value
            assert_ours(answer)


# Headers


@pytest.mark.gen_test
async def test_a_sane_request_id_is_echoed_and_any_other_replaced(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (fleet, _):
        for path in ("/healthz", "/nothing", "/api/queue/claim"):
            sane = await exchange(fleet.url, head("GET", path, "X-Request-Id: trace-1.A_b"))
            assert sane is not None
            assert sane.headers["X-Request-Id"] == "trace-1.A_b"
            assert_ours(sane)
            for odd in ("", "a b", "<script>", "x" * 129, "caf\u00e9", "a;b", "a\tb"):
                answer = await exchange(fleet.url, head("GET", path, f"X-Request-Id: {odd}"))
                assert answer is not None
                assert str(uuid.UUID(answer.headers["X-Request-Id"])), odd
                assert_ours(answer)


@pytest.mark.gen_test
async def test_no_condition_empties_an_answer_and_no_origin_is_let_in(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with guarded(make_settings(), sigstore) as (fleet, _):
        for header in ("If-None-Match: *", "Range: bytes=0-1", "Origin: https://evil.test",
                       "If-Modified-Since: Mon, 23 Nov 2099 14:00:00 GMT"):  # fmt: skip
            answer = await exchange(fleet.url, head("GET", "/healthz", header))
            assert answer is not None
            assert (answer.status_code, answer.json()["status"]) == (200, "ok"), header
            assert not [name for name in answer.headers if name.startswith("access-control")]
            assert "Set-Cookie" not in answer.headers
            assert_ours(answer)


# Everything at once


SEED = 20261123  # any other draws other requests; this one is the same on every machine
WORDS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 24.0, 24.5, 2**31, 2**63, 2**64, 10**300, -0.0, 1e308, 5e-324, "",
    "24", "q8_0", "text", "\u0000", "\u202e", "a\n", "x" * 300, RUN, RUN.upper(), "2026-02-30", [],
    "2026-12-31T23:59:60Z", "0000-01-01T00:00:00Z", {}, [[]], [{}], "../../etc/passwd", "oom",
)  # fmt: skip
NAMES = (
    "lease_id", "progress", "done", "total", "note", "reason", "failure_code", "detail", "wait_s",
    "retry_after_s", "capabilities", "vram_gb", "quantizations", "explain", "heartbeats", "run_id",
    "runs", "model", "tasks", "prompts", "config", "public_key", "runner_id", "signer", "identity",
    "not_before", "registration", "sig", "signed_at", "nonce", "x", "a/b", "\u00e9", "gpus", "id",
)  # fmt: skip
PATHS = (
    *POSTS, f"/api/queue/{RUN}/submit", f"/api/queue/{RUN}", "/api/runners/me", "/healthz",
    f"/api/admin/queue/{RUN}", f"/api/admin/runner-keys/{'0' * 64}", "/api/admin/queue?limit=3",
    "/api/admin/queue?cursor=MTox", f"/api/queue/{RUN}/submit?validate_only=1", "/nowhere",
)  # fmt: skip


def some_value(dice: random.Random, depth: int) -> Any:
    """Draw a JSON value of names and values that schemas have words about."""
    kind = dice.random()
    if depth == 0 or kind < 0.4:
        return dice.choice(WORDS)
    if kind < 0.8:
        names = dice.sample(NAMES, dice.randint(0, 5))
        return {name: some_value(dice, depth - 1) for name in names}
    return [some_value(dice, depth - 1) for _ in range(dice.randint(0, 3))]


def some_body(dice: random.Random) -> bytes:
    """Draw a body: mostly JSON, sometimes cut, flipped or of no language."""
    text = json.dumps(some_value(dice, 4)).encode()
    kind = dice.random()
    if kind < 0.1:
        return text[: dice.randrange(len(text) + 1)]
    if kind < 0.2:
        at = dice.randrange(len(text))
        return text[:at] + dice.randbytes(1) + text[at + 1 :]
    return dice.randbytes(dice.randint(0, 50)) if kind < 0.25 else text


def some_request(dice: random.Random, runner: Runner) -> tuple[str, bytes]:
    """Draw a request; return what it is, and its bytes."""
    path = dice.choice(PATHS)
    method = dice.choice(("POST",) * 7 + ("GET", "DELETE", "PUT", "PATCH", "OPTIONS", "BREW"))
    body = some_body(dice)
    tokens = (token_for(runner, path),) * 8 + (f"Authorization: Bearer {runner.token}", "X: y")
    types = (JSON_TYPE,) * 8 + ("Content-Type: text/plain", "X: y")
    if "/submit" in path:
        types += ("Content-Type: multipart/form-data; boundary=x",) * 12
    headers = (dice.choice(tokens), dice.choice(types), f"Idempotency-Key: {dice.random()}")
    length = f"Content-Length: {len(body)}"
    return f"{method} {path} {headers[1]} {body!r}", head(method, path, *headers, length) + body


@pytest.mark.gen_test
async def test_five_hundred_drawn_requests_get_an_answer_of_the_contract(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    print(f"seed {SEED}")  # noqa: T201 (pytest shows it when this fails)
    dice = random.Random(SEED)  # noqa: S311 (no secret)
    contract = {200, 201, 202, 204} | (set(STATUS.values()) - {500})
    async with guarded(make_settings(), sigstore) as (fleet, runner):
        async with AsyncExitStack() as lines:
            line = await lines.enter_async_context(line_to(fleet.url))
            for _ in range(500):
                told, request = some_request(dice, runner)
                await line.send(request)
                answer = await line.answer()
                assert answer is not None, told
                assert answer.status_code in contract, (told, answer.text)
                assert_ours(answer)
                if answer.headers.get("Connection") == "close":
                    line = await lines.enter_async_context(line_to(fleet.url))
        assert (await fleet.http.get("/healthz")).status_code == 200
