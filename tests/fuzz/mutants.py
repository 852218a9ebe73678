"""A mutant: one submit, made from an honest bundle by its seed and number alone."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from tests.fuzz.bundle import (
    DASHBOARD,
    ENVELOPE,
    MANIFEST,
    RESULT,
    SIGSTORE,
    SUMMARY,
    Bundle,
    Files,
    SigstoreSigner,
    sealed,
)
from tests.fuzz.forms import Request, form_of, framed, misframed, mutate_body, mutate_form
from tests.fuzz.json_mutators import cut, flip, mutate_text, mutate_value, odd_value, rewrite
from tests.fuzz.signature_mutators import mutate_signature

Rng = random.Random
REAL_SHARE = 0.1  # the others only ask whether the bundle is valid: an accepted one ends its run


@dataclass
class Mutant:
    """What is sent, and what the oracle must know of how it was made."""

    number: int
    kind: str
    request: Request
    real: bool
    # Results that the mutator let the allowed signer sign, each with the signature.
    signed: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def honest(self) -> bool:
        """Whether it was not changed at all, and must be accepted."""
        return self.kind == "control"


@dataclass
class _Draft:
    """A mutant in the making."""

    rng: Rng
    bundle: Bundle
    other: Bundle
    files: Files
    more: list[tuple[str, bytes]] = field(default_factory=list)
    lease_id: str = ""
    signed: list[tuple[bytes, bytes]] = field(default_factory=list)
    seal: bool = True

    @property
    def signature(self) -> str:
        return self.bundle.signer.file


def make(seed: str, number: int, bundles: Sequence[Bundle]) -> Mutant:
    """Return mutant `number`: of the first of the bundles, with the others to take parts from."""
    rng = Rng(f"{seed}:{number}:mutation")
    bundle, other = bundles[0], rng.choice(bundles)
    draft = _Draft(rng, bundle, other, dict(bundle.files), lease_id=bundle.lease_id)
    [change] = rng.choices(list(_CHANGES), weights=list(_CHANGES.values()))
    names = [change.__name__.strip("_")]
    change(draft)
    if names[0] != "control" and rng.random() < 0.2:
        again = rng.choice([_manifest, _signature, _files, _result, _swapped])
        names.append(again.__name__.strip("_"))
        again(draft)
    files = sealed(draft.files) if draft.seal else draft.files
    form = form_of(draft.lease_id, [*files.items(), *draft.more])
    framing = names[0] if names[0] in ("form", "body", "http") else ""
    if framing == "form":
        names += [mutate_form(rng, form) for _ in range(rng.choice([1, 1, 2]))]
    body = form.write()
    if framing == "body":
        body = mutate_body(rng, body)
    request = framed(form, body)
    if framing == "http":
        how, request = misframed(rng, form, body)
        names.append(how)
    return Mutant(number, "+".join(names), request, rng.random() < REAL_SHARE, draft.signed)


def make_control(bundle: Bundle) -> Mutant:
    """Return the bundle as it is, to be validated only."""
    form = form_of(bundle.lease_id, list(bundle.files.items()))
    return Mutant(-1, "control", framed(form, form.write()), real=False)


def _control(draft: _Draft) -> None:
    """Nothing is changed: what is refused here is honest."""
    draft.seal = False


def _form(draft: _Draft) -> None:
    """An honest bundle in an odd form."""
    draft.seal = False


def _body(draft: _Draft) -> None:
    """An honest bundle in a form of which bytes are changed."""
    draft.seal = False


def _http(draft: _Draft) -> None:
    """An honest bundle in an odd HTTP framing."""
    draft.seal = False


def _manifest(draft: _Draft) -> None:
    """What the manifest says; its digests are not corrected afterwards."""
    rng, text = draft.rng, draft.files.get(MANIFEST, b"")
    draft.seal = False
    if rng.random() < 0.2:
        draft.files[MANIFEST] = _legacy(rng, text)
    elif rng.random() < 0.5:
        draft.files[MANIFEST] = _value_changed(rng, text)
    else:
        draft.files[MANIFEST] = mutate_text(rng, text)


def _legacy(rng: Rng, text: bytes) -> bytes:
    """The older shape, or both at once, and digests in their other spelling."""
    try:
        manifest = json.loads(text)
        manifest["bundle"] = {name: manifest[name] for name in ("run_id", "timestamp")}
        if rng.random() < 0.6:
            del manifest["run_id"], manifest["timestamp"]
        if rng.random() < 0.3:
            manifest["bundle"]["run_id"] = odd_value(rng)
        if rng.random() < 0.5:
            manifest["files"] = {name: of["sha256"] for name, of in manifest["files"].items()}
        if rng.random() < 0.3:
            spell = rng.choice([str.upper, lambda of: of + " ", lambda of: of[:-1]])
            name = rng.choice(list(manifest["files"]))
            manifest["files"][name] = spell(str(manifest["files"][name]))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return text
    return json.dumps(manifest).encode()


def _value_changed(rng: Rng, text: bytes) -> bytes:
    try:
        value = json.loads(text)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            value = mutate_value(rng, value)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return mutate_text(rng, text)


def _mutated_result(draft: _Draft) -> bytes:
    rng, text = draft.rng, draft.files.get(RESULT, b"")
    return (_value_changed if rng.random() < 0.5 else mutate_text)(rng, text)


def _result(draft: _Draft) -> None:
    """Another result under the honest signature."""
    draft.files[RESULT] = _mutated_result(draft)
    draft.seal = draft.rng.random() < 0.85


def _result_rewritten(draft: _Draft) -> None:
    """The same values in other bytes, under the honest signature."""
    draft.files[RESULT] = rewrite(draft.rng, draft.files[RESULT])


def _result_signed(draft: _Draft) -> None:
    """Another result that the allowed signer did sign: only the later steps can refuse it."""
    text = draft.rng.choice([_mutated_result, _mutated_result, _rewritten])(draft)
    signature = draft.bundle.signer.sign(text)
    draft.files |= {RESULT: text, draft.signature: signature}
    draft.signed.append((text, signature))


def _rewritten(draft: _Draft) -> bytes:
    return rewrite(draft.rng, draft.files[RESULT])


def _signature(draft: _Draft) -> None:
    rng, name = draft.rng, draft.signature
    signature = draft.files.get(name, b"")
    for _ in range(rng.choice([1, 1, 1, 2])):
        signature = mutate_signature(rng, name, signature, draft.other.files.get(name, b"{}"))
    draft.files[name] = signature
    draft.seal = rng.random() < 0.95


def _stranger(draft: _Draft) -> None:
    """The honest result, or another, signed by somebody who may not, or not then."""
    rng, signer = draft.rng, draft.rng.choice(draft.bundle.strangers)
    text = draft.files[RESULT] if rng.random() < 0.5 else _mutated_result(draft)
    if isinstance(signer, SigstoreSigner) and rng.random() < 0.3:
        issued = datetime.now(UTC) - timedelta(minutes=rng.choice([-600, 1, 60, 60 * 24 * 400]))
        late = issued + timedelta(minutes=rng.choice([-60, 11, 600]))
        signature = signer.sigstore.sign(text, signer.subject, issued_at=issued, logged_at=late)
    else:
        signature = signer.sign(text)
    draft.files |= {RESULT: text, draft.signature: signature}


def _swapped(draft: _Draft) -> None:
    """Files of another run, and files in each other's place."""
    rng, theirs = draft.rng, draft.other.files
    choice = rng.randrange(4)
    if choice == 0:
        for name in rng.sample(sorted(theirs), rng.randint(1, len(theirs))):
            draft.files[name] = theirs[name]
        draft.seal = rng.random() < 0.7
    elif choice == 1:
        draft.files, draft.seal = dict(theirs), False
    elif choice == 2:
        one, other = rng.sample(sorted(draft.files), 2)
        draft.files[one], draft.files[other] = draft.files[other], draft.files[one]
    else:
        draft.files[RESULT] = theirs[RESULT]


