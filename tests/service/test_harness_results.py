"""What the real harness writes, through real servers: accepted, stored, exported, and what is not.

The shapes are those of bundles that its unmodified code left (tests/support/harness_shapes.py).
"""

import asyncio
import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from broker.errors import InvalidBundle
from broker.results.archive_rules import NO_COMMIT, check_archivable
from config.settings import Settings
from db.migrate import migrate
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_adoption import ROWS, UPSTREAM, on
from tests.service.test_cli_runners import operating
from tests.support.archive import problems
from tests.support.fleet import SIGNER, Fleet, Runner, code_of, open_fleet
from tests.support.harness_shapes import KINDS, RUN, Json, harness_files, harness_result
from tests.support.result_factory import put, rehashed
from tests.upstream import FILLED

MakeSettings = Callable[..., Settings]
NULL_WITHOUT_GPU = {"gpu_model", "vram_mb", "tflops_fp16", "driver_version", "power_limit_w",
                    "peak_vram_mb"}  # fmt: skip


@pytest.fixture(params=["fresh", "adopted"])
def dsn(request: pytest.FixtureRequest, database: str, empty_database: str) -> str:
    """A database of ours, or one that bakeoff made and filled."""
    if request.param == "fresh":
        return database

    async def fill(connection: asyncpg.Connection) -> None:
        await connection.execute(UPSTREAM)
        await connection.execute(ROWS)

    asyncio.run(on(empty_database, fill))
    migrate(empty_database)
    return empty_database


async def take(fleet: Fleet, runner: Runner, **changes: Any) -> Json:
    """Enqueue a run of the harness's config and claim it."""
    added = await fleet.admin("POST", "/queue", json={"runs": [{**RUN, **changes}]})
    assert added.status_code == 201, added.text
    return await runner.take()


def sealed(fleet: Fleet, result: Json) -> dict[str, bytes]:
    """Return a bundle as `package --sign` leaves it."""
    text = harness_files(result)["result.json"]
    return harness_files(result, fleet.sigstore.sign(text, SIGNER))


