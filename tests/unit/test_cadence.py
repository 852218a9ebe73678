"""Cadence: intervals are short in a small fleet, and stretched as heartbeats grow."""

import pytest
from pydantic import ValidationError

from broker.leases.cadence import BEATS_PER_S, WINDOW_S, Cadence
from config.settings import Settings


def simulated(cadence: Cadence, leases: int, seconds: int, begun: int = 0) -> list[int]:
    """Let so many leases beat at the interval they are told; return the interval at each second."""
    told = []
    for second in range(begun, begun + seconds):
        cadence.count(round(leases / cadence.interval_s), now=float(second))
        told.append(cadence.interval_s)
    return told


def test_a_small_fleet_beats_every_10_s_and_its_leases_live_60() -> None:
    cadence = Cadence(Settings())
    assert (cadence.interval_s, cadence.ttl_s) == (10, 60)
    assert set(simulated(cadence, 900, 300)) == {10}
    assert cadence.ttl_s == 60


def test_a_large_fleet_beats_every_30_s_and_comes_back_when_it_shrinks() -> None:
    cadence = Cadence(Settings())
    told = simulated(cadence, 10_000, 300)
    assert (told[-1], cadence.ttl_s) == (30, 300)
    assert simulated(cadence, 100, 300, begun=300)[-1] == 10
    assert cadence.ttl_s == 60


@pytest.mark.parametrize("leases", [1500, 2000, 2500])
def test_between_both_a_process_keeps_its_heartbeats_at_the_bound(leases: int) -> None:
    cadence = Cadence(Settings())
    told = simulated(cadence, leases, 600)
    assert max(told[-60:]) - min(told[-60:]) <= 1, "it does not swing"
    assert leases / told[-1] == pytest.approx(BEATS_PER_S, rel=0.15)
    assert 60 < cadence.ttl_s < 300
    assert cadence.ttl_s >= 3 * cadence.interval_s


def test_after_a_silence_the_window_begins_anew() -> None:
    cadence = Cadence(Settings())
    simulated(cadence, 10_000, 120)
    cadence.count(1, now=120 + 2 * WINDOW_S)
    assert cadence.interval_s == 10


def test_values_that_are_set_stay_fixed() -> None:
    fixed = Settings(lease_ttl_s=90, lease_ttl_min_s=90, heartbeat_interval_s=15,
                     heartbeat_interval_min_s=15)  # fmt: skip
    cadence = Cadence(fixed)
    assert set(simulated(cadence, 10_000, 120)) == {15}
    assert cadence.ttl_s == 90
    # Shorter than the shortest of the defaults: a test, or a demo.
    short = Cadence(Settings(lease_ttl_s=3, heartbeat_interval_s=1))
    assert (short.interval_s, short.ttl_s) == (1, 3)


def test_a_short_lease_that_one_lost_beat_would_cost_is_refused() -> None:
    with pytest.raises(ValidationError, match="lease_ttl_min_s"):
        Settings(lease_ttl_min_s=20)
