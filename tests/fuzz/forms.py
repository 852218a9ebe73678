"""Multipart bodies and their HTTP framing: as they should be, and in every way they should not."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.fuzz.json_mutators import cut, flip, splice

Rng = random.Random
BOUNDARY = b"bakeoff-fuzz-7f3a"
CRLF = b"\r\n"


@dataclass
class Part:
    """One part of a form."""

    headers: list[bytes]
    content: bytes


@dataclass
class Form:
    """A multipart/form-data body before it is written."""

    parts: list[Part]
    boundary: bytes = BOUNDARY
    before: bytes = b""
    after: bytes = CRLF
    closing: bytes = b"--"
    newline: bytes = CRLF
    content_type: str = f"multipart/form-data; boundary={BOUNDARY.decode()}"

    def write(self) -> bytes:
        """Return the body."""
        pieces = [self.before]
        for part in self.parts:
            lines = [b"--" + self.boundary, *part.headers, b"", b""]
            pieces += [self.newline.join(lines), part.content, self.newline]
        return b"".join([*pieces, b"--", self.boundary, self.closing, self.after])


@dataclass
class Request:
    """A request as it is sent, and the bodies that a reader of HTTP may see in it.

    `whole`: it ends, so an answer must come. `last`: nothing can follow it on the connection.
    """

    headers: list[str]
    body: bytes
    readings: tuple[bytes, ...]
    whole: bool = True
    last: bool = False
    content_type: str = field(default="")


def form_of(lease_id: str, files: list[tuple[str, bytes]]) -> Form:
    """Return a form as an honest runner sends it."""
    return Form([_part("lease_id", lease_id.encode()), *(_part(*file) for file in files)])


def mutate_form(rng: Rng, form: Form) -> str:
    """Change the form's structure; return what was done."""
    change = rng.choice(_FORM_CHANGES)
    change(rng, form)
    return change.__name__.strip("_")


def mutate_body(rng: Rng, body: bytes) -> bytes:
    """Change bytes of the written body, mostly where its framing is."""
    if rng.random() < 0.5:
        at = body.find(b"--", rng.randrange(len(body) + 1))
        at = max(at, 0)
        return (
            body[:at] + rng.choice([flip, cut, splice])(rng, body[at : at + 80]) + body[at + 80 :]
        )
    return rng.choice([flip, cut, splice])(rng, body)


def framed(form: Form, body: bytes) -> Request:
    """Return an honest request around a body."""
    return Request([f"Content-Length: {len(body)}"], body, (body,), content_type=form.content_type)


def misframed(rng: Rng, form: Form, body: bytes) -> tuple[str, Request]:
    """Return the request in an odd HTTP framing, and which."""
    make = rng.choice(_FRAMINGS)
    request = make(rng, body)
    request.content_type = form.content_type
    return make.__name__.strip("_"), request


def _part(name: str, content: bytes) -> Part:
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="{name}"'
    return Part([disposition.encode()], content)


# The form


def _boundary_in_content(rng: Rng, form: Form) -> None:
    part = rng.choice(form.parts)
    ends = [b"", CRLF, b"--", b"x", b" \r\n", b"\n", b"--\r\n"]
    part.content += rng.choice([CRLF, b"\n", b"\r", b""]) + b"--" + form.boundary + rng.choice(ends)


def _nested(rng: Rng, form: Form) -> None:
    part = rng.choice(form.parts)
    inner = Form(
        [Part(list(part.headers), part.content)], boundary=rng.choice([b"inner", BOUNDARY])
    )
    part.headers.append(b"Content-Type: multipart/mixed; boundary=" + inner.boundary)
    part.content = inner.write()


def _part_twice(rng: Rng, form: Form) -> None:
    part = rng.choice(form.parts)
    form.parts.insert(rng.randrange(len(form.parts) + 1), part)


def _part_missing(rng: Rng, form: Form) -> None:
    form.parts.remove(rng.choice(form.parts))


def _reordered(rng: Rng, form: Form) -> None:
    rng.shuffle(form.parts)


def _contents_swapped(rng: Rng, form: Form) -> None:
    one, other = rng.choices(form.parts, k=2)
    one.content, other.content = other.content, one.content


