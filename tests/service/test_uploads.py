"""Uploads: multipart bodies as no library sends them, their caps, and what is left on disk."""

import asyncio
import io
import json
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker.errors import InvalidBundle, TooLarge
from broker.results.bundle import CAPS
from broker.results.uploads import Spool
from config.settings import Settings
from handlers.submit import Parts
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, code_of, open_fleet
from tests.support.raw_http import BOUNDARY, FORM_TYPE, exchange, form, head, line_to

MakeSettings = Callable[..., Settings]
Job = dict[str, Any]
KIB = 1024


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which uploads are spooled, for this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@asynccontextmanager
async def claimed(
    settings: Settings, sigstore: ThrowawaySigstore
) -> AsyncIterator[tuple[Fleet, Runner, Job]]:
    """Yield a fleet, a runner of it, and the job that it holds."""
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        yield fleet, runner, await runner.take()


def submit_head(runner: Runner, job: Job, *headers: str) -> bytes:
    """The head of a submit; the type is multipart unless a header says otherwise."""
    typed = () if any(each.startswith("Content-Type") for each in headers) else (
        f"Content-Type: {FORM_TYPE}",
    )  # fmt: skip
    token = f"Authorization: Bearer {runner.token}"
    return head("POST", f"/api/queue/{job['run_id']}/submit", token, *typed, *headers)


async def send(runner: Runner, job: Job, body: bytes, *headers: str) -> httpx.Response:
    """Submit a body as it is."""
    start = submit_head(runner, job, f"Content-Length: {len(body)}", *headers)
    answer = await exchange(runner.fleet.url, start + body)
    assert answer is not None
    return answer


def parts_of(runner: Runner, job: Job) -> list[tuple[str, bytes]]:
    """The parts of a bundle that is accepted."""
    return [("lease_id", job["lease_id"].encode()), *runner.bundle(job).items()]


async def until_taking(fleet: Fleet, uploads: int) -> None:
    """Wait until so many uploads are being received; of those that ended, nothing is left then."""
    free = fleet.services.settings.uploads_max - uploads
    async with asyncio.timeout(10):
        while fleet.services.submissions.uploads_free != free:  # noqa: ASYNC110 (no signal for it)
            await asyncio.sleep(0.005)


# Refused as they come in


def broken_bodies(runner: Runner, job: Job) -> dict[str, tuple[int, str, bytes]]:
    """Every way in which a body is refused before its bundle is looked at."""
    good = parts_of(runner, job)
    lease, result, *others = good
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("result.json"))
    nameless = f"--{BOUNDARY}\r\n\r\nvalue\r\n--{BOUNDARY}--\r\n".encode()
    attached = f'--{BOUNDARY}\r\nContent-Disposition: attachment; name="result.json"\r\n\r\n'
    many = f"--{BOUNDARY}\r\n" + "X: y\r\n" * 500 + "\r\n"
    invalid, request = (422, "invalid_bundle"), (422, "invalid_request")
    return {
        "no part at all": (*request, f"--{BOUNDARY}--\r\n".encode()),
        "an unknown part": (*invalid, form(*good, ("evil.sh", b"#!"))),
        "a file twice": (*invalid, form(*good, result)),
        "the lease_id twice": (*invalid, form(*good, lease)),
        "a path for a name": (*invalid, form(*good, ("../result.json", b"{}"))),
        "an absolute path": (*invalid, form(*good, ("/etc/passwd", b""))),
        "another case": (*invalid, form(lease, ("RESULT.JSON", b"{}"), *others)),
        "a name that ends in a blank": (*invalid, form(*good, ("dashboard.html ", b""))),
        "a name that is not UTF-8": (*invalid, form(*good).replace(b"summary.md", b"\xff.md")),
        "a tar": (*invalid, tar.getvalue()),
        "no last boundary": (*invalid, form(*good, end=False)),
        "cut off where another part would begin": (*invalid, form(*good)[:-4] + b"\r\n"),
        "cut off in mid-part": (*invalid, form(*good)[:-200]),
        "another boundary": (*invalid, form(*good).replace(BOUNDARY.encode(), b"other")),
        "a part without a name": (*invalid, nameless),
        "a part of another kind": (*invalid, attached.encode() + b"x\r\n" + form()),
        "five hundred part headers": (*invalid, many.encode() + form()),
        "a part header of 100 KiB": (
            *invalid, f"--{BOUNDARY}\r\nX: {'y' * 100 * KIB}\r\n\r\n".encode() + form()
        ),
        "no lease_id": (*request, form(*good[1:])),
        "an empty lease_id": (*request, form(("lease_id", b""), *good[1:])),
        "a lease_id in capitals": (
            *request, form(("lease_id", job["lease_id"].upper().encode()), *good[1:])
        ),
        "a lease_id that is no UUID": (*request, form(("lease_id", b"' OR 1=1"), *good[1:])),
        "a lease_id with a byte too many": (
            413, "too_large", form(("lease_id", job["lease_id"].encode() + b"0"), *good[1:])
        ),
    }  # fmt: skip


