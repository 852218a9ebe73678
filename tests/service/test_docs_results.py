"""docs/results.md does what it says: its code signs and lists a bundle that is accepted."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.admin.moderation import EDGES
from config.settings import Settings
from handlers.errors import STATUS, code_of
from sandbox.services.sigstore_instance import ThrowawaySigstore
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


def test_the_page_has_every_refusal_of_a_bundle_and_every_decision() -> None:
    for error, status in STATUS.items():
        if status == 422 and error.__name__ not in ("UnknownQuantization",):
            assert f"`{code_of(error.__new__(error))}`" in TEXT, error
    rows = dict(re.findall(r"^\| (\w+) \| ([\w, ]+) \|", TEXT, re.M))
    for former, others in EDGES.items():
        assert set(rows[former].replace(" ", "").split(",")) == others