def _lines_end_otherwise(rng: Rng, form: Form) -> None:
    form.newline = rng.choice([b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n "])


def _no_end(rng: Rng, form: Form) -> None:
    form.closing = rng.choice([b"", b"-", b"- -", b"\r\n", b" --", b"--\x00", b"--x", b"-- \t"])
    form.after = rng.choice([b"", CRLF, b"\n", b"epilogue", b"--"])


def _around(rng: Rng, form: Form) -> None:
    form.before = rng.choice([b"", CRLF, b"\n", b"preamble\r\n", b"\r\n-x", b"--", b"\r\n\r\n"])
    form.after = rng.choice([b"", CRLF, b"x" * 5000, b"\r\n--" + form.boundary + CRLF])


def _headed(rng: Rng, form: Form) -> Part:
    """A part that has a header: an earlier change may have taken one's only header."""
    return rng.choice([part for part in form.parts if part.headers])


def _header_names(rng: Rng, form: Form) -> None:
    part = _headed(rng, form)
    part.headers[0] = part.headers[0].replace(
        b"Content-Disposition",
        rng.choice(
            [b"content-disposition", b"CONTENT-DISPOSITION", b"Content-Disposition ", b" C", b"",
             b"Content_Disposition", b"Content-Disposition\x00", b"C\xc3\xb6ntent"]
        ),
    )  # fmt: skip


def _disposition(rng: Rng, form: Form) -> None:
    part = _headed(rng, form)
    _, *quoted = part.headers[0].split(b'"')
    name = quoted[0] if quoted else b"result.json"  # an earlier change took the quotes
    other = rng.choice([b"result.json", b"manifest.json", b"evil.sh", name.upper(), name + b" "])
    ways: list[list[bytes]] = [
        [b"Content-Disposition: attachment; name=" + name],
        [b"Content-Disposition: form-data; name=" + name],
        [b"Content-Disposition: form-data; NAME=" + name],
        [b'Content-Disposition: form-data;name="' + name + b'";'],
        [b'Content-Disposition: form-data; name="' + name + b'"; name="' + other + b'"'],
        [b'Content-Disposition: form-data; name="' + other + b'"; filename="' + name + b'"'],
        [b'Content-Disposition: form-data; filename="' + name + b'"'],
        [b"Content-Disposition: form-data; name*=utf-8''" + name],
        [b"Content-Disposition: form-data; name*0=" + name[:3] + b"; name*1=" + name[3:]],
        [b'Content-Disposition: form-data; name="' + name.replace(b".", b"\\.") + b'"'],
        [b'Content-Disposition: form-data; name="\\"' + name + b'"'],
        [b'Content-Disposition: form-data; name="' + name],
        [b"Content-Disposition: form-data; name='" + name + b"'"],
        [b'Content-Disposition: form-data; name="' + name + b'\x00"'],
        [b'Content-Disposition: form-data; name="../' + name + b'"'],
        [b'Content-Disposition: form-data;\r\n name="' + name + b'"'],
        [b"Content-Disposition:form-data;name=" + name],
        [b"Content-Disposition: form-data"],
        [b"Content-Disposition: "],
        [],
        [part.headers[0], b'Content-Disposition: form-data; name="' + other + b'"'],
        [b'Content-Disposition: form-data; name="' + other + b'"', part.headers[0]],
    ]
    part.headers[:1] = rng.choice(ways)


def _more_headers(rng: Rng, form: Form) -> None:
    part = rng.choice(form.parts)
    part.headers += rng.choice(
        [
            [b"Content-Type: application/json"],
            [b"Content-Transfer-Encoding: base64"],
            [b"Content-Encoding: gzip"],
            [b"Content-Length: 3"],
            [b"X-Ignored: yes"],
            [b"X: y"] * rng.choice([7, 8, 9, 500]),
            [b"X: " + b"y" * rng.choice([1000, 4090, 5000, 70_000])],
            [b"x" * 70_000 + b": y"],
            [b"no colon"],
            [b": no name"],
            [b" folded"],
            [b"X: a\rb"],
            [b"X: \xff\xfe\x00"],
        ]
    )


def _content_type(rng: Rng, form: Form) -> None:
    own = form.boundary.decode()
    form.content_type = rng.choice(
        [
            f'multipart/form-data; boundary="{own}"',
            f"Multipart/Form-Data; Boundary={own}",
            f"multipart/form-data;boundary={own};charset=utf-8",
            f"multipart/form-data; boundary={own}; boundary=other",
            f"multipart/form-data; boundary=other; boundary={own}",
            f"multipart/form-data; boundary*=utf-8''{own}",
            f"multipart/form-data; boundary={own[:-1]}",
            f"multipart/form-data; boundary={own}x",
            "multipart/form-data; boundary=" + "b" * rng.choice([70, 71, 5000]),
            'multipart/form-data; boundary=""',
            "multipart/form-data; boundary=",
            "multipart/form-data",
            f"multipart/mixed; boundary={own}",
            f"multipart/form-data, multipart/form-data; boundary={own}",
            "application/x-www-form-urlencoded",
            "application/zip",
            "application/json",
            "",
            f"multipart/form-data; boundary={own}\x00",
            f"multipart/form-data; boundary=\xff{own}",
            f"multipart/form-data; boundary={own} ",
            f"multipart/form-data; boundary='{own}'",
        ]
    )


def _other_boundary(rng: Rng, form: Form) -> None:
    form.boundary = rng.choice([b"-", b"--", b"a", b"'()+_,-./:=?", b"b" * 70, b"\r\n", b"[0-9]+"])
    if rng.random() < 0.7:
        form.content_type = f'multipart/form-data; boundary="{form.boundary.decode()}"'


_FORM_CHANGES: tuple[Callable[[Rng, Form], None], ...] = (
    _boundary_in_content, _nested, _part_twice, _part_missing, _reordered, _contents_swapped,
    _lines_end_otherwise, _no_end, _around, _header_names, _disposition, _disposition,
    _more_headers, _more_headers, _content_type, _content_type, _other_boundary,
)  # fmt: skip


# HTTP


def _chunks(rng: Rng, body: bytes) -> list[bytes]:
    chunks = []
    while body:
        size = rng.choice([1, 2, 7, 100, 1000, 5000, 100_000])
        chunks.append(body[:size])
        body = body[size:]
        if len(chunks) == 60:
            chunks.append(body)
            break
    return [chunk for chunk in chunks if chunk]


def _chunked(rng: Rng, body: bytes) -> Request:
    written = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in _chunks(rng, body))
    return Request(["Transfer-Encoding: chunked"], written + b"0\r\n\r\n", (body,))


def _chunked_badly(rng: Rng, body: bytes) -> Request:
    size = b"%x" % len(body)
    odd = [b"-" + size, b"+" + size, b"0x" + size, size + b";ext=1", size + b" ", b" " + size,
           b"f" * 16, b"f" * 70, b"1_0", b"", b"\xd9\xa2", size.upper(), b"00" + size]  # fmt: skip
    ends = [b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"0\r\n", b"", b"00\r\n\r\n", b"0;x\r\n\r\n"]
    newline = rng.choice([CRLF, CRLF, b"\n", b"\r"])
    written = rng.choice([size, *odd]) + newline + body + newline + rng.choice(ends)
    return Request(["Transfer-Encoding: chunked"], written, (body,), whole=False, last=True)


def _length_short(rng: Rng, body: bytes) -> Request:
    length = rng.choice([0, 1, len(body) // 2, len(body) - 1, rng.randrange(len(body) + 1)])
    length = max(length, 0)
    return Request([f"Content-Length: {length}"], body, (body[:length],), last=True)


def _length_long(rng: Rng, body: bytes) -> Request:
    length = len(body) + rng.choice([1, 2, 1000, 10_000_000, 33_000_000])
    return Request([f"Content-Length: {length}"], body, (), whole=False, last=True)


def _length_beyond(rng: Rng, body: bytes) -> Request:
    length = rng.choice([36 * 2**20, 64 * 2**20 + 1, 2**31, 2**63, 2**64, 10**30, 10**400])
    return Request([f"Content-Length: {length}"], body[:100], (), whole=False, last=True)


def _length_odd(rng: Rng, body: bytes) -> Request:
    n = len(body)
    spelled = rng.choice(
        [f"+{n}", f"-{n}", f"0x{n:x}", f"{n}.0", f"0{n}", f"{n} ", f"{n},{n}", f"{n}, {n + 1}",
         "", "ten", f"{n}\x00", f"{n:_}", "\u00b2"]
    )  # fmt: skip
    return Request([f"Content-Length: {spelled}"], body, (body,), whole=False, last=True)


def _length_twice(rng: Rng, body: bytes) -> Request:
    other = rng.choice([len(body), len(body) - 1, len(body) + 1, 0])
    lengths = [f"Content-Length: {len(body)}", f"Content-Length: {other}"]
    rng.shuffle(lengths)
    return Request(lengths, body, (body, body[: max(other, 0)]), whole=False, last=True)


def _length_and_chunked(rng: Rng, body: bytes) -> Request:
    request = _chunked(rng, body)
    length = rng.choice([0, len(request.body), len(body)])
    request.headers.insert(rng.randrange(2), f"Content-Length: {length}")
    request.readings = (body, request.body[:length])
    request.whole, request.last = False, True
    return request


def _no_length(_: Rng, body: bytes) -> Request:
    return Request([], body, (), whole=False, last=True)


def _encodings(rng: Rng, body: bytes) -> Request:
    header = rng.choice(
        ["Transfer-Encoding: gzip", "Transfer-Encoding: identity", "Transfer-Encoding: xchunked",
         "Transfer-Encoding: chunked, gzip", "Transfer-Encoding: \x0bchunked",
         "Content-Encoding: gzip", "Content-Encoding: identity", "Expect: 100-continue",
         "Expect: 200-ok", "Connection: close", "Connection: upgrade\r\nUpgrade: h2c",
         "X-Long: " + "x" * rng.choice([1000, 15_000, 17_000, 70_000]), "X-Nul: a\x00b",
         "X Space: a", "X-Folded: a\r\n b", "Cookie: " + "a=b; " * 1000, "no colon"]
    )  # fmt: skip
    return Request([f"Content-Length: {len(body)}", header], body, (body,), whole=False, last=True)


_FRAMINGS: tuple[Callable[[Rng, bytes], Request], ...] = (
    _chunked, _chunked, _chunked, _chunked_badly, _length_short, _length_long, _length_beyond,
    _length_odd, _length_twice, _length_and_chunked, _no_length, _encodings, _encodings,
)  # fmt: skip
