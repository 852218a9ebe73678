"""`bakeoff-queue config`: the settings in effect."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cli.settings import read_settings
from client.output import AsJson, CommandFailed, ExitCode, note, print_json, print_members

if TYPE_CHECKING:
    from config.settings import Settings

app = typer.Typer(help="The settings: show them, check them.", no_args_is_help=True)


@app.command()
def show(
    redact: Annotated[bool, typer.Option(help="Hide secrets and passwords.")] = True,
    as_json: AsJson = False,
) -> None:
    """Print every setting in effect."""
    from config.settings import Settings

    settings = read_settings()
    values = {name: _shown(getattr(settings, name), redact) for name in Settings.model_fields}
    print_json(values) if as_json else print_members(values)


@app.command()
def check() -> None:
    """Exit 0 if `serve` takes the settings; otherwise a line for each thing wrong, and exit 2.

    The files they name are read. No server is asked: `/readyz` of a process tells of those.
    """
    from auth.signer_policy import load_policy
    from config.settings import PREFIX

    settings = read_settings()
    if problems := [*settings.missing_for_server, *_unusable(settings)]:
        first, *others = problems
        raise CommandFailed(first, code=ExitCode.USAGE, details=others)
    for entry in load_policy(settings.signers_file).ignored:
        note(f"warning: {PREFIX}SIGNERS_FILE: {entry}")
    note("the settings are good")


def _unusable(settings: "Settings") -> Iterator[str]:
    """Yield a line for each setting that is well-formed and names what `serve` cannot use."""
    from auth.errors import PolicyRefused
    from auth.signer_policy import load_policy
    from auth.trust_root import TrustRoot, read_root
    from broker.leases.redis_topology import RedisUrlRefused, open_topology
    from config.settings import PREFIX

    uses: dict[str, Callable[[], object]] = {
        "redis_lease_url": lambda: open_topology(settings.redis_lease_url),
        "redis_token_url": lambda: open_topology(settings.redis_token_url),
        "trusted_root": lambda: TrustRoot(read_root(settings.trusted_root)),
        "signers_file": lambda: load_policy(settings.signers_file),
    }
    for name, use in uses.items():
        try:
            use()
        except (RedisUrlRefused, PolicyRefused) as error:
            yield f"{PREFIX}{name.upper()}: {error}"


@app.command()
def reference() -> None:
    """Print the reference page of all settings, in Markdown."""
    print(reference_page(), end="")


def reference_page() -> str:
    """Return docs/settings.md: a row per setting with its default and the reason for it."""
    from config.settings import PREFIX, Settings

    lines = [
        "# Settings",
        "",
        "Made by `bakeoff-queue config reference`. Each setting is read from, in this order:",
        f"the environment (`{PREFIX}<NAME>`), the file that `{PREFIX}<NAME>_FILE` names, and the",
        f"`queue:` section of the YAML file that `{PREFIX}CONFIG` names (lower-case names there).",
        "",
        "| setting | default | what it is, and why |",
        "|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else _shown(field.default, redact=True)
        if name == "signers_file":
            default = "signers.yaml of the package"
        lines.append(f"| `{PREFIX}{name.upper()}` | `{default}` | {field.description or ''} |")
    return "\n".join(lines) + "\n"


def _shown(value: object, redact: bool) -> object:
    from pydantic import SecretStr

    from config.urls import without_password

    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        return without_password(secret) if redact else secret
    if isinstance(value, str) and redact:
        return without_password(value) if "://" in value else value
    return value if isinstance(value, int | float | str | None) else str(value)
