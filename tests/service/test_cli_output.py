"""A stdout that is full, closed or cannot show a letter looks like no other failure."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from client.output import ExitCode
from config.settings import Settings
from tests.service.test_cli_service import ROOT, environment

MakeSettings = Callable[..., Settings]
RUN = [sys.executable, "-m", "cli.entry"]


@pytest.fixture
def settings(make_settings: MakeSettings) -> dict[str, object]:
    """What a command needs to work in this test's database."""
    return {"database_url": make_settings().database_url.get_secret_value()}


async def _tokens(settings: dict[str, object]) -> int:
    connection = await asyncpg.connect(str(settings["database_url"]))
    try:
        return await connection.fetchval("SELECT count(*) FROM admin_tokens")
    finally:
        await connection.close()


def run(*command: str, stdout: Any, settings: dict[str, object], **more: str) -> Any:
    """Run a command with this stdout."""
    return subprocess.run(
        [*RUN, *command], env=environment(**settings) | more, cwd=ROOT, stdout=stdout,
        stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip


def run_closed(*command: str, settings: dict[str, object], descriptor: int = 1) -> Any:
    """Run a command whose stdout, or stderr, is closed."""
    line = f'exec "$@" {descriptor}>&-'
    return subprocess.run(
        ["sh", "-c", line, "sh", *RUN, *command], env=environment(**settings), cwd=ROOT,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@contextmanager
def full() -> Iterator[Any]:
    """A file of a disk that takes no more."""
    with Path("/dev/full").open("w") as file:
        yield file


MINT = ("tokens", "mint", "--name", "me", "--days", "1")


@pytest.mark.gen_test
async def test_a_full_stdout_is_told_apart_from_a_change_that_failed(
    settings: dict[str, object],
) -> None:
    with full() as file:
        done = run(*MINT, stdout=file, settings=settings)
    assert done.returncode == ExitCode.UNWRITTEN, done.stderr
    assert "did its work" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert await _tokens(settings) == 1


@pytest.mark.gen_test
async def test_a_closed_stdout_is_told_as_well(settings: dict[str, object]) -> None:
    done = run_closed(*MINT, settings=settings)
    assert done.returncode == ExitCode.UNWRITTEN, done.stderr
    assert "it is closed" in done.stderr
    assert await _tokens(settings) == 1


@pytest.mark.parametrize(
    "command",
    [
        ("config", "reference"), ("version",), ("db", "status"), ("tokens", "ls"),
        ("tokens", "ls", "--json"), ("--help",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_command_ends_in_a_traceback_for_its_stdout(
    command: tuple[str, ...], settings: dict[str, object]
) -> None:
    with full() as file:
        for done in (
            run(*command, stdout=file, settings=settings),
            run_closed(*command, settings=settings),
        ):
            assert "Traceback" not in done.stderr, done.stderr
            assert "Exception ignored" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", [("config", "show"), ("config", "show", "--json")])
def test_a_letter_that_stdout_cannot_show_is_an_escape(
    command: tuple[str, ...], settings: dict[str, object]
) -> None:
    named = {**settings, "signers_file": "/etc/naïve/測試.yaml"}
    shown = {}
    for encoding in ("ascii", "utf-8"):
        done = run(*command, stdout=subprocess.PIPE, settings=named, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, "")
        shown[encoding] = done.stdout
    assert "\\xefve" in shown["ascii"] or "\\u00efve" in shown["ascii"]
    assert shown["ascii"].isascii()


def test_a_closed_stderr_keeps_notes_out_of_the_result(settings: dict[str, object]) -> None:
    done = run_closed(*MINT, "--json", settings=settings, descriptor=2)
    assert done.returncode == 0
    assert json.loads(done.stdout)["name"] == "me"
    refused = run_closed("tokens", "revoke", "nobody", "--yes", settings=settings, descriptor=2)
    assert (refused.returncode != 0, refused.stdout) == (True, "")


def test_the_exit_codes_are_in_order_and_each_is_one() -> None:
    codes = [code.value for code in ExitCode]
    assert codes == list(range(len(codes)))
