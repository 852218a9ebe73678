"""A stage for runners: a real HTTP server that says what the test's script says, and takes notes.

It plays the queue's part where the real server cannot be made to: proxies in between, answers
that get lost, tokens that expire at a chosen request.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import tornado.httpserver
import tornado.testing
import tornado.web
from nacl.signing import SigningKey

from sandbox.runner.client import RunnerClient
from sandbox.runner.identity import Identity
from sandbox.runner.wire import Backoff, Job

RUN_ID = "6d1c7f0e-3b1a-4b62-9a43-6f2f3d1d0a01"
LEASE_ID = "0e4b8f52-8e36-4d3a-9a7f-7c1b2f6a9d02"
BODY = {
    "run_id": RUN_ID,
    "lease_id": LEASE_ID,
    "attempt": 1,
    "heartbeat_interval_s": 30,
    "model": {
        "name": "Llama-3.3-70B-Instruct",
        "quantization": "q4_k_m",
        "parameter_count_b": 70.6,
        "active_parameter_count_b": None,
    },
    "tasks": [
        {
            "id": "capital",
            "domain": "geography",
            "user_prompt": "What is the capital of Norway?",
            "expected": "Oslo",
            "scorer": "contains",
            "tier": "main",
        },
        {
            "id": "sum",
            "domain": "arithmetic",
            "user_prompt": "What is 20 + 22?",
            "expected": 42,
            "scorer": "exact",
            "tier": "main",
        },
    ],
    "floor_tasks": [
        {
            "id": "floor",
            "domain": "floor",
            "user_prompt": 'Repeat "ready"',
            "expected": "ready",
            "scorer": "exact",
            "tier": "dumb_model",
        }
    ],
    "prompts": [{"id": "terse", "system": "Be terse."}, {"id": "kind", "system": "Be kind."}],
    "config": {
        "run": {"name": RUN_ID, "seed": 7, "timeout_s": 30},
        "models": [{"id": "llama-70b", "gguf": "llama.gguf"}],
        "judge": {"enabled": False, "mode": "none"},
    },
    "config_hash": "ab" * 32,
}
JOB = Job.from_body(BODY)


@dataclass(frozen=True, slots=True)
class Line:
    """One scripted answer. `hang_up` closes the connection without a word."""

    status: int = 200
    body: dict[str, Any] | str = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False


def refusal(status: int, code: str, **headers: str) -> Line:
    """A problem document with one of the server's codes."""
    return Line(
        status,
        {"code": code, "status": status, "detail": f"the {code} detail"},
        {"Content-Type": "application/problem+json", **headers},
    )


@dataclass(frozen=True, slots=True)
class Heard:
    """A request as it arrived."""

    verb: str
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


class Stage:
    """Answers each verb (`claim`, `heartbeat`, ...) by its script; the last line is repeated."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.script: dict[str, list[Line]] = defaultdict(lambda: [Line()])
        self.on: dict[str, Callable[[], Any]] = {}
        self.tokens = 0
        self.url = ""

    def says(self, verb: str, *lines: Line) -> None:
        self.script[verb] = list(lines)

    def requests(self, verb: str) -> list[Heard]:
        return [one for one in self.heard if one.verb == verb]

    def listen(self) -> tornado.httpserver.HTTPServer:
        app = tornado.web.Application([(r"/.*", _Handler, {"stage": self})])
        socket, port = tornado.testing.bind_unused_port()
        server = tornado.httpserver.HTTPServer(app)
        server.add_socket(socket)
        self.url = f"http://127.0.0.1:{port}"
        return server

    def answer(self, verb: str) -> Line:
        lines = self.script[verb]
        line = lines.pop(0) if len(lines) > 1 else lines[0]
        if verb == "register" and line == Line():
            self.tokens += 1
            return Line(201, {"access_token": f"token-{self.tokens}", "runner_id": "bench-1"})
        return line

    def identity(self) -> Identity:
        return Identity(
            SigningKey(b"k" * 32), self.url, "host", {"vram_gb": 24, "quantizations": ["q8_0"]}
        )

    def client(self, http: httpx.AsyncClient, notes: list[tuple[str, dict]]) -> RunnerClient:
        """A client of this stage that is quick to try again."""

        def report(event: str, **facts: Any) -> None:
            notes.append((event, facts))

        return RunnerClient(http, self.identity(), report, Backoff(0.001, 0.01))


class _Handler(tornado.web.RequestHandler):
    def initialize(self, stage: Stage) -> None:
        self.stage = stage

    async def prepare(self) -> None:
        verb = self.request.path.rpartition("/")[2]
        headers = dict(self.request.headers.get_all())
        self.stage.heard.append(Heard(verb, self.request.body, headers))
        waiting = self.stage.on.get(verb)
        if waiting is not None:
            await waiting()
        self._say(self.stage.answer(verb))

    def _say(self, line: Line) -> None:
        if line.hang_up:
            self.detach().close()
            self._finished = True
            return
        self.set_status(line.status)
        self.set_header("Content-Type", "application/json")
        for name, value in line.headers.items():
            self.set_header(name, value)
        if line.status == 204:
            self.clear_header("Content-Type")
            self.finish()
            return
        self.finish(line.body if isinstance(line.body, str) else json.dumps(line.body))
