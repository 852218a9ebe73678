"""serve, healthcheck, db, tokens and config: real commands, with one line for what is wrong."""

import asyncio
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import asyncpg
import httpx
import pytest
import redis

from cli.config import reference_page
from config.settings import PREFIX, Settings
from db.migration_files import newest_version, read_migrations
from sandbox.services import servers

ROOT = Path(__file__).parents[2]
KEY_RING = f"test:{'k' * 32}"
SEED_RING = f"test:{'ab' * 32}"


def environment(**settings: object) -> dict[str, str]:
    """This process's environment without settings of the queue, and with `settings`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**kept, **{PREFIX + name.upper(): str(value) for name, value in settings.items()}}


def run(*command: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run `bakeoff-queue` and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "cli.entry", *command],
        env=environment(**settings), cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


@pytest.fixture
def settings(make_settings) -> dict[str, object]:
    """What a server process is told to serve this test's database."""
    made: Settings = make_settings()
    return {
        "database_url": made.database_url.get_secret_value(),
        "redis_lease_url": made.redis_lease_url,
        "redis_token_url": made.redis_token_url,
        "trusted_root": made.trusted_root,
        "signers_file": made.signers_file,
        "token_keys": KEY_RING,
        "receipt_keys": SEED_RING,
        "listen_port": 0,
        "log_format": "json",
    }


@contextmanager
def serving(settings: Mapping[str, object]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server process that listens; its port is read from its log."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.entry", "serve"],
        env=environment(**settings), cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stderr is not None
        try:
            events = (json.loads(line) for line in process.stderr)
            port = next(event["port"] for event in events if event["event"] == "server.listening")
            yield process, port
        finally:
            process.kill()


def test_a_process_serves_and_drains_on_sigterm(settings) -> None:
    with serving(settings) as (process, port):
        assert httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
        assert run("healthcheck", **{**settings, "listen_port": port}).returncode == 0
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("address", "host"),
    [("::1", "[::1]"), ("::", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("", "[::1]"),  # noqa: S104
     ("", "127.0.0.1"), ("localhost", "localhost")],
)  # fmt: skip
def test_a_process_is_asked_where_it_listens(settings, address: str, host: str) -> None:
    with serving({**settings, "listen_address": address}) as (_, port):
        answer = httpx.get(f"http://{host}:{port}/healthz", trust_env=False)
        assert answer.status_code == 200
        asked = run("healthcheck", **{**settings, "listen_address": address, "listen_port": port})
        assert (asked.returncode, asked.stderr) == (0, "")


@pytest.mark.parametrize("address", ["[::1]", "127.0.0.1:8400", "http://queue"])
def test_an_address_with_brackets_or_a_port_is_refused_with_the_fix(settings, address: str) -> None:
    for command in ("serve", "healthcheck"):
        done = run(command, **{**settings, "listen_address": address})
        (line,) = done.stderr.splitlines()
        assert "BAKEOFF_QUEUE_LISTEN_ADDRESS" in line
        assert "LISTEN_PORT" in line


def test_an_address_of_another_machine_is_refused_with_the_fix(settings) -> None:
    done = run("serve", **{**settings, "listen_address": "192.0.2.1"})
    assert "set BAKEOFF_QUEUE_LISTEN_ADDRESS to an address of this machine" in done.stderr


