"""/metrics: what happened is counted, once, and no scrape ever fails or tells who did it."""

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import redis.asyncio
from prometheus_client.parser import text_string_to_metric_families

from broker.admin import queue_tally
from broker.leases.lease_keys import LeaseKeys
from broker.leases.sweep import Sweep
from broker.telemetry import LOOP_TICK_S, Telemetry
from config.settings import Settings
from db import run_queue
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore
from tests.service.test_health import until_ready
from tests.service.test_submit import claimed, signed, without
from tests.support.fleet import Fleet, model_of, open_fleet, quiet_sweep
from tests.support.raw_http import exchange, head
from tests.support.result_factory import result_for

MakeSettings = Callable[..., Settings]
PREFIX = "bakeoff_queue_"
# So long between sweeps that nothing but the listener's bell can bring one.
NEVER_S = 1000.0
NAMES = {
    "auth_failures", "breaker_open", "build_info", "claim_batch_size", "claim_duration_seconds",
    "claims", "db_pool", "event_loop_lag_seconds", "expiry_lag_seconds", "heartbeats",
    "http_connections", "http_connections_turned_away",
    "http_in_flight", "http_request_duration_seconds", "http_requests", "leases_lapsed",
    "log_lines_dropped", "loop_last_success_timestamp_seconds", "loop_restarts",
    "listener_connected", "oldest_pending_age_seconds", "rate_limited", "runs", "submission_bytes",
    "submissions",
    "sweep_last_success_timestamp_seconds", "trust_root_age_seconds", "verify_seconds",
    "workers_lost", "waiters", "leases_active", "unclaimable_runs", "runners", "redis_up",
    "queue_wait_seconds", "listener_gaps",
}  # fmt: skip


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def of(self, name: str, **labels: str) -> float:
        """Return a sample's value; 0 for what has not been counted yet."""
        found = [s.value for s in self.samples if s.name == PREFIX + name and s.labels == labels]
        return found[0] if found else 0.0

    def labels(self, name: str) -> set[tuple[str, ...]]:
        """Return the label values there are of a metric."""
        return {tuple(s.labels.values()) for s in self.samples if s.name == PREFIX + name}


async def scrape(fleet: Fleet) -> Scrape:
    """Ask for the metrics, as they are at this moment."""
    fleet.services.tally._looked_at = -math.inf
    answer = await fleet.http.get("/metrics")
    assert (answer.status_code, answer.headers["Content-Type"]) == (
        200, "text/plain; version=0.0.4; charset=utf-8",
    )  # fmt: skip
    return Scrape(answer.text)


