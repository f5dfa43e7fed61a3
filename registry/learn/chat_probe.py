"""Probe how a new version changes the routing of chat and of older domains' text, before anything is trained.

What everybody asks a chat model must stay with KP. So the bare chat template and the everyday questions of the package
are routed by {KP, older domains} and by {KP, older domains, new}, and the slot gates at the end of each prompt, which a
prompt is read with, are compared. The same is done with held-out text of the nearest older domains. Older domains whose
text is not at hand are represented by their typical evidence, as in drift.py.

The router is computed from statistics of the text, so the probe needs no trained bank and costs one partial forward
pass of the base over short prompts. Of other domains only the routing data is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ...adapters.router.router import DomainRouter, typical_gates
from ...domains.base_model import hidden_states_at, max_positions
from ...domains.data.blocks import encode
from ...domains.data.catalog import everyday_questions
from ...domains.data.chat import TEMPLATE_ERRORS
from ...domains.data.example import Example
from ...domains.errors import GateFailedError
from ..base.load import LoadedBase
from ..compose.drift import alike, usual_router
from ..pack.pack import Routable, RoutingData
from ..store.blobs import sha256_of
from ..store.manifest import DRIFT_EPSILON

MAX_ROWS = 16  # held-out rows of an older domain
MAX_ROW_TOKENS = 64  # read of each
BATCH = 32  # prompts


@dataclass(frozen=True, kw_only=True)
class ProbedText:
    """The newcomer's share of one kind of text."""

    texts: int
    before: float  # mean slot gate of the version that is replaced; 0 if there is none
    after: float  # mean slot gate of the newcomer
    largest: int  # number of texts that have it as their largest slot

    @property
    def is_taken(self) -> bool:
        """Whether the newcomer takes more of it than is tolerated."""
        return self.after > DRIFT_EPSILON


@dataclass(frozen=True, kw_only=True)
class OlderText(ProbedText):
    """The newcomer's share of an older domain's text."""

    domain: str
    measured_on: Literal["held-out text", "statistics"]


@dataclass(frozen=True, kw_only=True)
class ChatProbe:
    """Routing of chat and of older domains' text before and after a new version."""

    name: str
    rendered: Literal["chat template", "plain text"]  # how the questions were written
    template: ProbedText | None  # the template around nothing; None if the base has none that renders a user's turn
    everyday: ProbedText
    general_before: float  # mean slot gate of KP on the everyday questions
    general_after: float
    older: tuple[OlderText, ...]  # the most taken first
    taken: tuple[tuple[str, float], ...]  # everyday questions that it is the largest slot of
    questions: str  # digest of the everyday questions

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """What the newcomer takes that is not its own, a sentence each; empty if all is well."""
        found, everyday = [], self.everyday
        if self.template is not None and self.template.largest:
            found.append(
                f"the bare chat template is routed to {self.name} (slot gate {self.template.after:.2f}), and so is "
                "every chat"
            )
        if everyday.is_taken:
            found.append(
                f"{self.name} takes {everyday.after:.1%} of {everyday.texts} everyday questions, {everyday.largest} as "
                f"their largest slot; {DRIFT_EPSILON:.0%} is tolerated"
            )
        for older in self.older:
            if older.is_taken:
                text = f"{older.texts} held-out rows" if older.texts else "the typical text"
                found.append(
                    f"{self.name} takes {older.after:.1%} of {text} of {older.domain}; {DRIFT_EPSILON:.0%} is tolerated"
                )
        return tuple(found)

    @property
    def holds(self) -> bool:
        """Whether the newcomer leaves chat and older domains alone."""
        return not self.problems

    @property
    def advice(self) -> tuple[str, ...]:
        """What helps against the problems, a sentence each."""
        found = []
        if self.template is not None and self.template.largest:
            found.append(
                "where the data is conversations, write it as text, or as prompt and completion with --raw: then the "
                "template is not counted as the domain's own text"
            )
        if self.everyday.is_taken:
            found.append(
                "give KP general questions, instructions and small talk beside running text: registry init "
                "OTHER-FOLDER --data FILE"
            )
        if found:
            found.append(f"or raise KP's prior where you compose: registry compose general:4+{self.name}")
        taken = [older.domain for older in self.older if older.is_taken]
        if taken:
            found.append(
                f"if the text is more of {taken[0]}, retrain that: registry retrain {taken[0]} --data FILE; else give "
                f"{self.name} more text that {taken[0]} does not have"
            )
        return tuple(found)

    def __repr__(self) -> str:
        verdict = "holds" if self.holds else "; ".join(self.problems)
        return (
            f"ChatProbe({self.name!r}, everyday={self.everyday.before:.3f} -> {self.everyday.after:.3f}, "
            f"general={self.general_before:.3f} -> {self.general_after:.3f}, {verdict})"
        )

    def as_json(self) -> dict[str, Any]:
        """Return all of it, for --json."""
        return {
            **self._figures(),
            "older": [asdict(older) for older in self.older],
            "taken": [{"question": question, "gate": round(gate, 6)} for question, gate in self.taken],
            "problems": list(self.problems),
            "advice": list(self.advice),
        }

    def record(self) -> dict[str, Any]:
        """Return what the manifest records: figures only."""
        worst = self.older[0] if self.older else None
        return {**self._figures(), "older_domains": len(self.older), "older_most": worst.after if worst else 0.0}

    def _figures(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            "rendered": self.rendered,
            "template": None if self.template is None else asdict(self.template),
            "everyday": asdict(self.everyday),
            "general_before": self.general_before,
            "general_after": self.general_after,
            "questions": self.questions,
        }


