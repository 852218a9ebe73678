"""`results verify`: what is stored, or was exported, is verified again; what is not, is named."""

import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cli.files import NotAFile, read_file
from cli.main import main
from client import admin_api
from client.descriptors import read_folder
from client.output import CommandFailed
from config.settings import Settings
from sandbox.runner.identity import public_key_text
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore
from tests.service.test_admin_results import decide, hand_in
from tests.service.test_cli_runners import operating
from tests.service.test_receipts import WELL_KNOWN
from tests.service.test_reload import policy
from tests.service.test_runner_key_policy import bundle as enveloped
from tests.service.test_runner_key_policy import signed as envelope
from tests.service.test_submit import listed
from tests.support.cli_admin import Outcome, Shell
from tests.support.fleet import SIGNER, Fleet, Runner
from tests.support.result_factory import digests, failed_record, result_for

MakeSettings = Callable[..., Settings]
CHECKS = ["stored bytes", "files", "manifest", "signature", "result", "agreement", "record",
          "binding", "rows", "receipt"]  # fmt: skip
ONLY_SIGNED = "signed is result.json alone: nobody vouches for the manifest, summary and dashboard"
WHO = ("--identity", SIGNER.identity, "--issuer", SIGNER.issuer)
# The throwaway CA is a year old; its certificates are good for ten minutes.
AGES_AGO = datetime.now(UTC).replace(microsecond=0) - timedelta(days=300)


async def hand_in_old(fleet: Fleet, runner: Runner, at: datetime, **changes: Any) -> str:
    """Hand in a result whose certificate expired ten minutes after `at`; return the run_id."""
    await fleet.enqueue()
    job = await runner.take()
    result = result_for(job["run_id"], job, **changes)
    text = json.dumps(result, indent=1).encode()
    signature = fleet.sigstore.sign(text, SIGNER, issued_at=at)
    files = {"result.json": text, "summary.md": b"#", "signature.sigstore.json": signature}
    answer = await runner.submit(job, listed(result, {**files, "dashboard.html": b"<p>"}))
    assert answer.status_code == 201, answer.text
    return job["run_id"]


async def hand_in_enveloped(fleet: Fleet, runner: Runner) -> str:
    """Hand in a result that the runner key itself has signed; return the run_id."""
    await fleet.enqueue()
    job = await runner.take()
    result = result_for(job["run_id"], job)
    answer = await runner.submit(job, enveloped(result, envelope(result, runner.key)))
    assert answer.status_code == 201, answer.text
    return job["run_id"]


def outcomes(outcome: Outcome) -> list[dict[str, str]]:
    """Return the outcome of each check, by its name, of each result of a command."""
    return [
        {check["check"]: check["outcome"] for check in result["checks"]}
        for result in outcome.json["results"]
    ]


