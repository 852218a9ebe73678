"""A rolling restart under load: three server processes behind nginx, each replaced twice.

Runners claim, beat, compute and submit all the while, through a private nginx with the balancer's
file of `deploy/`. Counted: every request and its answer. A request is lost when its client got no
whole answer, or a gateway's 502 or 504. What was acknowledged must be in the database.

    make bench ONLY=rolling_restart
"""

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import httpx

from bench.acknowledged import RecordingClient, Tally
from bench.support.balancer import Balancer, balancer, free_port
from client.admin_api import AdminClient
from client.harness_config import read_runs
from config.settings import Settings
from db.pool import DatabaseUnready, open_pool
from sandbox.runner.answers import BuiltInRules
from sandbox.runner.client import RunnerClient
from sandbox.runner.identity import Identity, load_key
from sandbox.runner.life import Runner, RunnerOptions
from sandbox.runner.result_bundle import Hardware
from sandbox.services.children import ENDED, Child, Event
from sandbox.services.process_supervisor import SandboxError
from sandbox.services.sigstore_instance import EmailSubject
from sandbox.services.stack import (
    CATALOGUE,
    CATALOGUE_FILES,
    ISSUER,
    DemoRunner,
    Stack,
    admin_api,
    open_stack,
)
from sandbox.services.stopping import Stopped, stoppable

PUBLIC_URL = "http://queue.bench.test"
SERVERS = 3
ROUNDS = 2
RUNNERS = tuple(DemoRunner(f"runner-{number}", 80) for number in range(8))
RUNS_PER_RESTART = 60
SECONDS_PER_CELL = 0.05
TTL_S = 15
DEADLINE_S = 240
LOOK_S = 0.2
KNOBS = {
    "listen_address": "127.0.0.1",
    "public_url": PUBLIC_URL,
    "lease_ttl_s": TTL_S,
    "heartbeat_interval_s": 1,
    "database_pool_max": 4,
    "drain_notice_s": 0.5,
}
OPEN = "SELECT count(*) FROM run_queue WHERE status NOT IN ('COMPLETE', 'FAILED', 'CANCELLED')"
COMPLETE = "SELECT count(*) FROM run_queue WHERE status = 'COMPLETE'"
LAPSED = "SELECT count(*) FROM attempts WHERE how = 'lapsed'"


