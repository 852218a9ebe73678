"""What docs/lifecycle.md says of runs and leases, in plain Python.

No clock: what happens gets a number (`_tick`), and whether a lease is overdue is a flag of its run.
Every method is one request (or one pass of the sweep) and returns the answer it must get.
"""

from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

LIVE = ("CLAIMED", "IN_PROGRESS")
RESULT_CODES = ("refusal", "malformed_output", "capability_gap")
# The sweep waits when more overdue leases than this, and more than half of the live ones, are there
# at once.
MASS = 3
SILENCES = 3
HANDED_BACK = 10


class Answer(NamedTuple):
    """A status, and what the body must say: the code of a refusal, or members of a success."""

    status: int
    says: str | dict[str, Any]


KEY_REVOKED = Answer(403, "key_revoked")
RUNNER_PAUSED = Answer(403, "runner_paused")
LEASE_LOST = Answer(409, "lease_lost")
LEASE_LIMIT = Answer(409, "lease_limit")
RUN_FINISHED = Answer(409, "run_finished")
ALREADY_COMPLETE = Answer(409, "already_complete")
CONFLICT = Answer(409, "conflict")
NOT_A_FAILURE = Answer(422, "invalid_request")
NOTHING = Answer(204, {})
OK = Answer(200, {})


@dataclass(eq=False)
class Runner:
    """A runner on the allowlist; `key_number` counts the keys it has had."""

    name: str
    vram_gb: int
    max_leases: int
    key_number: int = 1
    revoked: bool = False
    paused: bool = False
    draining: bool = False
    resumed_at: int = 0
    leases: list["Lease"] = field(default_factory=list)


