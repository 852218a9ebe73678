"""`demo` and `dev` for real: what they show, and that nothing of them stays, however they end."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from sandbox.demo.board import Board
from sandbox.demo.demo import demo_runs
from sandbox.demo.report import Report, verdict
from sandbox.services.children import Event
from tests.support.fleet import run_of

PROGRAM = str(Path(sys.executable).with_name("bakeoff-queue"))
# What would lead into somebody's production, or nowhere, if the demo let it.
CALLERS_OWN = {
    "BAKEOFF_QUEUE_DATABASE_URL": "postgres://production.invalid/bakeoff",
    "BAKEOFF_QUEUE_REDIS_LEASE_URL": "redis://production.invalid/1",
    "BAKEOFF_QUEUE_LISTEN_ADDRESS": "203.0.113.1",
    "BAKEOFF_QUEUE_TOKEN": "bqa_production",
    "PGPORT": "1",
    "ALL_PROXY": "http://127.0.0.1:1",
}


@pytest.fixture
def base() -> Iterator[Path]:
    """The temporary folder of a command: open to the servers' user, empty when all is gone."""
    folder = Path(tempfile.mkdtemp(prefix="bq-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def start(base: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start the program as a shell would, in a process group of its own."""
    return subprocess.Popen(
        [PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={**os.environ, "TMPDIR": str(base), **variables},
        start_new_session=True,
    )


def read_until(word: str, process: subprocess.Popen[str]) -> list[str]:
    """The lines up to the one that holds `word`, which must come."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if word in line:
            return lines
    pytest.fail(f"no {word!r} in {lines}: {text_of(process.stderr)}")


def text_of(pipe: IO[str] | None) -> str:
    return pipe.read() if pipe else ""


def family_of(pid: int) -> set[int]:
    """The process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def is_alive(pid: int) -> bool:
    """Whether it runs; an orphan that init has yet to reap does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids: set[int]) -> None:
    for pid in pids:
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([process], [], [], 15)
            assert ended, Path(f"/proc/{pid}/cmdline").read_text()
        finally:
            os.close(process)


def assert_nothing_is_left(base: Path, family: Set[int] = frozenset()) -> None:
    assert [pid for pid in family if is_alive(pid)] == []
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                said = (process / name).read_bytes()
            except OSError:
                continue
            assert str(base).encode() not in said, (process, said)
    assert list(base.iterdir()) == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_demo_shows_a_lost_run_found_again_and_leaves_nothing(base):
    demo = start(base, "demo", **CALLERS_OWN)
    out, err = demo.communicate(timeout=120)
    assert (demo.returncode, err) == (0, "")
    summary = json.loads(out.splitlines()[-1])
    assert summary.pop("lapsed") >= 1  # a starved machine may lose another one, and find it again
    assert 0 < summary.pop("seconds") < 120
    assert summary == {"runs": 15, "complete": 14, "unclaimable": 1, "model_metric_rows": 168}
    for told in ("killed garage-24gb (SIGKILL)", "lease lapsed", "needs 934 GB, you offer 80"):
        assert told in out
    assert "\x1b" not in out
    assert_nothing_is_left(base)


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "killed garage"), (signal.SIGTERM, "starting a private PostgreSQL")],
)
def test_a_stopped_demo_is_gone_at_once_and_says_so_in_one_line(base, number, moment):
    demo = start(base, "demo")
    read_until(moment, demo)
    family = family_of(demo.pid)
    os.killpg(demo.pid, number)
    _, err = demo.communicate(timeout=15)
    assert demo.returncode == 128 + number
    assert err == f"demo stopped ({number.name}): nothing is left running\n"
    assert_nothing_is_left(base, family)


def test_a_sigkilled_demo_leaves_nothing(base):
    demo = start(base, "demo")
    read_until("killed garage", demo)
    family = family_of(demo.pid)
    assert len(family) > 8  # three leashes, PostgreSQL and its own, Redis, two servers, two runners
    demo.kill()
    demo.communicate()
    wait_until_gone(family)
    assert_nothing_is_left(base, family)


@pytest.mark.parametrize(
    ("variable", "code"),
    [("BAKEOFF_QUEUE_LEASE_TTL", 2), ("BAKEOFF_QUEUE_SANDBOX_REDIS", 1)],
)
@pytest.mark.parametrize("command", ["demo", "dev"])
def test_what_keeps_it_from_starting_is_one_line(base, command, variable, code):
    process = start(base, command, **{variable: "/nowhere"})
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert len(err.splitlines()) == 1
    assert ("/nowhere" if code == 1 else variable) in err
    assert_nothing_is_left(base)


def test_an_occupied_port_is_one_line_with_the_fix(base):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        process = start(base, "dev", "--port", port)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert f"127.0.0.1:{port}" in err
    assert "--port" in err


def dev_is_up(dev: subprocess.Popen[str]) -> dict[str, str]:
    """What `dev` prints for the shell to set, once it is up."""
    lines = read_until("results verify", dev)
    exports = (line.removeprefix("export ") for line in lines if line.startswith("export "))
    settings = dict(each.split("=", 1) for each in exports)
    curl = next(line for line in lines if line.startswith("curl "))
    assert settings["BAKEOFF_QUEUE_TOKEN"] in curl
    assert Path(settings["BAKEOFF_QUEUE_TRUSTED_ROOT"]).is_file()
    return settings


def stop(dev: subprocess.Popen[str]) -> None:
    os.killpg(dev.pid, signal.SIGINT)
    _, err = dev.communicate(timeout=15)
    assert (dev.returncode, "Traceback" in err) == (0, False)


def test_dev_keeps_its_runs_and_its_token_over_a_restart(base):
    data, port = base / "data", str(free_port())
    queue = "/api/admin/queue"
    dev = start(base, "dev", "--data", str(data), "--port", port, **CALLERS_OWN)
    settings = dev_is_up(dev)
    headers = {"Authorization": f"Bearer {settings['BAKEOFF_QUEUE_TOKEN']}"}
    with httpx.Client(base_url=settings["BAKEOFF_QUEUE_URL"], headers=headers) as api:
        answer = api.post(queue, json={"runs": [run_of()]})
        assert answer.status_code == 201, answer.text
    family = family_of(dev.pid)
    stop(dev)
    wait_until_gone(family)
    assert [path.name for path in base.iterdir()] == ["data"]
    secret = ("admin-token", "demo-runner.key", "token-keys", "receipt-keys", "sigstore/ca.key")
    assert [(data / name).stat().st_mode & 0o777 for name in secret] == [0o600] * 5

    dev = start(base, "dev", "--data", str(data), "--port", port)
    assert dev_is_up(dev) == settings
    with httpx.Client(base_url=settings["BAKEOFF_QUEUE_URL"], headers=headers) as api:
        kept = [run["run_id"] for run in api.get(queue).json()["runs"]]
    assert kept == [answer.json()["runs"][0]["run_id"]]
    stop(dev)


def test_the_grid_that_dev_tells_to_enqueue_is_enqueued_as_it_is_typed(base):
    dev = start(base, "dev", "--port", str(free_port()))
    lines = read_until("results verify", dev)
    typed = [line for line in lines if line.startswith("export ") or " queue add " in line]
    shell = subprocess.run(
        ["sh", "-e", "-c", "\n".join(typed)], capture_output=True, text=True, timeout=60, cwd="/"
    )
    stop(dev)
    assert (shell.returncode, shell.stderr) == (0, "")
    _, *rows = (line.split() for line in shell.stdout.splitlines())
    assert [row[-2:] for row in rows] == [["PENDING", "true"]] * 8


def test_dev_without_data_leaves_nothing_when_it_is_killed(base):
    dev = start(base, "dev", "--port", str(free_port()))
    dev_is_up(dev)
    family = family_of(dev.pid)
    dev.kill()
    dev.communicate()
    wait_until_gone(family)
    assert_nothing_is_left(base, family)


def test_the_demo_enqueues_enough_and_only_one_run_that_fits_nobody():
    runs = demo_runs()
    assert len(runs) >= 12
    assert len({run["model"]["name"] for run in runs}) >= 6
    assert [run["model"]["name"] for run in runs].count("Llama-3.1-405B-Instruct") == 1
    assert {run["config"]["run"]["seed"] for run in runs} == {42, 43}


def shown(run_id: str, *ends: tuple[str, str], **changes: Any) -> dict[str, Any]:
    """A run as the admin API shows it, with its attempts as (how, runner)."""
    attempts = [{"how": how, "runner_id": runner} for how, runner in ends]
    receipt = {"rows": {"model_metrics": 2}} if ends else None
    run = {"run_id": run_id, "model": "m", "status": "COMPLETE", "need_gb": 5, "error_detail": None}
    return {**run, "attempts": attempts, "receipt": receipt, **changes}


def judged(
    *runs: dict[str, Any], unfit: int = 1, cells: int = 2, heard: tuple[Event, ...] = ()
) -> str | None:
    board = Board("lab", 80)
    board.lost = "lost"
    for event in heard:
        board.hear(event)
    metrics: Any = {run["run_id"]: {"cells": cells} for run in runs if run["receipt"]}
    return verdict(Report(runs, metrics, {"count": unfit}, "lab"), board)


def test_the_verdict_names_what_did_not_happen():
    lost = shown("lost", ("lapsed", "garage"), ("completed", "lab"))
    big = shown("big", status="PENDING", need_gb=934)
    assert judged(lost, big) is None
    assert "m is PENDING" in str(judged(lost, big, shown("other", status="PENDING")))
    assert "m is FAILED" in str(judged(lost, big, shown("other", status="FAILED", need_gb=934)))
    assert "explained" in str(judged(lost, big, unfit=0))
    assert "metric rows" in str(judged(lost, big, cells=1))
    doubt = Event("lab", "receipt_doubtful", {"run_id": "lost", "why": "bad signature"})
    assert "bad signature" in str(judged(lost, big, heard=(doubt,)))
    assert "did not lapse" in str(judged(shown("lost", ("completed", "garage")), big))
    by_itself = shown("lost", ("lapsed", "garage"), ("completed", "garage"))
    assert "by another" in str(judged(by_itself, big))


def test_the_demo_is_not_over_before_the_last_run_is_explained():
    board = Board("lab", 80)
    big = {"run_id": "big", "status": "PENDING", "need_gb": 934}
    reason = {"code": "vram", "count": 1, "nearest": "m", "detail": "needs 934 GB, you offer 80"}
    idle = Event("lab", "idle", {"reasons": [reason]})
    assert not board.finished
    board.see([big])
    board.lost = "lost"
    board.hear(Event("office", "idle", idle.facts))
    assert not board.finished  # a smaller runner's word says nothing about what fits nobody
    board.hear(idle)
    assert board.finished
    board.see([big, {"run_id": "other", "status": "IN_PROGRESS", "need_gb": 5}])
    assert not board.finished
