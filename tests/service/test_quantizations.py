"""Quantizations: the database's table is the list, and one that is added counts at once."""

from collections.abc import Callable

import pytest

from broker.concurrency import ttl_cache
from broker.jobs.quantizations import KNOWN
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import CAPABILITIES, SMALL, code_of, open_fleet, run_of

MakeSettings = Callable[..., Settings]


@pytest.mark.gen_test
async def test_a_quantization_that_is_added_counts_in_every_process_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttl_cache, "REMEMBERED_S", 0)
    settings = make_settings()
    async with open_fleet(settings, sigstore) as one, open_fleet(settings, sigstore) as other:
        runner = await one.sign_on()
        new = {**CAPABILITIES, "quantizations": ["mxfp4"]}
        refused = await runner.at(other).claim(capabilities=new)
        assert code_of(refused) == (422, "unknown_quantization")
        run = run_of(model={**SMALL, "quantization": "mxfp4"})
        assert code_of(await one.admin("POST", "/queue", json={"runs": [run]}))[0] == 422
        published = (await other.http.get("/.well-known/bakeoff-queue.json")).json()
        assert set(published["quantizations"]) == set(KNOWN)
        await one.pool.execute(
            "INSERT INTO quantization_methods (name, vram_multiplier) VALUES ('mxfp4', 0.55)"
        )
        published = (await other.http.get("/.well-known/bakeoff-queue.json")).json()
        assert "mxfp4" in published["quantizations"]
        added = await one.admin("POST", "/queue", json={"runs": [run]})
        assert added.status_code == 201, added.text
        job = await runner.at(other).claim(capabilities={**new, "quantizations": ["MXFP4"]})
        assert job.status_code == 200, job.text
        assert job.json()["model"]["quantization"] == "mxfp4"


@pytest.mark.gen_test
async def test_a_dry_run_checks_all_that_the_server_checks_and_adds_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:

        async def counted() -> list[int]:
            tables = (
                "run_queue",
                "runs",
                "models",
                "tasks",
                "prompts",
                "audit",
                "idempotency_keys",
            )
            return [await fleet.pool.fetchval(f"SELECT count(*) FROM {name}") for name in tables]

        before = await counted()
        good = await fleet.admin("POST", "/queue?dry_run=1", json={"runs": [run_of()]})
        assert good.status_code == 200, good.text
        assert good.json()["runs"] == [{"created": True, "warnings": []}]
        bad = run_of(model={**SMALL, "quantization": "q9_9"})
        refused = await fleet.admin("POST", "/queue?dry_run=1", json={"runs": [run_of(), bad]})
        assert code_of(refused) == (422, "unknown_quantization")
        unclear = await fleet.admin("POST", "/queue?dry_run=true", json={"runs": [run_of()]})
        assert code_of(unclear) == (422, "invalid_request")
        assert await counted() == before
        run_id = await fleet.enqueue()
        again = run_of(run_id=run_id, priority=1, prompts=[{"id": "other", "system": ""}])
        conflict = await fleet.admin("POST", "/queue?dry_run=1", json={"runs": [again]})
        assert code_of(conflict) == (409, "conflict")