@dataclass(eq=False)
class Run:
    """A run of the queue. `secret` is the lease whose lease_id the service still remembers."""

    name: str
    need_gb: int
    priority: int
    max_attempts: int
    status: str = "PENDING"
    attempt_count: int = 0
    holder: Runner | None = None
    secret: "Lease | None" = None
    overdue: bool = False
    cancel_requested: bool = False
    requeued_at: int = 0
    accepted: str | None = None
    leases: list["Lease"] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether somebody works on it."""
        return self.status in LIVE


@dataclass(eq=False)
class Lease:
    """One lease, for ever: how it ended, and what the request that ended it was told."""

    run: Run
    runner: Runner
    key_number: int
    claim_key: str
    other_body: bool
    claimed_at: int
    how: str | None = None
    ended_by: str | None = None
    told: Answer = OK

    def __repr__(self) -> str:
        return f"<lease of {self.run.name} by {self.runner.name}: {self.how or 'live'}>"


class Lifecycle:
    """The queue, the fleet, and everything that may be asked of them."""

    def __init__(self, *runners: Runner) -> None:
        self.runs: list[Run] = []
        self.runners = {runner.name: runner for runner in runners}
        self._ticks = count(1)

    def enqueue(self, run: Run) -> None:
        """Add a run at the end of the queue (of its priority)."""
        self.runs.append(run)

    def held(self, runner: Runner) -> list[Run]:
        """Return the runs a runner works on."""
        return [run for run in self.runs if run.live and run.holder is runner]

    def claim(
        self, runner: Runner, key: str, *, other_body: bool = False
    ) -> tuple[Answer, Lease | None]:
        """Give the runner the first run that fits, or again the lease of the same key."""
        if runner.revoked:
            return KEY_REVOKED, None
        for run in self.held(runner):
            if run.secret is not None and run.secret.claim_key == key:
                same_body = run.secret.other_body == other_body
                return (OK, run.secret) if same_body else (CONFLICT, None)
        if runner.paused:
            return RUNNER_PAUSED, None
        if runner.draining:
            return NOTHING, None
        if len(self.held(runner)) >= runner.max_leases:
            return LEASE_LIMIT, None
        fitting = [
            run
            for run in self.runs
            if run.status == "PENDING" and _fits(runner, run) and not self._avoids(runner, run)
        ]
        if not fitting:
            return NOTHING, None
        # Of equals the largest, then the oldest: min takes the first.
        run = min(fitting, key=lambda r: (r.priority, -r.need_gb))
        lease = Lease(run, runner, runner.key_number, key, other_body, next(self._ticks))
        run.status, run.holder, run.secret = "CLAIMED", runner, lease
        run.leases.append(lease)
        runner.leases.append(lease)
        return OK, lease

    def _avoids(self, runner: Runner, run: Run) -> bool:
        """Whether the runner failed the run, and another one, that did not, could take it."""
        return _failed(runner, run) and any(
            _fits(other, run)
            and not (other.paused or other.draining or other.revoked or _failed(other, run))
            for other in self.runners.values()
            if other is not runner
        )

    def heartbeat(self, runner: Runner, run: Run, lease: Lease | None) -> Answer:
        """Renew a lease, overdue or not, and say what to do with it."""
        if not _holds(runner, run, lease):
            return _refusal(runner, run)
        run.status, run.overdue = "IN_PROGRESS", False
        directive = "drain" if runner.draining else "continue"
        return Answer(200, {"directive": "cancel" if run.cancel_requested else directive})

    def release(self, runner: Runner, run: Run, lease: Lease | None) -> Answer:
        """Hand a lease back: no attempt is burnt."""
        if not _holds(runner, run, lease):
            return _again("release", runner, run, lease)
        status = "CANCELLED" if run.cancel_requested else "PENDING"
        told = _hand_back(run, status, "release", "released", Answer(200, {"status": status}))
        ended = [each for each in runner.leases if each.how and each.claimed_at > runner.resumed_at]
        if [each.how for each in ended[-HANDED_BACK:]] == HANDED_BACK * ["released"]:
            runner.paused = True
        return told

    def fail(self, runner: Runner, run: Run, lease: Lease | None, code: str) -> Answer:
        """End a lease by a failure: the attempt counts, the run goes further back."""
        if runner.revoked:
            return KEY_REVOKED
        if code in RESULT_CODES:
            return NOT_A_FAILURE
        if not _holds(runner, run, lease):
            return _again("fail", runner, run, lease)
        status = "CANCELLED"
        if not run.cancel_requested:
            run.attempt_count += 1
            status = "FAILED" if run.attempt_count >= run.max_attempts else "PENDING"
        if status == "PENDING":
            run.priority += 5 * run.attempt_count
        told = Answer(200, {"status": status, "attempt_count": run.attempt_count})
        _hand_back(run, status, "fail", "failed", told)
        if status != "CANCELLED" and _in_a_row(runner, "failed"):
            runner.paused = True
        return told

    def sweep(self) -> int:
        """End the overdue leases, unless there are suspiciously many; return how many."""
        live = [run for run in self.runs if run.live]
        overdue = [run for run in live if run.overdue]
        if len(overdue) > MASS and 2 * len(overdue) > len(live):
            return 0
        for run in overdue:
            self._lapse(run)
        for runner in {id(run.holder): run.holder for run in overdue}.values():
            if runner is not None and _in_a_row(runner, "lapsed"):
                runner.paused = True
        return len(overdue)

    def submit(self, runner: Runner, run: Run, lease: Lease | None, digest: str) -> Answer:
        """Accept a result behind the fence; the same one again is answered the same."""
        if runner.revoked:
            return KEY_REVOKED
        if run.status in ("FAILED", "CANCELLED"):
            return RUN_FINISHED
        if run.status == "COMPLETE":
            same = run.holder is runner and run.accepted == digest
            return OK if same else ALREADY_COMPLETE
        if run.holder is not runner or lease is None or run.secret is not lease:
            return LEASE_LOST
        lease.how = "completed"
        run.status, run.accepted, run.secret, run.overdue = "COMPLETE", digest, None, False
        return Answer(201, {})

    def cancel(self, run: Run) -> Answer:
        """Cancel a run that nobody works on; ask the runner of one that somebody does."""
        if run.status in ("COMPLETE", "FAILED"):
            return RUN_FINISHED
        if run.live:
            run.cancel_requested = True
            return Answer(202, {"status": run.status, "cancel_requested": True})
        run.status, run.secret = "CANCELLED", None
        return Answer(200, {"status": "CANCELLED", "cancel_requested": False})

    def requeue(self, run: Run) -> Answer:
        """Put a run that ended without a result back, as if it had never been tried."""
        if run.status == "COMPLETE":
            return RUN_FINISHED
        if run.live:
            return CONFLICT
        if run.status != "PENDING":
            run.status, run.attempt_count, run.requeued_at = "PENDING", 0, next(self._ticks)
            run.holder, run.secret, run.cancel_requested = None, None, False
        return Answer(200, {"status": "PENDING"})

    def revoke(self, runner: Runner) -> tuple[list[Run], list[Run]]:
        """Revoke a key: return the runs it frees, and those whose results need a review."""
        runner.revoked = True
        freed = self.held(runner)
        for lease in runner.leases:
            run = lease.run
            if run.secret is not lease or run.status == "FAILED":
                continue
            if run.live:
                run.status, lease.how = (
                    "CANCELLED" if run.cancel_requested else "PENDING",
                    "revoked",
                )
            run.holder, run.secret, run.overdue = None, None, False
        mine = [lease for lease in runner.leases if lease.key_number == runner.key_number]
        review = [lease.run for lease in mine if lease.how == "completed"]
        return freed, review

    def admit(self, runner: Runner) -> None:
        """Put a new key of the runner on the allowlist: a pause is the runner's, and stays."""
        runner.revoked, runner.key_number = False, runner.key_number + 1

    def resume(self, runner: Runner) -> None:
        """Undo a pause and a drain, and forget the silences that came before."""
        runner.paused = runner.draining = False
        runner.resumed_at = next(self._ticks)

    def _lapse(self, run: Run) -> None:
        lease = run.leases[-1]
        run.overdue = False
        if run.cancel_requested:
            run.status, run.secret, lease.how = "CANCELLED", None, "cancelled"
            return
        lease.how = "lapsed"
        run.attempt_count += 1
        silent = {
            each.runner.name
            for each in run.leases
            if each.how == "lapsed" and each.claimed_at > run.requeued_at
        }
        lost = run.attempt_count >= run.max_attempts or len(silent) >= SILENCES
        run.status = "FAILED" if lost else "PENDING"