@pytest.mark.gen_test
async def test_a_result_verifies_long_after_its_certificate_has_expired(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        run_id = await hand_in_old(fleet, runner, AGES_AGO)
        trust = ("--trusted-root", sigstore.trusted_root)
        verified = await desk("results", "verify", run_id, *trust, "--json")
        (result,) = verified.json["results"]
        assert (verified.code, result["verified"], result["state"]) == (0, True, "accepted")
        assert outcomes(verified) == [dict.fromkeys(CHECKS, "ok")]
        (signature,) = [of["detail"] for of in result["checks"] if of["check"] == "signature"]
        logged = f"{AGES_AGO + timedelta(minutes=1):%Y-%m-%dT%H:%M:%SZ}"
        assert (SIGNER.identity in signature, logged in signature) == (True, True)
        with monkeypatch.context() as patched:
            patched.setattr(admin_api, "PAGE", 1)  # the rows come in several pages
            paged = await desk("results", "verify", run_id, *trust, "--json")
        assert paged.json == verified.json
        printed = await desk("results", "verify", run_id, *trust)
        assert printed.err == ["1 of 1 result(s) verified", ONLY_SIGNED]
        assert [line.split()[0] for line in printed.out.splitlines()[2:]] == [
            check.split()[0] for check in CHECKS[1:]
        ]

        # A kept copy of the keys stands in for the server's, and a moderated result says so.
        kept = tmp_path / "keys.json"
        kept.write_bytes((await fleet.http.get(WELL_KNOWN)).content)
        await decide(fleet, run_id, "revoked")
        verified = await desk("results", "verify", run_id, *trust, "--keys", kept)
        assert (verified.code, "is revoked" in verified.err[2]) == (0, True)
        kept.write_text(json.dumps({"keys": [], "public_url": "http://queue.test"}))
        doubtful = await desk("results", "verify", run_id, *trust, "--keys", kept, "--json")
        assert (doubtful.code, outcomes(doubtful)[0]["receipt"]) == (1, "failed")

        # The trust root and the signer that are named here count, not those of the record.
        foreign = ThrowawaySigstore.create(tmp_path / "foreign").trusted_root
        unknown = await desk("results", "verify", run_id, "--trusted-root", foreign, "--json")
        assert (unknown.code, outcomes(unknown)[0]["signature"]) == (1, "failed")
        # It is this root that is too old, not a server's; and each failure names its result.
        (told,) = unknown.err[1:]
        assert run_id in told
        assert told.endswith("; name the trust root of its time with --trusted-root")
        none = await desk("results", "verify", "--since", "2999-01-01T00:00:00Z")
        assert (none.code, none.out) == (0, "")
        assert none.err == ["nothing matched: no result was accepted then or later"]
        other = ("--identity", "other@bakeoff.test", "--issuer", SIGNER.issuer)
        refused = await desk("results", "verify", run_id, *trust, *other, "--json")
        assert (refused.code, outcomes(refused)[0]["signature"]) == (1, "failed")


# What was changed in the database, and the checks that notice.
CHANGES = {
    "a byte of the summary": (
        "UPDATE submission_files SET content = 'x'::bytea WHERE name = 'summary.md' AND {}",
        {"stored bytes", "manifest"},
    ),
    "the result, and its digests": (
        (
            "WITH f AS (UPDATE submission_files SET content = content || ' '::bytea,"
            " sha256 = encode(sha256(content || ' '::bytea), 'hex')"
            " WHERE name = 'result.json' AND {} RETURNING run_id, sha256)"
            " UPDATE submissions AS s SET result_sha256 = f.sha256 FROM f WHERE s.run_id = f.run_id"
        ),
        {"manifest", "signature", "receipt"},
    ),
    "a file that is gone": (
        "DELETE FROM submission_files WHERE name = 'signature.sigstore.json' AND {}",
        {"files", "manifest", "signature"},
    ),
    "a score": (
        "UPDATE run_model_metrics SET score = 0.5 WHERE failure_reason IS NULL AND {}",
        {"rows"},
    ),
    "a failure made good": (
        (
            "UPDATE run_model_metrics SET score = 1, failure_reason = NULL"
            " WHERE failure_reason IS NOT NULL AND {}"
        ),
        {"rows"},
    ),
    "a row that is gone": (
        "DELETE FROM run_model_metrics WHERE failure_reason IS NOT NULL AND {}",
        {"rows"},
    ),
    "a row too many": (
        (
            "INSERT INTO run_model_metrics (run_id, prompt_id, model_id, score)"
            " SELECT DISTINCT run_id, (SELECT prompt_id FROM prompts WHERE file_path = 'upstream'),"
            " model_id, 1.0"
            " FROM run_model_metrics WHERE {}"
        ),
        {"rows"},
    ),
    "the hardware": ("UPDATE run_hardware_metrics SET peak_vram_mb = 1 WHERE {}", {"rows"}),
    "the outcome": ("UPDATE runs SET run_status = 'failed' WHERE {}", {"rows"}),
    "the publisher": ("UPDATE runs SET publisher_id = 'other' WHERE {}", {"rows"}),
    "the signer": (
        "UPDATE submissions SET signer_identity = 'other@bakeoff.test' WHERE {}",
        {"record", "receipt"},
    ),
    "the log index": ("UPDATE submissions SET log_index = 7 WHERE {}", {"record", "receipt"}),
    "the time of signing": ("UPDATE submissions SET logged_at = now() WHERE {}", {"record"}),
    "the time of acceptance": (
        "UPDATE submissions SET accepted_at = accepted_at + interval '1 day' WHERE {}",
        {"receipt"},
    ),
    "the receipt": (
        "UPDATE submissions SET receipt = jsonb_set(receipt, '{{runner_id}}', '\"me\"') WHERE {}",
        {"receipt"},
    ),
    "the job": (
        "UPDATE run_queue SET job = jsonb_set(job, '{{tasks,0,id}}', '\"t\"') WHERE {}",
        {"binding"},
    ),
}


@pytest.mark.gen_test
async def test_what_was_changed_in_the_database_is_noticed_by_its_check(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        names = {}
        for name, (statement, _) in CHANGES.items():
            await fleet.enqueue()
            job = await runner.take()
            records = result_for(job["run_id"], job)["records"]
            model = records[0]["model_id"]
            records[2] = failed_record(job["tasks"][1], "plain", model, "oom")
            assert (await runner.submit(job, runner.bundle(job, records=records))).is_success
            names[job["run_id"]] = name
            if name == "a row too many":
                await fleet.pool.execute(
                    "INSERT INTO prompts (task_id, file_path, git_commit_hash, content_sha256,"
                    " content_length_bytes, version)"
                    " SELECT max(task_id), 'upstream', '', 'ab', 1, '1' FROM tasks"
                )
            changed = await fleet.pool.execute(statement.format(f"run_id = '{job['run_id']}'"))
            assert not changed.endswith(" 0"), name
        untouched = await hand_in(fleet, runner)
        verified = await desk(
            "results", "verify", "--since", "2020-01-01T00:00:00Z",
            "--trusted-root", sigstore.trusted_root, "--json",
        )  # fmt: skip
        assert verified.code == 1
        assert verified.err[0] == f"error: 1 of {len(CHANGES) + 1} result(s) verified"
        for result, found in zip(verified.json["results"], outcomes(verified), strict=True):
            failed = {check for check, outcome in found.items() if outcome == "failed"}
            if result["result"] == untouched:
                assert (result["verified"], failed) == (True, set())
            else:
                name = names[result["result"]]
                assert failed == CHANGES[name][1], (name, result)
                assert not result["verified"]


@pytest.mark.gen_test
async def test_a_result_of_a_runner_key_verifies_under_that_key_only(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on(signature_policy="runner-key")
        other = await fleet.sign_on("runner-b")
        run_id = await hand_in_enveloped(fleet, runner)
        await fleet.revoke(runner)
        mine, theirs = (("--public-key", public_key_text(one.key)) for one in (runner, other))
        verified = await desk("results", "verify", run_id, *theirs, *mine, "--json")
        assert (verified.code, outcomes(verified)) == (0, [dict.fromkeys(CHECKS, "ok")])
        # The record has the key; but whoever made the record up could name theirs.
        nobodys = await desk("results", "verify", run_id, "--json")
        assert (nobodys.code, outcomes(nobodys)[0]["signature"]) == (7, "not checked")
        others = await desk("results", "verify", run_id, *theirs, "--json")
        assert (others.code, outcomes(others)[0]["signature"]) == (1, "failed")

        skipped = await desk("results", "export", run_id, tmp_path)
        assert (skipped.code, skipped.err) == (0, ["0 written, 0 there, 1 skipped, 0 refused"])
        assert (await desk("results", "export", run_id, tmp_path, "--runner-key")).code == 0
        offline = ("results", "verify", "--dir", tmp_path, "--json")
        own = await desk(*offline, "--public-key", public_key_text(runner.key))
        assert (own.code, outcomes(own)[0]["signature"]) == (0, "ok")
        theirs = await desk(*offline, "--public-key", public_key_text(other.key))
        assert (theirs.code, outcomes(theirs)[0]["signature"]) == (1, "failed")
        nobodys = await desk(*offline)
        assert (nobodys.code, outcomes(nobodys)[0]["signature"]) == (7, "not checked")
        assert (await desk(*offline, "--public-key", "AAAA")).code == 2

        await fleet.pool.execute(
            "UPDATE runner_keys SET public_key = $1 WHERE runner_id = 'runner-a'",
            bytes(range(32)),
        )
        assert (await desk("results", "verify", run_id)).code != 0


@pytest.mark.gen_test
async def test_what_the_reader_gives_decides_and_not_the_servers_record(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    signers_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server could have made the result up, and have it signed by whomever its record names."""
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        of_record = {"identity": "made@up.test", "issuer": SIGNER.issuer}
        runner = await fleet.sign_on(signer=of_record)
        await fleet.enqueue()
        job = await runner.take()
        result = result_for(job["run_id"], job)
        text = json.dumps(result).encode()
        signature = fleet.sigstore.sign(text, EmailSubject("made@up.test", SIGNER.issuer))
        files = {"result.json": text, "summary.md": b"#", "signature.sigstore.json": signature}
        answer = await runner.submit(job, listed(result, files))
        assert answer.status_code == 201, answer.text
        verify = ("results", "verify", job["run_id"], "--trusted-root", sigstore.trusted_root)
        for who in ((), ("--signers", signers_file), WHO):
            refused = await desk(*verify, *who, "--json")
            assert (refused.code, outcomes(refused)[0]["signature"]) == (1, "failed"), who
            assert "--identity and --issuer, or --signers" in refused.err[1]
        named = ("--identity", of_record["identity"], "--issuer", of_record["issuer"])
        assert (await desk(*verify, *named)).code == 0
        assert (await desk(*verify, *named, "--signers", signers_file)).code == 2
        # Nor are a server's own keys more than its word.
        told = await desk(*verify, *named, "--json")
        receipt = told.json["results"][0]["checks"][-1]
        assert "the server's own word for its keys" in receipt["detail"]


# Without a server


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


ODD: dict[str, Callable[[Path], Any]] = {
    "is a pipe": _pipe,
    "is a socket": _socket,
    "is a device": lambda path: path.symlink_to("/dev/zero"),
    "is a link out of the folder": lambda path: path.symlink_to("/etc/hostname"),
}


@pytest.mark.parametrize("told", ODD)
@pytest.mark.parametrize("name", ["result.json", "manifest.json", "summary.md"])
def test_what_is_no_file_is_told_and_neither_read_nor_waited_for(
    told: str, name: str, capsys: pytest.CaptureFixture[str], sigstore: ThrowawaySigstore
) -> None:
    # A short name: a socket's address has 108 bytes at most.
    with tempfile.TemporaryDirectory() as short:
        bundle, good = Path(short, "odd"), Path(short, "good")
        for folder in (bundle, good):
            folder.mkdir()
            for each in ("result.json", "manifest.json", "summary.md"):
                (folder / each).write_text("{}")
        (bundle / name).unlink()
        ODD[told](bundle / name)
        outcome: list[Outcome] = []
        command = ("results", "verify", "--dir", short, "--trusted-root", sigstore.trusted_root)
        reading = threading.Thread(
            target=lambda: outcome.append(Shell(capsys)(*command, *WHO, "--json")), daemon=True
        )
        reading.start()
        reading.join(30)
        assert outcome, "it waits"
        findings = {Path(of["result"]).name: of["checks"] for of in outcome[0].json["results"]}
        why = "is a link out of the folder" if "device" in told else told
        assert [(of["check"], of["outcome"]) for of in findings["odd"]] == [("files", "failed")]
        assert findings["odd"][0]["detail"].startswith(f"{name} {why}")
        assert len(findings["good"]) > 3, "the others are verified all the same"


def test_a_link_within_the_folder_and_a_folder_among_the_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").mkdir()
    (tmp_path / "d").symlink_to("d")
    assert read_file(tmp_path / "b", 2, tmp_path) == b"ab"
    assert read_file(tmp_path / "c", 2, tmp_path) == b""
    with pytest.raises(NotAFile, match="d is a link out"):
        read_file(tmp_path / "d", 2, tmp_path)
    with pytest.raises(NotAFile, match="null is a device"):
        read_file(Path("/dev/null"), 2, tmp_path)


def test_a_pipe_among_the_descriptors_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(CommandFailed, match=r"a\.json: is not a file"):
        read_folder(tmp_path)


@pytest.mark.gen_test
async def test_an_exported_folder_verifies_without_a_server_by_who_should_have_signed(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    signers_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        runs = [await hand_in_old(fleet, runner, AGES_AGO + timedelta(n)) for n in range(2)]
        assert (await desk("results", "export", *runs, tmp_path)).code == 0
    monkeypatch.setenv("BAKEOFF_QUEUE_URL", "http://127.0.0.1:1")
    monkeypatch.delenv("BAKEOFF_QUEUE_TOKEN")

    def verify(folder: Path, *who: object) -> Outcome:
        capsys.readouterr()
        trust = ("--trusted-root", sigstore.trusted_root)
        command = ("results", "verify", "--dir", folder, "--json", *(trust if who else ()), *who)
        code = main([str(word) for word in command])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err.splitlines())

    both = verify(tmp_path, *WHO)
    assert (both.code, both.err) == (0, ["2 of 2 result(s) verified", ONLY_SIGNED])
    checks = ["files", "manifest", "signature", "result", "agreement", "config hash", "cells"]
    offline = dict.fromkeys(checks, "ok")
    assert outcomes(both) == [offline, offline]
    bundle = tmp_path / "submissions" / "runner-a" / runs[0]
    assert verify(bundle, "--signers", signers_file).code == 0
    account = EmailSubject("github-actions[bot]", SIGNER.issuer)
    with_account = policy(tmp_path / "with-account.yaml", SIGNER, account)
    told = verify(bundle, "--signers", with_account)
    assert told.code == 0
    assert told.err[0].startswith("warning: the signer policy's trusted_identities[1] is ignored")
    monkeypatch.setenv("BAKEOFF_QUEUE_SIGNERS_FILE", str(signers_file))
    monkeypatch.setenv("BAKEOFF_QUEUE_TRUSTED_ROOT", str(sigstore.trusted_root))
    monkeypatch.delenv("BAKEOFF_QUEUE_URL")
    assert verify(bundle).code == 0, "by the settings"

    other = verify(bundle, "--identity", "other@bakeoff.test", "--issuer", SIGNER.issuer)
    assert (other.code, outcomes(other)[0]["signature"]) == (1, "failed")
    assert verify(bundle, "--identity", SIGNER.identity).code == 2
    assert verify(bundle, "--identity", "*@bakeoff.test", "--issuer", SIGNER.issuer).code == 1
    assert verify(tmp_path / "submissions" / "nobody", *WHO).code == 2
    (tmp_path / "empty").mkdir()
    assert verify(tmp_path / "empty", *WHO).code == 3

    def broken(change: Callable[[Path], object]) -> dict[str, str]:
        copy = tmp_path / "copy" / runs[0]
        shutil.copytree(bundle, copy)
        change(copy)
        outcome = verify(copy, *WHO)
        shutil.rmtree(copy)
        assert outcome.code == 1
        return outcomes(outcome)[0]

    def appended(name: str) -> Callable[[Path], object]:
        return lambda copy: (copy / name).write_bytes((copy / name).read_bytes() + b" ")

    found = broken(appended("result.json"))
    assert (found["manifest"], found["signature"]) == ("failed", "failed")
    assert broken(appended("dashboard.html"))["manifest"] == "failed"

    def contradicted(copy: Path) -> None:
        manifest = json.loads((copy / "manifest.json").read_bytes()) | {"run_status": "failed"}
        (copy / "manifest.json").write_text(json.dumps(manifest))

    found = broken(contradicted)
    assert (found["manifest"], found["agreement"]) == ("ok", "failed")
    assert broken(lambda copy: (copy / "notes.txt").touch())["files"] == "failed"
    assert broken(lambda copy: (copy / "sub").mkdir())["files"] == "failed"
    assert broken(lambda copy: (copy / "summary.md").unlink())["files"] == "failed"
    moved = bundle.rename(bundle.with_name(runs[1].replace(runs[1][:8], "0" * 8)))
    found = outcomes(verify(moved, *WHO))[0]
    assert (found["manifest"], found["result"]) == ("failed", "failed")


def test_a_bundle_of_before_verifies_too(
    sigstore: ThrowawaySigstore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_id, at = "6d1c7f0e-3b1a-4b62-9a43-6f2f3d1d0a01", "2025-01-02T03:04:05"
    folder = tmp_path / run_id
    folder.mkdir()

    def verify(result: dict[str, Any]) -> Outcome:
        """A smaller result, and a manifest that nests its run and names a signer."""
        text = json.dumps(result).encode()
        files = {
            "result.json": text,
            "summary.md": b"",
            "signature.sigstore.json": sigstore.sign(text, SIGNER),
        }
        manifest = {
            "schema_version": "bakeoff-results/v1",
            "created_at": at,
            "bundle": {"run_id": run_id, "timestamp": at},
            "files": digests(files),
            "signer": {"identity": "me"},
        }
        for name, content in {**files, "manifest.json": json.dumps(manifest).encode()}.items():
            (folder / name).write_bytes(content)
        trust = ("--trusted-root", sigstore.trusted_root)
        return Shell(capsys)("results", "verify", "--dir", folder, "--json", *trust, *WHO)

    small = {"run_id": run_id, "timestamp": at, "models": [], "hardware": {}, "judge_mode": "off",
             "provenance": {"git": {"sha": "ab"}}}  # fmt: skip
    good = verify(small)
    assert (good.code, good.json["results"][0]["verified"]) == (0, True)
    for broken in ({**small, "run_id": run_id.replace("6", "7")}, {**small, "provenance": 7},
                   {**small, "records": []}):  # fmt: skip
        bad = verify(broken)
        assert (bad.code, outcomes(bad)[0]["result"]) == (1, "failed")
