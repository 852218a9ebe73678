"""The storm's server processes: `python -m tests.history.server_process`.

One process imports everything and waits; for each order (a JSON line on stdin) it forks a server
that runs production's `server.serve` with failpoints around named functions, and maybe a mutant.
A fork is ready in a tenth of the second that the imports take. The order's `control` is a Unix
socket of the checker: the server tells there what happens to it, hears there what to arm, and ends
when it closes. However the checker ends, stdin closes too, the parent ends, and Linux kills what
it forked (PR_SET_PDEATHSIG), a stopped one included.
"""

import asyncio
import json
import os
import random
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from pydantic import SecretStr

import server
from config.logging import configure_logging
from config.settings import Settings
from sandbox.services.process_supervisor import LINUX, tie_to
from tests.history import failpoints, mutants
from tests.history.failpoints import Failpoints, Strike

SECRETS = ("database_url", "token_keys", "receipt_keys")
PATHS = ("trusted_root", "signers_file")


def main() -> None:
    """Fork a server per order until stdin closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the checker, which ends us
    for line in iter(sys.stdin.readline, ""):
        parent = os.getpid()
        if os.fork() == 0:
            _become_server(json.loads(line), parent)


def _become_server(order: dict[str, Any], parent: int) -> None:
    """Serve to the end, in the fork. Nothing of the parent's runs after it."""
    code = 1
    try:
        if LINUX:
            tie_to(parent, signal.SIGKILL)()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(number, target)
        random.seed()
        asyncio.run(_serve(order))
        code = 0
    except server.DatabaseUnready:
        code = 75  # PostgreSQL is away: the checker starts another one soon
    except BaseException:
        # As the servers log, so that the checker shows how it ended and not how it began.
        died = {"event": "server.died", "exception": traceback.format_exc()}
        sys.stdout.write(json.dumps(died) + "\n")
    finally:
        sys.stdout.flush()
        os._exit(code)


async def _serve(order: dict[str, Any]) -> None:
    reader, writer = await asyncio.open_unix_connection(order["control"])

    def tell(message: dict[str, Any]) -> None:
        # Written to the kernel before this returns: the next line of the caller may be its last.
        writer.write(json.dumps(message).encode() + b"\n")

    points = Failpoints(tell)
    if order["mutant"]:
        mutants.MUTANTS[order["mutant"]]()
    failpoints.install(points)
    for point in order["armed"]:
        points.arm(point, Strike())
    tell({"event": "hello", "slot": order["slot"], "pid": os.getpid()})
    orders = asyncio.create_task(_obey(reader, points))
    settings = make_settings(order["settings"])
    configure_logging(settings.log_level, settings.log_format)
    bind = server._bind

    def bind_and_tell(settings: Settings) -> list[socket.socket]:
        sockets = bind(settings)
        tell({"event": "listening"})
        return sockets

    server._bind = bind_and_tell
    await server.serve(settings)
    orders.cancel()


def make_settings(given: dict[str, Any]) -> Settings:
    """Return the settings of an order; nothing comes from the environment but what it lacks."""
    typed: dict[str, Any] = {name: SecretStr(given[name]) for name in SECRETS}
    typed |= {name: Path(given[name]) for name in PATHS}
    return Settings(**{**given, **typed})


async def _obey(reader: asyncio.StreamReader, points: Failpoints) -> None:
    async for line in reader:
        order = json.loads(line)
        points.arm(order["point"], Strike(order["stall_s"]))
    os._exit(1)  # the checker is gone


if __name__ == "__main__":
    main()
