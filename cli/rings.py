"""`bakeoff-queue rings`: the known keys of the token and receipt rings, by fingerprint.

They work on the database of the settings, as `tokens` does without a token.
"""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.settings import as_database_admin
from client.output import AsJson, Yes, needs_yes, note, print_json, print_table

if TYPE_CHECKING:
    from broker.admin.key_rings import RingAdmin
    from broker.audit.log import Admin

COLUMNS = ("ring", "kid", "fingerprint", "first_held_at", "held_at", "signed_at")
SHOWN = 16  # hex digits of a fingerprint in a table

app = typer.Typer(
    help="Key rings of the processes: which key each kid is, and who still has it.",
    no_args_is_help=True,
)


class Ring(StrEnum):
    """The settings that hold a ring."""

    TOKEN_KEYS = "token_keys"  # noqa: S105 - the setting's name
    RECEIPT_KEYS = "receipt_keys"


@app.command(name="ls")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys that processes have had, and when one last had and signed with each."""
    rows = _with_rings(lambda rings, _: rings.list_all())
    if as_json:
        return print_json({"keys": rows})
    shown = [row | {"fingerprint": row["fingerprint"][:SHOWN]} for row in rows]
    return print_table(COLUMNS, [[row[name] for name in COLUMNS] for row in shown])


@app.command()
def forget(
    ring: Annotated[Ring, typer.Argument(show_default=False)],
    kid: Annotated[str, typer.Argument(help="As `rings ls` shows it.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")],
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Free a kid that no process has any more, so that another key may have it."""
    if not yes:
        raise needs_yes(f"forget which key the kid {kid} of {ring} was")
    forgotten = _with_rings(lambda rings, by: rings.forget(by, ring.value, kid, reason))
    if as_json:
        return print_json(forgotten)
    return note(f"{kid} of {ring} may be another key now")


def _with_rings(work: "Callable[[RingAdmin, Admin], Awaitable[Any]]") -> Any:
    from broker.admin.key_rings import RingAdmin

    return as_database_admin(lambda pool, by: work(RingAdmin(pool), by))
