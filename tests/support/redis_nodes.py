"""Real Redis servers on loopback ports: a Cluster of three primaries, a Sentinel with a pair."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sandbox.services.servers import find_redis

SLOTS = 16_384
READY_S = 20
# A Cluster's nodes also talk on their port + 10000; both lie below the ephemeral ports.
FIRST_PORT, LAST_PORT, BUS = 15_000, 22_000, 10_000


@dataclass(frozen=True, slots=True)
class Node:
    """One server: its process, its port, and a client (synchronous) to look inside with."""

    process: subprocess.Popen[bytes]
    port: int
    client: Any


def until(true: Callable[[], Any]) -> None:
    """Wait for what a server comes to by itself and tells nobody of."""
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(redis.RedisError, OSError):
            if true():
                return
        assert time.monotonic() < deadline, "the servers did not get there"
        time.sleep(0.02)


@contextlib.contextmanager
def node(folder: Path, *options: str) -> Iterator[Node]:
    """Start a server with `options` (a Sentinel's begin with its file); end it afterwards."""
    port = _free_port()
    folder.mkdir(parents=True)
    settings = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    argv = [str(find_redis()), *options, *settings]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
        try:
            until(client.ping)
            yield Node(process, port, client)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[list[Node]]:
    """A Cluster of three primaries without replicas."""
    options = ["--save", "", "--notify-keyspace-events", "Ex"]
    options += ["--cluster-enabled", "yes", "--cluster-node-timeout", "3000"]
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(node(folder / str(i), *options)) for i in range(3)]
        for i, each in enumerate(nodes):
            slots = range(SLOTS * i // 3, SLOTS * (i + 1) // 3)
            each.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            each.client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            each.client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        until(lambda: all(_settled(each) for each in nodes))
        yield nodes


@contextlib.contextmanager
def watched_pair(folder: Path) -> Iterator[tuple[Node, Node, Node]]:
    """A primary, its replica, and a Sentinel that calls them `leases`."""
    options = ["--save", "", "--notify-keyspace-events", "Ex", "--repl-diskless-sync-delay", "0"]
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(node(folder / "primary", *options))
        replicaof = ["--replicaof", "127.0.0.1", str(primary.port)]
        replica = stack.enter_context(node(folder / "replica", *options, *replicaof))
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        file = folder / "sentinel.conf"
        file.write_text(
            f"sentinel monitor leases 127.0.0.1 {primary.port} 1\n"
            "sentinel down-after-milliseconds leases 500\n"
            "sentinel failover-timeout leases 3000\n"
        )
        sentinel = stack.enter_context(node(folder / "sentinel", str(file), "--sentinel"))
        until(lambda: sentinel.client.sentinel_master("leases")["num-slaves"] == 1)
        yield primary, replica, sentinel


def give_slots(nodes: list[Node], giver: Node, taker: Node) -> None:
    """Make `taker` serve all that `giver` served, which becomes its replica by itself."""
    taker_id = taker.client.execute_command("CLUSTER", "MYID")
    given = [
        slot
        for first, last, owner, *_ in giver.client.execute_command("CLUSTER", "SLOTS")
        if owner[1] == giver.port
        for slot in range(first, last + 1)
    ]
    # A claim of an older epoch would be lost to the giver's own.
    taker.client.execute_command("CLUSTER", "BUMPEPOCH")
    for each in [taker, giver, *(x for x in nodes if x not in (taker, giver))]:
        with (
            # The giver may have heard of it by gossip already, and be a replica.
            contextlib.suppress(redis.ReadOnlyError),
            each.client.pipeline(transaction=True) as pipeline,
        ):
            if each is giver:
                # In the same transaction: a node does not give a slot away while a key lies in
                # it, and the listener's self-test may put one there at any moment.
                pipeline.flushall()
            for slot in given:
                pipeline.execute_command("CLUSTER", "SETSLOT", slot, "NODE", taker_id)
            pipeline.execute()


def _settled(each: Node) -> bool:
    info = each.client.cluster("INFO")
    return info["cluster_state"] == "ok" and info["cluster_slots_ok"] == str(SLOTS)


def _free_port() -> int:
    for port in range(FIRST_PORT, LAST_PORT):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for each in (port, port + BUS):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", each))
            return port
    raise AssertionError("no free ports")
