"""Files of a folder that somebody else filled: read without waiting for what is no file."""

import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotAFile(Exception):
    """Something that must not be read; the message names it and says what it is."""


def read_file(path: Path, most: int, root: Path) -> bytes:
    """Return the first `most` bytes of a regular file, b"" of a folder.

    Raises NotAFile for a pipe, a socket, a device, and a link that leads out of `root`; OSError for
    what cannot be read.
    """
    if path.is_symlink() and not _is_below(path, root):
        raise NotAFile(f"{path.name} is a link out of the folder")
    if stat.S_ISDIR(_kind(path, path.stat())):
        return b""
    # Not blocking: somebody may put a pipe there meanwhile.
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(opened, "rb") as file:
        _kind(path, os.fstat(opened))
        return file.read(most)


def _kind(path: Path, found: os.stat_result) -> int:
    for is_kind, name in _KINDS:
        if is_kind(found.st_mode):
            raise NotAFile(f"{path.name} is {name}, not a file")
    return found.st_mode


def _is_below(path: Path, root: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return False
