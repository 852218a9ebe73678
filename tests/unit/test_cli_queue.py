"""The `queue` and `keys` commands against a stand-in of the admin API."""

import base64
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nacl.signing
import pytest

from broker.documents.schemas import load_schema
from broker.jobs import enqueue_request
from broker.jobs.quantizations import KNOWN
from cli import queue
from cli.queue import BATCH
from tests.support.cli_admin import TOKEN, Admin, Shell, playing, problem

QUEUE = "/api/admin/queue"
KEYS = "/api/admin/runner-keys"
RUN_ID = "0b5a1f6e-3f4e-4c58-9f0c-6f1f5e2f7a11"
RUN = {
    "run_id": RUN_ID,
    "status": "CLAIMED",
    "model": "Llama-3.1-8B-Instruct [red]",
    "quantization": "q4_k_m",
    "need_gb": 6,
    "priority": 100,
    "attempt_count": 1,
    "max_attempts": 5,
    "claimed_by": "gpu-1",
    "created_at": "2026-01-01T00:00:00Z",
    "retry_after": None,
}
ATTEMPT = {"attempt": 1, "runner_id": "gpu-1", "how": "lapsed", "detail": "silent\nfor 300 s"}
PUBLIC_KEY = base64.b64encode(bytes(nacl.signing.SigningKey(bytes(32)).verify_key)).decode()
FINGERPRINT = "ab" * 32
KEY = {"fingerprint": FINGERPRINT, "runner_id": "gpu-1", "max_leases": 2, "revoked_at": None}


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    with playing() as admin:
        monkeypatch.setenv("BAKEOFF_QUEUE_URL", admin.url)
        monkeypatch.setenv("BAKEOFF_QUEUE_TOKEN", TOKEN)
        yield admin


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two models in bakeoff's own format."""
    path = tmp_path / "config.yaml"
    path.write_text("""
queue: {lease_ttl_s: 300}
dataset: {n: 1, domains: [qa]}
dumb_model_tier: {enabled: false}
models:
  - {id: small, gguf: small-Q8_0.gguf, num_params: 1.2}
  - {id: large, gguf: large-Q4_K_M.gguf, num_params: 70000000000}
prompts: [{id: p, system: Be brief.}]
""")
    (tmp_path / "tasks.jsonl").write_text(
        '{"id": "t", "domain": "qa", "user_prompt": "?", "expected": 4, "scorer": "exact"}\n'
    )
    return path


def beside(grid: Path) -> tuple[str, Path]:
    """Return the options that a config needs beside it."""
    return "--tasks", grid.with_name("tasks.jsonl")


def created(count: int) -> dict[str, Any]:
    runs = [{"run_id": str(uuid.UUID(int=i)), "status": "PENDING"} for i in range(count)]
    return {"runs": [run | {"queue_id": run["run_id"], "created": True} for run in runs]}


def test_add_enqueues_a_run_per_model_and_shows_them(
    admin: Admin, shell: Shell, grid: Path
) -> None:
    admin.answer("POST", QUEUE, 201, created(2))
    outcome = shell("queue", "add", grid, *beside(grid), "--priority", 7)
    assert (outcome.code, outcome.err) == (0, [])
    heading, first, second = outcome.out.splitlines()
    assert heading.split() == ["run_id", "model", "quantization", "status", "created"]
    assert first.split()[:4] == [str(uuid.UUID(int=0)), "small", "q8_0", "PENDING"]
    assert second.split()[1:3] == ["large", "q4_k_m"]
    [seen] = admin.seen
    assert [run["model"]["parameter_count_b"] for run in seen.body["runs"]] == [1.2, 70.0]
    assert {run["priority"] for run in seen.body["runs"]} == {7}
    assert seen.headers["Content-Type"] == "application/json"


