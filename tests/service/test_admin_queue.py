"""The queue from above: enqueue all or none, the list page by page, and the cancel."""

import asyncio
import json
import uuid
from collections.abc import Callable
from typing import Any

import asyncpg
import httpx
import pytest

from broker.jobs.job import comparable_hash
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import SMALL, Fleet, code_of, open_fleet, run_of

MakeSettings = Callable[..., Settings]
TASK = {"id": "t", "user_prompt": "?", "scorer": "exact"}
TABLES = ("runs", "run_queue", "models", "model_sources", "creators", "tasks", "prompts", "audit")


async def post(fleet: Fleet, *runs: Any, key: str | None = None) -> httpx.Response:
    """Enqueue runs, under an Idempotency-Key if one is given."""
    headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
    # Escaped, so that lone surrogates can be sent.
    return await fleet.admin("POST", "/queue", content=json.dumps({"runs": runs}), headers=headers)


async def counts(fleet: Fleet) -> dict[str, int]:
    """Return how many rows an enqueue has written."""
    return {name: await fleet.pool.fetchval(f"SELECT count(*) FROM {name}") for name in TABLES}


def model(**changes: Any) -> dict[str, Any]:
    """Return the descriptor with changes; None removes a member."""
    return {name: value for name, value in {**SMALL, **changes}.items() if value is not None}


# Enqueue


