"""An HTTP server in a thread that plays the admin API, and the command line run against it."""

import asyncio
import json
import queue
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import tornado.httpserver
import tornado.testing
import tornado.web

from cli.main import main

TOKEN = "an-admin-token"
LOST = "lost"  # as a scripted answer: the request is taken and the connection cut


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class Admin:
    """What was asked, and what to answer next per method and path (the last answer repeats)."""

    url: str
    seen: list[Seen] = field(default_factory=list)
    answers: dict[tuple[str, str], deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    other: str | bytes | None = None  # what is answered, with 200, where there is no script

    def answer(self, method: str, path: str, status: int, body: Any, **headers: str) -> None:
        """Script the next answer to `method path`."""
        self.answers[method, path].append((status, body, headers))

    def lose(self, method: str, path: str) -> None:
        """Script a lost answer."""
        self.answers[method, path].append(LOST)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, stdout, and the lines of stderr."""

    code: int
    out: str
    err: list[str]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Play(tornado.web.RequestHandler):
    """Answers from the script; without a line there, 500 tells the test what was asked."""

    def initialize(self, admin: Admin) -> None:
        self.admin = admin

    def play(self, *_: str) -> None:
        request = self.request
        query = {name: self.get_query_argument(name) for name in request.query_arguments}
        body = json.loads(request.body) if request.body else None
        method, path = str(request.method), request.path
        self.admin.seen.append(Seen(method, path, query, dict(request.headers.get_all()), body))
        if query.get("dry_run") == "1":
            self.finish({"runs": [], "dry_run": True})
            return
        script = self.admin.answers[method, path] or deque([(500, f"no {method} {path}", {})])
        if self.admin.other is not None and not self.admin.answers[method, path]:
            script = deque([(200, self.admin.other, {})])
        answer = script.popleft() if len(script) > 1 else script[0]
        if answer == LOST:
            self.detach().close()
            return
        status, text, headers = answer
        self.set_status(status)
        self.set_header("Content-Type", f"application/{'json' if status < 300 else 'problem+json'}")
        for name, value in headers.items():
            self.set_header(name.replace("_", "-"), value)
        self.finish(text if isinstance(text, str | bytes) else json.dumps(text))

    get = post = patch = delete = play  # pyrefly: ignore


@contextmanager
def playing() -> Iterator[Admin]:
    """Yield a running stand-in; it is stopped and its thread joined afterwards."""
    started: queue.Queue[tuple[Admin, Callable[[], object]]] = queue.Queue()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(started.put)))
    thread.start()
    admin, stop = started.get(timeout=10)
    try:
        yield admin
    finally:
        stop()
        thread.join(10)


async def _serve(started: Callable[[tuple[Admin, Callable[[], object]]], None]) -> None:
    listener, port = tornado.testing.bind_unused_port()
    admin = Admin(f"http://127.0.0.1:{port}")
    routes = [(r"/.*", Play, {"admin": admin})]
    server = tornado.httpserver.HTTPServer(tornado.web.Application(routes, log_function=_mute))
    server.add_sockets([listener])
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    started((admin, lambda: loop.call_soon_threadsafe(stop.set)))
    await stop.wait()
    server.stop()
    await server.close_all_connections()


def _mute(handler: tornado.web.RequestHandler) -> None:
    """Scripted refusals are no news."""


@dataclass(frozen=True)
class Shell:
    """Runs commands in this process; the test puts address and token into the environment."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> Outcome:
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err.splitlines())


def problem(code: str, detail: str, *errors: tuple[str, str]) -> dict[str, Any]:
    """Return a problem document as http.md has it."""
    return {
        "type": f"errors#{code}",
        "title": code,
        "detail": detail,
        "code": code,
        "request_id": "req-1",
        "retryable": False,
        "errors": [{"pointer": pointer, "detail": text} for pointer, text in errors],
    }
