"""docs/api.md and docs/runners.md have every address, member and error code, and no others."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.documents.schemas import FOLDER
from broker.errors import code_of
from config.settings import Settings
from handlers.errors import STATUS
from sandbox.demo.dev import ONE_RUN
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import make_app
from tests.support.fleet import AUDIENCE, Runner, open_fleet
from tests.support.fleet import code_of as code_of_answer
from tests.support.routes import served

MakeSettings = Callable[..., Settings]
DOCS = Path(__file__).parents[2] / "docs"
API, RUNNERS = (DOCS / "api.md").read_text(), (DOCS / "runners.md").read_text()
# What the handlers of docs/api.md's "Anybody" take beside GET; the page says so in one sentence.
OF_ALL = {"HEAD", "OPTIONS"}
# Of bundles, which docs/results.md tells of.
OF_BUNDLES = {"envelope", "manifest", "result", "result_legacy"}
SCHEMAS = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem not in OF_BUNDLES)


def documented() -> set[tuple[str, str]]:
    """The addresses of both pages, by method."""
    return set(re.findall(r"`(GET|POST|PUT|PATCH|DELETE) (/[^\s`]*)`", API + RUNNERS))


def members(schema: Any) -> set[str]:
    """The names of all members that a schema lets pass."""
    if isinstance(schema, list):
        return {name for each in schema for name in members(each)}
    if not isinstance(schema, dict):
        return set()
    return set(schema.get("properties", ())) | members(list(schema.values()))


@pytest.mark.gen_test
async def test_the_pages_have_every_address_of_the_application_and_no_other(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        shown = {at for at in served(make_app(fleet.services)) if at[0] not in OF_ALL}
    assert len(shown) > 30
    assert documented() == shown


def test_the_error_table_has_every_code_with_its_status_and_no_other() -> None:
    table = re.findall(r"^\| `(\w+)` \| (\d+) \| ([^|]+) \| ([^|]+) \|$", API, re.M)
    assert [(code, int(status)) for code, status, _, _ in table] == [
        (code_of(error.__new__(error)), status) for error, status in STATUS.items()
    ]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_pages_name_every_member_that_a_body_may_have(name: str) -> None:
    prose = re.sub(r"```.*?```", "", API + RUNNERS, flags=re.S)
    in_code = " ".join(re.findall(r"`[^`]+`", prose))
    for member in members(json.loads((FOLDER / f"{name}.json").read_text())):
        assert re.search(rf"\b{member}\b", in_code), member


@pytest.mark.gen_test
async def test_the_bodies_that_we_show_are_taken(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """The page's registration and enqueue, and the one that `make dev` prints."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit()
        (code,) = re.findall(r"```python\n(import base64, datetime.*?)```", RUNNERS, re.S)
        given: dict[str, Any] = {"seed": bytes(runner.key), "audience": AUDIENCE}
        exec(code, given)  # noqa: S102 (our own page)
        answer = await fleet.http.post("/api/runners/register", json=given["body"])
        assert answer.status_code == 201, answer.text
        (shown,) = re.findall(r"/api/admin/queue\" -d '(.*?)'\n", API, re.S)
        for body in (shown, ONE_RUN):
            answer = await fleet.admin("POST", "/queue", json=json.loads(body))
            assert answer.status_code == 201, answer.text


@pytest.mark.gen_test
async def test_a_problems_type_leads_to_a_page_that_has_its_code(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        problem = (await fleet.http.get("/nowhere")).json()
        path, _, anchor = problem["type"].removeprefix(AUDIENCE).partition("#")
        page = await fleet.http.get(path)
        assert (page.status_code, anchor) == (200, "not_found")
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        for error, status in STATUS.items():
            code = code_of(error.__new__(error))
            assert f'<dt id="{code}"><code>{code}</code> ({status})</dt><dd>' in page.text
        assert (await fleet.http.head(path)).status_code == 200


@pytest.mark.gen_test
async def test_refusals_name_what_is_wrong(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        for path, told in (
            ("/api/queue/abc", "run_id"),
            ("/api/queue/abc/submit", "run_id"),
            ("/api/admin/queue/ABC", "run_id"),
            ("/api/admin/results/abc/files/result.json", "run_id"),
            ("/api/admin/runner-keys/ab", "fingerprint"),
            ("/api/admin/runners/-x/pause", "runner_id"),
            (f"/api/admin/results/{'0' * 8}-0000-4000-8000-{'0' * 12}/files/nothing", "summary.md"),
            ("/api/queue/claim/", "no such address"),
            ("/api/nothing", "no such address"),
        ):
            answer = await fleet.http.get(path)
            assert code_of_answer(answer) == (404, "not_found")
            assert told in answer.json()["detail"], path
            assert "abc" not in answer.json()["detail"]
        for query, told in (("stat=accepted", "unknown"), ("state=x&state=y", "more than once")):
            answer = await fleet.admin("GET", f"/results?{query}")
            assert code_of_answer(answer) == (422, "invalid_request")
            name = query.partition("=")[0]
            assert f'"{name}" is' in answer.json()["detail"]
            assert told in answer.json()["detail"]
            assert [each["pointer"] for each in answer.json()["errors"]] == [f"/{name}"]
        await _refuses_credentials(runner)


async def _refuses_credentials(runner: Runner) -> None:
    fleet = runner.fleet
    admins = {"Authorization": f"Bearer {fleet.admin_token}"}
    answer = await fleet.http.get("/api/runners/me", headers=admins)
    assert code_of_answer(answer) == (401, "invalid_token")
    assert "this is an admin token" in answer.json()["detail"].lower()
    twice = [("Authorization", f"Bearer {runner.token}")] * 2
    answer = await fleet.http.get("/api/runners/me", headers=twice)
    assert code_of_answer(answer) == (401, "missing_token")
    assert "twice" in answer.json()["detail"]
    paused = await fleet.admin("POST", "/runners/runner-a/pause", json={"reason": "tea"})
    assert paused.status_code == 200
    answer = await runner.claim()
    assert code_of_answer(answer) == (403, "runner_paused")
    assert answer.json()["detail"] == "This runner is paused: tea. Ask an admin to resume it."
