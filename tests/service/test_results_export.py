"""`results export`, and the commands that list and moderate: real commands, a real server."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from cli import results_export
from cli.unfinished import delete_stale, unfinished
from client.admin_api import BYTES, AdminClient
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_admin_results import decide, hand_in, shown
from tests.service.test_cli_runners import operating
from tests.support.archive import problems
from tests.support.fleet import Fleet

MakeSettings = Callable[..., Settings]
ALL = ("--since", "2020-01-01T00:00:00Z")


async def stored(fleet: Fleet, run_id: str) -> dict[str, bytes]:
    """Return the files of a result as the database has them."""
    rows = await fleet.pool.fetch("SELECT * FROM submission_files WHERE run_id = $1", run_id)
    return {row["name"]: row["content"] for row in rows}


def left_over(archive: Path) -> list[Path]:
    """Return what an export has left beside its results."""
    return [path for path in archive.iterdir() if path.name != "submissions"]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.gen_test
async def test_an_export_is_byte_identical_goes_on_where_it_stopped_and_overwrites_nothing(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b.2")
        runs = [await hand_in(fleet, runner), await hand_in(fleet, runner)]
        runs.append(await hand_in(fleet, other, run_status="incomplete", records=[]))
        disputed = await hand_in(fleet, runner)
        await decide(fleet, disputed, "disputed")
        archive = tmp_path / "archive"
        places = [archive / "submissions" / "runner-a" / run for run in runs[:2]]
        places.append(archive / "submissions" / "runner-b.2" / runs[2])

        one = await desk("results", "export", runs[0], archive)
        assert (one.code, one.err) == (0, ["1 written, 0 there, 0 skipped, 0 refused"])
        everything = await desk("results", "export", *ALL, archive, "--json")
        assert [of["outcome"] for of in everything.json["results"]] == ["there"] + ["written"] * 2
        for run_id, place in zip(runs, places, strict=True):
            assert files_of(place) == await stored(fleet, run_id)
        assert problems(archive) == []
        assert not list(archive.glob("submissions/*/" + disputed)), "it does not count"

        downloads = []
        download = AdminClient.download
        monkeypatch.setattr(
            AdminClient,
            "download",
            lambda self, path: downloads.append(path) or download(self, path),
        )
        again = await desk("results", "export", *ALL, archive)
        assert (again.code, again.err) == (0, ["0 written, 3 there, 0 skipped, 0 refused"])
        assert downloads == [], "what is there is compared by digest"

        (places[0] / "summary.md").write_bytes(b"mine")
        (places[1] / "notes.txt").touch()
        (places[2] / "result.json").unlink()
        refused = await desk("results", "export", *ALL, archive)
        assert (refused.code, refused.err[0]) == (
            4, "error: 0 written, 0 there, 0 skipped, 3 refused",
        )  # fmt: skip
        for line, name in zip(
            refused.err[1:], ("summary.md", "notes.txt", "result.json"), strict=True
        ):
            assert name in line
        assert (places[0] / "summary.md").read_bytes() == b"mine"
        named = await desk("results", "export", disputed, archive)
        assert (named.code, "not accepted any more" in named.err[0]) == (0, True)
        assert left_over(archive) == []

        none = await desk("results", "export", "--since", "2999-01-01T00:00:00Z", archive)
        assert (none.code, none.out, len(none.err)) == (0, "", 1)
        assert none.err[0].startswith("nothing matched: ")
        assert (await desk("results", "export", archive)).code == 2
        assert (await desk("results", "export", "not-a-run", archive)).code == 2
        assert (await desk("results", "export", runs[0], *ALL, archive)).code == 2
        waiting = await fleet.enqueue()
        assert (await desk("results", "export", waiting, archive)).code == 3
        (tmp_path / "file").touch()
        assert (await desk("results", "export", runs[0], tmp_path / "file")).code != 0


@pytest.mark.gen_test
async def test_an_export_that_cannot_be_whole_leaves_nothing(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        run_id = await hand_in(fleet, runner)
        place = tmp_path / "submissions" / "runner-a" / run_id
        whole = await stored(fleet, run_id)
        download = AdminClient.download

        # Another export is faster: the same bytes are the same result, others are not overwritten.
        for name, content in (("summary.md", whole["summary.md"]), ("summary.md", b"other")):

            def faster(self: AdminClient, path: str, name=name, content=content) -> bytes:
                place.mkdir(parents=True, exist_ok=True)
                for each in whole:
                    (place / each).write_bytes(whole[each] if each != name else content)
                return download(self, path)

            monkeypatch.setattr(AdminClient, "download", faster)
            raced = await desk("results", "export", run_id, tmp_path)
            assert raced.code == (0 if content == whole[name] else 4), raced.err
            assert (place / name).read_bytes() == content
            assert left_over(tmp_path) == []
            shutil.rmtree(place)

        monkeypatch.setattr(AdminClient, "download", download)
        await fleet.pool.execute("UPDATE submission_files SET content = 'x' WHERE name LIKE 's%'")
        changed = await desk("results", "export", run_id, tmp_path)
        assert (changed.code, "other bytes than were accepted" in changed.err[1]) == (4, True)
        assert not place.exists()
        assert left_over(tmp_path) == []


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def get(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("summary.md"):
            raise KeyboardInterrupt
        return httpx.Response(200, content=b"{}", headers={"Content-Type": BYTES})

    digest = hashlib.sha256(b"{}").hexdigest()
    files = [{"name": name, "sha256": digest} for name in ("result.json", "summary.md")]
    record = {"run_id": "r", "files": files}
    transport = httpx.MockTransport(get)
    with (
        httpx.Client(base_url="http://queue.test", transport=transport) as http,
        pytest.raises(KeyboardInterrupt),
    ):
        results_export._write(AdminClient(http), record, tmp_path, tmp_path / "place")
    assert list(tmp_path.iterdir()) == []


def left(archive: Path, name: str, *files: str, days: float = 2) -> Path:
    """Make a folder as a killed export leaves it, of so many days ago."""
    folder = archive / name
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    then = time.time() - days * 86_400
    os.utime(folder, (then, then))
    return folder


@pytest.mark.gen_test
async def test_the_next_export_deletes_what_a_killed_one_left(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        run_id = await hand_in(fleet, await fleet.sign_on())
        stale = left(tmp_path, ".export-abcd1234", "result.json", "summary.md")
        done = await desk("results", "export", run_id, tmp_path)
        assert (done.code, done.err[0]) == (
            0, f"deleted {stale}, which an export that was killed has left",
        )  # fmt: skip
        assert left_over(tmp_path) == []
        await desk("results", "export", run_id, tmp_path / "none-yet")  # no folder, nothing to do
        assert left_over(tmp_path / "none-yet") == []


def test_nothing_is_deleted_but_what_a_killed_export_left(tmp_path: Path) -> None:
    names = {"result.json"}
    left(tmp_path, ".export-young", "result.json", days=0.9)
    left(tmp_path, ".export-of-mine", "result.json", "notes.txt")
    left(tmp_path, ".exports", "result.json")
    left(tmp_path, "submissions", "result.json")
    deep = left(tmp_path, ".export-deep")
    (deep / "result.json").mkdir()
    os.utime(deep, (0, 0))
    linked = left(tmp_path, ".export-linked")
    (linked / "result.json").symlink_to(tmp_path / "submissions" / "result.json")
    os.utime(linked, (0, 0))
    (tmp_path / ".export-link").symlink_to(left(tmp_path, "elsewhere", "result.json"))
    (tmp_path / ".export-file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert delete_stale(tmp_path, names) == []
    assert sorted(tmp_path.rglob("*")) == before
    assert delete_stale(tmp_path / "no-such-folder", names) == []


def test_nobody_deletes_a_folder_that_an_export_still_writes(tmp_path: Path) -> None:
    """However old: its laptop was asleep for a week."""
    with unfinished(tmp_path) as folder:
        (folder / "result.json").write_text("{}")
        os.utime(folder, (0, 0))
        assert delete_stale(tmp_path, {"result.json"}) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_becomes_a_result_while_it_is_looked_at_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left(tmp_path, ".export-abcd1234", "result.json")
    monkeypatch.setattr(
        "cli.unfinished.fcntl.flock", lambda *_: folder.rename(tmp_path / "a-result")
    )
    assert delete_stale(tmp_path, {"result.json"}) == []
    assert files_of(tmp_path / "a-result") == {"result.json": b"{}"}


def test_a_killed_export_holds_its_folder_no_more(tmp_path: Path) -> None:
    """SIGKILL in the middle of it: the lock goes with the process."""
    program = (
        "import os, signal, sys, pathlib\n"
        "from cli.unfinished import unfinished\n"
        "with unfinished(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'result.json').touch()\n"
        "    os.utime(folder, (0, 0))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    [folder] = tmp_path.iterdir()
    assert delete_stale(tmp_path, {"result.json"}) == [folder]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", ".git", "-rf", "a.", "a ", " a", "a\n", "a\0", "con",
     "NUL.txt", "com1", "é", "a" * 129, "submissions/../../x", "C:"],
)  # fmt: skip
def test_a_publisher_that_cannot_be_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(results_export._Refused):
        results_export._place(tmp_path, name, "11111111-2222-4333-8444-555555555555")


@pytest.mark.parametrize("run_id", ["", "..", "x", "11111111-2222-4333-8444-55555555555/"])
def test_a_run_id_that_is_none_is_refused(run_id: str, tmp_path: Path) -> None:
    with pytest.raises(results_export._Refused):
        results_export._place(tmp_path, "runner-a", run_id)


def test_a_link_or_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    run_id = "11111111-2222-4333-8444-555555555555"
    assert results_export._place(tmp_path, "runner-a.2_B", run_id).name == run_id
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions" / "runner-a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "submissions" / "runner-b").touch()
    for publisher in ("runner-a", "runner-b"):
        with pytest.raises(results_export._Refused):
            results_export._place(tmp_path, publisher, run_id)


# Listing and moderating


@pytest.mark.gen_test
async def test_the_commands_list_show_and_moderate_and_say_first_what_they_would_do(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        runs = [await hand_in(fleet, runner) for _ in range(3)]
        theirs = await hand_in(fleet, other)
        key = runner.fingerprint[:16]
        listed = await desk("results", "ls")
        assert [line.split()[:2] for line in listed.out.splitlines()[1:]] == [
            [run_id, "accepted"] for run_id in [*runs, theirs]
        ]
        assert (await desk("results", "ls", "--limit", 2)).err == [
            "the first 2 results; --limit shows more"
        ]
        of_key = await desk("results", "ls", "--key", key, "--json")
        assert [result["run_id"] for result in of_key.json["results"]] == runs
        assert (await desk("results", "ls", "--key", "00" * 8)).code == 3

        asked = await desk("results", "dispute", "--key", key, "--reason", "key lost")
        assert (asked.code, "3 result(s) disputed" in asked.err[0], len(asked.err)) == (6, True, 4)
        assert (await shown(fleet, runs[0]))["state"] == "accepted"
        done = await desk("results", "dispute", "--key", key, "--reason", "key lost", "--yes")
        assert (done.code, len(done.out.splitlines())) == (0, 4)
        restored = await desk("results", "restore", runs[0], "--reason", "looked", "--yes")
        assert restored.code == 0
        revoked = await desk("results", "revoke", runs[2], "--reason", "wrong", "--yes", "--json")
        assert revoked.json["results"][0]["former"] == "disputed"
        replaced = await desk("results", "supersede", theirs, "--reason", "newer", "--yes")
        assert replaced.code == 0
        states = [(await shown(fleet, run_id))["state"] for run_id in [*runs, theirs]]
        assert states == ["accepted", "disputed", "revoked", "superseded"]
        final = await desk("results", "restore", theirs, runs[2], "--reason", "no", "--yes")
        assert (final.code, "1 of 2 were changed before it" in final.err[0]) == (4, True)
        page = await desk("results", "show", runs[0])
        assert (page.code, "key lost" in page.out, "looked" in page.out) == (0, True, True)
        assert "manifest.json" in page.out
        assert len((await desk("results", "show", runs[0], "--json")).json["history"]) == 2
        assert (await desk("results", "show", await fleet.enqueue())).code == 3
        assert (await desk("results", "revoke", "--reason", "x", "--yes")).code == 2
        both = await desk("results", "revoke", runs[0], "--key", key, "--reason", "x", "--yes")
        assert both.code == 2
