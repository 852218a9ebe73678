"""The files of `db/migrations`, read: plain SQL in dbmate's format, cut into statements.

    -- migrate:up [transaction:false]
    ...
    -- migrate:down [transaction:false]
    ...

`transaction:false` is for what PostgreSQL refuses within a transaction (`CREATE INDEX
CONCURRENTLY`). Such a file is applied statement by statement and may stop in the middle, so each of
its statements can be run again (`IF NOT EXISTS`). docs/operations.md has the rules for a new file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIGRATIONS = Path(__file__).with_name("migrations")
_SECTION = re.compile(r"^-- migrate:(up|down)([^\n]*)$", re.MULTILINE)
# What a statement is made of: comments, quoted text, words, and any other character.
_TOKEN = re.compile(
    r"""
      (?P<comment> --[^\n]* | /\*.*?\*/ )
    | (?P<quoted> [eE]'(?:\\.|''|[^'\\])*' | '(?:''|[^'])*' | "(?:""|[^"])*"
        | \$(?P<tag>[A-Za-z_]\w*|)\$.*?\$(?P=tag)\$ )
    | (?P<word> BEGIN\s+ATOMIC\b | [\w$]+ )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Script:
    """The statements of one direction, without their comments."""

    statements: tuple[str, ...]
    in_transaction: bool


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: `version` is the number its name begins with."""

    name: str
    up: Script
    down: Script

    @property
    def version(self) -> str:
        """The key of `schema_migrations`."""
        return self.name.partition("_")[0]


def read_migrations(folder: Path = MIGRATIONS) -> list[Migration]:
    """Return the migrations, oldest first. Raises ValueError for a file of another form."""
    return [read_migration(path) for path in sorted(folder.glob("*.sql"))]


def newest_version() -> str:
    """Return the version of the newest migration that this code expects."""
    return max(path.name.partition("_")[0] for path in MIGRATIONS.glob("*.sql"))


def read_migration(path: Path) -> Migration:
    """Return one migration. Raises ValueError for a file of another form."""
    before, *parts = _SECTION.split(path.read_text("utf-8"))
    if before.strip() or parts[::3] != ["up", "down"]:
        raise ValueError(f"{path.name}: not one `-- migrate:up` and then one `-- migrate:down`")
    up, down = (_script(path.name, *parts[at + 1 : at + 3]) for at in (0, 3))
    return Migration(path.stem, up, down)


def split_statements(sql: str) -> Iterator[str]:
    """Yield each statement of `sql`, without comments and without its semicolon."""
    pieces: list[str] = []
    depth = 0  # within the body of a function in standard SQL, semicolons end nothing
    for token in _TOKEN.finditer(sql):
        text, word = token[0], (token["word"] or "").upper()
        if word.startswith("BEGIN") and word.endswith("ATOMIC"):
            depth += 1
        elif depth and word in ("CASE", "END"):
            depth += 1 if word == "CASE" else -1
        if text == ";" and not depth:
            yield from _whole(pieces)
            pieces = []
        else:
            pieces.append(" " if token["comment"] else text)
    yield from _whole(pieces)


def _whole(pieces: list[str]) -> Iterator[str]:
    if statement := "".join(pieces).strip():
        yield statement


def _script(name: str, options: str, sql: str) -> Script:
    if options.strip() not in ("", "transaction:true", "transaction:false"):
        raise ValueError(f"{name}: unknown option {options.strip()}")
    return Script(tuple(split_statements(sql)), options.strip() != "transaction:false")
