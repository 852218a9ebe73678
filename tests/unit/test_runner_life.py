"""The demo runner's life: what ends its work, what does not, and how it leaves."""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from auth.receipts import ReceiptKeys
from sandbox.runner.answers import BuiltInRules, Cell, Executor, Reply
from sandbox.runner.life import Runner, RunnerOptions
from sandbox.runner.result_bundle import Hardware
from sandbox.runner.wire import Job, Problem
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.runner_stage import BODY, LEASE_ID, RUN_ID, Line, Stage, refusal

CLAIMED = Line(200, {**BODY, "heartbeat_interval_s": 0.01})
RECEIPT = Line(201, {"result_sha256": "cd" * 32})
REASONS = [{"code": "vram", "detail": "needs 934 GB"}]
NOTHING = Line(200, {"job": None, "reasons": REASONS})
EMPTY = Line(204, headers={"Retry-After": "0"})
REGISTERED = {"access_token": "token", "runner_id": "bench-1", "claim_wait_max_s": 50}
ONE_RUN = RunnerOptions(once=True, wait_s=0, idle_s=0.01)
Start = Callable[..., AbstractAsyncContextManager[Runner]]


def beat(directive: str = "continue") -> Line:
    return Line(200, {"directive": directive, "heartbeat_interval_s": 0.01})


class Busy:
    """An executor that computes until the test lets it finish."""

    provenance = {"kind": "test"}  # noqa: RUF012

    def __init__(self) -> None:
        self.may_finish = asyncio.Event()

    async def answer(self, job: Job, cell: Cell) -> Reply:
        await self.may_finish.wait()
        return Reply("Oslo", 1, 1)


class Broken:
    """An executor whose machine fails."""

    provenance = {"kind": "test"}  # noqa: RUF012

    async def answer(self, job: Job, cell: Cell) -> Reply:
        raise OSError("no such device")


@pytest.fixture
def stage(io_loop) -> Iterator[Stage]:
    stage = Stage()
    stage.says("register", Line(201, REGISTERED))
    stage.says("claim", CLAIMED, EMPTY)
    stage.says("heartbeat", beat())
    stage.says("submit", RECEIPT)
    server = stage.listen()
    yield stage
    server.stop()
    io_loop.run_sync(server.close_all_connections)


@pytest.fixture
def events() -> list[tuple[str, dict]]:
    return []


@pytest.fixture
def started(stage: Stage, events: list) -> Start:
    """Open a runner of the stage; its events land in `events`."""

    @asynccontextmanager
    async def open_runner(executor: Executor, patience: RunnerOptions = ONE_RUN):
        def say(event: str, **facts: Any) -> None:
            events.append((event, facts))

        async with httpx.AsyncClient(base_url=stage.url, trust_env=False) as http:
            client = stage.client(http, [])
            yield Runner(client, executor, lambda blob: b"{}", Hardware(24), say, patience)

    return open_runner


def when_heard(stage: Stage, verb: str, times: int, then: Callable[[], object]) -> None:
    """Call `then` when the stage hears `verb` for the given time: a signal instead of a sleep."""

    async def listen() -> None:
        if len(stage.requests(verb)) == times:
            then()

    stage.on[verb] = listen


def named(events: list, name: str) -> list[dict]:
    return [facts for event, facts in events if event == name]


@pytest.mark.gen_test
async def test_a_run_is_claimed_kept_alive_and_submitted(stage, events, started: Start) -> None:
    busy = Busy()
    when_heard(stage, "heartbeat", 3, busy.may_finish.set)
    async with started(busy) as runner:
        await runner.live()
        await runner.leave()
    beats = stage.requests("heartbeat")
    assert len(beats) >= 3
    first = {"done": 0, "total": 5, "note": "asking"}
    assert beats[0].json == {"lease_id": LEASE_ID, "progress": first}
    assert len(stage.requests("submit")) == 1
    assert not stage.requests("release")
    assert stage.heard[-1].verb == "me"
    names = [event for event, _ in events]
    assert names[:2] == ["registered", "claimed"]
    assert names[-2:] == ["submitted", "signed_off"]
    assert LEASE_ID not in str(events)


@pytest.mark.parametrize("code", ["lease_lost", "run_finished", "key_not_allowed", "key_revoked"])
@pytest.mark.gen_test
async def test_a_refused_heartbeat_ends_the_work(stage, events, started, code: str) -> None:
    stage.says("heartbeat", beat(), refusal(409, code))
    async with started(Busy()) as runner:
        await runner.live()
    assert named(events, code) == [{"run_id": RUN_ID, "during": "heartbeat"}]
    assert not stage.requests("submit")
    assert not stage.requests("fail")


