"""The log: one event for each thing that happened, with who, which run and what came of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]
ROOT = Path(__file__).parents[2]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def told(logs: list[Any], event: str) -> list[dict[str, Any]]:
    return [line for line in logs if line["event"] == event]


@pytest.mark.gen_test
async def test_each_thing_that_happens_to_a_run_is_one_event_with_who_and_what(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    with capture_logs() as logs:
        async with open_fleet(make_settings(), sigstore) as fleet:
            runner = await fleet.sign_on()
            assert (await runner.claim()).status_code == 204
            run_id = await fleet.enqueue()
            job = await runner.take()
            await runner.heartbeat(job)
            await runner.release(job)
            job = await runner.take()
            await runner.fail(job, "load_failure", detail="x")
            await fleet.pool.execute("UPDATE run_queue SET retry_after = NULL")
            await fleet.pool.execute("DELETE FROM run_deferrals")
            job = await runner.take()
            await fleet.overdue(run_id)
            await fleet.sweep()
            await fleet.pool.execute("UPDATE run_queue SET retry_after = NULL")
            job = await runner.take()
            files = runner.bundle(job) | {"manifest.json": b"{}"}
            assert (await runner.submit(job, files=files)).status_code == 422
            assert (await runner.submit(job)).status_code == 201
            await fleet.admin("POST", f"/queue/{run_id}/cancel", json={"reason": "late"})
            secrets = [runner.headers["Authorization"].partition(" ")[2], job["lease_id"]]
    who = {"runner_id": "runner-a", "key_fp": runner.fingerprint[:16]}
    (line,) = told(logs, "runner.register")
    assert {name: line[name] for name in (*who, "outcome", "status")} == {
        **who, "outcome": "ok", "status": 201,
    }  # fmt: skip
    claims = told(logs, "run.claim")
    assert [line["outcome"] for line in claims] == ["empty", *["granted"] * 4]
    assert [line.get("lease_seq") for line in claims] == [None, 1, 2, 3, 4]
    assert all(line["runner_id"] == "runner-a" and line["request_id"] for line in claims)
    assert all(line["run_id"] == run_id for line in claims[1:])
    for event in ("run.heartbeat", "run.release", "run.fail"):
        (line,) = told(logs, event)
        assert (line["run_id"], line["outcome"], line["runner_id"]) == (run_id, "ok", "runner-a")
    (line,) = told(logs, "lease.lapsed")
    assert (line["run_id"], line["runner_id"], line["lease_seq"]) == (run_id, "runner-a", 3)
    assert [line["outcome"] for line in told(logs, "run.submit")] == ["invalid_bundle", "ok"]
    line = told(logs, "admin.request")[-1]
    assert (line["actor"][:6], line["run_id"], line["code"]) == ("admin:", run_id, "run_finished")
    for secret in secrets:
        assert secret not in str(logs)


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("sent", "trace_id"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        ("00-not-a-trace", None),
        (None, None),
    ],
)
async def test_a_trace_of_the_caller_stands_in_the_line(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, sent: str | None, trace_id: str | None
) -> None:
    with capture_logs() as logs:
        async with open_fleet(make_settings(), sigstore) as fleet:
            headers = {"traceparent": sent} if sent else {}
            await fleet.http.get("/nowhere", headers=headers)
    assert told(logs, "http.request")[-1].get("trace_id") == trace_id


def test_the_page_of_events_has_each_event_and_no_other() -> None:
    """docs/events.md: a row per event that the code can write."""
    in_code = set()
    for folder in ("auth", "broker", "handlers", "config", "db"):
        for path in (ROOT / folder).glob("**/*.py"):
            text = path.read_text("utf-8")
            in_code |= set(re.findall(r"log\.\w+\(\s*\"([a-z_]+\.[a-z_]+)\"", text))
            in_code |= set(re.findall(r"event: ClassVar\[str\] = \"([a-z_.]+)\"", text))
    in_code |= set(
        re.findall(r"log\.\w+\(\s*\"([a-z_]+\.[a-z_]+)\"", (ROOT / "server.py").read_text())
    )
    page = (ROOT / "docs/events.md").read_text()
    listed = set(re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", page, re.MULTILINE))
    assert in_code - listed == set()
    # Events whose name is not a literal at the call.
    assert listed - in_code <= {"audit.head", "listener.degraded", "listener.deaf",
                                "listener.denied", "listener.lost", "http.unavailable"}  # fmt: skip
