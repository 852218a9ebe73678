"""What a benchmark says: its options, its rounds, its figure in the table and in latest.json."""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from bench.support.load import Load, generator

LATEST = Path(__file__).parents[1] / "results/latest.json"
NOT_HERE = 3  # exit code of a benchmark whose tools this machine lacks: no figure, and no fault
PACKAGES = ("tornado", "asyncpg", "redis", "orjson", "pyjwt")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure. `quick` only shows that the benchmark works."""

    quick: bool
    rounds: int
    seconds: int
    only: tuple[str, ...]
    runners: int | None

    def wants(self, arm: str) -> bool:
        """Return whether this arm is to be measured."""
        return not self.only or arm in self.only


@dataclass(frozen=True, slots=True)
class Limit:
    """A ratio and what it must reach; `most` turns it round."""

    ratio: float
    target: float
    most: bool = False

    @property
    def holds(self) -> bool:
        """Whether it is reached."""
        return self.ratio <= self.target if self.most else self.ratio >= self.target

    def __str__(self) -> str:
        return f"{'<=' if self.most else '>='} {self.target:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `ok` is what its limits say."""

    id: str
    what: str
    value: float
    unit: str
    limits: Mapping[str, Limit]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every limit is reached."""
        return all(limit.holds for limit in self.limits.values())

    def as_json(self) -> dict[str, Any]:
        """Its member of latest.json."""
        return {
            "what": self.what,
            "value": round(self.value, 3),
            "unit": self.unit,
            "ratios": {name: round(limit.ratio, 3) for name, limit in self.limits.items()},
            "target": {name: str(limit) for name, limit in self.limits.items()},
            "ok": self.ok,
            "details": self.details,
            "measured": {"at": _now(), "commit": _commit()},
        }


def options(argv: Sequence[str] | None = None, *, rounds: int = 3, seconds: int = 3) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it works, no more")
    parser.add_argument("--rounds", type=int, default=rounds, help="of each arm, in turn")
    parser.add_argument("--seconds", type=int, default=seconds, help="of a round")
    parser.add_argument("--only", action="append", default=[], help="an arm, and no other")
    parser.add_argument("--runners", type=int, default=None, help="that have signed on")
    given = parser.parse_args(argv)
    if given.quick:
        given.rounds, given.seconds = 1, 1
    return Options(given.quick, given.rounds, given.seconds, tuple(given.only), given.runners)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that so many percent of `values` do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


async def in_turn(
    arms: Mapping[str, Callable[[], Awaitable[Found]]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[Found]]:
    """Measure the arms A B C A B C ..., after a round of each that does not count."""
    found: dict[str, list[Found]] = {name: [] for name in arms}
    for number in range(rounds + warm_up):
        for name, measure in arms.items():
            taken = await measure()
            if number or not warm_up:
                found[name].append(taken)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of the rounds, and all of them."""
    return {"median": round(statistics.median(values), 3), "rounds": [round(v, 3) for v in values]}


def load_spread(loads: Sequence[Load]) -> dict[str, Any]:
    """Return rate and latencies of the rounds of one arm."""
    return {
        "rate": spread([load.rate for load in loads]),
        "p50_ms": spread([load.p50_ms for load in loads]),
        "p99_ms": spread([load.p99_ms for load in loads]),
    }


def print_arms(title: str, arms: Mapping[str, Sequence[float]], base: str | None) -> None:
    """Print a table of medians and spread, and the ratio to `base`."""
    table = Table(title, "median", "spread", *([f"ratio to {base}"] if base in arms else []))
    for name, values in arms.items():
        median = statistics.median(values)
        cells = [name, f"{median:,.2f}", f"{min(values):,.2f} to {max(values):,.2f}"]
        if base in arms:
            cells.append(f"{median / statistics.median(arms[base]):.2f}")
        table.add_row(*cells)
    Console().print(table)


def publish(figure: Figure, wanted: Options) -> int:
    """Print the figure and keep it in latest.json; a quick or partial one is only printed.

    Returns the exit code: 0 whatever the ratio, because a busy machine is not a fault.
    """
    print_table({figure.id: figure.as_json()})
    if not (wanted.quick or wanted.only):
        keep({figure.id: figure.as_json()})
    return 0


def keep(members: Mapping[str, Any]) -> None:
    """Write members of latest.json; the others stay as they are, with their own date."""
    known = json.loads(LATEST.read_text()) if LATEST.exists() else {}
    LATEST.parent.mkdir(exist_ok=True)
    merged = {**known, **members, "machine": machine()}
    LATEST.write_text(json.dumps(dict(sorted(merged.items())), indent=2) + "\n")


def print_table(members: Mapping[str, Any]) -> None:
    """Print what latest.json has of the benchmarks."""
    table = Table("id", "what", "value")
    for column in ("ratio", "target", "ok"):
        table.add_column(column, no_wrap=True)
    for name, figure in members.items():
        table.add_row(
            name,
            figure["what"],
            f"{figure['value']:,.2f} {figure['unit']}",
            "\n".join(f"{arm} {ratio:.2f}" for arm, ratio in figure["ratios"].items()),
            "\n".join(figure["target"].values()),
            "yes" if figure["ok"] else "NO",
        )
    Console().print(table)


def introduce() -> None:
    """Print the command line and what it runs on."""
    print(f"command: {' '.join(['python', '-m', *_module()])}")
    print(f"on: {json.dumps(machine())}", flush=True)


def machine() -> dict[str, Any]:
    """Return what the figures were taken on, and with."""
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "load_generator": generator(),
        "load_average": round(os.getloadavg()[0], 1),
        "date": _now(),
        "commit": _commit(),
    }


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name if spec else sys.argv[0], *sys.argv[1:]]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _commit() -> str:
    argv = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
