"""The signer policy file and the signers of keys: what is refused, and that each entry is named."""

import pickle
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from auth.errors import PolicyRefused
from auth.signers import BundleVerifier, Signer, SignerPolicy, check_signer, load_policy
from broker.results.active_verifier import ActiveVerifier
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.cli_admin import Shell

ROOT = Path(__file__).parents[2]
GITHUB = "https://token.actions.githubusercontent.com"
GOOGLE = "https://accounts.google.com"
WORKFLOW = "https://github.com/org/name/.github/workflows/x.yml@refs/heads/main"

HEAD = "schema_version: bakeoff-results-signers/v1\n"
REPOSITORY = """trusted_repositories:
  - repository: org/name
    issuer: https://token.actions.githubusercontent.com
    subjects: ["repo:org/name:ref:refs/heads/main"]
    workflows: [.github/workflows/x.yml]
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text: str) -> SignerPolicy:
        path = tmp_path / "signers.yaml"
        path.write_text(text)
        return load_policy(path)

    return load_text


def test_the_example_policy_is_accepted():
    assert load_policy(ROOT / "config" / "signers.yaml").signers


def test_a_repository_becomes_a_signer_per_workflow_and_ref(load):
    policy = load(
        HEAD
        + REPOSITORY.replace("/main", "/main, repo:org/name:ref:refs/tags/v1")
        .replace('"', "")
        .replace("x.yml", "x.yml, .github/workflows/y.yaml")
    )
    folder = "https://github.com/org/name/.github/workflows/"
    assert {signer.identity for signer in policy.signers} == {
        f"{folder}{file}@refs/{ref}"
        for file in ("x.yml", "y.yaml")
        for ref in ("heads/main", "tags/v1")
    }
    assert {signer.issuer for signer in policy.signers} == {GITHUB}


def test_identities_and_notes_are_read(load):
    text = (
        f"trusted_identities: [{{identity: a+b@example.org, issuer: {GOOGLE}}}]\nnotes: [hello]\n"
    )
    assert load(HEAD + text).signers == (Signer("a+b@example.org", GOOGLE),)


def test_an_entry_may_allow_how_its_workflow_runs(load):
    allowed = "    allow: [self-hosted, pull_request_target]\n"
    identity = f"trusted_identities: [{{identity: {WORKFLOW}, issuer: {GITHUB}, allow: [watch]}}]\n"
    by_repository, by_identity = load(HEAD + REPOSITORY + allowed + identity).signers
    assert by_repository.allow == {"self-hosted", "pull_request_target"}
    assert by_identity.allow == {"watch"}
    (plain,) = load(HEAD + REPOSITORY).signers
    assert plain.allow == frozenset()


@pytest.mark.parametrize(
    ("allow", "message"),
    [
        ("[push]", "allow 'push' is not one of discussion, "),
        ("[]", "allow is not a list of at least one text"),
        ("self-hosted", "allow is not a list"),
        ("[~]", "allow is not a list"),
    ],
)
def test_an_entry_allows_nothing_else(load, allow: str, message: str):
    with pytest.raises(PolicyRefused, match=message):
        load(f"{HEAD}{REPOSITORY}    allow: {allow}\n")
    entry = f"{{identity: {WORKFLOW}, issuer: {GITHUB}, allow: {allow}}}"
    with pytest.raises(PolicyRefused, match=message):
        load(f"{HEAD}trusted_identities: [{entry}]\n")


def test_an_identity_that_is_no_workflow_has_nothing_to_allow(load):
    entry = f"{{identity: a@example.org, issuer: {GOOGLE}, allow: [self-hosted]}}"
    with pytest.raises(PolicyRefused, match="allow means nothing for 'a@"):
        load(f"{HEAD}trusted_identities: [{entry}]\n")


GOOD_SIGNERS = [
    Signer("someone@example.org", GOOGLE),
    Signer("someone+tag@example.org", "https://github.com/login/oauth"),
    Signer("someone@example.org", "https://tenant.auth0.example/"),
    Signer(WORKFLOW, GITHUB),
    Signer(WORKFLOW, GITHUB + "/our-enterprise"),
    Signer("https://gitlab.com/org/name//.gitlab-ci.yml@refs/heads/main", "https://gitlab.com"),
    Signer("spiffe://example.org/runner/7", "https://issuer.example"),
]


@pytest.mark.parametrize("signer", GOOD_SIGNERS, ids=lambda signer: signer.identity)
def test_a_signer_that_a_certificate_can_name_is_accepted(signer):
    check_signer(signer)


BAD_SIGNERS = [
    ("github-actions[bot]", GITHUB, "trust its workflow instead"),
    ("repo:org/name:ref:refs/heads/main", GITHUB, "OIDC subject"),
    (r".*@example\.org", GOOGLE, "pattern"),
    ("*@example.org", GOOGLE, "pattern"),
    (".+@example.org", GOOGLE, "pattern"),
    ("^someone@example.org$", GOOGLE, "pattern"),
    ("(a|b)@example.org", GOOGLE, "pattern"),
    ("https://github.com/org/*", GITHUB, "pattern"),
    ("https://github.com/org/name", GITHUB, "workflows/FILE.yml"),
    ("https://GitHub.com/org/name/.github/workflows/x.yml@refs/heads/main", GITHUB, "FILE.yml"),
    ("http://github.com/org/name/.github/workflows/x.yml@refs/heads/main", GITHUB, "FILE.yml"),
    (WORKFLOW.removesuffix("@refs/heads/main"), GITHUB, "workflows/FILE.yml"),
    (WORKFLOW.replace("refs/heads/main", "main"), GITHUB, "workflows/FILE.yml"),
    (WORKFLOW.replace("heads/main", "pull/7/merge"), GITHUB, "workflows/FILE.yml"),
    (WORKFLOW, GOOGLE, "never vouches for a GitHub workflow"),
    (WORKFLOW, GITHUB + "/", "never vouches for a GitHub workflow"),
    ("someone@example.org", GITHUB, "only for workflows"),
    ("someone", GOOGLE, "neither an e-mail address nor a URI"),
    ("", GOOGLE, "neither an e-mail address nor a URI"),
    ("someone@example.org ", GOOGLE, "neither an e-mail address nor a URI"),
    ("someone@example.org\n", GOOGLE, "printable ASCII"),
    ("s\u043emeone@example.org", GOOGLE, "printable ASCII"),
    ("someone@example.org", "", "issuer is missing"),
    ("someone@example.org", "http://accounts.google.com", "https URL"),
    ("someone@example.org", "https://.*", "https URL"),
    ("someone@example.org", "https://accounts.google.com\n", "https URL"),
]


@pytest.mark.parametrize(("identity", "issuer", "why"), BAD_SIGNERS)
def test_a_signer_that_matches_nothing_or_too_much_is_refused(identity, issuer, why):
    with pytest.raises(PolicyRefused, match=why):
        check_signer(Signer(identity, issuer))
    with pytest.raises(PolicyRefused, match=why):
        SignerPolicy((Signer("good@example.org", GOOGLE), Signer(identity, issuer)))


def test_a_policy_without_signers_cannot_be_made():
    with pytest.raises(PolicyRefused, match="trusts nobody"):
        SignerPolicy(())


BAD_FILES = [
    ("", "not a mapping"),
    ("[]", "not a mapping"),
    ("a: [", "cannot be read"),
    (HEAD, "trusts nobody"),
    (HEAD + "trusted_repositories: []\ntrusted_identities: []", "trusts nobody"),
    (REPOSITORY, "schema_version is missing"),
    (HEAD.replace("v1", "v2") + REPOSITORY, "schema_version is not"),
    (HEAD + REPOSITORY.replace("repositories", "repos"), "unknown member 'trusted_repos'"),
    (HEAD + REPOSITORY + "trusted_identities: {}", "trusted_identities is not a list"),
    (HEAD + REPOSITORY + "trusted_identities: [x]", r"identities\[0\]: is not a mapping"),
    (HEAD + HEAD + REPOSITORY, "line 2: a key appears twice"),
]

BAD_REPOSITORIES = [
    ("subjects", "subject", "unknown member 'subject'"),
    ("issuer: ", "issuer: ~ #", "issuer is not text"),
    ("    issuer", "    #", "issuer is missing"),
    (GITHUB, GOOGLE, "never vouches for a GitHub workflow"),
    ("[.github/workflows/x.yml]", "[]", "workflows .* could never match"),
    ('["repo:org/name:ref:refs/heads/main"]', "[]", "subjects .* could never match"),
    ("repo:org/name", "repo:org/other", "of another repository"),
    ("heads/main", "heads/*", r"'repo:org/name:ref:refs/heads/\*' is not repo:ORG/NAME"),
    ("ref:refs/heads/main", "pull_request", "is not repo:ORG/NAME"),
    ("heads/main", "pull/1/merge", "is not repo:ORG/NAME"),
    ("workflows/x.yml", "workflows/*.yml", r"workflow .*\*\.yml"),
    ("workflows/x.yml", "workflows/../x.yml", r"workflow .*\.\./x"),
    ("org/name", "org/*", r"repository 'org/\*'"),
    ("repository: org/name", "repository: [org]", "repository is not text"),
]


@pytest.mark.parametrize(("text", "why"), BAD_FILES)
def test_a_bad_policy_file_is_refused_saying_why(load, text, why):
    with pytest.raises(PolicyRefused, match=why):
        load(text)


@pytest.mark.parametrize(("old", "new", "why"), BAD_REPOSITORIES)
def test_a_bad_repository_is_named_with_the_reason(load, old, new, why):
    with pytest.raises(PolicyRefused, match=rf"trusted_repositories\[0\]: .*{why}"):
        load(HEAD + REPOSITORY.replace(old, new))


def test_every_bad_entry_is_named_at_once(load):
    with pytest.raises(PolicyRefused) as refusal:
        load(
            HEAD
            + REPOSITORY.replace("heads/main", "heads/*")
            + f"""trusted_identities:
  - {{identity: "github-actions[bot]", issuer: {GITHUB}}}
  - {{identity: good@example.org, issuer: {GOOGLE}}}
  - {{identity: someone@example.org}}
  - {{identity: someone@example.org, isuer: {GOOGLE}, issuer: {GOOGLE}}}
