"""The signer policy file and the signers of keys: what is refused, and that each entry is named."""

from pathlib import Path

import pytest

from auth.errors import PolicyRefused
from auth.signers import Signer, SignerPolicy, check_signer, load_policy

ROOT = Path(__file__).parents[1]
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
    (HEAD + HEAD + REPOSITORY, "'schema_version' is there twice"),
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
