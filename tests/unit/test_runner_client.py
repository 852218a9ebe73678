"""The runner's HTTP: which answers it believes, and what it sends again, byte for byte."""

import asyncio
import base64
import json
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from auth.keys import RunnerKey
from broker.documents.schemas import load_schema
from sandbox.runner.client import RENEWALS, RunnerClient
from sandbox.runner.identity import Identity, load_key, public_key_text
from sandbox.runner.wire import Backoff, Problem
from tests.support.runner_stage import BODY, JOB, LEASE_ID, RUN_ID, Line, Stage, refusal

FILES = {"result.json": b'{"run_id": 1}\n', "signature.sigstore.json": b"\x00\xff"}
BEAT = Line(200, {"directive": "continue", "heartbeat_interval_s": 30})
PROXY_404 = Line(404, "<h1>Not Found</h1>", {"Content-Type": "text/html"})
NOT_FROM_US = {
    "a proxy's 404": PROXY_404,
    "a 404 in plain JSON": Line(404, {"code": "lease_lost"}),
    "a problem document without a code": Line(
        404, {"title": "no"}, {"Content-Type": "application/problem+json"}
    ),
    "a proxy's 502": Line(502, "", {"Content-Type": "text/html"}),
    "a proxy's 401": Line(401, "log in", {"Content-Type": "text/plain"}),
    "a redirect": Line(302, "", {"Location": "/login"}),
    "a login page": Line(200, "<html>", {"Content-Type": "text/html"}),
    "half an answer": Line(200, '{"directive": '),
    "our own 500": refusal(500, "internal"),
    "busy": refusal(503, "busy", **{"Retry-After": "0"}),
    "rate limited": refusal(429, "rate_limited", **{"Retry-After": "0"}),
    "a connection that is closed": Line(hang_up=True),
}
Open = Callable[..., AbstractAsyncContextManager[RunnerClient]]


@pytest.fixture
def stage(io_loop) -> Iterator[Stage]:
    stage = Stage()
    server = stage.listen()
    yield stage
    server.stop()
    io_loop.run_sync(server.close_all_connections)


@pytest.fixture
def notes() -> list[tuple[str, dict]]:
    return []


@pytest.fixture
def opened(stage: Stage, notes: list) -> Open:
    """Open a client of the stage, registered unless told otherwise."""

    @asynccontextmanager
    async def open_client(*, registered: bool = True):
        async with httpx.AsyncClient(base_url=stage.url, trust_env=False) as http:
            client = stage.client(http, notes)
            if registered:
                await client.register()
            yield client

    return open_client


@pytest.mark.parametrize("line", NOT_FROM_US.values(), ids=NOT_FROM_US.keys())
@pytest.mark.gen_test
async def test_what_the_server_did_not_say_is_asked_again(stage, opened: Open, line: Line) -> None:
    stage.says("heartbeat", line, line, BEAT)
    async with opened() as client:
        answer = await client.heartbeat(JOB, {"done": 1, "total": 5})
    assert answer["directive"] == "continue"
    bodies = {one.body for one in stage.requests("heartbeat")}
    assert len(stage.requests("heartbeat")) == 3
    assert bodies == {
        json.dumps({"lease_id": LEASE_ID, "progress": {"done": 1, "total": 5}}).encode()
    }


@pytest.mark.gen_test
async def test_what_is_asked_again_is_reported(stage: Stage, opened: Open, notes: list) -> None:
    stage.says("heartbeat", PROXY_404, BEAT)
    async with opened() as client:
        await client.heartbeat(JOB, {})
    [(event, facts)] = notes
    assert (event, facts["why"]) == ("retrying", "HTTP 404 without a code of ours")


@pytest.mark.parametrize("code", ["lease_lost", "run_finished", "key_revoked", "run_mismatch"])
@pytest.mark.gen_test
async def test_a_refusal_by_code_is_believed_at_once(stage, opened: Open, code: str) -> None:
    stage.says("heartbeat", refusal(409, code), BEAT)
    async with opened() as client:
        with pytest.raises(Problem) as caught:
            await client.heartbeat(JOB, {})
    assert (caught.value.status, caught.value.code) == (409, code)
    assert caught.value.detail == f"the {code} detail"
    assert len(stage.requests("heartbeat")) == 1


