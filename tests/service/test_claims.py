"""Claims: which run a runner is given, and what it is told when there is none."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from broker.jobs.job import comparable_hash
from config.settings import Settings
from db import run_queue
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import SMALL, Fleet, Runner, about, code_of, model_of, open_fleet, run_of

MakeSettings = Callable[..., Settings]
QUANTIZATIONS = ["fp16", "q4_k_m", "q8_0"]


def offer(vram_gb: int, *quantizations: str) -> dict[str, Any]:
    """Return capabilities."""
    return {"vram_gb": vram_gb, "quantizations": list(quantizations or QUANTIZATIONS)}


def in_s(seconds: float) -> str:
    """Return the time in so many seconds, RFC 3339."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


async def enqueue_all(fleet: Fleet, *runs: dict[str, Any]) -> list[str]:
    """Enqueue runs in one request; return their run_ids."""
    answer = await fleet.admin("POST", "/queue", json={"runs": list(runs)})
    assert answer.status_code == 201, answer.text
    return [run["run_id"] for run in answer.json()["runs"]]


async def explained(runner: Runner, capabilities: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Claim with `explain`; return the reasons by code, there being no job."""
    answer = await runner.claim(explain=True, capabilities=capabilities)
    assert answer.status_code == 200, answer.text
    assert answer.json()["job"] is None
    return {reason["code"]: reason for reason in answer.json()["reasons"]}


@pytest.mark.gen_test
async def test_a_claim_hands_out_all_that_a_runner_needs(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    signer = {"identity": "runner@bakeoff.test", "issuer": "https://issuer.bakeoff.test"}
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(signer=signer)
        run_id = await fleet.enqueue(max_runtime_s=7200)
        job = await runner.take()
        row = await fleet.row(run_id)
    assert set(job) == {
        "queue_id", "run_id", "attempt", "lease_id", "lease_expires_at", "lease_ttl_s",
        "heartbeat_interval_s", "max_runtime_s", "model", "tasks", "floor_tasks", "prompts",
        "config", "config_hash", "upload", "expected_signer", "previous_attempts", "server_time",
        "signature_policy",
    }  # fmt: skip
    assert (job["run_id"], job["attempt"]) == (run_id, 1)
    assert (job["lease_ttl_s"], job["heartbeat_interval_s"], job["max_runtime_s"]) == (
        300,
        30,
        7200,
    )
    assert (job["previous_attempts"], job["expected_signer"]) == ([], signer)
    assert job["config"]["run"] == {"seed": 7, "name": run_id}
    assert job["config_hash"] == comparable_hash(job["config"])
    assert [task["tier"] for task in job["tasks"]] == ["main", "main"]
    assert [task["tier"] for task in job["floor_tasks"]] == ["dumb_model"]
    model = job["model"]
    assert model.pop("model_id") == str(row["model_id"])
    assert model.pop("active_parameter_count_b") == SMALL["parameter_count_b"]
    assert model == {**SMALL, "model_hash": None}
    assert (row["status"], row["claimed_by"], row["lease_seq"]) == ("CLAIMED", "runner-a", 1)
    assert row["lease_expires_at"] - row["claimed_at"] == about(300)
    assert str(row["lease_id"]) == job["lease_id"]
    assert row["attempt_count"] == 0


@pytest.mark.gen_test
async def test_a_model_that_needs_23_gb_fits_a_card_of_23_and_not_one_of_22(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """10 * 2.000 * 1.15 is 23 exactly: the float must not be rounded up to 24."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        run_id = await fleet.enqueue(model=model_of(10))
        assert (await runner.claim(capabilities=offer(22))).status_code == 204
        reason = (await explained(runner, offer(22)))["vram"]
        assert reason == {
            "code": "vram",
            "count": 1,
            "detail": "needs 23 GB, you offer 22",
            "nearest": "model-10-fp16 fp16",
        }
        small = await fleet.enqueue(priority=200)
        passed_over = await runner.claim(capabilities=offer(22))
        assert passed_over.json()["run_id"] == small
        fitting = await runner.claim(capabilities=offer(23))
        assert fitting.json()["run_id"] == run_id


@pytest.mark.gen_test
async def test_active_parameters_decide_where_a_model_has_them(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    mixture = model_of(47, active_parameter_count_b=10, architecture="MoE")
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue(model=mixture)
        assert (await runner.claim(capabilities=offer(22))).status_code == 204
        job = (await runner.claim(capabilities=offer(23))).json()
    assert job["model"]["parameter_count_b"] == 47
    assert job["model"]["active_parameter_count_b"] == 10


@pytest.mark.gen_test
async def test_a_runner_gets_only_quantizations_it_can_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(model=model_of(1, "q8_0"))
        assert (await runner.claim(capabilities=offer(24, "q4_k_m"))).status_code == 204
        reason = (await explained(runner, offer(24, "q4_k_m")))["quantization"]
        assert (reason["count"], reason["detail"]) == (1, "needs q8_0, you offer q4_k_m")
        fitting = await runner.claim(capabilities=offer(24, "q8_0"))
        assert fitting.json()["run_id"] == run_id


@pytest.mark.gen_test
async def test_lower_priority_numbers_go_first_and_then_the_oldest_run_of_any_model(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(aging_s=0), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=5)
        a = await fleet.enqueue(priority=200)
        b = await fleet.enqueue()
        c = await fleet.enqueue(model=model_of(1, "q8_0"))
        d = await fleet.enqueue()
        e = await fleet.enqueue(model=model_of(1, "q4_k_m"), priority=1)
        taken = [(await runner.take())["run_id"] for _ in range(5)]
    assert taken == [e, b, c, d, a]


@pytest.mark.gen_test
async def test_the_best_of_many_runs_goes_first_wherever_it_lies(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """More runs of one model than a claim looks at, and the best has the last id of all."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await enqueue_all(fleet, *(run_of() for _ in range(20)))
        best = await fleet.enqueue(priority=1)
        await fleet.pool.execute(
            "UPDATE run_queue SET queue_id = 'ffffffff-ffff-ffff-ffff-ffffffffffff'"
            " WHERE run_id = $1",
            best,
        )
        assert (await runner.take())["run_id"] == best


@pytest.mark.gen_test
async def test_runs_that_have_ended_do_not_stand_in_the_way_of_those_that_wait(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await enqueue_all(fleet, *(run_of(priority=1) for _ in range(20)))
        await fleet.pool.execute("UPDATE run_queue SET status = 'CANCELLED'")
        run_id = await fleet.enqueue()
        assert (await runner.take())["run_id"] == run_id


@pytest.mark.gen_test
async def test_a_deferred_run_waits_for_its_time_and_says_when(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        none = await runner.claim()
        assert (none.status_code, none.headers["Retry-After"]) == (204, "30")
        await fleet.enqueue(model=model_of(400), not_before=in_s(50))
        unfit = await runner.claim()
        assert unfit.headers["Retry-After"] == "30"  # no run that would fit comes due
        later = await fleet.enqueue(not_before=in_s(2000))
        sooner = await fleet.enqueue(not_before=in_s(1000))
        deferred = await runner.claim()
        assert deferred.status_code == 204
        # Due in 1000 s; what is enqueued meanwhile must not find the runner asleep.
        assert deferred.headers["Retry-After"] == "300"
        assert deferred.content == b""
        reason = (await explained(runner, offer(24)))["retry_after"]
        assert reason["count"] == 2
        due = (await fleet.row(sooner))["retry_after"]
        assert reason["detail"] == f"not before {due:%Y-%m-%dT%H:%M:%SZ}"
        await fleet.pool.execute(
            "UPDATE run_queue SET retry_after = clock_timestamp() WHERE run_id = $1", sooner
        )
        assert (await runner.take())["run_id"] == sooner
        assert (await fleet.row(sooner))["retry_after"] is None
        assert (await fleet.row(later))["status"] == "PENDING"


@pytest.mark.gen_test
async def test_runs_that_have_come_due_take_their_place_in_the_queues_order(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """More of them than one claim looks at, and the best of them due last."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await enqueue_all(fleet, *(run_of(not_before=in_s(9)) for _ in range(30)))
        best = await fleet.enqueue(not_before=in_s(9), priority=1)
        later = await fleet.enqueue(not_before=in_s(900), priority=1)
        await fleet.pool.execute(
            "UPDATE run_queue SET retry_after = now() - interval '1 hour' * random()"
            " WHERE run_id NOT IN ($1, $2)",
            best,
            later,
        )
        await fleet.pool.execute("UPDATE run_queue SET retry_after = now() WHERE run_id = $1", best)
        await fleet.sweep()
        assert (await runner.take())["run_id"] == best
        assert (await fleet.row(later))["retry_after"] is not None


@pytest.mark.gen_test
async def test_retry_after_is_never_earlier_than_the_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(not_before=in_s(100.4))
        answer = await runner.claim()
        due = (await fleet.row(run_id))["retry_after"]
    assert datetime.now(UTC) + timedelta(seconds=int(answer.headers["Retry-After"])) >= due


@pytest.mark.gen_test
async def test_explain_sorts_the_queue_by_what_keeps_a_runner_from_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        empty = await explained(runner, offer(24))
        assert [(r["code"], r["count"], r["detail"]) for r in empty.values()] == [
            ("queue_empty", 0, "No run is PENDING.")
        ]
        await enqueue_all(
            fleet,
            run_of(model=model_of(40)),
            run_of(model=model_of(20)),
            run_of(model=model_of(20)),
            run_of(model=model_of(1, "q5_0")),
            run_of(model=model_of(1, "q4_k_m"), not_before=in_s(1000)),
        )
        reasons = await explained(runner, offer(24))
    assert {code: reason["count"] for code, reason in reasons.items()} == {
        "vram": 3, "quantization": 1, "retry_after": 1,
    }  # fmt: skip
    assert reasons["vram"]["detail"] == "needs 46 GB, you offer 24"
    assert reasons["vram"]["nearest"] == "model-20-fp16 fp16"
    assert reasons["quantization"]["detail"] == "needs q5_0, you offer fp16, q4_k_m, q8_0"


@pytest.mark.gen_test
async def test_an_admins_cap_wins_over_whatever_a_runner_declares(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    caps = {"vram_gb": 22, "quantizations": ["fp16", "q4_k_m"]}
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit(capability_caps=caps)
        registered = (await runner.register()).json()
        assert registered["capabilities"] == {"vram_gb": 22, "quantizations": ["q4_k_m"]}
        await enqueue_all(fleet, run_of(model=model_of(10)), run_of(model=model_of(1, "q8_0")))
        assert (await runner.claim()).status_code == 204
        reasons = await explained(runner, offer(1000))
        assert reasons["vram"]["detail"] == "needs 23 GB, you offer 22"
        assert reasons["quantization"]["detail"] == "needs q8_0, you offer fp16, q4_k_m"


@pytest.mark.gen_test
async def test_a_paused_or_expired_key_gets_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        paused, expired = await fleet.sign_on(), await fleet.sign_on("runner-b")
        run_id = await fleet.enqueue()
        await fleet.pool.execute(
            "UPDATE runners SET paused_at = now(), pause_reason = 'fan is loud'"
            " WHERE runner_id = 'runner-a'"
        )
        refused = await paused.claim()
        assert code_of(refused) == (403, "runner_paused")
        assert "fan is loud" in refused.json()["detail"]
        await fleet.pool.execute(
            "UPDATE runner_keys SET not_after = clock_timestamp() WHERE runner_id = 'runner-b'"
        )
        assert code_of(await expired.claim()) == (403, "key_revoked")
        assert (await fleet.row(run_id))["lease_seq"] == 0


@pytest.mark.gen_test
async def test_a_lease_never_outlives_the_runs_longest_runtime(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_runtime_s=100)
        await runner.take()
        row = await fleet.row(run_id)
    assert row["lease_expires_at"] - row["claimed_at"] == about(100)


@pytest.mark.gen_test
async def test_rows_of_bakeoffs_own_local_runner_are_never_handed_out(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        await fleet.pool.execute(
            "INSERT INTO run_queue (queue_id, run_id, model_id, priority)"
            " SELECT $1, run_id, model_id, 1 FROM run_queue WHERE run_id = $2",
            uuid.uuid4(),
            run_id,
        )
        assert (await runner.take())["run_id"] == run_id
        assert code_of(await runner.claim()) == (409, "lease_limit")
        other = await fleet.sign_on("runner-b")
        assert (await other.claim()).status_code == 204
        assert list(await explained(other, offer(24))) == ["queue_empty"]


# A claim looks closely only at the models whose first run is among the best: twice as many as it
# asks for, and 16. So many models are one more than a claim for one run looks at.
MODELS = 19
HIDDEN = {
    "ended": "UPDATE run_queue SET status = 'CANCELLED' WHERE priority = 1",
    "deferred": "UPDATE run_queue SET retry_after = now() + interval '1 hour' WHERE priority = 1",
    "bakeoff's own": "UPDATE run_queue SET job = NULL WHERE priority = 1",
}


async def enqueue_many_models(fleet: Fleet) -> str:
    """Enqueue a first and a last run of many models; return a run of another, which lies between.

    Its id is the last of all, so it is found by its priority alone.
    """
    models = [model_of(1 + number / 100) for number in range(MODELS)]
    await enqueue_all(fleet, *(run_of(model=model, priority=1) for model in models))
    await enqueue_all(fleet, *(run_of(model=model, priority=200) for model in models))
    between = await fleet.enqueue(model=model_of(2), priority=100)
    await fleet.pool.execute(
        "UPDATE run_queue SET queue_id = 'ffffffff-ffff-ffff-ffff-ffffffffffff' WHERE run_id = $1",
        between,
    )
    return between


@pytest.mark.gen_test
@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN.keys())
async def test_of_more_models_than_are_looked_at_the_best_run_is_found(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, hide: str
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        between = await enqueue_many_models(fleet)
        await fleet.pool.execute(hide)
        job = (await runner.claim(capabilities=offer(24))).json()
        assert job["run_id"] == between


# Before the first of a model's queue a claim looks at nothing; these lie behind it.
FIRST = {
    "ended": "UPDATE run_queue SET priority = 0 WHERE run_id = $1",
    "deferred": "UPDATE run_queue SET retry_after = now() - interval '1 s' WHERE run_id = $1",
    "bakeoff's own": "UPDATE run_queue SET priority = 0 WHERE run_id = $1",
}


@pytest.mark.gen_test
@pytest.mark.parametrize("why", HIDDEN)
async def test_runs_behind_the_first_that_nobody_may_take_do_not_crowd_out_the_others(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, why: str
) -> None:
    """Two ask together, so 20 runs are looked at."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runners = [await fleet.sign_on(f"runner-{number}") for number in range(2)]
        first = await fleet.enqueue(priority=100)
        await enqueue_all(fleet, *(run_of(priority=1) for _ in range(20)))
        last = await fleet.enqueue(priority=200)
        await fleet.pool.execute(HIDDEN[why])
        await fleet.pool.execute(FIRST[why], first)
        rows = await run_queue.claim(
            fleet.pool,
            [
                runner.claimant(quantizations=tuple(sorted(QUANTIZATIONS))) for runner in runners
            ],
            ttl=timedelta(60), max_leases=1, max_runtime_s=60,
        )  # fmt: skip
        assert [str(row["run_id"]) for row in rows] == [first, last]


@pytest.mark.gen_test
async def test_of_more_models_than_are_looked_at_the_best_that_another_kind_left_is_found(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runners = [await fleet.sign_on(f"runner-{number}") for number in range(MODELS + 1)]
        between = await enqueue_many_models(fleet)
        *firsts, last = [
            runner.claimant(vram_gb=24 if number < MODELS else 48, quantizations=("fp16",))
            for number, runner in enumerate(runners)
        ]
        rows = await run_queue.claim(
            fleet.pool, [*firsts, last], ttl=timedelta(60), max_leases=1, max_runtime_s=60
        )
        assert str(rows[-1]["run_id"]) == between


@pytest.mark.gen_test
async def test_the_next_runner_hears_how_earlier_attempts_ended(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        await runner.heartbeat(job, progress={"done": 3, "total": 5})
        await runner.release(job)
        second = await runner.take()
    assert second["attempt"] == 2
    (previous,) = second["previous_attempts"]
    assert datetime.strptime(previous.pop("ended"), "%Y-%m-%dT%H:%M:%S.%f%z") <= datetime.now(UTC)
    assert previous == {"how": "released", "progress": {"done": 3, "total": 5}}


@pytest.mark.gen_test
async def test_claims_that_do_not_fit_the_contract_are_told_where(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    bad: dict[str, dict[str, Any]] = {
        "/wait_s": {"wait_s": 51},
        "/explain": {"explain": 1},
        "/gpu": {"gpu": 1},
        "/capabilities/vram_gb": {"capabilities": offer(0)},
        "/capabilities/quantizations": {"capabilities": {"vram_gb": 1, "quantizations": []}},
    }
    async with open_fleet(make_settings(claim_wait_max_s=0), sigstore) as fleet:
        runner = await fleet.sign_on()
        for pointer, body in bad.items():
            answer = await runner.claim(**body)
            assert code_of(answer) == (422, "invalid_request")
            assert [e["pointer"] for e in answer.json()["errors"]] == [pointer]
        for key in ("k" * 201, "a b"):
            assert code_of(await runner.claim(key=key)) == (422, "invalid_request")
        unknown = await runner.claim(capabilities=offer(24, "q8_0", "q9_9"))
        assert code_of(unknown) == (422, "unknown_quantization")
        assert "q4_k_m" in unknown.json()["detail"]
        assert unknown.json()["errors"][0]["pointer"] == "/capabilities/quantizations/1"
        # A wait beyond the server's own is cut to it: here, to none.
        assert (await runner.claim(wait_s=50)).status_code == 204


@pytest.mark.gen_test
async def test_runs_of_one_request_are_handed_out_in_the_order_they_were_given(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=12)
        runs = [run_of() for _ in range(12)]
        answer = await fleet.admin("POST", "/queue", json={"runs": runs})
        given = [run["run_id"] for run in answer.json()["runs"]]
        assert [(await runner.take())["run_id"] for _ in given] == given
