"""Select the multiple-choice questions of a domain; imports no torch.

A row with `choices` is a question. Rows of prompt and completion are a classification task if their completions form a
small set of labels that repeat: then the choices of each row are all labels of the domain's data.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from ..data.example import Example

MAX_LABELS: Final = 150
MIN_REPEATS: Final = 2  # of each label
MIN_ROWS_PER_LABEL: Final = 4  # on average


def find_labels(examples: Iterable[Example]) -> tuple[str, ...]:
    """Return the sorted labels of a classification task, or an empty tuple if the examples are not one.

    They are one if every example has a prompt, no messages and no choices, and there are 2 to `MAX_LABELS` different
    completions of one line, each at least `MIN_REPEATS` times, and `MIN_ROWS_PER_LABEL` rows per label on average.
    """
    counts: Counter[str] = Counter()
    for example in examples:
        if not example.prompt or example.messages or example.choices or "\n" in example.completion.strip():
            return ()
        counts[example.completion] += 1
    is_closed = 2 <= len(counts) <= MAX_LABELS and min(counts.values()) >= MIN_REPEATS
    return tuple(sorted(counts)) if is_closed and counts.total() >= MIN_ROWS_PER_LABEL * len(counts) else ()


def find_questions(examples: Sequence[Example], labels: Sequence[str] = ()) -> list[Example]:
    """Return the examples that have choices or a label as their completion; the latter get `labels` as choices."""
    return [
        example if example.choices else replace(example, choices=tuple(labels))
        for example in examples
        if example.choices or example.completion in labels
    ]
