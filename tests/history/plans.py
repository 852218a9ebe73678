"""The shapes of storms: who takes part, what they do, what goes wrong, and for how long."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.history.network import Weather

# The shortest that the settings allow: TTL >= 3 x interval, interval >= 1 s.
TTL_S = 3
SETTINGS: dict[str, Any] = {
    "public_url": "http://queue.test",
    "token_keys": f"storm:{'s' * 40}",
    "receipt_keys": f"storm:{'5e' * 32}",
    "token_ttl_s": 900,
    "lease_ttl_s": TTL_S,
    "heartbeat_interval_s": 1,
    "sweep_interval_s": 1,
    "sweep_degraded_s": 0.5,
    "claim_recheck_s": 1,
    "database_pool_max": 5,
    "workers": 2,
    "drain_s": 3,
    "log_level": "error",
    "log_format": "json",
}

# What a runner does with a job, and how often.
HABITS = {
    "work": 50, "die": 8, "pause": 12, "submit_late": 8, "submit_silent": 4, "release": 5,
    "fail": 6, "sign_off": 3, "submit_again": 4,
}  # fmt: skip
FAULTS = {
    "server_kill": 6, "server_failpoint": 16, "server_stall": 6, "server_pause": 3,
    "server_drain": 4, "redis_flush": 3, "redis_restart": 2, "redis_kill_pubsub": 3,
    "redis_pause": 2, "redis_deaf": 2, "event_early": 10, "event_forged": 6,
    "postgres_restart": 1, "postgres_crash": 1, "postgres_terminate": 3,
}  # fmt: skip
BAD_WEATHER = Weather(
    delay=0.1, drop_request=0.06, drop_answer=0.08, hang_up=0.05, twice_at_once=0.06,
    twice_later=0.05,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """One storm. Durations are seconds."""

    seconds: float
    servers: int = 3
    runners: int = 8
    max_leases: int = 1  # of a runner, unless `two_leases` names it
    two_leases: float = 0.25  # the share of runners that may hold two
    work_s: tuple[float, float] = (0.05, 2.0)
    habits: Mapping[str, float] = field(default_factory=lambda: HABITS)
    weather: Weather = BAD_WEATHER
    faults: Mapping[str, float] = field(default_factory=lambda: FAULTS)
    fault_every_s: tuple[float, float] = (0.2, 1.2)
    stall_points: tuple[str, ...] = ()  # all, when none is named
    stall_s: tuple[float, float] = (0.5, TTL_S + 2.0)
    restart_s: float = 1.0
    pending: int = 4  # runs that wait; the admin adds more when there are fewer
    admin_every_s: tuple[float, float] = (0.2, 0.8)
    cancels: float = 0.08  # how often an admin's turn is a cancel, or a revocation
    revokes: float = 0.06
    replay_every_s: tuple[float, float] = (0.05, 0.6)
    settle_s: float = 90.0
    redis_gone: bool = False  # from the first moment to the last
    mutant: str | None = None
    expected: tuple[str, ...] = ()  # the invariants, one of which the mutant must break


SOUND = Plan(seconds=60.0)
WITHOUT_REDIS = replace(
    SOUND,
    redis_gone=True,
    faults={kind: n for kind, n in FAULTS.items() if kind.startswith(("server", "postgres"))},
)

_QUIET = replace(
    SOUND, weather=Weather(), cancels=0.0, revokes=0.0, replay_every_s=(30.0, 60.0), settle_s=30.0,
    seconds=25.0,
)  # fmt: skip

# Each shape makes its mutant show; sound code in the same storm breaks nothing.
SHAPES: dict[str, Plan] = {
    # Submits that are held up, verified, until their lease is somebody else's.
    "no_submit_fence": replace(
        _QUIET,
        runners=6,
        pending=1,
        two_leases=0.0,
        habits={"work": 1, "submit_silent": 2},
        work_s=(1.5, 4.0),  # whoever claims the run next still holds it when the submit goes on
        faults={"server_stall": 1},
        fault_every_s=(0.2, 0.6),  # some runners are not held up, and claim
        stall_points=("submit_verified",),
        stall_s=(TTL_S + 1.0, TTL_S + 2.0),
        expected=("a_result_belongs_to_the_lease_that_completed",),
    ),
    # Keys that expire while their leases live.
    "trust_the_event": replace(
        _QUIET,
        runners=4,
        habits={"work": 1},
        work_s=(1.0, 3.0),
        faults={"event_early": 1},
        fault_every_s=(0.1, 0.4),
        expected=("no_live_lease_is_flipped_early",),
    ),
    # Claims whose answers are lost, and which are sent again.
    "no_claim_key": replace(
        _QUIET,
        runners=4,
        two_leases=1.0,
        habits={"work": 1},
        weather=Weather(drop_answer=0.2, twice_at_once=0.3, twice_later=0.1),
        faults={"event_forged": 1},
        fault_every_s=(0.5, 1.0),
        expected=("a_retried_claim_shows_the_same_lease",),
    ),
}

# Kills only: jobs that take no time, and every server about to die.
KILLS = replace(
    SOUND,
    runners=8,
    habits={"work": 80, "die": 6, "release": 8, "fail": 6},
    work_s=(0.0, 0.02),
    weather=Weather(),
    faults={},
    restart_s=0.0,
    pending=60,
    cancels=0.05,
    revokes=0.1,
    admin_every_s=(0.05, 0.2),
)


def the_mutants_storm(name: str) -> Plan:
    """The storm of a shape with its mutant in it: it ends when the mutant is caught."""
    return replace(SHAPES[name], mutant=name, seconds=60.0)
