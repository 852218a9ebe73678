"""What runs beside B8's submits: a process that beats, and processes that verify for nobody."""

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext
from typing import Any

from bench.submits.actors import Runner, ask, closing

BEATS_PER_S, BEATERS = 200, 4
YARDSTICKS = 4  # unrelated processes that verify
FORK: ForkContext = multiprocessing.get_context("fork")


class Beats:
    """A process that beats; `during` returns the latencies in ms while `work` runs."""

    def __init__(self, runner: Runner, jobs: list[dict[str, Any]]) -> None:
        self._ours, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_beat, args=(theirs, runner, jobs), daemon=True)
        self._process.start()

    def during(self, seconds: float, work: Callable[[], Any]) -> tuple[list[float], Any]:
        """Beat for so long while `work` runs in this process."""
        self._ours.send(seconds)
        done = work()
        return self._ours.recv(), done

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _beat(orders: Connection, runner: Runner, jobs: list[dict[str, Any]]) -> None:
    while True:
        seconds = orders.recv()
        taken: list[float] = []
        start = time.perf_counter() + 0.1
        threads = [
            threading.Thread(target=_beater, args=(runner, jobs, start, seconds, n, taken))
            for n in range(BEATERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        orders.send(taken)


def _beater(
    runner: Runner, jobs: list[dict[str, Any]], start: float, seconds: float, which: int,
    taken: list[float],
) -> None:  # fmt: skip
    with closing(runner.port) as line:
        for number in range(which, int(seconds * BEATS_PER_S), BEATERS):
            due = start + number / BEATS_PER_S
            time.sleep(max(0.0, due - time.perf_counter()))
            job = jobs[number % len(jobs)]
            body = json.dumps({"lease_id": job["lease_id"]}).encode()
            path = f"/api/queue/{job['run_id']}/heartbeat"
            answer = ask(line, "POST", path, body, runner.headers)
            assert answer.status == 200, answer
            taken.append((time.perf_counter() - due) * 1e3)


@contextlib.contextmanager
def verifying_elsewhere(work: Callable[[], Any]) -> Iterator[None]:
    """Let unrelated processes do the same verification again and again."""

    def loop() -> None:
        os.nice(10)  # as the server's own workers
        while True:
            work()

    processes = [FORK.Process(target=loop, daemon=True) for _ in range(YARDSTICKS)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()
