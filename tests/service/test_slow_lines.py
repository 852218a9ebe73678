"""Slow lines: what moves is waited for however long it takes, what stands still gets its answer."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from config.settings import Settings
from handlers import connections
from handlers.connections import HEAD_S, IDLE_S, WINDOW_S
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import make_app
from tests.service.test_uploads import parts_of, submit_head
from tests.support.fleet import Fleet, Runner, code_of, open_fleet
from tests.support.raw_http import Line, form, head, line_to
from tests.support.routes import FILLED, served

MakeSettings = Callable[..., Settings]
JSON_TYPE = "Content-Type: application/json"


@asynccontextmanager
async def unpatrolled(
    settings: Settings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Fleet, Runner]]:
    """Yield a fleet whose connections only the test looks at, by a clock of its own."""
    monkeypatch.setattr(connections, "PATROL_S", 10_000)
    async with open_fleet(settings, sigstore) as fleet:
        yield fleet, await fleet.sign_on()


def server_of(fleet: Fleet) -> connections.Server:
    """The server of a fleet in this process."""
    assert fleet.server is not None
    return fleet.server


async def until(true: Callable[[], object]) -> None:
    """Wait for what gives no signal."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def arrived(fleet: Fleet, size: int) -> None:
    """Wait until one connection of the server has received so many bytes, and waits for more."""
    await until(
        lambda: any(
            stream.received == size and stream.reading() for stream in server_of(fleet).streams
        )
    )


def posts(fleet: Fleet, runner: Runner) -> dict[str, str]:
    """Every address that takes JSON, and a credential that it takes."""
    admin = f"Authorization: Bearer {fleet.admin_token}"
    return {
        path.format_map(FILLED): admin
        if "/admin/" in path
        else f"Authorization: Bearer {runner.token}"
        for method, path in served(make_app(fleet.services))
        if method == "POST" and not path.endswith("/submit")
    }


