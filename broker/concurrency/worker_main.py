"""A worker process: `python -P -m broker.concurrency.worker_main`, see workers.py.

It verifies bundles and reads what admins enqueue. Standard input is a socket to the server. A
request is a pickle of a function and its arguments, with files as descriptors beside it; the answer
is a pickle of what it returned or of the exception. A process and not a thread: parsing 2 MB of
JSON holds the interpreter's lock, and heartbeats would wait for it.

It never outlives the server: when that ends, however, the socket hangs up, and a thread that waits
for nothing else ends this process. Signals of a terminal or of a service manager are for the
server, which lets its workers finish.
"""

import contextlib
import gc
import io
import os
import pickle
import select
import signal
import socket
import struct
import threading
import traceback

STDIN = 0
# Size of the pickle; for an answer also whether it is the worker's last one.
REQUEST, ANSWER = struct.Struct("!Q"), struct.Struct("!Q?")
MAX_FILES = 8
NICE = 10  # the server and its database come first: a heartbeat must not wait for the scheduler
# A worker that has read more than this is not used again: the memory of so large a result stays
# with the process, in pieces.
LARGE_BYTES = 4 * 1024 * 1024


def main() -> None:
    """Answer requests until the server hangs up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    # A server that was killed cannot be answered, and nobody reads what could be said of it.
    with contextlib.suppress(ConnectionError, EOFError):
        _serve(socket.socket(fileno=STDIN))


def _serve(line: socket.socket) -> None:
    # Not at the top: the imports take half a second, and the lines above must come before that.
    from broker.documents.schemas import load_schema

    for name in ("manifest", "result", "envelope", "enqueue"):
        load_schema(name)
    gc.freeze()
    gc.disable()  # a parsed result has no cycles; looking for them took a quarter of the time
    last = False
    while not last:
        head, descriptors, _, _ = socket.recv_fds(line, REQUEST.size, MAX_FILES)
        if not head:
            return
        files = [os.fdopen(descriptor, "rb") for descriptor in descriptors]
        try:
            request = _receive(line, REQUEST.unpack(head)[0])
            sizes = [len(request), *(os.fstat(file.fileno()).st_size for file in files)]
            last = max(sizes) > LARGE_BYTES
            answer = _answer(request, files)
        finally:
            for file in files:
                file.close()
        line.sendall(ANSWER.pack(len(answer), last))
        line.sendall(answer)
        del request, answer
        gc.collect()


def _answer(request: bytes, files: list[io.BufferedReader]) -> bytes:
    """Return the pickle of what the work came to. Without memory, it ends the process."""
    from auth.errors import AuthError
    from broker.errors import BrokerError

    try:
        work, names, arguments = pickle.loads(request)  # noqa: S301 (of the server)
        given = [] if names is None else [dict(zip(names, files, strict=True))]
        return pickle.dumps(work(*given, *arguments))
    except (AuthError, BrokerError) as error:
        return pickle.dumps(error)
    except MemoryError:
        raise
    except BaseException as error:  # a panic in a library's Rust is of no public class
        told = RuntimeError(f"{type(error).__name__} in a worker: {error}")
        told.add_note(traceback.format_exc())
        return pickle.dumps(told)


def _receive(line: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        piece = line.recv(size - len(received))
        if not piece:
            raise EOFError("the server hung up in the middle of a request")
        received += piece
    return bytes(received)


def _end_with_the_server() -> None:
    hangup = select.poll()
    hangup.register(STDIN, 0)  # a hang-up is told whatever is asked for
    hangup.poll()
    os._exit(0)


if __name__ == "__main__":
    main()
