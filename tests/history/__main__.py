"""`python -m tests.history --seed S --minutes M [--kills N] [--only sound|without-redis|mutants]`.

Exit code 0: no violation in sound code, and every mutant was caught.
"""

import argparse
import asyncio
import secrets
import sys
from collections import Counter

from sandbox.services.stopping import Stopped, stoppable
from tests.history.check import (
    deaths_at_points,
    open_world,
    run_kills,
    run_mutants,
    run_sound,
)
from tests.history.plans import SHAPES
from tests.history.report import tell, tell_faults, tell_last
from tests.history.storm import Verdict, World


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.history", description=__doc__)
    parser.add_argument("--seed", default=str(secrets.randbelow(10**6)))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kills", type=int, help="SIGKILLs at failpoints, instead of a storm")
    parser.add_argument("--only", choices=("sound", "without-redis", "mutants"))
    given = parser.parse_args(arguments)
    tell(f"seed {given.seed}")
    try:
        with stoppable(), open_world() as world:
            if given.kills:
                return asyncio.run(_kills(world, given.seed, given.kills))
            return asyncio.run(_storms(world, given.seed, given.minutes * 60, given.only))
    except Stopped as stop:
        return stop.exit_code


async def _storms(world: World, seed: str, seconds: float, only: str | None) -> int:
    verdicts, caught = [], 0
    if only != "mutants":
        gone = only == "without-redis"
        verdicts.append(await run_sound(world, seed, seconds, without_redis=gone))
    if only in (None, "mutants"):
        proof = await run_mutants(world, seed, control=True)
        caught = proof.caught
        verdicts += proof.verdicts
    asked = len(SHAPES) if only in (None, "mutants") else 0
    violations = _tell_sum(verdicts, seed, mutants=asked, mutants_caught=caught)
    return 0 if violations == 0 and caught == asked else 1


async def _kills(world: World, seed: str, kills: int) -> int:
    verdict = await run_kills(world, seed, kills)
    died = deaths_at_points(verdict.deaths)
    stuck = next((v.count for v in verdict.violations if v.invariant == "every_run_is_terminal"), 0)
    violations = _tell_sum([verdict], seed, kills=died, stuck=stuck)
    return 0 if violations == 0 and died >= kills else 1


def _tell_sum(verdicts: list[Verdict], seed: str, **facts: int) -> int:
    """Print the table and the last line; return how many violations there were."""
    faults = sum((verdict.faults for verdict in verdicts), Counter[str]())
    violations = sum(v.count for verdict in verdicts for v in verdict.violations)
    tell_faults(faults)
    runs = sum(verdict.runs for verdict in verdicts)
    tell_last(runs=runs, faults=faults.total(), violations=violations, seed=seed, **facts)
    return violations


if __name__ == "__main__":
    sys.exit(main())
