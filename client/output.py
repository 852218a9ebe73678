"""Output of commands: tables or JSON on stdout, one line per error or note on stderr.

A command that cannot do its work, or was not told to, raises `CommandFailed`; `cli/main.py` prints
it and exits with its code. Text from files and servers is stripped of control characters, so that
nothing but us moves the operator's cursor.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import IntEnum
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

Item = TypeVar("Item")
GAP = 2  # between the columns of a table
BY_JSON = "(--json shows it)"  # in place of a member that has thousands of characters
MAX_DETAILS = 20  # lines under an error; more would push the error itself off the screen

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it; without this, only say what it would do.")]


class ExitCode(IntEnum):
    """Exit codes."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    UNREACHABLE = 5
    UNCONFIRMED = 6  # nothing is wrong: the command says what it would do, and waits for --yes
    UNSIGNED = 7  # nothing failed, and of some results no signature was checked
    UNWRITTEN = 8  # the command did its work, and stdout did not take what it has to say


class CommandFailed(Exception):
    """An expected end of a command: one line that names the thing and the fix, and an exit code.

    `details` are further lines, for errors that have several places (`errors[]` of a problem
    document, each bad model of a file).
    """

    def __init__(
        self, line: str, *, code: ExitCode = ExitCode.FAILURE, details: Sequence[str] = ()
    ) -> None:
        super().__init__(line)
        self.line = line
        self.code = code
        self.details = tuple(details)


class OutputFailed(CommandFailed):
    """Stdout is full or closed. The command has done its work by then: a change is made once."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the command did its work, but stdout did not take its result ({why}): do not repeat a"
            " change, look at what is there (ls, show)",
            code=ExitCode.UNWRITTEN,
        )


def usage_error(line: str) -> CommandFailed:
    """Return the failure for a command that was typed wrongly (exit 2)."""
    return CommandFailed(line, code=ExitCode.USAGE)


def needs_yes(deed: str, details: Sequence[str] = ()) -> CommandFailed:
    """Return the end of a command that was not told --yes: what it would do (exit 6)."""
    line = f"nothing was changed: this would {deed}; add --yes to do it"
    return CommandFailed(line, code=ExitCode.UNCONFIRMED, details=details)


def moment(option: str, text: str) -> str:
    """Return an RFC 3339 time in UTC, as the API wants it; `option` is named when it is none."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise usage_error(f"{option} {text}: not a moment like 2027-12-31T00:00:00Z")
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def tracked(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield the items one by one; show on a terminal's stderr how far it is."""
    console = Console(stderr=True)
    yield from track(items, what, console=console, transient=True, disable=not console.is_terminal)


def print_failure(failure: CommandFailed) -> None:
    """Print the error's line and, indented below it, the first of its details."""
    note(failure.line if failure.code is ExitCode.UNCONFIRMED else f"error: {failure.line}")
    for detail in failure.details[:MAX_DETAILS]:
        note(f"  {one_line(detail)}")
    if len(failure.details) > MAX_DETAILS:
        note(f"  and {len(failure.details) - MAX_DETAILS} more")


def note(text: str) -> None:
    """Print a line for the person at the terminal, apart from the command's result."""
    indent = text[: len(text) - len(text.lstrip(" "))]
    # `print` would take stdout where stderr is closed. One that is full or gone stops no command.
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(indent + one_line(text), file=sys.stderr)


def print_json(value: Any) -> None:
    """Print one JSON document. ASCII only: it survives any locale and no terminal acts on it."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under their headings; a missing value is `-`."""
    headings = [Text(column, style="bold") for column in columns]
    _print([headings, *([_cell(value) for value in row] for row in rows)])


def print_members(members: Mapping[str, Any]) -> None:
    """Print the members of one thing, a line each."""
    _print([[Text(one_line(name), style="bold"), _cell(value)] for name, value in members.items()])


def one_line(text: str) -> str:
    """Return `text` with line breaks and control characters replaced by spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _cell(value: Any) -> Text:
    if value is None or value in ("", [], {}):
        return Text("-", style="dim")
    text = value if isinstance(value, str) else json.dumps(value)
    return Text(one_line(text))


def _print(rows: Sequence[Sequence[Text]]) -> None:
    # Not rich's Table: it folds or cuts off an id, and neither can be pasted into the next command;
    # made wide enough, it pads every line to the longest, which a terminal folds into blank ones.
    widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    console = Console(highlight=False)
    for row in rows:
        line = Text()
        for cell, width in zip(row[:-1], widths, strict=False):
            line.append_text(cell).append(" " * (width - cell.cell_len + GAP))
        console.print(line.append_text(row[-1]), soft_wrap=True)
