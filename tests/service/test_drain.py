"""A stop loses nothing: what was asked is answered in full, or was never begun."""

import asyncio
import itertools
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from broker.in_flight import InFlight
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_two_processes import Server, reaching, started, url_of
from tests.support.fleet import Fleet, Runner, code_of, open_fleet
from tests.support.raw_http import FORM_TYPE, Line, form, head, line_to

MakeSettings = Callable[..., Settings]
# A notice that no test sits out: what happens during it did not wait for its end.
LONG_S = 1000.0
PROMPT_S = 20
LARGE = "x" * 24_000_000
# The server looks at what the queue has, which it does for claims that wait, and for no others.
LOOKS = """
SELECT count(*) > 0 FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%AS claimable,%'
"""
CLAIMED = "SELECT status = 'CLAIMED' FROM run_queue WHERE run_id = $1"


@asynccontextmanager
async def stage(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, **changes: Any
) -> AsyncIterator[tuple[subprocess.Popen[str], Fleet]]:
    """Run one server process and yield it with the people who speak to it."""
    settings = make_settings(**changes)
    with started(settings) as process:
        server = Server(process, url_of(process))
        async with reaching(settings, sigstore, server) as (fleet,):
            yield process, fleet


async def ended(process: subprocess.Popen[str]) -> int:
    """Return how the process ended, which it does by itself."""
    return await asyncio.to_thread(process.wait, PROMPT_S)


async def told(process: subprocess.Popen[str], event: str) -> None:
    """Wait until the process logs the event."""

    def read() -> None:
        assert process.stderr is not None
        next(line for line in process.stderr if json.loads(line)["event"] == event)

    await asyncio.to_thread(read)


async def stops_listening(url: str) -> None:
    """Wait until a new connection is refused."""
    address = urlsplit(url)
    async with asyncio.timeout(PROMPT_S):
        while True:
            try:
                _, writer = await asyncio.open_connection(address.hostname, address.port)
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.02)


async def shows(fleet: Fleet, query: str, *arguments: object) -> None:
    """Wait until the database answers the query with true."""
    async with asyncio.timeout(PROMPT_S):
        for pause_s in itertools.repeat(0.02):
            if await fleet.pool.fetchval(query, *arguments):
                return
            await asyncio.sleep(pause_s)


@asynccontextmanager
async def uploading(runner: Runner, job: dict[str, Any]) -> AsyncIterator[tuple[Line, bytes]]:
    """Send half a bundle; yield the line and the other half."""
    files = {"lease_id": job["lease_id"].encode(), **runner.bundle(job)}
    body = form(*files.items())
    token = f"Authorization: Bearer {runner.token}"
    length = f"Content-Length: {len(body)}"
    path = f"/api/queue/{job['run_id']}/submit"
    async with line_to(runner.fleet.url) as line:
        start = head("POST", path, token, f"Content-Type: {FORM_TYPE}", length,
                     "Expect: 100-continue")  # fmt: skip
        await line.send(start)
        go_on = await line.answer()
        assert go_on is not None
        assert go_on.status_code == 100
        await line.send(body[:1000])
        yield line, body[1000:]


def ends_the_connection(answer: httpx.Response | None) -> bool:
    """Return whether there is an answer that tells its client to leave the connection."""
    return answer is not None and answer.headers.get("Connection") == "close"


@pytest.mark.gen_test
async def test_a_parked_claim_is_answered_at_once_and_may_be_sent_again_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    # It looks again all the time, so that the database soon shows it.
    often = {"drain_notice_s": LONG_S, "claim_recheck_s": 0.05}
    async with stage(make_settings, sigstore, **often) as (process, fleet):
        runner = await fleet.sign_on()
        parked = asyncio.create_task(runner.claim(wait_s=50))
        await shows(fleet, LOOKS)
        process.terminate()
        async with asyncio.timeout(PROMPT_S):
            answer = await parked
        assert (answer.status_code, answer.headers["Retry-After"]) == (204, "1")
        assert ends_the_connection(answer)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.gen_test
async def test_during_the_notice_all_but_claims_are_served_and_a_second_signal_ends_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, second: signal.Signals
) -> None:
    async with stage(make_settings, sigstore, drain_notice_s=LONG_S) as (process, fleet):
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        process.terminate()
        await told(process, "server.draining")
        ready = await fleet.http.get("/readyz")
        assert (ready.status_code, ready.json()["draining"]) == (503, True)
        assert ends_the_connection(ready)
        assert (await fleet.http.get("/healthz")).status_code == 200
        assert (await runner.heartbeat(job)).status_code == 200
        claim = await runner.claim(wait_s=50)
        assert code_of(claim) == (503, "draining")
        assert claim.json()["retryable"] is True
        assert int(claim.headers["Retry-After"]) > 0
        assert (await runner.submit(job)).status_code == 201
        process.send_signal(second)
        assert await ended(process) == -second


