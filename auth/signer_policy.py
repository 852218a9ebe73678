"""Signer policy: who may sign results, the file that lists them, the refusal of empty rules.

Refused is what says more than it names (a pattern), what could mean several things, and a rule
without a good issuer. An entry of the file that is spelled out, and that no certificate can name,
is ignored: it lets nobody in. Each one is told, or the operator would believe that it works, and
widen another one when results are refused. A policy of nothing else is refused.

What a Fulcio certificate says is in https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from auth.errors import PolicyRefused
from config import strict_yaml
from config.read_errors import describe_read_error

SCHEMA_VERSION = "bakeoff-results-signers/v1"
GITHUB = "https://github.com/"
GITHUB_ISSUER = "https://token.actions.githubusercontent.com"

# How a workflow may have run, where an entry has to allow it. By these events anybody may start it
# on our branch, without a change of ours, and put text or artifacts of theirs before it.
OUTSIDERS = frozenset({
    "discussion", "discussion_comment", "fork", "gollum", "issue_comment", "issues",
    "pull_request_target", "watch", "workflow_run",
})  # fmt: skip
SELF_HOSTED = "self-hosted"  # a machine of the repository's; certificates say so of its runner
ALLOWABLE = OUTSIDERS | {SELF_HOSTED}

_FORM = f"{GITHUB}ORG/NAME/.github/workflows/FILE.yml@refs/heads/BRANCH"

_OWNER, _NAME = r"[\w-]+", r"[\w.-]+"
_REPOSITORY = re.compile(rf"{_OWNER}/{_NAME}", re.ASCII)
_WORKFLOW_PATH = re.compile(r"\.github/workflows/[\w.-]+\.ya?ml", re.ASCII)
# Branches and tags only: anybody who opens a pull request owns a refs/pull/N/merge.
_REF = re.compile(r"refs/(?:heads|tags)/[!-~]+")
_WORKFLOW = re.compile(
    rf"{re.escape(GITHUB)}({_REPOSITORY.pattern})/{_WORKFLOW_PATH.pattern}@({_REF.pattern})",
    re.ASCII,
)
# GitHub writes both ids or none. As certificates have them: decimal, without zeros in front.
_ID = "[1-9][0-9]*"
_SUBJECT = re.compile(
    rf"repo:({_OWNER})(?:@({_ID}))?/({_NAME})(?(2)@({_ID})):ref:({_REF.pattern})", re.ASCII
)
# Whole, or a pattern that ends so would pass for an account.
_ACCOUNT = re.compile(r"[\w-]+\[bot\]", re.ASCII)
_EMAIL = re.compile(r"[^@\s:/]+@[^@\s:/]+")
_URI = re.compile(r"(?:https|spiffe)://[^\s/]+/\S+")
_ISSUER = re.compile(r"https://[^\s/]+(?:/\S*)?")
# We compare text exactly, so a pattern matches nothing; whoever wrote one expects it to.
_PATTERN = re.compile(r"[*?\[\](){}|\\^$]|\.\+")


@dataclass(frozen=True, slots=True)
class Signer:
    """A certificate's identity (e-mail address or URI) and the OIDC issuer that vouched for it.

    With GitHub's ids of the owner and the repository, a certificate must have these as well: names
    can be had by others, once their owner gives them up; ids cannot. Of a GitHub workflow, `allow`
    names the ways to run it that are refused otherwise: some of ALLOWABLE.
    """

    identity: str
    issuer: str
    owner_id: str | None = None
    repository_id: str | None = None
    allow: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Source:
    """Where a GitHub workflow ran: its repository's URI and the git ref."""

    repository_uri: str
    ref: str


@dataclass(frozen=True, slots=True)
class IgnoredEntry:
    """An entry of the policy file that no certificate can match: its place, and why it never does.

    `why` ends with what to write instead.
    """

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where} is ignored: {self.why}"