@pytest.mark.gen_test
async def test_a_body_that_is_no_bundle_is_refused_and_leaves_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        recorded = []
        for name, (status, code, body) in broken_bodies(runner, job).items():
            answer = await send(runner, job, body)
            assert code_of(answer) == (status, code), (name, answer.text)
            await until_taking(fleet, 0)
            recorded.append(code)
        rows = await fleet.pool.fetch("SELECT code FROM submission_refusals ORDER BY refusal_id")
        assert [row["code"] for row in rows] == recorded
        assert await fleet.pool.fetchval("SELECT count(*) FROM submissions") == 0
        assert (await runner.heartbeat(job)).status_code == 200
        assert (await send(runner, job, form(*parts_of(runner, job)))).status_code == 201
        await until_taking(fleet, 0)


@pytest.mark.gen_test
async def test_a_body_of_another_media_type_is_415(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        body = form(*parts_of(runner, job))
        for typed in (
            "Content-Type: application/x-tar",
            "Content-Type: application/zip",
            "Content-Type: application/json",
            "Content-Type: multipart/mixed; boundary=bakeoff",
            "Content-Type: multipart/form-data",
            "Content-Type: multipart/form-data; boundary=",
            "Content-Type: multipart/form-data; boundary=bake,off",  # a proxy may end it there
            f"Content-Type: multipart/form-data; boundary={'b' * 71}",
            "Content-Type: ",
        ):
            answer = await send(runner, job, body, typed)
            assert code_of(answer) == (415, "unsupported_media_type"), typed
        packed = await send(runner, job, body, "Content-Encoding: gzip")
        assert code_of(packed) == (415, "unsupported_media_type")
        await until_taking(fleet, 0)


@pytest.mark.gen_test
async def test_a_part_beyond_its_cap_is_413_however_it_is_sent(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        lease, *_ = parts_of(runner, job)
        for name in ("signature.sigstore.json", "manifest.json", "summary.md"):
            body = form(lease, (name, b"x" * (CAPS[name] + 1)))
            answer = await send(runner, job, body)
            assert code_of(answer) == (413, "too_large"), name
            assert name in answer.json()["detail"]
        chunks = (b"x" * 64 * KIB for _ in range(CAPS["result.json"] // (64 * KIB) + 1))
        start = form(lease, ("result.json", b""), end=False)[:-2]
        assert await chunked(runner, job, start, chunks) == (413, "too_large")
        await until_taking(fleet, 0)
        assert (await runner.heartbeat(job)).status_code == 200
        at_cap = form(lease, ("signature.sigstore.json", b"x" * CAPS["signature.sigstore.json"]))
        assert code_of(await send(runner, job, at_cap)) == (422, "invalid_bundle")


async def chunked(
    runner: Runner, job: Job, start: bytes, chunks: Iterator[bytes]
) -> tuple[int, str]:
    """Submit in chunks, without an announced length; return the refusal."""
    async with line_to(runner.fleet.url) as line:
        await line.send(submit_head(runner, job, "Transfer-Encoding: chunked"))
        for chunk in (start, *chunks):
            await line.send(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        await line.send(b"0\r\n\r\n")
        answer = await line.answer()
    assert answer is not None
    return code_of(answer)


@pytest.mark.gen_test
async def test_an_announced_length_beyond_a_bundles_is_413_before_it_is_sent(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        for length in (sum(CAPS.values()) + 65 * KIB, 2**31, 2**63):
            start = submit_head(runner, job, f"Content-Length: {length}")
            answer = await exchange(fleet.url, start)
            assert answer is not None
            assert code_of(answer) == (413, "too_large")
        await until_taking(fleet, 0)


@pytest.mark.gen_test
async def test_a_bundle_cut_into_single_bytes_is_read_all_the_same(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        body = form(*parts_of(runner, job)) + b"an epilogue that nobody reads"
        async with line_to(fleet.url) as line:
            await line.send(submit_head(runner, job, f"Content-Length: {len(body)}"))
            for byte in body[:300]:
                await line.send(bytes([byte]))
                await asyncio.sleep(0)
            await line.send(body[300:])
            answer = await line.answer()
        assert answer is not None
        assert answer.status_code == 201, answer.text


# How many at once, and what is left


@pytest.mark.gen_test
async def test_more_uploads_than_fit_are_told_to_come_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(uploads_max=1), sigstore) as (fleet, runner, job):
        body = form(*parts_of(runner, job))
        async with line_to(fleet.url) as slow:
            await slow.send(submit_head(runner, job, f"Content-Length: {len(body)}"))
            await slow.send(body[:500])
            await until_taking(fleet, 1)
            answer = await send(runner, job, body)
            assert code_of(answer) == (503, "busy")
            assert int(answer.headers["Retry-After"]) > 0
        await until_taking(fleet, 0)
        assert (await send(runner, job, body)).status_code == 201
        await until_taking(fleet, 0)


@pytest.mark.gen_test
async def test_hanging_up_in_mid_upload_gives_its_place_back(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(uploads_max=1), sigstore) as (fleet, runner, job):
        body = form(*parts_of(runner, job))
        for cut in (0, 10, 500, len(body) - 1):
            async with line_to(fleet.url) as line:
                await line.send(submit_head(runner, job, f"Content-Length: {len(body)}"))
                await line.send(body[:cut])
                await until_taking(fleet, 1)
            await until_taking(fleet, 0)
        assert (await send(runner, job, body)).status_code == 201


@pytest.mark.gen_test
async def test_a_bundle_that_has_arrived_is_taken_though_its_runner_hung_up(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(uploads_max=1), sigstore) as (fleet, runner, job):
        body = form(*parts_of(runner, job))
        async with fleet.transaction() as beside:
            await beside.execute("SELECT FROM run_queue FOR UPDATE")
            async with line_to(fleet.url) as line:
                start = submit_head(runner, job, f"Content-Length: {len(body)}")
                await line.send(start + body)
                await fleet.until_blocked()
        await fleet.services.in_flight.wait_idle()
        await until_taking(fleet, 0)
        assert await fleet.pool.fetchval("SELECT count(*) FROM submissions") == 1
        again = await send(runner, job, body)
        assert again.status_code == 200, again.text


@pytest.mark.gen_test
async def test_a_disk_that_takes_no_more_is_our_fault_and_told_so(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, folder: Path
) -> None:
    async with claimed(make_settings(uploads_max=1), sigstore) as (fleet, runner, job):
        body = form(*parts_of(runner, job))
        async with line_to(fleet.url) as line:
            await line.send(submit_head(runner, job, f"Content-Length: {len(body)}"))
            await until_taking(fleet, 1)
            folder.rmdir()  # noqa: ASYNC240 (nothing can be written, as on a full disk)
            await line.send(body)
            answer = await line.answer()
        assert answer is not None
        assert code_of(answer) == (503, "unavailable")
        assert code_of(await send(runner, job, body)) == (503, "unavailable")
        folder.mkdir()  # noqa: ASYNC240
        assert await fleet.pool.fetchval("SELECT count(*) FROM submission_refusals") == 0
        assert (await send(runner, job, body)).status_code == 201


# The spool by itself


def test_a_spools_files_have_no_names(folder: Path) -> None:
    spool = Spool()
    Parts(BOUNDARY.encode(), spool).feed(
        form(("lease_id", b"00000000-0000-4000-8000-000000000000"), ("summary.md", b"# S"))
    )
    upload = spool.finish()
    assert list(folder.iterdir()) == []  # so that a process that is killed leaves nothing behind
    assert [upload.read("summary.md") for _ in range(2)] == [b"# S", b"# S"]
    spool.close()
    spool.close()


def test_what_is_beyond_a_cap_is_not_written() -> None:
    spool = Spool()
    spool.begin("manifest.json")
    spool.write(b"x" * CAPS["manifest.json"])
    with pytest.raises(TooLarge):
        spool.write(b"x")
    spool.end()
    spool.begin("lease_id")
    spool.write(b"00000000-0000-4000-8000-000000000000")
    assert len(spool.finish().read("manifest.json")) == CAPS["manifest.json"]
    spool.close()


@pytest.mark.parametrize("name", ["x.zip", "../../etc/x", "\x1b[2J" + "y" * 10_000])
def test_a_part_that_no_bundle_has_is_named(name: str) -> None:
    with pytest.raises(InvalidBundle) as refused:
        Spool().begin(name)
    assert json.dumps(name)[:40] in str(refused.value)
    assert (len(str(refused.value)) < 300, str(refused.value).isprintable()) == (True, True)


def test_a_part_is_known_by_its_field_and_not_by_its_file_name() -> None:
    spool = Spool()
    disposition = 'Content-Disposition: form-data; name="x"; filename="result.json"'
    with pytest.raises(InvalidBundle):
        Parts(b"b", spool).feed(f"--b\r\n{disposition}\r\n\r\n{{}}\r\n--b--\r\n".encode())
    spool.close()
