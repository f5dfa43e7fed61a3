"""Rows in memory: dicts in the forms of JSONL rows, or a data set that yields such dicts."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import CorpusError
from .example import Example
from .files import MAX_LINE_BYTES
from .rows import Row, to_example


@dataclass(frozen=True)
class RowList:
    """Rows in memory, read like the lines of a JSONL file."""

    rows: Iterable[object] = field(hash=False)  # read more than once, so not a generator
    name: str = "rows in memory"  # stands for the file name in errors and manifests

    def __str__(self) -> str:
        return self.name

    def read(self) -> Iterator[Example | CorpusError]:
        """Yield the example of each row, or the error that describes it; errors number the rows from 1."""
        for number, value in enumerate(self.rows, start=1):
            try:
                example = to_example(Row(number, value), self.name)
            except CorpusError as error:
                yield error
                continue
            # what is read here must be readable from `to_jsonl` too
            if len(_to_line(example)) > MAX_LINE_BYTES:
                yield CorpusError(self.name, f"the row is over {MAX_LINE_BYTES // 2**20} MiB", line=number)
            else:
                yield example

    def to_jsonl(self) -> bytes:
        """Return the rows as JSONL that reads back as the same examples; equal examples give equal bytes.

        Raises:
            CorpusError: A row cannot be used.
        """
        lines = []
        for found in self.read():
            if isinstance(found, CorpusError):
                raise found
            lines.append(_to_line(found))
        return b"".join(lines)


def _to_line(example: Example) -> bytes:
    row: dict[str, Any] = {"id": example.id} if example.id else {}
    if example.document:
        row["doc"] = example.document
    if example.kind:
        row["source"] = example.kind
    if example.messages:
        row["messages"] = _to_messages(example)
    elif example.prompt or example.choices:
        row |= {"prompt": example.prompt, "completion": example.completion}
    else:
        row["text"] = example.completion
    if example.choices:
        row["choices"] = list(example.choices)
    if example.tools:
        row["tools"] = example.tools
    # only the outer keys are sorted: templates render tools and tool calls in the order of their keys
    return json.dumps(dict(sorted(row.items())), ensure_ascii=False).encode() + b"\n"


def _to_messages(example: Example) -> list[dict[str, Any]]:
    learned, messages = set(example.learned_turns), example.turns
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn not in learned:
            message["train"] = False
    return [dict(sorted(message.items())) for message in messages]