def test_add_tells_each_warning_once_and_of_how_many_runs(
    admin: Admin, shell: Shell, grid: Path
) -> None:
    answer = created(2)
    answer["runs"][0]["warnings"] = ["the same config was enqueued", "no judge"]
    answer["runs"][1]["warnings"] = ["the same config was enqueued"]
    admin.answer("POST", QUEUE, 201, answer)
    outcome = shell("queue", "add", grid, *beside(grid))
    assert outcome.code == 0
    assert outcome.err == [
        "warning, of 2 runs: the same config was enqueued",
        "warning: no judge",
    ]


def test_add_as_json_prints_what_was_answered(admin: Admin, shell: Shell, grid: Path) -> None:
    admin.answer("POST", QUEUE, 201, created(2))
    assert shell("queue", "add", grid, *beside(grid), "--json").json == created(2)


def test_a_dry_run_sends_nothing_and_needs_no_token(
    admin: Admin, shell: Shell, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BAKEOFF_QUEUE_TOKEN")
    outcome = shell("queue", "add", grid, *beside(grid), "--dry-run")
    assert outcome.code == 0
    assert outcome.out.splitlines()[1].split() == ["small", "q8_0", "1", "0", "1", "-"]
    assert admin.seen == []


def test_a_dry_runs_json_is_what_add_takes(
    admin: Admin, shell: Shell, grid: Path, tmp_path: Path
) -> None:
    body = shell("queue", "add", grid, *beside(grid), "--dry-run", "--json").json
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(body))
    admin.answer("POST", QUEUE, 201, created(2))
    assert shell("queue", "add", path).code == 0
    checked, sent = admin.seen
    assert (checked.query, checked.body) == ({"dry_run": "1"}, body)
    assert (sent.query, sent.body) == ({}, body)


def test_a_model_that_cannot_be_described_enqueues_nothing(
    admin: Admin, shell: Shell, grid: Path
) -> None:
    grid.write_text(grid.read_text().replace("num_params: 1.2", "ctx: 1"))
    outcome = shell("queue", "add", grid, *beside(grid))
    assert (outcome.code, len(outcome.err)) == (1, 2)
    assert "1 of 2 models cannot be enqueued, so nothing was" in outcome.err[0]
    assert "small.json into the --models folder" in outcome.err[1]
    assert [seen for seen in admin.seen if seen.method == "POST"] == []


def test_add_takes_descriptors_from_a_folder(
    admin: Admin, shell: Shell, grid: Path, tmp_path: Path
) -> None:
    descriptor = {"name": "Small", "parameter_count_b": 3, "architecture": "SSM"}
    descriptor |= {"quantization": "q8_0", "file_format": "SafeTensors"}
    (tmp_path / "small.json").write_text(json.dumps(descriptor))
    given = (grid, *beside(grid), "--models", tmp_path)
    body = shell("queue", "add", *given, "--dry-run", "--json").json
    assert body["runs"][0]["model"] == descriptor


def test_add_takes_floor_tasks_and_how_to_judge(
    admin: Admin, shell: Shell, grid: Path, tmp_path: Path
) -> None:
    judged = "judge: {enabled: true, gguf: large-Q4_K_M.gguf}\n"
    grid.write_text(grid.read_text().replace("dumb_model_tier: {enabled: false}\n", judged))
    floor = tmp_path / "floor.jsonl"
    floor.write_text('{"id": "f", "tier": "dumb_model", "user_prompt": "?", "scorer": "exact"}\n')
    given = ("queue", "add", grid, *beside(grid), "--floor-tasks", floor, "--dry-run", "--json")
    refused = shell(*given)
    assert (refused.code, "give --judge-mode scored (or off)" in refused.err[0]) == (1, True)
    runs = shell(*given, "--judge-mode", "scored").json["runs"]
    assert [[task["id"] for task in run["floor_tasks"]] for run in runs] == [["f"], ["f"]]
    assert [run["judge"]["name"] for run in runs] == ["large", "large"]
    assert {run["config"]["judge"]["mode"] for run in runs} == {"scored"}
    runs = shell(*given, "--judge-mode", "off").json["runs"]
    assert [run.get("judge") for run in runs] == [None, None]


