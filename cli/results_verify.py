"""`bakeoff-queue results verify`: what is stored, or was exported, verified again from its bytes.

With a server, all it says is fetched and judged here: it is asked for bytes, not for a verdict, and
who must have signed is what the options or the settings say, never the server's record.
`--dir` needs no server and no token: a folder, a trust root, and who should have signed.
"""

import json
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.files import NotAFile, read_file
from cli.receipts import WELL_KNOWN, public_keys, read_object
from cli.results_api import RESULTS, accepted_since, download
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

SHOWN = 5
ONLY_SIGNED = "signed is result.json alone: nobody vouches for the manifest, summary and dashboard"

if TYPE_CHECKING:
    from broker.results.reverify import Report
    from cli.trust_options import TrustOptions


def verify(
    run_ids: Annotated[list[uuid.UUID] | None, typer.Argument(metavar="[RUN_ID]...")] = None,
    since: Annotated[
        str | None, typer.Option(help="All results accepted then or later.", metavar="RFC3339")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", exists=True, file_okay=False, help="Exported bundles; no server."),
    ] = None,
    trusted_root: Annotated[
        Path | None,
        typer.Option(help="trusted_root.json; without it, the settings' (Sigstore's production)."),
    ] = None,
    identity: Annotated[
        str | None, typer.Option(help="Who must have signed, rather than a signer of --signers.")
    ] = None,
    issuer: Annotated[str | None, typer.Option(help="The issuer of --identity.")] = None,
    signers: Annotated[
        Path | None, typer.Option(help="Signer policy; without it, the settings'.")
    ] = None,
    public_key: Annotated[
        list[str] | None,
        typer.Option(help="Runner key of Ed25519 envelopes (base64); repeatable."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help=f"A kept copy of {WELL_KNOWN}, for the receipts.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Verify accepted results again; exit 1 if one fails, 7 if one has no checked signature."""
    from cli.trust_options import TrustOptions

    if bool(identity) != bool(issuer):
        raise usage_error("--identity and --issuer go together: an identity counts as its issuer's")
    if identity and signers:
        raise usage_error("say who must have signed: --identity and --issuer, or --signers")
    if sum(map(bool, (run_ids, since, folder))) != 1:
        raise usage_error("say what to verify: RUN_IDs, --since, or --dir")
    who = TrustOptions(trusted_root, identity, issuer, signers, tuple(public_key or ()))
    if folder:
        return _show(list(_offline(folder, who)), as_json)
    with connect(url, token) as admin:
        wanted = list(map(str, run_ids or accepted_since(admin, str(since))))
        published = read_object(keys) if keys else admin.get(WELL_KNOWN)
        return _show(list(_online(admin, wanted, who, published, bool(keys))), as_json)


@dataclass(frozen=True, slots=True)
class _Verified:
    """One result: its name, its state where a server knows one, and the findings."""

    name: str
    state: str | None
    report: "Report"


def _online(
    admin: AdminClient,
    run_ids: Sequence[str],
    who: "TrustOptions",
    published: Mapping[str, Any],
    kept_keys: bool,
) -> Iterator[_Verified]:
    from broker.results.reverify import reverify
    from broker.results.reverify_stored import Stored

    receipt_keys, public_url = public_keys(published), published.get("public_url")
    for run_id in tracked(run_ids, "verifying"):
        record = admin.get(f"{RESULTS}/{run_id}")
        stored = Stored(
            record, _job(admin, run_id), _rows(admin, run_id), public_url, receipt_keys, kept_keys,
        )  # fmt: skip
        files = dict(download(admin, record))
        report = reverify(files, run_id, who.of_stored(record), stored)
        yield _Verified(run_id, record["state"], report)


def _rows(admin: AdminClient, run_id: str) -> dict[str, Any]:
    pages = list(admin.pages(f"{RESULTS}/{run_id}/rows", sys.maxsize))
    return {**pages[0], "model_metrics": [row for page in pages for row in page["model_metrics"]]}


def _job(admin: AdminClient, run_id: str) -> dict[str, Any] | None:
    try:
        return admin.get(f"/api/admin/queue/{run_id}")["job"]
    except CommandFailed as failure:
        if failure.code is not ExitCode.NOT_FOUND:
            raise
        return None


def _offline(folder: Path, who: "TrustOptions") -> Iterator[_Verified]:
    """Verify the bundle in `folder`, or all bundles below it."""
    from broker.results.reverify import FAILED, Finding, Report, reverify

    own = folder.joinpath("result.json").exists()
    found = [folder] if own else sorted(path.parent for path in folder.rglob("result.json"))
    if not found:
        raise CommandFailed(
            f"{folder} holds no bundle: no result.json in it or below", code=ExitCode.NOT_FOUND
        )
    for bundle in tracked(found, "verifying"):
        try:
            files = _read_bundle(bundle, folder)
        except NotAFile as odd:
            yield _Verified(str(bundle), None, Report([Finding("files", FAILED, str(odd))]))
            continue
        report = reverify(files, _run_id(bundle, files), who.of_folder(files), None)
        yield _Verified(str(bundle), None, report)


def _read_bundle(folder: Path, root: Path) -> dict[str, bytes]:
    """Return the files of a folder by name; what a bundle does not have is left for the checks.

    Raises NotAFile for what is named like a file of a bundle and is none below `root`.
    """
    from broker.results.bundle import CAPS

    files = {}
    for path in sorted(folder.iterdir()):
        cap = CAPS.get(path.name, 0)
        try:  # of an unknown file, the name is all that is needed
            files[path.name] = read_file(path, cap + 1, root) if cap else b""
        except OSError as error:
            raise usage_error(f"cannot read {path}: {error.strerror}") from None
        if len(files[path.name]) > cap:
            raise CommandFailed(f"{path} has more than the {cap} bytes of such a file")
    return files


def _run_id(folder: Path, files: Mapping[str, bytes]) -> str:
    """Return the run that a folder of the archive is of, by its name; elsewhere, as it says."""
    with suppress(ValueError):
        return str(uuid.UUID(folder.resolve().name))
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads(files["result.json"])["run_id"])
    return ""


def _show(results: Sequence[_Verified], as_json: bool) -> None:
    """Print every check of one result, or a line for each of several. Raises CommandFailed."""
    if as_json:
        print_json({"results": [_told(result) for result in results]})
    elif len(results) == 1:
        findings = results[0].report.findings
        print_table(
            ("check", "outcome", "detail"), ((f.check, f.outcome, f.detail) for f in findings)
        )
    elif results:
        print_table(("result", "state", "verified", "failed"), map(_line, results))
    good = sum(result.report.verified for result in results)
    counted = f"{good} of {len(results)} result(s) verified"
    if good < len(results):
        bad = [result for result in results if not result.report.verified]
        failed = any(result.report.outcome == "failed" for result in bad)
        raise CommandFailed(
            counted,
            code=ExitCode.FAILURE if failed else ExitCode.UNSIGNED,
            details=[f"{each.name}: {_failure(each)}" for each in bad],
        )
    note(counted if results else "nothing matched: no result was accepted then or later")
    if results:
        note(ONLY_SIGNED)
    if moderated := [r for r in results if r.state not in (None, "accepted")]:
        states = ", ".join(f"{result.name} is {result.state}" for result in moderated[:SHOWN])
        note(f"verified is not accepted: {len(moderated)} of them are moderated ({states})")


def _told(result: _Verified) -> dict[str, Any]:
    checks = [asdict(finding) for finding in result.report.findings]
    outcome, verified = result.report.outcome, result.report.verified
    told = {"result": result.name, "state": result.state, "outcome": outcome}
    return {**told, "verified": verified, "checks": checks}


def _line(result: _Verified) -> tuple[str | None, ...]:
    verified = {"verified": "yes", "unsigned": "unsigned"}.get(result.report.outcome, "NO")
    why = None if result.report.verified else _failure(result)
    return result.name, result.state, verified, why


def _failure(result: _Verified) -> str:
    """Return the first reason why a result is not verified."""
    findings = result.report.findings
    failed = [f for f in findings if f.outcome == "failed"]
    first = failed[0] if failed else next(f for f in findings if f.check == "signature")
    return f"{first.check} {first.outcome}: {first.detail}"