class Forward(socketserver.BaseRequestHandler):
    """Carries the bytes of one connection to a Unix socket, and back."""

    server: "Forwarder"

    def handle(self) -> None:
        """Carry until both sides have ended."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(self.server.path)
            there = threading.Thread(target=self._carry, args=(self.request, peer))
            there.start()
            self._carry(peer, self.request)
            there.join()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            with suppress(OSError):
                while chunk := source.recv(65536):
                    target.sendall(chunk)
        finally:
            # Both: after a reset the other direction would wait for its end for ever.
            for each in (source, target):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


class Forwarder(socketserver.ThreadingTCPServer):
    """A port of ::1 for a Unix socket: the private servers have no other."""

    address_family = socket.AF_INET6

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(("::1", 0), Forward)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever).start()
        return self

    def server_close(self) -> None:
        """Stop as well: the end of a `with` block closes."""
        self.shutdown()
        super().server_close()


def test_database_and_redis_are_found_at_addresses_of_ipv6(settings) -> None:
    dsn = urlsplit(str(settings["database_url"]))
    folder = parse_qs(dsn.query)["host"][0]
    redis_socket = unquote(urlsplit(settings["redis_lease_url"]).path)
    with Forwarder(f"{folder}/.s.PGSQL.5432") as database, Forwarder(redis_socket) as keys:
        changed = {
            **settings,
            "database_url": f"postgres://bakeoff@[::1]:{database.server_address[1]}{dsn.path}",
            "redis_lease_url": f"redis://[::1]:{keys.server_address[1]}/1",
            "redis_token_url": f"redis://[::1]:{keys.server_address[1]}/2",
        }
        assert run("db", "verify", **changed).returncode == 0
        with serving(changed) as (_, port):
            ready = httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
    assert ready.status_code == 200
    assert ready.json()["redis"] == "ok"


def test_an_occupied_port_is_named_with_the_fix(settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", **{**settings, "listen_port": port})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: cannot listen on 127.0.0.1 port {port}: Address already in use;"
        " set BAKEOFF_QUEUE_LISTEN_PORT to a free port"
    )


@pytest.mark.parametrize(
    ("change", "code", "line"),
    [
        ({"database_url": "postgres://u:secret@127.0.0.1:1/x"}, 5, "PostgreSQL cannot be used"),
        ({"token_keys": ""}, 1, "BAKEOFF_QUEUE_TOKEN_KEYS is not set"),
        ({"token_keys": "k:short"}, 2, "the secret of k is shorter than 32 bytes"),
        ({"receipt_keys": ""}, 1, "BAKEOFF_QUEUE_RECEIPT_KEYS is not set"),
        ({"receipt_keys": "k:short"}, 2, "the seed of k is not 32 bytes in hex"),
        ({"trusted_root": "/nowhere/root.json"}, 1, "/nowhere/root.json"),
        ({"signers_file": "/nowhere/signers.yaml"}, 1, "/nowhere/signers.yaml"),
        ({"redis_lease_url": "http://redis"}, 2, "BAKEOFF_QUEUE_REDIS_LEASE_URL: must begin"),
        ({"redis_lease_url": "redis+cluster://h/1"}, 1, "BAKEOFF_QUEUE_REDIS_LEASE_URL is not"),
        ({"lease_tll_s": 5}, 2, "did you mean BAKEOFF_QUEUE_LEASE_TTL_S?"),
    ],
)  # fmt: skip
def test_what_stops_the_start_is_one_line(settings, change, code, line) -> None:
    done = run("serve", **{**settings, **change})
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr
    assert "secret@" not in done.stderr
    assert "Traceback" not in done.stderr


def test_without_redis_it_serves_and_says_what_is_missing(settings) -> None:
    gone = {"redis_lease_url": "redis://127.0.0.1:1/1", "redis_token_url": "redis://127.0.0.1:1/2"}
    with serving({**settings, **gone}) as (_, port):
        answer = httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
    assert answer.status_code == 200
    assert answer.json()["redis"].startswith("degraded")


def test_an_unmigrated_database_stops_the_start_and_is_migrated(settings, empty_database) -> None:
    bare = {**settings, "database_url": empty_database}
    done = run("serve", **bare)
    assert done.stderr == (
        f"error: the database lacks migration {newest_version()}: run `bakeoff-queue db migrate`\n"
    )
    assert run("db", "verify", **bare).returncode == 1
    assert "db migrate" in run("tokens", "ls", **bare).stderr
    assert run("db", "migrate", **bare).returncode == 0
    assert run("db", "verify", **bare).returncode == 0
    assert "[X]" in run("db", "status", **bare).stdout
    unconfirmed = run("db", "rollback", **bare)
    assert (unconfirmed.returncode, newest_version() in unconfirmed.stderr) == (6, True)
    assert run("db", "rollback", "--yes", **bare).returncode == 0
    assert json.loads(run("db", "status", "--json", **bare).stdout)["migrations"][-1] == {
        "name": read_migrations()[-1].name, "applied": False,
    }  # fmt: skip


def test_a_migration_that_fails_is_no_database_that_is_away(settings, empty_database) -> None:
    odd = "CREATE TABLE models (model_id serial PRIMARY KEY, name text NOT NULL)"

    async def make() -> None:
        connection = await asyncpg.connect(empty_database)
        await connection.execute(odd)
        await connection.close()

    asyncio.run(make())
    done = run("db", "migrate", **{**settings, "database_url": empty_database})
    assert done.returncode == 1
    assert "cannot be adopted" in done.stderr.splitlines()[-1]
    away = {"database_url": "postgres://127.0.0.1/x?sslmode=none"}
    assert run("db", "status", **{**settings, **away}).returncode == 5
    beside = {**away, "database_listen_url": empty_database}
    assert run("db", "status", **{**settings, **beside}).returncode == 0


def test_a_minted_token_works_until_it_is_revoked(settings) -> None:
    minted = json.loads(run("tokens", "mint", "--name", "ops", "--json", **settings).stdout)
    token = {"headers": {"Authorization": f"Bearer {minted['token']}"}, "trust_env": False}
    with serving(settings) as (_, port):
        url = f"http://127.0.0.1:{port}/api/admin/queue"
        assert httpx.get(url, **token).status_code == 200
        revoking = ("tokens", "revoke", minted["token_id"], "--reason", "done")
        assert run("tokens", "mint", "--name", "other", **settings).returncode == 0
        assert run(*revoking, **settings).returncode == 6
        assert run(*revoking, "--yes", **settings).returncode == 0
        assert httpx.get(url, **token).status_code == 401
    listed = run("tokens", "ls", "--json", **settings).stdout
    assert minted["token"] not in listed
    assert json.loads(listed)["tokens"][0]["revoked_at"] is not None
    nobodys = ("tokens", "revoke", str(uuid4()), "--reason", "x", "--yes")
    assert run(*nobodys, **settings).returncode == 3
    assert run("tokens", "mint", "--name", "x", "--scope", "root", **settings).returncode == 2


def test_config_show_hides_secrets(settings) -> None:
    secret = {**settings, "database_url": "postgres://me:s3cret@db/x"}
    shown = run("config", "show", "--json", **secret).stdout
    assert json.loads(shown)["database_url"] == "postgres://me:********@db/x"
    assert "k" * 32 not in shown
    assert "s3cret" not in shown
    assert "s3cret" in run("config", "show", "--no-redact", **secret).stdout


def test_config_check_tells_every_mistake(settings) -> None:
    done = run("config", "check", **{**settings, "listen_port": 99999, "lease_ttl_s": "x"})
    assert done.returncode == 2
    assert "LISTEN_PORT" in done.stderr
    assert "LEASE_TTL_S" in done.stderr
    assert run("config", "check", **settings).returncode == 0


def test_config_check_refuses_what_serve_would(settings, tmp_path) -> None:
    secrets = tmp_path / "token-keys"
    secrets.write_text(KEY_RING)
    wrong = {
        "trusted_root": secrets, "signers_file": "/nowhere/signers.yaml", "receipt_keys": "",
        "redis_token_url": "redis+cluster://redis/1",
    }  # fmt: skip
    done = run("config", "check", **{**settings, **wrong})
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == len(wrong)
    for name in wrong:
        assert PREFIX + name.upper() in done.stderr
    assert "k" * 32 not in done.stderr


def test_the_settings_page_is_the_generated_one() -> None:
    assert (ROOT / "docs/settings.md").read_text() == reference_page()


def test_a_dead_process_fails_the_healthcheck() -> None:
    assert run("healthcheck", listen_port=1).returncode == 5


def test_a_deaf_redis_is_told_of(settings) -> None:
    with servers.redis(notify="") as deaf, redis.Redis.from_url(deaf.url(1)) as client:
        assert client.config_get("notify-keyspace-events") == {"notify-keyspace-events": ""}
        urls = {"redis_lease_url": deaf.url(1), "redis_token_url": deaf.url(2)}
        with serving({**settings, **urls}) as (process, _):
            assert process.stderr is not None
            events = (json.loads(line) for line in process.stderr)
            told = next(event for event in events if event["event"] == "listener.deaf")
    assert "CONFIG SET notify-keyspace-events Ex" in told["fix"]


def test_a_reader_that_leaves_ends_it_quietly(settings) -> None:
    """`config reference | head -c 0`: the pipe is closed before a byte is read."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "cli.entry", "config", "reference"],
            env={**environment(**settings), "PYTHONUNBUFFERED": "1"}, cwd=ROOT, stdout=closed,
            stderr=subprocess.PIPE,
            text=True, timeout=60, check=False,
        )  # fmt: skip
    # Written at once, so that it is the command that meets the closed pipe.
    assert (done.returncode, done.stderr) == (0, "")
