"""The server processes of a storm, as the checker holds them: start, arm, stop, kill, replace.

Every slot has a port of its own. What ends, by whatever hand, is replaced by another process on the
same port until the group closes.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_S = 20
# A start that failed (PostgreSQL is away) is not repeated at once: that would keep a core busy.
RETRY_S = 0.2


@dataclass
class Slot:
    """A port, and the process that serves it now."""

    number: int
    port: int
    pid: int | None = None
    writer: asyncio.StreamWriter | None = None
    listening: asyncio.Event = field(default_factory=asyncio.Event)
    ordered_at: float = 0.0


class ServerGroup:
    """N servers, always N again after a while."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        mutant: str | None,
        struck: Callable[[str, float | None], None],
        rng: random.Random,
        restart_s: float,
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._mutant = mutant
        self._struck = struck
        self._rng = rng
        self._restart_s = restart_s
        self._spawner: asyncio.subprocess.Process | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.slots: list[Slot] = []
        self.starts_s: list[float] = []
        self.deaths: Counter[str] = Counter()
        # Which points a new process has armed from its first moment (the kill mode's).
        self.armed: Callable[[], list[str]] = list

    @property
    def up(self) -> list[Slot]:
        """The slots whose server listens."""
        return [slot for slot in self.slots if slot.listening.is_set()]

    @property
    def errors(self) -> str:
        """What the servers logged: only errors are."""
        logs = sorted(self._folder.glob("server-*.log"))
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def arm(self, slot: Slot, point: str, stall_s: float | None) -> None:
        """Let a server die, or stall, when it next reaches a point."""
        if slot.writer is not None:
            order = {"point": point, "stall_s": stall_s}
            slot.writer.write(json.dumps(order).encode() + b"\n")

    def signal(self, slot: Slot, number: int) -> bool:
        """Send a signal to a slot's process; False if it has none."""
        if slot.pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(slot.pid, number)
            return True
        return False

    async def ready(self) -> None:
        """Wait until every slot listens."""
        async with asyncio.timeout(START_S):
            await asyncio.gather(*(slot.listening.wait() for slot in self.slots))

    @asynccontextmanager
    async def open(self, count: int) -> AsyncIterator["ServerGroup"]:
        """Run `count` servers; all are gone afterwards."""
        control = self._folder / "control.sock"
        listener = await asyncio.start_unix_server(self._hear, control)
        self._spawner = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.history.server_process",
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            self.slots = [Slot(number, port) for number, port in enumerate(_free_ports(count))]
            for slot in self.slots:
                self._order(slot)
            await self.ready()
            self.starts_s.clear()  # these waited for the imports
            yield self
        finally:
            await self._close()
            listener.close()

    def _order(self, slot: Slot) -> None:
        order = {
            "slot": slot.number,
            "settings": {**self._settings, "listen_port": slot.port},
            "mutant": self._mutant,
            "armed": self.armed(),
            "control": str(self._folder / "control.sock"),
            "log": str(self._folder / f"server-{slot.number}.log"),
        }
        slot.ordered_at = time.monotonic()
        assert self._spawner is not None
        assert self._spawner.stdin is not None
        self._spawner.stdin.write(json.dumps(order).encode() + b"\n")

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Follow one process from its hello to its end, and order the next."""
        slot: Slot | None = None
        cause = "exit"
        # Cancelled when the loop ends early: asyncio 3.11 would print a traceback for each of us.
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            async for line in reader:
                message = json.loads(line)
                if message["event"] == "hello":
                    slot = greeted = self.slots[message["slot"]]
                    greeted.pid, greeted.writer = message["pid"], writer
                elif message["event"] == "listening" and slot is not None:
                    self.starts_s.append(time.monotonic() - slot.ordered_at)
                    slot.listening.set()
                elif message["event"] == "struck":
                    cause = message["point"] if message["stall_s"] is None else cause
                    self._struck(message["point"], message["stall_s"])
        writer.close()
        if slot is not None:
            self.deaths[cause] += 1
            self._replace(slot)

    def _replace(self, slot: Slot) -> None:
        started = slot.listening.is_set()
        slot.pid = slot.writer = None
        slot.listening.clear()
        if not self._closing:
            task = asyncio.create_task(self._order_later(slot, started))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _order_later(self, slot: Slot, started: bool) -> None:
        await asyncio.sleep(self._rng.uniform(0, self._restart_s) if started else RETRY_S)
        if not self._closing:
            self._order(slot)

    async def _close(self) -> None:
        """End the servers, then the process that forks them."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        for slot in self.slots:
            self.signal(slot, signal.SIGKILL)
        if self._spawner is None:
            return
        assert self._spawner.stdin is not None
        self._spawner.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self._spawner.wait()
        except TimeoutError:
            self._spawner.kill()
            await self._spawner.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; all are held until the last one is known."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in taken]
