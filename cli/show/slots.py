"""Show routing: bars of slot shares, a legend, and text coloured by the slot of each token."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .charts import bar
from .numbers import exact, percent
from .page import Cell, Line, Paragraph, SlotRuns, Span, Table, cell, line, slot_style, table

if TYPE_CHECKING:
    from ...registry.compose.generate import Answer

_MARKER = re.compile(r"<\|[^|]*\|>|</?s>|<pad>|<eos>|<bos>")  # special tokens


def shares(values: Mapping[str, float], order: Sequence[str], *, heading: str) -> Table:
    """Make a table with a bar for each slot; `order` gives the slots their colours."""
    rows = [
        [
            cell(Span(name, slot_style(order.index(name)))),
            cell(percent(share, digits=1), exact(share)),
            cell(Span(bar(share), slot_style(order.index(name))), ""),
        ]
        for name, share in values.items()
    ]
    return table(("SLOT", heading, ""), rows, right=(heading,), no_wrap=("SLOT", heading, ""))


def legend(slots: Sequence[str]) -> Paragraph:
    """Make the legend: the colour and the number of each slot."""
    parts = [line(Span(f"{i} {name}", slot_style(i)), "   ") for i, name in enumerate(slots)]
    return Paragraph(line(*parts), in_pipes=False)


def routed_text(tokens: Iterable[tuple[str, Sequence[float]]]) -> SlotRuns:
    """Split tokens with their slot gates into runs with the same slot."""
    runs: list[tuple[str, int]] = []
    for text, gates in tokens:
        if _MARKER.fullmatch(text):
            continue
        slot = max(range(len(gates)), key=gates.__getitem__)
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0] + text, slot)
        else:
            runs.append((text, slot))
    return SlotRuns(tuple(runs))


def answer_line(answer: "Answer") -> Line:
    """Return the generated text."""
    return line(answer.text.strip("\n"))


def answer_hints(answer: "Answer") -> tuple[str, ...]:
    """Return why an answer is empty, if it is, and what of the base's generation_config shaped it or was replaced."""
    hints = [] if answer.empty_because is None else [f"The answer is empty: {answer.empty_because}."]
    if answer.followed:
        hints.append(f"The base's generation_config shaped the answer: {_values(answer.followed)}.")
    if answer.not_followed:
        hints.append(f"The base's generation_config is not followed in {_values(answer.not_followed)}.")
    return tuple(hints)


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def answer_data(answer: "Answer", *, with_tokens: bool = False) -> dict[str, object]:
    """Return an answer for --json."""
    data: dict[str, object] = {
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "finish": answer.finish,
        "slots": list(answer.slots),
        "route": {name: round(share, 6) for name, share in answer.route.items()},
    }
    if answer.followed or answer.not_followed:
        data["generation_config"] = {"followed": dict(answer.followed), "not_followed": dict(answer.not_followed)}
    if with_tokens:
        data["tokens"] = [{"text": text, "gates": [round(g, 6) for g in gates]} for text, gates in answer.tokens]
    return data


def similarity_cell(value: float | None) -> Cell:
    """Make the cell of a cosine similarity."""
    return cell("-" if value is None else f"{value:.2f}", exact(value))
