"""`bakeoff-queue results export`: bundles as the archive wants them, byte for byte.

Each becomes `DIR/submissions/<publisher>/<run-id>/`, whole or not at all: it is written beside and
renamed. What is there already is compared by digest and never overwritten, so that an export that
was interrupted, or is made every night, goes on where it stopped.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.results_api import RESULTS, accepted_since, download
from cli.unfinished import delete_stale, unfinished
from client.admin_api import DEFAULT_URL, AdminClient, Token, Url, connect
from client.output import (
    AsJson,
    CommandFailed,
    ExitCode,
    note,
    print_json,
    print_table,
    tracked,
    usage_error,
)

# The archive is a repository that is checked out anywhere: no hidden folder, no dots at an end, no
# separators, and no device of Windows, which opens `nul.txt` as one, too.
RUN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
PUBLISHER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?", re.ASCII)
DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
COLUMNS = ("run_id", "publisher", "outcome", "detail")
TOLD = 3  # violations of one result


def export(
    targets: Annotated[list[str], typer.Argument(metavar="[RUN_ID]... DIR", show_default=False)],
    since: Annotated[
        str | None,
        typer.Option(help="All that count, accepted then or later.", metavar="RFC3339"),
    ] = None,
    runner_key: Annotated[
        bool,
        typer.Option(
            "--runner-key",
            help="Also those signed by the runner key itself: the archive knows no such file.",
        ),
    ] = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Write bundles into DIR/submissions/<publisher>/<run-id>/; exit 4 where other bytes are."""
    *names, folder = targets
    if bool(names) == bool(since):
        raise usage_error("say what to export: RUN_IDs or --since, and then the folder")
    from broker.results.bundle import CAPS

    for stale in delete_stale(Path(folder), CAPS):
        note(f"deleted {stale}, which an export that was killed has left")
    with connect(url, token) as admin:
        run_ids = [_run_id(name) for name in names] or accepted_since(
            admin, str(since), state="accepted"
        )
        done = [
            _export(admin, run_id, Path(folder), runner_key)
            for run_id in tracked(run_ids, "exporting")
        ]
    if as_json:
        print_json({"results": done})
    elif done:
        print_table(COLUMNS, ([result[name] for name in COLUMNS] for result in done))
    if not done:
        return note(f"nothing matched: no result that counts was accepted at {since} or later")
    return _sum_up(done)


def _export(admin: AdminClient, run_id: str, folder: Path, runner_key: bool) -> dict[str, Any]:
    """Export one result; return how that ended: written, there, skipped or refused."""
    record = admin.get(f"{RESULTS}/{run_id}")
    told = {"run_id": run_id, "publisher": record["publisher_id"], "state": record["state"]}
    if record["trust"] != "sigstore" and not runner_key:
        detail = "signed by the runner key itself, which the archive does not know: --runner-key"
        return {**told, "outcome": "skipped", "detail": detail}
    try:
        place = _place(folder, record["publisher_id"], run_id)
        outcome = "there" if place.exists() else "written"
        if outcome == "there":
            _compare(place, record)
        else:
            _write(admin, record, folder, place)
    except _Refused as error:
        return {**told, "outcome": "refused", "detail": str(error)}
    except OSError as error:
        raise CommandFailed(f"{run_id}: cannot write below {folder}: {error}") from None
    return {**told, "outcome": outcome, "detail": str(place)}


class _Refused(Exception):
    """This result is not exported; the message says why."""


def _place(folder: Path, publisher: str, run_id: str) -> Path:
    """Return the folder of a result. Raises _Refused for names that are no folder's.

    A publisher's name is text from outside, and so are the links in a folder that others write to.
    """
    if not RUN.fullmatch(run_id):
        raise _Refused("the run_id is none")
    if not PUBLISHER.fullmatch(publisher) or DEVICE.fullmatch(publisher):
        raise _Refused(f"the publisher's name {publisher!a} cannot be a folder of the archive")
    place = folder / "submissions" / publisher / run_id
    for part in (place, *list(place.parents)[:2]):
        if part.is_symlink() or (part.exists() and not part.is_dir()):
            raise _Refused(f"{part} is there, and is no folder")
    return place


def _compare(place: Path, record: Mapping[str, Any]) -> None:
    """Raise _Refused unless the folder holds exactly this result."""
    wanted = {file["name"]: file["sha256"] for file in record["files"]}
    there = {path.name: path for path in place.iterdir()}
    if there.keys() != wanted.keys():
        odd = ", ".join(sorted(there.keys() ^ wanted.keys()))
        raise _Refused(f"{place} is there with other files ({odd}): nothing was overwritten")
    for name, path in there.items():
        odd = path.is_symlink() or not path.is_file()  # a pipe would be waited for
        if odd or hashlib.sha256(path.read_bytes()).hexdigest() != wanted[name]:
            raise _Refused(f"{path} is there with other bytes: nothing was overwritten")


def _write(admin: AdminClient, record: Mapping[str, Any], folder: Path, place: Path) -> None:
    """Write a result beside its place and rename it: nobody ever sees half of one."""
    from broker.results.bundle import CAPS

    folder.mkdir(parents=True, exist_ok=True)
    with unfinished(folder) as beside:
        wanted = {file["name"]: file["sha256"] for file in record["files"]}
        if unknown := wanted.keys() - CAPS.keys():
            raise _Refused(f"{', '.join(sorted(unknown))} is no file of a bundle")
        for name, content in download(admin, record):
            if hashlib.sha256(content).hexdigest() != wanted[name]:
                raise _Refused(f"{name} came with other bytes than were accepted")
            with (beside / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a power cut leaves whole files, or no folder
        _check_archivable(beside)
        beside.chmod(0o755)  # mkdtemp's is private
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.rename(place)
        except OSError:
            if not place.exists():
                raise
            _compare(place, record)  # another export was faster


def _check_archivable(folder: Path) -> None:
    """Raise _Refused for what the archive refuses: one such folder stops the build of its site.

    A submit checks it too; this is for results that were accepted before it did.
    """
    from broker.errors import InvalidBundle
    from broker.results.archive_rules import check_archivable
    from broker.results.bundle import MANIFEST, RESULT

    documents = (json.loads((folder / name).read_bytes()) for name in (MANIFEST, RESULT))
    try:
        check_archivable(*documents)
    except InvalidBundle as error:
        told = "; ".join(f"{one.pointer} {one.detail}" for one in error.violations[:TOLD])
        raise _Refused(f"the archive would refuse it: {told}") from None


def _sum_up(done: list[dict[str, Any]]) -> None:
    counts = {
        outcome: sum(result["outcome"] == outcome for result in done)
        for outcome in ("written", "there", "skipped", "refused")
    }
    line = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if moderated := [of for of in done if of["state"] != "accepted" and of["outcome"] == "written"]:
        note(f"{len(moderated)} of them are not accepted any more: say so where you publish them")
    if counts["refused"]:
        refused = (of for of in done if of["outcome"] == "refused")
        details = [f"{result['run_id']}: {result['detail']}" for result in refused]
        raise CommandFailed(line, code=ExitCode.CONFLICT, details=details)
    note(line)


def _run_id(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise usage_error(f"{text} is not a RUN_ID; the folder comes last") from None
