"""`bakeoff-queue`: the command line's entry point, which wires one module per noun.

A noun is one `app.add_typer(noun.app, name=...)` line here, a plain command one
`app.command()(function)` line. Their modules are imported at every start, so what is heavy (the
server, the sandbox, Sigstore) they import inside the function that needs it.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version as installed_version

import typer
from typer.main import get_command

from cli import (
    audit,
    config,
    db,
    demo,
    dev,
    doctor,
    keys,
    models,
    prune,
    queue,
    receipts,
    refusals,
    results,
    rings,
    runners,
    serve,
    tokens,
)
from client.admin_api import refusing_unreadable
from client.output import CommandFailed, ExitCode, OutputFailed, note, print_failure

PROGRAM = "bakeoff-queue"

app = typer.Typer(
    help="The queue that hands bakeoff's benchmark runs to GPU runners.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app, name="keys")
app.add_typer(queue.app, name="queue")
app.add_typer(runners.app, name="runners")
app.add_typer(models.app, name="models")
app.add_typer(results.app, name="results")
app.add_typer(receipts.app, name="receipts")
app.add_typer(refusals.app, name="refusals")
app.add_typer(tokens.app, name="tokens")
app.add_typer(rings.app, name="rings")
app.add_typer(audit.app, name="audit")
app.add_typer(db.app, name="db")
app.add_typer(config.app, name="config")
app.command()(demo.demo)
app.command()(dev.dev)
app.command()(serve.serve)
app.command()(serve.healthcheck)
app.command()(doctor.doctor)
app.command()(prune.prune)


@app.command()
def version() -> None:
    """Print the version."""
    print(installed_version(PROGRAM))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (the process's own by default); return the exit code.

    Expected errors end as a line on stderr. What is left to raise is a bug, with its traceback.
    """
    try:
        with refusing_unreadable():
            code = get_command(app).main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except OutputFailed:
        raise  # cli/entry.py has to give stdout up as well
    except CommandFailed as failure:
        print_failure(failure)
        return failure.code
    except typer.TyperException as error:
        _print_usage(error)
        return error.exit_code
    except typer.Abort:
        note("error: aborted")
        return ExitCode.FAILURE
    return code if isinstance(code, int) else ExitCode.OK


def _print_usage(error: typer.TyperException) -> None:
    """One line in place of typer's box. Without a message the help has already been printed."""
    message = error.format_message()
    if not message:
        return
    context = getattr(error, "ctx", None)
    command = context.command_path if context else PROGRAM
    note(f"error: {message.rstrip('.')}; see `{command} --help`")


if __name__ == "__main__":
    sys.exit(main())
