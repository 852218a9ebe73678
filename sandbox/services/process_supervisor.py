"""The leash: a small process that holds one private server and leaves nothing behind.

Both ends are here. The launcher's end, `ProcessSupervisor`, starts this file (`python -I -S
leash.py BASE UID GID`: standard library only) and writes one JSON order per line to its stdin:
{"verb": "start", ...}. The script's end, `ServerProcess`, answers each with one line on stdout:
{"value": ...} or {"error": "..."}. The folder it made is the first line it says.

Whatever ends the launcher, SIGKILL included, closes that pipe; the leash then stops the server
(SIGINT, and SIGKILL after 5 s), removes the folder and exits. It keeps the caller's uid, so it may
live where the server's user cannot look, while the server runs as UID:GID (-1: no change). If the
leash itself is killed, Linux ends the server for it (PR_SET_PDEATHSIG); the folder then stays,
unless the launcher is still there to remove it.

Limits: a copy of the launcher made by a bare fork() holds the pipe open too. On macOS only the
pipe protects: there is no PDEATHSIG and no adoption of orphans.
"""

import contextlib
import ctypes
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GRACE_S = 5  # a fast shutdown takes 0.1 s; what is not gone by now will not go by itself
RUN_S = 60  # initdb takes 0.5 s; a disk that needs a minute is broken
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, IPC_RMID = 1, 36, 0
LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None, use_errno=True)
# The caller's PG* and LC_* variables must not reach a private server.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


class SandboxError(Exception):
    """The sandbox's servers cannot be had."""


class ServerFailed(SandboxError):
    """A server did not start or is gone; the message ends with the tail of its log."""


class Account(NamedTuple):
    """The unprivileged user that servers run as when root starts them."""

    uid: int
    gid: int


def choose_account(kept: Path | None) -> Account | None:
    """Whom a server runs as: None for "as we are", which is right for everybody but root."""
    if os.geteuid() != 0:
        return None
    if kept and kept.exists() and (owner := kept.stat()).st_uid:
        return Account(owner.st_uid, owner.st_gid)
    users = {user.pw_name: user for user in pwd.getpwall() if user.pw_uid}
    user = users.get("postgres") or users.get("nobody") or next(iter(users.values()), None)
    if user is None:
        raise SandboxError("PostgreSQL refuses root, and there is no other user: add one")
    return Account(user.pw_uid, user.pw_gid)


def output_as(account: Account | None, *argv: str) -> str | None:
    """Return the output of a command run by the account; None if it may not, or it fails."""
    identity: dict[str, Any] = {}
    if account:
        identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        return subprocess.check_output(
            argv, cwd="/", text=True, stderr=subprocess.DEVNULL, timeout=10, **identity
        )
    except (OSError, subprocess.SubprocessError):
        return None


def base_for(account: Account | None) -> str:
    """Where the private folder goes: TMPDIR, unless a socket's path or the account cannot."""
    base = tempfile.gettempdir()
    plain = re.fullmatch(r"[\w./+-]{1,64}", base, re.ASCII)  # a socket's path has 107 bytes at most
    return base if plain and output_as(account, "test", "-x", base) is not None else "/tmp"  # noqa: S108