def test_a_config_without_its_tasks_is_one_line_that_says_where_they_come_from(
    admin: Admin, shell: Shell, grid: Path
) -> None:
    outcome = shell("queue", "add", grid)
    assert outcome.code == 1
    [line] = outcome.err
    assert "give --tasks FILE, which `python -m bench.runner --dry-run`" in line
    assert [seen for seen in admin.seen if seen.method == "POST"] == []


@pytest.mark.parametrize("option", ["--tasks", "--floor-tasks", "--models"])
def test_add_names_an_option_whose_file_is_not_there(
    admin: Admin, shell: Shell, grid: Path, option: str
) -> None:
    outcome = shell("queue", "add", grid, option, grid.with_name("nowhere"))
    assert outcome.code == 2
    assert option in outcome.err[0]
    assert admin.seen == []


def test_more_than_a_batch_goes_in_batches_with_keys_of_their_own(
    admin: Admin, shell: Shell, tmp_path: Path
) -> None:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([{"priority": i} for i in range(BATCH + 3)]))
    admin.answer("POST", QUEUE, 201, created(BATCH))
    admin.answer("POST", QUEUE, 201, created(3))
    outcome = shell("queue", "add", path, "--json")
    assert outcome.err == ["enqueued 1000 of 1003", "enqueued 1003 of 1003"]
    assert len(outcome.json["runs"]) == BATCH + 3
    assert [len(seen.body["runs"]) for seen in admin.seen] == [BATCH, 3]
    assert len({seen.headers["Idempotency-Key"] for seen in admin.seen}) == 2


def test_runs_go_in_pieces_that_a_request_may_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "BATCH_BYTES", 1000)
    monkeypatch.setattr(enqueue_request, "MAX_CELLS_TOGETHER", 10)
    large = {"note": "x" * 700}
    assert [len(piece) for piece in queue._batches([large] * 3)] == [1, 1, 1]
    small = {"tasks": ["t"] * 4, "prompts": ["p"]}
    # The same tasks count once, others by their number.
    assert [len(piece) for piece in queue._batches([small] * 9)] == [9]
    others = [{**small, "floor_tasks": [str(i)]} for i in range(5)]
    assert [len(piece) for piece in queue._batches(others)] == [2, 2, 1]
    assert list(queue._batches(others)) == list(queue._batches(others))


def test_a_quantization_that_the_server_knows_beside_ours_is_taken(
    admin: Admin, shell: Shell, grid: Path
) -> None:
    grid.write_text(grid.read_text().replace("small-Q8_0", "small-MXFP4"))
    admin.answer("GET", "/.well-known/bakeoff-queue.json", 200, {"quantizations": ["q8_0"]})
    table = {"quantizations": [*KNOWN, "mxfp4"]}
    admin.answer("GET", "/.well-known/bakeoff-queue.json", 200, table)
    refused = shell("queue", "add", grid, *beside(grid))
    assert "mxfp4, of which bakeoff's table has no VRAM need" in refused.err[1]
    admin.answer("POST", QUEUE, 201, created(2))
    outcome = shell("queue", "add", grid, *beside(grid))
    assert outcome.code == 0, outcome.err
    assert admin.seen[-1].body["runs"][0]["model"]["quantization"] == "mxfp4"


def test_a_lost_answer_is_fetched_with_the_same_key(admin: Admin, shell: Shell, grid: Path) -> None:
    admin.lose("POST", QUEUE)
    admin.answer("POST", QUEUE, 201, created(2))
    assert shell("queue", "add", grid, *beside(grid)).code == 0
    first, second = admin.seen
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert first.body == second.body


