"""max_runtime_s: no heartbeat extends a run beyond it, and its runner is told ahead."""

from collections.abc import Callable
from typing import Any

import pytest

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_sweep(monkeypatch)


async def beat_at(fleet: Fleet, runner: Runner, job: dict[str, Any], age_s: int) -> dict[str, Any]:
    """Beat for a run as if it had been claimed so long ago."""
    await fleet.pool.execute(
        "UPDATE run_queue SET claimed_at = clock_timestamp() - $2 * interval '1 second'"
        " WHERE run_id = $1",
        job["run_id"],
        age_s,
    )
    answer = await runner.heartbeat(job)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("max_runtime_s", "notice_s"),
    [(10_000, 300), (1_000, 250)],  # a TTL ahead; of a short run, its last quarter
)
async def test_the_last_ttl_or_quarter_of_a_run_brings_a_cancel_and_not_before(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, max_runtime_s: int, notice_s: int
) -> None:
    async with open_fleet(make_settings(lease_ttl_s=300), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue(max_runtime_s=max_runtime_s)
        job = await runner.take()
        assert job["max_runtime_s"] == max_runtime_s
        early = await beat_at(fleet, runner, job, max_runtime_s - notice_s - 30)
        assert early["directive"] == "continue"
        assert not {"reason", "grace_s"} & early.keys()
        late = await beat_at(fleet, runner, job, max_runtime_s - notice_s)
        assert late["directive"] == "cancel"
        assert "max_runtime_s" in late["reason"]
        assert notice_s - 30 < late["grace_s"] <= notice_s
        # It is still the holder: it may hand in within the grace.
        assert (await runner.submit(job)).status_code == 201


@pytest.mark.gen_test
async def test_the_services_own_limit_counts_for_a_run_without_one(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(max_runtime_s=1_000), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        assert job["max_runtime_s"] == 1_000
        assert (await beat_at(fleet, runner, job, 700))["directive"] == "continue"
        assert (await beat_at(fleet, runner, job, 760))["directive"] == "cancel"


@pytest.mark.gen_test
async def test_a_lease_ends_with_its_longest_life_however_often_its_runner_beats(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_runtime_s=1_000)
        job = await runner.take()
        over = await beat_at(fleet, runner, job, 1_001)
        assert (over["directive"], over["grace_s"]) == ("cancel", 0)
        assert await fleet.sweep() == 1
        assert (await fleet.row(run_id))["status"] == "PENDING"


@pytest.mark.gen_test
async def test_an_admins_cancel_is_told_before_the_last_call_and_that_before_a_drain(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_runtime_s=1_000)
        job = await runner.take()
        await fleet.admin("POST", "/runners/runner-a/drain", json={})
        assert (await beat_at(fleet, runner, job, 500))["directive"] == "drain"
        assert "max_runtime_s" in (await beat_at(fleet, runner, job, 800))["reason"]
        await fleet.cancel(run_id, "wrong prompt")
        told = await beat_at(fleet, runner, job, 800)
        assert (told["directive"], told["reason"]) == ("cancel", "wrong prompt")
        assert 0 < told["grace_s"] <= 200
