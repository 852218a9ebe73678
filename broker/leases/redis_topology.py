"""Where Redis is: one server, a Sentinel's primary, or the primaries of a Cluster.

Reads and writes go through `client`. Expired events are told by the node that holds the key and by
no other, so a listener subscribes to each of `primaries()`.

| URL | what it names |
|---|---|
| `redis://`, `rediss://`, `unix://` | one server |
| `redis+sentinel://[user:password@]host:port,host:port/SERVICE/DB` | a Sentinel's primary |
| `redis+cluster://[user:password@]host:port,host:port` | a Cluster (its one database is 0) |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisClusterException

from config.urls import split_address

TIMEOUT_S = 1.0
RETRY_AFTER_S = 0.05
SENTINEL_PORT = 26379
CLUSTER_PORT = 6379
PORT_MAX = 65535
# A slot is one of 16,384: so many names find a key for a node that serves a single one.
NAMES_TRIED = 200_000


class RedisUrlRefused(ValueError):
    """The URL does not name a Redis; the message says what is wrong with it."""


class Topology(Protocol):
    """Interface of a Redis, be it one server, a Sentinel's or a Cluster."""

    client: Any  # redis.asyncio.Redis or RedisCluster: the same commands, no common type
    database: int

    async def primaries(self) -> Sequence[str]:
        """Return the address of each node that may expire a key, as things are now."""
        ...

    def connect(self, address: str) -> redis.asyncio.Redis:
        """Return a new client of the primary at `address`, for the caller to close."""
        ...

    def self_test_key(self, address: str, prefix: str) -> str:
        """Return a key with `prefix` that the primary at `address` holds."""
        ...

    async def close(self) -> None:
        """Close every connection but those of `connect`."""
        ...


class OneServer:
    """One Redis, or what a Sentinel says is the primary at this moment."""

    def __init__(
        self,
        make_client: Callable[[], redis.asyncio.Redis],
        database: int | None = None,
        sentinel: Sentinel | None = None,
    ) -> None:
        self._make_client = make_client
        self._sentinel = sentinel
        self.client = make_client()
        options = self.client.connection_pool.connection_kwargs
        self.database = int(options.get("db") or 0) if database is None else database

    async def primaries(self) -> Sequence[str]:
        """Return the one there is; behind a Sentinel, every new connection asks who it is."""
        return ["primary"]

    def connect(self, address: str) -> redis.asyncio.Redis:
        """Return another client of the one server."""
        return self._make_client()

    def self_test_key(self, address: str, prefix: str) -> str:
        """Return a key of the one server."""
        return f"{prefix}self-test"

    async def close(self) -> None:
        """Close the client, and those of the Sentinels, which it does not close itself."""
        await self.client.aclose()
        if self._sentinel is not None:
            await self._sentinel.aclose()


class Cluster:
    """A Redis Cluster: one client that routes, and one per primary to listen with."""

    database = 0

    def __init__(self, client: RedisCluster, options: Callable[[], dict[str, Any]]) -> None:
        self.client = client
        self._options = options

    async def primaries(self) -> Sequence[str]:
        """Return the primaries, as the cluster is laid out now."""
        await self.client.initialize()  # once only: it never looks again by itself
        await self.client.nodes_manager.initialize()
        return [node.name for node in self.client.get_primaries()]

    def connect(self, address: str) -> redis.asyncio.Redis:
        """Return a client of one node, whatever has become of it. Raises RedisError."""
        node = self.client.get_node(node_name=address)
        if node is None:
            raise redis.RedisError(f"{address} is not in the cluster any more")
        return redis.asyncio.Redis(host=node.host, port=int(node.port), **self._options())

    def self_test_key(self, address: str, prefix: str) -> str:
        """Return a key whose slot the primary at `address` serves. Raises RedisError."""
        for number in range(NAMES_TRIED):
            name = f"{prefix}self-test:{number}"
            try:
                node = self.client.get_node_from_key(name)
            except RedisClusterException:  # nobody serves this slot at the moment
                continue
            if node is not None and node.name == address:
                return name
        raise redis.RedisError(f"{address} serves no slots")

    async def close(self) -> None:
        """Close the client."""
        await self.client.aclose()