"""
        )
    text = str(refusal.value)
    assert "signers.yaml" in text
    for name in ("repositories[0]", "identities[0]", "identities[2]", "identities[3]", "'isuer'"):
        assert name in text
    assert "identities[1]" not in text


def test_a_policy_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(PolicyRefused, match=r"none\.yaml cannot be read"):
        load_policy(tmp_path / "none.yaml")


# Entries that can never match: told, and harmless beside one that can

IGNORED = [
    ("github-actions[bot]", GITHUB, "is a GitHub account"),
    ("repo:org/name:ref:refs/heads/main", GITHUB, "is an OIDC subject"),
    ("https://github.com/org/name", GITHUB, "is a GitHub page"),
    ("someone@example.org", GITHUB, "only for workflows: name the issuer that does"),
]


def identity(name: str, issuer: str) -> str:
    """Return the part of a policy file that trusts one identity."""
    return f'trusted_identities:\n  - {{identity: "{name}", issuer: "{issuer}"}}\n'


@pytest.mark.parametrize(("name", "issuer", "why"), IGNORED)
def test_an_entry_that_can_never_match_is_told_beside_one_that_can(load, name, issuer, why):
    policy = load(HEAD + REPOSITORY + identity(name, issuer))
    assert policy.signers == (Signer(WORKFLOW, GITHUB),)
    [entry] = policy.ignored
    assert entry.where == "trusted_identities[0]"
    assert why in entry.why
    assert str(entry).startswith("trusted_identities[0] is ignored: ")


@pytest.mark.parametrize(("name", "issuer", "why"), IGNORED)
def test_a_policy_of_nothing_but_such_entries_is_refused(load, name, issuer, why):
    with pytest.raises(PolicyRefused, match=why):
        load(HEAD + identity(name, issuer))


@pytest.mark.parametrize(
    ("name", "issuer"),
    [
        (".*[bot]", GITHUB), ("*@example.org", GOOGLE), ("repo:org/*:ref:refs/heads/main", GITHUB),
        ("https://github.com/org/*", GITHUB), ("github-actions[bot]", ""),
        ("github-actions[bot]", "https://.*"), (WORKFLOW, GOOGLE), ("someone", GOOGLE),
        (WORKFLOW.replace("heads/main", "pull/7/merge"), GITHUB),
    ],
)  # fmt: skip
def test_what_is_dangerous_is_refused_beside_a_good_entry_too(load, name, issuer):
    with pytest.raises(PolicyRefused, match=r"trusted_identities\[0\]"):
        load(HEAD + REPOSITORY + identity(name, issuer))


# GitHub's subjects with ids

WITH_IDS = REPOSITORY.replace("repo:org/name:", "repo:org@7/name@42:")


def test_a_subject_with_ids_asks_a_certificate_for_them(load):
    assert load(HEAD + WITH_IDS).signers == (Signer(WORKFLOW, GITHUB, "7", "42"),)


def test_a_subject_by_name_beside_one_with_ids_has_the_ids_too(load):
    """By name alone it would admit the very repository that the ids keep out."""
    both = REPOSITORY.replace('main"]', 'main", "repo:org@7/name@42:ref:refs/tags/v1"]')
    assert {(signer.owner_id, signer.repository_id) for signer in load(HEAD + both).signers} == {
        ("7", "42")
    }


@pytest.mark.parametrize(
    "subject",
    ["repo:org@7/name", "repo:org/name@42", "repo:org@x/name@42", "repo:org@07/name@42",
     "repo:org@/name@", "repo:org@7/name@4*", "repo:org@7/other@42"],
)  # fmt: skip
def test_half_an_id_or_another_name_is_refused(load, subject):
    with pytest.raises(PolicyRefused, match="subject"):
        load(HEAD + REPOSITORY.replace("repo:org/name", subject))


LIVE = f"""# TRUST NOTE: this file is unsigned plain YAML.
schema_version: bakeoff-results-signers/v1
trusted_repositories:
  - repository: Some-Org/bench
    issuer: {GITHUB}
    subjects:
      - repo:Some-Org/bench:ref:refs/heads/main
    workflows:
      - .github/workflows/package-results.yml
