"""A file for log lines whose writer never raises and never blocks.

stderr may be full, closed, or a pipe that nobody reads. A line that raised would end the loop that
logs it; one that waited would freeze the process. So a thread writes, and what does not fit into
its queue, or cannot be written, is dropped and counted.
"""

import atexit
import io
import os
import queue
import threading
from typing import IO

LINES_MAX = 100_000  # some 30 MB, kept while nobody reads
LAST_WORDS_S = 1.0  # at the end of the process, for a reader that is slow


class LogWriter:
    """Writes lines to `stream` behind the caller; `dropped` counts those that were lost."""

    def __init__(self, stream: IO[str], lines_max: int = LINES_MAX) -> None:
        self.dropped = 0
        self._stream = stream
        self._lines: queue.Queue[str | threading.Event] = queue.Queue(lines_max)
        threading.Thread(target=self._write_all, name="log", daemon=True).start()
        atexit.register(self.drain)

    def write(self, text: str) -> int:
        """Take a line, or drop it; return its length."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self.dropped += 1
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread writes each line as soon as it can."""

    def drain(self, timeout_s: float = LAST_WORDS_S) -> None:
        """Wait until all lines before this call are written, but not longer than `timeout_s`."""
        written = threading.Event()
        try:
            self._lines.put(written, timeout=timeout_s)
        except queue.Full:
            return
        written.wait(timeout_s)

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            try:
                self._write(line)
            except Exception:  # a full disk, a closed pipe; whatever it is, the next line may do
                self.dropped += 1

    def _write(self, line: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except io.UnsupportedOperation:  # a test's stream is no file
            self._stream.write(line)
            return
        # Not through the stream: it holds a lock while it waits, on which the process would end.
        rest = line.encode(errors="backslashreplace")
        while rest:
            rest = rest[os.write(descriptor, rest) :]
