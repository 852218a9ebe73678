"""Models with their creators and sources, and upstream's lookup tables."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from typing import Any
from uuid import UUID

import asyncpg

from db.pool import Executor
from db.queries import load

SQL = load("models")


@dataclass(frozen=True, slots=True)
class NewCreator:
    """A row of `creators`."""

    creator_id: UUID
    name: str
    display_name: str
    homepage: str | None
    service_identifiers: dict[str, Any] | None
    provisional: bool


@dataclass(frozen=True, slots=True)
class NewModel:
    """A row of `models`; the fields stand in the order of the statement's parameters."""

    model_id: UUID
    name: str
    creator_id: UUID | None
    model_hash: str | None
    parameter_count_b: float
    active_parameter_count_b: float
    architecture_id: int
    context_length_default: int | None
    context_length_min: int | None
    context_length_max: int | None
    file_format_id: int
    quantization_id: int
    model_source_mtime: datetime | None
    model_source_size: int | None
    release_date: date | None
    version: str | None
    description: str | None
    predecessor_model_id: UUID | None
    provisional: bool


@dataclass(frozen=True, slots=True)
class NewSource:
    """A row of `model_sources`."""

    model_id: UUID
    source_type_id: int
    url: str
    metadata: dict[str, Any] | None


async def lookups(pool: Executor) -> dict[str, dict[str, int]]:
    """Return the ids of upstream's lookup names: kind -> name -> id."""
    found: dict[str, dict[str, int]] = {}
    for row in await pool.fetch(SQL["lookups"]):
        found.setdefault(row["kind"], {})[row["name"]] = row["id"]
    return found


async def add_creators(connection: Executor, creators: Sequence[NewCreator]) -> None:
    """Get-or-create creators."""
    await connection.execute(SQL["add_creators"], *_columns(creators, NewCreator))


async def add(connection: Executor, models: Sequence[NewModel]) -> None:
    """Get-or-create models; what is known of one is not overwritten."""
    await connection.execute(SQL["add"], *_columns(models, NewModel))


async def add_sources(connection: Executor, sources: str) -> None:
    """Add the sources that a model does not have yet: a JSON array, as of NewSource."""
    await connection.execute(SQL["add_sources"], sources)


async def known(
    connection: Executor, model_ids: Sequence[UUID], hashes: Sequence[str]
) -> list[asyncpg.Record]:
    """Return the models that have one of these ids, or one of these hashes."""
    return await connection.fetch(SQL["known"], list(model_ids), list(hashes))


def _columns(rows: Sequence[Any], of: type[Any]) -> list[list[Any]]:
    """Turn rows of a dataclass into the columns that `unnest` takes."""
    return [[getattr(row, field.name) for row in rows] for field in fields(of)]


async def raise_need(pool: Executor, run_id: UUID, runner_id: str) -> asyncpg.Record | None:
    """Learn from an out-of-memory failure; return model_id and need_gb when the need was raised."""
    return await pool.fetchrow(SQL["raise_need"], run_id, runner_id)


async def lower_need(connection: Executor, run_id: UUID, peak_vram_mb: int) -> None:
    """Learn from the measured peak of an accepted result."""
    await connection.execute(SQL["lower_need"], run_id, peak_vram_mb)


async def learned_needs(pool: Executor) -> list[asyncpg.Record]:
    """Return the models of which another need than the rule's was learned."""
    return await pool.fetch(SQL["learned"])


async def forget_need(connection: Executor, model_id: UUID) -> asyncpg.Record | None:
    """Forget what was learned of a model; return its need_gb, None when there is no such model."""
    return await connection.fetchrow(SQL["forget_need"], model_id)


async def named(pool: Executor, model: str) -> list[UUID]:
    """Return the model_ids of a name, or of the model_id itself."""
    return [row["model_id"] for row in await pool.fetch(SQL["named"], model)]
