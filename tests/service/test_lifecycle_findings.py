"""What the state machine found, or might find only once in many thousand steps, step by step."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_state_machine import Lives
from tests.support.fleet import quiet_sweep
from tests.support.lifecycle_model import Lease
from tests.support.served_in_steps import serving


class Story(Lives):
    """The machine, told what to do; after every sweep the service must be what the model says."""

    def enqueue_small(self) -> None:
        self._enqueue(3, 100, 5)

    def take(self) -> Lease:
        lease = self._claim("B", f"key-{next(self._keys)}")
        assert lease is not None
        return lease

    def lapse_together(self, *leases: Lease) -> None:
        for lease in leases:
            self.fall_silent(lease.run)
        self.sweep()
        self.the_runs_are_what_the_model_says()
        self.the_runners_are_what_the_model_says()


@pytest.fixture
def story(
    make_settings: Callable[..., Settings],
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Story]:
    """A server, its model and a runner B that may hold two leases."""
    quiet_sweep(monkeypatch)
    configured = make_settings(retry_backoff_s=0)
    with asyncio.Runner() as loop, serving(loop, configured, sigstore) as fleet:
        yield Story(loop, fleet)


def test_a_cancelled_run_that_was_released_did_not_fail(story: Story) -> None:
    story.enqueue_small()
    lease = story.take()
    story.cancel(lease.run)
    for verb in (story.release, story.release):
        verb(lease, "holder", False)
    story.fail(lease, "holder", False, "oom")


def test_a_cancelled_run_that_failed_was_not_released(story: Story) -> None:
    story.enqueue_small()
    lease = story.take()
    story.cancel(lease.run)
    for code in ("oom", "oom"):
        story.fail(lease, "holder", False, code)
    story.release(lease, "holder", False)


def test_a_lease_from_before_a_resume_is_not_held_against_the_runner(story: Story) -> None:
    for _ in range(3):
        story.enqueue_small()
    before = story.take()
    story.resume("B")
    for _ in range(2):
        lease = story.take()
        story.lapse_together(lease)
        story.cancel(lease.run)
    story.lapse_together(before)


def test_a_lapse_that_cancels_ends_the_row_in_the_same_sweep_as_in_a_later_one(
    story: Story,
) -> None:
    for _ in range(4):
        story.enqueue_small()
    for _ in range(2):
        lease = story.take()
        story.lapse_together(lease)
        story.cancel(lease.run)
    silent, unwanted = story.take(), story.take()
    story.cancel(unwanted.run)
    story.lapse_together(silent, unwanted)


def test_a_key_that_is_used_again_after_its_lease_belongs_to_the_new_body(story: Story) -> None:
    story.enqueue_small()
    lease = story.take()
    story.release(lease, "holder", False)
    story.claim_with_a_used_key(lease, True)
    for other_body in (False, True):
        story.claim_with_a_used_key(lease, other_body)
