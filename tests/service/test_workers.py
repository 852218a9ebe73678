"""The processes that verify bundles: lost ones are replaced, and none is left behind."""

import asyncio
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from auth.errors import AuthError, SignatureInvalid, SignerNotAllowed, Unverifiable
from broker.concurrency import worker_main, workers
from broker.concurrency.worker_main import REQUEST
from broker.concurrency.workers import Workers
from broker.errors import BrokerError, DigestMismatch, InvalidBundle, RunMismatch, Violation
from broker.errors import code_of as code_of_error
from broker.results.bundle import CAPS, RESULT
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_two_processes import Server, reaching, started, url_of
from tests.support.fleet import Fleet, Runner, code_of, open_fleet
from tests.support.held_verification import held

MakeSettings = Callable[..., Settings]
ORPHANS = """
import asyncio, sys
from broker.concurrency.worker_main import REQUEST
from broker.concurrency.workers import Workers
workers = Workers()
workers.warm()
print(*workers.pids, flush=True)
sys.stdin.read()
"""

UNTOLD = """
from broker.concurrency import worker_main
worker_main._end_with_the_server = lambda: None
worker_main.main()
"""


class Watched(Workers):
    """Says when a bundle has been handed to a worker."""

    def __init__(self) -> None:
        super().__init__()
        self.lent: asyncio.Queue[int] = asyncio.Queue()

    def _take(self) -> Any:
        worker = super()._take()
        # Heard of when the bundle's request is on the line: nothing gives way before that.
        self.lent.put_nowait(worker.process.pid)
        return worker


@asynccontextmanager
async def one_worker(
    settings: Settings, sigstore: ThrowawaySigstore
) -> AsyncIterator[tuple[Fleet, Runner, Watched, int]]:
    """Yield a fleet with a worker of its own, a runner, and the worker's process id."""
    lent = Watched()
    try:
        async with open_fleet(settings, sigstore, lent) as fleet:
            fleet.services.submissions.warm()
            (pid,) = lent.pids
            yield fleet, await fleet.sign_on(), lent, pid
    finally:
        await lent.close()


