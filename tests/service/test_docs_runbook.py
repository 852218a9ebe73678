"""docs/runbook.md does what it says: its backup and its restore, typed as they stand there."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from config.settings import Settings
from sandbox.services import servers
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_audit import chained
from tests.service.test_cli_runners import operating
from tests.service.test_cli_service import ROOT, environment
from tests.support.fleet import open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]
TEXT = (ROOT / "docs/runbook.md").read_text()


def typed(words: str, folder: Path, settings: Settings) -> str:
    """Type a shell example of the page that holds these words; return what it printed."""
    (lines,) = [block for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) if words in block]
    given = environment(
        database_url=settings.database_url.get_secret_value(),
        redis_lease_url=settings.redis_lease_url,
        redis_token_url=settings.redis_token_url,
        token_keys=settings.token_keys.get_secret_value(),
        receipt_keys=settings.receipt_keys.get_secret_value(),
        trusted_root=settings.trusted_root,
        signers_file=settings.signers_file,
    )
    path = (str(servers.find_postgres()), str(Path(sys.executable).parent), os.environ["PATH"])
    done = subprocess.run(
        ["/bin/bash", "-euc", lines], cwd=folder, env={**given, "PATH": ":".join(path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.gen_test
async def test_a_dump_restored_into_an_empty_database_has_everything_and_goes_on(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    empty_database: str,
) -> None:
    quiet_sweep(monkeypatch)
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        done, live = [await fleet.enqueue() for _ in range(2)]
        assert (await runner.submit(await runner.take())).status_code == 201
        job = await runner.take()
        assert job["run_id"] == live
        typed("pg_dump", tmp_path, settings)

    restored = make_settings(database_url=empty_database)
    doctor = typed("pg_restore", tmp_path, restored)
    assert "migrations" in doctor
    async with operating(restored, sigstore, monkeypatch, capsys) as (fleet, desk):
        again = runner.at(fleet)
        assert (await fleet.admin("GET", f"/results/{done}")).json()["state"] == "accepted"
        await chained(fleet)
        assert (await desk("audit", "verify")).code == 0
        # Its token and its lease are of the time of the dump, and hold.
        assert (await again.heartbeat(job)).status_code == 200
        assert (await again.submit(job)).status_code == 201
        assert (await fleet.row(live))["status"] == "COMPLETE"