@pytest.mark.gen_test
async def test_a_body_that_stands_still_is_answered_and_logged_on_every_address(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with unpatrolled(make_settings(), sigstore, monkeypatch) as (fleet, runner):
        for path, token in posts(fleet, runner).items():
            for framing in ("Content-Length: 100", "Transfer-Encoding: chunked"):
                start = head("POST", path, token, JSON_TYPE, framing)
                async with line_to(fleet.url) as line:
                    with capture_logs() as logs:
                        await line.send(start)
                        await arrived(fleet, len(start))
                        server_of(fleet).look(0)
                        await line.send(b"5\r\n{")
                        await arrived(fleet, len(start) + 4)
                        server_of(fleet).look(WINDOW_S)
                        answer = await line.answer()
                    assert answer is not None, path
                    assert code_of(answer) == (408, "request_timeout"), (path, answer.text)
                    assert answer.headers["Connection"] == "close"
                    assert await line.answer() is None
                told = [log for log in logs if log.get("status") == 408]
                assert [log["status"] for log in told] == [408], path
                assert [log["part"] for log in logs if log["event"] == "http.stalled"] == ["body"]
        await fleet.services.in_flight.wait_idle()


@pytest.mark.gen_test
async def test_a_refusal_of_a_body_that_stands_still_is_the_refusal(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with unpatrolled(make_settings(), sigstore, monkeypatch) as (fleet, runner):
        token = f"Authorization: Bearer {runner.token}"
        start = head("POST", "/api/queue/claim", JSON_TYPE, "Content-Length: 100000")
        chunked = head("POST", "/api/queue/claim", token, JSON_TYPE, "Transfer-Encoding: chunked")
        piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
        for begin, rest, wanted in (
            (start, b" " * 20_000, (401, "missing_token")),
            (chunked, piece, (413, "too_large")),
        ):
            async with line_to(fleet.url) as line:
                await line.send(begin)
                await arrived(fleet, len(begin))
                server_of(fleet).look(0)
                # It moves, but for nothing: nobody waits longer for what is refused anyway.
                await line.send(rest)
                await arrived(fleet, len(begin + rest))
                server_of(fleet).look(WINDOW_S)
                answer = await line.answer()
                assert answer is not None
                assert code_of(answer) == wanted


@pytest.mark.gen_test
async def test_an_upload_that_moves_is_taken_however_long_it_takes(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with unpatrolled(make_settings(), sigstore, monkeypatch) as (fleet, runner):
        await fleet.enqueue()
        job = await runner.take()
        body = form(*parts_of(runner, job))
        floor = len(body) // 6
        monkeypatch.setattr(connections, "FLOOR_BYTES", floor)
        start = submit_head(runner, job, f"Content-Length: {len(body)}")
        async with line_to(fleet.url) as line:
            await line.send(start)
            sent, now = len(start), 0.0
            for at in range(0, len(body), floor):
                await arrived(fleet, sent)
                server_of(fleet).look(now)
                now += WINDOW_S
                piece = body[at : at + floor]
                await line.send(piece)
                sent += len(piece)
            answer = await line.answer()
        assert now > 5 * WINDOW_S
        assert answer is not None
        assert answer.status_code == 201, answer.text


@pytest.mark.gen_test
async def test_an_upload_that_stands_still_frees_its_place(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(uploads_max=1)
    async with unpatrolled(settings, sigstore, monkeypatch) as (fleet, runner):
        await fleet.enqueue()
        job = await runner.take()
        start = submit_head(runner, job, "Content-Length: 100000")
        async with line_to(fleet.url) as line:
            await line.send(start)
            await until(lambda: not fleet.services.submissions.uploads_free)
            server_of(fleet).look(0)
            server_of(fleet).look(WINDOW_S)
            answer = await line.answer()
            assert answer is not None
            assert code_of(answer) == (408, "request_timeout")
        assert fleet.services.submissions.uploads_free == 1
        assert (await runner.submit(job)).status_code == 201


@pytest.mark.parametrize(
    ("sent", "patient_s"), [(b"POST /api/queue/cl", HEAD_S), (b"", IDLE_S)]
)  # fmt: skip
@pytest.mark.gen_test
async def test_a_head_that_does_not_come_ends_the_connection(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch,
    sent: bytes, patient_s: float,
) -> None:  # fmt: skip
    async with unpatrolled(make_settings(), sigstore, monkeypatch) as (fleet, _):
        before = server_of(fleet).streams
        async with line_to(fleet.url) as line:
            # A first request: the time of the second one's head begins with its own first byte.
            await line.send(head("GET", "/healthz"))
            assert await line.answer() is not None
            await line.send(sent)
            [stream] = server_of(fleet).streams - before
            await arrived(fleet, len(head("GET", "/healthz") + sent))
            for at, is_open in ((0, True), (patient_s - 1, True), (patient_s, False)):
                server_of(fleet).look(at)
                assert stream.closed() is not is_open, at
            assert await line.answer() is None


@pytest.mark.gen_test
async def test_a_request_that_waits_for_its_answer_is_waited_for(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with unpatrolled(make_settings(), sigstore, monkeypatch) as (fleet, runner):
        claim = asyncio.create_task(runner.claim(wait_s=20))
        await until(lambda: len(fleet.services.claims.parked))
        for now in range(0, 10 * int(IDLE_S), 10):
            server_of(fleet).look(now)
        await fleet.enqueue()
        assert (await claim).status_code == 200


@pytest.mark.gen_test
async def test_an_answer_that_nobody_reads_is_given_up_and_told(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with unpatrolled(make_settings(), sigstore, monkeypatch) as (fleet, _):
        run_id = await fleet.enqueue(config={"run": {"seed": 7}, "padding": "x" * 8_000_000})
        url = urlsplit(fleet.url)
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((url.hostname, url.port))
        admin = f"Authorization: Bearer {fleet.admin_token}"
        with reader, capture_logs() as logs:
            reader.sendall(head("GET", f"/api/admin/queue/{run_id}", admin))
            await until(lambda: any(stream.writing() for stream in server_of(fleet).streams))
            [stream] = [stream for stream in server_of(fleet).streams if stream.writing()]
            server_of(fleet).look(0)
            assert not stream.closed()
            server_of(fleet).look(WINDOW_S)
            assert stream.closed()
        assert [log["part"] for log in logs if log["event"] == "http.stalled"] == ["answer"]
        await fleet.services.in_flight.wait_idle()


@pytest.mark.gen_test
async def test_a_refusal_reaches_a_client_that_sends_megabytes_after_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LINGERING_MAX", 1)
    async with open_fleet(make_settings(), sigstore) as fleet, AsyncExitStack() as lines:
        size = 8 * 1024 * 1024
        for _ in range(3):  # none of them hangs up
            line = await lines.enter_async_context(line_to(fleet.url))
            await line.send(head("POST", "/api/queue/claim", f"Content-Length: {size}"))
            await pieces(line, size)
            answer = await line.answer()
            assert answer is not None
            assert code_of(answer) == (401, "missing_token")


async def pieces(line: Line, size: int) -> None:
    """Send a body, letting the server act in between."""
    for _ in range(size // (256 * 1024)):
        await line.send(b" " * 256 * 1024)
        await asyncio.sleep(0)


@pytest.mark.gen_test
async def test_the_patrols_clock_stands_still_while_the_process_does(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: asyncio.Queue[float] = asyncio.Queue()
    clock = iter(range(0, 10**9, 1000))

    class Suspended:
        monotonic = staticmethod(lambda: next(clock))

    monkeypatch.setattr(connections, "PATROL_S", 0.001)
    monkeypatch.setattr(connections, "time", Suspended)
    monkeypatch.setattr(connections.Server, "look", lambda self, now: looks.put_nowait(now))
    async with open_fleet(make_settings(), sigstore):
        seen: list[Any] = [await looks.get() for _ in range(3)]
    assert seen[2] - seen[0] <= 4 * 0.001 + 1e-9
