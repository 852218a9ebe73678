"""`bakeoff-queue runners`: the machines that have registered, and what to do with one."""

import sys
from itertools import chain
from typing import Annotated, Any

import typer

from client.admin_api import DEFAULT_URL, Token, Url, connect
from client.output import AsJson, Yes, moment, needs_yes, print_json, print_members, print_table

RUNNERS = "/api/admin/runners"
RunnerId = Annotated[str, typer.Argument(help="The runner's name on the allowlist.")]

app = typer.Typer(help="Runners: who is there, pause, resume, drain.", no_args_is_help=True)


@app.command(name="ls")
def list_runners(url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False) -> None:
    """List the runners that have registered."""
    with connect(url, token) as admin:
        pages = list(admin.pages(RUNNERS, sys.maxsize))
    runners = list(chain.from_iterable(page["runners"] for page in pages))
    if as_json:
        return print_json({"runners": runners})
    columns = ("runner_id", "state", "last_heartbeat", "vram_gb", "quantizations", "current_runs")
    return print_table(columns, (_row(runner) for runner in runners))


@app.command()
def show(
    runner_id: RunnerId, url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False
) -> None:
    """Show one runner."""
    with connect(url, token) as admin:
        runner = admin.get(f"{RUNNERS}/{runner_id}")
    print_json(runner) if as_json else print_members(runner)


@app.command()
def pause(
    runner_id: RunnerId,
    reason: Annotated[str, typer.Option(help="Why; the runner is told, and the audit.")],
    until: Annotated[
        str | None, typer.Option(help="When the pause ends by itself.", metavar="RFC3339")
    ] = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Give a runner nothing new until it is resumed; what it holds it may finish."""
    body = {"reason": reason} | ({"until": moment("--until", until)} if until else {})
    _manage(runner_id, "pause", body, yes, url, token, as_json)


@app.command()
def resume(
    runner_id: RunnerId, url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False
) -> None:
    """Undo a pause or a drain."""
    _manage(runner_id, "resume", {}, True, url, token, as_json)


@app.command()
def drain(
    runner_id: RunnerId,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Tell a runner to finish what it holds and to stop."""
    _manage(runner_id, "drain", {}, yes, url, token, as_json)


@app.command(name="tokens")
def list_tokens(
    runner_id: RunnerId, url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False
) -> None:
    """List a runner's tokens that have not expired, newest first."""
    with connect(url, token) as admin:
        tokens = admin.get(f"{RUNNERS}/{runner_id}/tokens")["tokens"]
    if as_json:
        return print_json({"runner_id": runner_id, "tokens": tokens})
    columns = ("jti", "issued_at", "expires_at", "address", "revoked")
    return print_table(columns, ([row[name] for name in columns] for row in tokens))


@app.command()
def revoke_token(
    runner_id: RunnerId,
    jti: Annotated[str, typer.Argument(help="Which token; see `runners tokens`.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Revoke one token of a runner at once; its key stays good (`keys rm` revokes that)."""
    if not yes:
        raise needs_yes(f"revoke 1 token of {runner_id}, {jti}")
    with connect(url, token) as admin:
        answer = admin.delete(f"{RUNNERS}/{runner_id}/tokens/{jti}", {"reason": reason})
    print_json(answer) if as_json else print_members(answer)


def _manage(
    runner_id: str,
    verb: str,
    body: dict[str, Any],
    yes: bool,
    url: str,
    token: str,
    as_json: bool,
) -> None:
    with connect(url, token) as admin:
        if not yes:
            runner = admin.get(f"{RUNNERS}/{runner_id}")
            work = f"{runner['state']}, {len(runner['current_runs'])} run(s) in work"
            raise needs_yes(f"{verb} 1 runner, {runner_id} ({work})")
        answer = admin.post(f"{RUNNERS}/{runner_id}/{verb}", body).body
    print_json(answer) if as_json else print_members(answer)


def _row(runner: dict[str, Any]) -> tuple[Any, ...]:
    capabilities = runner["capabilities"]
    return (
        runner["runner_id"],
        runner["state"],
        runner["last_heartbeat"],
        capabilities["vram_gb"],
        ", ".join(capabilities["quantizations"]),
        ", ".join(runner["current_runs"]),
    )