def test_the_same_file_may_be_enqueued_again(admin: Admin, shell: Shell, grid: Path) -> None:
    admin.answer("POST", QUEUE, 201, created(2))
    shell("queue", "add", grid, *beside(grid))
    shell("queue", "add", grid, *beside(grid))
    first, second = admin.seen
    assert first.headers["Idempotency-Key"] != second.headers["Idempotency-Key"]
    assert first.body["runs"][0]["batch_id"] != second.body["runs"][0]["batch_id"]


def test_a_command_that_broke_off_says_how_to_go_on_and_can(
    admin: Admin, shell: Shell, tmp_path: Path
) -> None:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([{"priority": i} for i in range(BATCH + 1)]))
    admin.answer("POST", QUEUE, 201, created(BATCH))
    admin.answer("POST", QUEUE, 409, problem("conflict", "Not now."))
    outcome = shell("queue", "add", path)
    assert outcome.code == 4
    assert "1000 of 1001 runs are known to be enqueued" in outcome.err[-1]
    option = outcome.err[-1].split("with ")[1].split(",")[0].split()
    shell("queue", "add", path, *option)
    assert admin.seen[0].headers["Idempotency-Key"] == admin.seen[2].headers["Idempotency-Key"]


def test_a_refused_batch_has_nothing_to_go_on_with(admin: Admin, shell: Shell, grid: Path) -> None:
    detail = ("/runs/0/model/quantization", "unknown")
    admin.answer("POST", QUEUE, 422, problem("unknown_quantization", "Known: q4_0.", detail))
    outcome = shell("queue", "add", grid, *beside(grid))
    assert outcome.code == 1
    assert "--idempotency-key" not in outcome.err[0]
    assert outcome.err[1] == "  /runs/0/model/quantization: unknown"


def test_ls_shows_a_line_per_run_as_it_is_spelled(admin: Admin, shell: Shell) -> None:
    admin.answer("GET", QUEUE, 200, {"runs": [RUN], "next_cursor": None})
    outcome = shell("queue", "ls", "--status", "claimed")
    assert admin.seen[0].query == {"status": "CLAIMED", "order": "newest", "limit": "50"}
    assert "Llama-3.1-8B-Instruct [red]  q4_k_m" in outcome.out
    assert "1 of 5" in outcome.out
    assert len(outcome.out.splitlines()) == 2


def test_ls_as_json_is_one_document_over_all_pages(admin: Admin, shell: Shell) -> None:
    admin.answer("GET", QUEUE, 200, {"runs": [RUN], "next_cursor": "more"})
    admin.answer("GET", QUEUE, 200, {"runs": [RUN], "next_cursor": None})
    assert shell("queue", "ls", "--limit", 101, "--json").json == {
        "runs": [RUN, RUN],
        "next_cursor": None,
    }


def test_ls_says_that_there_is_more(admin: Admin, shell: Shell) -> None:
    admin.answer("GET", QUEUE, 200, {"runs": [RUN], "next_cursor": "more"})
    assert shell("queue", "ls", "--limit", 1).err == ["the first 1 runs; --limit shows more"]


def test_show_lists_the_members_and_the_attempts(admin: Admin, shell: Shell) -> None:
    admin.answer("GET", f"{QUEUE}/{RUN_ID}", 200, RUN | {"attempts": [ATTEMPT]})
    out = shell("queue", "show", RUN_ID).out
    assert ["claimed_by", "gpu-1"] in [line.split() for line in out.splitlines()]
    assert "silent for 300 s" in out
    assert shell("queue", "show", RUN_ID, "--json").json == RUN | {"attempts": [ATTEMPT]}


def test_a_long_value_pads_no_other_line(admin: Admin, shell: Shell) -> None:
    receipt = {"signature": "s" * 2000}
    long = {"job": receipt, "receipt": receipt, "error_detail": "e" * 300}
    run = RUN | long | {"attempts": [ATTEMPT]}
    admin.answer("GET", f"{QUEUE}/{RUN_ID}", 200, run)
    lines = shell("queue", "show", RUN_ID).out.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert sum(len(line) > 200 for line in lines) == 1
    for name in ("job", "receipt"):
        assert [name, "(--json", "shows", "it)"] in [line.split() for line in lines]
    assert shell("queue", "show", RUN_ID, "--json").json["receipt"] == receipt


