"""Submit: a bundle streams in as multipart/form-data, each part capped, none trusted."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, ClassVar
from uuid import UUID

import asyncpg
import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from tornado.web import URLSpec

from broker.errors import (
    BrokerError,
    InvalidBundle,
    UnsupportedMediaType,
)
from broker.results.bundle import CAPS
from broker.results.uploads import Spool, Upload
from broker.services import Services
from handlers.base import UUID_PATH, read_flag
from handlers.runner_base import RunnerHandler

# Boundaries, part headers and the lease_id beside the files.
FRAMING_BYTES = 64 * 1024
# kind; name=value; name="value": as RFC 7578's clients write it. No bare comma: it may end a value.
_PARAMETER = re.compile(rb'[ \t]*;[ \t]*([!#-\'*+.^`|~\w-]+)=(?:"(?:[^"\\]|\\.)*"|[^\s;,"\\]*)')
_OPTIONS = re.compile(rb"[^\s;]+(?:" + _PARAMETER.pattern + rb")*[ \t]*;?[ \t]*")


class Parts:
    """Feeds a multipart stream into a spool. A part's name is its field name, and nothing else."""

    def __init__(self, boundary: bytes, spool: Spool) -> None:
        self._spool = spool
        self._headers: dict[bytes, bytes] = {}
        self._field = bytearray()
        self._value = bytearray()
        self.ended = False
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._headers.clear,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._part_begin,
            "on_part_data": lambda data, start, end: spool.write(data[start:end]),
            "on_part_end": spool.end,
            "on_end": self._end,
        }
        self._parser = python_multipart.MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def feed(self, chunk: bytes) -> None:
        """Take a piece of the body. Raises what the spool refuses, and InvalidBundle."""
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise InvalidBundle("The body is not multipart/form-data (RFC 7578).") from None

    def _header_end(self) -> None:
        name = bytes(self._field).lower()
        if name in self._headers:  # a proxy might go by the first
            raise InvalidBundle("A part has a header twice.")
        self._headers[name] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _part_begin(self) -> None:
        kind, options = _read_options(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"")
        if kind != b"form-data" or not name:
            raise InvalidBundle("A part has no Content-Disposition: form-data; name=...")
        self._spool.begin(name.decode("utf-8", "replace"))

    def _end(self) -> None:
        self.ended = True


class SubmitHandler(RunnerHandler):
    """POST /api/queue/{run_id}/submit."""

    event: ClassVar[str] = "run.submit"

    max_body_bytes = sum(CAPS.values()) + FRAMING_BYTES
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {"POST": ("validate_only",)}

    _parts: Parts | None = None
    _spool: Spool | None = None
    _refusal: BrokerError | OSError | None = None
    _whole = False
    _run: asyncpg.Record

    async def check(self) -> None:
        """Step 0, before the body is read: token and run known, and room for one more upload."""
        await super().check()
        self._run = await self.services.submissions.admit(self.runner, UUID(str(self.path_args[0])))
        self._spool = self.services.submissions.open_spool(self.runner.runner_id)
        self._parts = Parts(self._boundary(), self._spool)

    def check_media_type(self) -> None:
        """Raise UnsupportedMediaType unless the body is multipart/form-data."""
        if self.request.headers.get("Content-Encoding", "identity") != "identity":
            raise UnsupportedMediaType("Send the body without a Content-Encoding.")
        self._boundary()

    async def data_received(self, chunk: bytes) -> None:
        """Take a piece of the body. After a refusal the rest is dropped, and then answered."""
        if self._refusal is None and self._parts is not None:
            try:
                self._parts.feed(chunk)
            except (BrokerError, OSError) as error:  # the disk may be full
                self._refusal = error
        # While its sender keeps up, Tornado would take a whole bundle in without giving way.
        await asyncio.sleep(0)

    async def post(self, run_id: str) -> None:
        """Verify the bundle and write its rows: 201 with the receipt, 200 with an earlier one."""
        self._whole = True
        await self.services.credentials.check_revoked(self.runner)  # an upload takes minutes
        validate_only = self._validate_only()
        submissions = self.services.submissions
        try:
            upload = self._received()
        except BrokerError as error:
            if not validate_only:
                await submissions.refuse(self.runner, self._run["run_id"], error)
            raise
        if validate_only:
            verified = await submissions.verify(self.runner, self._run, upload)
            self.answer(200, {"valid": True, "run_id": run_id, "result_sha256": verified.digest})
            return
        row, created = await submissions.submit(self.runner, self._run, upload)
        self.answer(201 if created else 200, row["receipt"])

    def _validate_only(self) -> bool:
        return read_flag("validate_only", self.asked.get("validate_only", "0"))

    def _received(self) -> Upload:
        """Return the bundle that came in. Raises what stopped it."""
        assert self._spool is not None
        assert self._parts is not None
        if self._refusal is not None:
            raise self._refusal
        if not self._parts.ended:
            raise InvalidBundle("The multipart body ends before its last boundary.")
        return self._spool.finish()

    def on_finish(self) -> None:
        """Forget the upload, however it ended."""
        self._forget()

    def on_connection_close(self) -> None:
        """Forget what a runner had sent of its bundle when it hung up.

        One that has arrived whole is taken all the same, and counts as in flight until then: its
        runner may have lost the line only, and gets the receipt when it sends the bundle again.
        """
        if not self._whole:
            super().on_connection_close()
            self._forget()

    def _forget(self) -> None:
        if self._spool is not None:
            self.services.submissions.close_spool(self.runner.runner_id, self._spool)
            self._spool = None

    def _boundary(self) -> bytes:
        header = self.request.headers.get("Content-Type", "").encode("latin-1")
        kind, options = _read_options(header)
        boundary: Any = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 70:
            raise UnsupportedMediaType("Send multipart/form-data with a boundary (RFC 7578).")
        return boundary


def _read_options(header: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """Return a header's kind and parameters; nothing for one that two readers may read apart."""
    kind, options = parse_options_header(header)
    names = [name.lower() for name in _PARAMETER.findall(header)]
    if not _OPTIONS.fullmatch(header) or len(set(names)) < len(names):
        return b"", {}
    return kind, options


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    return [URLSpec(rf"/api/queue/{UUID_PATH}/submit", SubmitHandler, {"services": services})]
