"""Load over HTTP, from a process of its own: wrk, or client.py without it."""

import asyncio
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

SCRIPT = Path(__file__).with_name("load.lua")
_rounds = count(1)


class LoadFailed(Exception):
    """Requests were refused or lost: the figure would mean nothing."""


@dataclass(frozen=True, slots=True)
class Request:
    """One POST of a plan."""

    path: str
    token: str
    body: str = "{}"


@dataclass(frozen=True, slots=True)
class Load:
    """What one round of load took."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Answered requests per second."""
        return self.requests / self.seconds


def generator() -> str:
    """Return the name of what sends the load."""
    return "wrk" if shutil.which("wrk") else "bench.support.client (asyncio)"


@contextmanager
def plan(requests: Iterable[Request]) -> Iterator[Path]:
    """Yield a file of requests, sent one after the other, from the first again after the last."""
    with TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder, "plan")
        file.write_text("".join(f"{r.path}\t{r.token}\t{r.body}\n" for r in requests))
        yield file


async def send(port: int, plan: Path, *, connections: int, seconds: int) -> Load:
    """Send a plan for so long. Raises LoadFailed when any request is not answered 2xx."""
    prefix = f"round-{next(_rounds)}-"
    if shutil.which("wrk"):
        argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(SCRIPT)]
        argv += [f"http://127.0.0.1:{port}", "--", str(plan), prefix]
    else:
        argv = [
            sys.executable,
            "-m",
            "bench.support.client",
            str(port),
            str(connections),
            str(seconds),
        ]
        argv += [str(plan), prefix]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    try:
        said, _ = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        raise
    if process.returncode:
        raise LoadFailed(f"{argv[0]} ended with {process.returncode}")
    found = json.loads(said.decode().splitlines()[-1])
    refused, broken = found.pop("refused"), found.pop("broken")
    if refused or broken or not found["requests"]:
        raise LoadFailed(
            f"{refused} requests were refused and {broken} connections broken of {found};"
            " a plan that is sent twice within a round claims twice for a runner: give more runners"
        )
    return Load(**found)
