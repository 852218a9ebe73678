"""What ends a background loop does not end the service: log lines, and loops that fail."""

import asyncio
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from broker.admin import archiver, key_rings
from broker.admin.archiver import Archiver
from broker.admin.key_rings import KeyRings
from broker.audit import chain
from broker.audit.chain import AuditChain
from broker.concurrency import supervision
from broker.concurrency.cancel import cancel
from broker.concurrency.supervision import Succeeded, Supervisor
from broker.leases import notifications
from broker.leases.expiry_listener import ExpiryListener
from broker.leases.notifications import Wakeup
from broker.leases.parked_claims import ParkedClaims
from broker.leases.sweep import Sweep
from broker.runners import liveness
from broker.runners.liveness import Liveness
from broker.telemetry import Telemetry
from config.log_writer import LogWriter
from config.settings import Settings
from handlers import connections
from handlers.connections import Server
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import ServerLost, serve
from tests.service.test_health import until_ready
from tests.support.fleet import open_fleet

MakeSettings = Callable[..., Settings]
ROOT = Path(__file__).resolve().parents[2]
LINES = 3000
# Logs more than any pipe holds, then says that it got here and how many lines were lost.
PROGRAM = f"""
import structlog
from config.logging import configure_logging, dropped_lines, writer_of_stderr
configure_logging("info", "json")
for number in range({LINES}):
    structlog.get_logger().info("x" * 300, number=number)
writer_of_stderr().drain(0.2)
print("alive", dropped_lines(), flush=True)
"""


@contextmanager
def unread() -> Iterator[int]:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    yield writer
    os.close(reader)
    os.close(writer)


@contextmanager
def closed() -> Iterator[int]:
    """A pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def full() -> Iterator[int]:
    """A disk without space."""
    with Path("/dev/full").open("w") as device:
        yield device.fileno()


@pytest.mark.parametrize(("stderr", "counted"), [(unread, False), (closed, True), (full, True)])
def test_a_program_goes_on_and_ends_whatever_becomes_of_its_log(
    stderr: Callable[[], Any], counted: bool
) -> None:
    with stderr() as descriptor:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], stderr=descriptor, stdout=subprocess.PIPE, timeout=60,
            check=True, text=True,
        )  # fmt: skip
    alive, dropped = done.stdout.split()
    assert alive == "alive"
    assert (int(dropped) == LINES) is counted


def test_a_log_that_is_read_is_whole_and_in_order() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, timeout=60, check=True, text=True
    )
    assert done.stdout.split() == ["alive", "0"]
    assert [line.count(f'"number": {n},') for n, line in enumerate(done.stderr.splitlines())] == [
        1
    ] * LINES


def test_what_does_not_fit_into_memory_is_dropped_and_counted() -> None:
    with unread() as descriptor, os.fdopen(os.dup(descriptor), "w") as stream:
        writer = LogWriter(stream, lines_max=2)
        for _ in range(10):
            writer.write("x" * 1_000_000)
        assert writer.dropped >= 7


class Fussy(io.StringIO):
    """A stream that fails in ways that nobody has heard of, until it is told to behave."""

    failing = True

    def fileno(self) -> int:
        if self.failing:
            raise RuntimeError("unheard of")
        raise io.UnsupportedOperation


def test_the_thread_that_writes_survives_whatever_a_stream_comes_up_with() -> None:
    stream = Fussy()
    writer = LogWriter(stream)
    writer.write("lost\n")
    writer.drain()
    stream.failing = False
    writer.write("written\n")
    writer.drain()
    assert (stream.getvalue(), writer.dropped) == ("written\n", 1)


class Panic(BaseException):
    """What a library's Rust raises, as pyo3 does."""


@pytest.mark.gen_test
async def test_a_loop_that_ends_is_started_again_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "FIRST_S", 0.001)
    supervisor = Supervisor(Telemetry("test"))
    endings: list[Any] = [RuntimeError("boom"), None, OSError("away"), Panic("index out of bounds"),
                          asyncio.CancelledError()]  # fmt: skip
    running = asyncio.Event()

    async def loop(succeeded: Succeeded) -> None:
        if not endings:
            succeeded()
            running.set()
            await asyncio.Event().wait()
        if ending := endings.pop(0):
            raise ending

    with capture_logs() as logs:
        supervisor.start("sweep", loop)
        async with asyncio.timeout(10):
            await running.wait()
    told = [line["problem"] for line in logs if line["event"] == "loop.ended"]
    assert told == ["RuntimeError: boom", "it returned", "OSError: away",
                    "Panic: index out of bounds", "it was cancelled from within"]  # fmt: skip
    assert supervisor.problems == {}
    assert supervisor.success_ages_s == {"sweep": 0}
    await supervisor.close()
    assert not supervisor.lost.is_set()


