"""Where a benchmark plays: a private PostgreSQL, a private Redis, and server processes."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import redis

from bench.support.seeding import TOKEN_TTL_S
from config.settings import PREFIX
from db import migrate
from sandbox.services import servers

PUBLIC_URL = "http://bench.test"
END_S = 15
# The default of 1 GB would have a checkpoint in the middle of a round after every large seeding.
TUNING = {"max_wal_size": "8GB", "checkpoint_timeout": "1h"}


@dataclass(frozen=True, slots=True)
class Server:
    """A running server process."""

    pid: int
    port: int


@dataclass
class BenchEnv:
    """Everything that runs; it ends with the context that made it."""

    postgres: servers.Postgres
    redis: servers.Redis
    running: ExitStack
    servers: list[Server] = field(default_factory=list)

    @property
    def dsn(self) -> str:
        """The database."""
        return self.postgres.dsn

    @property
    def port(self) -> int:
        """The first server's."""
        return self.servers[0].port

    def serve(self, **settings: Any) -> Server:
        """Start a server process with these settings beside the bench's own."""
        server = self.running.enter_context(_served(self.environment(settings)))
        self.servers.append(server)
        return server

    def forget_keys(self) -> None:
        """Empty Redis' lease keys: those of the last round would ring in the next."""
        with redis.Redis.from_url(self.redis.url(1)) as client:
            client.flushdb()

    def environment(self, settings: dict[str, Any]) -> dict[str, str]:
        """Return what a process of ours needs, with these settings beside the bench's own."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        given = {
            "DATABASE_URL": self.dsn,
            "REDIS_LEASE_URL": self.redis.url(1),
            "REDIS_TOKEN_URL": self.redis.url(2),
            "TOKEN_KEYS": f"bench:{'k' * 32}",
            "TOKEN_TTL_S": TOKEN_TTL_S,
            "CONNECTIONS_PER_ADDRESS": 0,  # thousands of runners live at this one
            "ANONYMOUS_RATE": 0,
            "RUNNER_RATE": 0,
            # Leases that are claimed in a round live longer than it.
            "LEASE_TTL_MIN_S": 300,
            "HEARTBEAT_INTERVAL_MIN_S": 30,
            "RECEIPT_KEYS": f"bench:{'ab' * 32}",
            "PUBLIC_URL": PUBLIC_URL,
            **{name.upper(): value for name, value in settings.items()},
        }
        return {**own, **{PREFIX + name: str(value) for name, value in given.items()}}


@contextmanager
def open_env() -> Iterator[BenchEnv]:
    """Yield a stage with a migrated database and no server yet. Raises SandboxError."""
    with servers.postgres() as postgres, servers.redis() as redis_server, ExitStack() as running:
        _tune(postgres)
        migrate.migrate(postgres.dsn)
        yield BenchEnv(postgres, redis_server, running)


def _tune(postgres: servers.Postgres) -> None:
    async def alter() -> None:
        connection = await asyncpg.connect(postgres.dsn)
        for name, value in TUNING.items():
            await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()

    asyncio.run(alter())


@contextmanager
def _served(environment: dict[str, str]) -> Iterator[Server]:
    argv = [sys.executable, "-m", "bench.support.server"]
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise servers.SandboxError("the server process ended as it started")
            yield Server(process.pid, int(line))
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