def _fits(runner: Runner, run: Run) -> bool:
    return run.need_gb <= runner.vram_gb


def _failed(runner: Runner, run: Run) -> bool:
    return any(
        lease.runner is runner and lease.how == "failed" and lease.claimed_at > run.requeued_at
        for lease in run.leases
    )


def _holds(runner: Runner, run: Run, lease: Lease | None) -> bool:
    mine = lease is not None and run.secret is lease and run.holder is runner
    return mine and run.live and not runner.revoked


def _refusal(runner: Runner, run: Run) -> Answer:
    if runner.revoked:
        return KEY_REVOKED
    return RUN_FINISHED if run.status in ("COMPLETE", "FAILED", "CANCELLED") else LEASE_LOST


def _again(verb: str, runner: Runner, run: Run, lease: Lease | None) -> Answer:
    """The request that ended the lease gets its answer again; any other is refused."""
    same = lease is not None and lease.run is run and lease.runner is runner
    if same and lease is not None and lease.ended_by == verb and not runner.revoked:
        return lease.told
    return _refusal(runner, run)


def _hand_back(run: Run, status: str, verb: str, how: str, told: Answer) -> Answer:
    lease = run.leases[-1]
    lease.how, lease.ended_by, lease.told = how, verb, told
    if status == "CANCELLED":
        lease.how = "cancelled"
    run.status, run.holder, run.secret, run.overdue = status, None, None, False
    return told


def _in_a_row(runner: Runner, how: str) -> bool:
    """Whether the last three leases that ended, since the last resume, did so on different runs."""
    ended = [lease for lease in runner.leases if lease.how and lease.claimed_at > runner.resumed_at]
    runs = {lease.run.name for lease in ended[-SILENCES:] if lease.how == how}
    return len(runs) == SILENCES
