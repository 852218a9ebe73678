"""Each kind of outage is told as what it is, and logged with its cause under the request's id."""

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import asyncpg
import pytest
from structlog.testing import capture_logs

from config.settings import Settings
from db.pool import Primary, Unreachable
from handlers.errors import refusal_of
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, code_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]

# What PostgreSQL raises: words of the answer, and of the log. Of 40001 see test_pool.py.
CONDITIONS = {
    "53100": "disk is full",
    "53200": "out of memory",
    "53300": "no more connections",
    "53400": "one of its limits",
    "55P03": "holds a lock",
    "57014": "took too long",
    "57P01": "starting or stopping",
    "58030": "read or write its files",
    "25006": "read-only",
    "40001": "deadlock",
}


async def pause(fleet: Fleet) -> tuple[int, str, str, list[str]]:
    """Change a runner's row; return status, code, detail and the causes logged."""
    with capture_logs() as lines:
        answer = await fleet.admin("POST", "/runners/runner-a/pause", json={"reason": "x"})
    body = answer.json()
    causes = [
        line["cause"] for line in lines
        if line["event"] == "http.unavailable" and line["request_id"] == body["request_id"]
    ]  # fmt: skip
    return *code_of(answer), body["detail"], causes


@pytest.mark.gen_test
async def test_each_condition_of_postgresql_has_its_words(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.sign_on()
        await fleet.pool.execute(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE 'secret of %', TG_TABLE_NAME"
            " USING ERRCODE = obj_description('runners'::regclass); END $$"
        )
        await fleet.pool.execute(
            "CREATE TRIGGER fail BEFORE UPDATE ON runners FOR EACH ROW EXECUTE FUNCTION fail()"
        )
        for state, words in CONDITIONS.items():
            await fleet.pool.execute(f"COMMENT ON TABLE runners IS '{state}'")
            status, code, detail, causes = await pause(fleet)
            assert (status, code) == (503, "unavailable"), state
            assert words in detail, state
            assert "secret" not in detail, state
            (cause,) = causes
            assert f" {state}: secret of runners" in cause


@pytest.mark.gen_test
async def test_a_lock_that_another_session_holds_is_told_as_a_lock(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.sign_on()
        async with fleet.transaction() as connection:
            await connection.execute("LOCK TABLE runners")
            status, _, detail, causes = await pause(fleet)
        assert (status, "holds a lock" in detail) == (503, True)
        assert "LockNotAvailableError 55P03" in causes[0]


def full() -> IO[bytes]:
    """Open a file of a disk that takes no more."""
    return open("/dev/full", "wb")  # noqa: PTH123 (the spool closes it)


@pytest.mark.gen_test
async def test_an_upload_that_cannot_be_stored_is_told_as_what_it_is(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        made = tempfile.TemporaryFile
        failing: list[tuple[str, str, Callable[[], IO[bytes]]]] = [
            ("disk of this server is full", "OSError: [Errno 28]", full),
            ("No such file", "FileNotFoundError: [Errno 2]", lambda: made(dir=tmp_path / "none")),
        ]
        for words, cause, stored in failing:
            with monkeypatch.context() as patched, capture_logs() as lines:
                patched.setattr(tempfile, "TemporaryFile", stored)
                answer = await runner.submit(job)
            assert code_of(answer) == (503, "unavailable"), answer.text
            assert words in answer.json()["detail"]
            assert str(tmp_path) not in answer.json()["detail"]
            (line,) = [each for each in lines if each["event"] == "http.unavailable"]
            assert line["request_id"] == answer.json()["request_id"]
            assert line["cause"].startswith(cause)
        assert (await runner.submit(job)).status_code == 201


@pytest.mark.gen_test
async def test_a_server_that_is_not_there_is_unreachable_and_no_file_of_ours(
    tmp_path: Path,
) -> None:
    for dsn in (f"postgresql:///x?host={tmp_path}", "postgresql://u@127.0.0.1:1/x"):
        with pytest.raises(Unreachable) as raised:
            await Primary(dsn).connect(timeout=5)
        assert "cannot be reached" in str(refusal_of(raised.value))


def test_what_is_no_outage_stays_a_fault_of_ours() -> None:
    for error in (ValueError(), asyncpg.UndefinedTableError("x"), KeyError("x")):
        assert code(error) == "Internal"
    assert code(OSError(errno.EMFILE, "Too many open files")) == "Unavailable"


def code(error: Exception) -> str:
    """Return the name of the error that tells of this one."""
    return type(refusal_of(error)).__name__
