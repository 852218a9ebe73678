"""Hypothesis plays admins, runners and the clock; a small model says what each must be answered.

Sequential on purpose: races are the history checker's (tests/history). What fails is printed as the
steps that lead there, the shortest found; .hypothesis/ remembers them for the next run.
"""

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, TypeVar

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support import lifecycle_model as model
from tests.support.fleet import (
    CAPABILITIES,
    SMALL,
    Fleet,
    Runner,
    code_of,
    model_of,
    quiet_sweep,
)
from tests.support.lifecycle_model import Answer, Lease, Lifecycle, Run
from tests.support.served_in_steps import serving

PLAY = settings(
    max_examples=int(__import__("os").environ.get("SM", "25")),
    stateful_step_count=25,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# VRAM each needs (http.md: parameters x 1.063 for q8_0 x 1.15, rounded up); A runs the first one,
# B the second, C all of them.
MODELS = {3: SMALL, 10: model_of(8, "q8_0"), 37: model_of(30, "q8_0")}
VRAM_GB = {"A": 8, "B": 24, "C": 80}
MAX_LEASES = {"A": 1, "B": 2, "C": 2}
RUNS_MAX = 6
FAILURES = ("oom", "timeout", "infra_error", "refusal")

Result = TypeVar("Result")
# Who shows a lease: mostly the runner it was given to.
senders = st.sampled_from(("holder", "holder", "holder", "A", "B", "C"))
names = st.sampled_from("ABC")
# A lease_id that nobody was given, now and then.
strays = st.sampled_from((False, False, False, False, True))
_examples = count(1)


class Lives(RuleBasedStateMachine):
    """The service on one side, the model on the other: they must never disagree."""

    runs = Bundle("runs")
    leases = Bundle("leases")

    def __init__(self, loop: asyncio.Runner, fleet: Fleet) -> None:
        super().__init__()
        self._loop = loop
        self._fleet = fleet
        self._number = next(_examples)
        self._keys = count(1)
        self._model = Lifecycle(
            *(model.Runner(self._name(n), VRAM_GB[n], MAX_LEASES[n]) for n in VRAM_GB)
        )
        self._runners = {name: self._sign_on(name) for name in VRAM_GB}
        self._run_ids: dict[str, str] = {}
        self._jobs: dict[Lease, dict[str, Any]] = {}

    def teardown(self) -> None:
        """Leave nothing that the next example could claim, and nobody else who could claim it."""
        self._wait(self._fleet.pool.execute("DELETE FROM run_queue"))
        self._wait(self._fleet.pool.execute("UPDATE runners SET drain_requested_at = now()"))

    @initialize(
        target=runs, needs=st.lists(st.sampled_from(sorted(MODELS)), min_size=3, max_size=3)
    )
    def some_runs(self, needs: list[int]) -> Any:
        # The later, the more urgent: the order of the queue is not the order of arrival.
        return multiple(*(self._enqueue(need, 100 - 5 * n, 3) for n, need in enumerate(needs)))

    @precondition(lambda self: len(self._model.runs) < RUNS_MAX)
    @rule(
        target=runs,
        need=st.sampled_from(sorted(MODELS)),
        priority=st.sampled_from((100, 90, 105)),
        max_attempts=st.integers(1, 4),
    )
    def enqueue(self, need: int, priority: int, max_attempts: int) -> Run:
        return self._enqueue(need, priority, max_attempts)

    @rule(target=leases, name=names, times=st.integers(1, 2))
    def claim(self, name: str, times: int) -> Any:
        given = [self._claim(name, f"key-{next(self._keys)}") for _ in range(times)]
        return multiple(*(lease for lease in given if lease is not None))

    @rule(target=leases, lease=leases, other_body=st.booleans())
    def claim_with_a_used_key(self, lease: Lease, other_body: bool) -> Any:
        given = self._claim(self._letter(lease), lease.claim_key, other_body=other_body)
        return multiple() if given is None else given

    @rule(lease=leases, sender=senders, stray=strays)
    def heartbeat(self, lease: Lease, sender: str, stray: bool) -> None:
        name, shown, job = self._shown(lease, sender, stray)
        answer = self._wait(self._runners[name].heartbeat(job))
        self._agree(answer, self._model.heartbeat(self._twin(name), lease.run, shown))

    @rule(lease=leases, sender=senders, stray=strays)
    def release(self, lease: Lease, sender: str, stray: bool) -> None:
        name, shown, job = self._shown(lease, sender, stray)
        answer = self._wait(self._runners[name].release(job))
        self._agree(answer, self._model.release(self._twin(name), lease.run, shown))

    @rule(lease=leases, sender=senders, stray=strays, code=st.sampled_from(FAILURES))
    def fail(self, lease: Lease, sender: str, stray: bool, code: str) -> None:
        name, shown, job = self._shown(lease, sender, stray)
        answer = self._wait(self._runners[name].fail(job, code))
        self._agree(answer, self._model.fail(self._twin(name), lease.run, shown, code))

    @rule(lease=leases, sender=senders, stray=strays, changed=st.booleans())
    def submit(self, lease: Lease, sender: str, stray: bool, changed: bool) -> None:
        name, shown, job = self._shown(lease, sender, stray)
        at = "2025-11-23T12:00:01Z" if changed else "2025-11-23T12:00:00Z"
        runner = self._runners[name]
        answer = self._wait(runner.submit(job, runner.bundle(job, timestamp=at)))
        self._agree(answer, self._model.submit(self._twin(name), lease.run, shown, at))

    @rule(run=runs)
    def fall_silent(self, run: Run) -> None:
        if run.live:
            self._wait(self._fleet.overdue(self._run_ids[run.name]))
            run.overdue = True

    @rule()
    def sweep(self) -> None:
        assert self._wait(self._fleet.sweep()) == self._model.sweep()

    @rule(name=names)
    def lapse(self, name: str) -> None:
        """A runner dies: all it holds falls silent, and the sweep comes by."""
        for run in self._model.held(self._twin(name)):
            self.fall_silent(run)
        self.sweep()

    @rule(run=runs)
    def cancel(self, run: Run) -> None:
        self._agree(self._steer_run(run, "cancel"), self._model.cancel(run))

    @rule(run=runs)
    def requeue(self, run: Run) -> None:
        self._agree(self._steer_run(run, "requeue"), self._model.requeue(run))

    @rule(name=names)
    def revoke_or_admit(self, name: str) -> None:
        if self._twin(name).revoked:
            self._admit(name)
        else:
            self._revoke(name)

    @rule(name=names, verb=st.sampled_from(("pause", "drain")))
    def pause_or_drain(self, name: str, verb: str) -> None:
        self._steer_runner(name, verb, {"reason": "test"} if verb == "pause" else {})
        setattr(self._twin(name), "paused" if verb == "pause" else "draining", True)

    @rule(name=names)
    def resume(self, name: str) -> None:
        self._steer_runner(name, "resume", {})
        self._model.resume(self._twin(name))

    @invariant()
    def the_runs_are_what_the_model_says(self) -> None:
        pages = self._wait(self._pages())
        for run, page in zip(self._model.runs, pages, strict=True):
            assert {name: page[name] for name in ("status", "attempt_count", "priority")} == {
                "status": run.status, "attempt_count": run.attempt_count, "priority": run.priority,
            }, run.name  # fmt: skip
            shown = None if run.status == "PENDING" else run.holder
            assert page["claimed_by"] == (shown.name if shown else None), run.name
            assert page["lease_seq"] == len(page["attempts"]) == len(run.leases), run.name
            assert [attempt["how"] for attempt in page["attempts"]] == [
                lease.how for lease in run.leases
            ], run.name
            assert (page["receipt"] is not None) == (run.status == "COMPLETE"), run.name
        for name, most in MAX_LEASES.items():
            held = [p for p in pages if p["status"] in model.LIVE
                    and p["claimed_by"] == self._name(name)]  # fmt: skip
            assert len(held) <= most, name

    @invariant()
    def the_runners_are_what_the_model_says(self) -> None:
        for runner in self._model.runners.values():
            page = self._wait(self._fleet.admin("GET", f"/runners/{runner.name}")).json()
            assert (page["paused_at"] is not None) == runner.paused, runner.name
            held = {self._run_ids[run.name] for run in self._model.held(runner)}
            assert set(page["current_runs"]) == held, runner.name

    def _enqueue(self, need: int, priority: int, max_attempts: int) -> Run:
        run = Run(f"run-{len(self._run_ids) + 1}", need, priority, max_attempts)
        self._run_ids[run.name] = self._wait(
            self._fleet.enqueue(model=MODELS[need], priority=priority, max_attempts=max_attempts)
        )
        self._model.enqueue(run)
        return run

    def _claim(self, name: str, key: str, *, other_body: bool = False) -> Lease | None:
        """Claim; return the lease if it is a new one."""
        body = {"explain": False} if other_body else {}
        answer = self._wait(self._runners[name].claim(key=key, **body))
        twin = self._twin(name)
        expected, lease = self._model.claim(twin, key, other_body=other_body)
        self._agree(answer, expected)
        if expected is model.LEASE_LIMIT:
            held = {self._run_ids[run.name] for run in self._model.held(twin)}
            assert set(answer.json()["held_run_ids"]) == held
        if lease is None:
            return None
        job = answer.json()
        assert job["run_id"] == self._run_ids[lease.run.name]
        if lease in self._jobs:
            assert job["lease_id"] == self._jobs[lease]["lease_id"]
            return None
        assert job["attempt"] == len(lease.run.leases)
        assert job["lease_id"] not in {old["lease_id"] for old in self._jobs.values()}
        self._jobs[lease] = job
        return lease

    def _revoke(self, name: str) -> None:
        path = f"/runner-keys/{self._runners[name].fingerprint}"
        answer = self._wait(self._fleet.admin("DELETE", path, json={"reason": "test"}))
        freed, review = self._model.revoke(self._twin(name))
        assert answer.status_code == 200, answer.text
        for member, runs in (("freed_runs", freed), ("results_to_review", review)):
            assert set(answer.json()[member]) == {self._run_ids[run.name] for run in runs}, member

    def _admit(self, name: str) -> None:
        before = self._runners[name]
        self._runners[name] = self._sign_on(name)
        self._model.admit(self._twin(name))
        # A new key does not bring the old one back.
        assert code_of(self._wait(before.claim())) == model.KEY_REVOKED

    def _sign_on(self, name: str) -> Runner:
        async def sign_on() -> Runner:
            runner = await self._fleet.admit(self._name(name), max_leases=MAX_LEASES[name])
            runner.capabilities = {**CAPABILITIES, "vram_gb": VRAM_GB[name]}
            assert (await runner.register()).is_success
            return runner

        return self._wait(sign_on())

    def _steer_run(self, run: Run, verb: str) -> httpx.Response:
        path = f"/queue/{self._run_ids[run.name]}/{verb}"
        return self._wait(self._fleet.admin("POST", path, json={"reason": "test"}))

    def _steer_runner(self, name: str, verb: str, body: dict[str, str]) -> None:
        path = f"/runners/{self._name(name)}/{verb}"
        answer = self._wait(self._fleet.admin("POST", path, json=body))
        assert answer.status_code == 200, answer.text

    def _shown(
        self, lease: Lease, sender: str, stray: bool
    ) -> tuple[str, Lease | None, dict[str, Any]]:
        """Who sends, the lease they show (None: one that nobody was given), and its job."""
        job = self._jobs[lease]
        if stray:
            job = {**job, "lease_id": str(uuid.uuid4())}
        name = self._letter(lease) if sender == "holder" else sender
        return name, None if stray else lease, job

    async def _pages(self) -> list[dict[str, Any]]:
        paths = [f"/queue/{self._run_ids[run.name]}" for run in self._model.runs]
        return [(await self._fleet.admin("GET", path)).json() for path in paths]

    def _agree(self, answer: httpx.Response, expected: Answer) -> None:
        if isinstance(expected.says, str):
            assert code_of(answer) == expected
            return
        body = answer.json() if answer.content else {}
        assert answer.status_code == expected.status, answer.text
        assert {name: body.get(name) for name in expected.says} == expected.says

    def _name(self, name: str) -> str:
        return f"runner-{name}-{self._number}"

    def _letter(self, lease: Lease) -> str:
        return lease.runner.name.split("-")[1]

    def _twin(self, name: str) -> model.Runner:
        return self._model.runners[self._name(name)]

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._loop.run(work)


def test_every_answer_and_every_state_is_what_the_model_says(
    make_settings: Callable[..., Settings],
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet_sweep(monkeypatch)
    # A failed run is claimable at once; the waits have tests of their own.
    configured = make_settings(retry_backoff_s=0)
    with asyncio.Runner() as loop, serving(loop, configured, sigstore) as fleet:

        class Play(Lives):
            def __init__(self) -> None:
                super().__init__(loop, fleet)

        run_state_machine_as_test(Play, settings=PLAY)
