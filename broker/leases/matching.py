"""Matching of a runner's capabilities with the queue's backlog, model by model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

import asyncpg

from db.run_queue import Capabilities


@dataclass(frozen=True, slots=True)
class Offer:
    """The PENDING runs of one model and judge, counted up to a bound, and what they need."""

    model_name: str
    quantization: str
    judge_name: str | None  # of the model that judges its answers, if one does
    judge_quantization: str  # the model's own where none does
    need_gb: int  # of the larger of both: one is in VRAM at a time
    claimable: int
    deferred: int
    next_retry: datetime | None  # of the first deferred run
    due_in: timedelta | None  # the same, as it was from the database's clock
    pause_reason: str | None  # of the queue's or the model's pause

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """Return the offer of a row of `offers` of run_queue.sql."""
        return cls(**dict(row.items()))

    @property
    def name(self) -> str:
        """The name for people."""
        judged = f" judged by {self.judge_name}" if self.judge_name else ""
        return f"{self.model_name} {self.quantization}{judged}"

    @property
    def quantizations(self) -> frozenset[str]:
        """The quantizations that a runner must support to run it."""
        return frozenset({self.quantization, self.judge_quantization})

    @property
    def runs(self) -> int:
        """The number of them."""
        return self.claimable + self.deferred

    def fits(self, runner: Capabilities) -> bool:
        """Return whether the runner can run it: the VRAM rule and the quantization."""
        return (
            self.pause_reason is None
            and self.need_gb <= runner.vram_gb
            and self.quantizations <= {*runner.quantizations}
        )


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a runner gets none of `count` PENDING runs; `nearest` names the one closest to it."""

    code: str
    count: int
    detail: str
    nearest: str | None


def due_in(offers: Iterable[Offer], runner: Capabilities | None = None) -> timedelta | None:
    """Return how long until the first deferred run, that fits `runner` if given, comes due."""
    waits = (offer.due_in for offer in offers if runner is None or offer.fits(runner))
    return min((wait for wait in waits if wait is not None), default=None)


def reasons(offers: Sequence[Offer], runner: Capabilities) -> list[Reason]:
    """Sort the PENDING runs by what keeps this runner from them."""
    found = []
    if not offers:
        found.append(Reason("queue_empty", 0, "No run is PENDING.", None))
    if paused := [offer for offer in offers if offer.pause_reason is not None]:
        detail = f"paused by an admin: {paused[0].pause_reason}"
        found.append(Reason("paused", count(paused), detail, paused[0].name))
        offers = [offer for offer in offers if offer.pause_reason is None]
    if too_big := [offer for offer in offers if offer.need_gb > runner.vram_gb]:
        nearest = min(too_big, key=lambda offer: offer.need_gb)
        detail = f"needs {nearest.need_gb} GB, you offer {runner.vram_gb}"
        found.append(Reason("vram", count(too_big), detail, nearest.name))
    small = [offer for offer in offers if offer.need_gb <= runner.vram_gb]
    offered = frozenset(runner.quantizations)
    if unsupported := [offer for offer in small if not offer.quantizations <= offered]:
        missing = {name for offer in unsupported for name in offer.quantizations - offered}
        names = " or ".join(sorted(missing))
        detail = f"needs {names}, you offer {', '.join(runner.quantizations)}"
        found.append(Reason("quantization", count(unsupported), detail, unsupported[0].name))
    later = [(offer.next_retry, offer) for offer in offers if offer.fits(runner)]
    if deferred := [(due, offer) for due, offer in later if due is not None]:
        due, nearest = min(deferred, key=lambda each: each[0])
        runs = sum(offer.deferred for _, offer in deferred)
        found.append(Reason("retry_after", runs, f"not before {due:%Y-%m-%dT%H:%M:%SZ}",
                            nearest.name))  # fmt: skip
    return found


def failed_here(untils: Sequence[datetime | None]) -> list[Reason]:
    """Return the reason of PENDING runs that the runner failed, by when it asked for them again."""
    if not untils:
        return []
    asked = [until for until in untils if until is not None]
    detail = "failed on this runner: other runners that fit get them first"
    if len(asked) == len(untils):
        detail = f"failed on this runner, which asked to wait until {max(asked):%Y-%m-%dT%H:%M:%SZ}"
    return [Reason("failed_here", len(untils), detail, None)]


def count(offers: Iterable[Offer]) -> int:
    """Return how many runs these are."""
    return sum(offer.runs for offer in offers)
