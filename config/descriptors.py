"""File descriptors: how many this process may open, and how many of them its clients may have.

Without descriptors left, a process can neither answer nor reach its database, and each try to
accept fails at once, for ever. So the limit is raised at the start, what the process itself needs
is kept out of its clients' reach, and the rest is how many connections there may be.
"""

import resource

from config.settings import Settings

# More would be of no use: a connection takes some 20 KB of the process, and as much of the kernel.
HIGHEST = 262_144
# The log, the event loop, listening sockets, Redis' clients and listeners, sockets that are still
# read after their answer, and what libraries open for a moment.
OWN = 192
FILES_PER_UPLOAD = 5
PER_WORKER = 2
# A process that could serve fewer is set up by mistake.
LEAST = 64


class TooFewDescriptors(Exception):
    """The process may open too few files; the message has the numbers and the fix."""


def raise_limit() -> None:
    """Let this process open as many files as the system's hard limit lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = HIGHEST if hard == resource.RLIM_INFINITY else min(hard, HIGHEST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connections_max(settings: Settings) -> int:
    """Return how many clients' connections fit beside what this process needs itself.

    Raises TooFewDescriptors.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = HIGHEST if soft == resource.RLIM_INFINITY else soft
    own = (
        OWN
        + settings.database_pool_max
        + settings.uploads_max * FILES_PER_UPLOAD
        + settings.verify_processes * PER_WORKER
    )
    least = own + LEAST
    if limit < least:
        raise TooFewDescriptors(
            f"this process may open {limit} files and needs {own} itself: raise the limit to"
            f" {least} or more (LimitNOFILE= of systemd, ulimit -Hn, --ulimit nofile= of Docker)"
        )
    return limit - own
