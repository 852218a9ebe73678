"""Rows of a result: failed cells with their codes, one row per machine, and no second writer."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from config.settings import Settings
from db import metrics
from db.metrics import HardwareMetrics, MetricsText
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_admin_results import accepted
from tests.service.test_submit import cells, claimed, counts
from tests.support.fleet import open_fleet, run_of
from tests.support.result_factory import failed_record, hardware

MakeSettings = Callable[..., Settings]
pytestmark = pytest.mark.usefixtures("patient_locks")
CODES = ("timeout", "refusal", "malformed_output", "oom", "load_failure", "capability_gap",
         "infra_error", "cancelled", "unknown")  # fmt: skip
MACHINES: dict[str, dict[str, Any] | None] = {
    "all unknown": None,
    "all null": dict.fromkeys(hardware()),
    "half known": {**hardware(), "cpu_model": None, "vram_mb": None, "os_name": None},
}


@pytest.mark.gen_test
async def test_a_failed_result_is_kept_with_the_code_of_each_cell_floor_cells_too(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    tasks = [
        {"id": f"t{n}", "domain": "d", "user_prompt": "?", "expected": "4", "scorer": "exact"}
        for n in range(4)
    ]
    async with claimed(make_settings(), sigstore, tasks=tasks) as (fleet, runner, job):
        keys = [(task, prompt["id"]) for task in job["tasks"] for prompt in job["prompts"]]
        keys += [(task, "floor") for task in job["floor_tasks"]]
        model = job["config"]["models"][0]["id"]
        records = [
            failed_record(task, prompt_id, model, code)
            for (task, prompt_id), code in zip(keys, CODES, strict=True)
        ]
        files = runner.bundle(job, records=records, run_status="failed", hardware=None)
        answer = await runner.submit(job, files)
        assert answer.status_code == 201, answer.text
        assert answer.json()["rows"] == {"model_metrics": 9, "hardware_metrics": 1}
        written = await cells(fleet)
        assert written == {
            f"{task['id']}/{prompt_id}": (None, None, code, None)
            for (task, prompt_id), code in zip(keys, CODES, strict=True)
        }
        details = await fleet.pool.fetch("SELECT failure_detail FROM run_model_metrics")
        assert {row["failure_detail"] for row in details} == {f"{c} in a test" for c in CODES}
        run = await fleet.pool.fetchrow(
            "SELECT * FROM runs JOIN accepted_results USING (run_id) JOIN run_queue USING (run_id)"
        )
        assert run is not None
        assert (run["run_status"], run["status"]) == ("failed", "COMPLETE")


@pytest.mark.gen_test
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
async def test_machines_of_which_little_is_known_share_a_row_too_at_once_and_later(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, machine: dict[str, Any] | None
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runners = [await fleet.sign_on(f"runner-{n}") for n in range(3)]
        await fleet.admin("POST", "/queue", json={"runs": [run_of() for _ in runners]})
        jobs = [await runner.take() for runner in runners]
        async with fleet.transaction() as beside:
            await beside.execute("LOCK TABLE run_hardware_metrics, system_hardware")
            submits = [
                asyncio.create_task(runner.submit(job, runner.bundle(job, hardware=machine)))
                for runner, job in zip(runners[:2], jobs[:2], strict=True)
            ]
            await fleet.until_blocked(2)
        answers = await asyncio.gather(*submits)
        later = await runners[2].submit(jobs[2], runners[2].bundle(jobs[2], hardware=machine))
        assert [answer.status_code for answer in (*answers, later)] == [201] * 3
        written = await counts(fleet)
        shared = {name: written[name] for name in ("system_hardware", "system_software")}
        assert shared == dict.fromkeys(shared, 1)
        known = int(bool(machine and machine.get("gpu_model")))
        assert written["gpu_hardware"] == written["system_gpu_link"] == known
        assert written["run_hardware_metrics"] == 3


@pytest.mark.gen_test
async def test_a_second_writer_overwrites_no_row_of_a_result(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with accepted(make_settings(), sigstore) as (fleet, _, (run_id,)):

        async def rows() -> str:
            page = (await fleet.admin("GET", f"/results/{run_id}/rows")).json()
            return json.dumps([page["model_metrics"], page["hardware"], page["run"]])

        before = await rows()
        row = await fleet.pool.fetchrow("SELECT * FROM run_model_metrics LIMIT 1")
        assert row is not None
        sha256 = await fleet.pool.fetchval(
            "SELECT content_sha256 FROM prompts WHERE prompt_id = $1", row["prompt_id"]
        )
        other = MetricsText(1, json.dumps([{"content_sha256": sha256, "score": 0.5}]))
        with pytest.raises(asyncpg.UniqueViolationError):
            await metrics.add_model_metrics(fleet.pool, UUID(run_id), row["model_id"], other)
        unknown = dict.fromkeys(field.name for field in fields(HardwareMetrics))
        machine = HardwareMetrics(**{**unknown, **hardware()})
        with pytest.raises(asyncpg.UniqueViolationError):
            await metrics.add_hardware_metrics(fleet.pool, UUID(run_id), machine)
        assert await rows() == before
