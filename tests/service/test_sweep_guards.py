"""What keeps the sweep from ending leases for a fault of our own: the breaker, and blindness."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import asyncpg
import pytest
import redis.asyncio

from broker.leases import sweep as expiry
from broker.leases.lease_keys import LeaseKeys
from broker.leases.sweep import Breaker, Sweep
from config.settings import Settings
from sandbox.services import servers
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]
TTL_S = 300.0


class Clock:
    """The sweep's monotonic clock, which only the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(expiry, "time", SimpleNamespace(monotonic=lambda: self.now))


class Steps:
    """Lets a sweep's `run()` go round once at a time."""

    def __init__(self) -> None:
        self._idle = asyncio.Event()
        self._go = asyncio.Event()

    async def wait(self) -> None:
        """Stand in for the sweep's wait."""
        self._idle.set()
        await self._go.wait()
        self._go.clear()

    async def step(self) -> None:
        """Let one round run to its end."""
        await self._idle.wait()
        self._idle.clear()
        self._go.set()
        async with asyncio.timeout(30):
            await self._idle.wait()


@asynccontextmanager
async def sweeping(fleet: Fleet) -> AsyncIterator[Sweep]:
    """Yield a sweep that keeps its memory from pass to pass."""
    settings = fleet.services.settings
    async with redis.asyncio.from_url(settings.redis_lease_url) as client:
        keys = LeaseKeys(client)
        yield Sweep(fleet.pool, settings, keys, fleet.services.telemetry)
        await keys.flush()


async def hold_leases(fleet: Fleet, count: int) -> tuple[Runner, list[dict[str, str]]]:
    """Let one runner hold so many leases, all of them overdue."""
    runner = await fleet.sign_on(max_leases=count)
    for _ in range(count):
        await fleet.enqueue()
    jobs = [await runner.take() for _ in range(count)]
    for job in jobs:
        await fleet.overdue(job["run_id"])
    return runner, jobs


async def statuses(fleet: Fleet) -> list[str]:
    """Return the states of all runs, in their order."""
    rows = await fleet.pool.fetch("SELECT status FROM run_queue ORDER BY created_at")
    return [row["status"] for row in rows]


@asynccontextmanager
async def outage(postgres: servers.Postgres, fleet: Fleet) -> AsyncIterator[None]:
    """Cut every connection to the test's database and let nobody in."""
    name = await fleet.pool.fetchval("SELECT current_database()")
    connection = await asyncpg.connect(postgres.database_dsn("postgres"))
    try:
        await connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
        )
        yield
    finally:
        await connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await connection.close()


@pytest.mark.parametrize(
    ("live", "overdue", "holds"),
    [
        (0, 0, False),
        (3, 3, False),  # all, but no more than three
        (4, 4, True),
        (8, 4, False),  # half, but no more than half
        (7, 4, True),
        (1000, 500, False),
        (999, 500, True),
    ],
)
def test_the_breaker_holds_for_more_than_three_and_more_than_half(
    live: int, overdue: int, holds: bool
) -> None:
    assert Breaker(TTL_S).holds(live, overdue, 5.0) is holds


def test_the_breaker_holds_for_one_ttl_and_then_lets_go_for_as_long_as_it_takes() -> None:
    breaker = Breaker(TTL_S)
    assert breaker.holds(10, 10, 5.0)
    assert breaker.holds(10, 9, 5.0 + TTL_S - 0.001)
    assert not breaker.holds(10, 10, 5.0 + TTL_S)
    assert not breaker.holds(10, 10, 5.0 + 5 * TTL_S)


def test_the_breaker_gives_each_disaster_a_ttl_of_its_own() -> None:
    breaker = Breaker(TTL_S)
    assert breaker.holds(10, 10, 0.0)
    assert not breaker.holds(10, 10, TTL_S)
    assert not breaker.holds(10, 1, TTL_S + 1)
    assert breaker.holds(10, 10, TTL_S + 2)
    assert breaker.holds(10, 10, 2 * TTL_S + 1)
    assert not breaker.holds(10, 10, 2 * TTL_S + 2)


@pytest.mark.gen_test
async def test_a_mass_expiry_waits_for_one_ttl_and_is_swept_then(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    clock = Clock(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet, sweeping(fleet) as sweep:
        await hold_leases(fleet, 4)
        assert await sweep.run_once() == 0
        clock.now += TTL_S - 0.001
        assert await sweep.run_once() == 0
        assert await statuses(fleet) == ["CLAIMED"] * 4
        clock.now += 0.001
        assert await sweep.run_once() == 4
        assert await statuses(fleet) == ["PENDING"] * 4


@pytest.mark.gen_test
async def test_runners_that_are_heard_while_the_breaker_holds_keep_their_leases(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet, sweeping(fleet) as sweep:
        runner, jobs = await hold_leases(fleet, 4)
        assert await sweep.run_once() == 0
        for job in jobs[:3]:
            assert (await runner.heartbeat(job)).status_code == 200
        # One of four is an ordinary lapse again, so it need not wait any longer.
        assert await sweep.run_once() == 1
        assert await statuses(fleet) == ["IN_PROGRESS"] * 3 + ["PENDING"]


@pytest.mark.gen_test
async def test_a_database_outage_blinds_the_sweep_until_two_healthy_heartbeat_intervals(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    postgres: servers.Postgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet_sweep(monkeypatch)
    clock, steps = Clock(monkeypatch), Steps()
    settings = make_settings(heartbeat_interval_s=30)
    async with open_fleet(settings, sigstore) as fleet, sweeping(fleet) as sweep:
        monkeypatch.setattr(sweep, "_wait", steps.wait)
        running = asyncio.create_task(sweep.run(lambda: None))
        await hold_leases(fleet, 1)
        async with outage(postgres, fleet):
            await steps.step()
            clock.now += 50
            await steps.step()  # still away: the two intervals begin anew
        clock.now += 59.999
        await steps.step()
        assert await statuses(fleet) == ["CLAIMED"]
        clock.now += 0.001
        await steps.step()
        assert await statuses(fleet) == ["PENDING"]
        running.cancel()
        await asyncio.wait([running])


@pytest.mark.gen_test
async def test_a_row_that_is_locked_for_too_long_fails_a_pass_but_blinds_nobody(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    Clock(monkeypatch)
    steps = Steps()
    async with open_fleet(make_settings(), sigstore) as fleet, sweeping(fleet) as sweep:
        monkeypatch.setattr(sweep, "_wait", steps.wait)
        running = asyncio.create_task(sweep.run(lambda: None))
        await hold_leases(fleet, 1)
        async with fleet.transaction() as connection:
            await connection.execute("LOCK TABLE attempts")
            await steps.step()
            assert await statuses(fleet) == ["CLAIMED"]
        await steps.step()
        assert await statuses(fleet) == ["PENDING"]
        running.cancel()
        await asyncio.wait([running])
