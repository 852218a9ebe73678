"""A private nginx with the balancer's file of `deploy/`: other ports, no TLS, and no limits per
address, as all clients are at one.

It runs on a leash, in a folder that goes with it, on the loopback interface only.
"""

import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox.services.process_supervisor import ProcessSupervisor, ServerFailed, choose_account

DEPLOYED = Path(__file__).parents[2] / "deploy/nginx.conf"
READY_S = 10.0
SERVER = re.compile(r"^( *server 127\.0\.0\.1):\d+( .*;)\n", re.MULTILINE)
LISTEN = "listen 443 ssl;"
LIMITS = re.compile(r"^ *limit_(?:conn|req) .*;\n", re.MULTILINE)
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
MAIN = """\
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
worker_processes 1;
events {{ worker_connections 512; }}
http {{
    log_format tries '$upstream_status';
    access_log {folder}/access.log tries;
{temporary}
{deployed}
}}
"""


class NginxMissing(ServerFailed):
    """There is no nginx on this machine: run `apt-get install nginx`."""

    def __init__(self) -> None:
        super().__init__(" ".join((self.__doc__ or "").split()))


@dataclass(frozen=True, slots=True)
class Balancer:
    """A running nginx: where it listens, and what it has done."""

    url: str
    folder: Path

    def passed_on(self) -> int:
        """Return how many requests it gave to a second process after a first one failed them."""
        return sum("," in line for line in (self.folder / "access.log").read_text().splitlines())

    def complaints(self) -> list[str]:
        """Return the lines of its error log."""
        return (self.folder / "error.log").read_text().splitlines()


@contextmanager
def balancer(ports: Sequence[int]) -> Iterator[Balancer]:
    """Yield an nginx in front of the processes at `ports`. Raises NginxMissing or ServerFailed."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        raise NginxMissing
    port = free_port()
    with closing(ProcessSupervisor(choose_account(None))) as leash:
        config = leash.folder / "nginx.conf"
        config.write_text(_config(leash.folder, port, ports))
        errors = str(leash.folder / "error.log")
        argv = [program, "-p", str(leash.folder), "-e", errors, "-c", str(config)]
        leash.ask("start", argv=argv, pidfile=None, death_signal=signal.SIGTERM)
        _await_port(leash, port)
        yield Balancer(f"http://127.0.0.1:{port}", leash.folder)


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _config(folder: Path, port: int, ports: Sequence[int]) -> str:
    temporary = "\n".join(f"    {name}_temp_path {folder}/{name};" for name in TEMPORARY)
    return MAIN.format(folder=folder, temporary=temporary, deployed=_deployed(port, ports))


def _deployed(port: int, ports: Sequence[int]) -> str:
    """The file of `deploy/`, its options untouched, for our ports and without TLS and limits."""
    text = DEPLOYED.read_text()
    first = SERVER.search(text)
    if first is None or text.count(LISTEN) != 1:
        raise ServerFailed(f"{DEPLOYED} has changed: its server or listen lines are not found")
    servers = "".join(f"{first[1]}:{each}{first[2]}\n" for each in ports)
    text = SERVER.sub("", text[: first.start()]) + servers + SERVER.sub("", text[first.end() :])
    text = LIMITS.sub("", text)
    return text.replace(LISTEN, f"listen 127.0.0.1:{port};")


def _await_port(leash: ProcessSupervisor, port: int) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and leash.ask("poll") is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise leash.failure("nginx did not start:")