@pytest.mark.parametrize(
    "line",
    [Line(404, "", {"Content-Type": "text/html"}), Line(502, ""), Line(hang_up=True)],
    ids=["a bare 404", "a bare 502", "a closed connection"],
)
@pytest.mark.gen_test
async def test_a_proxy_between_us_does_not_end_the_work(stage, started, line: Line) -> None:
    busy = Busy()
    stage.says("heartbeat", beat(), line, line, line, beat())
    when_heard(stage, "heartbeat", 6, busy.may_finish.set)
    async with started(busy) as runner:
        await runner.live()
    assert len(stage.requests("submit")) == 1


@pytest.mark.gen_test
async def test_a_refusal_that_says_nothing_of_the_lease_does_not_end_the_work(
    stage: Stage, events: list, started: Start
) -> None:
    busy = Busy()
    stage.says("heartbeat", refusal(401, "clock_skew"), beat())
    when_heard(stage, "heartbeat", 3, busy.may_finish.set)
    stage.says("claim", Line(200, {**BODY, "heartbeat_interval_s": 0.01}))
    async with started(busy) as runner:
        await runner.live()
    assert len(stage.requests("submit")) == 1
    assert len(named(events, "clock_skew")) == 1


@pytest.mark.gen_test
async def test_a_cancelled_run_is_released_and_not_submitted(stage, events, started) -> None:
    stage.says("heartbeat", beat(), beat("cancel"))
    async with started(Busy()) as runner:
        await runner.live()
    [release] = stage.requests("release")
    assert release.json == {"lease_id": LEASE_ID, "reason": "cancelled"}
    assert not stage.requests("submit")
    assert named(events, "released") == [{"run_id": RUN_ID, "reason": "cancelled"}]


@pytest.mark.gen_test
async def test_a_draining_runner_finishes_its_run_and_claims_no_other(stage, started) -> None:
    busy = Busy()
    stage.says("heartbeat", beat("drain"), beat())
    when_heard(stage, "heartbeat", 2, busy.may_finish.set)
    async with started(busy, RunnerOptions(wait_s=0, idle_s=0.01)) as runner:
        await runner.live()
    assert len(stage.requests("claim")) == 1
    assert len(stage.requests("submit")) == 1


@pytest.mark.gen_test
async def test_a_machine_that_fails_says_so(stage: Stage, events, started: Start) -> None:
    async with started(Broken()) as runner:
        await runner.live()
    [fail] = stage.requests("fail")
    assert fail.json == {
        "lease_id": LEASE_ID,
        "failure_code": "infra_error",
        "detail": "OSError: no such device",
    }
    assert not stage.requests("submit")


@pytest.mark.gen_test
async def test_a_refused_bundle_is_a_failure_of_this_machine(stage, events, started) -> None:
    stage.says("submit", refusal(422, "invalid_bundle"))
    async with started(BuiltInRules()) as runner:
        await runner.live()
    assert named(events, "refused")[0]["code"] == "invalid_bundle"
    assert len(stage.requests("fail")) == 1
    assert not named(events, "submitted")


@pytest.mark.gen_test
async def test_a_bundle_that_came_too_late_is_let_go(stage: Stage, events, started) -> None:
    stage.says("submit", refusal(409, "already_complete"))
    async with started(BuiltInRules()) as runner:
        await runner.live()
    assert named(events, "refused")[0]["code"] == "already_complete"
    assert not stage.requests("fail")


@pytest.mark.gen_test
async def test_a_lost_receipt_is_fetched_although_the_run_is_finished(
    stage: Stage, events: list, started: Start
) -> None:
    """The submit was accepted, its answer lost; the next heartbeat says run_finished."""
    refused = asyncio.Event()
    stage.says("submit", Line(hang_up=True), RECEIPT)

    def submit_is_under_way() -> None:
        stage.says("heartbeat", refusal(409, "run_finished"))

    async def first_submit_waits_for_the_refusal() -> None:
        submit_is_under_way()
        await refused.wait()

    async def heartbeat_is_refused() -> None:
        if stage.requests("submit"):
            refused.set()

    stage.on = {"submit": first_submit_waits_for_the_refusal, "heartbeat": heartbeat_is_refused}
    async with started(BuiltInRules()) as runner:
        await runner.live()
    assert named(events, "run_finished")
    assert named(events, "submitted") == [{"run_id": RUN_ID, "result_sha256": "cd" * 32}]


@pytest.mark.gen_test
async def test_a_receipt_that_proves_nothing_is_told_of_and_the_work_goes_on(
    stage: Stage, events: list, started: Start
) -> None:
    keys = ReceiptKeys({"k": b"s" * 32})
    given = {"run_id": RUN_ID, "result_sha256": "cd" * 32, "public_url": stage.url}
    stage.says("submit", Line(201, keys.sign(given)))
    stage.says("bakeoff-queue.json", Line(200, {"keys": keys.published()}))
    async with started(BuiltInRules()) as runner:
        await runner.live()
    (asked,) = stage.requests("bakeoff-queue.json")
    assert "Authorization" not in asked.headers
    (doubt,) = named(events, "receipt_doubtful")
    assert doubt == {"run_id": RUN_ID, "why": "it is signed for another result_sha256"}
    assert named(events, "submitted")