def gone(pid: int) -> bool:
    """Wait until a process that is not our child has ended; False after ten seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(10_000))
    finally:
        os.close(descriptor)


@pytest.mark.gen_test
async def test_a_worker_that_dies_at_its_work_costs_a_503_and_the_lease_is_kept(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with one_worker(make_settings(), sigstore) as (fleet, runner, lent, pid):
        await fleet.enqueue()
        assert await lent.lent.get() == pid  # to read the enqueue
        job = await runner.take()
        os.kill(pid, signal.SIGSTOP)
        submit = asyncio.create_task(runner.submit(job))
        assert await lent.lent.get() == pid
        os.kill(pid, signal.SIGKILL)
        answer = await submit
        assert code_of(answer) == (503, "unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        assert (await runner.heartbeat(job)).status_code == 200
        assert (await runner.submit(job)).status_code == 201
        assert await lent.lent.get() != pid


@pytest.mark.gen_test
async def test_a_worker_that_does_not_come_to_an_end_is_ended(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with one_worker(make_settings(), sigstore) as (fleet, runner, lent, pid):
        await fleet.enqueue()
        job = await runner.take()
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(workers, "LIMIT_S", 0.05)
        assert code_of(await runner.submit(job)) == (503, "unavailable")
        monkeypatch.undo()
        assert pid not in lent.pids
        assert (await runner.submit(job)).status_code == 201


@pytest.mark.gen_test
async def test_a_worker_that_died_while_idle_is_replaced_before_anybody_notices(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with one_worker(make_settings(), sigstore) as (fleet, runner, lent, pid):
        await fleet.enqueue()
        job = await runner.take()
        os.kill(pid, signal.SIGKILL)
        assert await asyncio.to_thread(gone, pid)
        assert (await runner.submit(job)).status_code == 201
        assert pid not in lent.pids


@pytest.mark.gen_test
async def test_signals_of_a_terminal_or_a_service_manager_are_not_for_workers(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with one_worker(make_settings(), sigstore) as (fleet, runner, lent, pid):
        await fleet.enqueue()
        await fleet.enqueue()
        assert (await runner.submit(await runner.take())).status_code == 201
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert os.getsid(pid) == pid  # Ctrl-C goes to a terminal's own session
        assert (await runner.submit(await runner.take())).status_code == 201
        assert lent.pids == [pid]


@pytest.mark.gen_test
async def test_a_worker_knows_no_secrets(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAKEOFF_QUEUE_TOKEN_KEYS", "k1:" + "s" * 64)
    async with one_worker(make_settings(), sigstore) as (_, _, _, pid):
        assert b"BAKEOFF" not in await asyncio.to_thread(Path(f"/proc/{pid}/environ").read_bytes)


@pytest.mark.gen_test
async def test_after_a_large_result_its_worker_is_replaced(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """Its memory would stay with the process."""
    async with one_worker(make_settings(), sigstore) as (fleet, runner, lent, pid):
        await fleet.enqueue()
        job = await runner.take()
        files = runner.bundle(job, note="x" * worker_main.LARGE_BYTES)
        assert (await runner.submit(job, files)).status_code == 201
        assert pid not in lent.pids
        assert await asyncio.to_thread(gone, pid)


def test_a_worker_whose_server_is_gone_ends_without_a_word() -> None:
    ours, theirs = socket.socketpair()
    with (
        theirs,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "broker.concurrency.worker_main"],
            stdin=theirs.fileno(),
            stderr=subprocess.PIPE,
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
        ) as worker,
    ):
        assert worker.stderr is not None
        with ours:
            ours.sendall(REQUEST.pack(1000) + b"half of it")
        theirs.close()
        assert worker.stderr.read() == b""


def test_no_worker_outlives_a_server_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        (pid,) = map(int, server.stdout.readline().split())
        server.kill()
    assert gone(pid)


def test_a_worker_that_finds_its_server_gone_at_its_work_says_nothing_either() -> None:
    """The thread that waits for the end of the server may be later than the work."""
    ours, theirs = socket.socketpair()
    with (
        theirs,
        subprocess.Popen(
            [sys.executable, "-c", UNTOLD], stdin=theirs.fileno(), stderr=subprocess.PIPE
        ) as worker,
    ):
        assert worker.stderr is not None
        theirs.close()
        with ours:
            ours.sendall(REQUEST.pack(1000) + b"half of it")
        assert worker.stderr.read() == b""


@pytest.mark.gen_test
async def test_a_server_killed_at_a_verification_takes_its_worker_along_and_the_next_one_accepts(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings()
    async with held(tmp_path, monkeypatch) as verifications:
        with started(settings) as process:
            server = Server(process, url_of(process))
            async with reaching(settings, sigstore, server) as (fleet,):
                runner = await fleet.sign_on()
                run_id = await fleet.enqueue()
                job = await runner.take()
                files = runner.bundle(job)
                submit = asyncio.create_task(runner.submit(job, files))
                worker = await verifications.begun()
                process.kill()
                with pytest.raises(httpx.TransportError):
                    await submit
                assert await asyncio.to_thread(gone, worker)
                # The worker's end of the pipe is closed as well, or this had no end.
                assert process.stderr is not None
                said = await asyncio.to_thread(process.stderr.read)
                assert "Traceback" not in said
                assert all(line.startswith("{") for line in said.splitlines())
                assert (await fleet.row(run_id))["status"] == "CLAIMED"
    with started(settings) as process:
        server = Server(process, url_of(process))
        async with reaching(settings, sigstore, server) as (fleet,):
            again = runner.at(fleet)
            answers = [await again.submit(job, files) for _ in range(2)]
            assert [answer.status_code for answer in answers] == [201, 200]
            assert answers[0].json()["sig"] == answers[1].json()["sig"]
            assert (await fleet.row(run_id))["status"] == "COMPLETE"
            assert await fleet.pool.fetchval("SELECT count(*) FROM submissions") == 1


HOSTILE = {
    # name: (members of result.json, where the problem is)
    "deep nesting": ({"x": [json.loads("[" * 60 + "]" * 60)] * 130_000}, ""),
    "a huge array": ({"records": [{}] * 4_000_000}, ""),
    "long strings": ({"x": ["y" * 4_000_000] * 4, "run_status": 1}, "/run_status"),
}


@pytest.mark.gen_test
async def test_a_huge_hostile_result_is_refused_by_pointer_and_its_worker_replaced(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with one_worker(make_settings(), sigstore) as (fleet, runner, lent, _):
        await fleet.enqueue()
        job = await runner.take()
        for kind, (members, place) in HOSTILE.items():
            files = runner.bundle(job, **members)
            assert CAPS[RESULT] * 0.6 < len(files[RESULT]) <= CAPS[RESULT], kind
            answer = await runner.submit(job, files)
            assert code_of(answer) == (422, "invalid_bundle"), kind
            assert [error["pointer"] for error in answer.json()["errors"]] == [place], kind
            used = await lent.lent.get()
            assert await asyncio.to_thread(gone, used), kind
            assert lent.pids == []
        assert (await runner.heartbeat(job)).status_code == 200
        assert (await runner.submit(job)).status_code == 201


FIRST = (Violation("/records/3/score", "is not a number"),)


@pytest.mark.parametrize(
    "error",
    [
        InvalidBundle("so and so", FIRST),
        DigestMismatch("so and so", FIRST),
        RunMismatch("so and so", FIRST),
        SignatureInvalid("so and so"),
        SignerNotAllowed("so and so"),
        Unverifiable("so and so"),
    ],
    ids=code_of_error,
)
def test_a_refusal_comes_from_a_worker_as_it_was_raised(error: AuthError | BrokerError) -> None:
    came = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
    assert (type(came), str(came)) == (type(error), "so and so")
    assert getattr(came, "violations", None) == getattr(error, "violations", None)
