"""`bakeoff-queue audit`: who did what, and whether the trail is the one that was written.

The chain is verified here: an endpoint that says "verified" would be the word of the very server
that is in question. So the API gives entries and rows, and this command calculates.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from auth.audit_chain import HEAD_PURPOSE, ChainCheck, Witness
from auth.errors import AuthError
from auth.receipts import PURPOSE, verify_receipt
from cli.receipts import WELL_KNOWN, public_keys, read_object
from client.admin_api import DEFAULT_URL, AdminClient, Token, Url, connect, next_cursor
from client.output import (
    AsJson,
    CommandFailed,
    note,
    print_json,
    print_members,
    print_table,
    usage_error,
)

AUDIT = "/api/admin/audit"
CHAIN = f"{AUDIT}/chain"
COLUMNS = ("at", "actor", "action", "target", "address", "reason")
HEAD_ACTION = "audit.head"
HEAD_MEMBERS = ("seq", "hash", "at", "public_url", "purpose")
HEAD_WITHIN = timedelta(hours=2)
PAGE = 1000

app = typer.Typer(help="The audit trail: read it, verify its chain.", no_args_is_help=True)


@app.command()
def tail(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many rows.")] = 20,
    actor: Annotated[
        str | None, typer.Option(help="admin:NAME, runner:ID, database:ROLE or system.")
    ] = None,
    action: Annotated[str | None, typer.Option(help="Such as runner_key.revoke.")] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="About this run.")] = None,
    runner_id: Annotated[str | None, typer.Option("--runner", help="About this runner.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Show the last rows of the trail, the newest at the end."""
    asked = {"actor": actor, "action": action, "run_id": run_id, "runner_id": runner_id}
    with connect(url, token) as admin:
        rows = [row for page in admin.pages(AUDIT, limit, **asked) for row in page["rows"]][::-1]
    if as_json:
        return print_json({"rows": rows})
    return print_table(COLUMNS, ([_shown(row, name) for name in COLUMNS] for row in rows))


@app.command()
def verify(
    witness: Annotated[
        list[Path] | None,
        typer.Option(help="A receipt, or an audit.head line of the log, as JSON; repeatable."),
    ] = None,
    since: Annotated[
        Path | None, typer.Option(help="Begin at this witness, and not at the first entry.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help=f"A kept copy of {WELL_KNOWN}; without it, the one at --url."),
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Calculate the chain anew from its rows; exit 1 if a row was changed, removed or added.

    Whoever can write everything can also calculate all of it anew: what they cannot change is a
    witness, such as the receipts that runners keep. Verify with some of those.
    """
    with connect(url, token) as admin:
        published = read_object(keys) if keys else admin.get(WELL_KNOWN)
        known = public_keys(published)
        start = _witness(since, known) if since else Witness(0, "00" * 32, "the start")
        kept = [_witness(path, known) for path in witness or ()]
        check = ChainCheck(
            [each for each in kept if each.seq > start.seq], start.seq, bytes.fromhex(start.hash)
        )
        heads = _follow(admin, check, known)
    problems = check.end()
    found = {
        "entries": check.seq - start.seq,
        "head": {"seq": check.seq, "hash": check.hash.hex()},
        "witnesses": len(kept),
        "signed_heads": heads,
        "problems": problems,
    }
    if as_json:
        print_json(found)
    if problems:
        raise CommandFailed("the audit trail is not the one that was written", details=problems)
    if not as_json:
        print_members({name: value for name, value in found.items() if name != "problems"})
    note("the chain is whole" + ("" if kept else "; no witness from outside was compared"))


def _follow(admin: AdminClient, check: ChainCheck, known: Mapping[str, str]) -> int:
    """Let `check` have the whole chain; return how many signed heads were in it, and good."""
    asked: dict[str, Any] = {"after": check.seq, "limit": PAGE}
    heads, newest = 0, None
    while True:
        page = admin.get(CHAIN, **asked)
        now = datetime.fromisoformat(page["server_time"])
        for entry in page["entries"]:
            check.entry(entry)
            if (signed := _signed_head(entry, check, known)) is not None:
                heads, newest = heads + 1, datetime.fromisoformat(signed["at"])
        for row in page["unchained"]:
            check.unchained(row, now)
        if not (cursor := next_cursor(page, asked.get("cursor"))):
            break
        asked = {"cursor": cursor, "limit": PAGE}
    if check.seq and (newest is None or now - newest > HEAD_WITHIN):
        check.problems.append("no head of the last two hours is signed: heads were removed")
    return heads


def _signed_head(
    entry: Mapping[str, Any], check: ChainCheck, known: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return the signed head that an entry's row is; None for other rows, and for a false one."""
    row = entry["row"]
    if row is None or row["action"] != HEAD_ACTION:
        return None
    if row["detail"].get("sig", {}).get("kid") not in known:  # of a key that was taken out
        return None
    try:
        signed = verify_receipt(row["detail"], known, HEAD_PURPOSE)
    except AuthError as error:
        check.problems.append(f"entry {entry['seq']} is no signed head: {error}")
        return None
    check.head(signed)
    return signed


def _witness(path: Path, known: Mapping[str, str]) -> Witness:
    """Return the head that a receipt, or a signed head, holds. Raises CommandFailed."""
    document = read_object(path)
    document = document.get("receipt") or document
    purpose = HEAD_PURPOSE if document.get("purpose") == HEAD_PURPOSE else PURPOSE
    # A line of the log has members of the log's own; what is signed is signed without them.
    signed_names = {*HEAD_MEMBERS, "sig"} if purpose == HEAD_PURPOSE else document.keys()
    document = {name: value for name, value in document.items() if name in signed_names}
    try:
        signed = verify_receipt(document, known, purpose)
    except AuthError as error:
        raise CommandFailed(f"{path} is no witness: {error}") from None
    head = signed if purpose == HEAD_PURPOSE else signed.get("audit")
    if head is None:
        raise usage_error(f"{path} is no witness: it was given before there was a chain")
    return Witness(head["seq"], head["hash"], str(path))


def _shown(row: Mapping[str, Any], name: str) -> Any:
    return row["detail"].get("reason") if name == "reason" else row[name]