@pytest.mark.gen_test
async def test_a_loop_that_hangs_is_told_of_and_one_that_waits_to_be_asked_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervision, "LATE_MIN_S", 0)
    supervisor = Supervisor(Telemetry("test"))

    async def hang(succeeded: Succeeded) -> None:
        await asyncio.Event().wait()

    supervisor.start("sweep", hang, every_s=0)
    supervisor.start("reload", hang)
    assert supervisor.problems == {"sweep": "has done nothing for 0 s"}
    assert supervisor.success_ages_s == {"sweep": None, "reload": None}
    await supervisor.close()


@pytest.mark.parametrize("vital", [True, False])
@pytest.mark.gen_test
async def test_a_vital_loop_that_never_gets_to_work_is_given_up_and_another_one_is_not(
    monkeypatch: pytest.MonkeyPatch, vital: bool
) -> None:
    monkeypatch.setattr(supervision, "FIRST_S", 0)
    supervisor, starts, many = Supervisor(Telemetry("test")), 0, asyncio.Event()

    async def broken(succeeded: Succeeded) -> None:
        nonlocal starts
        starts += 1
        if starts == 2 * supervision.GIVE_UP:
            many.set()
        raise RuntimeError("boom")

    with capture_logs() as logs:
        supervisor.start("sweep", broken, vital=vital)
        async with asyncio.timeout(10):
            await (supervisor.lost if vital else many).wait()
    lost = [(line["loop"], line["problem"]) for line in logs if line["event"] == "loop.lost"]
    assert lost == ([("sweep", "RuntimeError: boom")] if vital else [])
    assert supervisor.problems["sweep"] == "ended: RuntimeError: boom"
    assert supervisor.lost.is_set() is vital
    await supervisor.close()


@pytest.mark.gen_test
async def test_a_loop_that_nobody_keeps_running_any_more_ends_the_process() -> None:
    supervisor = Supervisor(Telemetry("test"))

    async def forever(succeeded: Succeeded) -> None:
        await asyncio.Event().wait()

    supervisor.start("archiver", forever)
    await asyncio.sleep(0)
    [task] = [each for each in asyncio.all_tasks() if each.get_name() == "archiver"]
    task.cancel()
    async with asyncio.timeout(10):
        await supervisor.lost.wait()
    assert supervisor.problems == {"archiver": "ended: it was cancelled"}
    await supervisor.close()


@pytest.mark.gen_test
async def test_a_server_whose_loop_cannot_be_kept_running_drains_and_ends(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: Sweep, succeeded: Succeeded) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(supervision, "FIRST_S", 0)
    monkeypatch.setattr(Sweep, "run", broken)
    with capture_logs() as logs, pytest.raises(ServerLost, match=r"loop\.lost"):
        async with asyncio.timeout(30):
            await serve(make_settings())
    told = [line["event"] for line in logs]
    assert "loop.lost" in told
    order = ("server.listening", "server.draining", "server.stopped")
    assert [event for event in told if event in order] == list(order)


@pytest.mark.gen_test
async def test_a_loop_that_waits_to_be_started_again_is_seen_from_outside(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: Archiver, succeeded: Succeeded) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Archiver, "run", broken)
    async with open_fleet(make_settings(), sigstore) as fleet:
        checks = await until_ready(fleet, 200, loops="degraded: archiver ended: RuntimeError")
        assert checks["postgres"] == "ok"
        assert checks["loop_success_ages_s"]["archiver"] is None
        exposition = (await fleet.http.get("/metrics")).text
        assert 'bakeoff_queue_loop_restarts_total{loop="archiver"}' in exposition
        assert "bakeoff_queue_log_lines_dropped_total 0.0" in exposition


LOOPS: dict[str, tuple[type, str]] = {
    "sweep": (Sweep, "run"),
    "parked_claims": (ParkedClaims, "run"),
    "expiry_listener": (ExpiryListener, "run"),
    "liveness": (Liveness, "run"),
    "wakeup": (Wakeup, "run"),
    "loop_lag": (Telemetry, "watch_loop"),
    "archiver": (Archiver, "run"),
    "audit_chain": (AuditChain, "run"),
    "patrol": (Server, "patrol"),
    "key_rings": (KeyRings, "run"),
}