@pytest.mark.gen_test
async def test_the_names_are_the_designs_and_no_label_tells_who(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        await runner.heartbeat(job)
        await runner.submit(job)
        seen = await scrape(fleet)
        text = (await fleet.http.get("/metrics")).text
    ours = {f.name.removeprefix(PREFIX) for f in seen.families if f.name.startswith(PREFIX)}
    assert {name for name in ours if not name.endswith("_created")} == NAMES
    assert "process_resident_memory_bytes" in {family.name for family in seen.families}
    labels = {name for sample in seen.samples for name in sample.labels}
    assert labels <= {
        "le", "outcome", "route", "method", "status", "state", "reason", "noticed_by", "version",
        "loop",
    }  # fmt: skip
    for secret in ("runner-a", runner.fingerprint, job["run_id"], job["lease_id"], runner.token):
        assert secret not in text


@pytest.mark.gen_test
async def test_each_claim_is_counted_once_by_what_came_of_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        assert (await runner.claim()).status_code == 204
        await fleet.enqueue()
        for _ in range(2):
            assert (await runner.claim(key="same")).status_code == 200
        assert (await runner.claim()).status_code == 409
        seen = await scrape(fleet)
        outcomes = {"empty": 1, "granted": 1, "replayed": 1, "lease_limit": 1}
        assert {o: seen.of("claims_total", outcome=o) for o in outcomes} == outcomes
        assert len(seen.labels("claims_total")) == len(outcomes)
        assert seen.of("claim_batch_size_sum") == seen.of("claim_batch_size_count") == 4
        assert seen.of("claim_duration_seconds_count") == 4


@pytest.mark.gen_test
async def test_a_parked_claim_is_a_waiter_until_its_runner_hangs_up(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        parked = asyncio.create_task(runner.claim(wait_s=50))
        async with asyncio.timeout(10):
            while (seen := await scrape(fleet)).of("waiters") != 1:
                pass  # each look is a request that waits for its answer
            assert seen.of("http_in_flight") == 2
            parked.cancel()
            while (seen := await scrape(fleet)).of(
                "claims_total", outcome="client_disconnected"
            ) != 1:
                pass
        assert (seen.of("waiters"), seen.of("http_in_flight")) == (0, 1)


@pytest.mark.gen_test
async def test_heartbeats_are_counted_by_their_answer(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        for _ in range(2):
            await runner.heartbeat(job)
        await runner.release(job)
        await runner.heartbeat(job)
        seen = await scrape(fleet)
        assert seen.of("heartbeats_total", outcome="renewed") == 2
        assert seen.of("heartbeats_total", outcome="lease_lost") == 1


@pytest.mark.gen_test
async def test_submits_are_counted_with_their_size_and_the_time_of_their_verification(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        stranger = EmailSubject("stranger@bakeoff.test", "https://issuer.bakeoff.test")
        foreign = signed(fleet, result_for(job["run_id"], job), stranger)
        good = runner.bundle(job)
        incomplete = without(good, "summary.md")
        too_large = {**good, "manifest.json": b" " * (256 * 1024 + 1)}
        for files, status in ((foreign, 422), (incomplete, 422), (too_large, 413), (good, 201),
                              (good, 200)):  # fmt: skip
            assert (await runner.submit(job, files)).status_code == status
        seen = await scrape(fleet)
    for outcome in ("signer_not_allowed", "invalid_bundle", "too_large", "accepted", "replayed"):
        assert seen.of("submissions_total", outcome=outcome) == 1, outcome
    # What was too large did not arrive whole, and a repeat is not verified again.
    whole = (foreign, incomplete, good, good)
    assert seen.of("submission_bytes_count") == len(whole)
    assert seen.of("submission_bytes_sum") == sum(len(c) for f in whole for c in f.values())
    assert seen.of("verify_seconds_count") == 3


@pytest.mark.gen_test
async def test_a_lapse_is_counted_with_its_lag_and_what_noticed_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(sweep_interval_s=NEVER_S, sweep_degraded_s=NEVER_S)
    async with open_fleet(settings, sigstore) as fleet:
        await until_ready(fleet, 200, listener="ok")
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        await runner.take()
        await fleet.overdue(run_id)
        async with fleet.rings() as rings, redis.asyncio.from_url(settings.redis_lease_url) as bell:
            await bell.set("lease:any:1", 1, px=1)
            await rings.get()
        async with asyncio.timeout(10):
            while not (seen := await scrape(fleet)).of(
                "leases_lapsed_total", noticed_by="expiry_event"
            ):
                pass  # the counter follows the commit
        assert seen.of("leases_lapsed_total", noticed_by="expiry_event") == 1
        assert seen.of("expiry_lag_seconds_count") == 1
        assert seen.of("expiry_lag_seconds_sum") >= 1
        assert seen.of("listener_connected") == 1


@pytest.mark.gen_test
async def test_the_breaker_is_seen_open_and_a_held_sweep_is_no_success(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    telemetry = Telemetry("test")
    settings = make_settings(max_leases=4)
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        for _ in range(4):
            await fleet.enqueue()
            await runner.take()
        await fleet.pool.execute(
            "UPDATE run_queue SET lease_expires_at = clock_timestamp() - interval '1 second'"
            " WHERE status = 'CLAIMED'"
        )
        async with redis.asyncio.from_url(settings.redis_lease_url) as client:
            keys = LeaseKeys(client)
            sweep = Sweep(fleet.pool, settings, keys, telemetry)
            telemetry.watch(breaker_open=lambda: sweep.held)
            seen = Scrape(telemetry.exposition().decode())
            assert (seen.of("breaker_open"), await sweep.run_once()) == (0, 0)
            seen = Scrape(telemetry.exposition().decode())
            assert seen.of("breaker_open") == 1
            assert seen.of("sweep_last_success_timestamp_seconds") == 0
            await fleet.pool.execute(
                "UPDATE run_queue SET lease_expires_at = clock_timestamp() + interval '1 hour'"
                " WHERE status = 'CLAIMED'"
            )
            assert await sweep.run_once() == 0
            seen = Scrape(telemetry.exposition().decode())
            assert seen.of("breaker_open") == 0
            assert seen.of("sweep_last_success_timestamp_seconds") > 0
            await keys.flush()


@pytest.mark.gen_test
async def test_requests_are_counted_by_route_and_nobody_can_make_up_labels(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await runner.claim()
        await fleet.http.post("/api/queue/claim", json={})
        await fleet.http.post("/api/queue/claim", json={}, headers={"Authorization": "Bearer x"})
        for n in range(3):
            await fleet.http.get(f"/made-up-{n}")
            await exchange(fleet.url, head(f"MADEUP{n}", "/api/queue/claim"))
        seen = await scrape(fleet)
        routes = {"route": "ClaimHandler", "method": "POST"}
        assert seen.of("http_requests_total", **routes, status="204") == 1
        assert seen.of("http_requests_total", **routes, status="401") == 2
        assert seen.of("http_request_duration_seconds_count", route="ClaimHandler") == 6
        assert seen.of("auth_failures_total", reason="missing_token") == 1
        assert seen.of("auth_failures_total", reason="invalid_token") == 1
        made_up = {"route": "NotFoundHandler", "method": "GET", "status": "404"}
        assert seen.of("http_requests_total", **made_up) == 3
        text = (await fleet.http.get("/metrics")).text
        assert "made-up" not in text
        assert "MADEUP" not in text
        assert {"other"} == {m for m, _, s in seen.labels("http_requests_total") if s == "405"}


@pytest.mark.gen_test
async def test_runs_are_counted_by_state_and_the_oldest_claimable_one_has_an_age(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        assert (await scrape(fleet)).of("oldest_pending_age_seconds") == 0
        runner = await fleet.sign_on()
        first = await fleet.enqueue()
        await runner.take()
        deferred, second = await fleet.enqueue(), await fleet.enqueue()
        await fleet.pool.execute(
            "UPDATE run_queue SET created_at = now() - $2::interval WHERE run_id = $1",
            second, timedelta(hours=1),
        )  # fmt: skip
        await fleet.pool.execute(
            "UPDATE run_queue SET created_at = now() - $2::interval, retry_after = 'infinity'"
            " WHERE run_id = $1",
            deferred, timedelta(hours=9),
        )  # fmt: skip
        assert (await fleet.row(first))["status"] == "CLAIMED"
        seen = await scrape(fleet)
        assert seen.labels("runs") == {
            ("PENDING",), ("CLAIMED",), ("IN_PROGRESS",), ("COMPLETE",), ("FAILED",), ("CANCELLED",)
        }  # fmt: skip
        assert (seen.of("runs", status="PENDING"), seen.of("runs", status="CLAIMED")) == (2, 1)
        assert seen.of("runs", status="FAILED") == 0
        assert 3600 <= seen.of("oldest_pending_age_seconds") < 3700


@pytest.mark.gen_test
async def test_runs_that_no_live_runner_can_be_given_are_counted_by_the_first_reason(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    def unclaimable(seen: Scrape) -> dict[str, float]:
        found = {r: seen.of("unclaimable_runs", reason=r) for r in queue_tally.REASONS}
        return {reason: runs for reason, runs in found.items() if runs}

    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.enqueue()
        assert unclaimable(await scrape(fleet)) == {"no_runner": 1}
        runner = await fleet.sign_on()
        large = await fleet.enqueue(model=model_of(60, "fp16", name="Large"))
        await fleet.enqueue(model=model_of(1, "q5_k_m", name="Odd"))
        later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        await fleet.enqueue(not_before=later)
        seen = await scrape(fleet)
        assert unclaimable(seen) == {"vram": 1, "quantization": 1, "not_before": 1}
        assert seen.of("runners", state="idle") == 1
        await fleet.sign_on("runner-b", capability_caps={"vram_gb": 24})
        await fleet.pool.execute(
            "UPDATE runners SET capabilities = jsonb_build_object('vram_gb', 500, 'quantizations',"
            " '[\"q8_0\"]'::jsonb) WHERE runner_id = 'runner-a'"
        )
        await fleet.enqueue(model=model_of(60, "q4_k_m", name="Both"))
        assert unclaimable(await scrape(fleet))["no_runner_has_both"] == 1
        await runner.take()
        await fleet.admin("POST", "/queue/pause", json={"reason": "r"})
        seen = await scrape(fleet)
        assert unclaimable(seen) == {"paused": 4}
        assert seen.of("oldest_pending_age_seconds") == 0, "nothing that could be handed out"
        assert (seen.of("leases_active"), seen.of("runners", state="busy")) == (1, 1)
        assert seen.of("queue_wait_seconds_count") == 1
        assert (await fleet.row(large))["status"] == "PENDING"


@pytest.mark.gen_test
async def test_many_scrapes_are_one_look_at_the_queue(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    tally = run_queue.tally

    async def counted(pool: object) -> object:
        looks.append(pool)
        return await tally(pool)  # type: ignore[arg-type]

    monkeypatch.setattr(queue_tally.run_queue, "tally", counted)
    async with open_fleet(make_settings(), sigstore) as fleet:
        await asyncio.gather(*(fleet.http.get("/metrics") for _ in range(5)))
        await fleet.enqueue()
        assert len(looks) == 1
        assert (await scrape(fleet)).of("runs", status="PENDING") == 1
        assert len(looks) == 2


@pytest.mark.gen_test
async def test_a_database_that_is_away_costs_its_own_metrics_only(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_: object) -> list[object]:
        raise OSError("away")

    async with open_fleet(make_settings(), sigstore) as fleet:
        assert (await scrape(fleet)).labels("runs")
        monkeypatch.setattr(queue_tally.run_queue, "tally", away)
        seen = await scrape(fleet)
        assert seen.labels("runs") == set(), "old numbers would look like a queue that stands still"
        assert math.isnan(seen.of("oldest_pending_age_seconds"))
        assert seen.of("listener_connected") in (0, 1)
        assert seen.labels("build_info") == {(fleet.services.version,)}


@pytest.mark.gen_test
async def test_a_blocked_event_loop_is_seen() -> None:
    telemetry = Telemetry("test")
    watching = asyncio.create_task(telemetry.watch_loop(lambda: None))
    await asyncio.sleep(0)
    time.sleep(0.35)  # noqa: ASYNC251 (the block that is to be seen)
    await asyncio.sleep(LOOP_TICK_S)  # its timer is due before this one
    watching.cancel()
    seen = Scrape(telemetry.exposition().decode())
    assert seen.of("event_loop_lag_seconds_sum") > 0.2


@pytest.mark.gen_test
async def test_two_servers_in_one_process_count_apart(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    async with open_fleet(settings, sigstore) as one, open_fleet(settings, sigstore) as other:
        await one.http.get("/nowhere")
        made_up = {"route": "NotFoundHandler", "method": "GET", "status": "404"}
        assert (await scrape(one)).of("http_requests_total", **made_up) == 1
        assert (await scrape(other)).of("http_requests_total", **made_up) == 0


@pytest.mark.gen_test
async def test_metrics_may_be_asked_by_head_and_nobody_logs_the_asking(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        asked = await fleet.http.head("/metrics")
        assert (asked.status_code, asked.content) == (200, b"")
        assert (await fleet.http.post("/metrics")).status_code == 405
