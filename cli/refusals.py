"""`bakeoff-queue refusals`: submits that the server refused, and why."""

from itertools import chain
from typing import Annotated

import typer

from client.admin_api import DEFAULT_URL, Token, Url, connect
from client.output import AsJson, print_json, print_table

REFUSALS = "/api/admin/refusals"
COLUMNS = ("refused_at", "run_id", "runner_id", "code", "detail")

app = typer.Typer(help="Refused submits.", no_args_is_help=True)


@app.command(name="ls")
def list_refusals(
    run_id: Annotated[str | None, typer.Option(help="Only of this run.")] = None,
    runner: Annotated[str | None, typer.Option(help="Only of this runner.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 50,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """List refused submits, the newest first."""
    with connect(url, token) as admin:
        pages = list(admin.pages(REFUSALS, limit, run_id=run_id, runner_id=runner))
    refusals = list(chain.from_iterable(page["refusals"] for page in pages))
    if as_json:
        return print_json({"refusals": refusals})
    return print_table(COLUMNS, ([refusal[name] for name in COLUMNS] for refusal in refusals))
