"""The processes that do what would hold the event loop: verify a bundle, read a large enqueue.

Started when they are needed, kept, and replaced.
Nothing of a request stays in a worker, and each request says all that it is verified by: a reload
needs no word to the workers, and what has begun ends with the verifier it began with.
"""

import asyncio
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import structlog

from broker.concurrency.worker_main import ANSWER, REQUEST

# The worst text found that the caps let through takes 2.4 s of a core, 3.4 when a runner key signed
# it (it is read twice), and a niced worker beside other load has waited for five times its work.
LIMIT_S = 60
PIECE = 256 * 1024

Result = TypeVar("Result")

log = structlog.get_logger()


class WorkerLost(Exception):
    """A worker ended, or did not come to an end, at its work."""


class Workers:
    """Lends a process to one piece of work at a time; the callers bound how many at once."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._lent: set[_Worker] = set()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers there are."""
        return [worker.process.pid for worker in (*self._idle, *self._lent)]

    def warm(self) -> None:
        """Start a worker, unless there is one, so that the first work need not wait for it."""
        if not self.pids:
            self._idle.append(_Worker())

    async def call(
        self,
        work: Callable[..., Result],
        *arguments: Any,
        files: Mapping[str, int] | None = None,
    ) -> Result:
        """Return what `work`, a module's function, makes of open files and `arguments`.

        The files, if any, go as descriptors and become its first argument, by their names. Raises
        what `work` raises of ours, and WorkerLost. A worker that is lost is gone, and the next call
        has a new one.
        """
        names = None if files is None else list(files)
        request = pickle.dumps((work, names, arguments))
        try:
            worker = self._take()
        except OSError as error:
            raise WorkerLost(f"cannot start a worker: {error}") from error
        self._lent.add(worker)
        keep = False
        try:
            async with asyncio.timeout(LIMIT_S):
                answer, last = await worker.ask(request, list((files or {}).values()))
            keep = not last
        except (OSError, EOFError, TimeoutError) as error:
            raise WorkerLost(f"worker {worker.process.pid}: {error!r}") from None
        finally:
            # Also when the request was cancelled: the answer would be the next one's.
            self._lent.discard(worker)
            if keep:
                self._idle.append(worker)
            else:
                await worker.end()
        outcome = pickle.loads(answer)  # noqa: S301 (of our own process)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        """End all workers. Whoever waits for one is told WorkerLost."""
        idle, self._idle = self._idle, []
        for worker in idle:
            await worker.end()
        for worker in self._lent:  # whose line somebody reads, and closes
            worker.process.kill()

    def _take(self) -> "_Worker":
        """The worker that was used last (the others' memory may be swapped out), or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            log.warning("worker.gone", pid=worker.process.pid)
            worker.line.close()
        return _Worker()


class _Worker:
    """One process, and our end of the line to it."""

    def __init__(self) -> None:
        """Start it. Raises OSError when the machine has no room for another process."""
        self.line, theirs = socket.socketpair()
        self.line.setblocking(False)
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "broker.concurrency.worker_main"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    # Our code, wherever we have it from, and nothing else of ours: what reads
                    # strangers' bytes needs no secrets.
                    env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,  # Ctrl-C in a terminal is for the server
                )
        except OSError:
            self.line.close()
            raise

    async def ask(self, request: bytes, descriptors: Sequence[int]) -> tuple[bytearray, bool]:
        """Return the answer, and whether it is the worker's last. Raises OSError or EOFError."""
        loop = asyncio.get_running_loop()
        # At once: nothing else is on the line of an idle worker, and so little fits into it.
        socket.send_fds(self.line, [REQUEST.pack(len(request))], descriptors)
        await loop.sock_sendall(self.line, request)
        size, last = ANSWER.unpack(await self._read(ANSWER.size))
        return await self._read(size), last

    async def end(self) -> None:
        """Kill it, if it still runs, and let the kernel forget it."""
        self.process.kill()
        self.line.close()
        await asyncio.to_thread(self.process.wait)

    async def _read(self, size: int) -> bytearray:
        loop, received = asyncio.get_running_loop(), bytearray()
        while len(received) < size:
            piece = await loop.sock_recv(self.line, min(PIECE, size - len(received)))
            if not piece:
                raise EOFError("it ended")
            received += piece
        return received
