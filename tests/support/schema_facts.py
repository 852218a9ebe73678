"""A database's schema as PostgreSQL describes it, to compare two: columns, constraints, indexes."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import asyncpg

Facts = dict[str, list[str]]

COLUMNS = """
SELECT table_name || '.' || column_name || ' ' || data_type
    || CASE WHEN numeric_scale IS NULL THEN '' ELSE format('(%s,%s)', numeric_precision,
        numeric_scale) END
    || ' null=' || is_nullable || ' default=' || coalesce(column_default, '-')
    || CASE WHEN is_identity = 'YES' THEN ' identity=' || identity_generation ELSE '' END
FROM information_schema.columns AS c
WHERE table_schema = 'public' AND EXISTS (
    SELECT FROM information_schema.tables AS t
    WHERE t.table_schema = 'public' AND t.table_name = c.table_name AND t.table_type = 'BASE TABLE'
)
"""
CONSTRAINTS = """
SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
"""
INDEXES = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'"
# A run of ours is one row of run_queue, with many prompts in its job.
LOOSER = {
    "run_queue.prompt_id integer(32,0) null=NO default=-":
    "run_queue.prompt_id integer(32,0) null=YES default=-",
}  # fmt: skip


async def facts(connection: asyncpg.Connection) -> Facts:
    """Return a database's columns, constraints and indexes, each as lines in order."""
    found = {"columns": COLUMNS, "constraints": CONSTRAINTS, "indexes": INDEXES}
    return {
        name: sorted(row[0] for row in await connection.fetch(sql)) for name, sql in found.items()
    }


async def seeds(connection: asyncpg.Connection, tables: Iterable[str]) -> Facts:
    """Return the rows of tables, by table, each as its members but for the moment it was made."""
    return {
        table: sorted(
            str(sorted((name, value) for name, value in row.items() if name != "created_at"))
            for row in await connection.fetch(f"SELECT * FROM {table}")
        )
        for table in sorted(tables)
    }


def not_kept(theirs: Mapping[str, Sequence[str]], ours: Facts) -> list[str]:
    """Return what is theirs and is not so in ours, and what of ours their own INSERTs would hit."""
    wanted = [LOOSER.get(line, line) for line in theirs["columns"]]
    tables = {line.partition(".")[0] for line in wanted}
    lost = sorted(set(wanted) - set(ours["columns"]))
    for name in ("constraints", "indexes"):
        lost += sorted(set(theirs[name]) - set(ours[name]))
    lost += [
        f"{line} (ours, and nothing of theirs fills it)"
        for line in sorted(set(ours["columns"]) - set(wanted))
        if line.partition(".")[0] in tables and "null=NO default=- " in f"{line} "
    ]
    return lost + doubled(ours)


def doubled(ours: Facts) -> list[str]:
    """Return the indexes that another one of the same table, columns and rows makes needless."""
    named: dict[str, list[str]] = {}
    for index in ours["indexes"]:
        made, _, rest = index.partition(" ON ")
        named.setdefault(rest, []).append(made.split()[-1])
    return [
        f"{' and '.join(names)} are one index" for names in chain(named.values()) if len(names) > 1
    ]
