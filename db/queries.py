"""Named SQL: `db/sql/<table>.sql` holds a table's statements, each under a `-- name:` line."""

import re
from functools import cache
from pathlib import Path

SQL_FOLDER = Path(__file__).with_name("sql")
_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@cache
def load(table: str) -> dict[str, str]:
    """Return the statements of `db/sql/<table>.sql` by name.

    Raises ValueError when a name appears twice or text stands before the first name.
    """
    before, *parts = _NAME.split((SQL_FOLDER / f"{table}.sql").read_text())
    if before.strip():
        raise ValueError(f"{table}.sql: text before the first `-- name:` line")
    names, bodies = parts[::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{table}.sql: a name appears twice")
    return {name: body.strip() for name, body in zip(names, bodies, strict=True)}