@pytest.mark.gen_test
async def test_a_bundle_that_is_arriving_is_taken_in_full_and_then_the_process_ends(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with stage(make_settings, sigstore) as (process, fleet):
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        async with uploading(runner, job) as (line, rest):
            process.terminate()
            await stops_listening(fleet.url)
            await line.send(rest)
            answer = await line.answer()
            assert answer is not None
            assert answer.status_code == 201, answer.text
            assert ends_the_connection(answer)
            assert await ended(process) == 0
        row = await fleet.row(run_id)
        assert (row["status"], row["result_sha256"]) == ("COMPLETE", answer.json()["result_sha256"])


@pytest.mark.gen_test
async def test_a_result_that_is_being_written_is_written_and_answered_for(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with stage(make_settings, sigstore) as (process, fleet):
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        async with fleet.transaction() as held:
            await held.execute("SELECT FROM run_queue WHERE run_id = $1 FOR UPDATE", run_id)
            submitting = asyncio.create_task(runner.submit(job))
            await fleet.until_blocked()  # verified, and inside its transaction
            process.terminate()
            await stops_listening(fleet.url)
        answer = await submitting
        assert (answer.status_code, ends_the_connection(answer)) == (201, True), answer.text
        assert await ended(process) == 0
        assert (await fleet.row(run_id))["status"] == "COMPLETE"


@pytest.mark.gen_test
async def test_a_kept_alive_connection_gets_one_more_answer_and_an_idle_one_holds_nothing_up(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with stage(make_settings, sigstore) as (process, fleet):
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        ask = head("GET", f"/api/queue/{job['run_id']}", f"Authorization: Bearer {runner.token}")
        async with (
            line_to(fleet.url) as kept,
            line_to(fleet.url) as idle,
            uploading(runner, job) as (line, rest),
        ):
            for each in (kept, idle):
                await each.send(ask)
                before = await each.answer()
                assert before is not None
                assert "Connection" not in before.headers
            process.terminate()
            await stops_listening(fleet.url)
            await kept.send(ask + ask)
            answer = await kept.answer()
            assert answer is not None
            assert answer.status_code == 200
            assert ends_the_connection(answer)
            assert await kept.answer() is None
            await line.send(rest)
            assert await line.answer() is not None
            assert await idle.answer() is None
            assert await ended(process) == 0


@pytest.mark.gen_test
async def test_an_answer_that_is_read_slowly_arrives_to_its_last_byte(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with stage(make_settings, sigstore) as (process, fleet):
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        await fleet.pool.execute(
            "UPDATE run_queue SET job = jsonb_set(job, '{config,large}', to_jsonb($2::text))"
            " WHERE run_id = $1", run_id, LARGE,
        )  # fmt: skip
        async with line_to(fleet.url) as line:
            await line.send(
                head("POST", "/api/queue/claim", f"Authorization: Bearer {runner.token}",
                     "Content-Type: application/json", "Content-Length: 2") + b"{}"
            )  # fmt: skip
            await shows(fleet, CLAIMED, run_id)
            process.terminate()
            await stops_listening(fleet.url)
            answer = await line.answer()
        assert answer is not None
        assert answer.json()["config"]["large"] == LARGE
        assert await ended(process) == 0


@pytest.mark.gen_test
async def test_a_request_that_never_ends_is_cut_after_the_longest_wait(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with stage(make_settings, sigstore, drain_s=0.3) as (process, fleet):
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        async with uploading(runner, await runner.take()) as (line, _):
            process.terminate()
            await told(process, "server.drain_cut")
            assert await line.answer() is None
            assert await ended(process) == 0
        assert (await fleet.row(run_id))["status"] == "CLAIMED"


@pytest.mark.gen_test
async def test_what_comes_when_nothing_is_in_flight_any_more_is_refused_before_it_is_begun(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        assert await fleet.services.in_flight.close(PROMPT_S) == 0
        answer = await runner.heartbeat(job)
        assert code_of(answer) == (503, "draining")
        assert ends_the_connection(answer)
        assert (await fleet.row(run_id))["status"] == "CLAIMED"


@pytest.mark.gen_test
async def test_a_request_that_comes_as_the_last_one_leaves_is_waited_for() -> None:
    in_flight = InFlight()
    in_flight.enter()
    closing = asyncio.create_task(in_flight.close(PROMPT_S))
    await asyncio.sleep(0)
    in_flight.leave()
    in_flight.enter()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not in_flight.closed
    in_flight.leave()
    assert await closing == 0
    assert in_flight.closed
