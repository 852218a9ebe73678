"""The demo runner's scorers."""

import pytest

from sandbox.runner.scorers import score


@pytest.mark.parametrize(
    ("scorer", "text", "expected", "quality"),
    [
        ("exact", " Canberra.\n", "canberra", 1.0),
        ("exact", "It is Canberra", "Canberra", 0.0),
        ("exact", "4", 4, 1.0),
        ("exact", "0.5", 0.5, 1.0),
        ("exact", "four", ["4", "four"], 1.0),
        ("contains", "It is CANBERRA, I think.", "Canberra", 1.0),
        ("contains", "Sydney", "Canberra", 0.0),
        ("contains", "Sydney", ["Perth", "sydney"], 1.0),
        ("regex", "Answer: 395", r"\b395\b", 1.0),
        ("regex", "Answer: 3950", r"\b395\b", 0.0),
    ],
)
def test_an_answer_is_right_or_wrong(scorer, text, expected, quality) -> None:
    assert score(scorer, text, expected) == quality


@pytest.mark.parametrize("scorer", ["judge", "rouge", ""])
def test_a_judge_or_an_unknown_scorer_leaves_the_quality_open(scorer) -> None:
    assert score(scorer, "text", "text") is None


@pytest.mark.parametrize("scorer", ["exact", "contains", "regex"])
@pytest.mark.parametrize("expected", ["", " ", None, True, [], [None], {"a": 1}])
def test_an_expectation_that_no_answer_can_meet_is_not_scored(scorer, expected) -> None:
    assert score(scorer, "anything", expected) is None


def test_a_pattern_that_does_not_compile_is_not_scored() -> None:
    assert score("regex", "(", "(") is None
