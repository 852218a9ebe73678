"""Where Redis is: one server, a Sentinel's primary, or the primaries of a Cluster.

Reads and writes go through `client`. Expired events are told by the node that holds the key and by
no other, so a listener subscribes to each of `primaries()`.

| URL | what it names |
|---|---|
| `redis://`, `rediss://`, `unix://` | one server |
| `redis+sentinel://[user:password@]host:port,host:port/SERVICE/DB` | a Sentinel's primary |
| `redis+cluster://[user:password@]host:port,host:port` | a Cluster (its one database is 0) |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.sentinel import Sentinel

TIMEOUT_S = 1.0
SENTINEL_PORT = 26379
CLUSTER_PORT = 6379


class RedisUrlRefused(ValueError):
    """The URL does not name a Redis; the message says what is wrong with it."""


class Topology(Protocol):
    """What the rest of the service sees of Redis."""

    client: Any  # redis.asyncio.Redis or RedisCluster: the same commands, no common type
    database: int

    async def primaries(self) -> Mapping[str, redis.asyncio.Redis]:
        """Return a client for each node that may expire a key, by its address."""
        ...

    async def self_test_key(self, address: str, prefix: str) -> str:
        """Return a key with `prefix` that the primary at `address` holds."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class OneServer:
    """One Redis, or what a Sentinel says is the primary at this moment."""

    def __init__(self, client: redis.asyncio.Redis, database: int) -> None:
        self.client = client
        self.database = database

    async def primaries(self) -> Mapping[str, redis.asyncio.Redis]:
        """Return the one client; behind a Sentinel it finds the new primary when it reconnects."""
        return {"primary": self.client}

    async def self_test_key(self, address: str, prefix: str) -> str:
        """Return a key of the one server."""
        return f"{prefix}self-test"

    async def close(self) -> None:
        """Close the client."""
        await self.client.aclose()


class Cluster:
    """A Redis Cluster: one client that routes, and one per primary to listen with."""

    database = 0

    def __init__(self, client: RedisCluster, options: Mapping[str, Any]) -> None:
        self.client = client
        self._options = dict(options)
        self._nodes: dict[str, redis.asyncio.Redis] = {}

    async def primaries(self) -> Mapping[str, redis.asyncio.Redis]:
        """Return a client per primary, as the cluster is laid out now."""
        await self.client.initialize()
        wanted = {node.name: node for node in self.client.get_primaries()}
        for name in self._nodes.keys() - wanted.keys():
            await self._nodes.pop(name).aclose()
        for name in wanted.keys() - self._nodes.keys():
            node = wanted[name]
            self._nodes[name] = redis.asyncio.Redis(
                host=node.host, port=int(node.port), **self._options
            )
        return dict(self._nodes)

    async def self_test_key(self, address: str, prefix: str) -> str:
        """Return a key whose slot the primary at `address` serves."""
        for number in range(10_000):
            name = f"{prefix}self-test:{number}"
            node = self.client.get_node_from_key(name)
            if node is not None and node.name == address:
                return name
        raise redis.RedisError(f"{address} serves no slots")

    async def close(self) -> None:
        """Close every client."""
        for client in self._nodes.values():
            await client.aclose()
        await self.client.aclose()


@dataclass(frozen=True, slots=True)
class _Parts:
    hosts: tuple[tuple[str, int], ...]
    path: tuple[str, ...]
    options: dict[str, Any]


def open_topology(url: str) -> Topology:
    """Return the Redis that `url` names; nothing is connected yet. Raises RedisUrlRefused."""
    scheme = urlsplit(url).scheme
    if scheme == "redis+sentinel":
        return _sentinel(_parts(url, SENTINEL_PORT))
    if scheme == "redis+cluster":
        return _cluster(_parts(url, CLUSTER_PORT))
    try:
        client = redis.asyncio.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        )
    except ValueError as error:
        raise RedisUrlRefused(str(error)) from None
    return OneServer(client, int(client.connection_pool.connection_kwargs.get("db") or 0))


def _sentinel(parts: _Parts) -> OneServer:
    if len(parts.path) != 2 or not parts.path[1].isdecimal():
        raise RedisUrlRefused("redis+sentinel://HOST:PORT/SERVICE/DB: the path is not SERVICE/DB")
    service, database = parts.path[0], int(parts.path[1])
    sentinel = Sentinel(
        list(parts.hosts),
        sentinel_kwargs={"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S},
        **parts.options,
    )
    return OneServer(sentinel.master_for(service, db=database), database)


def _cluster(parts: _Parts) -> Cluster:
    if parts.path and parts.path != ("0",):
        raise RedisUrlRefused("redis+cluster://: a Cluster has no database but 0")
    nodes = [ClusterNode(host, port) for host, port in parts.hosts]
    return Cluster(RedisCluster(startup_nodes=nodes, **parts.options), parts.options)


def _parts(url: str, default_port: int) -> _Parts:
    split = urlsplit(url)
    credentials, _, addresses = split.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    options: dict[str, Any] = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
    if password:
        options |= {"username": unquote(user) or None, "password": unquote(password)}
    hosts = tuple(_host(address, default_port) for address in addresses.split(",") if address)
    if not hosts:
        raise RedisUrlRefused(f"{split.scheme}:// names no host")
    return _Parts(hosts, tuple(filter(None, split.path.split("/"))), options)


def _host(address: str, default_port: int) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon:
        return address, default_port
    if not port.isdecimal():
        raise RedisUrlRefused(f"{address} is not HOST:PORT")
    return host.strip("[]"), int(port)
