"""`bakeoff-queue tokens`: admin tokens.

With an admin token they go through the API, like all else. Without one they work on the database of
the settings: whoever can write there makes the first token, and no password is shipped.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from auth import admin_tokens
from cli.settings import as_database_admin
from client.admin_api import DEFAULT_URL, Token, Url, connect
from client.output import (
    AsJson,
    Yes,
    needs_yes,
    note,
    print_json,
    print_members,
    print_table,
    usage_error,
)

if TYPE_CHECKING:
    from broker.admin.admin_tokens import TokenAdmin
    from broker.audit.log import Admin

TOKENS = "/api/admin/tokens"
COLUMNS = ("token_id", "name", "scopes", "created_at", "expires_at", "minted_by", "revoked_at")
DEFAULT_DAYS = 90
LONGEST_DAYS = 366

app = typer.Typer(help="Admin tokens of the API and of this command.", no_args_is_help=True)


@app.command()
def mint(
    name: Annotated[str, typer.Option(help="Whose it is; the audit trail shows it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(admin_tokens.SCOPES)}; may be repeated. All by default."),
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=LONGEST_DAYS, help="Life of the token, in days.")
    ] = DEFAULT_DAYS,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Make an admin token and show it, this once."""
    expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    wanted = {
        "name": name,
        "scopes": _scopes(scope),
        "expires_at": expires_at.isoformat().replace("+00:00", "Z"),
    }
    if token:
        with connect(url, token) as admin:
            minted = admin.post(TOKENS, wanted).body
    else:
        _check_schema(wanted)
        minted = _with_tokens(lambda tokens, by: tokens.mint(by, wanted))
    secret_first = {"token": minted["token"], **minted}
    print_json(secret_first) if as_json else print_members(secret_first)
    note("only its digest is stored: keep the token now, in BAKEOFF_QUEUE_TOKEN for instance")


@app.command(name="ls")
def list_tokens(url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False) -> None:
    """List the admin tokens; the tokens themselves are not stored."""
    if token:
        with connect(url, token) as admin:
            rows = admin.get(TOKENS)["tokens"]
    else:
        rows = _with_tokens(lambda tokens, _: tokens.list_all())
    if as_json:
        print_json({"tokens": rows})
    else:
        print_table(COLUMNS, [[row[name] for name in COLUMNS] for row in rows])


@app.command()
def revoke(
    token_id: Annotated[str, typer.Argument()],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Revoke an admin token at once, in every process."""
    try:
        wanted = UUID(token_id)
    except ValueError:
        raise usage_error(f"{token_id} is not a token_id; see `bakeoff-queue tokens ls`") from None
    if not yes:
        raise needs_yes(f"revoke the token {wanted}")
    if token:
        with connect(url, token) as admin:
            revoked = admin.delete(f"{TOKENS}/{wanted}", {"reason": reason})
    else:
        revoked = _with_tokens(lambda tokens, by: tokens.revoke(by, wanted, reason))
    if as_json:
        return print_json(revoked)
    return note(f"revoked the token of {revoked['name']}")


def _scopes(asked: list[str] | None) -> list[str]:
    scopes = asked or list(admin_tokens.SCOPES)
    unknown = sorted(set(scopes) - set(admin_tokens.SCOPES))
    if unknown:
        known = ", ".join(admin_tokens.SCOPES)
        raise usage_error(f"--scope {unknown[0]} is unknown; known scopes: {known}")
    return list(dict.fromkeys(scopes))


def _check_schema(wanted: dict[str, Any]) -> None:
    from broker.documents.schemas import load_schema

    for violation in load_schema("admin_token").violations(wanted):
        raise usage_error(f"--{violation.pointer.strip('/')} {violation.detail}")


def _with_tokens(work: "Callable[[TokenAdmin, Admin], Awaitable[Any]]") -> Any:
    from broker.admin.admin_tokens import TokenAdmin

    return as_database_admin(lambda pool, by: work(TokenAdmin(pool), by))