@pytest.mark.gen_test(timeout=60)
async def test_every_loop_of_the_server_survives_its_end_and_does_its_work_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "FIRST_S", 0.001)
    monkeypatch.setattr(archiver, "INTERVAL_S", 0.01)
    monkeypatch.setattr(chain, "INTERVAL_S", 0.01)
    monkeypatch.setattr(liveness, "INTERVAL_S", 0.01)
    monkeypatch.setattr(key_rings, "INTERVAL_S", 0.01)
    monkeypatch.setattr(connections, "PATROL_S", 0.01)
    quick = make_settings(claim_recheck_s=0.01, sweep_interval_s=0.01)
    for kind, name in LOOPS.values():
        monkeypatch.setattr(kind, name, ends_once(getattr(kind, name)))
    with capture_logs() as logs:
        async with open_fleet(quick, sigstore) as fleet:
            supervisor = fleet.services.supervisor
            assert supervisor.success_ages_s.keys() == LOOPS.keys()
            while None in supervisor.success_ages_s.values() or supervisor.problems:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # there is no signal
            checks = await until_ready(fleet, 200, loops="ok")
            assert checks["loop_success_ages_s"].keys() == LOOPS.keys()
            exposition = (await fleet.http.get("/metrics")).text
            for name in LOOPS:
                success = f'loop_last_success_timestamp_seconds{{loop="{name}"}} 1'
                assert success in exposition, name
    ended = {line["loop"] for line in logs if line["event"] == "loop.ended"}
    assert ended == LOOPS.keys()


def ends_once(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let a loop end at its first start."""
    starts = iter([True])

    async def ending(self: Any, *arguments: Any) -> None:
        if next(starts, False):
            raise RuntimeError("boom")
        await run(self, *arguments)

    return ending


@pytest.mark.gen_test
async def test_a_listening_connection_that_says_nothing_is_given_up(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "RETRY_S", 0.001)
    answers, heard, proved = iter([TimeoutError()]), 0, asyncio.Event()

    async def fetchval(self: asyncpg.Connection, *_: Any, **__: Any) -> str:
        if error := next(answers, None):
            raise error
        return "off"  # its transactions are not read-only

    def ring() -> None:
        nonlocal heard
        heard += 1

    monkeypatch.setattr(asyncpg.Connection, "fetchval", fetchval)
    with capture_logs() as logs:
        running = asyncio.create_task(Wakeup(database, ring).run(proved.set))
        async with asyncio.timeout(10):
            await proved.wait()
        await cancel(running)
    assert [line["error"] for line in logs if line["event"] == "wakeup.lost"] == ["TimeoutError"]
    assert heard == 2  # each connection looks at once for what was not heard before it


# Tasks that no supervisor keeps: why their end does no harm.
SHORT_LIVED = {
    "broker/runners/revocations.py": (
        "filled again at the next look; its watch catches whatever a Redis does"
    ),
    "broker/leases/claims.py": (
        "the release of one undelivered claim: if it fails, the lease lapses"
    ),
    "broker/concurrency/batching.py": (
        "one batch after the other: whatever ends it is told to all who wait"
    ),
    "broker/leases/expiry_listener.py": (
        "a node's: one that ended is seen, and replaced at the next look"
    ),
    "broker/leases/expiry_node.py": "awaited by the node, which listens anew when one of them ends",
    "broker/leases/lease_keys.py": "one pipeline after the other: the next change starts it again",
    "broker/concurrency/supervision.py": "the supervisor's own: one that ends ends the process",
    "db/migrate.py": "awaited where they start: a migration, and the lines of its progress",
    "server.py": "awaited at once: which of the events that end the process comes first",
}


def test_no_task_is_left_to_itself() -> None:
    folders = ("auth", "broker", "db", "handlers", "config")
    sources = [
        ROOT / "server.py",
        *(file for name in folders for file in ROOT.glob(f"{name}/**/*.py")),
    ]
    starts = {
        str(source.relative_to(ROOT))
        for source in sources
        if re.search(r"\b(create_task|ensure_future)\(", source.read_text("utf-8"))
    }
    assert starts == SHORT_LIVED.keys()
