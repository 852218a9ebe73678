"""The tables of docs/performance.md, from bench/results/: the text between the marks is replaced.

make bench ONLY=page
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.all import MODULES
from bench.support.report import LATEST

PAGE = Path(__file__).parents[1] / "docs/performance.md"
MARKS = "<!-- {name}: begin -->", "<!-- {name}: end -->"
SOAK_COLUMNS = (
    "done", "snapshot", "cycles_per_s", "claims_per_s", "claim_p50_ms", "claim_p99_ms", "dead",
    "table_mb", "index_mb", "hot_share", "vacuums",
)  # fmt: skip


def ratios() -> str:
    """Return the table of B1 to B9."""
    found = _read("latest")
    rows = (
        (
            name,
            each["what"],
            f"{each['value']:,.4g} {each['unit']}",
            "; ".join(f"{arm} {ratio:.2f}" for arm, ratio in each["ratios"].items()),
            "; ".join(each["target"].values()),
            "yes" if each["ok"] else "**no**",
        )
        for name in MODULES
        if (each := found.get(name))
    )
    table = _table(("id", "what", "value", "ratio to", "target", "reached"), rows)
    return f"{table}\n\n{_on(found['machine'])}"


def soak() -> str:
    """Return the table of the soak."""
    found = _read("soak")
    rows = ([str(each[name]) for name in SOAK_COLUMNS] for each in found["slices"])
    given = ", ".join(f"{name} {value}" for name, value in found["given"].items())
    return f"{_table(SOAK_COLUMNS, rows)}\n\nGiven: {given}. {_on(found['machine'])}"


def fleet() -> str:
    """Return the tables of the simulated fleet."""
    found = _read("fleet")
    requests = _table(
        (f"{found['runners']:,} runners", "per s", "p50 ms", "p99 ms", "resent"),
        ([kind, *map(str, each.values())] for kind, each in found["requests"].items()),
    )
    cores = _table(("program", "cores"), ((n, f"{c:.2f}") for n, c in found["cores"].items()))
    bad = found["not_a_success"] or "none"
    return (
        f"{requests}\n\n{cores}\n\nServer memory {found['server_mb']} MB; answers that were not a"
        f" success: {bad}. {_on(found['machine'])}"
    )


def filled(page: str, name: str, text: str) -> str:
    """Return the page with `text` between the marks of `name`. Raises ValueError without them."""
    begin, end = (mark.format(name=name) for mark in MARKS)
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{PAGE} has no marks for {name}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def _read(name: str) -> dict[str, Any]:
    return json.loads(LATEST.with_name(f"{name}.json").read_text())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _on(machine: dict[str, Any]) -> str:
    return (
        f"Measured {machine['date']} at commit {machine['commit']} on {machine['cpus']} cores"
        f" ({machine['processor']}, {machine['memory_gb']} GB), Python {machine['python']}, load"
        f" from {machine['load_generator']}, load average {machine['load_average']} at the end."
    )


def main() -> int:
    """Fill in what has been measured; what has not stays as it is."""
    page = PAGE.read_text()
    for name, made in (("ratios", ratios), ("soak", soak), ("fleet", fleet)):
        try:
            page = filled(page, name, made())
        except FileNotFoundError as error:
            print(f"not measured yet: {error.filename}", file=sys.stderr)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
