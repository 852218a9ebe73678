"""Rates: what one address and one runner may send, and that the others do not notice."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from broker.runners import shared_rates
from config.settings import Settings
from db import admin
from handlers import rates
from handlers.rates import BURST_S, CLIENTS_MAX, Rates
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import AUDIENCE, Fleet, code_of, open_fleet
from tests.support.raw_http import head, line_to

MakeSettings = Callable[..., Settings]
JSON_TYPE = "Content-Type: application/json"

# A token in two seconds: what is counted below does not fill again meanwhile.
SLOW = 0.5
BURST = int(SLOW * BURST_S)
ANONYMOUS = {
    "register": ("POST", "/api/runners/register"),
    "no such path": ("GET", "/wp-login.php"),
    "no such path, with a body": ("POST", "/x"),
    "method": ("PUT", "/api/queue/claim"),
    "no token": ("POST", "/api/queue/claim"),
    "metrics": ("GET", "/metrics"),
    "version": ("GET", "/api/version"),
    "ready": ("GET", "/readyz"),
    "errors": ("GET", "/errors"),
    "admin without a token": ("GET", "/api/admin/queue"),
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "DELAY_S", 0)


async def flood(fleet: Fleet, method: str, path: str, **headers: str) -> httpx.Response:
    """Send until the address is refused; return the refusal."""
    for _ in range(BURST + 1):
        answer = await fleet.http.request(method, path, headers=headers)
        if answer.status_code == 429:
            return answer
    raise AssertionError(f"{method} {path} was never refused")


@pytest.mark.gen_test
@pytest.mark.parametrize("kind", ANONYMOUS)
async def test_an_address_that_floods_is_refused_and_runners_and_admins_are_not(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    async with open_fleet(make_settings(anonymous_rate=SLOW), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        refused = await flood(fleet, *ANONYMOUS[kind])
        assert refused.json()["code"] == "rate_limited"
        assert 1 <= int(refused.headers["Retry-After"]) <= 2
        assert refused.headers["RateLimit-Policy"] == f'"client";q={BURST};w={int(BURST_S)}'
        assert refused.headers["RateLimit"].startswith('"client";r=0;t=')
        # Who has a good token is not counted, from the same address.
        assert (await runner.heartbeat(job)).status_code == 200
        assert (await fleet.admin("GET", "/queue")).status_code == 200
        # One that was not good before is refused before the database is asked.
        monkeypatch.setattr(admin, "find_token", None)
        wrong = {"Authorization": "Bearer bqa_" + "A" * 43}
        answer = await fleet.http.get("/api/admin/queue", headers=wrong)
        assert code_of(answer) == (429, "rate_limited")


@pytest.mark.gen_test
async def test_a_refusal_comes_late_so_that_a_flood_in_a_loop_is_slow(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "DELAY_S", 1234.5)
    async with open_fleet(make_settings(anonymous_rate=SLOW), sigstore) as fleet:
        slept: asyncio.Queue[float] = asyncio.Queue()
        sleep = asyncio.sleep

        async def noted(delay: float) -> None:
            if delay >= 1234.5:
                slept.put_nowait(delay)
            else:
                await sleep(delay)

        monkeypatch.setattr(asyncio, "sleep", noted)
        assert (await flood(fleet, "GET", "/x")).status_code == 429
        assert slept.qsize() == 1


@pytest.mark.gen_test
async def test_an_address_has_one_rate_over_all_processes(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_rates, "time", Clock())
    settings = make_settings(anonymous_rate=SLOW)
    async with open_fleet(settings, sigstore) as one, open_fleet(settings, sigstore) as other:
        for fleet in (one, other) * 2:
            assert (await fleet.http.get("/x")).status_code == 404
        for fleet in (one, other):
            answer = await fleet.http.get("/x")
            if fleet is other:
                assert code_of(answer) == (429, "rate_limited")
                assert 1 <= int(answer.headers["Retry-After"]) <= shared_rates.WINDOW_S
            else:
                assert answer.status_code == 404
        # Of the next window, and of each process while Redis is away: its own bucket decides.
        Clock.now += shared_rates.WINDOW_S
        assert (await other.http.get("/x")).status_code == 404
        monkeypatch.setattr(other.services.shared_rates, "_client", None)
        assert (await other.http.get("/x")).status_code == 404


class Clock:
    """Stands still within a window."""

    now = 1_000_000.0

    def time(self) -> float:
        return Clock.now

    def monotonic(self) -> float:
        return Clock.now


@pytest.mark.gen_test
async def test_another_address_is_not_refused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(anonymous_rate=SLOW, trusted_proxies="127.0.0.1")
    async with open_fleet(settings, sigstore) as fleet:
        await flood(fleet, "GET", "/x", **{"X-Forwarded-For": "2001:db8::1"})
        same = {"X-Forwarded-For": "2001:db8::2"}  # of the same /64
        assert (await fleet.http.get("/x", headers=same)).status_code == 429
        for other in ("2001:db8:0:1::1", "192.0.2.7"):
            answer = await fleet.http.get("/x", headers={"X-Forwarded-For": other})
            assert answer.status_code == 404


@pytest.mark.gen_test
async def test_a_runner_that_floods_is_refused_and_another_is_not(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(runner_rate=SLOW), sigstore) as fleet:
        one, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        refused = await flood(fleet, "GET", "/api/runners/me", **one.headers)
        assert code_of(refused) == (429, "rate_limited")
        assert "RateLimit" in refused.headers
        assert code_of(await one.claim()) == (429, "rate_limited")
        assert (await other.claim()).status_code == 204


@pytest.mark.gen_test
async def test_a_client_is_told_where_it_stands_before_it_is_refused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(anonymous_rate=SLOW), sigstore) as fleet:
        answer = await fleet.http.get("/api/version")
        assert answer.headers["RateLimit"].startswith(f'"client";r={BURST - 1};')


@pytest.mark.gen_test
async def test_metrics_may_want_a_token(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(metrics_token="of-prometheus")
    async with open_fleet(settings, sigstore) as fleet:
        for headers, expected in (
            ({}, (401, "missing_token")),
            ({"Authorization": "Bearer other"}, (401, "invalid_token")),
        ):
            answer = await fleet.http.get("/metrics", headers=headers)
            assert code_of(answer) == expected
        good = {"Authorization": "Bearer of-prometheus"}
        assert (await fleet.http.get("/metrics", headers=good)).status_code == 200
        assert settings.public_url == AUDIENCE


def test_a_bucket_fills_again_and_the_oldest_of_many_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(rates.time, "monotonic", lambda: now)
    buckets = Rates(2)
    standings = [buckets.take("a") for _ in range(21)]
    assert [each.wait_s for each in standings if each] == [0] * 20 + [0.5]
    now += 0.5
    again = buckets.take("a")
    assert again is not None
    assert again.wait_s == 0
    now += 1000
    full = buckets.take("a")
    assert full is not None
    assert full.remaining == 19
    for number in range(CLIENTS_MAX + 100):
        buckets.take(f"client-{number}")
    assert len(buckets._buckets) == CLIENTS_MAX


@pytest.mark.gen_test
async def test_a_request_whose_end_is_unclear_is_counted_as_well(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(anonymous_rate=SLOW), sigstore) as fleet:
        statuses = []
        for _ in range(BURST + 1):
            async with line_to(fleet.url) as line:
                await line.send(head("POST", "/api/queue/claim", "Content-Length: abc"))
                answer = await line.answer()
            assert answer is not None
            statuses.append(answer.status_code)
        assert statuses == [400] * BURST + [429]


@pytest.mark.gen_test
async def test_an_address_has_so_many_requests_in_flight_and_no_more(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "ANONYMOUS_MAX", 2)
    async with open_fleet(make_settings(anonymous_rate=100), sigstore) as fleet:
        runner = await fleet.sign_on()
        # Two registrations whose bodies do not come.
        register = head("POST", "/api/runners/register", JSON_TYPE, "Content-Length: 100")
        async with line_to(fleet.url) as one, line_to(fleet.url) as other:
            for line in (one, other):
                await line.send(register)
            async with asyncio.timeout(10):
                while fleet.services.in_flight.count < 2:  # noqa: ASYNC110 (nothing there to wait for)
                    await asyncio.sleep(0.001)
            refused = await fleet.http.get("/api/version")
            assert code_of(refused) == (429, "rate_limited")
            assert (await runner.claim()).status_code == 204
