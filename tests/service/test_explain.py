"""Explain: each reason why a run is not running is named, with its numbers and the verb."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import SMALL, Fleet, code_of, model_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]
LARGE = {"model": model_of(60, "fp16", name="Large-60B")}


async def explained(fleet: Fleet, run_id: str) -> dict[str, Any]:
    answer = await fleet.admin("GET", f"/queue/{run_id}/explain")
    assert answer.status_code == 200, answer.text
    return answer.json()


def checks(answer: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {each["code"]: (each["state"], each["detail"]) for each in answer["checks"]}


@pytest.mark.gen_test
async def test_without_a_runner_a_run_waits_for_one(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_id = await fleet.enqueue()
        assert (await explained(fleet, run_id))["verdict"] == "no runner has registered"


@pytest.mark.gen_test
async def test_each_reason_has_its_numbers(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        small, second = await fleet.enqueue(), await fleet.enqueue()
        large = await fleet.enqueue(**LARGE)
        odd = await fleet.enqueue(model=model_of(1, "q5_k_m"))
        later = await fleet.enqueue(not_before=(datetime.now(UTC) + timedelta(hours=1)).isoformat())

        answer = await explained(fleet, small)
        assert (answer["verdict"], answer["position"]) == ("nothing wrong", 1)
        assert checks(answer)["capable"] == ("ok", "1 capable runner: 1 free")
        assert (await explained(fleet, second))["position"] == 2

        answer = await explained(fleet, large)
        need = answer["need_gb"]
        assert answer["verdict"] == (
            f"needs {need} GB; the largest live runner has 24, the largest ever seen 24"
        )
        assert checks(await explained(fleet, odd))["quantization"] == (
            "blocks",
            "no live runner supports q5_k_m",
        )
        answer = await explained(fleet, later)
        assert answer["verdict"].startswith("not before 2")
        assert answer["checks"][1]["fix"] == f"bakeoff-queue queue set {later} --not-before now"

        job = await runner.take()
        assert job["run_id"] == small
        assert (await explained(fleet, small))["verdict"] == "nothing wrong"
        assert checks(await explained(fleet, small))["running"][1].startswith(
            "runner-a works on it"
        )
        for _ in range(fleet.services.settings.max_leases - 1):
            await fleet.enqueue()
            await runner.claim()
        assert checks(await explained(fleet, large))["vram"][0] == "blocks"
        waiting = await fleet.enqueue()
        state, detail = checks(await explained(fleet, waiting))["capable"]
        assert (state, detail) == ("waits", "1 capable runner: 1 busy: it waits until one is free")

        await fleet.admin("POST", "/runners/runner-a/pause", json={"reason": "r"})
        assert checks(await explained(fleet, waiting))["capable"] == (
            "blocks",
            "1 capable runner: 1 paused",
        )
        await fleet.admin("POST", "/runners/runner-a/resume", json={})
        await fleet.admin("POST", "/runners/runner-a/drain", json={})
        assert (
            checks(await explained(fleet, waiting))["capable"][1] == "1 capable runner: 1 draining"
        )
        await fleet.pool.execute("UPDATE runners SET last_heartbeat = now() - interval '1 day'")
        assert (await explained(fleet, waiting))["verdict"] == (
            "no runner is alive; 1 have registered"
        )


@pytest.mark.gen_test
async def test_ended_runs_say_how(make_settings: MakeSettings, sigstore: ThrowawaySigstore) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_attempts=1)
        await runner.fail(await runner.take(), "load_failure", detail="disk")
        answer = await explained(fleet, run_id)
        assert answer["verdict"].startswith("all 1 attempts are used up: ")
        assert "queue requeue" in answer["checks"][0]["fix"]
        cancelled = await fleet.enqueue()
        await fleet.cancel(cancelled, "not needed")
        assert (await explained(fleet, cancelled))["verdict"] == "an admin cancelled it: not needed"
        missing = await fleet.admin("GET", "/queue/00000000-0000-4000-8000-000000000000/explain")
        assert code_of(missing) == (404, "not_found")


@pytest.mark.gen_test
@pytest.mark.parametrize("model", [None, SMALL["name"]])
async def test_a_pause_hands_out_nothing_until_it_is_resumed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, model: str | None
) -> None:
    body = {"reason": "power works"} | ({"model": model} if model else {})
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(model=SMALL)
        answer = await fleet.admin("POST", "/queue/pause", json=body)
        (pause,) = answer.json()["pauses"]
        assert (pause["reason"], pause["model"]) == ("power works", model)
        assert (await runner.claim()).status_code == 204
        told = (await runner.claim(explain=True)).json()["reasons"]
        assert [(each["code"], each["detail"]) for each in told] == [
            ("paused", "paused by an admin: power works")
        ]
        explanation = await explained(fleet, run_id)
        assert explanation["verdict"] == "the queue or the model is paused: power works"
        resumed = await fleet.admin("POST", "/queue/resume", json=body)
        assert resumed.json()["pauses"] == []
        assert (await runner.take())["run_id"] == run_id
        actions = [row["action"] for row in (await fleet.admin("GET", "/audit")).json()["rows"]]
        assert {"queue.pause", "queue.resume"} <= set(actions)


@pytest.mark.gen_test
async def test_a_resume_wakes_parked_claims_and_a_pause_of_another_model_holds_nobody(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(claim_recheck_s=1000), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue(model=model_of(1, "q8_0", name="Other"))
        run_id = await fleet.enqueue(model=SMALL)
        pause = {"reason": "r", "model": "Other"}
        assert (await fleet.admin("POST", "/queue/pause", json=pause)).status_code == 200
        assert (await runner.take())["run_id"] == run_id
        second = await fleet.sign_on("runner-b")
        waiting = asyncio.create_task(second.claim(wait_s=50))
        while not len(fleet.services.claims.parked):
            await fleet.admin("GET", "/queue")
        await fleet.admin("POST", "/queue/resume", json={"model": "Other"})
        assert (await waiting).status_code == 200
        unknown = await fleet.admin("POST", "/queue/pause", json=pause | {"model": "none"})
        assert code_of(unknown) == (404, "not_found")


@pytest.mark.gen_test
async def test_a_pause_ends_at_its_time(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        body = {"reason": "r", "until": until}
        await fleet.admin("POST", "/queue/pause", json=body)
        assert (await runner.claim()).status_code == 204
        await fleet.pool.execute("UPDATE queue_pauses SET until = now() - interval '1 s'")
        assert (await runner.claim()).status_code == 200
        assert (await fleet.admin("GET", "/queue/pauses")).json()["pauses"] == []
