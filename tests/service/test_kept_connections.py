"""A connection outlives a refusal, or the answer says that it does not: on every route."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack

import pytest

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import make_app
from tests.support.fleet import Fleet, Runner, open_fleet
from tests.support.raw_http import Line, head, line_to
from tests.support.routes import METHODS, addresses

MakeSettings = Callable[..., Settings]
JSON_TYPE = "Content-Type: application/json"
CREDENTIALS = ("none", "runner", "admin")
# How a request ends: without a body, with an empty one, with a small one, and with one too large.
BODIES: dict[str, tuple[tuple[str, ...], bytes]] = {
    "no body": ((), b""),
    "no type": (("Content-Length: 0",), b""),
    "an empty one": (("Content-Length: 0", JSON_TYPE), b""),
    "no chunk": (("Transfer-Encoding: chunked", JSON_TYPE), b"0\r\n\r\n"),
    "half a body": (("Content-Length: 1", JSON_TYPE), b"{"),
    "asks before it sends": (("Expect: 100-continue", "Content-Length: 2", JSON_TYPE), b""),
    "a length beyond all": (("Content-Length: 99999999999", JSON_TYPE), b""),
}
# Those that leave nothing unread: the connection is as good as before.
WHOLE = ("no body", "no type", "an empty one", "no chunk", "half a body")


def refusals(fleet: Fleet, runner: Runner) -> Iterator[tuple[str, str, str, str, bytes]]:
    """Every route and some unknown paths, by method, credential and body."""
    paths = addresses(make_app(fleet.services))
    tokens = {
        "none": (),
        "runner": (f"Authorization: Bearer {runner.token}",),
        "admin": (f"Authorization: Bearer {fleet.admin_token}",),
    }
    drawn = itertools.product(
        [*paths, "/nowhere", "/api/queue/x/heartbeat"], [*METHODS, "BREW"], CREDENTIALS, BODIES
    )
    for path, method, credential, body in drawn:
        headers, content = BODIES[body]
        yield (
            path, method, credential, body,
            head(method, path, *tokens[credential], *headers) + content,
        )  # fmt: skip


async def next_is_served(line: Line) -> bool:
    """Send one more request on the same connection; return whether it is answered."""
    await line.send(head("GET", "/healthz"))
    answer = await line.answer()
    return answer is not None and answer.status_code == 200


@pytest.mark.gen_test(timeout=120)
async def test_a_connection_outlives_each_answer_or_is_told_to_be_over(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet, AsyncExitStack() as lines:
        runner = await fleet.sign_on()
        for told in refusals(fleet, runner):
            path, method, credential, body, request = told
            if (path, method, credential) == ("/api/runners/me", "DELETE", "runner"):
                continue  # it would end the token that the others are sent with
            line = await lines.enter_async_context(line_to(fleet.url))
            await line.send(request)
            answer = await line.answer(method)
            assert answer is not None, told[:4]
            if answer.status_code == 100:
                continue  # it was let in: no refusal
            closes = answer.headers.get("Connection", "") == "close"
            assert closes or await next_is_served(line), told[:4]
            if body in WHOLE and method != "BREW":
                assert not closes, told[:4]
            await lines.aclose()
