"""Addresses that may hold a password: read in one way only, and shown without it.

A `/`, `?`, `#` or `@` in a password moves the place where a reader sees the host: one program
would connect elsewhere, another would print the password as if it were a path. So they must be
percent-encoded, and what can be read in two ways is refused. No error holds a part of the address.
"""

import re
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

HIDDEN = "********"
# Options that tell an operator where an address leads; the value of any other is hidden.
SHOWN_OPTIONS = {
    "host", "port", "dbname", "database", "db", "user", "sslmode", "sslrootcert", "sslcert",
    "target_session_attrs", "application_name", "default_transaction_read_only",
}  # fmt: skip
_URL = re.compile(r"([a-z][a-z0-9+]*)://(?:([^/?#@\[\]]*)@)?([^/?#@]*)(/[^?#@]*)?(?:\?([^#@]*))?")
_HOST = re.compile(r"(?:\[([0-9A-Za-z:.%_-]+)\]|([^:\[\]]*))(?::([0-9]{1,5}))?")
_NAME = re.compile(r"[A-Za-z0-9._-]*")
_OPTION = re.compile(r"[^=]+=.*")
HTTP = ("http", "https")


def check_url(url: str, *schemes: str) -> str:
    """Return `url`, which one of `schemes` begins. Raises ValueError, which holds no part of it."""
    if url.partition("://")[0] not in schemes:
        *most, last = (f"{scheme}://" for scheme in schemes)
        raise ValueError(f"must begin with {', '.join(most)} or {last}")
    if not _is_plain(url):
        raise ValueError(
            "is no address that can be read in one way only: percent-encode / ? # @ in names and"
            " passwords (%2F %3F %23 %40), write hosts as HOST, HOST:PORT or [IPv6]:PORT, and"
            " options as ?name=value&name=value"
        )
    return url


def check_http_url(url: str) -> str:
    """Return an absolute http(s) URL without its last slash. Raises ValueError, as `check_url`."""
    found = _URL.fullmatch(url)
    host = found and _HOST.fullmatch(found[3])
    plain = found and host and (host[1] or host[2]) and "," not in found[3] and _is_plain(url)
    if not (found and plain and found[1] in HTTP and found[2] is None and found[5] is None):
        raise ValueError(
            "is no plain web address: write http:// or https://, a host, a port if it is another"
            " than usual, and no user, ? or #, such as https://queue.example.org"
        )
    return url.rstrip("/")


def check_listen_address(address: str) -> str:
    """Return an IP address or a host's name; "" is every address. Raises ValueError."""
    try:
        ip_address(address)
    except ValueError:
        if not _NAME.fullmatch(address):
            raise ValueError(
                "is neither an IP address nor a host's name, such as 0.0.0.0, ::1 or localhost:"
                " write it without http://, brackets and port (that is LISTEN_PORT)"
            ) from None
    return address


def without_password(secret: str) -> str:
    """Return of an address what an operator looks for; of any other secret, nothing."""
    if not secret:
        return ""
    found = _URL.fullmatch(secret)
    if found is None or not _is_plain(secret):
        return HIDDEN
    scheme, user, hosts, path, options = found.groups("")
    name, colon, _ = user.partition(":")
    login = f"{name}:{HIDDEN}@" if colon else f"{name}@" if name else ""
    shown = "&".join(map(_shown_option, options.split("&"))) if options else ""
    return f"{scheme}://{login}{hosts}{path}{'?' if shown else ''}{shown}"


class Address(NamedTuple):
    """The parts of an address as they are written; empty where there is none."""

    scheme: str
    user: str  # and password, if any
    hosts: str
    path: str
    options: str


def split_address(url: str) -> Address:
    """Split an address, also one of several hosts. Raises ValueError, which holds no part of it.

    Not by urllib: since 3.11.4, and in Debian's 3.11.2, it refuses [IPv6] behind another host.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError("not an address")
    return Address(*found.groups(""))


def without_hosts(url: str) -> str:
    """Return an address without the hosts before its path: of those the driver is told apart."""
    scheme, user, _, path, options = split_address(url)
    login, asked = f"{user}@" if user else "", f"?{options}" if options else ""
    return f"{scheme}://{login}{path}{asked}"


def hosts_of(url: str) -> list[tuple[str, int | None]]:
    """Return each host and port that a plain address names, before its path or as options."""
    address = split_address(url)
    options = {name: values[-1] for name, values in parse_qs(address.options).items()}
    names, ports = address.hosts.split(","), [""]
    if not address.hosts:  # the driver reads the options of an address that names no host
        names, ports = (options.get(name, "").split(",") for name in ("host", "port"))
    places = [_HOST.fullmatch(name) for name in filter(None, names)]
    return [
        (unquote(name), int(port or ports[at % len(ports)] or 0) or None)
        for at, place in enumerate(places)
        if place
        for name, port in [(place[1] or place[2], place[3])]
    ]


def _is_plain(url: str) -> bool:
    found = _URL.fullmatch(url)
    if found is None or not url.isprintable() or " " in url:
        return False
    hosts = [_HOST.fullmatch(host) for host in found[3].split(",")]
    options = (found[5] or "").split("&") if found[5] is not None else []
    if found[3] and any(option.startswith(("host=", "port=")) for option in options):
        return False  # one driver goes by the option, and another by the host before the path
    return all(host and int(host[3] or 0) <= 65535 for host in hosts) and all(
        map(_OPTION.fullmatch, options)
    )


def _shown_option(option: str) -> str:
    name, _, value = option.partition("=")
    return f"{name}={value if name in SHOWN_OPTIONS else HIDDEN}"
