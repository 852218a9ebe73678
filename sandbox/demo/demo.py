"""`bakeoff-queue demo`: a small fleet on private services, from an empty queue to its results.

Two server processes, two runners, and a third that is killed in the middle of a run; all talk HTTP,
as they would from other machines. What is shown comes from the runners' and servers' own events and
from the admin API; nothing is staged but the kill.
"""

import queue
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from client.admin_api import AdminClient
from client.harness_config import Run, read_runs
from config.settings import Settings
from sandbox.demo.board import Board
from sandbox.demo.report import Report, collect, verdict
from sandbox.demo.view import View
from sandbox.services.children import ENDED, Child, Event, held
from sandbox.services.process_supervisor import SandboxError
from sandbox.services.stack import (
    CATALOGUE,
    CATALOGUE_FILES,
    DemoRunner,
    Stack,
    admin_api,
    open_stack,
)

DEADLINE_S = 120.0
LOOK_S = 0.25
QUEUE = "/api/admin/queue"
# What runners sign as the audience: the balancer's address, if there were one before the servers.
PUBLIC_URL = "http://queue.demo.test"
OFFICE = DemoRunner("office-24gb", 24)
LAB = DemoRunner("lab-80gb", 80)
GARAGE = DemoRunner("garage-24gb", 24)
# A slow card, so that its power surely fails in the middle of a run.
SECONDS_PER_CELL = {OFFICE: 0.15, LAB: 0.15, GARAGE: 0.3}
SEEDS = (42, 43)
KNOBS = {
    "listen_port": 0,
    "public_url": PUBLIC_URL,
    "lease_ttl_s": 3,
    "heartbeat_interval_s": 1,
    "sweep_interval_s": 1,
    "sweep_degraded_s": 0.5,
    "claim_recheck_s": 1,
    "retry_backoff_s": 1,
    "database_pool_max": 4,
    "workers": 2,
    "drain_s": 2,
}


class DemoFailed(SandboxError):
    """Something else happened than what the demo shows; one line."""


def run_demo(settings: Settings, view: View) -> Report:
    """Play the demo and return what came of it. Raises SandboxError or what its parts raise.

    Only the sandbox_* of `settings` are used: the demo never touches the caller's services.
    """
    started = time.monotonic()
    view.say("demo", "starting a private PostgreSQL and Redis")
    with open_stack(settings, None, (OFFICE, LAB, GARAGE)) as stack:
        view.say("demo", f"PostgreSQL {stack.postgres.version}, Redis, a throwaway Sigstore: ready")
        with Fleet(stack, view).play() as (api, board):
            report = collect(api, stack.postgres.dsn, board)
    return report.finished(time.monotonic() - started, verdict(report, board))


class Fleet:
    """The demo's processes, and the loop that watches them."""

    def __init__(self, stack: Stack, view: View) -> None:
        self._stack = stack
        self._view = view
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._board = Board(LAB.name, LAB.vram_gb)

    @contextmanager
    def play(self) -> Iterator[tuple[AdminClient, Board]]:
        """Run everything to its end; yield the API and the board while the servers still serve."""
        with ExitStack() as stack:
            servers = [
                stack.enter_context(self._stack.server(name, self._events.put, KNOBS))
                for name in ("server-1", "server-2")
            ]
            urls = [server.url() for server in servers]
            self._take_events()
            token = self._stack.admin_token()
            first, second = (stack.enter_context(admin_api(url, token)) for url in urls)
            for runner in (OFFICE, LAB, GARAGE):
                self._stack.admit(first, runner)
            self._enqueue(first)
            addresses = {GARAGE: urls[0], OFFICE: urls[0], LAB: urls[1]}
            children = {
                runner.name: stack.enter_context(held(self._runner(runner, url)))
                for runner, url in addresses.items()
            }
            self._watch(second, children | {server.child.name: server.child for server in servers})
            for child in children.values():
                child.stop()
            self._take_events()
            yield second, self._board

    def _enqueue(self, api: AdminClient) -> None:
        runs = demo_runs()
        api.post(QUEUE, {"runs": runs})
        self._view.say("admin", f"admitted 3 runner keys and enqueued {len(runs)} runs")

    def _runner(self, runner: DemoRunner, url: str) -> Child:
        command = self._stack.runner_command(runner, url, PUBLIC_URL)
        pace = [f"--seconds-per-cell={SECONDS_PER_CELL[runner]}", "--wait-s=2", "--idle-s=1"]
        return Child(runner.name, [*command, *pace], {}, self._stack.scratch, self._events.put)

    def _watch(self, api: AdminClient, children: dict[str, Child]) -> None:
        """Follow the events and the queue until there is nothing left to happen."""
        deadline = time.monotonic() + DEADLINE_S
        while not self._board.finished:
            self._take_events(children)
            self._board.see(api.get(QUEUE, limit=100)["runs"])
            self._view.show(self._board)
            if time.monotonic() > deadline:
                raise DemoFailed(
                    f"not finished within {DEADLINE_S:g} s ({self._board.tally}):"
                    " is the machine very busy? Try again"
                )

    def _take_events(self, children: dict[str, Child] | None = None) -> None:
        """Take the events that are there, and those of the next moment."""
        until = time.monotonic() + (LOOK_S if children else 0)
        while True:
            try:
                event = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return
            self._take(event, children or {})

    def _take(self, event: Event, children: dict[str, Child]) -> None:
        if (text := self._board.hear(event)) is not None:
            self._view.say(event.source, text)
        child = children.get(event.source)
        if child is None or (self._board.lost and child.name == GARAGE.name):
            return
        if child.name == GARAGE.name and event.name == "heartbeat" and event.facts["done"]:
            child.kill()
            self._view.say("demo", self._board.lose(event))
        elif event.name == ENDED:
            code = event.facts["code"]
            raise DemoFailed(f"{child.name} ended with exit code {code}: {child.last_words}")


def demo_runs() -> list[Run]:
    """The catalogue once per seed; the model that fits no runner of ours only once."""
    batch = str(uuid.uuid4())
    runs = [
        _with_seed(run, seed)
        for seed in SEEDS
        for run in read_runs(CATALOGUE / "config.yaml", CATALOGUE_FILES, batch)
    ]
    return runs[:-1]


def _with_seed(run: Run, seed: int) -> Run:
    config: dict[str, Any] = run["config"]
    return run | {"config": config | {"run": config["run"] | {"seed": seed}}}
