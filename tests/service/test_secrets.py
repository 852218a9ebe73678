"""No secret is where it does not belong: each is planted, and then looked for everywhere."""

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import redis
from pydantic import SecretStr

from config.settings import PREFIX, Settings, SettingsRefused, load_settings
from config.urls import HIDDEN, check_url, without_password
from db.pool import open_pool
from sandbox.services import servers
from sandbox.services.admin_token import new_token
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_cli_service import ROOT, environment
from tests.support.fleet import AUDIENCE, Fleet, Runner, run_of

# No secret of ours is without it, and nothing else has it.
MARK = "PLANTED"
RING = f"k1:{MARK}{'t' * 40}"
SEED = "5eed" * 16  # hex: it has a mark of its own


def is_planted(text: str) -> bool:
    """Return whether a secret is in `text`, also a part of one that was cut in two."""
    return MARK in text or SEED[:12] in text


class Everywhere:
    """What a process and all its children show to others: their arguments and environments."""

    def __init__(self, *given: int) -> None:
        """`given` are the processes that were given secrets in their environment."""
        self._passed = {os.getpid(), *given}
        self.found: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Everywhere":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.002):
            for folder in Path("/proc").iterdir():
                if folder.name.isdecimal() and int(folder.name) not in self._passed:
                    self._look_at(folder / "cmdline")
                    self._look_at(folder / "environ")

    def _look_at(self, place: Path) -> None:
        try:
            text = place.read_bytes().decode(errors="replace")
        except OSError:  # it has ended, or is another user's
            return
        if is_planted(text):
            self.found.add(f"{place.name}: {text.split(chr(0))[:4]}")