def test_show_of_a_run_that_is_not_there_is_exit_3(admin: Admin, shell: Shell) -> None:
    admin.answer("GET", f"{QUEUE}/{RUN_ID}", 404, problem("not_found", "No such run."))
    assert shell("queue", "show", RUN_ID).code == 3


def test_cancel_without_yes_changes_nothing_and_says_what_it_would(
    admin: Admin, shell: Shell
) -> None:
    admin.answer("GET", f"{QUEUE}/{RUN_ID}", 200, RUN)
    outcome = shell("queue", "cancel", RUN_ID, "--reason", "wrong prompt")
    assert outcome.code == 6
    [line] = outcome.err
    assert line.startswith("nothing was changed: ")
    assert f"would cancel 1 run, {RUN_ID}" in line
    assert "claimed by gpu-1" in line
    assert [seen.method for seen in admin.seen] == ["GET"]


def test_cancel_with_yes_sends_the_reason(admin: Admin, shell: Shell) -> None:
    admin.answer("POST", f"{QUEUE}/{RUN_ID}/cancel", 200, RUN | {"status": "CANCELLED"})
    outcome = shell("queue", "cancel", RUN_ID, "--reason", "wrong prompt", "--yes", "--json")
    assert outcome.json["status"] == "CANCELLED"
    assert [seen.body for seen in admin.seen] == [{"reason": "wrong prompt"}]


def test_keys_add_sends_only_what_was_given(admin: Admin, shell: Shell) -> None:
    admin.answer("POST", KEYS, 201, KEY)
    outcome = shell("keys", "add", PUBLIC_KEY, "--runner-id", "gpu-1")
    assert (outcome.code, outcome.err) == (0, [])
    assert admin.seen[0].body == {"public_key": PUBLIC_KEY, "runner_id": "gpu-1"}
    assert FINGERPRINT in outcome.out


def test_keys_add_sends_every_option(admin: Admin, shell: Shell) -> None:
    admin.answer("POST", KEYS, 201, KEY)
    options = ["--runner-id", "gpu-1", "--description", "shelf", "--max-leases", 2]
    options += ["--vram-cap-gb", 24, "--signer-identity", "a@b.c", "--signer-issuer", "https://i"]
    shell("keys", "add", PUBLIC_KEY, *options, "--not-after", "2027-12-31T01:00:00+01:00")
    assert admin.seen[0].body == {
        "public_key": PUBLIC_KEY,
        "runner_id": "gpu-1",
        "description": "shelf",
        "max_leases": 2,
        "capability_caps": {"vram_gb": 24},
        "signer": {"identity": "a@b.c", "issuer": "https://i"},
        "not_after": "2027-12-31T00:00:00Z",
    }
    assert load_schema("runner_key").violations(admin.seen[0].body) == ()


def test_keys_add_names_another_signature_policy(admin: Admin, shell: Shell) -> None:
    admin.answer("POST", KEYS, 201, KEY)
    shell("keys", "add", PUBLIC_KEY, "--runner-id", "gpu-1", "--signature-policy", "runner-key")
    assert admin.seen[0].body["signature_policy"] == "runner-key"
    assert load_schema("runner_key").violations(admin.seen[0].body) == ()


def test_keys_add_says_when_the_key_was_there_already(admin: Admin, shell: Shell) -> None:
    admin.answer("POST", KEYS, 200, KEY)
    outcome = shell("keys", "add", PUBLIC_KEY, "--runner-id", "gpu-1", "--json")
    assert outcome.json == KEY
    assert "already" in outcome.err[0]