@pytest.mark.gen_test
async def test_what_is_wrong_with_a_run_is_told_with_a_pointer_and_nothing_is_added(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    twice = [{"id": "p", "system": ""}] * 2
    lone = json.loads('"\\ud800"')
    bad: list[tuple[str, dict[str, Any]]] = [
        ("/model/parameter_count_b", {"model": model(parameter_count_b=None)}),
        ("/model/parameter_count_b", {"model": model(parameter_count_b=0)}),
        ("/model/parameter_count_b", {"model": model(parameter_count_b="7")}),
        ("/model/active_parameter_count_b", {"model": model(active_parameter_count_b=9)}),
        ("/model/architecture", {"model": model(architecture="Dens")}),
        ("/model/file_format", {"model": model(file_format="gguf")}),
        ("/model/sources", {"model": model(sources=None)}),
        ("/model/sources/0/source_type", {"model": model(sources=[{"source_type": "ftp",
                                                                  "url": "ftp://x"}])}),
        ("/model/release_date", {"model": model(release_date="0000-01-01")}),
        ("/model/release_date", {"model": model(release_date="2025-02-30")}),
        ("/model/release_date", {"model": model(release_date="yesterday")}),
        ("/model/model_hash", {"model": model(model_hash="AB" * 32)}),
        ("/model/name", {"model": model(name="a\nb")}),
        ("/model/context_length_max", {"model": model(context_length_max=2**31)}),
        ("/model/colour", {"model": model(colour="red")}),
        ("/model/model_id", {"model": {"model_id": str(uuid.uuid4())}}),
        ("/model/model_id", {"model": {"model_id": str(uuid.uuid4()).upper()}}),
        ("/model/name", {"model": {"model_id": str(uuid.uuid4()), "name": "x"}}),
        ("/tasks", {"tasks": []}),
        ("/tasks/1/id", {"tasks": [TASK, TASK]}),
        ("/floor_tasks/1/id", {"floor_tasks": [TASK, TASK]}),
        ("/tasks/0/tier", {"tasks": [{**TASK, "tier": "dumb_model"}]}),
        ("/tasks/0/user_prompt", {"tasks": [{**TASK, "user_prompt": "\u0000"}]}),
        ("/tasks/0/expected", {"tasks": [{**TASK, "expected": lone}]}),
        ("/tasks/0", {"tasks": [{"id": "t", "scorer": "exact"}]}),
        ("/tasks", {"tasks": [{**TASK, "id": str(n)} for n in range(400)],
                    "prompts": [{"id": str(n), "system": ""} for n in range(251)]}),
        ("/prompts", {"prompts": []}),
        ("/prompts/1/id", {"prompts": twice}),
        ("/prompts/0/id", {"prompts": [{"id": "floor", "system": ""}]}),
        ("/config", {"config": []}),
        ("/config/models", {"config": {"models": []}}),
        ("/config/models", {"config": {"models": [{"id": "a"}, {"id": "b"}]}}),
        ("/config/models/0/id", {"config": {"models": [{"id": ""}]}}),
        ("/config/run", {"config": {"run": []}}),
        ("/config", {"config": {"a\u0000": 1}}),
        ("/priority", {"priority": 1.5}),
        ("/priority", {"priority": True}),
        ("/priority", {"priority": "1"}),
        ("/priority", {"priority": 10**300}),
        ("/max_attempts", {"max_attempts": 0}),
        ("/max_runtime_s", {"max_runtime_s": -1}),
        ("/not_before", {"not_before": "2026-12-31T23:59:60Z"}),
        ("/not_before", {"not_before": "0000-01-01T00:00:00Z"}),
        ("/not_before", {"not_before": "2026-12-31"}),
        ("/not_before", {"not_before": 1}),
        ("/batch_id", {"batch_id": "{" + str(uuid.uuid4()) + "}"}),
        ("/run_id", {"run_id": str(uuid.uuid4()).upper()}),
        ("/run_id", {"run_id": f"{uuid.uuid4()}\n"}),
        ("/colour", {"colour": "red"}),
    ]  # fmt: skip
    async with open_fleet(make_settings(), sigstore) as fleet:
        before = await counts(fleet)
        for at, changes in bad:
            answer = await post(fleet, run_of(), run_of(**changes))
            assert code_of(answer) == (422, "invalid_request"), (changes, answer.text)
            pointers = {error["pointer"] for error in answer.json()["errors"]}
            assert pointers == {f"/runs/1{at}"}, changes
        assert await counts(fleet) == before


@pytest.mark.gen_test
async def test_an_unknown_quantization_is_refused_with_the_known_ones(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        answer = await post(fleet, run_of(model=model(quantization="q4_k_xl")))
        assert code_of(answer) == (422, "unknown_quantization")
        (error,) = answer.json()["errors"]
        assert error["pointer"] == "/runs/0/model/quantization"
        assert "q4_k_m" in error["detail"]
        assert "q4_k_xl" not in answer.text
        many = await post(fleet, *[run_of(model=model(quantization="x"))] * 200)
        assert len(many.json()["errors"]) == 50
        known = await fleet.pool.fetchval("SELECT count(*) FROM quantization_methods")
        assert known == 27


@pytest.mark.gen_test
async def test_one_to_a_thousand_runs_are_added_in_one_request(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        assert code_of(await post(fleet)) == (422, "invalid_request")
        too_many = await post(fleet, *[run_of()] * 1001)
        assert code_of(too_many) == (422, "invalid_request")
        assert await fleet.pool.fetchval("SELECT count(*) FROM runs") == 0
        answer = await post(fleet, *[run_of()] * 1000)
        assert answer.status_code == 201, answer.text
        runs = answer.json()["runs"]
        assert len({run["run_id"] for run in runs}) == 1000
        assert all(run["created"] and run["status"] == "PENDING" for run in runs)
        written = await counts(fleet)
        assert (written["runs"], written["run_queue"]) == (1000, 1000)
        assert (written["models"], written["tasks"], written["prompts"]) == (1, 3, 5)


@pytest.mark.gen_test
async def test_a_model_is_named_by_its_id_once_it_is_known(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        first = await fleet.row(await fleet.enqueue())
        by_id = {"model_id": str(first["model_id"])}
        second = await fleet.row(await fleet.enqueue(model=by_id, config={}))
        assert second["model_id"] == first["model_id"]
        assert second["job"]["config"]["models"] == [{"id": str(first["model_id"])}]
        await fleet.pool.execute(
            "UPDATE models SET parameter_count_b = NULL, active_parameter_count_b = NULL"
        )
        assert code_of(await post(fleet, run_of(model=by_id))) == (422, "invalid_request")
        await fleet.pool.execute("UPDATE models SET parameter_count_b = 1, quantization_id = NULL")
        assert code_of(await post(fleet, run_of(model=by_id))) == (422, "invalid_request")


@pytest.mark.gen_test
async def test_the_same_run_again_is_there_already_and_another_under_its_id_is_a_conflict(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        numbers = {"config": {"models": [{"id": "m"}], "n": [1e22, -0.0, 1e300, 2**70, 24.0]}}
        run = run_of(run_id=str(uuid.uuid4()), **numbers)
        first, again = await post(fleet, run), await post(fleet, run)
        assert first.json()["runs"][0]["created"] is True
        assert again.status_code == 201, again.text
        (there,) = again.json()["runs"]
        assert {**there, "created": True} == first.json()["runs"][0]
        assert there["created"] is False
        before = await counts(fleet)
        fresh = run_of(run_id=str(uuid.uuid4()))
        other = {"sources": [{"source_type": "direct_url", "url": "https://other.example"}]}
        for changed, what in (
            ({"tasks": [TASK]}, "another tasks:"),
            ({"model": model(quantization="q4_k_m", **other)}, "another judge, model:"),
            ({"config": {"models": [{"id": "m"}]}}, "another config:"),
        ):
            answer = await post(fleet, fresh, {**run, **changed})
            assert code_of(answer) == (409, "conflict"), changed
            assert what in answer.json()["detail"]
        assert await counts(fleet) == before, "all or none"
        both = await post(fleet, fresh, fresh)
        assert code_of(both) == (422, "invalid_request")


@pytest.mark.gen_test
async def test_a_run_that_this_queue_did_not_make_is_not_touched(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        theirs = str(uuid.uuid4())
        await fleet.pool.execute(
            "INSERT INTO runs (run_id, submitted_at, publisher_id) VALUES ($1, now(), 'them')",
            theirs,
        )
        answer = await post(fleet, run_of(), run_of(run_id=theirs))
        assert code_of(answer) == (409, "conflict")
        assert await fleet.pool.fetchval("SELECT count(*) FROM runs") == 1
        assert await fleet.pool.fetchval("SELECT count(*) FROM run_queue") == 0


@pytest.mark.gen_test
async def test_the_database_holds_a_run_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_id = await fleet.enqueue()
        with pytest.raises(asyncpg.UniqueViolationError, match="run_queue_run_id"):
            await fleet.pool.execute(
                "INSERT INTO run_queue (queue_id, run_id, model_id, judge_model_id, job,"
                " config_hash)"
                " SELECT gen_random_uuid(), run_id, model_id, judge_model_id, job, config_hash"
                " FROM run_queue WHERE run_id = $1",
                run_id,
            )


@pytest.mark.gen_test
async def test_of_the_same_runs_enqueued_at_once_each_is_created_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.enqueue()  # model, tasks and prompts are there: nobody waits for those
        runs = [run_of(run_id=str(uuid.uuid4())) for _ in range(20)]
        async with fleet.transaction() as beside:
            await beside.execute("LOCK TABLE run_queue IN EXCLUSIVE MODE")
            adding = [asyncio.create_task(post(fleet, *runs)) for _ in range(3)]
            await fleet.until_blocked(3)
        answers = await asyncio.gather(*adding)
        assert [answer.status_code for answer in answers] == [201] * 3
        created = [run["run_id"] for a in answers for run in a.json()["runs"] if run["created"]]
        assert sorted(created) == sorted(run["run_id"] for run in runs)


@pytest.mark.gen_test
async def test_the_same_runs_in_two_orders_at_once_do_not_wait_for_each_other_for_ever(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.enqueue()
        run_ids = sorted(str(uuid.uuid4()) for _ in range(9))
        runs = [run_of(run_id=run_id) for run_id in run_ids]
        async with fleet.transaction() as beside:
            # Both come to a halt in the middle, where each would hold what the other wants next.
            await beside.execute(
                "INSERT INTO runs (run_id, submitted_at, publisher_id) VALUES ($1, now(), 'x')",
                run_ids[4],
            )
            adding = [asyncio.create_task(post(fleet, *each)) for each in (runs, runs[::-1])]
            await fleet.until_blocked(2)
            await beside.execute("DELETE FROM runs WHERE run_id = $1", run_ids[4])
        answers = await asyncio.gather(*adding)
        assert [answer.status_code for answer in answers] == [201, 201]


@pytest.mark.gen_test
async def test_an_idempotency_key_is_answered_once_and_the_same_ever_after(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        answers = await asyncio.gather(*(post(fleet, run_of(), key="batch-1") for _ in range(5)))
        bodies = [answer.json()["runs"] for answer in answers]
        assert [answer.status_code for answer in answers] == [201] * 5
        assert bodies == [bodies[0]] * 5
        assert await fleet.pool.fetchval("SELECT count(*) FROM runs") == 1
        other = await post(fleet, run_of(priority=1), key="batch-1")
        assert code_of(other) == (409, "conflict")
        refused = await post(fleet, run_of(tasks=[]), key="batch-2")
        assert code_of(refused) == (422, "invalid_request")
        assert (await post(fleet, run_of(), key="batch-2")).status_code == 201
        for key in ("a b", "k" * 201, "a\tb"):
            assert code_of(await post(fleet, run_of(), key=key)) == (422, "invalid_request"), key
        assert await fleet.pool.fetchval("SELECT count(*) FROM runs") == 2


@pytest.mark.gen_test
async def test_numbers_of_any_size_reach_the_runner_as_the_hash_says(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    config = {"models": [{"id": "m"}], "n": [2**64, -(2**63) - 1, 10**307, 1e22, -0.0, 0.1, 5e-324]}
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(config=config, priority=1.0, max_attempts=3.0)
        job = await runner.take()
        assert job["config"]["n"] == config["n"]
        assert job["config"]["run"]["name"] == run_id
        assert job["config_hash"] == comparable_hash(job["config"])
        row = await fleet.row(run_id)
        assert (row["priority"], row["max_attempts"]) == (1, 3)


@pytest.mark.gen_test
async def test_a_run_is_not_handed_out_before_its_time(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        later = await fleet.enqueue(not_before="2999-01-01T01:00:00+01:00", priority=1)
        row = await fleet.row(later)
        assert row["retry_after"].isoformat() == "2999-01-01T00:00:00+00:00"
        assert (await runner.claim()).status_code == 204
        now = await fleet.enqueue(not_before="2020-01-01T00:00:00Z")
        assert (await runner.take())["run_id"] == now


@pytest.mark.gen_test
async def test_a_model_is_written_as_it_is_described_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        creator = {"display_name": "HF", "homepage": "https://huggingface.co"}
        whole = model(
            creator=creator, model_hash="ab" * 32, context_length_default=4096.0,
            release_date="2025-01-31", version="1", description="d", model_source_size=2**63 - 1,
            sources=[
                {**SMALL["sources"][0], "source_metadata": {"sha": "x", "n": 1, "gone": None}}
            ],
        )  # fmt: skip
        await fleet.enqueue(model=whole)
        await fleet.enqueue(model={**whole, "description": "another"})
        row = await fleet.pool.fetchrow(
            "SELECT * FROM models JOIN creators USING (creator_id)"
            " JOIN model_sources USING (model_id)"
        )
        assert row is not None
        assert (row["description"], row["context_length_default"]) == ("d", 4096)
        assert row["model_source_size"] == 2**63 - 1
        assert row["source_metadata"] == {"sha": "x", "n": 1, "gone": None}
        assert await fleet.pool.fetchval("SELECT count(*) FROM model_sources") == 1
        # uuid5 of this namespace and the hash as bakeoff writes it: upstream's rule
        space = uuid.UUID("dbc87c22-6b6d-4f89-9757-d186f0f62719")
        assert row["model_id"] == uuid.uuid5(space, "sha256:" + "ab" * 32)
        assert row["model_hash"] == "sha256:" + "ab" * 32
        assert row["name"] == row["display_name"] == "HF", "creators.name may not be null"


# The list


async def pages(fleet: Fleet, query: str = "") -> list[list[str]]:
    """Walk the list by its Link headers; return the run_ids of each page."""
    found, path = [], f"/queue?limit=7{query}"
    while path:
        answer = await fleet.admin("GET", path)
        assert answer.status_code == 200, answer.text
        found.append([run["run_id"] for run in answer.json()["runs"]])
        assert len(found) < 20, "a page leads back to itself"
        link = answer.links.get("next", {}).get("url", "")
        path = link.removeprefix("/api/admin")
    return found


@pytest.mark.gen_test
async def test_pages_over_runs_of_one_moment_lose_none_and_show_none_twice(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        answer = await post(fleet, *[run_of()] * 24)
        everything = {run["run_id"] for run in answer.json()["runs"]}
        # Half of them in the next microsecond: as near as two transactions can be.
        await fleet.pool.execute(
            "UPDATE run_queue SET created_at = date_trunc('second', created_at)"
            " + (SELECT interval '1 microsecond') * (hashtext(run_id::text) & 1)"
        )
        for _ in range(5):
            walked = await pages(fleet)
            shown = [run_id for page in walked for run_id in page]
            assert len(shown) == 24
            assert set(shown) == everything
            await fleet.pool.execute(
                "UPDATE run_queue SET created_at = created_at + interval '1.000003 seconds'"
            )


@pytest.mark.gen_test
async def test_the_list_is_filtered_by_state_and_keeps_the_filter_from_page_to_page(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        answer = await post(fleet, *[run_of()] * 20)
        cancelled = [run["run_id"] for run in answer.json()["runs"]][::2]
        for run_id in cancelled:
            await fleet.cancel(run_id)
        walked = await pages(fleet, "&status=CANCELLED")
        assert sorted(run_id for page in walked for run_id in page) == sorted(cancelled)
        assert [len(page) for page in walked] == [7, 3]
        assert await pages(fleet, "&status=FAILED") == [[]]
        exact = await fleet.admin("GET", "/queue?limit=20")
        assert (len(exact.json()["runs"]), exact.json()["next_cursor"]) == (20, None)
        (run,) = (await fleet.admin("GET", "/queue?limit=1")).json()["runs"]
        assert (run["model"], run["need_gb"]) == (SMALL["name"], 3)
        assert "lease_id" not in run


@pytest.mark.gen_test
async def test_a_query_that_makes_no_sense_is_422(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    bad = (
        "limit=-1", "limit=0", "limit=1001", "limit=ten", "limit=", "limit=1e3", "limit=%EF%BC%91",
        "limit=1&limit=2", "limit=99999999999999999999", "status=pending", "status=", "status=%00",
        "limit=+1", "limit=%201", "limit=1%20", "limit=1_0",
        "cursor=KzE6MDAwMDAwMDAtMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDAw",
        "cursor=MV8wOjAwMDAwMDAwLTAwMDAtNDAwMC04MDAwLTAwMDAwMDAwMDAwMA==",
        "cursor=IDE6MDAwMDAwMDAtMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDAw",
        "cursor=MTowMDAwMDAwMDAwMDA0MDAwODAwMDAwMDAwMDAwMDAwMA==",
        "cursor=MTp7MDAwMDAwMDAtMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDAwfQ==",
        "cursor=x", "cursor=%C3%A9", "cursor=MQ==", "cursor=" + "A" * 5000, "cursor=%FF",
        "cursor=OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk6MDAwMDAwMDAtMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDAw",
        "cursor=bmFuOjAwMDAwMDAwLTAwMDAtNDAwMC04MDAwLTAwMDAwMDAwMDAwMA==",
        "colour=red", "offset=1", "%FF=1",
    )  # fmt: skip
    async with open_fleet(make_settings(), sigstore) as fleet:
        for query in bad:
            answer = await fleet.admin("GET", f"/queue?{query}")
            assert code_of(answer) == (422, "invalid_request"), query


# One run


@pytest.mark.gen_test
async def test_a_run_is_shown_with_its_job_its_ledger_and_its_receipt_but_not_its_secret(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        await runner.release(job)
        job = await runner.take()
        live = await fleet.admin("GET", f"/queue/{run_id}")
        assert job["lease_id"] not in live.text
        assert (live.json()["status"], live.json()["claimed_by"]) == ("CLAIMED", "runner-a")
        receipt = (await runner.submit(job)).json()
        shown = (await fleet.admin("GET", f"/queue/{run_id}")).json()
        assert shown["job"]["tasks"] == job["tasks"]
        assert [attempt["how"] for attempt in shown["attempts"]] == ["released", "completed"]
        assert shown["receipt"]["receipt_id"] == receipt["receipt_id"]
        assert code_of(await fleet.admin("GET", f"/queue/{uuid.uuid4()}")) == (404, "not_found")
        assert code_of(await fleet.admin("GET", f"/queue/{run_id}?x=1")) == (422, "invalid_request")


# Cancel


async def cancel(fleet: Fleet, run_id: str, reason: Any = "no longer wanted") -> httpx.Response:
    """Cancel a run."""
    return await fleet.admin("POST", f"/queue/{run_id}/cancel", json={"reason": reason})


@pytest.mark.gen_test
async def test_a_run_that_nobody_works_on_is_cancelled_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        for _ in range(2):
            answer = await cancel(fleet, run_id)
            assert (answer.status_code, answer.json()["status"]) == (200, "CANCELLED")
            assert answer.json()["cancel_requested"] is False
        row = await fleet.row(run_id)
        assert (row["status"], row["cancel_reason"]) == ("CANCELLED", "no longer wanted")
        assert row["completed_at"] is not None
        assert (await runner.claim()).status_code == 204
        actions = await fleet.pool.fetch("SELECT action FROM audit WHERE run_id = $1", run_id)
        assert [row["action"] for row in actions] == ["queue.cancel"]


@pytest.mark.gen_test
async def test_the_runner_of_a_live_run_is_told_at_its_next_heartbeat(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        for reason in ("first", "second"):
            answer = await cancel(fleet, run_id, reason)
            assert (answer.status_code, answer.json()["status"]) == (202, "CLAIMED")
            assert answer.json()["cancel_requested"] is True
        beat = (await runner.heartbeat(job)).json()
        assert (beat["directive"], beat["reason"]) == ("cancel", "first")
        assert (await runner.release(job)).json()["status"] == "CANCELLED"
        assert (await cancel(fleet, run_id)).status_code == 200


@pytest.mark.gen_test
async def test_a_run_that_has_ended_cannot_be_cancelled(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        complete = await fleet.enqueue()
        assert (await runner.submit(await runner.take())).status_code == 201
        failed = await fleet.enqueue(max_attempts=1)
        assert (await runner.fail(await runner.take())).json()["status"] == "FAILED"
        for run_id in (complete, failed):
            assert code_of(await cancel(fleet, run_id)) == (409, "run_finished")
        assert code_of(await cancel(fleet, str(uuid.uuid4()))) == (404, "not_found")
        for reason in ("", "x" * 1001, 7, None, "\u0000"):
            answer = await cancel(fleet, complete, reason)
            assert code_of(answer) == (422, "invalid_request"), reason


@pytest.mark.gen_test
async def test_a_cancel_and_a_claim_at_once_leave_one_truth(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_id = await fleet.enqueue()
        async with fleet.transaction() as beside:
            # A claim that has not committed yet.
            await beside.execute(
                "UPDATE run_queue SET status = 'CLAIMED', lease_id = gen_random_uuid(),"
                " lease_key = 'k', claimed_by = 'runner-z', lease_slot = 1,"
                " lease_expires_at = now() + interval '1 hour'"
            )
            cancelling = asyncio.create_task(cancel(fleet, run_id))
            await fleet.until_blocked()
        answer = await cancelling
        assert (answer.status_code, answer.json()["status"]) == (202, "CLAIMED")


@pytest.mark.gen_test
async def test_another_quantization_under_the_same_id_is_refused(make_settings, sigstore) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.enqueue()
        other = run_of(model={**SMALL, "quantization": "q4_k_m"})
        answer = await fleet.admin("POST", "/queue", json={"runs": [other]})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == "/runs/0/model"
        told_apart = run_of(model={**other["model"], "model_source_size": 1_055_609_536})
        answer = await fleet.admin("POST", "/queue", json={"runs": [told_apart]})
        assert answer.status_code == 201
