"""What one request may cost: few statements, whatever it names, and no byte that nobody reads."""

import gc
import tracemalloc
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
import httpx
import pytest
from tornado.httputil import HTTPServerRequest

from config.settings import Settings
from db import pool as pool_module
from handlers.base import Handler
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, open_fleet

MakeSettings = Callable[..., Settings]
MIB = 1024 * 1024
JOB_BYTES = 6 * MIB


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the database is sent on the connections that are opened from now on."""
    sent: list[str] = []
    prepare = pool_module._prepare

    async def listened_to(connection: asyncpg.Connection) -> None:
        await prepare(connection)
        connection.add_query_logger(lambda query: sent.append(query.query))

    monkeypatch.setattr(pool_module, "_prepare", listened_to)
    return sent


@pytest.mark.gen_test
async def test_the_dead_leases_of_a_request_are_explained_by_one_statement(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, statements: list[str]
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_ids = [await fleet.enqueue() for _ in range(3)]
        job = await runner.take()
        await fleet.cancel(run_ids[2])
        dead = [*run_ids, *(str(uuid.uuid4()) for _ in range(61))]
        beats = [{"run_id": run_id, "lease_id": str(uuid.uuid4())} for run_id in dead]
        beats[7] = {name: job[name] for name in ("run_id", "lease_id")}
        statements.clear()
        answer = await runner.post("/api/queue/heartbeats", {"heartbeats": beats})
        looks = [text for text in statements if "WITH ORDINALITY AS g (run_id" in text]
        assert (len(looks), len(statements) <= 8) == (1, True), statements
    told = [each.get("code") for each in answer.json()["heartbeats"]]
    expected = ["lease_lost", "lease_lost", "run_finished", *["not_found"] * 61]
    assert told == [*expected[:7], None, *expected[8:]]


@contextmanager
def measured() -> Iterator[Callable[[], int]]:
    """Yield what tells the most bytes that this process took at a time since the last call."""
    gc.collect()
    tracemalloc.start()

    def most() -> int:
        peak = tracemalloc.get_traced_memory()[1] - before[-1]
        before.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.reset_peak()
        return peak

    before = [0]
    most()
    try:
        yield most
    finally:
        tracemalloc.stop()


@asynccontextmanager
async def one_large_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> AsyncIterator[tuple[Fleet, Runner, Runner, dict[str, Any]]]:
    """Yield who held a run with a job of megabytes, who holds it now, and the holder's job."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        loser, holder = await fleet.sign_on(), await fleet.sign_on("runner-b")
        await fleet.enqueue()
        await loser.release(await loser.take())
        job = await holder.take()
        await fleet.pool.execute(
            "UPDATE run_queue SET job = job || jsonb_build_object('filler', repeat('x', $1))",
            JOB_BYTES,
        )
        yield fleet, loser, holder, job


@pytest.mark.gen_test
async def test_a_request_that_hands_no_job_out_reads_none(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with one_large_run(make_settings, sigstore) as (fleet, loser, holder, job):
        path, lease = f"/api/queue/{job['run_id']}", {"lease_id": str(uuid.uuid4())}
        junk = {"result.json": b"{}"}

        async def get(runner: Runner, path: str) -> httpx.Response:
            return await fleet.http.get(path, headers=runner.headers)

        requests: dict[str, tuple[Callable[[], Any], int]] = {
            "heartbeat": (lambda: loser.heartbeat(job), 409),
            "heartbeats": (lambda: loser.post("/api/queue/heartbeats", {"heartbeats": [
                {"run_id": job["run_id"], **lease}] * 64}), 200),
            "release": (lambda: loser.release(job), 409),
            "fail": (lambda: loser.fail(job), 409),
            "another's submit": (lambda: loser.submit(job, junk), 409),
            "a bundle that is none": (lambda: holder.submit(job, {"notes.txt": b"none"}), 422),
            "another's lease": (lambda: holder.submit(job, junk, lease_id=str(uuid.uuid4())), 409),
            "own run": (lambda: get(loser, path), 200),
            "me": (lambda: get(holder, "/api/runners/me"), 200),
            "nothing there": (lambda: loser.claim(explain=True), 200),
            "register": (holder.register, 200),
            "renewed": (lambda: holder.heartbeat(job), 200),
            "list": (lambda: fleet.admin("GET", "/queue"), 200),
        }  # fmt: skip
        for send, status in requests.values():  # each once before, for what is kept for good
            assert (await send()).status_code == status, (await send()).text
        with measured() as most:
            taken = {}
            for name, (send, _) in requests.items():
                await send()
                taken[name] = most()
        assert {name: size for name, size in taken.items() if size > JOB_BYTES / 6} == {}


@pytest.fixture
def garbage() -> Iterator[list[Any]]:
    """What only a full garbage collection would find, from here on."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield gc.garbage
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/wp-login.php", 404),
        ("PUT", "/api/queue/claim", 405),
        ("POST", "/api/queue/claim", 401),
        ("GET", "/api/admin/queue", 401),
        ("POST", "/api/runners/register", 422),
        ("GET", "/metrics", 200),
        ("GET", "/readyz", 200),
    ],
)
async def test_a_request_leaves_nothing_to_the_garbage_collector(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    garbage: list[Any],
    method: str,
    path: str,
    status: int,
) -> None:
    """A full collection of what a flood has left stops all answers for 100 ms and more."""
    wrong = {"Authorization": "Bearer a.b.c"}
    body = {} if method in ("PUT", "POST") else None
    async with open_fleet(make_settings(), sigstore) as fleet:
        for _ in range(2):
            gc.collect()
            garbage.clear()
            for _ in range(3):
                answer = await fleet.http.request(method, path, headers=wrong, json=body)
                assert answer.status_code == status
        gc.collect()
        left = [each for each in garbage if isinstance(each, Handler | HTTPServerRequest)]
    assert left == []