class Slot:
    """One port, and the process that listens there."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self._name = name
        self._running = ExitStack()
        self._child: Child | None = None
        self.port = free_port()
        self.exits: list[int] = []

    def start(self) -> None:
        """Start a process; it is ready when this returns. Raises ServerFailed."""
        knobs = {**KNOBS, "listen_port": self.port}
        server = self._running.enter_context(self._stack.server(self._name, self._hear, knobs))
        self._child = server.child
        server.url()

    def replace(self) -> None:
        """SIGTERM the process, wait until it has ended by itself, start the next one."""
        assert self._child is not None
        self._child.stop()
        self.close()
        self.start()

    def close(self) -> None:
        """End the process, now."""
        self._running.close()

    def _hear(self, event: Event) -> None:
        if event.name == ENDED:
            self.exits.append(event.facts["code"])
        elif event.facts.get("level") in ("warning", "error") or not event.name:
            print(f"{self._name}: {event.name} {event.facts}", file=sys.stderr)


@contextmanager
def slots(stack: Stack) -> Iterator[list[Slot]]:
    """Yield running server processes; none is left at the end."""
    with ExitStack() as running:
        made = [Slot(stack, f"server-{number}") for number in range(SERVERS)]
        for slot in made:
            running.callback(slot.close)
            slot.start()
        yield made


class Rolling:
    """The restart, the runners at work, and the count."""

    def __init__(self, stack: Stack, made: list[Slot], front: Balancer, api: AdminClient) -> None:
        self._stack = stack
        self._slots = made
        self._front = front
        self._api = api
        self._tally = Tally()
        self._restarts = 0

    async def play(self) -> dict[str, Any]:
        """Return the last line's members, and `broken` promises."""
        began = time.monotonic()
        async with open_pool(self._stack.postgres.dsn, 2) as pool, asyncio.timeout(DEADLINE_S):
            lives = [asyncio.create_task(self._live(runner)) for runner in RUNNERS]
            try:
                await self._roll()
                while await pool.fetchval(OPEN):
                    _raise_failures(lives)
                    await asyncio.sleep(LOOK_S)
            finally:
                for life in lives:
                    life.cancel()
                await asyncio.gather(*lives, return_exceptions=True)
            return await self._count(pool, time.monotonic() - began)

    async def _roll(self) -> None:
        for _ in range(ROUNDS):
            for slot in self._slots:
                await asyncio.to_thread(self._enqueue)
                await asyncio.to_thread(slot.replace)
                self._restarts += 1
                print(f"replaced the process at port {slot.port}: {self._tally.requests} requests,"
                      f" {len(self._tally.lost)} lost so far", flush=True)  # fmt: skip

    def _enqueue(self) -> None:
        batch = str(uuid.uuid4())
        # The last one is there to fit nobody.
        runs = read_runs(CATALOGUE / "config.yaml", CATALOGUE_FILES, batch)[:-1]
        wanted = (runs * (RUNS_PER_RESTART // len(runs) + 1))[:RUNS_PER_RESTART]
        self._api.post("/api/admin/queue", {"runs": wanted})

    async def _live(self, runner: DemoRunner) -> None:
        identity = Identity(
            load_key(self._stack.key_file(runner)),
            PUBLIC_URL,
            runner.name,
            {"vram_gb": runner.vram_gb, "quantizations": list(runner.quantizations)},
        )
        subject = EmailSubject(runner.identity, ISSUER)
        async with httpx.AsyncClient(
            base_url=self._front.url, transport=RecordingClient(self._tally)
        ) as http:
            await Runner(
                RunnerClient(http, identity, _quiet),
                BuiltInRules(SECONDS_PER_CELL),
                lambda blob: self._stack.sigstore.sign(blob, subject),
                Hardware(runner.vram_gb),
                _quiet,
                RunnerOptions(wait_s=20, idle_s=0.5),
            ).live()

    async def _count(self, pool: asyncpg.Pool, seconds: float) -> dict[str, Any]:
        tally = self._tally
        broken = await tally.broken(pool, timedelta(seconds=TTL_S))
        broken += [f"exit code {code}" for slot in self._slots for code in slot.exits if code]
        broken += ["a lease lapsed"] * (await pool.fetchval(LAPSED) or 0)
        complaints = self._front.complaints()[-20:] if tally.lost else []
        for line in (*broken, *tally.lost, *complaints):
            print(line, file=sys.stderr)
        print(f"acknowledged: {len(tally.claims)} claims, {len(tally.submits)} submits, heartbeats"
              f" of {len(tally.beats)} leases; {len(broken)} promises broken;"
              f" {self._front.passed_on()} requests passed on by nginx,"
              f" {tally.refused_for_now} sent again by runners")  # fmt: skip
        return {
            "requests": tally.requests,
            "lost": len(tally.lost),
            "unacknowledged_retried": self._front.passed_on() + tally.refused_for_now,
            "restarts": self._restarts,
            "runs_complete": await pool.fetchval(COMPLETE),
            "seconds": round(seconds, 1),
            "broken": len(broken),
        }


def main() -> int:
    """Play it on private servers, and end them. Returns 0 when nothing was lost."""
    try:
        with stoppable(), ExitStack() as held:
            stack = held.enter_context(open_stack(Settings(), None, RUNNERS))
            made = held.enter_context(slots(stack))
            front = held.enter_context(balancer([slot.port for slot in made]))
            api = held.enter_context(admin_api(front.url, stack.admin_token()))
            for runner in RUNNERS:
                stack.admit(api, runner)
            counted = asyncio.run(Rolling(stack, made, front, api).play())
    except Stopped as stop:
        print(f"stopped ({stop}): nothing is left running", file=sys.stderr)
        return stop.exit_code
    except (SandboxError, DatabaseUnready, TimeoutError) as error:
        print(f"rolling restart: {error or 'not done in time'}", file=sys.stderr)
        return 1
    broken = counted.pop("broken")
    print(json.dumps(counted), flush=True)
    return 1 if broken or counted["lost"] else 0


def _raise_failures(lives: list[asyncio.Task[None]]) -> None:
    for life in lives:
        if life.done():
            life.result()


def _quiet(event: str, **facts: object) -> None:
    """What a runner says is for the demo."""


if __name__ == "__main__":
    sys.exit(main())
