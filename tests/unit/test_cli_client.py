"""How the admin API's answers end a command: its exit code, and one line that names the fix."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from client.admin_api import AdminClient, connect
from client.output import CommandFailed, ExitCode, print_failure
from tests.support.cli_admin import TOKEN, Admin, Shell, playing, problem

BODY = {"runs": []}
KEYS = "/api/admin/runner-keys"
PROGRAM = Path(sys.executable).with_name("bakeoff-queue")


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
def client(admin: Admin) -> Iterator[AdminClient]:
    with httpx.Client(base_url=admin.url) as http:
        yield AdminClient(http, retry_pauses_s=(0, 0))


@pytest.fixture
def dead_url() -> Iterator[str]:
    """An address that nobody listens on: the port is bound, so that nobody else takes it."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (400, "invalid_json", ExitCode.FAILURE),
        (401, "token_expired", ExitCode.FAILURE),
        (403, "scope_required", ExitCode.FAILURE),
        (404, "not_found", ExitCode.NOT_FOUND),
        (409, "conflict", ExitCode.CONFLICT),
        (422, "invalid_request", ExitCode.FAILURE),
        (429, "rate_limited", ExitCode.FAILURE),
        (500, "internal", ExitCode.FAILURE),
        (503, "unavailable", ExitCode.UNREACHABLE),
    ],
)
def test_each_refusal_is_one_line_and_its_exit_code(
    admin: Admin, shell: Shell, status: int, code: str, exit_code: int
) -> None:
    admin.answer("GET", KEYS, status, problem(code, "What happened."))
    outcome = shell("keys", "ls")
    assert (outcome.code, outcome.out) == (exit_code, "")
    [line] = outcome.err
    assert line.startswith("error: What happened. [")
    assert code in line
    assert "request req-1" in line


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_told_how_to_get_another(
    admin: Admin, shell: Shell, status: int
) -> None:
    admin.answer("GET", KEYS, status, problem("invalid_token", "No."))
    assert "bakeoff-queue tokens mint" in shell("keys", "ls").err[0]


def test_a_busy_service_says_when_to_come_back(admin: Admin, shell: Shell) -> None:
    admin.answer("GET", KEYS, 503, problem("busy", "Busy."), Retry_After="7")
    assert shell("keys", "ls").err[0].endswith("try again in 7 s")


@pytest.mark.parametrize(
    ("status", "exit_code"), [(404, 1), (409, 1), (301, 1), (200, 1), (502, 5)]
)
@pytest.mark.parametrize("body", ["<h1>nginx</h1>", "[1]", ""])
def test_an_answer_that_is_not_ours_says_nothing_about_the_thing(
    admin: Admin, shell: Shell, status: int, exit_code: int, body: str
) -> None:
    admin.answer("GET", KEYS, status, body)
    outcome = shell("keys", "ls")
    assert outcome.code == exit_code
    [line] = outcome.err
    assert "not by bakeoff-queue: is --url" in line


def test_another_services_json_404_is_not_taken_for_ours(admin: Admin, shell: Shell) -> None:
    admin.answer("GET", KEYS, 404, {"code": "nope"}, Content_Type="application/json")
    assert shell("keys", "ls").code == ExitCode.FAILURE


def test_the_pointers_of_a_problem_follow_its_line(admin: Admin, shell: Shell) -> None:
    body = problem("invalid_request", "2 errors.", ("/runs/3/model", "no such"), ("", "too big"))
    admin.answer("GET", KEYS, 422, body)
    assert shell("keys", "ls").err[1:] == ["  /runs/3/model: no such", "  (whole body): too big"]


def test_more_than_twenty_details_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    print_failure(CommandFailed("x", details=[str(number) for number in range(23)]))
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines), lines[-1]) == (22, "  and 3 more")


def test_an_answer_cannot_steer_the_terminal(admin: Admin, shell: Shell) -> None:
    admin.answer("GET", KEYS, 404, problem("not_found", "gone\x1b[2J\r\nfake line"))
    [line] = shell("keys", "ls").err
    assert "\x1b" not in line
    assert "fake line" in line


@pytest.mark.parametrize("noun", [["keys", "ls"], ["queue", "ls"]])
def test_nobody_listening_is_exit_5(
    admin: Admin, shell: Shell, dead_url: str, noun: list[str]
) -> None:
    outcome = shell(*noun, "--url", dead_url)
    assert outcome.code == ExitCode.UNREACHABLE
    [line] = outcome.err
    assert dead_url in line
    assert "BAKEOFF_QUEUE_URL" in line


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8400",
        "ftp://host",
        "http://",
        "http://h:port",
        "http://127.0.0.1:99999",
        "http://a..b",
        "http://user:password@host",
        "http://host?x=1",
        "http://host#x",
    ],
)
def test_an_unusable_address_is_a_usage_error(admin: Admin, shell: Shell, url: str) -> None:
    outcome = shell("keys", "ls", "--url", url)
    assert outcome.code == ExitCode.USAGE
    assert "--url" in outcome.err[0]


