"""`python -m tests.fuzz --mutants N --seed S [--only NUMBER] [--keep FOLDER]`.

Exit code 0: nothing changed was accepted, nothing honest refused, no answer was the server's fault,
and no request held the loop over 250 ms. Failing mutants are in the folder.
"""

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sandbox.services.stopping import Stopped, stoppable
from tests.fuzz.driver import Campaign, Driver
from tests.fuzz.world import Servers, open_servers, open_world

LOG_LINES = 5


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", default=str(secrets.randbelow(10**6)))
    parser.add_argument("--only", type=int, help="make and submit one mutant again, by its number")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"))
    given = parser.parse_args(arguments)
    numbers = range(given.mutants) if given.only is None else range(given.only, given.only + 1)
    console = Console(file=sys.stdout)
    console.print(f"seed {given.seed}")
    try:
        with stoppable(), open_servers() as under:
            campaign = asyncio.run(_attack(under, given.seed, numbers, given.keep, console))
            _tell(campaign, console, given.keep, under)
    except Stopped as stop:
        return stop.exit_code
    return 0 if campaign.sound else 1


async def _attack(
    under: Servers, seed: str, numbers: range, keep: Path, console: Console
) -> Campaign:
    columns = (
        TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("accepted changed {task.fields[changed]}, 5xx {task.fields[faults]}, "
                   "violations {task.fields[violations]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("mutants", total=len(numbers), changed=0, faults=0, violations=0)

        def told(campaign: Campaign) -> None:
            progress.update(
                bar, completed=campaign.mutants, changed=campaign.accepted_changed,
                faults=campaign.status_5xx, violations=campaign.violations.total(),
            )  # fmt: skip

        async with open_world(under) as world:
            return await Driver(world, seed, keep, _now_and_then(told)).run(numbers)


def _now_and_then(told: Callable[[Campaign], None]) -> Callable[[Campaign], None]:
    """To draw the bar for every mutant would take longer than to judge it."""
    last = 0.0

    def sometimes(campaign: Campaign) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            told(campaign)

    return sometimes


def _tell(campaign: Campaign, console: Console, keep: Path, under: Servers) -> None:
    answers: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    for (kind, code), count in campaign.codes.items():
        answers[code] += count
        kinds.setdefault(kind.split("+")[0], Counter())[code] += count
    table = Table("mutation", "mutants", "answers")
    for kind, codes in sorted(kinds.items()):
        shown = ", ".join(f"{count} {code}" for code, count in codes.most_common(8))
        table.add_row(kind, str(codes.total()), shown)
    table.add_row("all", str(answers.total()), f"{campaign.busy} of them 503 busy")
    console.print(table)
    console.print(f"the loop was held {campaign.held_ms:.1f} ms at most, by {campaign.held_by}")
    for line in campaign.evidence:
        console.print(f"VIOLATION {line}", markup=False)
    if not campaign.sound:
        console.print(f"failing mutants are in {keep.resolve()}; what the server logged:")
        for line in under.log.read_text(errors="replace").splitlines()[-LOG_LINES:]:
            console.print(line, markup=False)
    seed = campaign.seed
    last = {
        "mutants": campaign.mutants,
        "accepted_changed": campaign.accepted_changed,
        "status_5xx": campaign.status_5xx,
        "max_loop_ms": round(campaign.held_ms, 1),
        "seed": int(seed) if seed.isdecimal() else seed,
    }
    sys.stdout.write(json.dumps(last) + "\n")


if __name__ == "__main__":
    sys.exit(main())
