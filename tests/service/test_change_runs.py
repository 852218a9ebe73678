"""Changing runs: priority and earliest start of one, and what fits a filter in steps."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from broker.admin import runs
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import SMALL, Fleet, code_of, model_of, open_fleet

MakeSettings = Callable[..., Settings]
OTHER = model_of(1, "q8_0", name="Other")


async def patch(fleet: Fleet, run_id: str, **body: Any) -> httpx.Response:
    return await fleet.admin("PATCH", f"/queue/{run_id}", json=body)


async def listed(fleet: Fleet, **query: Any) -> list[str]:
    answer = await fleet.admin("GET", "/queue", params=query)
    assert answer.status_code == 200, answer.text
    return [run["run_id"] for run in answer.json()["runs"]]


@pytest.mark.gen_test
async def test_a_priority_and_an_earliest_start_are_set_while_a_run_is_pending(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        first, second = await fleet.enqueue(), await fleet.enqueue()
        answer = await patch(fleet, second, priority=1, reason="urgent")
        assert (answer.status_code, answer.json()["priority"]) == (200, 1)
        assert (await runner.take())["run_id"] == second
        later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        assert (await patch(fleet, first, not_before=later)).status_code == 200
        other = await fleet.sign_on("runner-b")
        assert (await other.claim()).status_code == 204
        assert (await patch(fleet, first, not_before=None)).json()["retry_after"] is None
        assert (await other.take())["run_id"] == first
        # Nothing to change, no time to come, nobody's to change.
        assert code_of(await patch(fleet, first, reason="r")) == (422, "invalid_request")
        assert code_of(await patch(fleet, first, not_before="2020-01-01T00:00:00Z")) == (
            422,
            "invalid_request",
        )
        assert code_of(await patch(fleet, first, priority=1)) == (409, "conflict")
        await other.submit(await rejoin(other))
        assert code_of(await patch(fleet, first, priority=1)) == (409, "run_finished")
        rows = (await fleet.admin("GET", "/audit", params={"action": "queue.set"})).json()["rows"]
        assert [row["detail"].get("priority") for row in rows] == [None, None, 1]


async def rejoin(runner: Any) -> dict[str, Any]:
    """Return the job of the lease that a runner holds."""
    (held,) = (await runner.register()).json()["held_leases"]
    answer = await runner.post(f"/api/queue/{held['run_id']}/resume", {})
    return answer.json()


@pytest.mark.gen_test
async def test_the_list_is_filtered_and_turned_round(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    batch = "10000000-0000-4000-8000-000000000000"
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        first = await fleet.enqueue(model=SMALL, run_id="aaaa1111-0000-4000-8000-000000000001")
        second = await fleet.enqueue(
            model=OTHER, batch_id=batch, run_id="aaaa2222-0000-4000-8000-000000000002"
        )
        job = await runner.take()
        await runner.fail(job, "load_failure", detail="no such FILE")
        assert await listed(fleet) == [first, second]
        assert await listed(fleet, order="newest") == [second, first]
        assert await listed(fleet, order="newest", limit=1) == [second]
        assert await listed(fleet, model="Other") == [second]
        assert await listed(fleet, batch=batch) == [second]
        assert await listed(fleet, runner="runner-a") == [job["run_id"]]
        assert await listed(fleet, runner="nobody") == []
        assert await listed(fleet, text="othe") == [second]
        assert await listed(fleet, text="such file") == [job["run_id"]]
        assert await listed(fleet, id="aaaa1") == [first]
        assert await listed(fleet, id="aaaa") == [first, second]
        created = (await fleet.row(second))["created_at"].isoformat()
        assert await listed(fleet, before=created) == [first]
        assert await listed(fleet, **{"from": created}) == [second]
        page = (await fleet.admin("GET", "/queue", params={"order": "newest", "limit": 1})).json()
        assert await listed(fleet, order="newest", cursor=page["next_cursor"]) == [first]
        for wrong in (
            {"status": "DONE"}, {"order": "up"}, {"batch": "x"}, {"id": "xyz"}, {"id": "aaaa-1"},
            {"from": "yesterday"}, {"text": "x" * 201}, {"model": "a\0"},
        ):  # fmt: skip
            answer = await fleet.admin("GET", "/queue", params=wrong)
            assert code_of(answer) == (422, "invalid_request"), wrong
            assert answer.json()["errors"][0]["pointer"] == f"/{next(iter(wrong))}"


async def bulk(fleet: Fleet, action: str, wanted: dict[str, str], **more: Any) -> httpx.Response:
    body = {"action": action, "filter": wanted, "reason": "test", **more}
    return await fleet.admin("POST", "/queue/bulk", json=body)


@pytest.mark.gen_test
async def test_runs_that_fit_a_filter_are_counted_first_and_then_changed_one_by_one(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        runs_of = [await fleet.enqueue(model=SMALL) for _ in range(3)]
        kept = await fleet.enqueue(model=OTHER)
        wanted = {"model": SMALL["name"]}
        assert (await bulk(fleet, "cancel", wanted)).json()["matched"] == 3
        assert (await fleet.row(runs_of[0]))["status"] == "PENDING", "it was only counted"
        assert code_of(await bulk(fleet, "cancel", wanted, expected=2)) == (409, "conflict")
        answer = (await bulk(fleet, "set", wanted, expected=3, priority=5)).json()
        assert [each["priority"] for each in answer["results"]] == [5, 5, 5]
        job = await runner.take()
        answer = (await bulk(fleet, "set", wanted, expected=3, priority=6)).json()
        assert (answer["done"], answer["results"][0]["code"]) == (2, "conflict")
        monkeypatch.setattr(runs, "BULK_MAX", 2)
        answer = (await bulk(fleet, "cancel", wanted, expected=3)).json()
        assert (answer["matched"], answer["done"]) == (3, 2)
        assert (await runner.heartbeat(job)).json()["directive"] == "cancel"
        answer = (await bulk(fleet, "requeue", {"status": "CANCELLED"}, expected=1)).json()
        assert answer["results"] == [{"run_id": runs_of[1], "status": "PENDING"}]
        assert (await fleet.row(kept))["status"] == "PENDING"
        for wrong in ({}, {"unknown": "x"}, {"status": "DONE"}):
            assert code_of(await bulk(fleet, "cancel", wrong)) == (422, "invalid_request")
        assert code_of(await bulk(fleet, "set", wanted, expected=3)) == (422, "invalid_request")


@pytest.mark.gen_test
async def test_refusals_and_a_runners_last_day_are_listed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        for _ in range(2):
            files = runner.bundle(job) | {"manifest.json": json.dumps({}).encode()}
            assert (await runner.submit(job, files=files)).status_code == 422
        answer = (await fleet.admin("GET", "/refusals", params={"limit": 1})).json()
        assert [(each["run_id"], each["code"]) for each in answer["refusals"]] == [
            (run_id, "invalid_bundle")
        ]
        query = {"run_id": run_id, "runner_id": "runner-a", "cursor": answer["next_cursor"]}
        answer = (await fleet.admin("GET", "/refusals", params=query)).json()
        assert (len(answer["refusals"]), answer["next_cursor"]) == (1, None)
        day = (await fleet.admin("GET", "/runners/runner-a")).json()["last_day"]
        assert day == {"attempts": {"live": 1}, "refusals": {"invalid_bundle": 2}}
        for wrong in ({"run_id": "x"}, {"runner_id": "/"}, {"cursor": "x"}):
            assert code_of(await fleet.admin("GET", "/refusals", params=wrong))[0] == 422
        key = await fleet.admin("GET", f"/runner-keys/{runner.fingerprint}")
        assert key.json()["runner_id"] == "runner-a"
        missing = await fleet.admin("GET", f"/runner-keys/{'0' * 64}")
        assert code_of(missing) == (404, "not_found")
