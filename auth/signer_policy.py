"""Who may sign results: signers, the policy file that lists them, the refusal of empty rules.

A rule that can never match a certificate is as dangerous as one that matches too much: the
operator trusts it, and widens another one when results are refused. Both are refused at start.

What a Fulcio certificate says is in https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md.
"""

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from auth.errors import PolicyRefused
from config.unreadable import why_unreadable

SCHEMA_VERSION = "bakeoff-results-signers/v1"
GITHUB = "https://github.com/"
GITHUB_ISSUER = "https://token.actions.githubusercontent.com"

_REPOSITORY = re.compile(r"[\w-]+/[\w.-]+", re.ASCII)
_WORKFLOW_PATH = re.compile(r"\.github/workflows/[\w.-]+\.ya?ml", re.ASCII)
# Branches and tags only: anybody who opens a pull request owns a refs/pull/N/merge.
_REF = re.compile(r"refs/(?:heads|tags)/[!-~]+")
_WORKFLOW = re.compile(
    rf"{re.escape(GITHUB)}({_REPOSITORY.pattern})/{_WORKFLOW_PATH.pattern}@({_REF.pattern})",
    re.ASCII,
)
_SUBJECT = re.compile(rf"repo:({_REPOSITORY.pattern}):ref:({_REF.pattern})", re.ASCII)
_EMAIL = re.compile(r"[^@\s:/]+@[^@\s:/]+")
_URI = re.compile(r"(?:https|spiffe)://[^\s/]+/\S+")
_ISSUER = re.compile(r"https://[^\s/]+(?:/\S*)?")
# We compare text exactly, so a pattern matches nothing; whoever wrote one expects it to.
_PATTERN = re.compile(r"[*?\[\](){}|\\^$]|\.\+")


@dataclass(frozen=True, slots=True)
class Signer:
    """A certificate's identity (e-mail address or URI) and the OIDC issuer that vouched for it."""

    identity: str
    issuer: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a GitHub workflow ran: its repository's URI and the git ref."""

    repository_uri: str
    ref: str


@dataclass(frozen=True, slots=True)
class SignerPolicy:
    """The signers that are trusted for every run. Cannot be made empty or with a signer we refuse.

    Raises `PolicyRefused`, naming every signer that is wrong.
    """

    signers: tuple[Signer, ...]

    def __post_init__(self) -> None:
        problems = [p for signer in self.signers for p in _signer_problems(signer)]
        if not self.signers:
            problems.append("it trusts nobody: name a repository or an identity")
        _refuse("The signer policy is refused", problems)


def check_signer(signer: Signer) -> None:
    """Refuse a signer that could never match a certificate, or that is a pattern.

    Raises `PolicyRefused` naming what is wrong; used when an admin binds a runner key to a signer.
    """
    _refuse("The signer is refused", _signer_problems(signer))


def source_of(identity: str) -> Source | None:
    """Where a GitHub workflow identity says it ran, or None when it is no GitHub workflow."""
    found = _WORKFLOW.fullmatch(identity)
    return Source(GITHUB + found[1], found[2]) if found else None


def load_policy(path: Path) -> SignerPolicy:
    """Read a `bakeoff-results-signers/v1` file; `config/signers.yaml` is a commented one.

    Raises `PolicyRefused` naming each entry that is wrong, all of them at once.
    """
    policy = _document(path)
    problems = _member_problems(
        policy, {"schema_version"}, {"trusted_repositories", "trusted_identities", "notes"}
    )
    if policy.get("schema_version") != SCHEMA_VERSION:
        problems.append(f"schema_version is not {SCHEMA_VERSION!r}, the only one known here")
    signers: list[Signer] = []
    for where, entry in _entries(policy, "trusted_repositories", problems):
        signers += _of_repository(where, entry, problems)
    for where, entry in _entries(policy, "trusted_identities", problems):
        signers += _of_identity(where, entry, problems)
    _refuse(f"The signer policy {path} is refused", problems)
    return SignerPolicy(tuple(dict.fromkeys(signers)))


def _of_identity(where: str, entry: Any, problems: list[str]) -> list[Signer]:
    wrong = _member_problems(entry, {"identity", "issuer"}) or _text_problems(
        entry, ("identity", "issuer")
    )
    if not wrong:
        signer = Signer(entry["identity"], entry["issuer"])
        wrong = _signer_problems(signer)
        if not wrong:
            return [signer]
    problems += (f"{where}: {problem}" for problem in wrong)
    return []


def _of_repository(where: str, entry: Any, problems: list[str]) -> list[Signer]:
    """One signer per workflow and ref: an OIDC `sub` is in no certificate, the ref it names is."""
    wrong = _member_problems(entry, {"repository", "issuer", "subjects", "workflows"})
    wrong = wrong or _text_problems(entry, ("repository", "issuer"))
    if wrong:
        problems += (f"{where}: {problem}" for problem in wrong)
        return []
    repository, issuer = entry["repository"], entry["issuer"]
    if not _REPOSITORY.fullmatch(repository):
        wrong.append(f"repository {_shown(repository)} is not ORG/NAME, spelled out")
    wrong += _issuer_problems(issuer) or _github_issuer_problems(issuer)
    refs = _refs(repository, _texts(entry, "subjects", wrong), wrong)
    workflows = _texts(entry, "workflows", wrong)
    for workflow in workflows:
        if not _WORKFLOW_PATH.fullmatch(workflow):
            wrong.append(
                f"workflow {_shown(workflow)} is not .github/workflows/FILE.yml, spelled out"
            )
    problems += (f"{where}: {problem}" for problem in wrong)
    if wrong:
        return []
    return [Signer(f"{GITHUB}{repository}/{w}@{ref}", issuer) for w in workflows for ref in refs]