@pytest.mark.parametrize("token", ["", "  \n", "tökén", "two\nlines"])
def test_an_unusable_token_is_a_usage_error(admin: Admin, shell: Shell, token: str) -> None:
    outcome = shell("keys", "ls", "--token", token)
    assert outcome.code == ExitCode.USAGE
    [line] = outcome.err
    assert "token" in line
    assert admin.seen == []


def test_a_missing_token_says_how_to_get_one(
    admin: Admin, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BAKEOFF_QUEUE_TOKEN")
    [line] = shell("keys", "ls").err
    assert "bakeoff-queue tokens mint" in line


def test_the_token_is_sent_as_bearer_without_the_newline_of_its_file(
    admin: Admin, shell: Shell
) -> None:
    admin.answer("GET", KEYS, 200, {"keys": []})
    shell("keys", "ls", "--token", "secret\n")
    assert admin.seen[0].headers["Authorization"] == "Bearer secret"


def test_a_lost_answer_is_asked_for_again_with_the_same_key(
    admin: Admin, client: AdminClient
) -> None:
    admin.lose("POST", "/x")
    admin.lose("POST", "/x")
    admin.answer("POST", "/x", 201, {"done": True})
    assert client.post_once("/x", BODY, "the-key").body == {"done": True}
    assert [seen.headers["Idempotency-Key"] for seen in admin.seen] == ["the-key"] * 3


def test_a_third_lost_answer_is_given_up(admin: Admin, client: AdminClient) -> None:
    admin.lose("POST", "/x")
    with pytest.raises(CommandFailed) as failure:
        client.post_once("/x", BODY, "the-key")
    assert failure.value.code == ExitCode.UNREACHABLE
    assert len(admin.seen) == 3


def test_a_change_without_a_key_is_never_sent_twice(admin: Admin, client: AdminClient) -> None:
    admin.lose("POST", "/x")
    with pytest.raises(CommandFailed):
        client.post("/x", BODY)
    assert len(admin.seen) == 1


def test_a_refusal_is_not_retried(admin: Admin, client: AdminClient) -> None:
    admin.answer("POST", "/x", 422, problem("invalid_request", "No."))
    with pytest.raises(CommandFailed):
        client.post_once("/x", BODY, "the-key")
    assert len(admin.seen) == 1


def test_text_that_utf_8_cannot_say_reaches_the_service(admin: Admin, client: AdminClient) -> None:
    admin.answer("POST", "/x", 201, {})
    client.post("/x", {"prompt": "\ud800 ä"})
    assert admin.seen[0].body == {"prompt": "\ud800 ä"}


def test_pages_follow_the_cursor_up_to_the_limit(admin: Admin, client: AdminClient) -> None:
    admin.answer("GET", "/x", 200, {"runs": [1], "next_cursor": "c1"})
    admin.answer("GET", "/x", 200, {"runs": [2], "next_cursor": "c2"})
    assert [page["runs"] for page in client.pages("/x", 150, status=None)] == [[1], [2]]
    assert [seen.query for seen in admin.seen] == [
        {"limit": "100"},
        {"limit": "50", "cursor": "c1"},
    ]


def test_pages_end_where_the_listing_ends(admin: Admin, client: AdminClient) -> None:
    admin.answer("GET", "/x", 200, {"runs": [], "next_cursor": None})
    assert len(list(client.pages("/x", 1000))) == 1


def test_connecting_sends_nothing(dead_url: str) -> None:
    with connect(dead_url, "token"):
        pass


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["queue", "nonsense"], "nonsense"),
        (["queue", "ls", "--nonsense"], "--nonsense"),
        (["queue", "ls", "--limit", "many"], "--limit"),
        (["queue", "ls", "--status", "DONE"], "--status"),
        (["queue", "show", "17"], "RUN_ID"),
        (["queue", "add", "/no/such/file"], "/no/such/file"),
        (["keys", "rm", "0" * 64], "--reason"),
    ],
)
def test_a_mistyped_command_is_one_line(shell: Shell, arguments: list[str], named: str) -> None:
    outcome = shell(*arguments)
    assert outcome.code == ExitCode.USAGE
    [line] = outcome.err
    assert named in line
    assert "--help`" in line


@pytest.mark.parametrize("arguments", [[], ["queue"], ["keys"]])
def test_no_command_prints_the_help(shell: Shell, arguments: list[str]) -> None:
    outcome = shell(*arguments)
    assert (outcome.code, outcome.err) == (ExitCode.USAGE, [])
    assert "Usage: bakeoff-queue" in outcome.out


def test_the_installed_program_exits_with_the_code_and_one_line(dead_url: str) -> None:
    done = subprocess.run(
        [PROGRAM, "queue", "ls", "--url", dead_url, "--token", "x"],
        env={"PATH": os.environ["PATH"], "COLUMNS": "40"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, "")
    assert len(done.stderr.splitlines()) == 1


def test_starting_the_program_imports_nothing_heavy() -> None:
    """Each noun is imported at every start; what is heavy belongs into its functions."""
    check = "import sys, cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    heavy = {"sandbox", "server", "handlers", "sigstore", "tornado", "asyncpg", "redis"}
    assert heavy & set(done.stdout.split()) == set()
