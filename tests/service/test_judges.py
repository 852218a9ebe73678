"""A run that a model judges: the larger of both must fit, and the runner must support both."""

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, Runner, code_of, model_of, open_fleet, run_of

MakeSettings = Callable[..., Settings]
JUDGED = {"models": [{"id": "m"}], "judge": {"enabled": True, "mode": "scored"}}
SMALL, LARGE = model_of(4, "q8_0"), model_of(20, "q8_0", name="the-judge")  # 5 GB and 25 GB


async def sign_on(fleet: Fleet, name: str, vram_gb: int, *quantizations: str) -> Runner:
    """Return a registered runner of these capabilities."""
    runner = await fleet.admit(name)
    runner.capabilities = {"vram_gb": vram_gb, "quantizations": list(quantizations) or ["q8_0"]}
    assert (await runner.register()).is_success
    return runner


async def add(fleet: Fleet, **changes: Any) -> Any:
    """Enqueue a run and return the answer."""
    return await fleet.admin("POST", "/queue", json={"runs": [run_of(**changes)]})


@pytest.mark.gen_test
async def test_a_runner_fits_when_it_holds_the_larger_of_model_and_judge(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        small = await sign_on(fleet, "small", 24)
        judged = await fleet.enqueue(model=SMALL, judge=LARGE, config=JUDGED)
        told = (await small.claim(explain=True)).json()
        assert told["job"] is None
        [reason] = told["reasons"]
        assert (reason["code"], reason["detail"]) == ("vram", "needs 25 GB, you offer 24")
        assert reason["nearest"] == "model-4-q8_0 q8_0 judged by the-judge"
        plain = await fleet.enqueue(model=SMALL)
        assert (await small.take())["run_id"] == plain, "the same model, not judged"
        shown = (await fleet.admin("GET", f"/queue/{judged}")).json()
        assert (shown["need_gb"], shown["judge_model"]) == (25, "the-judge")
        listed = (await fleet.admin("GET", "/queue?status=PENDING")).json()["runs"]
        assert [run["need_gb"] for run in listed] == [25]
        large = await sign_on(fleet, "large", 25)
        assert (await large.take())["run_id"] == judged


@pytest.mark.gen_test
async def test_a_small_judge_does_not_make_a_large_model_smaller(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        small = await sign_on(fleet, "small", 24)
        await fleet.enqueue(model=LARGE, judge=SMALL, config=JUDGED)
        assert (await small.claim()).status_code == 204


@pytest.mark.gen_test
async def test_a_runner_must_support_the_judges_quantization_as_well(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        one = await sign_on(fleet, "one", 80, "q8_0")
        run_id = await fleet.enqueue(
            model=SMALL, judge=model_of(4, "q4_k_m", name="j"), config=JUDGED
        )
        told = (await one.claim(explain=True)).json()
        assert told["reasons"][0]["detail"] == "needs q4_k_m, you offer q8_0"
        both = await sign_on(fleet, "both", 80, "Q8_0", "Q4_K_M")
        assert (await both.take())["run_id"] == run_id


@pytest.mark.gen_test
async def test_a_deferred_run_waits_for_both_too(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        small, large = await sign_on(fleet, "small", 24), await sign_on(fleet, "large", 25)
        due = {"not_before": "2020-01-01T00:00:00Z", "model": SMALL, "config": JUDGED}
        run_id = await fleet.enqueue(judge=LARGE, **due)
        assert (await small.claim()).status_code == 204
        assert (await large.take())["run_id"] == run_id


@pytest.mark.gen_test
async def test_the_same_run_with_another_judge_is_another_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_id = await fleet.enqueue(model=SMALL, judge=LARGE, config=JUDGED)
        again = await add(fleet, run_id=run_id, model=SMALL, judge=LARGE, config=JUDGED)
        assert again.json()["runs"][0]["created"] is False
        other = await add(fleet, run_id=run_id, model=SMALL, judge=SMALL, config=JUDGED)
        assert code_of(other) == (409, "conflict")
        assert "another judge:" in other.json()["detail"]


@pytest.mark.gen_test
async def test_a_judge_that_is_not_described_is_not_counted_and_that_is_said(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        answer = await add(fleet, model=SMALL, config=JUDGED)
        [warning] = answer.json()["runs"][0]["warnings"]
        assert "names no judge: its VRAM need is its model's alone" in warning
        known = await add(fleet, model=SMALL, judge=LARGE, config={**JUDGED, "n": 2})
        assert known.json()["runs"][0]["warnings"] == []


@pytest.mark.parametrize(
    ("judge", "given", "pointer"),
    [
        ({"enabled": True}, True, "/runs/0/config/judge/mode"),
        ({"enabled": True, "mode": "pairwise_all"}, False, "/runs/0/config/judge/mode"),
        ({"enabled": False, "mode": "scored"}, True, "/runs/0/judge"),
        (None, True, "/runs/0/judge"),
    ],
)
@pytest.mark.gen_test
async def test_a_judge_that_cannot_judge_one_model_is_refused_with_the_fix(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, judge: Any, given: bool, pointer: str
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        config = {"models": [{"id": "m"}], "judge": judge}
        answer = await add(fleet, model=SMALL, judge=LARGE if given else None, config=config)
        assert code_of(answer) == (422, "invalid_request")
        [error] = answer.json()["errors"]
        assert error["pointer"] == pointer
        assert "scored" in error["detail"] or "enable it" in error["detail"]


@pytest.mark.gen_test
async def test_a_judge_is_checked_like_a_model(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        wrong = {
            "/runs/0/judge/quantization": model_of(4, "UD-Q4_K_XL"),
            "/runs/0/judge/parameter_count_b": model_of(4, parameter_count_b=None),
            "/runs/0/judge/model_id": {"model_id": "00000000-0000-4000-8000-000000000001"},
        }
        for pointer, judge in wrong.items():
            answer = await add(fleet, model=SMALL, judge=judge, config=JUDGED)
            assert answer.status_code == 422
            assert answer.json()["errors"][0]["pointer"] == pointer


@pytest.mark.gen_test
async def test_the_same_config_again_is_told_with_the_earlier_batch(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """Whatever it is called: `run.name` is each run's own, and all else is the same."""
    batch = "3f1a7ad2-9f0e-4b0a-8a52-0d6ad8a3c001"
    config = {"run": {"name": "one", "seed": 3}, "models": [{"id": "m"}]}
    async with open_fleet(make_settings(), sigstore) as fleet:
        first = (await add(fleet, config=config, batch_id=batch)).json()["runs"][0]
        assert first["warnings"] == []
        again = await add(fleet, config={**config, "run": {"name": "two", "seed": 3}})
        [warning] = again.json()["runs"][0]["warnings"]
        assert warning.startswith("the same config was enqueued at ")
        assert warning.endswith(f" as run {first['run_id']} of batch {batch}")
        other = await add(fleet, config={**config, "run": {"name": "one", "seed": 4}})
        assert other.json()["runs"][0]["warnings"] == []
        hashes = await fleet.pool.fetch("SELECT config_hash FROM run_queue ORDER BY created_at")
        one, two, three = (row["config_hash"] for row in hashes)
        assert one == two != three
        job = await (await fleet.sign_on()).take()
        assert job["config_hash"] == one


@pytest.mark.gen_test
async def test_a_hash_that_another_model_has_is_told_with_its_id(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """bakeoff may have written the row under an id of its own: model_hash is unique."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        model_id = "00000000-0000-4000-8000-000000000001"
        await fleet.pool.execute(
            "INSERT INTO models (model_id, name, model_hash) VALUES ($1, 'theirs', $2)",
            model_id,
            "sha256:" + "ab" * 32,
        )
        answer = await add(fleet, model=model_of(4, "q8_0", model_hash="ab" * 32))
        assert code_of(answer) == (422, "invalid_request")
        [error] = answer.json()["errors"]
        assert (error["pointer"], model_id in error["detail"]) == ("/runs/0/model/model_hash", True)


STORED = {
    "schema_version": 1,
    "created_at": "2026-08-01T00:00:00Z",
    "updated_at": "2026-08-01T00:00:00Z",
    "creator": {"name": "qwen", "display_name": "Qwen Team", "homepage": None,
                "service_identifiers": {"huggingface": "Qwen"}, "provisional": False},
    "model_hash": None, "active_parameter_count_b": None, "context_length_min": None,
    "context_length_max": 131072, "model_source_mtime": "2026-07-01T00:00:00Z",
    "model_source_size": None, "release_date": None, "version": None, "description": None,
    "predecessor_model_id": "00000000-0000-4000-8000-0000000000aa", "provisional": False,
}  # fmt: skip


@pytest.mark.gen_test
async def test_a_descriptor_is_taken_as_bakeoffs_store_keeps_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        stored = model_of(8, "Q4_K_M", **STORED)
        url = stored["sources"][0]["url"]
        # uuid5 of bakeoff's namespace and the text that its store makes of them
        space = uuid.UUID("dbc87c22-6b6d-4f89-9757-d186f0f62719")
        model_id = str(uuid.uuid5(space, f"{url}|8|None"))
        answer = await add(fleet, model={**stored, "uuid": model_id})
        assert answer.status_code == 201, answer.text
        row = await fleet.pool.fetchrow(
            "SELECT m.*, c.service_identifiers, x.name AS quantization FROM models AS m"
            " JOIN creators AS c USING (creator_id)"
            " JOIN quantization_methods AS x USING (quantization_id)"
        )
        assert row is not None
        assert (str(row["model_id"]), row["quantization"]) == (model_id, "q4_k_m")
        assert row["service_identifiers"] == {"huggingface": "Qwen"}
        assert row["predecessor_model_id"] is None, "a model that is not here"
        assert row["model_source_mtime"].year == 2026
        edited = await add(fleet, model={**stored, "uuid": model_id, "parameter_count_b": 9})
        assert code_of(edited) == (422, "invalid_request")
        assert edited.json()["errors"][0]["pointer"] == "/runs/0/model/uuid"


@pytest.mark.gen_test
async def test_a_predecessor_that_is_there_is_kept_and_a_creator_needs_a_name(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await add(fleet, model=SMALL)
        first = await fleet.pool.fetchval("SELECT model_id FROM models")
        await add(fleet, model={**LARGE, "predecessor_model_id": str(first)})
        kept = await fleet.pool.fetchval(
            "SELECT predecessor_model_id FROM models WHERE name = 'the-judge'"
        )
        assert kept == first
        nameless = await add(fleet, model={**SMALL, "creator": {"homepage": "https://x.example"}})
        assert nameless.json()["errors"][0]["pointer"] == "/runs/0/model/creator/name"
