"""What an admin does to a key, a runner or a run gets done, whatever the key's own traffic does."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any

import pytest

from config.settings import Settings
from db import runner_keys
from sandbox.runner.identity import Identity
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_two_processes import reaching, serving
from tests.support.fleet import AUDIENCE, CAPABILITIES, Fleet, Runner, code_of, open_fleet
from tests.support.raw_http import head, line_to

MakeSettings = Callable[..., Settings]
# So many statements of one process at a time that the locks they share never end all at once.
POOL = 30


def post(path: str, body: bytes, *headers: str) -> bytes:
    """Return a POST of JSON."""
    given = ("Content-Type: application/json", f"Content-Length: {len(body)}", *headers)
    return head("POST", path, *given) + body


def requests_of(runner: Runner, job: dict[str, Any]) -> dict[str, list[bytes]]:
    """Return what a key can send again and again, each with how it goes on, by name."""
    identity = Identity(runner.key, AUDIENCE, "gpu-1.example", CAPABILITIES)
    token = f"Authorization: Bearer {runner.token}"
    beat = json.dumps({"lease_id": job["lease_id"]}).encode()
    register = "/api/runners/register"
    return {
        "replayed": [post(register, identity.sign_registration())],
        "fresh": [post(register, identity.sign_registration()) for _ in range(50)],
        "claim": [post("/api/queue/claim", b"{}", token, "Idempotency-Key: again")],
        "beat": [post(f"/api/queue/{job['run_id']}/heartbeat", beat, token)],
    }


@asynccontextmanager
async def storm(
    runner: Runner, job: dict[str, Any], fleets: list[Fleet], connections: dict[str, int]
) -> AsyncIterator[None]:
    """Send a key's traffic over many connections to each process, until the block ends.

    The block begins once there were as many answers as there are connections.
    """
    requests = requests_of(runner, job)
    under_way = asyncio.Semaphore(0)

    async def send(url: str, lines: list[bytes]) -> None:
        async with line_to(url) as line:
            for request in cycle(lines):
                await line.send(request)
                assert await line.answer()
                under_way.release()

    async with asyncio.TaskGroup() as tasks:
        senders = [
            tasks.create_task(send(fleet.url, requests[name]))
            for fleet in fleets
            for name, count in connections.items()
            for _ in range(count)
        ]
        for _ in senders:
            await under_way.acquire()
        yield
        for sender in senders:
            sender.cancel()


@pytest.mark.gen_test(timeout=120)
@pytest.mark.parametrize(
    "connections", [{"replayed": 60}, {"replayed": 20, "fresh": 15, "claim": 20, "beat": 15}]
)
async def test_no_traffic_of_a_key_keeps_an_admin_from_revoking_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, connections: dict[str, int]
) -> None:
    settings = make_settings(database_pool_max=POOL)
    with serving(settings) as (a, b):
        async with reaching(settings, sigstore, a, b) as fleets:
            for n in range(3):
                runner = await fleets[0].sign_on(f"runner-{n}", max_leases=2)
                run_id = await fleets[0].enqueue()
                job = await runner.take()
                async with storm(runner, job, fleets, connections):
                    for path in (f"/runners/runner-{n}/pause", f"/queue/{run_id}/cancel"):
                        done = await fleets[1].admin("POST", path, json={"reason": "test"})
                        assert done.is_success, done.text
                    await fleets[1].revoke(runner)
                    assert code_of(await runner.claim()) == (403, "key_revoked")


@pytest.mark.gen_test
async def test_a_revocation_waits_for_the_locks_that_are_held_and_for_none_that_comes_later(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        async with fleet.transaction() as held:
            await runner_keys.find_for_share(held, runner.fingerprint)
            revoking = asyncio.create_task(fleet.revoke(runner))
            await fleet.until_blocked()
            later = asyncio.create_task(runner.claim())
            again = asyncio.create_task(runner.register())
            await fleet.until_blocked(3)
        await revoking
        assert code_of(await later) == (403, "key_revoked")
        assert code_of(await again) == (403, "key_revoked")
        assert (await fleet.row(run_id))["lease_seq"] == 0
