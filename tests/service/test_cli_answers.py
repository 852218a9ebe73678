"""Whatever a server answers, a command ends with one line, never with a traceback."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cli.main import app
from tests.support.cli_admin import TOKEN, Admin, Shell, playing

PUBLIC_KEY = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
# The members of our answers, so that commands get past the outermost ones.
NAMES = [
    "action", "actor", "attempts", "audit", "capabilities", "chained", "claimed_by", "code",
    "current_runs", "cursor", "detail", "entries", "errors", "failures", "files", "fingerprint",
    "freed_runs", "hardware", "hash", "history", "items", "job", "judge", "keys", "kid",
    "leases", "model", "model_metrics", "models", "name", "names", "need_gb", "next_cursor",
    "outcome", "public_key", "public_url", "queue_id", "receipt", "released", "result",
    "results", "results_to_review", "row", "rows", "run", "run_id", "runner", "runner_id",
    "runners", "runs", "scopes", "seq", "server_time", "sha256", "sig", "signer",
    "signer_issuer", "state", "status", "target", "token", "token_id", "tokens", "trust",
    "unchained", "warnings",
]  # fmt: skip


def _all(value: Any) -> str:
    return json.dumps(dict.fromkeys(NAMES, value))


MALFORMED: dict[str, str | bytes] = {
    "null": "null",
    "a list": "[]",
    "an empty object": "{}",
    "numbers": _all(5),
    "texts": _all("x"),
    "nulls": _all(None),
    "lists of numbers": _all([5]),
    "lists of empty objects": _all([{}]),
    "empty objects": _all({}),
    "objects of numbers": _all(dict.fromkeys(NAMES, 5)),
    "lists of objects of numbers": _all([dict.fromkeys(NAMES, 5)]),
    "lists of objects of texts": _all([dict.fromkeys(NAMES, "x")]),
    "lists of objects of lists": _all([{name: [5] for name in NAMES}]),
    "lone surrogates": _all([dict.fromkeys(NAMES, "\ud800")]),
    "huge integers": '{"runs": [' + "9" * 5000 + "]}",
    "NaN": '{"runs": NaN}',
    "a member twice": '{"runs": [], "runs": []}',
    "100,000 brackets": "[" * 100_000,
    "no UTF-8": b'{"runs": "\xff"}',
    "half of it": '{"runs": [',
    "nothing": "",
}


def reading(command: Any, *where: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command that takes the address of a server, by its words."""
    for name, child in getattr(command, "commands", {}).items():
        yield from reading(child, *where, name)
    if any(param.name == "url" for param in command.params):
        yield where, command


COMMANDS = dict(reading(get_command(app)))


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    with playing() as admin:
        monkeypatch.setenv("BAKEOFF_QUEUE_URL", admin.url)
        monkeypatch.setenv("BAKEOFF_QUEUE_TOKEN", TOKEN)
        yield admin


def arguments(command: Any, folder: Path) -> list[str]:
    """What a command needs to be run: required options, arguments by their names, --yes."""
    runs, receipt = folder / "runs.json", folder / "receipt.json"
    runs.write_text(json.dumps({"runs": [{"model": {}}]}))
    receipt.write_text(json.dumps({"sig": {}}))
    known = {"public_key": [PUBLIC_KEY], "fingerprint": ["0" * 64], "targets": [str(uuid.uuid4()),
             str(folder / "to")], "runner_id": ["gpu-1"], "action": ["cancel"]}  # fmt: skip
    words = []
    for param in command.params:
        if param.param_type_name == "argument":
            file = {"file": str(receipt if "receipts" in str(command.callback) else runs)}
            words += known.get(param.name, [file.get(param.name, str(uuid.uuid4()))])
        elif param.required:
            words += [param.opts[0], *known.get(param.name, ["x"])]
        elif param.name == "yes":
            words.append("--yes")
    return words


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) > 25
    assert {("results", "verify"), ("queue", "add"), ("receipts", "verify")} <= COMMANDS.keys()


@pytest.mark.parametrize("where", COMMANDS, ids=" ".join)
def test_a_malformed_answer_is_one_line(
    where: tuple[str, ...], admin: Admin, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shell, command = Shell(capsys), COMMANDS[where]
    words = arguments(command, tmp_path)
    if where == ("queue", "bulk"):
        words += ["--status", "PENDING"]
    forms = [["--json"], []] if any(param.name == "as_json" for param in command.params) else [[]]
    for number, (name, body) in enumerate(MALFORMED.items()):
        admin.other = body
        outcome = shell(*where, *words, *forms[number % len(forms)])
        assert outcome.code in (0, 1, 2, 3, 4, 5, 7), (name, outcome)
        errors = [line for line in outcome.err if line.startswith("error: ")]
        assert len(errors) == (outcome.code != 0), (name, outcome)
    assert admin.seen


def test_an_error_before_any_answer_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.keys.connect", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        Shell(capsys)("keys", "ls")
