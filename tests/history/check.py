"""The checks that the command and the tests run: a sound storm, the mutants' storms, the kills."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from db.migrate import migrate
from sandbox.services import servers
from sandbox.services.process_supervisor import ProcessSupervisor
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.history.failpoints import POINTS
from tests.history.plans import KILLS, SHAPES, SOUND, WITHOUT_REDIS, Plan, the_mutants_storm
from tests.history.report import tell, tell_verdict
from tests.history.storm import Storm, Verdict, World

# A kill mode that gets nowhere ends all the same.
KILLS_S = 3600.0


@dataclass(frozen=True, slots=True)
class Proof:
    """What the mutants' storms showed."""

    caught: int
    verdicts: list[Verdict]  # of sound code in the same storms


@contextmanager
def open_world() -> Iterator[World]:
    """Yield private servers with a migrated template database, and a Sigstore."""
    home = ProcessSupervisor(None)  # removes its folder however we end
    try:
        with servers.postgres() as postgres, servers.redis() as redis_server:
            migrate(postgres.dsn)
            sigstore = ThrowawaySigstore.create(home.folder / "sigstore")
            yield World(postgres, redis_server, sigstore, home.folder)
    finally:
        home.close()


async def run_sound(
    world: World, seed: str, seconds: float, *, without_redis: bool = False
) -> Verdict:
    """Storm the service as it is, with Redis coming and going, or gone for the whole storm."""
    name, plan = ("without Redis", WITHOUT_REDIS) if without_redis else ("sound", SOUND)
    verdict = await Storm(world, replace(plan, seconds=seconds), f"{seed}:{name}", tell).run()
    tell_verdict(name, verdict)
    return verdict


async def run_mutants(world: World, seed: str, *, control: bool) -> Proof:
    """Storm each mutant until it shows; `control`: and sound code in the same storm."""
    caught, verdicts = 0, []
    for name, plan in SHAPES.items():
        verdict = await Storm(world, the_mutants_storm(name), f"{seed}:{name}", tell).run()
        broken = {violation.invariant for violation in verdict.violations}
        is_caught = bool(broken & set(plan.expected))
        caught += is_caught
        said = f"caught by {', '.join(sorted(broken))}" if is_caught else "NOT CAUGHT"
        tell(f"mutant {name}: {said}, after {verdict.seconds:.0f} s")
        if control:
            verdicts.append(await _control(world, f"{seed}:{name}:control", name, plan))
    return Proof(caught, verdicts)


async def run_kills(world: World, seed: str, kills: int) -> Verdict:
    """SIGKILL servers at failpoints, so many times."""
    storm = Storm(world, replace(KILLS, seconds=KILLS_S), f"{seed}:kills", tell)
    points = sorted(POINTS)
    storm.armed = lambda rng: _draw_points(rng, points)
    storm.enough = lambda group: deaths_at_points(group.deaths) >= kills
    verdict = await storm.run()
    tell_verdict("kills", verdict)
    return verdict


def deaths_at_points(deaths: Counter[str]) -> int:
    """Return how many servers died at a failpoint."""
    return sum(count for cause, count in deaths.items() if cause in POINTS)


def _draw_points(rng: random.Random, points: list[str]) -> list[str]:
    """Three points at a time: whichever comes first, so that rare ones have their turn too."""
    return rng.sample(points, 3)


async def _control(world: World, seed: str, name: str, plan: Plan) -> Verdict:
    verdict = await Storm(world, plan, seed, tell).run()
    tell_verdict(f"sound code in the storm of {name}", verdict)
    return verdict
