"""The listener: an expired key in Redis brings the sweep at once, and is never believed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
import redis.asyncio
from structlog.testing import capture_logs

from broker.concurrency.cancel import cancel
from broker.leases import expiry_listener, expiry_node
from broker.leases.expiry_listener import ExpiryListener
from broker.leases.expiry_node import ExpiryNode
from broker.leases.lease_keys import LeaseKeys
from broker.leases.redis_topology import open_topology
from broker.leases.sweep import Sweep
from broker.telemetry import Telemetry
from config.settings import Settings
from db.pool import open_pool
from sandbox.services import servers
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import open_fleet

MakeSettings = Callable[..., Settings]
# The sweep runs by itself after this: never, so that only the bell can bring it.
NEVER_S = 1000.0


class Bell(Sweep):
    """A sweep whose rings a test can wait for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.rings: asyncio.Queue[None] = asyncio.Queue()

    def notify(self) -> None:
        self.rings.put_nowait(None)

    def silence(self) -> None:
        """Forget the rings so far."""
        while not self.rings.empty():
            self.rings.get_nowait()


@asynccontextmanager
async def listening(settings: Settings) -> AsyncIterator[tuple[ExpiryListener, Bell, Any]]:
    """Yield a listener that runs, the bell it rings, and the client that the service uses."""
    topology = open_topology(settings.redis_lease_url)
    async with open_pool(settings.database_url.get_secret_value(), 2) as pool:
        bell = Bell(pool, settings, LeaseKeys(topology.client), Telemetry("test"))
        listener = ExpiryListener(topology, bell)
        running = asyncio.create_task(listener.run(lambda: None))
        try:
            yield listener, bell, topology.client
        finally:
            await cancel(running)
            await topology.close()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[tuple[str, dict[str, Any]]]:
    """What the listener warns of."""
    warnings: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    class Log:
        def warning(self, event: str, **facts: Any) -> None:
            warnings.put_nowait((event, facts))

    monkeypatch.setattr(expiry_node, "log", Log())
    return warnings


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the self-test be repeated at once, and fail fast."""
    monkeypatch.setattr(expiry_node, "PROVE_EVERY_S", 0.1)
    monkeypatch.setattr(expiry_node, "SELF_TEST_S", 0.5)
    monkeypatch.setattr(expiry_node, "BACKOFF_MAX_S", 0.2)


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
        bell.silence()
        channel = "__keyevent@1__:expired"
        await client.publish(channel, "somebody-elses:key")
        await client.publish(channel, b"\xff\xfe")
        await client.publish(channel, "lease:x:1")
        await bell.rings.get()
        assert bell.rings.empty()
        await client.set("lease:y:1", 1, px=1)
        await bell.rings.get()


@pytest.mark.gen_test
async def test_the_listener_sweeps_and_proves_itself_again_when_it_had_to_reconnect(
    make_settings: MakeSettings,
) -> None:
    async with listening(make_settings()) as (listener, bell, client):
        await listener.healthy.wait()
        bell.silence()
        await client.client_kill_filter(_type="pubsub")
        await listener.degraded.wait()
        await bell.rings.get()
        await listener.healthy.wait()


@pytest.mark.gen_test
async def test_the_listener_outlives_redis(make_settings: MakeSettings) -> None:
    with servers.redis() as server:
        settings = make_settings(redis_lease_url=server.url(1))
        async with listening(settings) as (listener, bell, client):
            await listener.healthy.wait()
            server.kill()
            await listener.degraded.wait()
            assert bell.degraded
            server.restart()
            await listener.healthy.wait()
            assert not bell.degraded
            bell.silence()
            await client.set("lease:y:1", 1, px=1)
            await bell.rings.get()


@pytest.mark.gen_test
async def test_a_node_that_nobody_listens_to_any_more_is_noticed_and_replaced(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry_listener, "LOOK_S", 0.01)
    monkeypatch.setattr(expiry_listener, "LOOK_DEGRADED_S", 0.01)
    listen, ends = ExpiryNode.run, asyncio.Queue[None]()

    async def run_until_it_ends(self: ExpiryNode) -> None:
        listens = asyncio.create_task(listen(self))
        try:
            await ends.get()
        finally:
            await cancel(listens)
        raise RuntimeError("boom")

    monkeypatch.setattr(ExpiryNode, "run", run_until_it_ends)
    with capture_logs() as logs:
        async with asyncio.timeout(20), listening(make_settings()) as (listener, _, _):
            await listener.healthy.wait()
            ends.put_nowait(None)
            await listener.degraded.wait()
            await listener.healthy.wait()
    ended = [line for line in logs if line["event"] == "listener.node_ended"]
    assert [line["problem"] for line in ended] == ["RuntimeError: boom"]


@pytest.mark.gen_test
async def test_a_restart_that_loses_the_notification_setting_is_noticed_when_we_reconnect(
    make_settings: MakeSettings, said: asyncio.Queue[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry_node, "SELF_TEST_S", 0.3)
    with servers.redis(notify="") as server:
        async with redis.asyncio.from_url(server.url(0)) as operator:
            await operator.config_set("notify-keyspace-events", "Ex")
        async with listening(make_settings(redis_lease_url=server.url(1))) as (
            listener,
            _,
            _beside,
        ):
            await listener.healthy.wait()
            server.kill()
            server.restart()
            event, facts = await said.get()
            while event != "listener.deaf":
                event, facts = await said.get()
            assert "Redis was restarted" in facts["cause"]
            assert "redis.conf" in facts["fix"]
            assert listener.degraded.is_set()


@pytest.mark.gen_test
async def test_a_redis_that_tells_of_nothing_is_named_with_the_fix(
    make_settings: MakeSettings, said: asyncio.Queue[Any], often: None
) -> None:
    with servers.redis(notify="") as server:
        async with listening(make_settings(redis_lease_url=server.url(1))) as (_, bell, _beside):
            event, facts = await said.get()
            assert event == "listener.deaf"
            assert "CONFIG SET notify-keyspace-events Ex" in facts["fix"]
            assert "cause" not in facts
            assert bell.degraded


@pytest.mark.gen_test
async def test_notifications_that_are_switched_off_are_noticed_and_so_is_their_return(
    make_settings: MakeSettings, said: asyncio.Queue[Any], often: None
) -> None:
    with servers.redis() as server:
        async with listening(make_settings(redis_lease_url=server.url(1))) as (
            listener,
            bell,
            client,
        ):
            await listener.healthy.wait()
            await client.config_set("notify-keyspace-events", "")
            await listener.degraded.wait()
            assert bell.degraded
            assert (await said.get())[0] == "listener.deaf"
            bell.silence()
            await bell.rings.get()  # subscribed again, in vain...
            await bell.rings.get()  # ...and once more
            await client.config_set("notify-keyspace-events", "Ex")
            await listener.healthy.wait()
            assert said.empty()  # one complaint, however many attempts


@pytest.mark.gen_test
async def test_a_channel_that_is_denied_is_named_with_the_fix_and_asked_for_again(
    make_settings: MakeSettings, said: asyncio.Queue[Any], often: None
) -> None:
    with servers.redis() as server:
        async with listening(make_settings(redis_lease_url=server.url(1))) as (
            listener,
            bell,
            client,
        ):
            await listener.healthy.wait()
            await client.execute_command("ACL", "SETUSER", "default", "resetchannels")
            event, facts = await said.get()
            assert event == "listener.denied"
            assert "'&__keyevent@1__:expired'" in facts["fix"]
            assert bell.degraded
            await client.execute_command("ACL", "SETUSER", "default", "&__keyevent@1__:expired")
            await listener.healthy.wait()


@pytest.mark.gen_test
async def test_a_redis_that_hangs_is_noticed_and_heals(
    make_settings: MakeSettings, often: None
) -> None:
    with servers.redis() as server:
        async with listening(make_settings(redis_lease_url=server.url(1))) as (
            listener,
            bell,
            client,
        ):
            await listener.healthy.wait()
            server.pause()
            try:
                await listener.degraded.wait()
                assert bell.degraded
            finally:
                server.resume()
            await listener.healthy.wait()
            bell.silence()
            await client.set("lease:y:1", 1, px=1)
            await bell.rings.get()


@pytest.mark.gen_test
async def test_a_listener_that_reconnects_to_a_redis_that_hangs_can_be_ended(
    make_settings: MakeSettings, often: None
) -> None:
    with servers.redis() as server:
        settings = make_settings(redis_lease_url=server.url(1))
        async with listening(settings) as (listener, _, _client):
            await listener.healthy.wait()
            server.pause()
            await listener.degraded.wait()
        server.resume()


@pytest.mark.gen_test
async def test_a_flush_that_takes_the_self_tests_key_is_no_reason_to_complain(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, said: asyncio.Queue[Any]
) -> None:
    monkeypatch.setattr(expiry_node, "SELF_TEST_PX", 60_000)  # only the flush can take it
    with servers.redis() as server:
        settings = make_settings(redis_lease_url=server.url(1))
        async with redis.asyncio.from_url(server.url(1)) as beside, beside.pubsub() as watcher:
            await beside.config_set("notify-keyspace-events", "Exg$")
            await watcher.subscribe("__keyevent@1__:set")
            await watcher.get_message(timeout=None)
            async with listening(settings) as (listener, _, _client):
                await watcher.get_message(timeout=None)
                monkeypatch.setattr(expiry_node, "SELF_TEST_PX", 50)
                await beside.flushall()
                await listener.healthy.wait()
                assert said.empty()


@pytest.mark.gen_test
async def test_lease_keys_that_are_evicted_end_no_lease_and_come_back_with_the_next_beat(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    with servers.redis() as server:
        settings = make_settings(redis_lease_url=server.url(1))
        async with (
            open_fleet(settings, sigstore) as fleet,
            redis.asyncio.from_url(server.url(1)) as client,
            listening(settings) as (listener, bell, _),
        ):
            runner = await fleet.sign_on()
            run_id = await fleet.enqueue()
            job = await runner.take()
            await listener.healthy.wait()
            bell.silence()
            await client.config_set("maxmemory-policy", "allkeys-random")
            await client.config_set("maxmemory", "1")
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                await client.set("filler", 1)  # evicts all there is, in vain
            assert await client.dbsize() == 0
            assert bell.rings.empty()
            assert (await fleet.row(run_id))["status"] == "CLAIMED"
            await client.config_set("maxmemory", "0")
            assert (await runner.heartbeat(job)).status_code == 200
            await fleet.services.heartbeats._keys.flush()
            assert await client.keys("lease:*") == [f"lease:{job['queue_id']}:1".encode()]


@pytest.mark.gen_test
async def test_an_expired_key_brings_the_sweep_and_is_not_believed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: asyncio.Queue[int] = asyncio.Queue()
    run_once = Sweep.run_once

    async def spy(self: Sweep, noticed_by: Literal["expiry_event", "interval"]) -> int:
        ended = await run_once(self, noticed_by)
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
        await fleet.services.heartbeats._keys.flush()  # or it would be written after this one
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
