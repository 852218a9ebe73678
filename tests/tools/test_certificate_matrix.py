"""Every certificate under every policy, as the table says."""

from pathlib import Path

from tests.support.certificate_matrix import EXPECTED, POLICIES, verdicts


def test_each_certificate_passes_under_the_policies_that_name_it_and_no_other(
    tmp_path: Path,
) -> None:
    assert dict(verdicts(tmp_path / "sigstore")) == EXPECTED
    assert {len(row) for row in EXPECTED.values()} == {len(POLICIES)}
