"""What ends a background loop does not end the service: log lines, and loops that fail."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker import supervision
from broker.archiver import Archiver
from broker.supervision import Supervisor
from broker.telemetry import Telemetry
from config.log_writer import LogWriter
from config.settings import Settings
from sandbox.sigstore_instance import ThrowawaySigstore
from tests.fleet import open_fleet
from tests.test_health import until_ready

MakeSettings = Callable[..., Settings]
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


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    monkeypatch.setattr(supervision, "FIRST_S", 0.001)
    return Supervisor(Telemetry("test"))


@pytest.mark.gen_test
async def test_a_loop_that_ends_is_started_again_and_told(supervisor: Supervisor) -> None:
    endings: list[Any] = [RuntimeError("boom"), None, OSError("away")]
    running = asyncio.Event()

    async def loop() -> None:
        if not endings:
            running.set()
            await asyncio.Event().wait()
        if ending := endings.pop(0):
            raise ending

    with capture_logs() as logs:
        task = supervisor.start("sweep", loop)
        async with asyncio.timeout(10):
            await running.wait()
    told = [line["problem"] for line in logs if line["event"] == "loop.ended"]
    assert told == ["RuntimeError: boom", "it returned", "OSError: away"]
    assert supervisor.problems == {}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.gen_test
async def test_a_loop_that_waits_to_be_started_again_is_seen_from_outside(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: Archiver) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Archiver, "run", broken)
    async with open_fleet(make_settings(), sigstore) as fleet:
        checks = await until_ready(fleet, 200, loops="degraded: archiver ended: RuntimeError")
        assert checks["postgres"] == "ok"
        exposition = (await fleet.http.get("/metrics")).text
        assert 'bakeoff_queue_loop_restarts_total{loop="archiver"}' in exposition
        assert "bakeoff_queue_log_lines_dropped_total 0.0" in exposition
