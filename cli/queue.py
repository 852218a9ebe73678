"""`bakeoff-queue queue`: enqueue runs, look at them, cancel them, put them back."""

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.receipts import WELL_KNOWN
from client.admin_api import DEFAULT_URL, AdminClient, Token, Url, connect
from client.harness_config import Beside, JudgeMode, Run, read_runs
from client.output import (
    BY_JSON,
    AsJson,
    CommandFailed,
    ExitCode,
    Yes,
    moment,
    needs_yes,
    note,
    print_json,
    print_members,
    print_table,
    usage_error,
)

QUEUE = "/api/admin/queue"
BATCH = 1000  # runs that one request may carry
BATCH_BYTES = 24 * 1024 * 1024  # of a request; the service takes 32 MiB


def _check_run_id(text: str) -> str:
    """Return a run_id, or its beginning, in lower case. Refused before anything is asked."""
    if not re.fullmatch("[0-9a-f-]{4,36}", text.lower()):
        raise typer.BadParameter("4 or more digits of a run_id; `queue ls` shows them")
    return text.lower()


RunId = Annotated[
    str,
    typer.Argument(
        metavar="RUN_ID",
        show_default=False,
        callback=_check_run_id,
        help="As `queue ls` shows it, or its first digits.",
    ),
]
Reason = Annotated[str, typer.Option(help="Why; it goes into the audit.")]
ModelFilter = Annotated[str | None, typer.Option(help="Only of this model (name or model_id).")]
RunnerFilter = Annotated[
    str | None, typer.Option(help="Only runs that this runner holds or has held.")
]
BatchFilter = Annotated[str | None, typer.Option(help="Only of this batch_id.")]
Since = Annotated[
    str | None, typer.Option(help="Only runs created then or later.", metavar="RFC3339")
]
Before = Annotated[str | None, typer.Option(help="Only runs created before.", metavar="RFC3339")]
Text = Annotated[str | None, typer.Option(help="Only with this text in the model or the error.")]
app = typer.Typer(
    help="Runs: enqueue, list, explain, change, cancel, requeue; pause the queue or a model.",
    no_args_is_help=True,
)


class Status(StrEnum):
    """The states of a run, as upstream spells them."""

    PENDING = "PENDING"
    CLAIMED = "CLAIMED"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETE = "COMPLETE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@app.command()
