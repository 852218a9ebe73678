"""`bakeoff-queue keys`: the allowlist of runner keys."""

import base64
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from auth.errors import InvalidKey
from auth.keys import RunnerKey
from client.admin_api import DEFAULT_URL, AdminClient, Token, Url, connect
from client.output import (
    AsJson,
    CommandFailed,
    ExitCode,
    Yes,
    moment,
    needs_yes,
    note,
    print_json,
    print_members,
    print_table,
    usage_error,
)

KEYS = "/api/admin/runner-keys"
HELD = ("CLAIMED", "IN_PROGRESS")  # the states in which a run has a lease
SHOWN = 16  # hex digits of a fingerprint in a table; `keys rm` takes them
MIN_PREFIX = 8
EVERYTHING = 1_000_000
NO_SIGNER = (
    "this key has no signer of its own: only those whom the server's signer policy names can sign"
    " its results, which is bakeoff's own workflow unless the server's signers_file says otherwise."
    " For a machine of yours, add the key with --signer-identity and --signer-issuer, or with"
    " --signature-policy runner-key"
)


Fingerprint = Annotated[
    str, typer.Argument(help=f"As `keys ls` shows it; {MIN_PREFIX} or more of its digits.")
]


class SignaturePolicy(StrEnum):
    """How a key's results are signed."""

    SIGSTORE = "sigstore"
    RUNNER_KEY = "runner-key"


app = typer.Typer(help="Runner keys: who may register and submit.", no_args_is_help=True)


