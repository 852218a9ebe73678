"""The listener: an expired key in Redis brings the sweep at once, and is never believed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio

from broker import expiry
from broker.expiry import ExpiryListener, Sweep
from broker.lease_keys import LeaseKeys
from config.settings import Settings
from db.pool import open_pool
from sandbox import servers
from sandbox.sigstore_instance import ThrowawaySigstore
from tests.fleet import open_fleet

MakeSettings = Callable[..., Settings]
# The sweep runs by itself after this: never, so that only the bell can bring it.
NEVER_S = 1000.0


class Bell(Sweep):
    """A sweep whose rings a test can wait for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.rings: asyncio.Queue[None] = asyncio.Queue()

    def ring(self) -> None:
        self.rings.put_nowait(None)


@asynccontextmanager
async def listening(settings: Settings) -> AsyncIterator[tuple[ExpiryListener, Bell, Any]]:
    """Yield a listener that runs, the bell it rings, and a Redis client beside it."""
    dsn = settings.database_url.get_secret_value()
    async with (
        open_pool(dsn, 2) as pool,
        redis.asyncio.from_url(settings.redis_lease_url) as client,
        redis.asyncio.from_url(settings.redis_lease_url) as beside,
    ):
        bell = Bell(pool, settings, LeaseKeys(client))
        listener = ExpiryListener(client, bell)
        running = asyncio.create_task(listener.run())
        try:
            yield listener, bell, beside
        finally:
            running.cancel()
            await asyncio.wait([running])


@pytest.mark.gen_test
async def test_the_listener_sweeps_when_it_subscribes_and_proves_that_it_hears(
    make_settings: MakeSettings,
) -> None:
    async with listening(make_settings()) as (listener, bell, _):
        assert bell.degraded
        await bell.rings.get()
        await listener.healthy.wait()
        assert not bell.degraded


@pytest.mark.gen_test
async def test_the_listener_rings_for_lease_keys_only(make_settings: MakeSettings) -> None:
    async with listening(make_settings()) as (listener, bell, client):
        await listener.healthy.wait()
        while not bell.rings.empty():
            bell.rings.get_nowait()
        channel = "__keyevent@1__:expired"
        await client.publish(channel, "somebody-elses:key")
        await client.publish(channel, b"\xff\xfe")
        await client.publish(channel, "lease:x:1")
        await bell.rings.get()
        assert bell.rings.empty()
        await client.set("lease:y:1", 1, px=1)
        await bell.rings.get()


@pytest.mark.gen_test
async def test_the_listener_sweeps_again_when_it_had_to_reconnect(
    make_settings: MakeSettings,
) -> None:
    async with listening(make_settings()) as (listener, bell, client):
        await bell.rings.get()
        await listener.healthy.wait()
        await bell.rings.get()
        await client.client_kill_filter(_type="pubsub")
        await bell.rings.get()


@pytest.mark.gen_test
async def test_the_listener_outlives_redis_and_says_when_it_hears_nothing(
    make_settings: MakeSettings,
) -> None:
    with servers.redis() as server:
        settings = make_settings(redis_lease_url=server.url(1))
        async with listening(settings) as (listener, bell, _):
            await listener.healthy.wait()
            lost = asyncio.Event()
            mark = listener._mark

            def spy(*, healthy: bool) -> None:
                mark(healthy=healthy)
                if not healthy:
                    lost.set()

            listener._mark = spy  # type: ignore[method-assign]
            server.kill()
            await lost.wait()
            assert bell.degraded
            server.restart()
            await listener.healthy.wait()
            assert not bell.degraded


@pytest.mark.gen_test
async def test_a_redis_that_tells_of_nothing_is_named_with_the_fix(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    class Log:
        def warning(self, event: str, **facts: Any) -> None:
            said.put_nowait((event, facts))

    monkeypatch.setattr(expiry, "log", Log())
    monkeypatch.setattr(expiry, "SELF_TEST_S", 0.3)
    with servers.redis(notify="") as server:
        async with listening(make_settings(redis_lease_url=server.url(1))) as (_, bell, _beside):
            event, facts = await said.get()
            assert event == "listener.deaf"
            assert "CONFIG SET notify-keyspace-events Ex" in facts["fix"]
            assert bell.degraded


@pytest.mark.gen_test
async def test_an_expired_key_brings_the_sweep_and_is_not_believed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: asyncio.Queue[int] = asyncio.Queue()
    run_once = Sweep.run_once

    async def spy(self: Sweep) -> int:
        ended = await run_once(self)
        swept.put_nowait(ended)
        return ended

    monkeypatch.setattr(Sweep, "run_once", spy)
    settings = make_settings(sweep_interval_s=NEVER_S, sweep_degraded_s=NEVER_S)
    async with (
        open_fleet(settings, sigstore) as fleet,
        redis.asyncio.from_url(settings.redis_lease_url) as client,
    ):
        runner = await fleet.sign_on(max_leases=2)
        live, silent = await fleet.enqueue(), await fleet.enqueue()
        job = await runner.take()
        await runner.take()
        # The key of a live lease expires; the overdue lease's does not. The database knows better.
        await fleet.overdue(silent)
        await client.set(f"lease:{job['queue_id']}:1", 1, px=1)
        async with asyncio.timeout(10):
            while await swept.get() == 0:
                continue
        assert (await fleet.row(live))["status"] == "CLAIMED"
        assert (await fleet.row(silent))["status"] == "PENDING"


@pytest.mark.gen_test
async def test_without_redis_the_sweep_alone_ends_what_is_overdue(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    with servers.redis() as server:
        settings = make_settings(
            redis_lease_url=server.url(1), sweep_interval_s=0.05, sweep_degraded_s=0.05
        )
        async with open_fleet(settings, sigstore) as fleet:
            runner = await fleet.sign_on()
            run_id = await fleet.enqueue()
            job = await runner.take()
            server.kill()
            assert (await runner.heartbeat(job)).status_code == 200
            async with fleet.rings() as rings:
                await fleet.overdue(run_id)
                await rings.get()
            assert (await fleet.row(run_id))["status"] == "PENDING"


@pytest.mark.gen_test
async def test_the_sweep_outlives_the_loss_of_its_database_connections(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    # After an outage the sweep waits two heartbeat intervals: here 2 s.
    settings = make_settings(
        sweep_interval_s=0.05, sweep_degraded_s=0.05, heartbeat_interval_s=1, lease_ttl_s=3
    )
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        await runner.take()
        await fleet.cut_database()
        async with fleet.rings() as rings:
            await fleet.overdue(run_id)
            await rings.get()
        assert (await fleet.row(run_id))["status"] == "PENDING"