@pytest.mark.gen_test
async def test_an_idle_runner_asks_once_why_and_leaves_in_the_end(stage, events, started) -> None:
    stage.says("claim", EMPTY, NOTHING, EMPTY)
    async with started(
        BuiltInRules(), RunnerOptions(until_idle=3, wait_s=0, idle_s=0.01)
    ) as runner:
        await runner.live()
    assert [fact["reasons"] for fact in named(events, "idle")] == [REASONS]
    asked = [one.json for one in stage.requests("claim")]
    assert asked == [{"wait_s": 0}, {"explain": True}, {"wait_s": 0}, {"wait_s": 0}]


@pytest.mark.gen_test
async def test_the_question_why_may_bring_a_job(stage: Stage, events, started: Start) -> None:
    stage.says("claim", EMPTY, CLAIMED, EMPTY)
    async with started(BuiltInRules()) as runner:
        await runner.live()
    assert len(stage.requests("submit")) == 1


@pytest.mark.parametrize("code", ["runner_paused", "lease_limit"])
@pytest.mark.gen_test
async def test_a_paused_runner_keeps_asking(stage: Stage, events, started, code: str) -> None:
    stage.says("claim", refusal(403, code), CLAIMED)
    async with started(BuiltInRules()) as runner:
        await runner.live()
    assert named(events, "idle")[0]["reasons"][0]["code"] == code
    assert len(stage.requests("submit")) == 1


@pytest.mark.gen_test
async def test_a_revoked_runner_stops_asking(stage: Stage, started: Start) -> None:
    stage.says("claim", refusal(403, "key_revoked"))
    async with started(BuiltInRules()) as runner:
        with pytest.raises(Problem, match="key_revoked"):
            await runner.live()


@pytest.mark.gen_test
async def test_leases_of_an_earlier_process_are_handed_back(stage, started: Start) -> None:
    held = {"run_id": RUN_ID, "lease_id": LEASE_ID, "lease_expires_at": "2025-01-01T00:00:00Z"}
    stage.says("register", Line(200, {**REGISTERED, "held_leases": [held]}))
    async with started(BuiltInRules(), RunnerOptions(until_idle=0)) as runner:
        await runner.live()
    assert stage.requests("release")[0].json == {"lease_id": LEASE_ID, "reason": "restarted"}


@pytest.mark.gen_test
async def test_a_runner_that_never_got_in_leaves_without_a_word(stage, started: Start) -> None:
    async with started(BuiltInRules()) as runner:
        await runner.leave()
    assert stage.heard == []


@pytest.mark.gen_test
async def test_the_process_hands_its_run_back_on_sigterm(stage: Stage, tmp_path: Path) -> None:
    beating = asyncio.Event()
    when_heard(stage, "heartbeat", 2, beating.set)
    process = await _process(stage, tmp_path, "--seconds-per-cell", "3600")
    await beating.wait()
    process.send_signal(signal.SIGTERM)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert stage.requests("release")[0].json == {"lease_id": LEASE_ID, "reason": "shutdown"}
    assert stage.heard[-1].verb == "me"
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert events[:2] == ["registered", "claimed"]
    assert events[-3:] == ["stopping", "released", "signed_off"]
    assert err.startswith(b"public key: ")


@pytest.mark.gen_test
async def test_the_process_submits_until_there_is_nothing_left(stage, tmp_path: Path) -> None:
    process = await _process(stage, tmp_path, "--until-idle", "1", "--seconds-per-cell", "0")
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert "submitted" in [json.loads(line)["event"] for line in out.splitlines()]
    assert b"application/vnd.dev.sigstore.bundle" in stage.requests("submit")[0].body


@pytest.mark.gen_test
async def test_the_process_fails_when_its_key_is_refused(stage: Stage, tmp_path: Path) -> None:
    stage.says("register", refusal(403, "key_not_allowed"))
    process = await _process(stage, tmp_path)
    out, _ = await process.communicate()
    assert process.returncode == 1
    assert json.loads(out)["code"] == "key_not_allowed"


async def _process(stage: Stage, folder: Path, *more: str) -> asyncio.subprocess.Process:
    ThrowawaySigstore.create(folder / "sigstore")
    facts = {
        "--server": stage.url,
        "--key": str(folder / "runner.key"),
        "--sigstore": str(folder / "sigstore"),
        "--identity": "runner@example.org",
        "--issuer": "https://accounts.example.org",
        "--vram-gb": "24",
        "--quantizations": "q4_k_m,q8_0",
    }
    line = [word for pair in facts.items() for word in pair]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sandbox.runner.main", *line, *more, stdout=pipe, stderr=pipe
    )
