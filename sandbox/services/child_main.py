"""Run a module that never outlives its starter.

    python -P -m sandbox.services.child_main MODULE [ARGUMENT...]

The starter holds the other end of our stdin and writes nothing. However it ends, SIGKILL included,
the pipe closes and this process ends at once. A death signal (PR_SET_PDEATHSIG) would do the same
on Linux only. -P keeps a `server.py` of the caller's working directory from being run for ours.
"""

import os
import runpy
import signal
import sys
import threading

STDIN = 0


def main() -> None:
    """Watch the pipe from a thread of its own and run the module as `python -m` would."""
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with_the_starter() -> None:
    while os.read(STDIN, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