@pytest.mark.gen_test
async def test_a_bundle_is_sent_again_byte_for_byte(stage: Stage, opened: Open) -> None:
    hang_up = Line(hang_up=True)
    busy = refusal(503, "busy", **{"Retry-After": "0"})
    stage.says("submit", busy, hang_up, PROXY_404, Line(201, {"receipt_id": "r"}))
    async with opened() as client:
        receipt = await client.submit(JOB, FILES)
    assert receipt == {"receipt_id": "r"}
    sent = stage.requests("submit")
    assert len(sent) == 4
    assert len({(one.body, one.headers["Content-Type"]) for one in sent}) == 1


@pytest.mark.gen_test
async def test_a_bundle_names_its_lease_first_and_each_part_by_its_file(stage, opened) -> None:
    stage.says("submit", Line(201, {}))
    async with opened() as client:
        await client.submit(JOB, FILES)
    body = stage.requests("submit")[0].body
    names = [f'name="{name}"; filename="{name}"'.encode() for name in FILES]
    places = [body.find(one) for one in (b'name="lease_id"', LEASE_ID.encode(), *names)]
    assert -1 not in places
    assert places == sorted(places)
    assert b"\x00\xff" in body


@pytest.mark.gen_test
async def test_a_claim_keeps_its_key_until_it_is_answered(stage: Stage, opened: Open) -> None:
    stage.says("claim", Line(hang_up=True), PROXY_404, Line(200, BODY), Line(204))
    async with opened() as client:
        offer = await client.claim(wait_s=0)
        await client.claim(wait_s=0)
    assert offer.job == JOB
    keys = [uuid.UUID(one.headers["Idempotency-Key"]) for one in stage.requests("claim")]
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.gen_test
async def test_an_empty_claim_brings_a_pause_or_the_reasons(stage: Stage, opened: Open) -> None:
    reasons = [{"code": "vram", "count": 1, "detail": "needs 934 GB, you offer 24"}]
    explained = Line(200, {"job": None, "reasons": reasons})
    stage.says("claim", Line(204, headers={"Retry-After": "30"}), explained)
    async with opened() as client:
        empty = await client.claim(wait_s=3)
        why = await client.claim(explain=True)
    assert (empty.job, empty.retry_after_s, empty.reasons) == (None, 30.0, [])
    assert (why.job, why.reasons) == (None, reasons)
    assert [one.json for one in stage.requests("claim")] == [{"wait_s": 3}, {"explain": True}]


@pytest.mark.parametrize("code", ["token_expired", "invalid_token"])
@pytest.mark.gen_test
async def test_a_stale_token_is_renewed_and_the_claim_goes_on(stage, opened, code: str) -> None:
    stage.says("claim", refusal(401, code), Line(200, BODY))
    async with opened() as client:
        offer = await client.claim(wait_s=0)
    assert offer.job == JOB
    first, second = stage.requests("claim")
    assert first.headers["Authorization"] == "Bearer token-1"
    assert second.headers["Authorization"] == "Bearer token-2"
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    registrations = [one.json["registration"] for one in stage.requests("register")]
    assert registrations[0]["nonce"] != registrations[1]["nonce"]
    assert registrations[0]["instance_id"] == registrations[1]["instance_id"]


@pytest.mark.gen_test
async def test_requests_with_the_same_stale_token_register_once(stage: Stage, opened) -> None:
    expired = refusal(401, "token_expired")
    stage.says("heartbeat", expired, expired, expired, BEAT)
    both_there = asyncio.Barrier(3)
    stage.on["heartbeat"] = both_there.wait
    async with opened() as client:
        await asyncio.gather(*(client.heartbeat(JOB, {}) for _ in range(3)))
    assert len(stage.requests("register")) == 2


@pytest.mark.gen_test
async def test_a_server_that_refuses_its_own_tokens_is_not_asked_for_ever(stage, opened) -> None:
    stage.says("heartbeat", refusal(401, "token_expired"))
    async with opened() as client:
        with pytest.raises(Problem, match="token_expired"):
            await client.heartbeat(JOB, {})
    assert len(stage.requests("register")) == 1 + RENEWALS


