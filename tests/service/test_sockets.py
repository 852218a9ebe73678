"""Sockets: whoever opens thousands of them takes none from the others, nor from the service."""

import errno
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

import server
from config import descriptors
from config.settings import Settings, SettingsRefused, load_settings
from handlers import connections
from handlers.addresses import Proxies, client_of
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_slow_lines import server_of, until
from tests.service.test_two_processes import Server as Process
from tests.service.test_two_processes import reaching, started
from tests.support.fleet import open_fleet
from tests.support.raw_http import Line, head, line_to

MakeSettings = Callable[..., Settings]
HEALTHZ = head("GET", "/healthz")
# Soft and hard limit of a process, set before the server begins.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
os.execv(sys.executable, [sys.executable, sys.argv[3]])
"""


def limited(soft: int, hard: int) -> list[str]:
    """What starts a server that may open so many files."""
    return ["-c", LIMITED, str(soft), str(hard)]


async def healthy(line: Line) -> bool:
    """Whether a request on this connection is answered."""
    await line.send(HEALTHZ)
    answer = await line.answer()
    return answer is not None and answer.status_code == 200


@asynccontextmanager
async def idle(url: str, count: int, host: str) -> AsyncIterator[list[Line]]:
    """Hold so many connections from an address, on which nothing is asked."""
    async with AsyncExitStack() as lines:
        yield [await lines.enter_async_context(line_to(url, host)) for _ in range(count)]


@pytest.mark.gen_test(timeout=60)
async def test_more_idle_connections_than_there_are_descriptors_stop_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(connections_per_address=0, log_level="info")
    with started(settings, limited(256, 400)) as process:
        assert process.stderr is not None
        first = next(json.loads(line) for line in process.stderr if "server.listening" in line)
        fit = first["connections_max"]
        assert (fit, first["runners_fit"]) == (descriptors_left(settings, 400), fit // 2)
        url = f"http://127.0.0.1:{first['port']}"
        async with (
            reaching(settings, sigstore, Process(process, url)) as [fleet],
            idle(url, 3 * fit, "127.0.0.2"),
        ):
            runner = await fleet.sign_on()
            await fleet.enqueue()
            job = await runner.take()
            assert (await runner.heartbeat(job)).status_code == 200
        process.terminate()
        said = [line for line in process.stderr if "http.request" not in line]
    assert not [line for line in said if "Traceback" in line or "ERRNO" in line.upper()]
    assert len(said) < 20
    assert process.returncode == 0


def descriptors_left(settings: Settings, limit: int) -> int:
    """How many connections fit into a limit."""
    own = descriptors.OWN + settings.database_pool_max + 5 * settings.uploads_max
    return limit - own - 2 * settings.verify_processes


def test_a_process_that_may_open_too_few_files_does_not_start(make_settings: MakeSettings) -> None:
    with started(make_settings(), limited(256, 256)) as process:
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 1
    assert "may open 256 files" in said
    assert "LimitNOFILE=" in said
    assert "Traceback" not in said


@pytest.mark.gen_test
async def test_more_parked_claims_than_connections_are_answered_and_others_get_through(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "connections_max", lambda settings: 10)
    async with open_fleet(make_settings(), sigstore) as fleet, AsyncExitStack() as lines:
        runner = await fleet.sign_on(max_leases=2)
        await fleet.enqueue()
        job = await runner.take()
        body = b'{"wait_s": 50}'
        claim = head("POST", "/api/queue/claim", f"Authorization: Bearer {runner.token}",
                     "Content-Type: application/json", f"Content-Length: {len(body)}")  # fmt: skip
        parked = []
        for _ in range(9):
            line = await lines.enter_async_context(line_to(fleet.url))
            await line.send(claim + body)
            parked.append(line)
        await until(lambda: len(fleet.services.claims.parked) == 9)
        for _ in range(3):
            line = await lines.enter_async_context(line_to(fleet.url))
            await line.send(claim + body)
            answer = await line.answer()
            assert answer is not None
            assert answer.status_code == 204, "nobody else may wait"
            assert int(answer.headers["Retry-After"]) > 0
        assert (await runner.heartbeat(job)).status_code == 200
        assert len(server_of(fleet).streams) <= 10


@pytest.mark.gen_test
async def test_one_address_has_its_share_of_the_connections_and_no_more(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(connections_per_address=3), sigstore) as fleet:
        async with idle(fleet.url, 3, "127.0.0.2") as held:
            async with idle(fleet.url, 2, "127.0.0.2") as beyond:
                for line in beyond:
                    assert await line.answer() is None
            assert [await healthy(line) for line in held] == [True] * 3
            async with idle(fleet.url, 1, "127.0.0.3") as [other]:
                assert await healthy(other)
        await until(lambda: len(server_of(fleet).streams) <= 1)
        async with idle(fleet.url, 3, "127.0.0.2") as again:
            assert [await healthy(line) for line in again] == [True] * 3
        metrics = (await fleet.http.get("/metrics")).text
        assert 'turned_away_total{reason="too_many_of_one_address"} 2.0' in metrics


@pytest.mark.gen_test
async def test_a_trusted_proxy_passes_many_clients_on(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(connections_per_address=1, trusted_proxies="127.0.0.2, 10.0.0.0/8")
    async with open_fleet(settings, sigstore) as fleet, idle(fleet.url, 3, "127.0.0.2") as lines:
        assert [await healthy(line) for line in lines] == [True] * 3


@pytest.mark.gen_test
async def test_the_connection_that_was_idle_for_longest_makes_room(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "connections_max", lambda settings: 3)
    async with (
        open_fleet(make_settings(), sigstore) as fleet,
        idle(fleet.url, 3, "127.0.0.2") as [first, second, third],
    ):
        assert await healthy(second)
        assert await healthy(first)
        async with idle(fleet.url, 1, "127.0.0.3") as [newcomer]:
            assert await healthy(newcomer)
            assert await third.answer() is None
            assert await healthy(first)
            assert await healthy(second)


class Exhausted(socket.socket):
    """A listening socket whose process has no descriptors left, for a while."""

    tries = 0
    error: int | None = errno.EMFILE

    def accept(self) -> Any:
        self.tries += 1
        if self.error is not None:
            raise OSError(self.error, "exhausted")
        return super().accept()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
@pytest.mark.gen_test
async def test_accept_rests_when_it_cannot_and_goes_on_when_it_can(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch,
    error: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(connections, "REST_S", 0.05)
    monkeypatch.setattr(connections, "PATROL_S", 10_000)
    listening = Exhausted()
    listening.error = error
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    listening.setblocking(False)
    with capture_logs() as logs:
        async with open_fleet(make_settings(), sigstore) as fleet:
            server_of(fleet).add_sockets([listening])
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with line_to(url) as line:
                await line.send(HEALTHZ)
                await until(lambda: listening.tries >= 3)
                # Meanwhile, who is connected is served, and those who come are not lost.
                assert (await fleet.http.get("/healthz")).status_code == 200
                server_of(fleet).look(0)
                server_of(fleet).look(30)
                listening.error = None
                answer = await line.answer()
                assert answer is not None
                assert answer.status_code == 200
    told = [log for log in logs if log["event"] == "http.turned_away"]
    assert [3 <= log[errno.errorcode[error]] < 30 for log in told] == [True], "one line, no spin"
    assert not [log for log in logs if log["log_level"] == "error"]


def test_a_client_is_counted_by_its_address_or_its_network() -> None:
    told = {
        "203.0.113.7": "203.0.113.7",
        "::ffff:203.0.113.7": "203.0.113.7",
        "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
        "2001:db8:1:2::9": "2001:db8:1:2::/64",
        "fe80::1%eth0": "fe80::/64",
        "unix": "unix",
    }
    assert {address: client_of(address) for address in told} == told


def test_a_proxy_is_trusted_by_its_network_only(make_settings: MakeSettings) -> None:
    proxies = Proxies(make_settings(trusted_proxies="127.0.0.1,10.0.0.0/8,fd00::/8").proxy_networks)
    trusted = ("127.0.0.1", "::ffff:127.0.0.1", "10.9.8.7", "fd12::1", "fd12::1%eth0")
    assert all(map(proxies.trusts, trusted))
    assert not any(map(proxies.trusts, ("127.0.0.2", "11.0.0.1", "fe80::1", "unix", "")))
    assert not Proxies([]).trusts("127.0.0.1")


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),  # anybody can send the header
        ("127.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("127.0.0.1", "198.51.100.1, 203.0.113.9", "203.0.113.9"),  # the first one is its claim
        ("127.0.0.1", "198.51.100.1, 10.1.2.3", "198.51.100.1"),  # by two proxies
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "unknown", "127.0.0.1"),
        ("127.0.0.1", "198.51.100.1, unknown", "127.0.0.1"),
        ("127.0.0.1", "2001:db8::1", "2001:db8::1"),
    ],
)
def test_a_clients_address_is_what_trusted_proxies_say(
    make_settings: MakeSettings, peer: str, forwarded: str, client: str
) -> None:
    proxies = Proxies(make_settings(trusted_proxies="127.0.0.1, 10.0.0.0/8").proxy_networks)
    assert proxies.client_behind(peer, forwarded) == client


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("trusted", "recorded"), [("127.0.0.1", "198.51.100.7"), ("", "127.0.0.1")]
)
async def test_the_audit_has_the_address_behind_a_trusted_proxy(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, trusted: str, recorded: str
) -> None:
    async with open_fleet(make_settings(trusted_proxies=trusted), sigstore) as fleet:
        await fleet.sign_on()
        asked = {"X-Forwarded-For": "198.51.100.7"}
        body = {"reason": "test"}
        await fleet.admin("POST", "/runners/runner-a/pause", json=body, headers=asked)
        found = await fleet.pool.fetchval("SELECT address FROM audit WHERE action = 'runner.pause'")
        assert found == recorded


def test_a_network_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsRefused, match=r"TRUSTED_PROXIES: 10\.0\.0\.1/8 is neither"):
        load_settings(trusted_proxies="127.0.0.1, 10.0.0.1/8")
