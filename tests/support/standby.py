"""A PostgreSQL server and its standby, and a failover that leaves the old primary read-only."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from sandbox.services import servers


@dataclass(frozen=True, slots=True)
class Pair:
    """The server that was the primary first, and the one that follows it."""

    first: servers.Postgres
    second: servers.Postgres

    @property
    def dsn(self) -> str:
        """An address that names both, the first one first."""
        return _address(self.first, self.second)

    @property
    def named_in_turn(self) -> str:
        """An address that names both, the second one first."""
        return _address(self.second, self.first)

    async def fence(self) -> None:
        """Let the first server take no changes any more; its sessions stay."""
        await on(self.first, "ALTER SYSTEM SET default_transaction_read_only = on")
        await on(self.first, "SELECT pg_reload_conf()")
        # A new session that knows it: the signal has gone to all that there were before.
        async with asyncio.timeout(20):
            while await on(self.first, "SHOW default_transaction_read_only") != "on":  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def fail_over(self) -> None:
        """Make the second server the primary, once it has all that the first one has."""
        await self.fence()
        end = await on(self.first, "SELECT pg_current_wal_lsn()::text")
        async with asyncio.timeout(20):
            while await on(self.second, f"SELECT pg_last_wal_replay_lsn() < '{end}'"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await on(self.second, "SELECT pg_promote()")


def _address(*named: servers.Postgres) -> str:
    hosts = ",".join(str(server._leash.folder) for server in named)
    return f"postgres://bakeoff@/bakeoff?host={hosts}&port=5432,5432&sslmode=disable"


async def on(server: servers.Postgres, query: str) -> Any:
    """Return the one value of a query to this server, whatever it is."""
    connection = await asyncpg.connect(server.dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


@contextmanager
def replicated() -> Iterator[Pair]:
    """A private primary and its standby, which streams."""
    with servers.postgres() as first, _standby_of(first) as second:
        yield Pair(first, second)


@contextmanager
def _standby_of(primary: servers.Postgres) -> Iterator[servers.Postgres]:
    found = servers.find_postgres()
    with servers._leashed("postgres", None) as (leash, account, cluster):
        program, version = servers._within_reach(
            found / "pg_basebackup", servers._copy_postgres, leash, account
        )
        source = ["-h", str(primary._leash.folder), "-p", "5432", "-U", "bakeoff"]
        copy = [str(program), "-D", str(cluster), "-R", "-X", "stream", "-c", "fast", *source]
        if leash.ask("run", argv=copy, feed="") != 0:
            raise leash.failure("pg_basebackup failed:")
        settings = servers.POSTGRES_SETTINGS | servers.NOT_DURABLE
        settings["unix_socket_directories"] = str(leash.folder)
        options = [part for name in settings for part in ("-c", f"{name}={settings[name]}")]
        argv = [str(program.with_name("postgres")), "-D", str(cluster), *options]
        server = servers.Postgres(leash, argv, cluster, version)
        server.restart()
        yield server
