"""A short campaign over real HTTP, the judge of campaigns judged, and the corpus of the parsers."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fuzz import parsers
from tests.fuzz.bundle import (
    MANIFEST,
    OURS,
    RESULT,
    SIGSTORE,
    STRANGERS,
    Bundle,
    Files,
    SigstoreSigner,
    make_bundle,
    sealed,
)
from tests.fuzz.driver import Campaign, Driver
from tests.fuzz.forms import form_of
from tests.fuzz.mutants import make
from tests.fuzz.oracle import Unreadable, read_form, read_json, why_not_accepted
from tests.fuzz.world import Servers, open_servers, open_world
from tests.support.result_factory import job_payload

SEED = "make-test"
MUTANTS = 150


@pytest.fixture(scope="module")
def under() -> Iterator[Servers]:
    """Servers of their own: the campaign's rows are many."""
    with open_servers() as under:
        yield under


def attack(under: Servers, keep: Path, mutants: int, sabotage: str = "") -> Campaign:
    """Run a campaign and return what came of it."""

    async def run() -> Campaign:
        async with open_world(under, sabotage) as world:
            return await Driver(world, SEED, keep).run(range(mutants))

    return asyncio.run(run())


def test_a_short_campaign_finds_nothing(under: Servers, tmp_path: Path) -> None:
    campaign = attack(under, tmp_path, MUTANTS)
    # How long the loop was held says something of an idle machine only: see `make fuzz`.
    found = {name: n for name, n in campaign.violations.items() if name != "held"}
    assert not found, campaign.evidence
    assert campaign.mutants == MUTANTS
    accepted = sum(n for (_, code), n in campaign.codes.items() if code in ("200", "201"))
    assert 0 < accepted < MUTANTS


def test_a_server_that_verifies_no_signature_is_found_out(under: Servers, tmp_path: Path) -> None:
    campaign = attack(under, tmp_path, 40, "signatures")
    assert campaign.accepted_changed > 0
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("*/mutant.json")]
    assert "accepted_changed" in {about["violation"] for about in kept}
    assert {about["seed"] for about in kept} == {SEED}


# The oracle


@pytest.fixture(scope="module")
def honest(under: Servers) -> Bundle:
    job = {**job_payload(), "run_id": parsers.RUN_ID, "lease_id": parsers.LEASE_ID}
    strangers = tuple(SigstoreSigner(under.sigstore, subject) for subject in STRANGERS)
    return make_bundle(job, SigstoreSigner(under.sigstore, OURS), strangers)


def judged(bundle: Bundle, files: Files, *signed: tuple[bytes, bytes]) -> str | None:
    form = form_of(bundle.lease_id, list(files.items()))
    return why_not_accepted(bundle, form.content_type, [form.write()], signed)


def test_the_oracle_lets_what_is_honest_pass(honest: Bundle) -> None:
    assert judged(honest, honest.files) is None
    indented = json.dumps(json.loads(honest.files[MANIFEST]), indent=2).encode()
    assert judged(honest, {**honest.files, MANIFEST: indented}) is None
    assert judged(honest, sealed({**honest.files, "dashboard.html": b"<p>"})) is None
    older = honest.files[RESULT].replace(b"2025-11-23", b"2025-11-22")
    signature = honest.signer.sign(older)
    manifest = honest.files[MANIFEST].replace(b"2025-11-23", b"2025-11-22")
    resigned = {**honest.files, RESULT: older, SIGSTORE: signature, MANIFEST: manifest}
    resigned = sealed(resigned)
    assert judged(honest, resigned, (older, signature)) is None


def _unsealed(bundle: Bundle) -> Files:
    return {**bundle.files, "summary.md": b"# Other\n"}


def _other_bytes(bundle: Bundle) -> Files:
    return sealed({**bundle.files, RESULT: bundle.files[RESULT] + b" "})


def _stranger(bundle: Bundle) -> Files:
    signature = bundle.strangers[0].sign(bundle.files[RESULT])
    return sealed({**bundle.files, SIGSTORE: signature})


def _another_run(bundle: Bundle) -> Files:
    text = bundle.files[MANIFEST].replace(bundle.run_id.encode(), bundle.lease_id.encode())
    return {**bundle.files, MANIFEST: text}


def _another_outcome(bundle: Bundle) -> Files:
    text = bundle.files[MANIFEST].replace(b'"run_status": "complete"', b'"run_status": "failed"')
    return {**bundle.files, MANIFEST: text}


