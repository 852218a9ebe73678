"""Ctrl-C and SIGTERM as one exception, so that every `with` on the way out does its part."""

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Somebody ended us. A KeyboardInterrupt, because asyncio lets no other one through."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped at the first SIGINT or SIGTERM; a second must not cut the cleaning short."""
    # Asked for now, and kept: to find it, Python writes a file and removes it, and a stop between
    # the two would leave that file for ever.
    tempfile.gettempdir()
    before = {number: signal.signal(number, _stop) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: object) -> NoReturn:
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)