def _files(draft: _Draft) -> None:
    """Files that are missing, empty, too many, twice, or not of a bundle."""
    rng, files = draft.rng, draft.files
    name = rng.choice(sorted(files))
    odd = [b"", b"<html>", b"PK\x03\x04" + bytes(100), b"\x1f\x8b\x08" + bytes(50), b"\xff" * 1000]
    draft.seal = rng.random() < 0.6
    choice = rng.randrange(7)
    if choice == 0:
        del files[name]
    elif choice == 1:
        files[name] = rng.choice(odd)
    elif choice == 2:
        files[DASHBOARD] = rng.choice(odd)
    elif choice == 3:
        draft.more.append((name, rng.choice([files[name], *odd])))
    elif choice == 4:
        names = ["../result.json", "RESULT.JSON", "result.json ", "evil.sh", "a" * 300, "\x00", "é"]
        draft.more.append((rng.choice(names), rng.choice(odd)))
    elif choice == 5:
        files[rng.choice([ENVELOPE, SIGSTORE])] = rng.choice([b"{}", files.get(name, b"")])
    else:
        files[SUMMARY] = rng.choice([flip, cut])(rng, files.get(SUMMARY, b""))


def _lease(draft: _Draft) -> None:
    rng, lease_id = draft.rng, draft.lease_id
    draft.lease_id = rng.choice(
        [draft.other.lease_id, lease_id.upper(), lease_id[:-1], "", "{" + lease_id + "}",
         lease_id + "\n", "urn:uuid:" + lease_id, draft.bundle.run_id, "x" * 5000, "é", "\x00"]
    )  # fmt: skip
    draft.seal = False


_CHANGES: dict[Callable[[_Draft], None], int] = {
    _control: 10,
    _manifest: 120,
    _result: 120,
    _result_rewritten: 50,
    _result_signed: 160,
    _signature: 250,
    _stranger: 30,
    _swapped: 50,
    _files: 50,
    _lease: 10,
    _form: 70,
    _body: 40,
    _http: 40,
}
