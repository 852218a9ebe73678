"""What a migration may do to a table in use: the rules for each file after `LAST_FREE`.

A rule is a pattern that a statement must not match, unless its table is made by the same file. For
most, what stands there would hold a lock that stops the queue while a large table is read.
"""

import re
from collections.abc import Iterator

from db.migration_files import Migration, Script

# Written before there was a database in use (docs/decisions/0021-migrations.md).
LAST_FREE = "20261126000001"
# A few rows for ever: a lock on one of these is over before anybody notices it.
FEW_ROWS = {"admin_tokens"}

FORBIDDEN = {
    r"CREATE (UNIQUE )?INDEX (?!CONCURRENTLY IF NOT EXISTS)":
    "CREATE INDEX CONCURRENTLY IF NOT EXISTS, in a file with transaction:false",
    r"DROP INDEX (?!CONCURRENTLY IF EXISTS)":
    "DROP INDEX CONCURRENTLY IF EXISTS, in a file with transaction:false",
    r"REINDEX (?!.*CONCURRENTLY)": "REINDEX ... CONCURRENTLY",
    r"(VACUUM FULL|CLUSTER|LOCK TABLE|TRUNCATE)\b": "it stops everybody",
    r"ALTER TABLE .*\bADD (CONSTRAINT \w+ )?(CHECK|FOREIGN KEY)\b(?!.* NOT VALID)":
    "ADD CONSTRAINT ... NOT VALID, and VALIDATE CONSTRAINT in a later file",
    r"ALTER TABLE .*\bADD (CONSTRAINT \w+ )?(PRIMARY KEY|UNIQUE|EXCLUDE) ?\(":
    "make the index CONCURRENTLY, then ADD CONSTRAINT ... USING INDEX",
    r"ALTER TABLE .*\bADD COLUMN (?!IF NOT EXISTS)": "ADD COLUMN IF NOT EXISTS",
    r"ALTER TABLE .*\bADD COLUMN [^,]*\b(CHECK|UNIQUE|PRIMARY KEY)\b":
    "the table is read under the lock: add the column alone, the constraint NOT VALID",
    r"ALTER TABLE .*\bADD COLUMN [^,]*\b(serial|bigserial|GENERATED|clock_timestamp|random"
    r"|gen_random_uuid|timeofday|nextval)\b":
    "the table is written anew: a default that is the same for all rows, or none",
    r"ALTER TABLE .*\bALTER (COLUMN )?\w+ (SET DATA )?TYPE\b": "the table is written anew",
    r"ALTER TABLE .*\bSET NOT NULL\b": "a CHECK (... IS NOT NULL) NOT VALID, validated later",
    r"ALTER TABLE .*\bSET (LOGGED|UNLOGGED|TABLESPACE)\b": "the table is written anew",
}  # fmt: skip
_TABLE = re.compile(r"(?:CREATE TABLE|INDEX\b.*? ON|ALTER TABLE)(?: IF (?:NOT )?EXISTS)? (\w+)")
_CHANGES_ROWS = re.compile(r"^(WITH .*)?\b(UPDATE|DELETE FROM|INSERT INTO) ?(\w+)")
_TAKES_LOCK = re.compile(r"^(ALTER TABLE|CREATE (OR REPLACE )?TRIGGER|DROP)\b")
_AGAIN = re.compile(
    r"CONCURRENTLY IF (NOT )?EXISTS|IF (NOT )?EXISTS|OR REPLACE|VALIDATE CONSTRAINT|ON CONFLICT"
    r"|^(UPDATE|DELETE|DO|SELECT|ANALYZE|REINDEX)\b"
)


def breaches(migration: Migration) -> list[str]:
    """Return a line for each statement of the way up that may not stand there, with the fix."""
    script = Script(
        tuple(" ".join(text.split()) for text in migration.up.statements),
        migration.up.in_transaction,
    )
    made = [text for text in script.statements if text.startswith("CREATE TABLE")]
    own = FEW_ROWS.union(*(_TABLE.findall(text) for text in made))
    found = [*_forbidden(script, own), *_at_rest(script), *_mixed(script, own)]
    return [f"{migration.name}: {line}" for line in found]


def _forbidden(script: Script, own: set[str]) -> Iterator[str]:
    for statement in script.statements:
        if own & set(_TABLE.findall(statement)):
            continue
        for pattern, fix in FORBIDDEN.items():
            if re.match(pattern, statement):
                yield f"{statement[:60]}: {fix}"


def _at_rest(script: Script) -> Iterator[str]:
    """What stops in the middle is run again from its start."""
    for statement in script.statements:
        if script.in_transaction and "CONCURRENTLY" in statement:
            yield f"{statement[:60]}: the file needs transaction:false"
        if not script.in_transaction and not _AGAIN.search(statement):
            yield f"{statement[:60]}: cannot be run twice (IF NOT EXISTS), without a transaction"


def _mixed(script: Script, own: set[str]) -> Iterator[str]:
    """Rows are changed in a file of their own: a table's lock would be held all the while."""
    if not script.in_transaction:
        return
    texts = script.statements
    changed = [m for text in texts if (m := _CHANGES_ROWS.match(text)) and m[3] not in own]
    locked = [t for t in texts if _TAKES_LOCK.match(t) and not own & set(_TABLE.findall(t))]
    if changed and locked:
        yield f"{changed[0][0]}: in a file of its own, apart from {locked[0][:40]}"
