"""`bakeoff-queue tokens`: admin tokens, made in the database itself.

Whoever can write to the database can make the first token; no password is shipped.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

import typer

from auth import admin_tokens
from cli.output import (
    AsJson,
    CommandFailed,
    ExitCode,
    Yes,
    needs_yes,
    note,
    print_json,
    print_members,
    print_table,
    usage_error,
)
from cli.settings import in_database

COLUMNS = ("token_id", "name", "scopes", "created_at", "expires_at", "revoked_at")

app = typer.Typer(help="Admin tokens of the API and of this command.", no_args_is_help=True)


@app.command()
def mint(
    name: Annotated[str, typer.Option(help="Whose it is; the audit trail shows it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(admin_tokens.SCOPES)}; may be repeated. All by default."),
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, help="Life of the token, in days.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an admin token and show it, this once."""
    scopes = scope or list(admin_tokens.SCOPES)
    unknown = sorted(set(scopes) - set(admin_tokens.SCOPES))
    if unknown:
        known = ", ".join(admin_tokens.SCOPES)
        raise usage_error(f"--scope {unknown[0]} is unknown; known scopes: {known}")
    expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
    token, digest = admin_tokens.make()

    from db import admin

    row = in_database(lambda pool: admin.add_token(pool, digest, name, scopes, expires_at))
    shown = {"token": token, **_shown(dict(row))}
    print_json(shown) if as_json else print_members(shown)
    note("only its digest is stored: keep the token now, in BAKEOFF_QUEUE_TOKEN for instance")


@app.command(name="ls")
def list_tokens(as_json: AsJson = False) -> None:
    """List the admin tokens; the tokens themselves are not stored."""
    from db import admin

    rows = [_shown(dict(row)) for row in in_database(admin.list_tokens)]
    if as_json:
        print_json({"tokens": rows})
    else:
        print_table(COLUMNS, [[row[name] for name in COLUMNS] for row in rows])


@app.command()
def revoke(token_id: Annotated[str, typer.Argument()], yes: Yes = False) -> None:
    """Revoke an admin token at once."""
    try:
        wanted = UUID(token_id)
    except ValueError:
        raise usage_error(f"{token_id} is not a token_id; see `bakeoff-queue tokens ls`") from None
    if not yes:
        raise needs_yes(f"revoke the token {wanted}")
    from db import admin

    name = in_database(lambda pool: admin.revoke_token(pool, wanted))
    if name is None:
        raise CommandFailed(f"there is no living token {wanted}", code=ExitCode.NOT_FOUND)
    note(f"revoked the token of {name}")


def _shown(row: Mapping[str, object]) -> dict[str, object]:
    return {
        name: value.isoformat() if isinstance(value, datetime) else _plain(value)
        for name, value in row.items()
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, UUID) else value
