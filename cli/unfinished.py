"""Folders that an export is still writing, and those that a killed one has left.

Whoever writes into one holds a lock on it, which the kernel lets go when the process ends, however
it ends. Where locks do not reach another host (some network file systems), a day's age decides.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".export-"
STALE_S = 86_400  # a result is written in minutes


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Yield a new folder in `folder`, to be renamed; if it is not, it is deleted."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    try:
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        finally:
            os.close(held)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def delete_stale(folder: Path, names: Container[str]) -> list[Path]:
    """Delete from `folder` what killed exports of this user have left there; return which.

    Only a folder named like ours, a day old, that no process holds, with no other files than
    `names`. What cannot be deleted stays.
    """
    return [path for path in sorted(folder.glob(f"{PREFIX}*")) if _delete(path, names)]


def _delete(path: Path, names: Container[str]) -> bool:
    with suppress(OSError):  # no folder, another user's, gone meanwhile, or held
        opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = os.fstat(opened)
            # Renamed while it was opened, it is a result by now.
            if not os.path.samestat(folder, path.lstat()):
                return False
            if folder.st_uid != os.geteuid() or time.time() - folder.st_mtime < STALE_S:
                return False
            with os.scandir(opened) as entries:
                files = list(entries)
            if not all(
                each.name in names and each.is_file(follow_symlinks=False) for each in files
            ):
                return False
            # Through the open folder, and never deeper: the path may be another folder's by now.
            for each in files:
                os.unlink(each.name, dir_fd=opened)
            path.rmdir()
            return True
        finally:
            os.close(opened)
    return False