def _another_model(bundle: Bundle) -> Files:
    manifest = json.loads(bundle.files[MANIFEST]) | {"model_ids": ["other"]}
    return {**bundle.files, MANIFEST: json.dumps(manifest).encode()}


def _another_index(bundle: Bundle) -> Files:
    signature = json.loads(bundle.files[SIGSTORE])
    signature["verificationMaterial"]["tlogEntries"][0]["logIndex"] = "7"
    return sealed({**bundle.files, SIGSTORE: json.dumps(signature).encode()})


def _too_few(bundle: Bundle) -> Files:
    return {name: of for name, of in bundle.files.items() if name != "summary.md"}


@pytest.mark.parametrize(
    "change",
    [_unsealed, _other_bytes, _stranger, _another_run, _another_outcome, _another_model,
     _another_index, _too_few],
)  # fmt: skip
def test_the_oracle_sees_every_change(honest: Bundle, change: Callable[[Bundle], Files]) -> None:
    assert judged(honest, change(honest)) is not None


def test_the_oracle_reads_a_signed_result_itself(honest: Bundle) -> None:
    for old, new in (
        (b'"complete"', b'"incomplete"'),
        (b'"task-0"', b'"task-9"'),
        (b'"expected": "4"', b'"expected": "5"'),
        (b'"seed": 7', b'"seed": 8'),
    ):
        text = honest.files[RESULT].replace(old, new)
        signature = honest.signer.sign(text)
        manifest = honest.files[MANIFEST].replace(old, new)
        files = sealed({**honest.files, RESULT: text, SIGSTORE: signature, MANIFEST: manifest})
        may = judged(honest, files, (text, signature))
        assert (may is None) == (new == b'"incomplete"'), may


def test_the_oracle_refuses_another_lease_and_a_second_reading(honest: Bundle) -> None:
    form = form_of(honest.run_id, list(honest.files.items()))
    assert why_not_accepted(honest, form.content_type, [form.write()], ()) == "another lease"
    good = form_of(honest.lease_id, list(honest.files.items()))
    readings = [good.write(), good.write()[:-9]]
    assert why_not_accepted(honest, good.content_type, readings, ()) is not None
    assert why_not_accepted(honest, good.content_type, [], ()) is not None


@pytest.mark.parametrize(
    "text", [b'{"a": 1, "a": 1}', b"NaN", rb'"\ud800"', rb'["\u0000"]', b"[" * 9000, b"\xff"]
)
def test_the_oracle_cannot_read_doubtful_json(text: bytes) -> None:
    with pytest.raises(Unreadable):
        read_json(text)


def test_the_oracles_multipart_is_that_of_the_rfc() -> None:
    kind = 'multipart/form-data; boundary="b"'
    part = b'Content-Disposition: form-data; name="x"\r\n\r\n'
    good = b"preamble\r\n--b \r\n" + part + b"1\r\n--bc\r\n2\r\n--b--\r\nepilogue"
    assert read_form(kind, good) == {"x": b"1\r\n--bc\r\n2"}
    for bad in (good.replace(b"--b--", b"--b"), good.replace(b"\r\n", b"\n"), b"", b"--b--x"[:-2]):
        with pytest.raises(Unreadable):
            read_form(kind, bad)


def test_a_mutant_is_made_again_from_its_seed_and_number(honest: Bundle) -> None:
    other = replace(honest, files=dict(honest.files))
    for number in range(200):
        one, two = (make(SEED, number, [honest, other]) for _ in range(2))
        assert (one.kind, one.real) == (two.kind, two.real)
        if not one.signed and "stranger" not in one.kind:  # ECDSA draws anew
            assert one.request == two.request


# The corpus: every find of a campaign is a file of it


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(name, path, id=f"{name}-{path.stem}")
        for name in parsers.TARGETS
        for path in parsers.corpus(name)
    ],
)
def test_the_corpus_gets_the_answer_in_its_name(name: str, path: Path) -> None:
    assert parsers.TARGETS[name](path.read_bytes()) == path.name.startswith("accepted-")


@pytest.mark.parametrize("name", parsers.TARGETS)
def test_mutations_of_the_corpus_are_refused_or_read_in_one_way(name: str) -> None:
    seed = random.randrange(10**6)  # noqa: S311 (no secret)
    print(f"seed {seed}")  # noqa: T201 (shown when it fails)
    rng = random.Random(f"{seed}:{name}")  # noqa: S311
    parsers.mutate_at_random(name, rng, 100)
