"""A bundle on its way in: each part is capped, digested as it streams, and kept on disk.

The files have no names on disk: nothing that a part is called can matter there, and whatever ends
this process, SIGKILL included, the kernel takes them back. Never more than one copy of a file is in
memory.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO
from uuid import UUID

from broker.documents.strict_json import quote
from broker.errors import InvalidBundle, InvalidRequest, TooLarge, Violation
from broker.results.bundle import CAPS

LEASE_FIELD = "lease_id"
LEASE_FIELD_MAX = 36


@dataclass(frozen=True, slots=True)
class Upload:
    """A bundle that has arrived whole: the lease it is for, and its files."""

    lease_id: UUID
    digests: Mapping[str, str]
    files: Mapping[str, IO[bytes]]
    size: int  # bytes of all files

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Not after the spool was closed."""
        descriptor = self.files[name].fileno()
        # Not through the file's own place in it, which a worker process and ours share.
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


class Spool:
    """Takes the parts of one upload; `close` removes what it stored."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._lease: bytearray | None = None
        self._name = ""
        self._size = 0
        self._total = 0
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def close(self) -> None:
        """Forget the upload. Safe to call twice."""
        for file in self._files.values():
            file.close()

    def begin(self, name: str) -> None:
        """A part called `name` begins. Raises InvalidBundle for one unknown or sent twice."""
        if name in self._files or (name == LEASE_FIELD and self._lease is not None):
            raise InvalidBundle(f"The part {name} is there twice.")
        if name != LEASE_FIELD and name not in CAPS:
            known = ", ".join([LEASE_FIELD, *CAPS])
            raise InvalidBundle(f"The part {quote(name)} is of no bundle; known parts: {known}.")
        self._name, self._size, self._hash = name, 0, hashlib.sha256()
        if name == LEASE_FIELD:
            self._lease = bytearray()
        else:
            self._file = self._files[name] = tempfile.TemporaryFile()  # noqa: SIM115 (see close)

    def write(self, chunk: bytes) -> None:
        """A piece of the part. Raises TooLarge beyond the part's cap."""
        self._size += len(chunk)
        cap = LEASE_FIELD_MAX if self._file is None else CAPS[self._name]
        if self._size > cap:
            raise TooLarge(f"The part {self._name} is larger than {cap} bytes.")
        if self._file is None:
            assert self._lease is not None
            self._lease += chunk
        else:
            self._total += len(chunk)
            self._hash.update(chunk)
            self._file.write(chunk)

    def end(self) -> None:
        """The part is over."""
        if self._file is not None:
            self._file.flush()  # a full disk is told here, and not when the file is read
            self._file = None
            self._digests[self._name] = self._hash.hexdigest()

    def finish(self) -> Upload:
        """Return the whole upload. Raises InvalidRequest when the lease_id is not one."""
        try:
            text = (self._lease or b"").decode("ascii")
            lease_id = UUID(text)
            if str(lease_id) != text:
                raise ValueError("not canonical")
        except ValueError:
            detail = "must be the claim's lease_id, a lower-case UUID"
            raise InvalidRequest(
                f"The field lease_id {detail}.", (Violation("/lease_id", detail),)
            ) from None
        return Upload(lease_id, dict(self._digests), dict(self._files), self._total)