def add(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="bakeoff's config.yaml, or the admin API's JSON."
        ),
    ],
    models: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of model descriptors (*.json)."),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="The tasks that the harness's dry run writes (JSONL)."
        ),
    ] = None,
    floor_tasks: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The harness's dumb_model_tasks.jsonl."),
    ] = None,
    judge_mode: Annotated[
        JudgeMode | None,
        typer.Option(help="Judge the runs so, where the config compares models with each other."),
    ] = None,
    priority: Annotated[int | None, typer.Option(help="Lower runs first (100).")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only show the runs; with a token, let the server check."),
    ] = False,
    idempotency_key: Annotated[
        uuid.UUID | None,
        typer.Option(help="Go on with an earlier command whose answer was lost.", metavar="UUID"),
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Enqueue runs: one per model of a config, or those of the JSON."""
    key = idempotency_key or uuid.uuid4()
    beside = Beside(tasks, floor_tasks, models, judge_mode)
    if dry_run and not token:
        runs = _with_priority(read_runs(file, beside, str(key)), priority)
        note("no token: the server was not asked, which knows more (quantizations, models)")
        return print_json({"runs": runs}) if as_json else _print_plan(runs)
    with connect(url, token) as admin:
        runs = _with_priority(_read_for(admin, file, beside, str(key)), priority)
        if dry_run:
            for batch in _batches(runs):
                admin.post(f"{QUEUE}?dry_run=1", {"runs": batch})
            return print_json({"runs": runs}) if as_json else _print_plan(runs)
        created = _enqueue(admin, runs, key)
    return print_json({"runs": created}) if as_json else _print_created(created, runs)


def _read_for(admin: AdminClient, file: Path, beside: Beside, batch_id: str) -> list[Run]:
    """Return the runs of a file; one that is refused is read again with the server's own list."""
    try:
        return read_runs(file, beside, batch_id)
    except CommandFailed as refused:
        try:
            known = admin.get(WELL_KNOWN).get("quantizations") or ()
        except CommandFailed:
            known = ()
        if set(known) <= set(beside.known):
            raise refused from None
    return read_runs(file, replace(beside, known=known), batch_id)


def _with_priority(runs: list[Run], priority: int | None) -> list[Run]:
    return runs if priority is None else [run | {"priority": priority} for run in runs]


@app.command()
def ls(
    status: Annotated[
        Status | None, typer.Option(case_sensitive=False, help="Only runs in this state.")
    ] = None,
    model: ModelFilter = None,
    runner: RunnerFilter = None,
    batch: BatchFilter = None,
    since: Since = None,
    before: Before = None,
    text: Text = None,
    oldest: Annotated[bool, typer.Option("--oldest", help="The oldest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 50,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first."""
    wanted = _filter(status, model, runner, batch, since, before, text)
    with connect(url, token) as admin:
        order = "oldest" if oldest else "newest"
        pages = list(admin.pages(QUEUE, limit, **wanted, order=order))
    runs = list(chain.from_iterable(page.get("runs", []) for page in pages))
    cursor = pages[-1].get("next_cursor")
    if as_json:
        return print_json({"runs": runs, "next_cursor": cursor})
    if cursor:
        note(f"the first {len(runs)} runs; --limit shows more")
    return _print_runs(runs)


@app.command()
def show(run_id: RunId, url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False) -> None:
    """Show a run and its attempts."""
    with connect(url, token) as admin:
        run = admin.get(f"{QUEUE}/{find_run(admin, run_id)}")
    if as_json:
        return print_json(run)
    attempts = run.pop("attempts", [])
    print_members(run | {name: BY_JSON for name in ("job", "receipt") if run.get(name)})
    return _print_attempts(attempts)


@app.command()
def explain(
    run_id: RunId, url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False
) -> None:
    """Say why a run is not running: each check, and the command that helps."""
    with connect(url, token) as admin:
        answer = admin.get(f"{QUEUE}/{find_run(admin, run_id)}/explain")
    if as_json:
        return print_json(answer)
    print(f"{answer['run_id']} is {answer['status']}: {answer['verdict']}")
    print_table(
        ("check", "state", "detail", "what helps"),
        ([check.get(n) for n in ("code", "state", "detail", "fix")] for check in answer["checks"]),
    )
    return None


@app.command()
def pause(
    reason: Reason,
    model: Annotated[str | None, typer.Option(help="Only this model (name or model_id).")] = None,
    until: Annotated[
        str | None, typer.Option(help="End by itself then.", metavar="RFC3339")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Hand out nothing of the queue, or of one model; runs that are leased go on."""
    body = {"reason": reason, "model": model, "until": moment("--until", until) if until else None}
    _print_pauses(_post(url, token, f"{QUEUE}/pause", body), as_json)


@app.command()
def resume(
    model: Annotated[str | None, typer.Option(help="Only this model (name or model_id).")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; it goes into the audit.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """End a pause of the queue, or of one model."""
    body = {"model": model, "reason": reason}
    _print_pauses(_post(url, token, f"{QUEUE}/resume", body), as_json)


@app.command()
def pauses(url: Url = DEFAULT_URL, token: Token = "", as_json: AsJson = False) -> None:
    """List the pauses that hold now."""
    with connect(url, token) as admin:
        _print_pauses(admin.get(f"{QUEUE}/pauses"), as_json)


@app.command(name="set")
def change(
    run_id: RunId,
    priority: Annotated[int | None, typer.Option(help="Lower runs first.")] = None,
    not_before: Annotated[
        str | None, typer.Option(help="Its earliest start, or `now`.", metavar="RFC3339")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why; it goes into the audit.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Change the priority or the earliest start of a PENDING run."""
    body = _changes(priority, not_before, reason)
    with connect(url, token) as admin:
        answer = admin.patch(f"{QUEUE}/{find_run(admin, run_id)}", body)
    print_json(answer) if as_json else print_members(answer)


class Action(StrEnum):
    """The actions of `queue bulk`."""

    CANCEL = "cancel"
    REQUEUE = "requeue"
    SET = "set"


@app.command()
def bulk(
    action: Annotated[Action, typer.Argument(case_sensitive=False)],
    reason: Reason,
    status: Annotated[
        Status | None, typer.Option(case_sensitive=False, help="Only runs in this state.")
    ] = None,
    model: ModelFilter = None,
    runner: RunnerFilter = None,
    batch: BatchFilter = None,
    since: Since = None,
    before: Before = None,
    text: Text = None,
    priority: Annotated[int | None, typer.Option(help="For set: lower runs first.")] = None,
    not_before: Annotated[
        str | None, typer.Option(help="For set: earliest start, or `now`.", metavar="RFC3339")
    ] = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Cancel, requeue or change all runs that fit a filter; shows their number first."""
    wanted = _filter(status, model, runner, batch, since, before, text)
    if not wanted:
        raise usage_error("give at least one filter: --status, --model, --runner, --batch, ...")
    body = {"action": action, "filter": wanted, **_changes(priority, not_before, reason)}
    with connect(url, token) as admin:
        matched = admin.post(f"{QUEUE}/bulk", body).body["matched"]
        if not yes:
            raise needs_yes(f"{action} {matched} run(s)")
        results: list[dict[str, Any]] = []
        # A thousand a step. What was changed may fit the filter still: then one step is all.
        while matched:
            step = admin.post(f"{QUEUE}/bulk", body | {"expected": matched}).body
            results += step["results"]
            note(f"{action}: {len(results)} done")
            left = admin.post(f"{QUEUE}/bulk", body).body["matched"]
            if not step["done"] or left >= matched:
                break
            matched = left
    if as_json:
        return print_json({"results": results})
    columns = ("run_id", "status", "code", "detail")
    return print_table(columns, ([result.get(name) for name in columns] for result in results))


def _post(url: str, token: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    with connect(url, token) as admin:
        return admin.post(path, {name: v for name, v in body.items() if v is not None}).body


def _changes(priority: int | None, not_before: str | None, reason: str | None) -> dict[str, Any]:
    changes: dict[str, Any] = {"priority": priority, "reason": reason}
    changes = {name: value for name, value in changes.items() if value is not None}
    if not_before is not None:
        now = not_before == "now"
        changes["not_before"] = None if now else moment("--not-before", not_before)
    return changes


def _filter(
    status: Status | None,
    model: str | None,
    runner: str | None,
    batch: str | None,
    since: str | None,
    before: str | None,
    text: str | None,
) -> dict[str, str]:
    given = {
        "status": status, "model": model, "runner": runner, "batch": batch, "text": text,
        "from": moment("--since", since) if since else None,
        "before": moment("--before", before) if before else None,
    }  # fmt: skip
    return {name: str(value) for name, value in given.items() if value is not None}


def find_run(admin: AdminClient, run_id: str) -> str:
    """Return the run_id that begins so. Raises CommandFailed unless there is exactly one."""
    if len(run_id) == 36:
        return run_id
    found = admin.get(QUEUE, id=run_id, limit=2)["runs"]
    if len(found) == 1:
        return found[0]["run_id"]
    if found:
        raise usage_error(f"{run_id}: several runs begin so; give more digits")
    raise CommandFailed(f"{run_id}: no run begins so; see `queue ls`", code=ExitCode.NOT_FOUND)


def _print_pauses(answer: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(answer)
    columns = ("scope", "model", "reason", "paused_at", "until", "paused_by")
    print_table(columns, ([each.get(name) for name in columns] for each in answer["pauses"]))
    return None if answer["pauses"] else note("nothing is paused")


@app.command()
def cancel(
    run_id: RunId,
    reason: Annotated[str, typer.Option(help="Why; it goes into the audit.")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Cancel a run; a runner that works on it is told to stop."""
    _change(run_id, "cancel", reason, yes, url, token, as_json)


@app.command()
def requeue(
    run_id: RunId,
    reason: Annotated[str, typer.Option(help="Why; it goes into the audit.")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Put a FAILED or CANCELLED run back, as if it had never been tried.

    Of a COMPLETE one whose result is incomplete or failed, add a new run like it.
    """
    _change(run_id, "requeue", reason, yes, url, token, as_json)


@app.command()
def requeue_failed(
    failed_by: Annotated[str, typer.Option(help="The runner that failed them.")],
    reason: Annotated[str, typer.Option(help="Why; it goes into the audit.")],
    hours: Annotated[float, typer.Option(min=0.01, max=8760, help="Of so many last hours.")] = 24,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Undo what a runner's failures did: the runs wait for nothing, as if never tried."""
    if not yes:
        raise needs_yes(f"requeue the runs that {failed_by} failed within {hours:g} h")
    body = {"failed_by": failed_by, "within_s": round(hours * 3600), "reason": reason}
    with connect(url, token) as admin:
        answer = admin.post(f"{QUEUE}/requeue", body).body
    if as_json:
        return print_json(answer)
    print_table(("run_id",), ([run_id] for run_id in answer["requeued"]))
    return note(f"{len(answer['requeued'])} run(s) are PENDING again")


def _change(
    beginning: str,
    verb: str,
    reason: str,
    yes: bool,
    url: str,
    token: str,
    as_json: bool,
) -> None:
    with connect(url, token) as admin:
        run_id = find_run(admin, beginning)
        if not yes:
            run = admin.get(f"{QUEUE}/{run_id}")
            work = f", claimed by {run['claimed_by']}" if run.get("claimed_by") else ""
            about = f"{run.get('model')}, {run.get('status')}{work}"
            raise needs_yes(f"{verb} 1 run, {run_id} ({about})")
        answer = admin.post(f"{QUEUE}/{run_id}/{verb}", {"reason": reason}).body
    print_json(answer) if as_json else print_members(answer)


def _enqueue(admin: AdminClient, runs: Sequence[Run], key: uuid.UUID) -> list[dict[str, Any]]:
    """Enqueue in batches. Each has its own key, so that a retry doubles none of them."""
    created: list[dict[str, Any]] = []
    for batch in _batches(runs):
        start = str(len(created))
        try:
            answer = admin.post_once(QUEUE, {"runs": batch}, str(uuid.uuid5(key, start)))
        except CommandFailed as failure:
            raise _stopped(failure, len(created), len(runs), key) from None
        created += answer.body.get("runs", [])
        if len(runs) > len(batch):
            note(f"enqueued {len(created)} of {len(runs)}")
    return created


def _batches(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Yield the runs in pieces that one request may carry, by number, bytes and different cells.

    The same runs give the same pieces: a command that is repeated goes on where it stopped.
    """
    from broker.jobs.enqueue_request import MAX_CELLS_TOGETHER

    batch: list[Run] = []
    size, cells, seen = 0, 0, set[str]()
    for run in runs:
        length = len(json.dumps(run))
        parts = json.dumps([run.get(name) for name in ("tasks", "floor_tasks", "prompts")])
        more = 0 if parts in seen else _cells(run)
        if batch and (
            len(batch) == BATCH or size + length > BATCH_BYTES or cells + more > MAX_CELLS_TOGETHER
        ):
            yield batch
            batch, size, cells, seen, more = [], 0, 0, set(), _cells(run)
        batch.append(run)
        seen.add(parts)
        size, cells = size + length, cells + more
    yield batch


def _cells(run: Run) -> int:
    """Return the most cells that a run may have; what is no list counts nothing here."""
    tasks, floor, prompts = (
        len(part) if isinstance(part := run.get(name), list) else 0
        for name in ("tasks", "floor_tasks", "prompts")
    )
    return tasks * max(prompts, 1) + floor


def _stopped(failure: CommandFailed, done: int, total: int, key: uuid.UUID) -> CommandFailed:
    """Say how to go on when some runs are, or may be, enqueued already."""
    if not done and failure.code is not ExitCode.UNREACHABLE:
        return failure
    line = f"{failure.line}; {done} of {total} runs are known to be enqueued: repeat the command"
    return CommandFailed(
        f"{line} with --idempotency-key {key}, and none is enqueued twice",
        code=failure.code,
        details=failure.details,
    )


def _names(runs: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """Each run's model and quantization, as far as the file tells."""
    for run in runs:
        model = run.get("model")
        model = model if isinstance(model, dict) else {}
        yield model.get("name") or model.get("model_id"), model.get("quantization")


def _print_plan(runs: Sequence[Run]) -> None:
    lists = ("tasks", "floor_tasks", "prompts")
    print_table(
        ("model", "quantization", *lists, "priority"),
        (
            (*names, *(len(run.get(name) or ()) for name in lists), run.get("priority"))
            for names, run in zip(_names(runs), runs, strict=True)
        ),
    )
    note(f"{len(runs)} run(s); nothing was enqueued")


def _print_created(created: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> None:
    """Print the answer, which lists the runs in the order they were sent."""
    print_table(
        ("run_id", "model", "quantization", "status", "created"),
        (
            (run.get("run_id"), *names, run.get("status"), run.get("created"))
            for run, names in zip(created, _names(runs), strict=False)
        ),
    )
    told = Counter(warning for run in created for warning in run.get("warnings", ()))
    for warning, count in told.items():
        note(f"warning: {warning}" if count == 1 else f"warning, of {count} runs: {warning}")


def _print_runs(runs: Iterable[Mapping[str, Any]]) -> None:
    plain = ("run_id", "status", "model", "quantization", "need_gb", "priority")
    columns = (*plain, "leases", "failures", "claimed_by", "retry_after")
    print_table(
        columns,
        (
            (
                *(run.get(name) for name in plain),
                run.get("lease_seq"),
                f"{run.get('attempt_count')} of {run.get('max_attempts')}",
                run.get("claimed_by"),
                run.get("retry_after"),
            )
            for run in runs
        ),
    )


def _print_attempts(attempts: Sequence[Mapping[str, Any]]) -> None:
    if not attempts:
        return
    columns = ("attempt", "runner_id", "claimed_at", "last_heartbeat", "ended_at", "how")
    columns = (*columns, "failure_code", "detail")
    print()
    print_table(columns, ([attempt.get(name) for name in columns] for attempt in attempts))