def _refs(repository: str, subjects: list[str], wrong: list[str]) -> list[str]:
    refs = []
    for subject in subjects:
        found = _SUBJECT.fullmatch(subject)
        if not found or _PATTERN.search(subject):
            wrong.append(
                f"subject {_shown(subject)} is not repo:ORG/NAME:ref:refs/heads/BRANCH (or "
                "refs/tags/TAG), spelled out: a certificate has nothing else to compare with it"
            )
        elif found[1] != repository:
            wrong.append(f"subject {_shown(subject)} is of another repository than {repository}")
        else:
            refs.append(found[2])
    return refs


def _signer_problems(signer: Signer) -> list[str]:
    return (
        _identity_problems(signer.identity) + _issuer_problems(signer.issuer)
    ) or _pair_problems(signer)


def _identity_problems(identity: str) -> list[str]:
    shown = f"identity {_shown(identity)}"
    if identity.endswith("[bot]"):
        return [
            f"{shown} is a GitHub account, which no certificate names: trust its workflow instead"
        ]
    if identity.startswith("repo:"):
        return [
            f"{shown} is an OIDC subject, which no certificate names: trust its workflow instead"
        ]
    if not (identity.isascii() and identity.isprintable()):
        return [f"{shown} is not printable ASCII"]
    if _PATTERN.search(identity):
        return [f"{shown} is a pattern: identities are compared exactly, spell each one out"]
    if identity.casefold().startswith((GITHUB, "http://github.com/")) and not source_of(identity):
        return [f"{shown} is not {GITHUB}ORG/NAME/.github/workflows/FILE.yml@refs/heads/BRANCH"]
    if not (_EMAIL.fullmatch(identity) or _URI.fullmatch(identity)):
        return [f"{shown} is neither an e-mail address nor a URI"]
    return []


def _issuer_problems(issuer: str) -> list[str]:
    if not issuer:
        return ["the issuer is missing: an identity means nothing without who vouched for it"]
    plain = issuer.isascii() and issuer.isprintable() and not _PATTERN.search(issuer)
    if not (plain and _ISSUER.fullmatch(issuer)):
        return [f"issuer {_shown(issuer)} is not an https URL, spelled out"]
    return []


def _github_issuer_problems(issuer: str) -> list[str]:
    # An enterprise of GitHub may have an issuer of its own, which is a path below the common one.
    if issuer == GITHUB_ISSUER or re.fullmatch(rf"{re.escape(GITHUB_ISSUER)}/[\w-]+", issuer):
        return []
    return [f"issuer {_shown(issuer)} never vouches for a GitHub workflow: {GITHUB_ISSUER} does"]


def _pair_problems(signer: Signer) -> list[str]:
    if source_of(signer.identity):
        return _github_issuer_problems(signer.issuer)
    if not _github_issuer_problems(signer.issuer):
        return [f"{GITHUB_ISSUER} never vouches for {_shown(signer.identity)}, only for workflows"]
    return []


class _KeyTwice(yaml.YAMLError):
    """A mapping names a member twice; the message says which."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML keeps the last, a reviewer reads the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise _KeyTwice(f"{_shown(key)} is there twice")
        return super().construct_mapping(node, deep)


def _document(path: Path) -> Mapping[str, Any]:
    try:
        document = yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except _KeyTwice as error:
        raise PolicyRefused(f"The signer policy {path} cannot be read: {error}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PolicyRefused(
            f"The signer policy {path} cannot be read: {why_unreadable(error)}"
        ) from error
    if not isinstance(document, dict):
        raise PolicyRefused(
            f"The signer policy {path} is not a mapping that starts with schema_version"
        )
    return document


def _entries(
    policy: Mapping[str, Any], name: str, problems: list[str]
) -> Iterable[tuple[str, Any]]:
    entries = policy.get(name, [])
    if not isinstance(entries, list):
        problems.append(f"{name} is not a list")
        return []
    return [(f"{name}[{index}]", entry) for index, entry in enumerate(entries)]


def _member_problems(
    entry: Any, required: set[str], optional: frozenset[str] | set[str] = frozenset()
) -> list[str]:
    if not isinstance(entry, dict):
        return [f"is not a mapping of {', '.join(sorted(required))}"]
    unknown = sorted(_shown(key) for key in entry if key not in required | optional)
    missing = sorted(required - entry.keys())
    return [f"unknown member {key}" for key in unknown] + [f"{key} is missing" for key in missing]


def _text_problems(entry: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [f"{name} is not text" for name in names if not isinstance(entry[name], str)]


def _texts(entry: Mapping[str, Any], name: str, wrong: list[str]) -> list[str]:
    texts = entry[name]
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        wrong.append(f"{name} is not a list of at least one text: the entry could never match")
        return []
    return texts


def _shown(value: object) -> str:
    return ascii(value)[:200]


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise PolicyRefused(f"{what}: " + "; ".join(problems))