@pytest.fixture
def planted(make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Settings of a server whose secrets are in files, as they are in production."""
    made = make_settings()
    with servers.redis() as private, redis.Redis.from_url(private.url(0)) as client:
        client.config_set("requirepass", f"{MARK}redis")
        dsn = made.database_url.get_secret_value()
        secrets = {
            "database_url": dsn.replace("bakeoff@", f"bakeoff:{MARK}%2Fdsn@", 1),
            "database_listen_url": f"{dsn}&password={MARK}listen",
            "redis_lease_url": f"{private.url(1)}&password={MARK}redis",
            "redis_token_url": f"{private.url(2)}&password={MARK}redis",
            "token_keys": RING,
            "receipt_keys": f"k1:{SEED}",
            "metrics_token": f"{MARK}metrics",
        }
        for name, secret in secrets.items():
            (tmp_path / name).write_text(secret)
        files: Mapping[str, object] = {f"{name}_file": tmp_path / name for name in secrets}
        yield {
            **files,
            "trusted_root": made.trusted_root,
            "signers_file": made.signers_file,
            "public_url": AUDIENCE,
            "listen_port": 0,
            "log_format": "json",
            "log_level": "debug",
        }


@contextmanager
def process(settings: Mapping[str, object], *command: str) -> Iterator[subprocess.Popen[str]]:
    """A process of the command line."""
    with subprocess.Popen(
        [sys.executable, "-m", "cli.entry", *command], env=environment(**settings), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        try:
            yield started
        finally:
            started.kill()


def test_every_secret_setting_is_planted(planted: dict[str, Any]) -> None:
    """A new one belongs into the fixture above."""
    fields = Settings.model_fields.items()
    secret = {name for name, f in fields if not f.repr or "SecretStr" in str(f.annotation)}
    assert {f"{name}_file" for name in secret} <= planted.keys()


@pytest.mark.parametrize(
    "command",
    [
        ("config", "show"), ("config", "show", "--json"), ("config", "check"),
        ("db", "migrate"), ("db", "status"), ("db", "verify"), ("tokens", "ls"), ("prune",),
        ("db", "rollback"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_command_shows_a_secret_to_the_terminal_or_to_other_users(
    planted: dict[str, Any], command: tuple[str, ...]
) -> None:
    with Everywhere() as everywhere, process(planted, *command) as started:
        out, err = started.communicate(timeout=60)
    assert started.returncode in (0, 6), err
    assert not is_planted(out + err)
    assert everywhere.found == set()


async def provoke(fleet: Fleet, runner: Runner, job: dict[str, Any]) -> list[httpx.Response]:
    """Send what is refused, and what fails on our side with a row of the database in its error."""
    odd = "ALTER TABLE run_queue ADD CONSTRAINT odd CHECK (cancel_reason IS NULL) NOT VALID"
    await fleet.pool.execute(odd)
    bearer = {"Authorization": f"Bearer {MARK}.token.x"}
    return [
        await fleet.admin("POST", f"/queue/{job['run_id']}/cancel", json={"reason": "x"}),
        await fleet.http.post("/api/queue/claim", json={}, headers=bearer),
        await fleet.http.get(f"/api/admin/queue?token={MARK}", headers=bearer),
        await fleet.http.get("/api/admin/queue", headers={"Authorization": f"Basic {MARK}"}),
        await runner.post(f"/api/queue/{job['run_id']}/heartbeat", {"lease_id": f"{MARK}"}),
        await fleet.admin("POST", "/queue", json={"runs": [run_of(priority=f"{MARK}")]}),
        await fleet.http.get("/metrics"),
        await fleet.http.get("/readyz"),
        await fleet.http.get("/.well-known/bakeoff-queue.json"),
    ]


@pytest.mark.gen_test
async def test_a_server_shows_no_secret_in_its_logs_answers_and_children(
    planted: dict[str, Any], database: str, sigstore: ThrowawaySigstore
) -> None:
    planted["token_keys"] = planted.pop("token_keys_file").read_text()
    with process(planted, "serve") as started, Everywhere(started.pid) as everywhere:
        assert started.stderr is not None
        lines: list[str] = []
        port = next(
            json.loads(line)["port"]
            for line in started.stderr
            if lines.append(line) or "server.listening" in line
        )
        reader = threading.Thread(target=lambda: lines.extend(started.stderr or ()))
        reader.start()
        url = f"http://127.0.0.1:{port}"
        async with (
            open_pool(database, 2) as pool,
            httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http,
        ):
            token = await new_token(pool, "test")
            fleet = Fleet(http, None, pool, sigstore, token, url)  # type: ignore[arg-type]
            runner = await fleet.sign_on()
            await fleet.enqueue()
            job = await runner.take()
            answers = await provoke(fleet, runner, job)
            await fleet.cut_database()
            answers.append(await runner.heartbeat(job))
        started.terminate()
        started.wait(30)
        reader.join()
    assert answers[0].status_code == 500
    logged = "".join(lines)
    assert "CheckViolationError" in logged, "the failure itself is told"
    assert everywhere.found == set()
    for text in (logged, *(answer.text for answer in answers)):
        assert not is_planted(text.replace(f"/{MARK}", "")), text
        for secret in (job["lease_id"], runner.token, token):
            assert secret not in text


WRONG = {
    "database_url": [
        f"postgres://me:{MARK}/x@db/x", f"postgres://me:1/{MARK}@db/x", f"postgres://me:{MARK}",
        f"postgres://me:{MARK}#x@db/x", f"postgres://me:1?{MARK}@db/x", f"postgres://a@{MARK}@h/x",
        f"postgres://[{MARK}@db/x", f"host=db password={MARK}", f"mysql://me:{MARK}@db/x",
        f"postgres://db/x?{MARK}", f"postgres://db/x?a=b@{MARK}", f"postgres://u:{MARK} x@db/x",
        f"postgres://u:{MARK}\n@db/x", MARK,
    ],
    "redis_lease_url": [
        f"redis://:{MARK}/x@h/1", f"redis://h:{MARK}", f"http://:{MARK}@h",
        f"redis+cluster://h/1?a@{MARK}", f"unix://{MARK}@/x@y", f"redis+sentinel://:{MARK}?@h/s/1",
    ],
    "public_url": [f"https://me:{MARK}@h", f"https://h?{MARK}", f"https://h#{MARK}", MARK],
    "token_keys": [MARK, f":{MARK}", f"k:{MARK}", f"{RING},{RING}"],
    "receipt_keys": [MARK, f"k:{MARK}", f"k:{SEED[2:]}", f"k:{SEED},k:{SEED}"],
    "listen_port": [MARK], "log_level": [MARK], "lease_ttl_s": [MARK],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, text) for name, texts in WRONG.items() for text in texts]
)
@pytest.mark.parametrize("source", ["environment", "file", "yaml"])
def test_what_is_wrong_with_a_secret_is_told_without_it(
    name: str, wrong: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "environment":
        monkeypatch.setenv(PREFIX + name.upper(), wrong)
    elif source == "file":
        (tmp_path / "secret").write_text(wrong)
        monkeypatch.setenv(f"{PREFIX}{name.upper()}_FILE", str(tmp_path / "secret"))
    else:
        (tmp_path / "config.yaml").write_text(json.dumps({"queue": {name: wrong}}))
        monkeypatch.setenv(f"{PREFIX}CONFIG", str(tmp_path / "config.yaml"))
    with pytest.raises(SettingsRefused) as refused:
        load_settings()
    told = "".join(traceback.format_exception(refused.value))
    assert name.upper() in told or name in told
    assert not is_planted(told.replace(str(tmp_path), ""))


SHOWN = {
    "postgres://me:s3cret@db/x": f"postgres://me:{HIDDEN}@db/x",
    "postgres://me@db:5432,[::1]:5433/x": "postgres://me@db:5432,[::1]:5433/x",
    "postgres://me@db/x?password=s3cret&sslmode=require":
    f"postgres://me@db/x?password={HIDDEN}&sslmode=require",
    "postgres:///x?host=/run/pg&user=me&sslpassword=s3cret":
    f"postgres:///x?host=/run/pg&user=me&sslpassword={HIDDEN}",
    "redis://:s3cret@[::1]:6379/1": f"redis://:{HIDDEN}@[::1]:6379/1",
    "unix:///run/redis.sock?db=1&password=s3cret": f"unix:///run/redis.sock?db=1&password={HIDDEN}",
    "redis+sentinel://u:s3cret@a:1,b:2/name/1": f"redis+sentinel://u:{HIDDEN}@a:1,b:2/name/1",
    "postgres://me:s3/cret@db/x": HIDDEN,
    "postgres://me:s3?cret@db/x": HIDDEN,
    "k1:s3cret://x": HIDDEN,
    "s3cret": HIDDEN,
    "": "",
}  # fmt: skip


@pytest.mark.parametrize("secret", SHOWN)
def test_an_address_is_shown_without_its_password(secret: str) -> None:
    assert without_password(secret) == SHOWN[secret]


@pytest.mark.parametrize(
    "url",
    [
        "postgres://localhost/bakeoff", "postgresql://me:p%2Fw%40@[fe80::1%25eth0]:5432/x",
        "postgres://bakeoff@/x?host=/tmp/a,/tmp/b&port=5432,5433&sslmode=disable",
        "postgres://h1:5432,h2:5432/x?target_session_attrs=read-write", "postgres://",
    ],
)  # fmt: skip
def test_an_address_that_means_one_thing_is_taken(url: str) -> None:
    assert check_url(url, "postgres", "postgresql") == url
    assert load_settings(database_url=SecretStr(url)).database_url.get_secret_value() == url


@pytest.mark.gen_test
async def test_an_error_of_the_pool_quotes_no_row(database: str) -> None:
    async with open_pool(database, 1) as pool:
        await pool.execute("CREATE TABLE t (id text CHECK (id = 'x'))")
        with pytest.raises(asyncpg.CheckViolationError) as violated:
            await pool.execute("INSERT INTO t VALUES ($1)", MARK)
    assert "t_id_check" in str(violated.value)
    assert not is_planted("".join(traceback.format_exception(violated.value)))