@app.command()
def add(
    public_key: Annotated[str, typer.Argument(help="Ed25519 public key: base64 of 32 bytes.")],
    runner_id: Annotated[str, typer.Option(help="The name that runs of this key carry.")],
    description: Annotated[str | None, typer.Option(help="For people.")] = None,
    max_leases: Annotated[int | None, typer.Option(min=1, help="Runs at a time.")] = None,
    vram_cap_gb: Annotated[
        int | None, typer.Option(min=1, help="Hand out nothing that needs more.", metavar="GB")
    ] = None,
    signer_identity: Annotated[
        str | None, typer.Option(help="Sigstore identity that must sign this runner's bundles.")
    ] = None,
    signer_issuer: Annotated[str | None, typer.Option(help="Its OIDC issuer.")] = None,
    signature_policy: Annotated[
        SignaturePolicy | None,
        typer.Option(help="sigstore (if not given), or runner-key: signed by this very key."),
    ] = None,
    not_after: Annotated[
        str | None, typer.Option(help="Last moment of the key.", metavar="RFC3339")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Admit a runner's public key."""
    members = {
        "public_key": _public_key(public_key),
        "runner_id": runner_id,
        "description": description,
        "max_leases": max_leases,
        "capability_caps": {"vram_gb": vram_cap_gb} if vram_cap_gb else None,
        "signer": _signer(signer_identity, signer_issuer),
        "signature_policy": signature_policy,
        "not_after": moment("--not-after", not_after) if not_after else None,
    }
    body = {name: value for name, value in members.items() if value is not None}
    with connect(url, token) as admin:
        answer = admin.post(KEYS, body)
    if answer.status == 200:
        note("this very key is on the allowlist already; nothing was changed")
    print_json(answer.body) if as_json else print_members(answer.body)
    by_sigstore = answer.body.get("signature_policy") == SignaturePolicy.SIGSTORE
    if by_sigstore and not answer.body.get("signer"):
        note(NO_SIGNER)


@app.command()
def ls(url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False) -> None:
    """List the allowlist, revoked keys too."""
    with connect(url, token) as admin:
        answer = admin.get(KEYS)
    if as_json:
        print_json(answer)
        return
    columns = ("fingerprint", "runner_id", "state", "max_leases", "signer", "description")
    print_table(columns, (_row(key) for key in answer.get("keys", [])))


@app.command()
def show(
    fingerprint: Fingerprint, url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False
) -> None:
    """Show a key of the allowlist."""
    with connect(url, token) as admin:
        key = admin.get(f"{KEYS}/{find_key(admin, fingerprint)['fingerprint']}")
    print_json(key) if as_json else print_members(key)


@app.command()
def generate(
    file: Annotated[Path, typer.Argument(dir_okay=False, help="Where the private key goes.")],
    as_json: AsJson = False,
) -> None:
    """Make a runner key: the private half goes into FILE (mode 0600), the public half is shown."""
    from nacl.signing import SigningKey

    key = SigningKey.generate()
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(base64.b64encode(bytes(key)).decode() + "\n")
    except FileExistsError:
        raise usage_error(f"{file} is there already: a key is never overwritten") from None
    except OSError as error:
        raise CommandFailed(f"{file}: {error.strerror}") from None
    public = RunnerKey.parse(base64.b64encode(bytes(key.verify_key)).decode())
    shown = {"public_key": public.text, "fingerprint": public.fingerprint, "private_key": str(file)}
    print_json(shown) if as_json else print_members(shown)


@app.command()
def rm(
    fingerprint: Fingerprint,
    reason: Annotated[str, typer.Option(help="Why; it goes into the audit.")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Revoke a key: its runner's leases end at once and their runs are free for others."""
    with connect(url, token) as admin:
        key = find_key(admin, fingerprint)
        if not yes:
            raise _preview(key, _held(admin, str(key.get("runner_id"))))
        answer = admin.delete(f"{KEYS}/{key['fingerprint']}", {"reason": reason})
    print_json(answer) if as_json else print_members(answer)


def _public_key(text: str) -> str:
    """Checked before it is sent, so that a private key given by mistake stays on this machine."""
    try:
        return RunnerKey.parse(text.strip()).text
    except InvalidKey as error:
        raise usage_error(f"PUBLIC_KEY: {error}") from None


def _signer(identity: str | None, issuer: str | None) -> dict[str, str] | None:
    if identity and issuer:
        return {"identity": identity, "issuer": issuer}
    if identity or issuer:
        missing = "--signer-issuer" if identity else "--signer-identity"
        raise usage_error(f"{missing} is missing: an identity counts only as its issuer's")
    return None


def _row(key: dict[str, Any]) -> tuple[Any, ...]:
    signer = (key.get("signer") or {}).get("identity")
    if key.get("signature_policy") == "runner-key":
        signer = "this key itself"
    name = str(key.get("fingerprint", ""))[:SHOWN]
    leases, description = key.get("max_leases"), key.get("description")
    return (name, key.get("runner_id"), _state(key), leases, signer, description)


def _state(key: dict[str, Any]) -> str:
    if key.get("revoked_at"):
        return f"revoked {key['revoked_at']}"
    return f"until {key['not_after']}" if key.get("not_after") else "admitted"


def find_key(admin: AdminClient, fingerprint: str) -> dict[str, Any]:
    """Return the key of the allowlist whose fingerprint begins so. Raises CommandFailed."""
    if not re.fullmatch(f"[0-9a-f]{{{MIN_PREFIX},64}}", fingerprint):
        raise usage_error(
            f"FINGERPRINT: {MIN_PREFIX} to 64 digits of 0-9a-f; `bakeoff-queue keys ls` shows them"
        )
    keys = admin.get(KEYS).get("keys", [])
    found = [key for key in keys if str(key.get("fingerprint")).startswith(fingerprint)]
    if len(found) == 1:
        return found[0]
    if found:
        raise usage_error(f"{fingerprint}: {len(found)} keys start so; give more digits")
    raise CommandFailed(
        f"{fingerprint}: no such key; `bakeoff-queue keys ls` shows the allowlist",
        code=ExitCode.NOT_FOUND,
    )


def _held(admin: AdminClient, runner_id: str) -> list[str]:
    return [
        f"{run.get('run_id')}  {run.get('status')}  {run.get('model')}"
        for status in HELD
        for page in admin.pages("/api/admin/queue", EVERYTHING, status=status)
        for run in page.get("runs", [])
        if run.get("claimed_by") == runner_id
    ]


def _preview(key: dict[str, Any], held: list[str]) -> CommandFailed:
    revoked = f"revoke the key {key['fingerprint'][:SHOWN]} of {key.get('runner_id')}"
    return needs_yes(f"{revoked} and free {len(held)} run(s)", held)
