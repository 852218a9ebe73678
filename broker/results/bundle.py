"""The files of a submitted bundle: their names and caps, and the text of result.json.

A submit is verified in numbered steps: 1 names (here), 2 manifest.py, 3 the signature
(signatures.py), 4 the result's text and schema (here), 5 binding.py and the manifest's agreement.
Each check returns what it read, or nothing, and raises: no caller can forget to test an answer.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType
from typing import Any

from broker.documents import strict_json
from broker.documents.schemas import Schema, load_schema
from broker.documents.strict_json import MAX_VIOLATIONS, quote
from broker.errors import (
    BrokerError,
    InvalidBundle,
    InvalidJson,
    RunMismatch,
    Violation,
)
from broker.jobs.job import MAX_CELLS

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
# Members and entries of a result: 16 MiB as the harness writes it hold some 750,000. Two bytes are
# enough for one, which becomes 200 and more: without a limit, gigabytes.
MAX_VALUES = 1_000_000
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


def parse_result(text: bytes, cells: int = MAX_CELLS) -> dict[str, Any]:
    """Step 4: strict JSON that fits schemas/result.json.

    `cells` is how many the job has. Raises InvalidBundle, and RunMismatch for far more records.
    """
    result = parse_strictly(text)
    refuse(RunMismatch, _too_many_records(result, cells))
    with _naming(RESULT):
        load_schema("result").check(text, result, InvalidBundle)
    return result


def parse_envelope(text: bytes) -> dict[str, Any]:
    """Strict JSON that fits schemas/envelope.json. Raises InvalidBundle."""
    return read_file(ENVELOPE, text, load_schema("envelope"))


def parse_strictly(text: bytes) -> Any:
    """Return what result.json says, of whatever shape. Raises InvalidBundle."""
    if strict_json.holds_more(text, MAX_VALUES):
        raise InvalidBundle(f"{RESULT} has more than {MAX_VALUES} values.", (TOO_MANY,))
    with _naming(RESULT):
        return strict_json.parse(text)


def read_file(name: str, text: bytes, schema: Schema) -> dict[str, Any]:
    """Return a file's JSON object, which fits `schema`. Raises InvalidBundle with its name."""
    with _naming(name):
        return schema.read(text, InvalidBundle)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except InvalidJson as error:  # 400 is for the request's own body; this is one of its files
        raise InvalidBundle(f"{name}: {error}", error.violations) from None
    except InvalidBundle as error:
        raise InvalidBundle(f"{name} does not fit its schema.", error.violations) from None


def refuse(
    refusal: type[BrokerError], violations: Iterable[Violation], detail: str | None = None
) -> None:
    """Raise `refusal` with the first violations, if there are any."""
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