@dataclass(frozen=True, slots=True)
class SignerPolicy:
    """The signers that are trusted for every run. Cannot be made empty or with a signer we refuse.

    `ignored` are the entries of the file that are not among them; whoever loads it tells of each.
    Raises `PolicyRefused`, naming every signer that is wrong.
    """

    signers: tuple[Signer, ...]
    ignored: tuple[IgnoredEntry, ...] = ()

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

    Entries that can never match are left out, as long as another one is left.
    Raises `PolicyRefused` naming each entry that is wrong, all of them at once.
    """
    policy = _document(path)
    problems = _member_problems(
        policy, {"schema_version"}, {"trusted_repositories", "trusted_identities", "notes"}
    )
    if policy.get("schema_version") != SCHEMA_VERSION:
        problems.append(f"schema_version is not {SCHEMA_VERSION!r}, the only one known here")
    signers: list[Signer] = []
    ignored: list[IgnoredEntry] = []
    for where, entry in _entries(policy, "trusted_repositories", problems):
        signers += _of_repository(where, entry, problems)
    for where, entry in _entries(policy, "trusted_identities", problems):
        signers += _of_identity(where, entry, problems, ignored)
    if problems or not signers:
        problems += (f"{entry.where}: {entry.why}" for entry in ignored)
    _refuse(f"The signer policy {path} is refused", problems)
    return SignerPolicy(tuple(dict.fromkeys(signers)), tuple(ignored))


def _of_identity(
    where: str, entry: Any, problems: list[str], ignored: list[IgnoredEntry]
) -> list[Signer]:
    wrong = _member_problems(entry, {"identity", "issuer"}, {"allow"}) or _text_problems(
        entry, ("identity", "issuer")
    )
    allow = [] if wrong else _allowed(entry, wrong)
    if not wrong:
        signer = Signer(entry["identity"], entry["issuer"], allow=frozenset(allow))
        wrong = _dangers(signer)
        if not wrong and not (never := _never_matches(signer)):
            return [signer]
        ignored += (IgnoredEntry(where, why) for why in ([] if wrong else never))
    problems += (f"{where}: {problem}" for problem in wrong)
    return []


def _of_repository(where: str, entry: Any, problems: list[str]) -> list[Signer]:
    """One signer per workflow and subject.

    An OIDC `sub` is in no certificate; the ref and the ids that it names are.
    """
    wrong = _member_problems(entry, {"repository", "issuer", "subjects", "workflows"}, {"allow"})
    wrong = wrong or _text_problems(entry, ("repository", "issuer"))
    if wrong:
        problems += (f"{where}: {problem}" for problem in wrong)
        return []
    repository, issuer = entry["repository"], entry["issuer"]
    if not _REPOSITORY.fullmatch(repository):
        wrong.append(f"repository {_shown(repository)} is not ORG/NAME, spelled out")
    wrong += _issuer_problems(issuer) or _github_issuer_problems(issuer)
    subjects = _subjects(repository, _texts(entry, "subjects", wrong), wrong)
    workflows = _texts(entry, "workflows", wrong)
    for workflow in workflows:
        if not _WORKFLOW_PATH.fullmatch(workflow):
            wrong.append(
                f"workflow {_shown(workflow)} is not .github/workflows/FILE.yml, spelled out"
            )
    allow = frozenset(_allowed(entry, wrong))
    problems += (f"{where}: {problem}" for problem in wrong)
    if wrong:
        return []
    return [
        Signer(
            f"{GITHUB}{repository}/{workflow}@{subject.ref}",
            issuer,
            *(subject.ids or (None, None)),
            allow=allow,
        )
        for workflow in workflows
        for subject in _with_ids(subjects)
    ]


def _allowed(entry: Mapping[str, Any], wrong: list[str]) -> list[str]:
    """The ways to run a workflow that an entry allows; of no `allow`, none."""
    allow = _texts(entry, "allow", wrong) if "allow" in entry else []
    known = ", ".join(sorted(ALLOWABLE))
    wrong += (f"allow {_shown(way)} is not one of {known}" for way in allow if way not in ALLOWABLE)
    return allow


class _Subject(NamedTuple):
    """The parts of an OIDC subject that a certificate repeats: ref, owner's id, own id."""

    ref: str
    ids: tuple[str, str] | None