def test_another_runners_key_is_exit_4(admin: Admin, shell: Shell) -> None:
    admin.answer("POST", KEYS, 409, problem("conflict", "The key belongs to gpu-2."))
    assert shell("keys", "add", PUBLIC_KEY, "--runner-id", "gpu-1").code == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["key.pub"], "PUBLIC_KEY"),
        ([base64.b64encode(bytes(64)).decode()], "64 bytes where 32 belong"),
        ([PUBLIC_KEY, "--signer-identity", "a@b.c"], "--signer-issuer"),
        ([PUBLIC_KEY, "--signer-issuer", "https://i"], "--signer-identity"),
        ([PUBLIC_KEY, "--not-after", "tomorrow"], "--not-after tomorrow"),
        ([PUBLIC_KEY, "--not-after", "2027-12-31"], "--not-after 2027-12-31"),
        ([PUBLIC_KEY, "--max-leases", "0"], "--max-leases"),
    ],
)
def test_keys_add_checks_before_it_sends(
    admin: Admin, shell: Shell, arguments: list[str], named: str
) -> None:
    outcome = shell("keys", "add", *arguments, "--runner-id", "gpu-1")
    assert outcome.code == 2
    [line] = outcome.err
    assert named in line
    assert admin.seen == []


def test_keys_ls_shows_state_and_fingerprint(admin: Admin, shell: Shell) -> None:
    keys = [KEY, KEY | {"revoked_at": "2026-01-01T00:00:00Z"}, KEY | {"not_after": "2027-01-01"}]
    admin.answer("GET", KEYS, 200, {"keys": keys})
    lines = shell("keys", "ls").out.splitlines()
    assert "admitted" in lines[1]
    assert "revoked 2026" in lines[2]
    assert "until 2027" in lines[3]
    assert lines[1].startswith(FINGERPRINT[:16] + " ")
    assert shell("keys", "ls", "--json").json == {"keys": keys}


def test_keys_rm_without_yes_shows_the_runs_it_would_free(admin: Admin, shell: Shell) -> None:
    admin.answer("GET", KEYS, 200, {"keys": [KEY]})
    admin.answer("GET", QUEUE, 200, {"runs": [RUN, RUN | {"claimed_by": "gpu-2"}]})
    admin.answer("GET", QUEUE, 200, {"runs": []})
    outcome = shell("keys", "rm", FINGERPRINT, "--reason", "stolen")
    assert outcome.code == 6
    assert "free 1 run(s); add --yes" in outcome.err[0]
    assert RUN_ID in outcome.err[1]
    assert [seen.query.get("status") for seen in admin.seen] == [None, "CLAIMED", "IN_PROGRESS"]
    assert {seen.method for seen in admin.seen} == {"GET"}


def test_keys_rm_with_yes_revokes_by_the_digits_that_ls_shows(admin: Admin, shell: Shell) -> None:
    answer = {"fingerprint": FINGERPRINT, "freed_runs": [RUN_ID], "results_to_review": []}
    admin.answer("GET", KEYS, 200, {"keys": [KEY, KEY | {"fingerprint": "cd" * 32}]})
    admin.answer("DELETE", f"{KEYS}/{FINGERPRINT}", 200, answer)
    outcome = shell("keys", "rm", FINGERPRINT[:16], "--reason", "stolen", "--yes", "--json")
    assert outcome.json == answer
    assert admin.seen[-1].body == {"reason": "stolen"}


@pytest.mark.parametrize(
    ("fingerprint", "code"),
    [("cd" * 32, 3), ("ab" * 4, 2), ("abab", 2), ("../queue", 2), ("zz" * 32, 2)],
)
def test_keys_rm_revokes_nothing_unless_exactly_one_key_is_meant(
    admin: Admin, shell: Shell, fingerprint: str, code: int
) -> None:
    other = KEY | {"fingerprint": "abababab" + "0" * 56}
    admin.answer("GET", KEYS, 200, {"keys": [KEY, other]})
    outcome = shell("keys", "rm", fingerprint, "--reason", "stolen", "--yes")
    assert outcome.code == code
    assert "DELETE" not in {seen.method for seen in admin.seen}
