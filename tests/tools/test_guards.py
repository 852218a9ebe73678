"""The list of guards (`make guards`) is of the code that is there."""

import pytest

from tests.guards.listed import ALL, ROOT, Guard, NotThere, without


@pytest.mark.parametrize("guard", ALL, ids=lambda guard: guard.name)
def test_each_guard_stands_once_where_the_list_says_and_its_tests_are_there(guard: Guard) -> None:
    assert without(guard) != (ROOT / guard.file).read_text("utf-8")
    for test in guard.tests.split():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text("utf-8") or not name, test


def test_a_guard_that_is_not_there_is_named() -> None:
    gone = Guard("gone", "server.py", "no such text", "", "tests/tools/test_guards.py")
    with pytest.raises(NotThere, match=r"gone: 0 x in server\.py"):
        without(gone)


def test_every_guard_has_a_name_of_its_own() -> None:
    assert len({guard.name for guard in ALL}) == len(ALL)
