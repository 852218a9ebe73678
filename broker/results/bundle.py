"""A submitted bundle, checked against itself and against the job that was handed out.

The steps are numbered as in the plan of a submit (docs): 1 names, 2 manifest and digests,
4 the result's text and schema, 5 binding. Step 3, the signature, is auth/signers.py. Each check
returns what it read or nothing, and raises: nobody can forget to look at an answer.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from types import MappingProxyType
from typing import Any, Self

from broker.documents import strict_json
from broker.documents.schemas import Schema, load_schema
from broker.documents.strict_json import MAX_VIOLATIONS, pointer, quote
from broker.errors import (
    BrokerError,
    DigestMismatch,
    InvalidBundle,
    InvalidJson,
    RunMismatch,
    Violation,
)
from broker.jobs.cells import failed, judge_score
from broker.jobs.job import MAX_CELLS, Cell, Job, harness_hash
from broker.results import consistency

RESULT = "result.json"
MANIFEST = "manifest.json"
SUMMARY = "summary.md"
SIGNATURE = "signature.sigstore.json"
ENVELOPE = "signature.ed25519.json"
DASHBOARD = "dashboard.html"

REQUIRED = frozenset({RESULT, MANIFEST, SUMMARY})
SIGNATURES = frozenset({SIGNATURE, ENVELOPE})  # the runner key's signature_policy says which one
OPTIONAL = frozenset({DASHBOARD})
CAPS: Mapping[str, int] = MappingProxyType(  # bytes
    {
        RESULT: 16 * 1024 * 1024,
        DASHBOARD: 16 * 1024 * 1024,
        SUMMARY: 1024 * 1024,
        MANIFEST: 256 * 1024,
        SIGNATURE: 128 * 1024,
        ENVELOPE: 128 * 1024,
    }
)
NAMED_MISSING = 5  # of the cells a complete result lacks
# Members and entries of a result: 16 MiB as the harness writes it hold some 750,000. Two bytes are
# enough for one, which becomes 200 and more: without a limit, gigabytes.
MAX_VALUES = 1_000_000
OTHER_HASH = (
    "is not the hash of /config: the first 16 hex digits of SHA-256 over json.dumps(config,"
    " sort_keys=True); hand in result.json as the harness wrote it"
)
_ANOTHER_RUN = Violation("/run_id", "is not the claimed run")
TOO_MANY = Violation(
    "", "send one record for each cell of the job in /records, and no long lists beside them"
)


def check_names(names: Iterable[str], signature: str | None) -> None:
    """Step 1: the required files once each, and none that a bundle does not have.

    `signature` is the file that holds this runner key's kind of signature; None is of a bundle of
    the archive that nobody signed. Names are compared, never opened: `../` and archives are just
    unknown. Raises InvalidBundle.
    """
    counted = Counter(names)
    required = REQUIRED | ({signature} if signature else set())
    problems = [f"{name} is missing" for name in sorted(required - counted.keys())]
    problems += [
        f"{name} is not how this runner key signs: its signature_policy asks for {signature}"
        for name in counted.keys() & SIGNATURES - {signature}
    ]
    unknown = counted.keys() - required - SIGNATURES - OPTIONAL
    problems += [f"{quote(name)} is unknown" for name in unknown]
    problems += [f"{quote(name)} is there twice" for name, n in counted.items() if n > 1]
    if problems:
        told = tuple(Violation("", problem) for problem in sorted(problems)[:MAX_VIOLATIONS])
        raise InvalidBundle("The bundle has the wrong files.", told)


def check_manifest(
    manifest: bytes, digests: Mapping[str, str], run_id: str, schema: Schema | None = None
) -> dict[str, Any]:
    """Step 2: the manifest is of this run and names exactly the submitted files.

    `digests` are the SHA-256 (lower-case hex) of the files as received, by name. The signature
    must be listed too: a runner signs result.json first and writes the manifest last. `schema` is
    that of a submit, if none is given. Raises InvalidBundle, DigestMismatch or RunMismatch; returns
    the manifest.
    """
    document = _read(MANIFEST, manifest, schema or load_schema("manifest"))
    _refuse(RunMismatch, _other_run(document, run_id), "manifest.json is of another run.")
    submitted = {name: digest for name, digest in digests.items() if name != MANIFEST}
    _refuse(InvalidBundle, _other_files(document["files"], submitted))
    _refuse(InvalidBundle, _other_signature(document, submitted))
    _refuse(DigestMismatch, _other_digests(document["files"], submitted))
    return document


def parse_result(text: bytes, cells: int = MAX_CELLS) -> dict[str, Any]:
    """Step 4: strict JSON that fits schemas/result.json.

    `cells` is how many the job has. Raises InvalidBundle, and RunMismatch for far more records.
    """
    result = parse_strictly(text)
    _refuse(RunMismatch, _too_many_records(result, cells))
    with _told_of(RESULT):
        load_schema("result").check(text, result, InvalidBundle)
    return result


def parse_envelope(text: bytes) -> dict[str, Any]:
    """Strict JSON that fits schemas/envelope.json. Raises InvalidBundle."""
    return _read(ENVELOPE, text, load_schema("envelope"))


def parse_strictly(text: bytes) -> Any:
    """Return what result.json says, of whatever shape. Raises InvalidBundle."""
    if strict_json.holds_more(text, MAX_VALUES):
        raise InvalidBundle(f"{RESULT} has more than {MAX_VALUES} values.", (TOO_MANY,))
    with _told_of(RESULT):
        return strict_json.parse(text)


def check_binding(result: dict[str, Any], job: Job) -> None:
    """Step 5: the result is of this run, and all its cells are cells of the job, once each.

    Nor does it say of the job what was not handed out. Raises RunMismatch with the first 50
    violations.
    """
    if result["run_id"] != job.run_id:
        _refuse(RunMismatch, [_ANOTHER_RUN], "result.json is of another run.")
    unlike = consistency.unlike_the_job(result, job)
    _refuse(RunMismatch, chain(_unbound(result, job), unlike), "result.json is not of the job.")


def check_agreement(manifest: dict[str, Any], result: dict[str, Any]) -> None:
    """Step 5: what the manifest repeats of result.json is what that says. Raises InvalidBundle.

    Only result.json is signed. Whoever changes the manifest afterwards cannot be told from its
    author, but must not make it say the opposite.
    """
    told = "manifest.json contradicts result.json."
    _refuse(InvalidBundle, consistency.unlike_the_result(manifest, result), told)


def _read(name: str, text: bytes, schema: Schema) -> dict[str, Any]:
    with _told_of(name):
        return schema.read(text, InvalidBundle)


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    try:
        yield
    except InvalidJson as error:  # 400 is for the request's own body; this is one of its files
        raise InvalidBundle(f"{name}: {error}", error.violations) from None
    except InvalidBundle as error:
        raise InvalidBundle(f"{name} does not fit its schema.", error.violations) from None


def _refuse(
    refusal: type[BrokerError], violations: Iterable[Violation], detail: str | None = None
) -> None:
    first = tuple(islice(violations, MAX_VIOLATIONS))
    if first:
        raise refusal(detail, first)


def _too_many_records(result: Any, cells: int) -> Iterator[Violation]:
    """Before the schema looks at each. A few too many are named one by one by step 5."""
    records = result.get("records") if isinstance(result, dict) else None
    if isinstance(records, list) and len(records) > cells + MAX_VIOLATIONS:
        yield Violation(
            "/records", f"has {len(records)} records: send one for each of the {cells} cells"
        )


def _other_run(manifest: dict[str, Any], run_id: str) -> Iterator[Violation]:
    """Both spellings count where both are given: two readers must not see two runs."""
    if manifest.get("run_id", run_id) != run_id:
        yield _ANOTHER_RUN
    if manifest.get("bundle", {}).get("run_id", run_id) != run_id:
        yield Violation("/bundle/run_id", "is not the claimed run")


def _other_files(files: dict[str, Any], submitted: Mapping[str, str]) -> Iterator[Violation]:
    for name in sorted(submitted.keys() - files.keys()):
        yield Violation("/files", f"{quote(name)} was submitted and is not listed")
    for name in files:
        if name not in submitted:
            yield Violation(
                pointer(("files", name)), "is listed and is not another file of the bundle"
            )


def _other_signature(manifest: dict[str, Any], submitted: Mapping[str, str]) -> Iterator[Violation]:
    """What verifies years later starts from here, and must not look for a file that never was."""
    path = (manifest.get("signature") or {}).get("path")
    if path is not None and path not in submitted:
        yield Violation("/signature/path", "is not a file of the bundle")


def _other_digests(files: dict[str, Any], submitted: Mapping[str, str]) -> Iterator[Violation]:
    for name, digest in submitted.items():
        entry = files[name]
        nested = isinstance(entry, dict)
        if (entry["sha256"] if nested else entry) != digest:
            place = ("files", name, "sha256") if nested else ("files", name)
            yield Violation(pointer(place), f"is not the SHA-256 of {name} as received")


def _unbound(result: dict[str, Any], job: Job) -> Iterator[Violation]:
    if result["provenance"]["config_hash"] != harness_hash(result["config"]):
        yield Violation("/provenance/config_hash", OTHER_HASH)
    grid = _Grid.of(job)
    seen: set[Cell] = set()
    for index, record in enumerate(result["records"]):
        yield from grid.foreign(("records", index), record)
        cell = Cell(record["task_id"], record["prompt_id"], record["tier"])
        if cell in seen:
            yield Violation(pointer(("records", index)), "an earlier record has the same cell")
        seen.add(cell)
    if result["run_status"] == "complete":
        yield from _missing(job, seen)
    yield from _unbound_judgements(result.get("judgements") or (), grid)


def _missing(job: Job, seen: set[Cell]) -> Iterator[Violation]:
    """Floor cells may be missing: the harness does not repeat those that failed when it resumes."""
    missing = [cell for cell in job.main_cells() if cell not in seen]
    if missing:
        first = missing[:NAMED_MISSING]
        named = "; ".join(f"{quote(cell.task_id)} x {quote(cell.prompt_id)}" for cell in first)
        more = f" and {len(missing) - NAMED_MISSING} more" if len(missing) > NAMED_MISSING else ""
        yield Violation("/records", f"a complete run has every main cell; missing: {named}{more}")


def _unbound_judgements(judgements: Iterable[dict[str, Any]], grid: "_Grid") -> Iterator[Violation]:
    """A cell judged twice would have the score that its reader likes better."""
    scored: set[tuple[str, str]] = set()
    for index, judgement in enumerate(judgements):
        yield from grid.foreign(("judgements", index), judgement)
        if "model_id" not in judgement or failed(judgement) or judge_score(judgement) is None:
            continue
        cell = (judgement["task_id"], judgement["prompt_id"])
        if cell in scored:
            yield Violation(pointer(("judgements", index)), "an earlier judgement scores this cell")
        scored.add(cell)


@dataclass(frozen=True, slots=True)
class _Grid:
    """The job's cells, and the parts of them by which to say what is wrong with another."""

    model_ref: str
    cells: frozenset[Cell]
    pairs: frozenset[tuple[str, str]]
    tasks: frozenset[str]

    @classmethod
    def of(cls, job: Job) -> Self:
        cells = frozenset(job.cells())
        pairs = frozenset((cell.task_id, cell.prompt_id) for cell in cells)
        return cls(job.model_ref, cells, pairs, frozenset(cell.task_id for cell in cells))

    def foreign(self, place: tuple[str, int], entry: dict[str, Any]) -> Iterator[Violation]:
        """What of a record or judgement (which has no tier) is not of the job."""
        task_id, prompt_id, tier = entry["task_id"], entry["prompt_id"], entry.get("tier")
        pairwise = entry.get("a_model") is not None  # of two models, one is always another
        for member in ("a_model", "b_model") if pairwise else ("model_id",):
            if entry.get(member) != self.model_ref:
                yield Violation(pointer((*place, member)), "is not the job's model")
        if task_id not in self.tasks:
            yield Violation(pointer((*place, "task_id")), "is not a task of the job")
        elif (task_id, prompt_id) not in self.pairs:
            yield Violation(pointer((*place, "prompt_id")), "is not a prompt of this task's cells")
        elif place[0] == "records" and (task_id, prompt_id, tier) not in self.cells:
            yield Violation(pointer((*place, "tier")), "is not the tier of this cell")
