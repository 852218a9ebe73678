"""`python -m tests.guards [--only WORDS]`: remove each guard in a copy, and see a test fail.

Exit code 0: without its guard, at least one of the tests that are named for it fails, for every
guard; and all of them pass while the guards are there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.guards.listed import ALL, ROOT, Guard, without

AT_ONCE = 2
LIMIT_S = 180
FAILED = 1  # pytest's exit codes: 0 all passed, 1 some failed, others could not run

console = Console()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the tests said of a tree: pytest's exit code, and the first test that failed."""

    code: int
    failed: str


def main() -> int:
    """Try all guards, or those with WORDS in their name; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.guards", description=__doc__)
    parser.add_argument("--only", default="", help="guards whose name holds these words")
    words = parser.parse_args().only
    guards = [guard for guard in ALL if words in guard.name]
    started = time.monotonic()
    sound = _run({}, sorted({test for guard in guards for test in guard.tests.split()}))
    if sound.code != 0:
        console.print(f"with every guard in its place, a test fails: {sound.failed}")
        return 1
    outcomes = _try_all(guards)
    _show(guards, outcomes)
    caught = sum(outcome.code == FAILED for outcome in outcomes.values())
    seconds = round(time.monotonic() - started)
    console.print(json.dumps({"guards": len(guards), "caught": caught, "seconds": seconds}))
    return 0 if caught == len(guards) else 1


def _try_all(guards: list[Guard]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tried = {
            pool.submit(_run, {guard.file: without(guard)}, guard.tests.split()): guard
            for guard in guards
        }
        for number, done in enumerate(as_completed(tried), start=1):
            guard, outcome = tried[done], done.result()
            outcomes[guard.name] = outcome
            word = "caught" if outcome.code == FAILED else "SURVIVED"
            console.print(f"{number:3} of {len(guards)}  {word:8}  {guard.name}", highlight=False)
    return outcomes


def _run(changes: dict[str, str], tests: Iterable[str]) -> Outcome:
    """Run tests in a copy of the tree with some files changed."""
    with tempfile.TemporaryDirectory(prefix="bakeoff-queue-guards-") as name:
        tree = Path(name)
        _copy(tree)
        for file, text in changes.items():
            (tree / file).write_text(text, "utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(
                command, cwd=tree, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Outcome(FAILED, f"(nothing came in {LIMIT_S} s)")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    first = failed[0].removeprefix("FAILED ").split(" - ")[0] if failed else ""
    return Outcome(done.returncode, first)


def _copy(tree: Path) -> None:
    """Copy what git knows or could know of, so that work in progress is tried as well."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        if (ROOT / name).is_file():
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())


def _show(guards: list[Guard], outcomes: dict[str, Outcome]) -> None:
    table = Table("guard", "removed in", "test that fails without it")
    for guard in guards:
        outcome = outcomes[guard.name]
        told = outcome.failed if outcome.code == FAILED else f"NONE (pytest said {outcome.code})"
        table.add_row(guard.name, guard.place, told)
    Console(width=200).print(table)


if __name__ == "__main__":
    sys.exit(main())
