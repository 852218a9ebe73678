"""The tables of B8, and its figure with the targets."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.submits.actors import AT_ONCE
from bench.support.report import Figure, Limit

TARGET_BEATS, TARGET_SCHEMA, TARGET_MEMORY, TARGET_HOLD_MS = 3.0, 30.0, 1.2, 250


def p(latencies: list[float], percent: int) -> float:
    """Return a percentile."""
    return statistics.quantiles(latencies, n=100)[percent - 1]


def show(
    console: Console,
    rounds: dict[str, list[list[float]]],
    rates: list[float],
    taken: dict[str, list[float]],
    schema: tuple[float, float],
    memory: dict[str, tuple[float, float, int]],
    holds: list[dict[str, Any]],
) -> Figure:
    """Print the tables and return the figure."""
    table = Table("heartbeats, 200/s", "p50 ms", "p99 ms", "spread of p99", "p99 ratio to idle")
    medians = {
        name: {n: statistics.median(p(each, n) for each in lists) for n in (50, 99)}
        for name, lists in rounds.items()
    }
    idle = medians["idle"][99]
    rows: dict[str, Any] = {}
    for name, lists in rounds.items():
        spread = [p(each, 99) for each in lists]
        ratio = medians[name][99] / idle
        rows[name] = {**{f"p{n}_ms": round(v, 2) for n, v in medians[name].items()}}
        table.add_row(
            name, f"{medians[name][50]:.2f}", f"{medians[name][99]:.2f}",
            f"{min(spread):.1f} to {max(spread):.1f}", f"{ratio:.2f}",
        )  # fmt: skip
    console.print(table)
    table = Table("step, a 2.2 MB result", "median ms", "most ms", "times")
    for name, each in taken.items():
        table.add_row(name, f"{statistics.median(each):.2f}", f"{max(each):.2f}", str(len(each)))
    rows["steps_ms"] = {name: round(statistics.median(each), 2) for name, each in taken.items()}
    console.print(table)
    table = Table("memory", "server RSS MB", "workers PSS MB", "no.")
    for name, (rss, pss, count) in memory.items():
        table.add_row(name, f"{rss:.1f}", f"{pss:.1f}", str(count))
    rows["memory_mb"] = {name: [round(mb, 1) for mb in each[:2]] for name, each in memory.items()}
    console.print(table)
    worst = max(holds, key=lambda each: each["hold_ms"])
    console.print(
        f"longest hold of the event loop {worst['hold_ms']:.1f} ms ({worst['hold_cpu_ms']:.1f} ms"
        f" of CPU): {worst['where']}", markup=False, highlight=False,
    )  # fmt: skip
    ours, theirs = schema
    console.print(f"schema check {ours:.2f} ms, jsonschema {theirs:.1f} ms: {theirs / ours:.0f} x")
    grown = memory["2 s after"][0] / memory["before"][0]
    rows |= {
        "submits_per_s": round(statistics.median(rates), 1),
        "unrelated_load_p99_to_idle": round(medians["unrelated load"][99] / idle, 2),
    }
    return Figure(
        "B8",
        f"heartbeats' p99 while {AT_ONCE} submits of 2 MB are in flight",
        medians["8 submits"][99],
        "ms",
        {
            "idle_p99": Limit(medians["8 submits"][99] / idle, TARGET_BEATS, most=True),
            "jsonschema": Limit(theirs / ours, TARGET_SCHEMA),
            "memory_after": Limit(grown, TARGET_MEMORY, most=True),
            "hold_ms": Limit(worst["hold_ms"], TARGET_HOLD_MS, most=True),
        },
        rows,
    )
