"""`bakeoff-queue prune`: delete what is past its retention, in the settings' database.

Beside the server and not through it: it works with every server stopped, and its batches take
nothing from the connections that serve runners.
"""

from typing import TYPE_CHECKING, Any

from cli.settings import in_database, read_settings
from client.output import AsJson, Yes, needs_yes, note, print_json, print_table

if TYPE_CHECKING:
    from broker.admin.prune import Retention

COLUMNS = ("kind", "what", "older than", "rows", "oldest")


def prune(yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete old failed runs, ledgers, refusals and expired records; never an accepted result.

    Without --yes it only counts. What is kept for how long: the settings keep_*_s.
    """
    from broker.admin.prune import Prune, retentions

    kinds = retentions(read_settings())

    async def work(pool: Any) -> list[dict[str, Any]]:
        pruning = Prune(pool)
        rows = []
        for each in kinds:
            found = await pruning.look(each)
            row = {
                "kind": each.kind,
                "what": each.what,
                "keep_s": int(each.keep.total_seconds()),
                "rows": found.rows,
                "oldest": found.oldest.isoformat() if found.oldest else None,
            }
            if yes and found.rows:
                row["rows"] = await pruning.delete(each, _progress(each, found.rows))
            rows.append(row)
        return rows

    rows = in_database(work)
    if as_json:
        print_json({"deleted": yes, "kinds": rows})
    else:
        cells = [[row["kind"], row["what"], _age(row["keep_s"]), row["rows"], row["oldest"]]
                 for row in rows]  # fmt: skip
        print_table(COLUMNS, cells)
    total = sum(row["rows"] for row in rows)
    if yes:
        note(f"deleted {total} rows")
    elif total == 0:
        note("nothing is past its time")
    else:
        raise needs_yes(f"delete {total} rows")


def _progress(of: "Retention", found: int) -> Any:
    """Return what tells how far the deletion of a kind is."""
    return lambda deleted: note(f"{of.kind}: {deleted} of {found}")


def _age(seconds: int) -> str:
    """Return a retention as people say it."""
    days, rest = divmod(seconds, 86_400)
    if seconds == 0:
        return "its expiry"
    return f"{days} days" if rest == 0 else f"{seconds} s"
