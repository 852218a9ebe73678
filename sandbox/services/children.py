"""Our own programs as child processes: what they say becomes events, and none outlives us.

A child's lines are read by a thread of its own and handed to `tell`, so that a slow reader never
blocks the child. Children run in a session of their own: Ctrl-C in the terminal is for us.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GRACE_S = 5.0
ENDED = "ended"


class Event(NamedTuple):
    """A line of a child: its JSON by the member `event`; a line that is no JSON has no name."""

    source: str
    name: str
    facts: dict[str, Any]


Tell = Callable[[Event], None]


class Child:
    """A running `python -m MODULE ARGUMENT...`; its last event is ENDED, with the exit `code`."""

    def __init__(
        self,
        name: str,
        module: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        tell: Tell,
    ) -> None:
        """Start it in `folder`. It sees no variable of ours, only `environment`."""
        self.name = name
        self.last_words = ""
        self._tell = tell
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sandbox.services.child_main", *module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=folder,
            env={**_bare_environment(folder), **environment},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def kill(self) -> None:
        """SIGKILL; all it said has been told when this returns. Safe twice."""
        self._process.kill()
        self._join()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that takes longer than GRACE_S."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        self.kill()

    def _join(self) -> None:
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = read_event(self.name, line.rstrip("\n"))
            if not event.name:
                self.last_words = event.facts["text"]
            self._tell(event)
        self._tell(Event(self.name, ENDED, {"code": self._process.wait()}))


@contextlib.contextmanager
def held(child: Child) -> Iterator[Child]:
    """Yield the child, and kill what is left of it at the end."""
    try:
        yield child
    finally:
        child.kill()


def read_event(source: str, line: str) -> Event:
    """Return a line as an event."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        facts = json.loads(line)
        return Event(source, str(facts.pop("event")), facts)
    return Event(source, "", {"text": line})


def _bare_environment(folder: Path) -> dict[str, str]:
    """Nothing of the caller's: a BAKEOFF_QUEUE_ or PG variable may mean their production."""
    home = str(folder)
    return {"PATH": os.defpath, "HOME": home, "TMPDIR": home, "TZ": "UTC", "PYTHONUTF8": "1"}