def _subjects(repository: str, texts: list[str], wrong: list[str]) -> list[_Subject]:
    subjects = []
    for text in texts:
        found = _SUBJECT.fullmatch(text)
        if not found or _PATTERN.search(text):
            wrong.append(
                f"subject {_shown(text)} is not repo:ORG/NAME:ref:refs/heads/BRANCH (or "
                "refs/tags/TAG; or repo:ORG@ID/NAME@ID:...), spelled out: a certificate has "
                "nothing else to compare with it"
            )
        elif f"{found[1]}/{found[3]}" != repository:
            wrong.append(f"subject {_shown(text)} is of another repository than {repository}")
        else:
            subjects.append(_Subject(found[5], (found[2], found[4]) if found[2] else None))
    return subjects


def _with_ids(subjects: list[_Subject]) -> list[_Subject]:
    """Give the ids that an entry's subjects name to those that name none.

    Both forms of one subject stand side by side while GitHub changes from one to the other. By
    name alone, the older one would admit the very repository that the ids keep out.
    """
    known = list(dict.fromkeys(subject.ids for subject in subjects if subject.ids))
    return [
        _Subject(subject.ref, ids)
        for subject in subjects
        for ids in ([subject.ids] if subject.ids else known or [None])
    ]


def _signer_problems(signer: Signer) -> list[str]:
    return _dangers(signer) or _never_matches(signer)


def _dangers(signer: Signer) -> list[str]:
    """Yield what a policy must not contain: patterns, issuers that vouch for nobody."""
    problems = _identity_problems(signer) + _issuer_problems(signer.issuer)
    if signer.allow and not source_of(signer.identity):
        problems.append(f"allow means nothing for {_shown(signer.identity)}, which is no workflow")
    if not problems and source_of(signer.identity):
        return _github_issuer_problems(signer.issuer)
    return problems


def _never_matches(signer: Signer) -> list[str]:
    """Why no certificate names a signer without `_dangers`, and what to write instead."""
    shown = f"identity {_shown(signer.identity)}"
    workflow = f"which no certificate names: trust its workflow instead, {_FORM}"
    if _ACCOUNT.fullmatch(signer.identity):
        return [f"{shown} is a GitHub account, {workflow}"]
    if _is_subject(signer.identity):
        return [f"{shown} is an OIDC subject, {workflow}"]
    if _is_github_url(signer.identity) and not source_of(signer.identity):
        return [f"{shown} is a GitHub page, {workflow}"]
    if not (source_of(signer.identity) or _github_issuer_problems(signer.issuer)):
        never = f"{GITHUB_ISSUER} never vouches for {_shown(signer.identity)}, only for workflows"
        return [f"{never}: name the issuer that does"]
    return []


def _identity_problems(signer: Signer) -> list[str]:
    identity = signer.identity
    shown = f"identity {_shown(identity)}"
    if not (identity.isascii() and identity.isprintable()):
        return [f"{shown} is not printable ASCII"]
    if _ACCOUNT.fullmatch(identity):
        return []
    if _PATTERN.search(identity):
        return [f"{shown} is a pattern: identities are compared exactly, spell each one out"]
    if _is_subject(identity):
        return []
    if _is_github_url(identity) and not source_of(identity):
        # A certificate may name other refs than ours: a pull request's, which is anybody's. And
        # GitHub's issuer names workflows with their ref, other issuers what they like.
        if "@" in identity or _github_issuer_problems(signer.issuer):
            return [f"{shown} is not {_FORM}"]
        return []
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


def _is_subject(identity: str) -> bool:
    return identity.startswith("repo:")


def _is_github_url(identity: str) -> bool:
    return identity.casefold().startswith((GITHUB, "http://github.com/"))


def _document(path: Path) -> Mapping[str, Any]:
    try:
        document = strict_yaml.load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PolicyRefused(
            f"The signer policy {path} cannot be read: {describe_read_error(error)}"
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
        # Refused when empty too: elsewhere, a list of nothing often means anything.
        wrong.append(f"{name} is not a list of at least one text: the entry could never match")
        return []
    return texts


def _shown(value: object) -> str:
    return ascii(value)[:200]


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise PolicyRefused(f"{what}: " + "; ".join(problems))