@pytest.mark.gen_test
async def test_what_the_harness_writes_is_accepted_stored_and_exported(
    dsn: str,
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    settings = make_settings(database_url=dsn)
    async with operating(settings, sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on("harness-a")
        for kind in KINDS:
            job = await take(fleet, runner)
            assert job["config"]["dataset"] == {"n": 3, "domains": ["qa", "code"]}
            answer = await runner.submit(job, sealed(fleet, harness_result(job, kind)))
            assert answer.status_code == 201, answer.text
            row = await fleet.pool.fetchrow(FILLED, job["run_id"])
            assert row is not None
            empty = {name for name, value in row.items() if value is None}
            assert empty == (NULL_WITHOUT_GPU if kind == "no-gpu" else set())
            assert (row["cpu_threads"], row["runtime_version"]) == (4, "llama.cpp:server")
            assert row["measured_tflops"] == pytest.approx(0.8)
            assert row["tflops_fp16"] == (None if kind == "no-gpu" else 82.6)
            assert (row["prompt_git_hash"], row["run_status"]) == ("ad48ac3", "complete")
            # One cell was judged, one has a judge that failed, and the others have their quality.
            cells = 4 if kind == "resumed" else 5
            assert (row["cells"], row["scores"]) == (cells, cells - 1)
            rows = await fleet.admin("GET", f"/results/{job['run_id']}/rows")
            told = {of["failure_reason"]: of for of in rows.json()["model_metrics"]}
            assert told["infra_error"]["score"] is None
            assert told["infra_error"]["failure_detail"] == "the judge failed: Connection refused"
        root = ("--trusted-root", sigstore.trusted_root)
        verified = await desk("results", "verify", "--since", "2020-01-01T00:00:00Z", *root)
        assert verified.code == 0, verified.err
        archive = tmp_path / "archive"
        exported = await desk("results", "export", "--since", "2020-01-01T00:00:00Z", archive)
        assert exported.err[-1] == "3 written, 0 there, 0 skipped, 0 refused"
        assert problems(archive) == []


@pytest.mark.gen_test
async def test_a_machine_of_which_the_gpu_or_nothing_is_known_has_no_gpu_row(
    dsn: str, make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(database_url=dsn), sigstore) as fleet:
        runner = await fleet.sign_on("harness-a")

        async def rows() -> list[int]:
            tables = ("gpu_hardware", "system_gpu_link")
            return [await fleet.pool.fetchval(f"SELECT count(*) FROM {table}") for table in tables]

        before = await rows()
        for hardware in (None, {}, {"gpu_model": None, "vram_mb": 8192}, {"gpu_model": ""}):
            job = await take(fleet, runner)
            answer = await runner.submit(
                job, sealed(fleet, harness_result(job) | {"hardware": hardware})
            )
            assert answer.status_code == 201, answer.text
        assert await rows() == before
        written = await fleet.pool.fetch("SELECT * FROM run_hardware_metrics")
        assert [row["gpu_hardware_id"] for row in written].count(None) == 4


def of_config(value: Any, *path: str | int) -> Callable[[Json], None]:
    """Return a change of the config that also makes the hash that the harness would make of it."""

    def change(result: Json) -> None:
        put(value, "config", *path)(result)
        rehashed(result)

    return change


PAIR = {"mode": "pairwise", "task_id": "t0001", "prompt_id": "plain", "a_model": "m1",
        "b_model": "m2", "order": "AB", "winner": "A", "judge_raw": "A"}  # fmt: skip
# Each thing that is taken because the harness writes it has a neighbour that is not.
REFUSED: dict[str, tuple[str, str, Callable[[Json], None]]] = {
    "a config that was edited afterwards": (
        "run_mismatch", "/provenance/config_hash", put(1, "config", "server", "ctx")
    ),
    "the hash that the job has": (
        "invalid_bundle", "/provenance/config_hash", put("a7" * 32, "provenance", "config_hash")
    ),
    "no hash": (
        "invalid_bundle", "/provenance/config_hash", put(None, "provenance", "config_hash")
    ),
    "another seed": ("run_mismatch", "/config/run/seed", of_config(8, "run", "seed")),
    "another prompt": (
        "run_mismatch", "/config/prompts/0/system", of_config("Cheat.", "prompts", 0, "system")
    ),
    "other weights": (
        "run_mismatch", "/config/models/0/gguf",
        of_config("org/repo/m1-Q8_0.gguf", "models", 0, "gguf"),
    ),
    "no model": ("invalid_bundle", "/config/models", of_config([], "models")),
    "a kinder judge": (
        "run_mismatch", "/config/judge/gguf", of_config("org/repo/k.gguf", "judge", "gguf")
    ),
    "fewer tasks": ("run_mismatch", "/config/dataset/n", of_config(1, "dataset", "n")),
    "another task": ("run_mismatch", "/tasks/0/expected", put("Rome", "tasks", 0, "expected")),
    "a main cell missing": ("run_mismatch", "/records", lambda result: result["records"].pop()),
    "a comparison with another model": (
        "run_mismatch", "/judgements/0/b_model", put([PAIR], "judgements")
    ),
    "a judgement of nobody": (
        "invalid_bundle", "/judgements/0", put([{"task_id": "t", "prompt_id": "p"}], "judgements")
    ),
    "a judge's score beyond its scale": (
        "invalid_bundle", "/records/2/judge_score", put(6, "records", 2, "judge_score")
    ),
    "a quality on another scale": (
        "invalid_bundle", "/records/2/quality_heuristic", put(5, "records", 2, "quality_heuristic")
    ),
    "a judgement beyond its scale": (
        "invalid_bundle", "/judgements/0/score", put(9, "judgements", 0, "score")
    ),
    "a peak below 0": (
        "invalid_bundle", "/config/hardware/peak_tflops", of_config(-1, "hardware", "peak_tflops")
    ),
    "no text without a failure": (
        "invalid_bundle", "/records/2/text", put(None, "records", 2, "text")
    ),
    "threads that are no number": (
        "invalid_bundle", "/hardware/cpu_threads", put("4", "hardware", "cpu_threads")
    ),
    "no commit": ("invalid_bundle", "/provenance/git/sha", put(None, "provenance", "git", "sha")),
}  # fmt: skip


@pytest.mark.gen_test
async def test_what_the_harness_never_writes_is_refused_by_pointer_and_keeps_the_lease(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on("harness-a")
        job = await take(fleet, runner)
        for name, (code, pointer, change) in REFUSED.items():
            result = copy.deepcopy(harness_result(job))
            change(result)
            answer = await runner.submit(job, sealed(fleet, result))
            assert code_of(answer) == (422, code), name
            assert answer.json()["errors"][0]["pointer"] == pointer, name
        assert (await runner.submit(job, sealed(fleet, harness_result(job)))).status_code == 201


@pytest.mark.gen_test
async def test_a_manifest_that_names_no_signature_does_not_do_without_one(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """`package` without --sign leaves `path: null`; who signs afterwards lists the file."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on("harness-a")
        job = await take(fleet, runner)
        result = harness_result(job)
        unsigned = harness_files(result)
        assert code_of(await runner.submit(job, unsigned)) == (422, "invalid_bundle")
        signature = fleet.sigstore.sign(unsigned["result.json"], SIGNER)
        unlisted = {**unsigned, "signature.sigstore.json": signature}
        assert code_of(await runner.submit(job, unlisted)) == (422, "invalid_bundle")
        manifest = json.loads(sealed(fleet, result)["manifest.json"])
        manifest["signature"] |= {"path": None, "required": False}
        manifest["files"]["signature.sigstore.json"] = {
            "sha256": hashlib.sha256(signature).hexdigest()
        }
        listed = {**unlisted, "manifest.json": json.dumps(manifest).encode()}
        assert (await runner.submit(job, listed)).status_code == 201


# The archive's rules


def archivable(manifest: Json | None = None, **changes: Any) -> None:
    """Check a result with these changes."""
    result = {"provenance": {"git": {"sha": "ad48ac3"}}, "config": {"models": [{"id": "m"}]}}
    check_archivable(manifest or {}, result | changes)


@pytest.mark.parametrize(
    "provenance",
    [
        {"git": {"sha": "ad48ac3"}},
        {"source_repository": "https://x.example/y", "source_commit": "ad48ac3"},
        {"repository": "https://x.example/y", "commit": "ad48ac3", "git": {"sha": None}},
    ],
)
def test_the_archive_takes_a_commit_of_git_or_of_a_named_repository(provenance: Json) -> None:
    archivable(provenance=provenance)


@pytest.mark.parametrize(
    "provenance",
    [{}, {"git": None}, {"git": {"sha": None}}, {"git": {"sha": " "}}, {"git": "ad48ac3"},
     {"repository": "https://x.example/y"}, {"source_commit": "ad48ac3"},
     {"source_repository": "", "source_commit": "ad48ac3"}],
)  # fmt: skip
def test_the_archive_refuses_a_result_of_no_commit_and_the_fix_is_told(provenance: Json) -> None:
    with pytest.raises(InvalidBundle) as refused:
        archivable(provenance=provenance)
    assert refused.value.violations[0].pointer == "/provenance/git/sha"
    assert refused.value.violations[0].detail == NO_COMMIT


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"model_ids": []}, "/model_ids"),
        ({"models": []}, "/models"),
        ({"models": [{"id": "m"}, {"name": "m"}]}, "/models/1/id"),
        ({"models": [{"id": " "}]}, "/models/0/id"),
        ({"models": ["m"]}, "/models/0/id"),
        ({"hardware": {"device_name": None}}, "/hardware/device_name"),
        ({"hardware": {"vram_gb": 1e308}}, "/hardware/vram_gb"),
        ({"hardware": {"vram_gb": "1e400 GB"}}, "/hardware/vram_gb"),
        ({"hardware": {"vram_gb": "-inf"}}, "/hardware/vram_gb"),
        ({"config_hash": 1.5}, "/config_hash"),
        ({"manifest": {"signer": {}}}, "/signer/identity"),
        ({"manifest": {"signer": {"identity": ""}}}, "/signer/identity"),
        ({"manifest": {"signer": {"identity": "a", "issuer": ""}}}, "/signer/issuer"),
        ({"manifest": {"signer": {"identity": "a", "issuer": 7}}}, "/signer/issuer"),
        ({"manifest": {"signer": {"identity": "a", "policy": []}}}, "/signer/policy"),
    ],
)
def test_what_would_stop_the_archives_site_is_refused(changes: Json, pointer: str) -> None:
    with pytest.raises(InvalidBundle) as refused:
        archivable(**changes)
    assert [violation.pointer for violation in refused.value.violations] == [pointer]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_ids": ["m"], "models": [7]},
        {"model_ids": None, "models": "m"},
        {"models": [{"model_id": "m"}]},
        {"hardware": None},
        {"hardware": {"device_name": "RTX"}},
        {"hardware": {"vram_gb": 24}},
        {"hardware": {"vram_gb": "24 GB"}},
        {"hardware": {"vram_gb": "nan"}},
        {"hardware": {"vram_gb": [24]}},
        {"config_hash": "a7"},
        {"config_hash": None},
        {"manifest": {"signer": {"subject": "a", "issuer": None, "policy": {}}}},
    ],
)
def test_what_the_archive_takes_is_taken(changes: Json) -> None:
    archivable(**changes)


@pytest.mark.gen_test
async def test_an_older_result_that_the_archive_would_refuse_is_named_and_not_exported(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Accepted before the rule was there: here, with the rule taken out of the workers' way."""
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on("harness-a")
        good, bad = await take(fleet, runner), None
        assert (await runner.submit(good, sealed(fleet, harness_result(good)))).status_code == 201
        bad = await take(fleet, runner)
        assert (await runner.submit(bad, sealed(fleet, harness_result(bad)))).status_code == 201
        result = harness_result(bad)
        result["provenance"]["git"]["sha"] = None
        for name, content in sealed(fleet, result).items():
            await fleet.pool.execute(
                "UPDATE submission_files SET content = $3, sha256 = $4"
                " WHERE run_id = $1 AND name = $2",
                bad["run_id"], name, content, hashlib.sha256(content).hexdigest(),
            )  # fmt: skip
        archive = tmp_path / "archive"
        done = await desk("results", "export", "--since", "2020-01-01T00:00:00Z", archive)
        assert done.code == 4
        assert "1 written, 0 there, 0 skipped, 1 refused" in done.err[-2]
        assert f"{bad['run_id']}: the archive would refuse it: /provenance/git/sha" in done.err[-1]
        assert [path.name for path in archive.glob("submissions/*/*")] == [good["run_id"]]
        assert [path.name for path in archive.iterdir()] == ["submissions"]
