"""Report of the demo: the results, the attempts, and whether all went well."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import asyncpg

from client.admin_api import AdminClient
from client.output import print_table
from db.pool import open_pool
from sandbox.demo.board import SHORT, Board

METRICS = """
SELECT
    run_id::text, count(*) AS cells, avg(coalesce(score, 0)) AS mean,
    count(*) FILTER (WHERE pass_fail) AS passed
FROM run_model_metrics GROUP BY run_id
"""
NEXT = """\
Where to look next
  make dev           the same services, staying up: a URL, an admin token and a curl line
  make help          everything else there is
  docs/              what the settings mean, and why it is built so
  sandbox/runner/main.py  the runner you just watched; with --endpoint URL it asks a real model"""
CAVEAT = (
    "The answers came from the demo runner's built-in rules, which err on purpose: the scores say\n"
    "nothing about the real models. Signatures, verification and the rows in PostgreSQL are real."
)


@dataclass(frozen=True, slots=True)
class Report:
    """Each run as the admin API shows it, its metric rows, and why a run fits nobody."""

    runs: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, asyncpg.Record]
    unfit: Mapping[str, Any]
    offered_by: str
    seconds: float = 0.0
    problem: str | None = None

    def finished(self, seconds: float, problem: str | None) -> "Report":
        """Return the report with how long it took and what was wrong, if anything."""
        return replace(self, seconds=seconds, problem=problem)

    @property
    def attempts(self) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Each attempt with its run."""
        return ((run, attempt) for run in self.runs for attempt in run["attempts"])

    @property
    def summary(self) -> dict[str, Any]:
        """The demo's last line."""
        return {
            "runs": len(self.runs),
            "complete": sum(run["status"] == "COMPLETE" for run in self.runs),
            "lapsed": sum(attempt["how"] == "lapsed" for _, attempt in self.attempts),
            "unclaimable": self.unfit.get("count", 0),
            "model_metric_rows": sum(row["cells"] for row in self.metrics.values()),
            "seconds": round(self.seconds, 1),
        }


def collect(api: AdminClient, dsn: str, board: Board) -> Report:
    """Read what there is to tell: runs and ledgers by the admin API, scores from the database."""
    runs = [api.get(f"/api/admin/queue/{run['run_id']}") for run in board.runs]
    metrics = {row["run_id"]: row for row in asyncio.run(_metrics(dsn))}
    return Report(runs, metrics, board.unfit, board.largest)


def verdict(report: Report, board: Board) -> str | None:
    """Return the first thing that did not happen as it should have, or None."""
    summary = report.summary
    open_runs = [run for run in report.runs if run["status"] != "COMPLETE"]
    if unexpected := [run for run in open_runs if not board.fits_nobody(run)]:
        run = unexpected[0]
        return f"{run['model']} is {run['status']}: {run['error_detail'] or 'no reason is known'}"
    if len(open_runs) != summary["unclaimable"]:
        return f"{len(open_runs)} runs fit nobody, and {summary['unclaimable']} were explained"
    if any(run["receipt"]["rows"]["model_metrics"] != _cells(report, run)
           for run in report.runs if run["receipt"]):  # fmt: skip
        return "a receipt promises other metric rows than there are"
    if board.doubts:
        return f"a receipt does not prove that its result was accepted: {board.doubts[0]}"
    return _lapse_problem(report, board)


def _lapse_problem(report: Report, board: Board) -> str | None:
    """Return the problem of the run whose runner was killed, if there is one."""
    run = next(run for run in report.runs if run["run_id"] == board.lost)
    ends = {attempt["how"]: attempt["runner_id"] for attempt in run["attempts"]}
    if "lapsed" not in ends:
        return "the killed runner's lease did not lapse"
    if ends.get("completed") in (None, ends["lapsed"]):
        return "the run of the killed runner was not finished by another"
    return None


def print_report(report: Report) -> None:
    """Print the tables. The JSON of `summary` is for the caller to print, as the last line."""
    print("\nResults")
    columns = ("model", "quantization", "run", "cells", "mean score", "passed", "runner", "signer")
    print_table(columns, sorted(_result(report, run) for run in report.runs if run["receipt"]))
    print("\nAttempts ledger")
    columns = ("run", "model", "attempt", "runner", "how", "seconds", "cells done")
    print_table(columns, (_attempt(*pair) for pair in sorted(report.attempts, key=_claimed_at)))
    print(f"\nWhy is it not running?\n  {explanation(report)}\n\n{CAVEAT}\n\n{NEXT}\n")


def explanation(report: Report) -> str:
    """Say of the run that fits nobody what the server told the largest runner."""
    unfit = report.unfit
    return f'{unfit["nearest"]} is PENDING: {report.offered_by} was told "{unfit["detail"]}"'


def _cells(report: Report, run: Mapping[str, Any]) -> int:
    row = report.metrics.get(run["run_id"])
    return row["cells"] if row else 0


def _result(report: Report, run: Mapping[str, Any]) -> tuple[Any, ...]:
    row, signer = report.metrics[run["run_id"]], run["receipt"]["signer"]["identity"]
    mean, passed = f"{row['mean']:.2f}", f"{row['passed']} of {row['cells']}"
    about = (run["model"], run["quantization"], run["run_id"][:SHORT])
    return (*about, row["cells"], mean, passed, run["claimed_by"], signer)


def _attempt(run: Mapping[str, Any], attempt: Mapping[str, Any]) -> tuple[Any, ...]:
    claimed, ended = (_moment(attempt[name]) for name in ("claimed_at", "ended_at"))
    seconds = f"{(ended - claimed).total_seconds():.1f}" if claimed and ended else None
    progress = attempt["progress"] or {}
    # The last heartbeat's word: a completed attempt did the rest after it.
    done = f"{progress['done']} of {progress['total']}" if attempt["how"] != "completed" else "all"
    how = attempt["how"] or run["status"]
    who = attempt["runner_id"]
    return (run["run_id"][:SHORT], run["model"], attempt["attempt"], who, how, seconds, done)


def _claimed_at(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> str:
    return pair[1]["claimed_at"]


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


async def _metrics(dsn: str) -> list[asyncpg.Record]:
    async with open_pool(dsn, 1) as pool:
        return await pool.fetch(METRICS)
