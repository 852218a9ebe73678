"""run_model_metrics and run_hardware_metrics, written once by the submit that won."""

from dataclasses import dataclass
from uuid import UUID

import asyncpg

from db.pool import Executor
from db.queries import load

SQL = load("metrics")


@dataclass(frozen=True, slots=True)
class MetricsText:
    """Rows of run_model_metrics as one JSON text, which only PostgreSQL reads, and their number."""

    rows: int
    text: str


@dataclass(frozen=True, slots=True)
class HardwareMetrics:
    """The machine a run was measured on; what is unknown is None."""

    gpu_model: str | None
    vram_mb: int | None
    power_limit_w: float | None
    cpu_model: str | None
    cpu_cores: int | None
    cpu_threads: int | None
    ram_gb: float | None
    os_name: str | None
    os_version: str | None
    driver_version: str | None
    runtime_version: str | None
    tflops_fp16: float | None  # of the GPU, by its maker
    peak_vram_mb: int | None
    measured_tflops: float | None


async def add_model_metrics(
    connection: Executor, run_id: UUID, model_id: UUID, cells: MetricsText
) -> None:
    """Write cells of a run; their prompts have been there since the run was enqueued."""
    done = await connection.execute(SQL["add_model_metrics"], run_id, model_id, cells.text)
    assert done == f"INSERT 0 {cells.rows}", f"{done} of {cells.rows} cells: a prompt has no row"


async def add_hardware_metrics(connection: Executor, run_id: UUID, of: HardwareMetrics) -> None:
    """Write the run's hardware row, and find or make the rows it points to."""
    await connection.execute(SQL["lock_hardware"])
    system = await connection.fetchval(
        SQL["get_or_add_system_hardware"], of.cpu_model, of.cpu_cores, of.cpu_threads, of.ram_gb
    )
    software = await connection.fetchval(
        SQL["get_or_add_system_software"],
        of.os_name,
        of.os_version,
        of.driver_version,
        of.runtime_version,
    )
    gpu = None
    if of.gpu_model is not None:  # upstream's gpu_hardware has no row without a model
        gpu = await connection.fetchval(
            SQL["get_or_add_gpu_hardware"], of.gpu_model, of.vram_mb, of.tflops_fp16
        )
        await connection.execute(SQL["link_gpu"], system, gpu)
    await connection.execute(
        SQL["add_hardware_metrics"],
        run_id,
        system,
        software,
        gpu,
        of.peak_vram_mb,
        of.power_limit_w,
        of.measured_tflops,
    )


async def model_metrics_of(
    pool: Executor, run_id: UUID, *, after: int | None, limit: int
) -> list[asyncpg.Record]:
    """Return one page of a result's cells as they are stored, after the cursor (a prompt_id)."""
    return await pool.fetch(SQL["model_metrics_of"], run_id, after, limit)


async def hardware_metrics_of(pool: Executor, run_id: UUID) -> asyncpg.Record | None:
    """Return a run's hardware row with what it points to, by the names of `HardwareMetrics`."""
    return await pool.fetchrow(SQL["hardware_metrics_of"], run_id)


async def run_of(pool: Executor, run_id: UUID) -> asyncpg.Record | None:
    """Return a run as the leaderboard reads it."""
    return await pool.fetchrow(SQL["run_of"], run_id)
