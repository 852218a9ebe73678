"""/api/admin/results: what admins see of accepted results, the bytes, and who decides what."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx
import pytest

from broker.admin import results
from broker.admin.moderation import EDGES, STATES
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_submit import listed
from tests.support.fleet import SIGNER, Fleet, Runner, code_of, open_fleet

MakeSettings = Callable[..., Settings]


@asynccontextmanager
async def accepted(
    settings: Settings, sigstore: ThrowawaySigstore, count: int = 1
) -> AsyncIterator[tuple[Fleet, Runner, list[str]]]:
    """Yield a fleet, a runner, and the runs whose results of that runner were accepted."""
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        yield fleet, runner, [await hand_in(fleet, runner) for _ in range(count)]


async def hand_in(fleet: Fleet, runner: Runner, **changes: Any) -> str:
    """Let a runner do a run of its own and hand it in; return the run_id."""
    await fleet.enqueue()
    job = await runner.take()
    answer = await runner.submit(job, runner.bundle(job, **changes))
    assert answer.status_code == 201, answer.text
    return job["run_id"]


async def decide(
    fleet: Fleet, run_id: str, state: str, former: str | None = None, reason: str = "because"
) -> httpx.Response:
    """Send a decision about a result."""
    body = {"state": state, "reason": reason, **({"former": former} if former else {})}
    return await fleet.admin("POST", f"/results/{run_id}/state", json=body)


async def shown(fleet: Fleet, run_id: str) -> dict[str, Any]:
    """Return a result's own page."""
    answer = await fleet.admin("GET", f"/results/{run_id}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def ids(fleet: Fleet, **query: Any) -> list[str]:
    """Return the run_ids of the first page of a listing."""
    answer = await fleet.admin("GET", "/results", params=query)
    assert answer.status_code == 200, answer.text
    return [result["run_id"] for result in answer.json()["results"]]


# Seeing


@pytest.mark.gen_test
async def test_a_result_is_shown_with_all_it_takes_to_verify_it_and_its_bytes_as_they_came(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PIECE_BYTES", 1000)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        files = {**runner.bundle(job), "dashboard.html": bytes(range(256)) * 20, "summary.md": b""}
        files = listed(json.loads(files["result.json"]), files)
        answer = await runner.submit(job, files)
        assert answer.status_code == 201, answer.text
        receipt = answer.json()
        result = await shown(fleet, run_id)
        assert result["signer"]["identity"] == SIGNER.identity
        assert result["signer"]["issuer"] == SIGNER.issuer
        assert result["signer"]["log_index"] == receipt["signer"]["log_index"]
        assert (result["trust"], result["state"], result["history"]) == ("sigstore", "accepted", [])
        assert (result["publisher_id"], result["run_status"]) == ("runner-a", "complete")
        assert result["key_fingerprint"] == runner.fingerprint
        assert result["receipt"] == {n: v for n, v in receipt.items() if n != "server_time"}
        described = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        }
        assert {file.pop("name"): file for file in result["files"]} == described
        for name, content in files.items():
            got = await fleet.admin("GET", f"/results/{run_id}/files/{name}")
            assert (got.status_code, got.content) == (200, content), name
            assert got.headers["Content-Type"] == "application/octet-stream"
            assert got.headers["X-Content-Type-Options"] == "nosniff"
            assert got.headers["Content-Disposition"] == f'attachment; filename="{name}"'
            assert got.headers["Content-Length"] == str(len(content))


@pytest.mark.gen_test
async def test_the_list_is_of_what_was_asked_for_page_by_page_in_the_order_of_acceptance(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with accepted(make_settings(), sigstore, 3) as (fleet, runner, runs):
        other = await fleet.sign_on("runner-b")
        theirs = await hand_in(fleet, other)
        assert (await decide(fleet, runs[1], "disputed")).status_code == 200
        everything = [*runs, theirs]
        assert await ids(fleet) == everything
        assert await ids(fleet, runner_id="runner-b") == [theirs]
        assert await ids(fleet, key=runner.fingerprint) == runs
        assert await ids(fleet, state="disputed") == [runs[1]]
        assert await ids(fleet, trust="runner-key") == []
        at = (await shown(fleet, runs[2]))["accepted_at"]
        assert await ids(fleet, since=at) == everything[2:]
        page, seen = await fleet.admin("GET", "/results?limit=1&trust=sigstore&since=" + at), []
        while True:
            seen += [result["run_id"] for result in page.json()["results"]]
            if "Link" not in page.headers:
                break
            link = page.headers["Link"].removeprefix("</api/admin").partition(">")[0]
            page = await fleet.admin("GET", link)
        assert seen == everything[2:]
        assert page.json()["next_cursor"] is None


@pytest.mark.gen_test
async def test_the_rows_of_a_result_come_page_by_page_each_cell_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with accepted(make_settings(), sigstore) as (fleet, _, (run_id,)):
        path = f"/results/{run_id}/rows"
        whole = (await fleet.admin("GET", path)).json()
        assert whole["next_cursor"] is None
        cells = whole["model_metrics"]
        assert len({cell["content_sha256"] for cell in cells}) == len(cells) > 2
        page, seen = await fleet.admin("GET", f"{path}?limit=2"), []
        while True:
            told = page.json()
            assert len(told["model_metrics"]) <= 2
            assert (told["run"], told["hardware"]) == (whole["run"], whole["hardware"])
            seen += told["model_metrics"]
            if "Link" not in page.headers:
                break
            link = page.headers["Link"].removeprefix("</api/admin").partition(">")[0]
            page = await fleet.admin("GET", link)
        assert seen == cells
        assert told["next_cursor"] is None
        for query, pointer in (
            ({"limit": "1001"}, "/limit"),
            ({"cursor": "Zm9v"}, "/cursor"),  # foo
            ({"cursor": "LTE="}, "/cursor"),  # -1
            ({"cursor": "MjE0NzQ4MzY0OA=="}, "/cursor"),  # 2**31
            ({"cursor": "é"}, "/cursor"),
        ):
            answer = await fleet.admin("GET", path, params=query)
            assert code_of(answer) == (422, "invalid_request"), query
            assert answer.json()["errors"][0]["pointer"] == pointer


@pytest.mark.gen_test
async def test_what_is_asked_wrongly_is_named_and_what_is_not_there_is_not_found(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with accepted(make_settings(), sigstore) as (fleet, _, (run_id,)):
        for query, pointer in (
            ({"state": "ACCEPTED"}, "/state"),
            ({"trust": "none"}, "/trust"),
            ({"since": "yesterday"}, "/since"),
            ({"limit": "0"}, "/limit"),
            ({"limit": "-1"}, "/limit"),
            ({"cursor": "Zm9v"}, "/cursor"),
            ({"key": "\0"}, "/key"),
            ({"runner_id": ""}, "/runner_id"),
        ):
            answer = await fleet.admin("GET", "/results", params=query)
            assert code_of(answer) == (422, "invalid_request"), query
            assert answer.json()["errors"][0]["pointer"] == pointer
        assert code_of(await fleet.admin("GET", "/results?typo=1")) == (422, "invalid_request")
        waiting = await fleet.enqueue()
        for path in (f"/{waiting}", f"/{waiting}/rows", f"/{waiting}/files/result.json",
                     f"/{run_id}/files/dashboard.html", f"/{run_id}/files/..%2fresult.json",
                     f"/{run_id}/files/passwd", f"/{run_id.upper()}"):  # fmt: skip
            assert code_of(await fleet.admin("GET", f"/results{path}")) == (404, "not_found"), path
        assert code_of(await decide(fleet, waiting, "revoked")) == (404, "not_found")
        for body in ({"state": "gone", "reason": "x"}, {"state": "revoked"},
                     {"state": "revoked", "reason": ""}, {"reason": "x"},
                     {"state": "revoked", "reason": "x", "why": 1}):  # fmt: skip
            refused = await fleet.admin("POST", f"/results/{run_id}/state", json=body)
            assert code_of(refused) == (422, "invalid_request"), body
        assert (await shown(fleet, run_id))["state"] == "accepted"


@pytest.mark.gen_test
async def test_a_file_that_goes_away_while_it_is_sent_ends_short_and_counts_as_answered(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PIECE_BYTES", 1000)
    async with accepted(make_settings(), sigstore) as (fleet, _, (run_id,)):
        path = f"/api/admin/results/{run_id}/files/result.json"
        read = results.submissions.file_piece

        async def cut(pool: asyncpg.Pool, *of: Any) -> bytes | None:
            return await read(pool, *of) if of[2] == 0 else None

        monkeypatch.setattr(results.submissions, "file_piece", cut)
        with pytest.raises(httpx.RemoteProtocolError):
            await fleet.http.get(path, headers={"Authorization": f"Bearer {fleet.admin_token}"})
        assert fleet.services.in_flight.count == 0


# Deciding


@pytest.mark.gen_test
async def test_a_decision_is_on_record_and_seen_where_the_receipt_is(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with accepted(make_settings(), sigstore) as (fleet, runner, (run_id,)):
        before = await counting(fleet)
        answer = await decide(fleet, run_id, "disputed", "accepted", "scores too good")
        body = answer.json()
        assert (body["former"], body["state"], body["changed"]) == ("accepted", "disputed", True)
        again = (await decide(fleet, run_id, "disputed", reason="another")).json()
        assert (again["changed"], again["changed_at"]) == (False, None)
        result = await shown(fleet, run_id)
        assert (result["state"], result["reason"]) == ("disputed", "scores too good")
        assert (result["changed_by"], result["changed_at"]) == ("admin:test", body["changed_at"])
        (past,) = result["history"]
        del past["at"]
        assert past == {"by": "admin:test", "former": "accepted", "state": "disputed",
                        "reason": "scores too good"}  # fmt: skip
        told = {"state": "disputed", "reason": "scores too good", "changed_at": body["changed_at"]}
        own = await fleet.http.get(f"/api/queue/{run_id}", headers=runner.headers)
        page = await fleet.admin("GET", f"/queue/{run_id}")
        assert own.json()["result"] == page.json()["result"] == told
        assert own.json()["receipt"] == page.json()["receipt"] == result["receipt"]
        assert (await decide(fleet, run_id, "accepted", "disputed")).status_code == 200
        assert [past["state"] for past in (await shown(fleet, run_id))["history"]] == [
            "disputed", "accepted",
        ]  # fmt: skip
        assert await counting(fleet) == before, "rows and bytes stay, whatever is decided"


async def counting(fleet: Fleet) -> list[Any]:
    """Return how many rows and bytes there are of results."""
    return list(
        await fleet.pool.fetchrow(
            "SELECT (SELECT count(*) FROM run_model_metrics),"
            " (SELECT count(*) FROM run_hardware_metrics),"
            " (SELECT sum(octet_length(content)) FROM submission_files)"
        )
    )


@pytest.mark.gen_test
async def test_only_the_legal_decisions_can_be_taken(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with accepted(make_settings(), sigstore) as (fleet, _, (run_id,)):
        for former in STATES:
            for state in STATES:
                await fleet.pool.execute(
                    "UPDATE submissions SET state = $1, state_reason = 'r', state_changed_by = 'b',"
                    " state_changed_at = now()",
                    former,
                )
                answer = await decide(fleet, run_id, state, former)
                if state in EDGES[former] or state == former:
                    assert answer.status_code == 200, (former, state)
                else:
                    assert code_of(answer) == (409, "conflict"), (former, state)
                    assert (await shown(fleet, run_id))["state"] == former
        assert EDGES["revoked"] == {"disputed"}


@pytest.mark.gen_test
async def test_of_two_admins_who_saw_the_same_state_the_second_changes_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with accepted(make_settings(), sigstore) as (fleet, _, (run_id,)):
        async with fleet.transaction() as beside:
            await beside.execute("SELECT FROM submissions FOR UPDATE")
            both = [
                asyncio.create_task(decide(fleet, run_id, state))
                for state in ("disputed", "superseded")
            ]
            await fleet.until_blocked(2)
        answers = sorted(await asyncio.gather(*both), key=lambda answer: answer.status_code)
        assert answers[0].status_code == 200
        assert code_of(answers[1]) == (409, "conflict")
        result = await shown(fleet, run_id)
        assert result["state"] == answers[0].json()["state"]
        assert len(result["history"]) == 1
        late = await decide(fleet, run_id, "revoked", "accepted")
        assert code_of(late) == (409, "conflict"), "it says what it saw, and that is past"


@pytest.mark.gen_test
async def test_a_decision_without_its_audit_row_is_none(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with accepted(make_settings(), sigstore) as (fleet, _, (run_id,)):
        await fleet.pool.execute("ALTER TABLE audit ADD CHECK (action <> 'result.state') NOT VALID")
        assert (await decide(fleet, run_id, "revoked")).status_code >= 500
        assert (await shown(fleet, run_id))["state"] == "accepted"


@pytest.mark.gen_test
async def test_a_revoked_key_and_the_list_name_the_same_results(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with accepted(make_settings(), sigstore, 3) as (fleet, runner, runs):
        await hand_in(fleet, await fleet.sign_on("runner-b"))
        await decide(fleet, runs[1], "revoked")
        path, body = f"/runner-keys/{runner.fingerprint}", {"reason": "lost"}
        review = (await fleet.admin("DELETE", path, json=body)).json()["results_to_review"]
        assert review == [runs[0], runs[2]]
        assert await ids(fleet, key=runner.fingerprint, state="accepted") == review
        assert await ids(fleet, key=runner.fingerprint) == runs
        assert (await shown(fleet, runs[0]))["key_revoked_at"] is not None


# Reading


@pytest.mark.gen_test
async def test_readers_of_the_metrics_join_the_view_and_see_what_counts(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    query = (
        "SELECT run_id::text, count(*) AS cells FROM run_model_metrics"
        " JOIN accepted_results USING (run_id) GROUP BY 1"
    )
    async with accepted(make_settings(), sigstore, 2) as (fleet, runner, runs):

        async def counted() -> dict[str, int]:
            return {row["run_id"]: row["cells"] for row in await fleet.pool.fetch(query)}

        assert await counted() == dict.fromkeys(runs, 5)
        row = await fleet.pool.fetchrow("SELECT * FROM accepted_results WHERE run_id = $1", runs[0])
        assert row is not None
        assert (row["trust"], row["signer_identity"]) == ("sigstore", SIGNER.identity)
        assert row["key_fingerprint"] == runner.fingerprint
        for state in ("superseded", "disputed", "revoked"):
            await decide(fleet, runs[0], state)
            assert await counted() == {runs[1]: 5}, state
        await decide(fleet, runs[0], "disputed")
        await decide(fleet, runs[0], "accepted")
        assert await counted() == dict.fromkeys(runs, 5)
