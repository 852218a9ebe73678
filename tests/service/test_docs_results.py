"""docs/results.md does what it says: its code signs and lists a bundle that is accepted."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.admin.moderation import EDGES
from config.settings import Settings
from handlers.errors import STATUS, code_of
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_cli_service import environment
from tests.service.test_runner_key_policy import claimed
from tests.support.result_factory import result_for

MakeSettings = Callable[..., Settings]
TEXT = (Path(__file__).parents[2] / "docs" / "results.md").read_text()


def snippet(words: str) -> str:
    """Return the Python of the page that holds these words."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if words in code]
    return found


@pytest.mark.gen_test
async def test_the_page_signs_and_lists_a_bundle_that_is_accepted(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    async with claimed(make_settings(), sigstore) as (_, runner, job):
        (tmp_path / "result.json").write_text(json.dumps(result_for(job["run_id"], job)))
        (tmp_path / "summary.md").write_text("# Summary")
        given: dict[str, Any] = {"seed": bytes(runner.key), "runner_id": runner.runner_id}
        exec(snippet("signature.ed25519.json"), given)  # noqa: S102 (our own page)
        listing = snippet("bakeoff-results/v1").replace("sigstore-bundle", "ed25519-envelope")
        listing = listing.replace('"signature.sigstore.json"', '"signature.ed25519.json"')
        exec(listing, {})  # noqa: S102
        names = ("result.json", "manifest.json", "summary.md", "signature.ed25519.json")
        files = {name: (tmp_path / name).read_bytes() for name in names}
        answer = await runner.submit(job, files)
        assert answer.status_code == 201, answer.text


@pytest.mark.gen_test
async def test_the_commands_of_the_page_submit_show_moderate_verify_and_export(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, tmp_path: Path
) -> None:
    settings = make_settings()
    async with claimed(settings, sigstore, "sigstore") as (fleet, runner, job):
        for name, content in runner.bundle(job).items():
            (tmp_path / name).write_bytes(content)
        given = {
            **environment(
                url=fleet.url,
                token=fleet.admin_token,
                trusted_root=settings.trusted_root,
                signers_file=settings.signers_file,
            ),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "URL": fleet.url, "TOKEN": runner.token, "RUN_ID": job["run_id"],
            "LEASE_ID": job["lease_id"], "DIR": str(tmp_path / "archive"),
        }  # fmt: skip
        lines = re.sub(r"\b(RUN_ID|DIR)\b(?!\")(?!/)", r"$\1", "\n".join(_shell_lines()))
        lines = lines.replace("$$", "$").replace("$RUN_ID...", "$RUN_ID")
        done = await asyncio.to_thread(
            subprocess.run,
            ["/bin/bash", "-exc", lines], env=given, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        state = await fleet.pool.fetchval("SELECT state FROM submissions")
    assert state == "revoked"
    (exported,) = (tmp_path / "archive").glob("submissions/*/*")
    assert (exported / "result.json").read_bytes() == (tmp_path / "result.json").read_bytes()


def _shell_lines() -> list[str]:
    """The page's shell examples in their order, but for cosign, which needs a login."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    return [block for block in blocks if "cosign" not in block]


def test_the_page_has_every_refusal_of_a_bundle_and_every_decision() -> None:
    for error, status in STATUS.items():
        if status == 422 and error.__name__ not in ("UnknownQuantization",):
            assert f"`{code_of(error.__new__(error))}`" in TEXT, error
    rows = dict(re.findall(r"^\| (\w+) \| ([\w, ]+) \|", TEXT, re.M))
    for former, others in EDGES.items():
        assert set(rows[former].replace(" ", "").split(",")) == others