trusted_identities:
  - identity: github-actions[bot]
    issuer: {GITHUB}
"""


def test_a_policy_as_the_archive_has_it_starts_with_a_warning(load):
    policy = load(LIVE)
    assert len(policy.signers) == 1
    assert [entry.where for entry in policy.ignored] == ["trusted_identities[0]"]


def test_whoever_believes_a_policy_tells_what_it_ignores(load, tmp_path):
    sigstore = ThrowawaySigstore.create(tmp_path / "sigstore")
    verifier = BundleVerifier(sigstore.trusted_root, load(LIVE))
    with capture_logs() as logs:
        trusted = ActiveVerifier(verifier, 60)
        trusted.use(pickle.loads(pickle.dumps(verifier)))  # noqa: S301 (our own)
    told = [line for line in logs if line["event"] == "signers.entry_ignored"]
    assert [line["where"] for line in told] == ["trusted_identities[0]"] * 2
    assert {line["log_level"] for line in told} == {"warning"}


def test_config_check_prints_what_a_policy_ignores(tmp_path, monkeypatch, capsys):
    (tmp_path / "signers.yaml").write_text(LIVE)
    for name, value in {
        "SIGNERS_FILE": str(tmp_path / "signers.yaml"),
        "DATABASE_URL": "postgres://db/bakeoff",
        "PUBLIC_URL": "https://queue.example.org",
        "TOKEN_KEYS": f"k1:{'a1' * 32}",
        "RECEIPT_KEYS": f"r1:{'b2' * 32}",
    }.items():
        monkeypatch.setenv(f"BAKEOFF_QUEUE_{name}", value)
    outcome = Shell(capsys)("config", "check")
    assert outcome.code == 0, outcome.err
    assert "BAKEOFF_QUEUE_SIGNERS_FILE: trusted_identities[0] is ignored" in outcome.err[0]
