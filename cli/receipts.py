"""`bakeoff-queue receipts`: verify what a server gave for an accepted result; needs no token."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from client.admin_api import DEFAULT_URL, Url, connect_openly
from client.documents import parse_json
from client.output import (
    AsJson,
    CommandFailed,
    ExitCode,
    note,
    print_json,
    print_members,
    usage_error,
)

WELL_KNOWN = "/.well-known/bakeoff-queue.json"

app = typer.Typer(help="Receipts of accepted results.", no_args_is_help=True)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="The receipt as JSON, or the answer that holds it.")],
    url: Url = DEFAULT_URL,
    keys: Annotated[
        Path | None,
        typer.Option(help=f"A kept copy of {WELL_KNOWN}; without it, the one at --url."),
    ] = None,
    result: Annotated[
        Path | None, typer.Option(help="result.json: is it the one that was accepted?")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a receipt proves; exit 1 if it proves nothing.

    The server to believe is named here, never by the receipt: anybody can sign in their own name.
    """
    from auth.errors import AuthError
    from auth.receipts import verify_receipt

    document = read_object(file)
    published = read_object(keys) if keys else _fetch(url)
    try:
        signed = verify_receipt(document.get("receipt") or document, public_keys(published))
    except AuthError as error:
        raise CommandFailed(f"{file} proves nothing: {error}") from None
    if signed.get("public_url") != published.get("public_url"):
        raise CommandFailed(f"{file} proves nothing: it was given in the name of another server")
    if result and signed.get("result_sha256") != _digest(result):
        raise CommandFailed(f"{file} is good, but it is the receipt of another result.json")
    print_json(signed) if as_json else print_members(signed)
    note("the receipt is good")


def _fetch(url: str) -> dict[str, Any]:
    with connect_openly(url) as api:
        return api.get(WELL_KNOWN)


def public_keys(published: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys that a well-known document lists, by kid. Raises CommandFailed."""
    try:
        return {str(key["kid"]): str(key["public_key"]) for key in published["keys"]}
    except (LookupError, TypeError):
        raise CommandFailed(f"this is no {WELL_KNOWN}: it has no keys") from None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise usage_error(f"cannot read {path}: {error.strerror}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file. Raises CommandFailed (exit 2)."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise usage_error(f"cannot read {path}: {error.strerror}") from None
    document = parse_json(text, str(path), ExitCode.USAGE)
    if not isinstance(document, dict):
        raise usage_error(f"{path} is not a JSON object")
    return document