OnProbe = Callable[[ChatProbe], None]


def check_probe(probe: ChatProbe) -> None:
    """Refuse a newcomer that takes chat or older domains' text.

    Raises:
        GateFailedError: It does; nothing is trained or stored.
    """
    if not probe.holds:
        raise GateFailedError(
            f"Nothing was stored: the router would give text to {probe.name} that is not its own.",
            cause="; ".join(probe.problems),
            fix="; ".join((*probe.advice, "or leave out --strict to store it all the same")),
        )


@torch.inference_mode()
def probe_chat(
    name: str,
    base: LoadedBase,
    preservation: Routable,
    others: Mapping[str, Routable],
    new: Routable,
    *,
    parent: Routable | None = None,
    held_out: Mapping[str, Sequence[Example]],
) -> ChatProbe:
    """Route everyday chat and older domains' text with and without the newcomer.

    Args:
        name: The new domain.
        base: The base model.
        preservation: The KP bank's pack.
        others: Packs of the older domains by name.
        new: Pack of the new domain, or of the new version.
        parent: The version that `new` replaces, which then is part of the router before.
        held_out: Held-out text of older domains, of those where it is at hand.
    """
    width, roles = base.layout.width, base.roles
    older, (newest, replaced) = alike(preservation, others, [new, parent], width=width)
    before = usual_router(older, replaced, width=width, roles=roles)
    after = usual_router(older, newest, width=width, roles=roles)
    questions = everyday_questions()
    rendered, prompts = _render(base, questions)
    texts = {domain: _rows(base, rows) for domain, rows in held_out.items()}
    every = [*prompts, *(row for rows in texts.values() for row in rows)]
    gates = _Gates(base, before, after, every, layer=preservation.feature_layer, has_parent=parent is not None)
    is_chat = rendered == "chat template"
    everyday = gates.probed(slice(1, len(prompts)))
    kp_before, kp_after = gates.of_general(slice(1, len(prompts)))
    own = gates.after[1 : len(prompts)]
    order = sorted(range(len(questions)), key=lambda i: -own[i, -1].item())
    return ChatProbe(
        name=name,
        rendered=rendered,
        template=ProbedText(**gates.probed(slice(1))) if is_chat else None,
        everyday=ProbedText(**everyday),
        general_before=kp_before,
        general_after=kp_after,
        older=_older(
            gates, before, after, dict(zip(sorted(others), older[1:], strict=True)), texts, first=len(prompts)
        ),
        taken=tuple((questions[i], own[i, -1].item()) for i in order if _is_largest(own[i])),
        questions=sha256_of("\n".join(questions).encode()),
    )


