"""Two server processes on one PostgreSQL and one Redis: any of them takes any request."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import asyncpg
import httpx
import pytest

from broker.services import Services
from config.settings import PREFIX, Settings
from db.pool import open_pool
from sandbox.services.admin_token import new_token
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, code_of

MakeSettings = Callable[..., Settings]
ROOT = Path(__file__).parents[2]
# So long between sweeps that nothing but the listener's bell can bring one.
NEVER_S = 1000.0


@dataclass(frozen=True)
class Server:
    """A server process of ours and where it listens."""

    process: subprocess.Popen[str]
    url: str


@contextmanager
def serving(settings: Settings) -> Iterator[tuple[Server, Server]]:
    """Run `python server.py` twice and yield both once they listen; they are stopped in the end."""
    with started(settings) as a, started(settings) as b:
        yield Server(a, url_of(a)), Server(b, url_of(b))
    assert {a.returncode, b.returncode} <= {0, -signal.SIGKILL}


@contextmanager
def started(settings: Settings, launcher: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run one process, through `launcher` if given; SIGTERM it in the end, and wait."""
    with subprocess.Popen(
        [sys.executable, *launcher, "server.py"],
        cwd=ROOT,
        env={**os.environ, **environment_of(settings)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.communicate(timeout=30)
            finally:
                process.kill()  # or the end of `with` would wait for ever


def url_of(process: subprocess.Popen[str]) -> str:
    """Return where a process listens, as soon as it says so."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "server.listening":
            return f"http://127.0.0.1:{event['port']}"
    pytest.fail(f"the server ended before it listened: {said}")


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the variables that make a process read the same settings."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    given |= {
        "database_url": settings.database_url.get_secret_value(),
        "token_keys": settings.token_keys.get_secret_value(),
        "receipt_keys": settings.receipt_keys.get_secret_value(),
        "log_format": "json",
    }
    return {PREFIX + name.upper(): str(value) for name, value in given.items()}


@asynccontextmanager
async def reaching(
    settings: Settings, sigstore: ThrowawaySigstore, *servers: Server
) -> AsyncIterator[list[Fleet]]:
    """Yield a Fleet for each server process; its services are out of reach."""
    dsn = settings.database_url.get_secret_value()
    async with AsyncExitStack() as stack:
        pool: asyncpg.Pool = await stack.enter_async_context(open_pool(dsn, 4))
        token = await new_token(pool, "test")
        fleets = []
        for server in servers:
            http = httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False)
            await stack.enter_async_context(http)
            services = cast("Services", None)
            fleets.append(Fleet(http, services, pool, sigstore, token, server.url))
        yield fleets


@pytest.mark.gen_test
async def test_a_run_is_claimed_here_kept_alive_there_and_handed_in_here(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    with serving(settings) as (a, b):
        async with reaching(settings, sigstore, a, b) as (here, there):
            runner = await here.sign_on()
            run_id = await there.enqueue()
            job = await runner.take()
            assert (await runner.at(there).heartbeat(job)).json()["directive"] == "continue"
            assert (await runner.submit(job)).status_code == 201
            path = f"/api/queue/{run_id}"
            shown = await there.http.get(path, headers=runner.headers)
            assert shown.json()["status"] == "COMPLETE"
            assert shown.json()["receipt"]["run_id"] == run_id
            # A revocation told to one process holds at the other, at once.
            next_id = await here.enqueue()
            await there.revoke(runner)
            assert code_of(await runner.claim()) == (403, "key_revoked")
            assert (await here.row(next_id))["lease_seq"] == 0


@pytest.mark.gen_test
async def test_a_silent_runners_run_comes_back_by_the_bell_and_another_finishes_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(
        lease_ttl_s=3, heartbeat_interval_s=1, sweep_interval_s=NEVER_S, sweep_degraded_s=NEVER_S
    )
    with serving(settings) as (a, b):
        async with reaching(settings, sigstore, a, b) as (here, there):
            silent = await here.sign_on()
            other = (await here.sign_on("runner-b")).at(there)
            run_id = await here.enqueue()
            lost = await silent.take()
            async with here.rings() as rings:
                assert (await silent.heartbeat(lost)).status_code == 200
                waiting = asyncio.create_task(other.claim(wait_s=50))
                await rings.get()
            job = (await waiting).json()
            assert (job["run_id"], job["attempt"]) == (run_id, 2)
            assert [end["how"] for end in job["previous_attempts"]] == ["lapsed"]
            assert code_of(await silent.heartbeat(lost)) == (409, "lease_lost")
            assert (await other.submit(job)).status_code == 201
            assert code_of(await silent.submit(lost)) == (409, "already_complete")
            row = await here.row(run_id)
            assert (row["status"], row["attempt_count"]) == ("COMPLETE", 1)


@pytest.mark.gen_test
async def test_killing_the_process_that_gave_out_a_run_loses_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    with serving(settings) as (a, b):
        async with reaching(settings, sigstore, a, b) as (here, there):
            runner = await here.sign_on()
            run_id = await here.enqueue()
            claimed = await runner.claim(key="k")
            a.process.kill()
            a.process.wait()
            survivor = runner.at(there)
            # The answer may have been lost with the process: the claim is sent again.
            again = await survivor.claim(key="k")
            assert again.json()["lease_id"] == claimed.json()["lease_id"]
            assert (await survivor.heartbeat(again.json())).status_code == 200
            assert (await survivor.submit(again.json())).status_code == 201
            row = await there.row(run_id)
            assert (row["status"], row["lease_seq"]) == ("COMPLETE", 1)


@pytest.mark.gen_test
async def test_a_token_that_signed_off_here_claims_nothing_there_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """The other process took the token for good a moment ago, and remembers that for a second."""
    settings = make_settings()
    with serving(settings) as (a, b):
        async with reaching(settings, sigstore, a, b) as (here, there):
            for number in range(3):
                runner = await here.sign_on(f"runner-{number}")
                run_id = await here.enqueue()
                beside = runner.at(there)
                me = await there.http.get("/api/runners/me", headers=runner.headers)
                assert me.status_code == 200
                # Claims go on beside the sign-off: each is refused, or its lease is handed back.
                claims = [asyncio.create_task(beside.claim()) for _ in range(3)]
                left = await here.http.delete("/api/runners/me", headers=runner.headers)
                assert left.status_code == 200
                answers = [await beside.claim(), *await asyncio.gather(*claims)]
                assert code_of(answers[0]) == (401, "invalid_token")
                assert {answer.status_code for answer in answers} <= {200, 401, 409}
                row = await here.row(run_id)
                assert (row["status"], row["claimed_by"]) == ("PENDING", None)
                await here.cancel(run_id)
