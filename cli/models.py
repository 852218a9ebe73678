"""`bakeoff-queue models`: the VRAM that models were seen to need."""

from typing import Annotated

import typer

from client.admin_api import DEFAULT_URL, Token, Url, connect
from client.output import AsJson, Yes, needs_yes, note, print_json, print_table

NEEDS = "/api/admin/model-needs"
COLUMNS = ("model_id", "name", "quantization", "rule_gb", "need_gb", "learned_from", "learned_at")

app = typer.Typer(help="Models: the VRAM that was learned from failures.", no_args_is_help=True)


@app.command()
def needs(url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False) -> None:
    """List the models whose need was raised by an `oom`, beside upstream's rule."""
    with connect(url, token) as admin:
        found = admin.get(NEEDS)
    if as_json:
        return print_json({"models": found["models"]})
    return print_table(COLUMNS, ([row[name] for name in COLUMNS] for row in found["models"]))


@app.command()
def forget_need(
    model_id: Annotated[str, typer.Argument(help="Which model; see `models needs`.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Let upstream's rule count again for a model."""
    if not yes:
        raise needs_yes(f"forget the learned need of model {model_id}")
    with connect(url, token) as admin:
        answer = admin.delete(f"{NEEDS}/{model_id}", {"reason": reason})
    print_json(answer) if as_json else note(f"{model_id}: upstream's rule counts again")
