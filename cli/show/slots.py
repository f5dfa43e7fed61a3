"""How slots are shown: legends, bars of their shares, and texts coloured by the slot that took each token."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .charts import bar
from .numbers import exact, percent
from .page import Cell, Line, Runs, Span, Table, Words, cell, line, slot_style, table

if TYPE_CHECKING:
    from ...registry.compose.generate import Answer

_MARKER = re.compile(r"<\|[^|]*\|>|</?s>|<pad>|<eos>|<bos>")  # tokens that are no text


def shares(values: Mapping[str, float], order: Sequence[str], *, heading: str) -> Table:
    """A bar for each slot, in the given order of the values and the colours of the slots."""
    rows = [
        [
            cell(Span(name, slot_style(order.index(name)))),
            cell(percent(share, digits=1), exact(share)),
            cell(Span(bar(share), slot_style(order.index(name))), ""),
        ]
        for name, share in values.items()
    ]
    return table(("SLOT", heading, ""), rows, right=(heading,), tight=("SLOT", heading, ""))


def legend(slots: Sequence[str]) -> Words:
    """Which colour and which number stands for which slot."""
    parts = [line(Span(f"{i} {name}", slot_style(i)), "   ") for i, name in enumerate(slots)]
    return Words(line(*parts), in_pipes=False)


def routed_text(answer: "Answer") -> Runs:
    """Prompt and answer in runs of tokens that the same slot took."""
    runs: list[tuple[str, int]] = []
    for text, gates in answer.tokens:
        if _MARKER.fullmatch(text):
            continue
        slot = max(range(len(gates)), key=gates.__getitem__)
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0] + text, slot)
        else:
            runs.append((text, slot))
    return Runs(tuple(runs))


def answer_line(answer: "Answer") -> Line:
    """The text that was written."""
    return line(answer.text.strip("\n") or "(nothing: the model ended at once)")


def answer_data(answer: "Answer", *, with_tokens: bool = False) -> dict[str, object]:
    """An answer for --json."""
    data: dict[str, object] = {
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "slots": list(answer.slots),
        "route": {name: round(share, 6) for name, share in answer.route.items()},
    }
    if with_tokens:
        data["tokens"] = [{"text": text, "gates": [round(g, 6) for g in gates]} for text, gates in answer.tokens]
    return data


def similarity_cell(value: float | None) -> Cell:
    """Cosine to the nearest prototype."""
    return cell("-" if value is None else f"{value:.2f}", exact(value))