@pytest.mark.parametrize("code", ["missing_token", "bad_signature", "clock_skew"])
@pytest.mark.gen_test
async def test_other_refusals_of_the_credential_do_not_register(stage, opened, code) -> None:
    stage.says("heartbeat", refusal(401, code))
    async with opened() as client:
        with pytest.raises(Problem, match=code):
            await client.heartbeat(JOB, {})
    assert len(stage.requests("register")) == 1


@pytest.mark.gen_test
async def test_a_key_that_was_revoked_cannot_renew_its_token(stage: Stage, opened: Open) -> None:
    stage.says("heartbeat", refusal(401, "token_expired"))
    async with opened() as client:
        stage.says("register", refusal(403, "key_revoked"))
        with pytest.raises(Problem, match="key_revoked"):
            await client.heartbeat(JOB, {})


@pytest.mark.gen_test
async def test_a_registration_is_repeated_with_the_same_nonce(stage: Stage, opened: Open) -> None:
    stage.says("register", Line(hang_up=True), PROXY_404, Line())
    async with opened(registered=False) as client:
        assert not client.registered
        await client.register()
        assert client.registered
    assert len({one.body for one in stage.requests("register")}) == 1
    assert "Authorization" not in stage.requests("register")[0].headers


def test_a_registration_is_signed_by_the_key_that_it_names(stage: Stage) -> None:
    identity = stage.identity()
    body = json.loads(identity.sign_registration())
    registration = body["registration"]
    RunnerKey.parse(registration["public_key"]).verify(registration, **body["sig"])
    age = datetime.now(UTC) - datetime.fromisoformat(registration["signed_at"])
    assert abs(age) < timedelta(minutes=1)
    assert registration["signed_at"].endswith("Z")
    assert len(bytes.fromhex(registration["nonce"])) == 16
    assert registration["audience"] == stage.url
    assert registration["capabilities"] == {"vram_gb": 24, "quantizations": ["q8_0"]}
    uuid.UUID(registration["instance_id"])


@pytest.mark.gen_test
async def test_the_verbs_on_a_run_send_the_lease_and_their_words(stage: Stage, opened) -> None:
    async with opened() as client:
        await client.release(RUN_ID, LEASE_ID, "cancelled")
        await client.fail(JOB, "infra_error", "x" * 2000)
        await client.sign_off()
    release, fail = stage.requests("release")[0], stage.requests("fail")[0]
    assert release.json == {"lease_id": LEASE_ID, "reason": "cancelled"}
    assert fail.json["failure_code"] == "infra_error"
    assert len(fail.json["detail"]) == 1000
    assert stage.heard[-1].verb == "me"


@pytest.mark.gen_test
async def test_every_body_fits_the_servers_schema(stage: Stage, opened: Open) -> None:
    async with opened() as client:
        await client.claim(wait_s=3)
        await client.claim(explain=True)
        await client.heartbeat(JOB, {"done": 1, "total": 5, "note": "asking"})
        await client.release(RUN_ID, LEASE_ID, "cancelled")
        await client.fail(JOB, "infra_error", "no such device")
    verbs = [one.verb for one in stage.heard]
    assert verbs == ["register", "claim", "claim", "heartbeat", "release", "fail"]
    wrong = [load_schema(one.verb).violations(one.json) for one in stage.heard]
    assert wrong == [()] * len(verbs)


def test_the_server_sets_the_shortest_wait_and_we_the_longest() -> None:
    backoff = Backoff(first_s=1.0, longest_s=8.0)
    assert all(0 <= backoff.wait_s(0, None) <= 1 for _ in range(50))
    assert all(backoff.wait_s(60, None) <= 8 for _ in range(50))
    assert all(3 <= backoff.wait_s(0, 3.0) <= 8 for _ in range(50))
    assert backoff.wait_s(0, 3600.0) == 8
    assert max(backoff.wait_s(9, 0.0) for _ in range(50)) > 1


def test_a_key_file_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "runner.key"
    made, read = load_key(path), load_key(path)
    assert public_key_text(made) == public_key_text(read)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(base64.b64decode(path.read_text(), validate=False)) == 32


@pytest.mark.parametrize("text", ["", "not base64!", base64.b64encode(b"short").decode()])
def test_a_key_file_with_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runner.key"
    path.write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011
        load_key(path)


def test_two_processes_of_one_machine_are_two_instances(stage: Stage) -> None:
    one, other = stage.identity(), stage.identity()
    assert isinstance(one, Identity)
    assert one.instance_id != other.instance_id