class ProcessSupervisor:
    """The launcher's end of a leash process: one order out, one answer back, from any thread."""

    def __init__(self, account: Account | None, lock: int | None = None) -> None:
        """Hold what it starts as `account`, and the file descriptor `lock`, until it ends."""
        base, (uid, gid) = base_for(account), account or (-1, -1)
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, base, str(uid), str(gid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
        try:
            self.folder = Path(self._answer())
        except BaseException:  # stopped in the middle of a start: the folder goes before we do
            self._end()
            raise

    def ask(self, verb: str, **order: Any) -> Any:
        """Give an order and wait for what came of it. Raises ServerFailed."""
        with self._turn:
            self._tell(verb, **order)
            return self._answer()

    def close(self) -> None:
        """Stop the server and remove the folder; both are gone when this returns. Safe twice."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)  # there still if the leash was killed

    def _end(self) -> None:
        with self._turn:
            self._tell("end")
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
        self._process.wait()

    def failure(self, what: str) -> ServerFailed:
        """An error that ends with the last lines of the server's log."""
        try:
            log = (self.folder / "log").read_text(errors="replace")
        except OSError:
            log = ""
        return ServerFailed("\n".join([what, *log.splitlines()[-20:]]))

    def _tell(self, verb: str, **order: Any) -> None:
        assert self._process.stdin is not None
        # BrokenPipeError: the leash was killed. ValueError: we closed the pipe ourselves.
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(json.dumps({"verb": verb, **order}).encode() + b"\n")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = b"" if self._process.stdout.closed else self._process.stdout.readline()
        answer = json.loads(line or b'{"error": "the server was stopped: its leash is gone"}')
        if "error" in answer:
            raise ServerFailed(answer["error"])
        return answer["value"]


class ServerProcess:
    """One method per verb; each returns what is said back, as JSON."""

    def __init__(self, folder: Path, uid: int, gid: int) -> None:
        self._folder = folder
        self._identity: dict[str, Any] = (
            {"user": uid, "group": gid, "extra_groups": []} if uid >= 0 else {}
        )
        self._server: subprocess.Popen[bytes] | None = None
        self._pidfile: Path | None = None

    def run(self, argv: list[str], feed: str) -> int:
        """Run a command to its end, `feed` on its stdin; its exit status."""
        with self._log() as log:
            options = self._options(signal.SIGKILL)
            done = subprocess.run(
                argv,
                input=feed.encode(),
                stdout=log,
                stderr=log,
                timeout=RUN_S,
                check=False,
                **options,
            )
        return done.returncode

    def start(self, argv: list[str], pidfile: str | None, death_signal: int) -> int:
        """Start the server (once the one before has ended); its pid."""
        self.stop()
        self._pidfile = Path(pidfile) if pidfile else None
        with self._log() as log:
            self._server = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._options(death_signal),
            )
        return self._server.pid

    def poll(self) -> int | None:
        """The server's exit status, None while it runs."""
        return self._server.poll() if self._server else 0

    def pause(self) -> None:
        """Freeze the server; it stands still when this returns."""
        if self._server and self._server.poll() is None:
            self._server.send_signal(signal.SIGSTOP)
            os.waitpid(self._server.pid, os.WUNTRACED)

    def resume(self) -> None:
        if self._server:
            self._server.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ask the server to end, make it if it does not; gone when this returns. Safe twice."""
        if self._server is None:
            return
        self._server.send_signal(signal.SIGINT)
        self._server.send_signal(signal.SIGCONT)  # a paused server cannot hear SIGINT
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(GRACE_S)
        self.kill()

    def kill(self) -> None:
        """End the server and its children at once, as a power cut would."""
        if self._server is None:
            return
        self._server.kill()
        self._server.wait()
        bury_orphans()
        if self._pidfile:
            forget_segment(self._pidfile, self._server.pid)
        self._server = None

    def _log(self):
        return (self._folder / "log").open("ab")

    def _options(self, death_signal: int) -> dict[str, Any]:
        return {
            "cwd": self._folder,  # initdb refuses to start where its user cannot look
            "env": ENVIRONMENT,
            "start_new_session": True,  # Ctrl-C in the terminal is for the launcher
            "preexec_fn": tie_to(os.getpid(), death_signal) if LINUX else None,
            **self._identity,
        }


def tie_to(parent: int, death_signal: int) -> Callable[[], None]:
    """Return the function for a child between fork and exec, so that it never outlives `parent`."""

    def tie() -> None:
        # subprocess calls this after setuid, which would have cleared the setting.
        if LIBC.prctl(PR_SET_PDEATHSIG, death_signal) != 0 or os.getppid() != parent:
            os._exit(70)  # the parent died before the setting took hold: no signal would come

    return tie


def bury_orphans() -> None:
    """End and reap what a killed server left: backends of PostgreSQL, a saving child of Redis.

    The leash adopts them (PR_SET_CHILD_SUBREAPER). One that lived on could write into the folder
    while it is removed, or commit after the "power cut".
    """
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def forget_segment(pidfile: Path, pid: int) -> None:
    """Remove the System V segment that a killed postmaster leaves in the kernel until reboot.

    The file's first line is the postmaster's pid, the seventh the segment's key and id. A clean
    stop removes both, and another server's file (it held the lock first) is not ours to act on.
    """
    with contextlib.suppress(OSError):
        lines = pidfile.read_text().splitlines()
        if lines[:1] == [str(pid)] and len(lines) > 6:
            LIBC.shmctl(int(lines[6].split()[1]), IPC_RMID, None)


def say(message: dict[str, Any]) -> None:
    # Not print(): its buffer would be flushed again at exit, and complain that nobody listens.
    os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def obey(keeper: ServerProcess, order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order; a command that cannot be run is an answer, not a crash."""
    try:
        return {"value": getattr(keeper, order.pop("verb"))(**order)}
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}


def serve(keeper: ServerProcess) -> None:
    """Orders until the pipe closes or {"verb": "end"} comes (a forked copy may hold the pipe)."""
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if order["verb"] == "end":
            return
        say(obey(keeper, order))


def remove(folder: Path) -> None:
    """Remove the folder, also from under processes of the launcher that write into it and die."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.02)


def main(base: str, uid: int, gid: int) -> None:
    """Make the folder, serve, and leave nothing behind."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The leash ends with its launcher, not before. A handler, because the server would
        # inherit SIG_IGN.
        signal.signal(number, lambda *_: None)
    if LINUX:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    folder = Path(tempfile.mkdtemp(prefix="bq-", dir=base))
    keeper = ServerProcess(folder, uid, gid)
    try:
        if uid >= 0:
            os.chown(folder, uid, gid)
        with contextlib.suppress(BrokenPipeError):  # the launcher died while it was answered
            say({"value": str(folder)})
            serve(keeper)
    finally:
        keeper.stop()
        remove(folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
