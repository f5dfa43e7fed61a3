"""Which rows of a domain are questions. No torch.

A row with `choices` is a question. Rows of prompt and completion whose completions form a small closed set, each of
which repeats, are a classification task: their choices are all completions of the domain's data.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from ..data.example import Example

MAX_LABELS: Final = 150  # of a classification task
MIN_REPEATS: Final = 2  # of each label
MIN_ROWS_PER_LABEL: Final = 4  # on average


def find_labels(examples: Iterable[Example]) -> tuple[str, ...]:
    """The labels of a classification task, sorted; none if the examples are not one.

    They are one if every example has a prompt, no messages and no choices of its own, and there are 2 to `MAX_LABELS`
    different completions, each on one line, each at least twice, and four rows for each on average.
    """
    counts: Counter[str] = Counter()
    for example in examples:
        if not example.prompt or example.messages or example.choices or "\n" in example.completion.strip():
            return ()
        counts[example.completion] += 1
    is_closed = 2 <= len(counts) <= MAX_LABELS and min(counts.values()) >= MIN_REPEATS
    return tuple(sorted(counts)) if is_closed and counts.total() >= MIN_ROWS_PER_LABEL * len(counts) else ()


def find_questions(examples: Sequence[Example], labels: Sequence[str] = ()) -> list[Example]:
    """The examples that are questions: those with choices, and, if there are labels, those answered by one of them."""
    return [
        example if example.choices else replace(example, choices=tuple(labels))
        for example in examples
        if example.choices or example.completion in labels
    ]
