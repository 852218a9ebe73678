"""`bakeoff-queue results`: accepted results; list, look at, moderate (verify and export beside)."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import Annotated, Any

import typer

from cli import results_export, results_verify
from cli.keys import find_key
from cli.results_api import RESULTS, listed
from client.admin_api import DEFAULT_URL, AdminClient, Token, Url, connect
from client.output import (
    BY_JSON,
    AsJson,
    CommandFailed,
    Yes,
    moment,
    needs_yes,
    note,
    print_json,
    print_members,
    print_table,
    usage_error,
)

COLUMNS = ("run_id", "state", "model", "run_status", "runner_id", "trust", "accepted_at", "signer")
OPEN = ("accepted", "disputed")  # what a decision about all results of a key may touch

RunId = Annotated[uuid.UUID, typer.Argument(metavar="RUN_ID", show_default=False)]
RunIds = Annotated[list[uuid.UUID] | None, typer.Argument(metavar="[RUN_ID]...")]
Key = Annotated[
    str | None, typer.Option("--key", help="Results that this runner key brought.", metavar="HEX")
]
Reason = Annotated[str, typer.Option(help="Why; it goes into the audit, and the runner sees it.")]

app = typer.Typer(help="Accepted results: list, verify, export, moderate.", no_args_is_help=True)
app.command()(results_verify.verify)
app.command()(results_export.export)


class State(StrEnum):
    """The states of a result, as the archive spells them."""

    ACCEPTED = "accepted"
    SUPERSEDED = "superseded"
    DISPUTED = "disputed"
    REVOKED = "revoked"


class Trust(StrEnum):
    """The kinds of a result's signature."""

    SIGSTORE = "sigstore"
    RUNNER_KEY = "runner-key"


@app.command()
def ls(
    state: Annotated[State | None, typer.Option(help="Only results in this state.")] = None,
    key: Key = None,
    runner_id: Annotated[str | None, typer.Option(help="Only this runner's.")] = None,
    trust: Annotated[Trust | None, typer.Option(help="Only those signed so.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Accepted then or later.", metavar="RFC3339")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 50,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """List accepted results, moderated ones too, in the order of acceptance."""
    with connect(url, token) as admin:
        filters = {
            "state": state,
            "runner_id": runner_id,
            "trust": trust,
            "key": find_key(admin, key)["fingerprint"] if key else None,
            "since": moment("--since", since) if since else None,
        }
        pages = list(admin.pages(RESULTS, limit, **filters))
    results = list(chain.from_iterable(page["results"] for page in pages))
    cursor = pages[-1].get("next_cursor")
    if as_json:
        return print_json({"results": results, "next_cursor": cursor})
    if cursor:
        note(f"the first {len(results)} results; --limit shows more")
    return print_table(COLUMNS, (_row(result) for result in results))


@app.command()
def show(run_id: RunId, url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False) -> None:
    """Show a result: its signer, its key, its files, its receipt, the decisions about it."""
    with connect(url, token) as admin:
        result = admin.get(f"{RESULTS}/{run_id}")
    if as_json:
        return print_json(result)
    files, history = result.pop("files"), result.pop("history")
    print_members(result | {"receipt": BY_JSON})
    _print_listed(("name", "bytes", "sha256"), files)
    _print_listed(("at", "by", "former", "state", "reason"), history)
    return None


@app.command()
def dispute(
    reason: Reason,
    run_ids: RunIds = None,
    key: Key = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Take results out of the leaderboard until somebody has looked."""
    _decide("disputed", run_ids, key, reason, yes, url, token, as_json)


@app.command()
def restore(
    reason: Reason,
    run_ids: RunIds = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Let disputed or superseded results count again."""
    _decide("accepted", run_ids, None, reason, yes, url, token, as_json)


@app.command()
def supersede(
    reason: Reason,
    run_ids: RunIds = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Say that newer results have taken the place of these."""
    _decide("superseded", run_ids, None, reason, yes, url, token, as_json)


@app.command()
def revoke(
    reason: Reason,
    run_ids: RunIds = None,
    key: Key = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Declare results wrong; only a dispute can open the case again."""
    _decide("revoked", run_ids, key, reason, yes, url, token, as_json)


def _decide(
    state: str,
    run_ids: Sequence[uuid.UUID] | None,
    key: str | None,
    reason: str,
    yes: bool,
    url: str,
    token: str,
    as_json: bool,
) -> None:
    """Send each decision with the state that was seen: a faster admin's is not overwritten."""
    with connect(url, token) as admin:
        found = _chosen(admin, state, run_ids, key)
        if not yes:
            raise _preview(state, found)
        decided: list[dict[str, Any]] = []
        for result in found:
            body = {"state": state, "reason": reason, "former": result["state"]}
            try:
                answer = admin.post(f"{RESULTS}/{result['run_id']}/state", body).body
            except CommandFailed as failure:
                raise _stopped(failure, result["run_id"], decided, found) from None
            decided.append(answer)
    if as_json:
        print_json({"results": decided})
    else:
        columns = ("run_id", "former", "state", "changed")
        print_table(columns, ([answer.get(name) for name in columns] for answer in decided))


def _chosen(
    admin: AdminClient, state: str, run_ids: Sequence[uuid.UUID] | None, key: str | None
) -> list[dict[str, Any]]:
    """Return the results that are meant: those named, or all open ones of a key."""
    if bool(run_ids) == bool(key):
        raise usage_error("say which results: their RUN_IDs, or --key where the command has it")
    if run_ids:
        return [admin.get(f"{RESULTS}/{run_id}") for run_id in dict.fromkeys(run_ids)]
    fingerprint = find_key(admin, str(key))["fingerprint"]
    return [
        result
        for former in OPEN
        if former != state
        for result in listed(admin, key=fingerprint, state=former)
    ]


def _preview(state: str, found: Sequence[Mapping[str, Any]]) -> CommandFailed:
    return needs_yes(
        f"make {len(found)} result(s) {state}",
        [f"{of['run_id']}  {of['state']}  {of['runner_id']}  {of['model']}" for of in found],
    )


def _stopped(
    failure: CommandFailed, run_id: str, decided: Sequence[Any], found: Sequence[Any]
) -> CommandFailed:
    return CommandFailed(
        f"{run_id}: {failure.line}; {len(decided)} of {len(found)} were changed before it",
        code=failure.code,
        details=failure.details,
    )


def _row(result: Mapping[str, Any]) -> list[Any]:
    return [result.get("signer_identity" if name == "signer" else name) for name in COLUMNS]


def _print_listed(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    listed = [[row.get(name) for name in columns] for row in rows]
    if listed:
        print()
        print_table(columns, listed)