@dataclass(frozen=True, slots=True)
class _Parts:
    hosts: tuple[tuple[str, int], ...]
    path: tuple[str, ...]
    credentials: dict[str, Any]

    def options(self) -> dict[str, Any]:
        return _patience() | self.credentials


def open_topology(url: str) -> Topology:
    """Return the Redis that `url` names; nothing is connected yet. Raises RedisUrlRefused."""
    try:
        scheme = split_address(url).scheme
        if scheme == "redis+sentinel":
            return _sentinel(_parts(url, SENTINEL_PORT))
        if scheme == "redis+cluster":
            return _cluster(_parts(url, CLUSTER_PORT))
        _check_one(url)
        return OneServer(lambda: redis.asyncio.from_url(url, **_patience()))
    except ValueError as error:
        raise RedisUrlRefused(str(error)) from None


def _check_one(url: str) -> None:
    """Refuse what redis-py passes over: it takes database 0 for a path that is no number."""
    split = split_address(url)
    path = split.path.strip("/")
    if split.scheme == "unix":
        if not path:
            raise RedisUrlRefused("unix:///PATH/OF/SOCKET?db=1: the path is missing")
        return
    if path and not path.isdecimal():
        raise RedisUrlRefused(f"{split.scheme}://HOST:PORT/DB: DB is not a number")
    if "," in split.hosts:
        raise RedisUrlRefused(
            f"{split.scheme}:// names one host: of several, use redis+sentinel:// or"
            " redis+cluster://"
        )


def _patience() -> dict[str, Any]:
    """How long to wait for Redis. redis-py tries 10 times: a request may not hang so long."""
    return {
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
        "retry": Retry(ConstantBackoff(RETRY_AFTER_S), 1),
    }


def _sentinel(parts: _Parts) -> OneServer:
    if len(parts.path) != 2 or not parts.path[1].isdecimal():
        raise RedisUrlRefused("redis+sentinel://HOST:PORT/SERVICE/DB: the path is not SERVICE/DB")
    service, database = parts.path[0], int(parts.path[1])
    sentinel = Sentinel(list(parts.hosts), sentinel_kwargs=_patience())
    return OneServer(
        lambda: sentinel.master_for(service, db=database, **parts.options()), database, sentinel
    )


def _cluster(parts: _Parts) -> Cluster:
    if parts.path and parts.path != ("0",):
        raise RedisUrlRefused("redis+cluster://: a Cluster has no database but 0")
    client = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in parts.hosts],
        # The URL's names outlive the nodes: after all of them moved, only DNS knows where to.
        dynamic_startup_nodes=False,
        **parts.options(),
    )
    return Cluster(client, parts.options)


def _parts(url: str, default_port: int) -> _Parts:
    split = split_address(url)
    if split.options:
        raise RedisUrlRefused(f"{split.scheme}:// takes no options: remove them")
    user, _, password = split.user.partition(":")
    credentials: dict[str, Any] = {}
    if password:
        credentials = {"username": unquote(user) or None, "password": unquote(password)}
    hosts = tuple(_host(address, default_port) for address in split.hosts.split(",") if address)
    if not hosts:
        raise RedisUrlRefused(f"{split.scheme}:// names no host")
    return _Parts(hosts, tuple(filter(None, split.path.split("/"))), credentials)


def _host(address: str, default_port: int) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if address.count("[") != address.count("]"):
        raise RedisUrlRefused(f"{address} is not HOST:PORT or [IPv6]:PORT")
    if not colon or address.endswith("]"):
        return address.strip("[]"), default_port
    if not host or not port.isdecimal() or int(port) > PORT_MAX:
        raise RedisUrlRefused(f"{address} is not HOST:PORT")
    return host.strip("[]"), int(port)
