"""State of the demo: the queue by the admin API, and the events of its processes."""

from collections.abc import Mapping, Sequence
from typing import Any

from sandbox.services.children import Event

UNFINISHED = ("PENDING", "CLAIMED", "IN_PROGRESS")
SHORT = 8  # hex digits of a run_id that tell runs apart for people
Run = Mapping[str, Any]


class Board:
    """The demo's picture of the queue; `largest` is the runner with the most VRAM."""

    def __init__(self, largest: str, largest_gb: int) -> None:
        self.runs: Sequence[Run] = ()
        self.attempts: dict[str, int] = {}
        self.lost: str | None = None  # the run whose runner was killed
        self.doubts: list[str] = []  # why receipts would prove nothing
        self.unfit: dict[str, Any] = {}  # why the largest runner got nothing, by the server
        self.largest = largest
        self._largest_gb = largest_gb

    def see(self, runs: Sequence[Run]) -> None:
        """Take the queue as the admin API lists it."""
        self.runs = runs

    @property
    def finished(self) -> bool:
        """Return whether all that can run has run, and the server has explained what cannot."""
        waiting = [run for run in self.runs if run["status"] in UNFINISHED]
        return (
            bool(self.runs)
            and self.lost is not None
            and all(self.fits_nobody(run) for run in waiting)
            and self.unfit.get("count") == len(waiting)
        )

    @property
    def tally(self) -> str:
        """How far it is, for people."""
        complete = sum(run["status"] == "COMPLETE" for run in self.runs)
        return f"{complete} of {len(self.runs)} runs COMPLETE"

    def fits_nobody(self, run: Run) -> bool:
        """Return whether the run waits for a larger runner than there is."""
        return run["status"] == "PENDING" and run["need_gb"] > self._largest_gb

    def lose(self, beat: Event) -> str:
        """Note that the runner of this heartbeat was killed; return what to say of it."""
        self.lost = beat.facts["run_id"]
        done, total = beat.facts["done"], beat.facts["total"]
        name = self._name(beat.facts)
        return f"killed {beat.source} (SIGKILL) after {done} of {total} cells of {name}"

    def hear(self, event: Event) -> str | None:
        """Take an event; return what to tell people of it, if anything."""
        facts = event.facts
        if event.name == "claimed":
            self.attempts[facts["run_id"]] = facts["attempt"]
        if event.name == "idle" and event.source == self.largest:
            self.unfit = next((r for r in facts["reasons"] if r["code"] == "vram"), self.unfit)
        if event.name == "receipt_doubtful":
            self.doubts.append(facts["why"])
        say = _STORIES.get(event.name)
        return say(self, facts) if say else None

    def _name(self, facts: Mapping[str, Any]) -> str:
        run = next((run for run in self.runs if run["run_id"] == facts["run_id"]), None)
        model = f"{run['model']} {run['quantization']}" if run else facts.get("model", "run")
        return f"{model} [{facts['run_id'][:SHORT]}]"

    def _claimed(self, facts: Mapping[str, Any]) -> str:
        again = f", attempt {facts['attempt']}" if facts["attempt"] > 1 else ""
        return f"claimed {self._name(facts)}{again}"

    def _submitted(self, facts: Mapping[str, Any]) -> str:
        return f"submitted {self._name(facts)}: verified"

    def _lapsed(self, facts: Mapping[str, Any]) -> str:
        overdue = f"lease lapsed, {facts['lag_s']:.1f} s overdue"
        return f"{overdue}: {facts['runner_id']}'s {self._name(facts)} is {facts['status']} again"

    def _idle(self, facts: Mapping[str, Any]) -> str | None:
        reasons = [
            f"{r['detail']} ({r.get('count', '')} x {r.get('nearest') or r['code']})"
            for r in facts["reasons"]
            if r["code"] != "queue_empty"
        ]
        return f"idle: {'; '.join(reasons)}" if reasons else None

    def _trouble(self, facts: Mapping[str, Any]) -> str:
        shown = {name: value for name, value in facts.items() if name in _TROUBLE}
        return "trouble: " + ", ".join(f"{name} {value}" for name, value in shown.items())


_TROUBLE = ("code", "detail", "path", "why", "error")
_STORIES = {
    "server.listening": lambda _, facts: f"listens on port {facts['port']}",
    "registered": lambda _, facts: "registered, by a signature of its key",
    "signed_off": lambda _, facts: "signed off",
    "claimed": Board._claimed,
    "submitted": Board._submitted,
    "lease.lapsed": Board._lapsed,
    "idle": Board._idle,
    "retrying": Board._trouble,
    "refused": Board._trouble,
    "failed": Board._trouble,
    "receipt_doubtful": Board._trouble,
}
