"""Sentinel and Cluster: every node that may expire a lease key is heard, whoever that is now."""

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import redis.asyncio

from auth.tokens import RunnerIdentity
from broker.leases import expiry_listener, expiry_node
from broker.leases.expiry_listener import ExpiryListener
from broker.leases.lease_keys import LeaseKey, LeaseKeys
from broker.leases.redis_topology import RedisUrlRefused, open_topology
from broker.runners import revocations as revocation
from broker.runners.revocations import Revocations, Revoked
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import ServerRefused, open_services
from tests.service.test_expiry_listener import listening
from tests.support import redis_nodes
from tests.support.fleet import open_fleet
from tests.support.redis_nodes import Node

MakeSettings = Callable[..., Settings]
NOBODY = "127.0.0.1:1"


class NoAuthority:
    """An authority that a test must not need."""

    async def revoked_among(self, asked: Sequence[RunnerIdentity]) -> list[bool]:
        raise AssertionError("Redis did not answer")

    async def all_revocations(self) -> list[Revoked]:
        return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """A Cluster of three primaries, for the tests that leave it as it is."""
    with redis_nodes.cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the self-test and the look at the primaries be repeated at once."""
    monkeypatch.setattr(expiry_node, "PROVE_EVERY_S", 0.1)
    monkeypatch.setattr(expiry_node, "SELF_TEST_S", 0.5)
    monkeypatch.setattr(expiry_node, "BACKOFF_MAX_S", 0.2)
    monkeypatch.setattr(expiry_listener, "LOOK_DEGRADED_S", 0.2)


def cluster_url(nodes: list[Node]) -> str:
    """The URL of a Cluster, by all its nodes."""
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


@pytest.mark.parametrize("planned", [False, True], ids=["killed", "planned"])
@pytest.mark.gen_test(timeout=30)
async def test_behind_a_sentinel_the_new_primary_is_heard_after_a_failover(
    make_settings: MakeSettings, tmp_path: Path, often: None, planned: bool
) -> None:
    with redis_nodes.watched_pair(tmp_path / "sentinel") as (primary, replica, sentinel):
        url = f"redis+sentinel://{NOBODY},127.0.0.1:{sentinel.port}/leases/1"
        async with listening(make_settings(redis_lease_url=url)) as (listener, bell, client):
            await listener.healthy.wait()
            bell.silence()
            await client.set("lease:x:1", 1, px=1)
            await bell.rings.get()
            if planned:
                sentinel.client.execute_command("SENTINEL", "FAILOVER", "leases")
            else:
                primary.process.kill()
            await listener.degraded.wait()
            assert bell.degraded
            await listener.healthy.wait()
            bell.silence()
            await client.set("lease:y:1", 1, px=1)
            await bell.rings.get()
            assert replica.client.info("replication")["role"] == "master"


@pytest.mark.gen_test
async def test_a_lease_key_that_expires_on_any_node_of_a_cluster_rings_the_bell(
    make_settings: MakeSettings, cluster: list[Node]
) -> None:
    topology = open_topology(cluster_url(cluster))
    primaries = await topology.primaries()
    assert sorted(primaries) == sorted(f"127.0.0.1:{node.port}" for node in cluster)
    names = [topology.self_test_key(address, "lease:of-a-runner-") for address in primaries]
    await topology.close()
    url = cluster_url(cluster[:1])
    async with listening(make_settings(redis_lease_url=url)) as (listener, bell, client):
        await listener.healthy.wait()
        for name in names:
            bell.silence()
            await client.set(name, 1, px=1)
            await bell.rings.get()


@pytest.mark.gen_test(timeout=30)
async def test_a_cluster_is_healthy_only_while_each_primary_is_heard(
    make_settings: MakeSettings, cluster: list[Node], often: None
) -> None:
    settings = make_settings(redis_lease_url=cluster_url(cluster))
    async with listening(settings) as (listener, bell, _):
        await listener.healthy.wait()
        cluster[1].client.config_set("notify-keyspace-events", "")
        await listener.degraded.wait()
        cluster[1].client.config_set("notify-keyspace-events", "Ex")
        await listener.healthy.wait()
        cluster[2].process.send_signal(signal.SIGSTOP)
        try:
            await listener.degraded.wait()
            assert bell.degraded
        finally:
            cluster[2].process.send_signal(signal.SIGCONT)
        await listener.healthy.wait()


@pytest.mark.gen_test(timeout=25)
async def test_after_a_resharding_the_primaries_are_looked_up_again(
    make_settings: MakeSettings, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: asyncio.Queue[set[str]] = asyncio.Queue()
    follow = ExpiryListener._follow

    async def spy(self: ExpiryListener, primaries: set[str]) -> None:
        await follow(self, primaries)
        followed.put_nowait(primaries)

    monkeypatch.setattr(ExpiryListener, "_follow", spy)
    with redis_nodes.cluster(tmp_path / "cluster") as nodes:
        settings = make_settings(redis_lease_url=cluster_url(nodes))
        async with listening(settings) as (listener, _bell, _client):
            await listener.healthy.wait()
            redis_nodes.give_slots(nodes, giver=nodes[2], taker=nodes[0])
            await _until_followed(followed, nodes[:2])
            await listener.healthy.wait()
            redis_nodes.give_slots(nodes[:2], giver=nodes[0], taker=nodes[1])
            await _until_followed(followed, nodes[1:2])
            await listener.healthy.wait()


async def _until_followed(followed: asyncio.Queue[set[str]], nodes: list[Node]) -> None:
    while await followed.get() != {f"127.0.0.1:{node.port}" for node in nodes}:
        continue


@pytest.mark.gen_test
async def test_lease_keys_and_revocations_lie_on_all_nodes_of_a_cluster(
    cluster: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = open_topology(cluster_url(cluster))
    keys = LeaseKeys(topology.client)
    leases = [LeaseKey(uuid4(), 1, timedelta(seconds=60)) for _ in range(30)]
    keys.put(leases)
    await keys.flush()
    assert all(node.client.dbsize() for node in cluster)
    assert sum(node.client.dbsize() for node in cluster) == len(leases)
    keys.drop(leases)
    await keys.flush()
    assert not any(node.client.dbsize() for node in cluster)
    monkeypatch.setattr(revocation, "LOOK_S", 10.0)
    revocations = Revocations(topology.client, NoAuthority())
    await topology.client.set("revoked:loaded", 1)
    claims = RunnerIdentity("a", "f" * 64, uuid4(), uuid4(), datetime.now(UTC))
    assert await revocations.revoked_among([claims]) == [False]
    await revocations.write([Revoked(claims.fingerprint, None, timedelta(seconds=60))])
    assert await revocations.revoked_among([claims]) == [True]
    await topology.client.delete("revoked:loaded")
    await topology.close()


@pytest.mark.gen_test(timeout=30)
async def test_a_server_on_a_cluster_leases_lapses_and_revokes(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, cluster: list[Node]
) -> None:
    settings = make_settings(
        redis_lease_url=cluster_url(cluster),
        redis_token_url=cluster_url(cluster[::-1]),
        sweep_interval_s=1000.0,
        sweep_degraded_s=1000.0,
    )
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        client = redis.asyncio.RedisCluster("127.0.0.1", cluster[0].port)
        # Heard from here on: the listener may subscribe at any moment, and sweeps when it does.
        async with client, fleet.rings() as rings:
            await fleet.overdue(run_id)
            await fleet.services.heartbeats._keys.flush()  # or it would be written after this one
            await client.set(f"lease:{job['queue_id']}:1", 1, px=1)
            await rings.get()
        assert (await fleet.row(run_id))["status"] == "PENDING"
        await fleet.revoke(runner)
        assert (await runner.claim()).status_code == 403


@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel", "redis+cluster"])
@pytest.mark.gen_test(timeout=30)
async def test_whatever_redis_is_away_runners_are_served(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, scheme: str
) -> None:
    path = "/leases/" if scheme == "redis+sentinel" else "/"
    settings = make_settings(
        redis_lease_url=f"{scheme}://{NOBODY}{path}0",
        redis_token_url=f"{scheme}://user@{NOBODY}{path}0",
    )
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        assert (await runner.heartbeat(job)).status_code == 200


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://localhost", "scheme"),
        ("redis://localhost:99999/1", "ort"),
        ("redis://localhost/leases", "DB is not a number"),
        ("rediss://localhost/-1", "DB is not a number"),
        ("redis://localhost/1/2", "DB is not a number"),
        ("redis://one,two/1", "names one host"),
        ("unix://", "path is missing"),
        ("redis+sentinel://localhost/leases", "SERVICE/DB"),
        ("redis+sentinel://localhost/leases/one", "SERVICE/DB"),
        ("redis+sentinel:///leases/1", "names no host"),
        ("redis+sentinel://localhost/leases/1?ssl=true", "takes no options"),
        ("redis+cluster://localhost/1", "no database but 0"),
        ("redis+cluster://localhost:port", "not HOST:PORT"),
        ("redis+cluster://localhost:70000", "not HOST:PORT"),
        ("redis+cluster://:7000", "not HOST:PORT"),
        ("redis+cluster://[::1", "IPv6"),
    ],
)
def test_a_url_that_names_no_redis_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(RedisUrlRefused, match=complaint):
        open_topology(url)


@pytest.mark.gen_test
async def test_hosts_ports_and_credentials_are_taken_from_the_url() -> None:
    topology = open_topology("redis+cluster://us%40er:pa%3Ass@[::1]:7001,[::1],db.test")
    names = {(node.host, node.port) for node in topology.client.startup_nodes}
    assert names == {("::1", 7001), ("::1", 6379), ("db.test", 6379)}
    options = topology.client.connection_kwargs
    assert (options["username"], options["password"]) == ("us@er", "pa:ss")


@pytest.mark.parametrize("setting", ["redis_lease_url", "redis_token_url"])
@pytest.mark.gen_test
async def test_the_server_names_the_setting_whose_url_it_refuses(
    make_settings: MakeSettings, setting: str
) -> None:
    settings = make_settings(**{setting: "redis+cluster://localhost/1"})
    with pytest.raises(ServerRefused, match=f"BAKEOFF_QUEUE_{setting.upper()} is not a Redis URL"):
        async with open_services(settings):
            pass
