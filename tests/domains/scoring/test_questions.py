"""Which rows are questions, and which corpora are classification tasks."""

import pytest

from lorary.domains.data.example import Example
from lorary.domains.scoring.questions import find_labels, find_questions

ASKED = Example("The dog ran after", "the ball", ("the ball", "a patient"))
INTENTS = [Example(f"User: {text}\nIntent:", label) for label in ("pay bill", "freeze account") for text in "abcde"]


def test_completions_of_a_small_closed_set_are_labels():
    assert find_labels(INTENTS) == ("freeze account", "pay bill")


@pytest.mark.parametrize(
    "changed",
    [
        [Example("User: z\nIntent:", "once")],
        [Example("", "pay bill")],
        [Example("User: z\nIntent:", "pay bill", ("pay bill", "no"))],
        [Example("z", "two\nlines"), Example("y", "two\nlines")],
        [Example(str(i), f"label {i // 2}") for i in range(20)],
        [Example(str(i), f"label {i // 4}") for i in range(4 * 151)],
    ],
    ids=["once", "text", "own choices", "lines", "few repeats", "too many"],
)
def test_other_rows_are_not_a_classification_task(changed):
    assert find_labels([*INTENTS, *changed]) == ()


def test_few_rows_are_not_a_classification_task():
    assert find_labels([]) == find_labels(INTENTS[:5]) == ()


def test_questions_are_rows_with_choices_or_with_a_label():
    found = find_questions([ASKED, *INTENTS[:1], Example("User: z", "other")], ("freeze account", "pay bill"))

    assert [q.choices for q in found] == [ASKED.choices, ("freeze account", "pay bill")]
    assert find_questions(INTENTS) == []
