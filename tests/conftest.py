"""Real servers for all tests: one private PostgreSQL and one private Redis per session."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from config.settings import Settings
from db import migrate
from db import pool as pools
from sandbox.services import servers
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import WORKERS, settings_of, write_signers

_numbers = count(1)
# pytest-tornado asks asyncio for the current loop before it makes its own; asked for the first time
# in a process, asyncio makes one that nobody closes, and a later test is blamed for it.
asyncio.set_event_loop(None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[servers.Postgres]:
    """A PostgreSQL with the newest migrations in its database `bakeoff`, the tests' template."""
    with servers.postgres() as server:
        migrate.migrate(server.dsn)
        yield server


@pytest.fixture(scope="session", autouse=True)
def workers() -> Iterator[None]:
    """End the processes that verified the tests' bundles."""
    yield
    asyncio.run(WORKERS.close())


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.Redis]:
    """A Redis that tells of expired keys."""
    with servers.redis() as server:
        yield server


@pytest.fixture(scope="session")
def sigstore(tmp_path_factory: pytest.TempPathFactory) -> ThrowawaySigstore:
    """A throwaway Sigstore whose bundles the real verifier accepts."""
    return ThrowawaySigstore.create(tmp_path_factory.mktemp("sigstore"))


@pytest.fixture
def empty_database(postgres: servers.Postgres) -> Iterator[str]:
    """The DSN of a database of this test's own, without a table."""
    with _database_from(postgres, "template1") as dsn:
        yield dsn


@pytest.fixture
def database(postgres: servers.Postgres) -> Iterator[str]:
    """The DSN of a migrated database of this test's own."""
    with _database_from(postgres, "bakeoff") as dsn:
        yield dsn


@pytest.fixture
def make_settings(
    database: str, redis_server: servers.Redis, sigstore: ThrowawaySigstore, signers_file: Path
) -> Callable[..., Settings]:
    """Make settings for this test's database, with any of them changed."""
    with redis.Redis.from_url(redis_server.url(0)) as client:
        client.flushall()

    def make(**changes: Any) -> Settings:
        return settings_of(database, redis_server, sigstore, signers_file, **changes)

    return make


@pytest.fixture(scope="session")
def signers_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signer policy that admits one e-mail identity of the throwaway Sigstore."""
    return write_signers(tmp_path_factory.mktemp("policy"))


@contextmanager
def _database_from(postgres: servers.Postgres, template: str) -> Iterator[str]:
    """A copy of `template`, dropped afterwards: a thousand of them would fill the disk."""
    name = f"test_{next(_numbers)}"
    admin = postgres.database_dsn("postgres")
    asyncio.run(_execute(admin, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY"))
    yield postgres.database_dsn(name)
    asyncio.run(_execute(admin, f"DROP DATABASE {name} (FORCE)"))


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(statement)
    await connection.close()


@pytest.fixture
def patient_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a server's statements wait for a lock for as long as a test holds it.

    A test that waits until two submits are blocked would otherwise lose the first one to
    lock_timeout (2 s) while the second one's worker process is still being started.
    """
    monkeypatch.setitem(pools.SESSION, "lock_timeout", "60s")
    monkeypatch.setitem(pools.SESSION, "statement_timeout", "60s")
    monkeypatch.setattr(pools, "COMMAND_S", 60)
