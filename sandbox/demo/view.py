"""View of the demo: a live table on a terminal, a line per event elsewhere."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sandbox.demo.board import Board, Run

EVENTS = 6
ROOM = 6  # lines of the screen that are neither runs nor events
BAR = 24  # columns of a progress bar, where there are so many
REST = 72  # columns of all the others together, so that 80 are enough
STYLES = {"PENDING": "dim", "CLAIMED": "yellow", "IN_PROGRESS": "yellow", "COMPLETE": "green"}
# On a small screen, what moves is shown first.
ORDER = ("IN_PROGRESS", "CLAIMED", "FAILED", "CANCELLED", "PENDING", "COMPLETE")


class View(Protocol):
    """Where the demo is shown."""

    def say(self, who: str, text: str) -> None:
        """Tell an event."""

    def show(self, board: Board) -> None:
        """Show the queue."""


class Lines:
    """A line per event, for pipes and CI."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def say(self, who: str, text: str) -> None:
        """Print the event."""
        print(_line(self._started, who, text), flush=True)

    def show(self, board: Board) -> None:
        """Print nothing: the events tell it all."""


class Screen:
    """The live table, with the last events below it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._started = time.monotonic()
        self._board: Board | None = None
        self._events: deque[str] = deque(maxlen=EVENTS)

    def say(self, who: str, text: str) -> None:
        """Add the event to the last ones."""
        self._events.append(_line(self._started, who, text))
        self._draw()

    def show(self, board: Board) -> None:
        """Draw the queue anew."""
        self._board = board
        self._draw()

    def _draw(self) -> None:
        events = Text("\n".join(self._events), no_wrap=True, overflow="ellipsis")
        if self._board is None:
            self._live.update(events, refresh=True)
            return
        seconds = time.monotonic() - self._started
        size = self._live.console.size
        table = _table(self._board, size.height - EVENTS - ROOM, min(BAR, size.width - REST))
        head = Text(f"bakeoff-queue demo   {self._board.tally}   {seconds:.0f} s", style="bold")
        self._live.update(Group(head, "", table, "", events), refresh=True)


@contextmanager
def open_view() -> Iterator[View]:
    """Yield the view that suits stdout."""
    console = Console(highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield Lines()
        return
    with Live(console=console, auto_refresh=False, redirect_stdout=False) as live:
        yield Screen(live)


def _table(board: Board, room: int, bar: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("model", "quant"):
        table.add_column(name, no_wrap=True)
    table.add_column("GB", justify="right")
    for name in ("status", "runner", "attempt", "progress"):
        table.add_column(name, no_wrap=True)
    runs, hidden = _shown(board, room)
    for run in runs:
        table.add_row(*_row(run, board, max(1, bar)))
    if hidden:
        table.add_row(Text(f"and {hidden} more", style="dim"))
    return table


def _shown(board: Board, room: int) -> tuple[list[Run], int]:
    """The runs there is room for, in the queue's order, and how many there is none for."""
    runs = list(board.runs)
    if len(runs) <= room:
        return runs, 0
    room = max(1, room - 1)
    first = sorted(runs, key=lambda run: ORDER.index(run["status"]))[:room]
    return [run for run in runs if run in first], len(runs) - room


def _row(run: Run, board: Board, bar: int) -> tuple[str | Text | ProgressBar, ...]:
    unfit = board.fits_nobody(run)
    status = Text("fits nobody" if unfit else run["status"], style="red" if unfit else "")
    if not unfit:
        status.stylize(STYLES.get(run["status"], "red"))
    runner = "" if run["status"] == "PENDING" else run["claimed_by"] or ""
    return (
        run["model"],
        run["quantization"],
        str(run["need_gb"]),
        status,
        runner,
        str(board.attempts.get(run["run_id"], "")),
        _bar(run, bar),
    )


def _bar(run: Run, width: int) -> str | ProgressBar:
    progress = run["progress"] or {}
    if run["status"] == "COMPLETE":
        return ProgressBar(total=1, completed=1, width=width)
    if run["status"] == "PENDING" or not progress:
        return ""
    return ProgressBar(total=progress["total"], completed=progress["done"], width=width)


def _line(started: float, who: str, text: str) -> str:
    return f"{time.monotonic() - started:5.1f} s  {who:<12} {text}"
