"""Which certificate passes under which policy: every pair, through the real verifier.

`python -m tests.support.certificate_matrix` prints what the verifier says; its test
holds it against `EXPECTED`, which was written by hand.
"""

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from rich.console import Console
from rich.table import Table

from auth.errors import SignatureInvalid, SignerNotAllowed
from auth.signers import BundleVerifier, Signer, SignerPolicy
from sandbox.services.sigstore_ca import EmailSubject, Subject, WorkflowSubject
from sandbox.services.sigstore_instance import ThrowawaySigstore

RESULT = b'{"run_id": "r1", "records": []}'
PASSES, REFUSED, INVALID = "+", "-", "x"

HOME = "bakeoff-org/bench"
TAG = "refs/tags/v1.2"
MAIN = WorkflowSubject(HOME)
TAGGED = WorkflowSubject(HOME, ref=TAG)
TESTS = WorkflowSubject(HOME, workflow=".github/workflows/tests.yml")
STRANGER = WorkflowSubject("mallory/bench")
GITHUB_LOGIN = "https://github.com/login/oauth"


class UriSubject(EmailSubject):
    """A certificate that names a URI and an issuer, and nothing of a repository."""

    def name(self) -> x509.GeneralName:
        """Return the URI as the certificate has it."""
        return x509.UniformResourceIdentifier(self.email)


MAIL = EmailSubject("runner@example.org")
MAIL_OF_GITHUB = EmailSubject("runner@example.org", GITHUB_LOGIN)
SPIFFE = UriSubject("spiffe://example.org/gpu/1", "https://spiffe.example.org")

CERTIFICATES: dict[str, Subject] = {
    "our workflow, main": MAIN,
    "our workflow, a tag": TAGGED,
    "our workflow, another branch": WorkflowSubject(HOME, ref="refs/heads/dev"),
    "our workflow, a pull request": WorkflowSubject(HOME, ref="refs/pull/7/merge"),
    "another workflow of ours": TESTS,
    "another repository of ours": WorkflowSubject("bakeoff-org/other"),
    "another organisation": STRANGER,
    "a fork that calls our workflow": WorkflowSubject(HOME, source_repository="mallory/bench"),
    "our workflow, called from a branch": WorkflowSubject(HOME, source_ref="refs/heads/dev"),
    "our workflow, another issuer": WorkflowSubject(HOME, issuer="https://ci.mallory.example"),
    "our workflow's name, no repository": UriSubject(MAIN.identity, MAIN.issuer),
    "our workflow, pull_request_target": WorkflowSubject(HOME, trigger="pull_request_target"),
    "our workflow, a comment": WorkflowSubject(HOME, trigger="issue_comment"),
    "our workflow, self-hosted": WorkflowSubject(HOME, machine="self-hosted"),
    "our workflow, by hand": WorkflowSubject(HOME, trigger="workflow_dispatch"),
    "our workflow, no trigger": WorkflowSubject(HOME, trigger=None),
    "our workflow, no machine": WorkflowSubject(HOME, machine=None),
    "e-mail by Google": MAIL,
    "e-mail in other letters": EmailSubject("Runner@example.org"),
    "e-mail by GitHub": MAIL_OF_GITHUB,
    "SPIFFE": SPIFFE,
    "our workflow, certificate expired": MAIN,
}
EXPIRED = "our workflow, certificate expired"


class Policy(NamedTuple):
    """What the server has: the policy file's signers, and the signer of the runner key, if any."""

    file: tuple[Subject, ...]
    key: Subject | None = None
    allow: frozenset[str] = frozenset()


POLICIES: dict[str, Policy] = {
    "main": Policy((MAIN,)),
    "main, tag": Policy((MAIN, TAGGED)),
    "2 workflows": Policy((MAIN, TESTS)),
    "other org": Policy((STRANGER,)),
    "e-mail": Policy((MAIL,)),
    "e-mail, GitHub": Policy((MAIL_OF_GITHUB,)),
    "SPIFFE": Policy((SPIFFE,)),
    "key: main": Policy((MAIL, STRANGER), MAIN),
    "key: e-mail": Policy((MAIN, STRANGER), MAIL),
    "target": Policy((MAIN,), allow=frozenset({"pull_request_target"})),
    "self-hosted": Policy((MAIN,), allow=frozenset({"self-hosted"})),
    "key: main, self-hosted": Policy((MAIN,), MAIN, frozenset({"self-hosted"})),
}
# In the order of POLICIES: + passes, - signer_not_allowed, x signature_invalid.
EXPECTED = {
    "our workflow, main": "+++----+-+++",
    "our workflow, a tag": "-+----------",
    "our workflow, another branch": "------------",
    "our workflow, a pull request": "------------",
    "another workflow of ours": "--+---------",
    "another repository of ours": "------------",
    "another organisation": "---+--------",
    "a fork that calls our workflow": "------------",
    "our workflow, called from a branch": "------------",
    "our workflow, another issuer": "------------",
    "our workflow's name, no repository": "------------",
    "our workflow, pull_request_target": "---------+--",
    "our workflow, a comment": "------------",
    "our workflow, self-hosted": "----------++",
    "our workflow, by hand": "+++----+-+++",
    "our workflow, no trigger": "------------",
    "our workflow, no machine": "------------",
    "e-mail by Google": "----+---+---",
    "e-mail in other letters": "------------",
    "e-mail by GitHub": "-----+------",
    "SPIFFE": "------+-----",
    "our workflow, certificate expired": "xxxxxxxxxxxx",
}


def verdicts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each certificate and what the verifier says of it under each policy."""
    instance = ThrowawaySigstore.create(folder)
    verifiers = [
        (BundleVerifier(instance.trusted_root, _policy(policy)), policy.key)
        for policy in POLICIES.values()
    ]
    for name, subject in CERTIFICATES.items():
        # Logged an hour after its certificate's ten minutes began.
        issued = datetime.now(UTC) - timedelta(hours=1)
        logged = datetime.now(UTC) if name == EXPIRED else None
        bundle = instance.sign(RESULT, subject, issued_at=issued, logged_at=logged)
        yield name, "".join(_verdict(verifier, bundle, key) for verifier, key in verifiers)


def _policy(policy: Policy) -> SignerPolicy:
    return SignerPolicy(tuple(_signer(subject, policy.allow) for subject in policy.file))


def _signer(subject: Subject, allow: frozenset[str] = frozenset()) -> Signer:
    return Signer(subject.identity, subject.issuer, allow=allow)


def _verdict(verifier: BundleVerifier, bundle: bytes, key: Subject | None) -> str:
    try:
        verifier.verify(RESULT, bundle, None if key is None else _signer(key))
    except SignerNotAllowed:
        return REFUSED
    except SignatureInvalid:
        return INVALID
    return PASSES


def main() -> None:
    """Print the matrix."""
    table = Table("certificate", *POLICIES)
    with tempfile.TemporaryDirectory() as folder:
        for name, row in verdicts(Path(folder)):
            table.add_row(name, *row)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
