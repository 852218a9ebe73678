"""What Linux says of our processes: memory, and who used the cores."""

import contextlib
import os
import resource
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
KIB_PER_PAGE = os.sysconf("SC_PAGE_SIZE") // 1024
SERVER = "server"
OTHERS = "other programs of the machine"
NAMES = {"postgres": "PostgreSQL", "redis-server": "Redis", "nginx": "nginx", "wrk": "wrk"}


def resident_kib(pid: int) -> int:
    """Return the resident set of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * KIB_PER_PAGE


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used, its threads' too."""
    return _ticks(pid) / TICKS


def cpu_by_program() -> dict[str, float]:
    """Return the processor time of our descendants that run, by program, in seconds.

    Those that have ended and were waited for by us (load generators) are under "load generator".
    """
    used: dict[str, float] = defaultdict(float)
    for pid, name in _descendants(os.getpid(), None):
        with contextlib.suppress(OSError):  # it has just ended
            used[name] += cpu_s(pid)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    used["load generator"] += ended.ru_utime + ended.ru_stime
    own = resource.getrusage(resource.RUSAGE_SELF)
    used["benchmark"] = own.ru_utime + own.ru_stime
    used[OTHERS] = _machine_s() - sum(used.values())
    return dict(used)


def cores_between(
    before: dict[str, float], after: dict[str, float], seconds: float
) -> dict[str, float]:
    """Return the cores each program used on average between two looks, the busiest first."""
    used = {name: (cpu - before.get(name, 0.0)) / seconds for name, cpu in after.items()}
    return dict(sorted(used.items(), key=lambda item: -item[1]))


def _machine_s() -> float:
    """Return the time all cores were busy: /proc/stat without idle and waiting for disks."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS


def _ticks(pid: int) -> int:
    # The name, in parentheses, may hold spaces; user and system time are 12 and 13 after it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _descendants(pid: int, within: str | None) -> Iterator[tuple[int, str]]:
    """Yield all processes below, each with its program; a server's workers are the server."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for t in tasks for c in (t / "children").read_text().split()]
        programs = [within or _program(child) for child in children]
    except OSError:
        return
    for child, name in zip(children, programs, strict=True):
        yield child, name
        yield from _descendants(child, SERVER if name == SERVER else None)


def _program(pid: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if b"bench.support.server" in command:
        return SERVER
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    return NAMES.get(name, name)
