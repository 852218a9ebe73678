"""docs/pull-client.md does what it says: its code takes what the harness wrote to a receipt."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.jobs.job import Job, comparable_hash
from broker.results.archive_rules import check_archivable
from broker.results.binding import check_binding
from broker.results.bundle import parse_result
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_runner_key_policy import signed
from tests.support.fleet import open_fleet
from tests.support.harness_shapes import RUN, Json, harness_files, harness_result, written

MakeSettings = Callable[..., Settings]
TEXT = (Path(__file__).parents[2] / "docs" / "pull-client.md").read_text()


def snippet(words: str, language: str = "python") -> str:
    """Return the code of the page that holds these words."""
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)
    (one,) = [code for code in found if words in code]
    return one


@pytest.mark.gen_test
async def test_the_pages_code_hands_in_what_the_harness_signed(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on("gpu-1", signature_policy="runner-key")
        await fleet.admin("POST", "/queue", json={"runs": [RUN]})
        job = await runner.take()
        assert job["config_hash"] == comparable_hash(job["config"])
        exec(snippet("config.yaml"), {"job": job, "runner_id": "gpu-1"})  # noqa: S102 (our own page)
        config = json.loads((tmp_path / "config.yaml").read_text())
        assert config["signing"]["runner_id"] == "gpu-1"
        result = harness_result({**job, "config": config})
        envelope = json.loads(signed(result, runner.key, "gpu-1"))
        (tmp_path / "run.json").write_text(json.dumps({"result": result, **envelope}))
        (tmp_path / "bundle").mkdir()
        for name, content in harness_files(result).items():
            (tmp_path / "bundle" / name).write_bytes(content)
        exec(snippet("envelope"), {"measured": "run.json"})  # noqa: S102
        files = {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
        tried = await runner.submit(job, files, query="?validate_only=1")
        assert tried.status_code == 200, tried.text
        assert (await runner.submit(job, files)).status_code == 201


def test_the_pages_code_reads_the_seed_of_the_harnesss_key(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "key.pem").write_bytes(pem)
    given: dict[str, Any] = {"key_path": tmp_path / "key.pem"}
    exec(snippet("load_pem_private_key"), given)  # noqa: S102
    assert given["seed"] == key.private_bytes_raw()


def test_the_pages_result_is_one_that_is_taken() -> None:
    result: Json = json.loads(snippet('"run_id"', "json"))
    config = result["config"]
    floor = {"id": "t_dumb_00", "domain": "arithmetic", "scorer": "exact", "expected": "6"}
    payload = {"tasks": result["tasks"], "floor_tasks": [floor], "prompts": config["prompts"],
               "config": config}  # fmt: skip
    check_binding(parse_result(written(result)), Job.from_payload(result["run_id"], payload))
    check_archivable({}, result)


def test_the_page_explains_each_member_of_its_result() -> None:
    result: Json = json.loads(snippet('"run_id"', "json"))
    explained = "".join(line for line in TEXT.splitlines() if line.startswith("| "))
    beside = {"model_metadata", "model_scores", "judgements"}
    for member in result.keys() - beside:
        assert f"`{member}" in explained, member
