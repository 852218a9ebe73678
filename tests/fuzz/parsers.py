"""The five parsers by themselves: `python -m tests.fuzz.parsers [--seconds S] [--only PARSER]`.

Each target takes bytes and says whether they are accepted; an exception that is no refusal is a
find. With atheris (the extra `fuzz`) the search is guided by coverage of the parsers' code, without
it the corpus is mutated at random. The corpus is tests/assets/fuzz/PARSER/, whose file names begin
with the right answer; a find is written to build/fuzz, to become another file there.
"""

import argparse
import importlib.util
import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from nacl.signing import SigningKey

from auth.errors import AuthError, SignatureInvalid, SignerNotAllowed, Unverifiable
from auth.keys import RunnerKey
from auth.signers import BundleVerifier, Signer, SignerPolicy
from broker.errors import BrokerError
from broker.jobs.job import Job
from broker.results import binding
from broker.results import bundle as bundles
from broker.results.manifest import check_manifest
from broker.results.signatures import RunnerKeySignature
from broker.results.uploads import Spool
from handlers.submit import Parts
from tests.fuzz.forms import BOUNDARY
from tests.fuzz.json_mutators import cut, flip, mutate_text, splice
from tests.fuzz.oracle import Unreadable, read_form, read_json

ASSETS = Path(__file__).parents[1] / "assets" / "fuzz"
KEEP = Path("build/fuzz")
RUN_ID = "0b6f1f64-4c3f-4f0e-9f6b-2f6a0c1d7e11"
LEASE_ID = "00000000-0000-4000-8000-000000000000"
SIGNER = Signer("runner@bakeoff.test", "https://issuer.bakeoff.test")
KEY = SigningKey(b"\x07" * 32)
RUNNER = "runner-a"
# The largest of an atheris input; the caps are tested elsewhere.
MOST = 64 * 1024


@cache
def good(name: str) -> bytes:
    """The honest file that the others of its folder were made from."""
    return (ASSETS / name).read_bytes()


@cache
def _verifier() -> BundleVerifier:
    return BundleVerifier(ASSETS / "trusted_root.json", SignerPolicy((SIGNER,)))


@cache
def _job() -> Job:
    return Job.from_payload(RUN_ID, json.loads(good("job.json")))


def bundle(data: bytes) -> bool:
    """A Sigstore bundle over signed.json."""
    try:
        _verifier().verify(good("signed.json"), data, SIGNER)
    except (SignatureInvalid, SignerNotAllowed, Unverifiable):
        return False
    read_json(data)  # whatever is accepted has one reading
    return True


def envelope(data: bytes) -> bool:
    """An Ed25519 envelope over signed.json."""
    signature = RunnerKeySignature(RunnerKey(bytes(KEY.verify_key)), RUNNER)
    try:
        signature.verify(good("signed.json"), data)
    except (AuthError, BrokerError):
        return False
    read_json(data)
    return True


def manifest(data: bytes) -> bool:
    """A manifest of the honest files."""
    digests = json.loads(good("digests.json"))
    try:
        check_manifest(data, digests, RUN_ID)
    except BrokerError:
        return False
    read_json(data)
    return True


def result(data: bytes) -> bool:
    """A result whose signature is good: text, schema and binding."""
    try:
        job = _job()
        binding.check_binding(bundles.parse_result(data, job.cell_count), job)
    except BrokerError:
        return False
    read_json(data)
    return True


def multipart(data: bytes) -> bool:
    """A body, whole and in pieces: how it was cut on its way must not matter."""
    whole = _parts(data, [len(data)])
    assert whole == _parts(data, [1 + len(data) // 3] * 3), "the pieces decide"
    if whole is None:
        return False
    try:
        read = read_form(f"multipart/form-data; boundary={BOUNDARY.decode()}", data)
    except Unreadable as error:
        raise AssertionError(f"accepted, and {error}") from None
    read.pop("lease_id")
    assert whole == read
    return True


def _parts(data: bytes, sizes: list[int]) -> dict[str, bytes] | None:
    spool = Spool()
    try:
        parts, at = Parts(BOUNDARY, spool), 0
        for size in sizes:
            parts.feed(data[at : at + size])
            at += size
        upload = spool.finish() if parts.ended else None
        return {name: upload.read(name) for name in upload.files} if upload else None
    except BrokerError:
        return None
    finally:
        spool.close()


TARGETS: dict[str, Callable[[bytes], bool]] = {
    target.__name__: target for target in (bundle, envelope, manifest, result, multipart)
}


def corpus(name: str) -> list[Path]:
    """The files of one parser."""
    return sorted((ASSETS / name).iterdir())


def mutate_at_random(name: str, rng: random.Random, count: int) -> int:
    """Give a parser mutations of its corpus; return how many it accepted. Raises at a find."""
    files = [path.read_bytes() for path in corpus(name)]
    changes = [flip, cut, splice] if name == "multipart" else [mutate_text]
    accepted = 0
    for _ in range(count):
        data = rng.choice(files)
        for _ in range(rng.choice([1, 1, 2, 4])):
            data = rng.choice(changes)(rng, data)
        try:
            accepted += TARGETS[name](data[:MOST])
        except Exception:
            KEEP.mkdir(parents=True, exist_ok=True)
            (KEEP / f"find-{name}").write_bytes(data[:MOST])
            raise
    return accepted


def main(arguments: list[str] | None = None) -> int:
    """Search each parser for so long; return 1 if there was a find."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.parsers", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each parser")
    parser.add_argument("--only", choices=TARGETS)
    given = parser.parse_args(arguments)
    names = [given.only] if given.only else list(TARGETS)
    guided = importlib.util.find_spec("atheris") is not None
    seed = secrets.randbelow(10**6)
    sys.stdout.write(f"{'guided by coverage' if guided else f'at random, seed {seed}'}\n")
    finds = 0
    for name in names:
        find = _search(name, given.seconds) if guided else _random(name, given.seconds, seed)
        sys.stdout.write(f"{name}: {'A FIND, see build/fuzz' if find else 'nothing found'}\n")
        sys.stdout.flush()
        finds += find
    return 1 if finds else 0


def _random(name: str, seconds: int, seed: int) -> bool:
    rng = random.Random(f"{seed}:{name}")  # noqa: S311 (repeatable on purpose)
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            mutate_at_random(name, rng, 100)
    except Exception as error:  # whatever is no refusal is what we look for
        sys.stdout.write(f"{error!r}\n")
        return True
    return False


def _search(name: str, seconds: int) -> bool:
    """In a process of its own: libFuzzer ends the one that it runs in."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.guided", name, str(seconds)],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    lines = ended.stdout.splitlines()
    shown = [line for line in lines if line.startswith("Done ")]
    sys.stdout.write("\n".join(shown if ended.returncode == 0 else lines[-40:]) + "\n")
    return ended.returncode != 0


if __name__ == "__main__":
    sys.exit(main())