class _Gates:
    """Slot gates at the end of each text, before and after; the newcomer's slot is the last."""

    def __init__(
        self,
        base: LoadedBase,
        before: DomainRouter,
        after: DomainRouter,
        texts: Sequence[list[int]],
        *,
        layer: int,
        has_parent: bool,
    ):
        self.has_parent = has_parent
        found = [
            [
                _last(router.text_gates(ids.cpu(), hidden.cpu(), mask.cpu().bool(), as_prompts=True), mask)
                for router in (before, after)
            ]
            for ids, hidden, mask in _batches(base, texts, layer)
        ]
        self.before, self.after = (torch.cat(gates) for gates in zip(*found, strict=True))

    def probed(self, texts: slice) -> dict[str, Any]:
        """Return the fields of `ProbedText`."""
        before, after = self.before[texts], self.after[texts]
        return {
            "texts": len(after),
            "before": _mean(before[:, -1]) if self.has_parent else 0.0,
            "after": _mean(after[:, -1]),
            "largest": sum(map(_is_largest, after)),
        }

    def of_general(self, texts: slice) -> tuple[float, float]:
        """Return KP's mean slot gate before and after."""
        return _mean(self.before[texts, 0]), _mean(self.after[texts, 0])


def _render(
    base: LoadedBase, questions: Sequence[str]
) -> tuple[Literal["chat template", "plain text"], list[list[int]]]:
    """Return how prompts are written, and the token ids of the bare prompt and of each question.

    A template that renders no plain turn of a user cannot be chatted with: then prompts are plain text.
    """
    tokenizer: Any = base.tokenizer
    limit = max_positions(base.model) or 0
    for bare in ("", "Hello") if tokenizer.chat_template else ():  # some templates refuse a turn without content
        with suppress(*TEMPLATE_ERRORS):
            turns = [[{"role": "user", "content": content}] for content in (bare, *questions)]
            texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
            return "chat template", [tokenizer(text, add_special_tokens=False)["input_ids"][-limit:] for text in texts]
    return "plain text", [tokenizer(text)["input_ids"][-limit:] for text in ("", *questions)]


def _rows(base: LoadedBase, rows: Sequence[Example]) -> list[list[int]]:
    return [encode(row, base.tokenizer)[0][:MAX_ROW_TOKENS] for row in rows[:MAX_ROWS]]


def _batches(base: LoadedBase, texts: Sequence[list[int]], layer: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield token ids, hidden states at the layer, and masks, padded on the right."""
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        ids = torch.zeros(len(batch), max(1, *map(len, batch)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = 1
        ids, mask = ids.to(base.model.device), mask.to(base.model.device)
        yield ids, hidden_states_at(base.model, base.layout, layer, input_ids=ids, attention_mask=mask), mask


def _last(gates: Float[Tensor, "batch seq slots"], mask: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch slots"]:
    """Return the gates at the last token; those of the prior for a text without tokens."""
    ends = (mask.sum(1) - 1).clamp(min=0).cpu()
    return gates[torch.arange(len(gates)), ends]


def _older(
    gates: _Gates,
    before: DomainRouter,
    after: DomainRouter,
    others: Mapping[str, RoutingData],
    texts: Mapping[str, list[list[int]]],
    *,
    first: int,
) -> tuple[OlderText, ...]:
    """Return the newcomer's share of each older domain's text: held-out rows, or else typical evidence."""
    found = []
    for domain, rows in texts.items():
        found.append(
            OlderText(domain=domain, measured_on="held-out text", **gates.probed(slice(first, first + len(rows))))
        )
        first += len(rows)
    rest = [domain for domain in others if domain not in texts]
    if rest:
        statistics = [others[domain].statistics for domain in rest]
        typical = [typical_gates(router, statistics).cpu() for router in (before, after)]
        for domain, old, new in zip(rest, *typical, strict=True):
            figures = {
                "texts": 0,
                "before": round(old[-1].item(), 6) if gates.has_parent else 0.0,
                "after": round(new[-1].item(), 6),
                "largest": int(_is_largest(new)),
            }
            found.append(OlderText(domain=domain, measured_on="statistics", **figures))
    return tuple(sorted(found, key=lambda one: (-one.after, one.domain)))


def _is_largest(gates: Float[Tensor, " slots"]) -> bool:
    return int(gates.argmax()) == len(gates) - 1


def _mean(values: Float[Tensor, " texts"]) -> float:
    return round(values.double().mean().item(), 6) if len(values) else 0.0
