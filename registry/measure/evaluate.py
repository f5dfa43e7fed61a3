"""Score held-out data under the base model, under a domain's own experts alone, and under routing.

    share of oracle gain = (base - routed) / (base - own experts alone)        in bits per byte

Own experts alone means slot gate 1 for the domain and 0 for every other slot: the choice of an oracle that is given the
domain of each text. A share of 1 means that routing loses nothing.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.composition import GENERAL
from ...adapters.layer.attach import attach
from ...adapters.layer.routing import Route, fixed_slots, recording_routes, routing_of
from ...adapters.layer.stack import Stack
from ...domains.data.blocks import encode
from ...domains.data.corpus import Source, limit_bytes
from ...domains.data.example import Example
from ...domains.errors import InputError
from ...domains.progress import OnProgress, Progress
from ...domains.scoring.choices import ChoiceScore, score_choices
from ...domains.scoring.language import LanguageScore, confidence_interval, score_language
from ...domains.statistics.intervals import percentile_interval, ratio_draws
from ..base.load import LoadedBase
from ..compose.build import base_router
from ..compose.plan import Plan, prior_shares
from ..pack.pack import DomainPack
from ..store.store import Store
from .held_out import MAX_SCORED_BYTES, HeldOut, find_held_out
from .measurable import why_not_measurable
from .scores import CellScores

ROUTED_TOKENS = 256  # tokens of each text that routing accuracy is measured on
BLOCK: Final = 256  # tokens per window of the retention report


@dataclass(frozen=True, kw_only=True)
class DomainScores:
    """Bits per byte of one domain's held-out text (lower is better), and accuracy on its questions."""

    base: float
    alone: float  # own experts only
    routed: float
    interval: tuple[float, float]  # 95 %, of routed
    bytes: int
    general_base: float | None = None  # bits per byte of the bundled general text
    general_routed: float | None = None
    routed_right: float | None = None  # routing accuracy over positions
    share_interval: tuple[float, float] | None = None  # 95 %, of share_of_oracle_gain
    accuracy: dict[str, Any] = field(default_factory=dict)  # on questions, by model; empty without questions
    share_reason: str | None = None  # why the share of oracle gain is not measurable

    @property
    def share_of_oracle_gain(self) -> float:
        """(base - routed) / (base - alone); nan if it is not measurable, as without a gain of the own experts."""
        gain = self.base - self.alone
        return (self.base - self.routed) / gain if gain > 0 and self.share_reason is None else float("nan")

    def as_json(self) -> dict[str, Any]:
        """Return the scores for a manifest, rounded; only a share that is not measurable has a reason."""
        values = {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}
        reason = values.pop("share_reason")
        share = self.share_of_oracle_gain
        return values | {
            "interval": [round(bound, 5) for bound in self.interval],
            "share_interval": self.share_interval and [round(bound, 4) for bound in self.share_interval],
            "metric": "bits per byte",
            "share_of_oracle_gain": round(share, 4) if share == share else None,
            **({} if reason is None else {"share_reason": reason}),
        }


def score_preservation(
    base: LoadedBase, pack: DomainPack, held_out: Sequence[Example], *, on_progress: OnProgress
) -> DomainScores:
    """Score general text under the base and under KP as the only slot."""
    composed = attach(base.model, Stack(names=(GENERAL,), banks=(pack.bank,)), router=None, fixed=torch.ones(1))
    before = _score_texts(base.model, base, held_out, "the base", on_progress)
    after = _score_texts(composed, base, held_out, "KP", on_progress)
    return DomainScores(
        base=before.bits_per_byte,
        alone=after.bits_per_byte,
        routed=after.bits_per_byte,
        interval=confidence_interval(after),
        bytes=after.bytes,
        share_reason=_oracle_share(before, after, after)[1],
    )


def score_new_domain(
    base: LoadedBase,
    preservation: DomainPack,
    pack: DomainPack,
    name: str,
    held_out: Sequence[Example],
    general: Sequence[Example],
    *,
    on_progress: OnProgress,
) -> DomainScores:
    """Score a new domain in the routed composition of KP and the domain."""
    composed = compose_with_preservation(base, preservation, pack, name)
    scores = score_in_composition(composed, base, name, held_out, on_progress=on_progress)
    general_base = _score_texts(base.model, base, general, "general text", on_progress)
    general_routed = _score_texts(composed, base, general, "general text, routed", on_progress)
    return replace(scores, general_base=general_base.bits_per_byte, general_routed=general_routed.bits_per_byte)


def compose_with_preservation(
    base: LoadedBase, preservation: DomainPack, pack: DomainPack, name: str
) -> PreTrainedModel:
    """Return the routed composition of KP and one domain, from packs in memory."""
    shares = torch.tensor(list(prior_shares({GENERAL: None, name: None}).values()))
    router = base_router([preservation, pack], shares, base)
    return attach(base.model, Stack(names=(GENERAL, name), banks=(preservation.bank, pack.bank)), router=router)


def score_in_composition(
    composed: PreTrainedModel,
    base: LoadedBase,
    name: str,
    held_out: Sequence[Example],
    *,
    questions: Sequence[Example] = (),
    on_progress: OnProgress,
) -> DomainScores:
    """Score one domain's held-out text under the base, under its own experts alone, and under the composition."""
    before = _score_texts(base.model, base, held_out, f"{name}, base", on_progress)
    accuracy: dict[str, Any] = {}
    if questions:
        accuracy["base"] = _score_questions(base.model, base, questions, f"{name}, base", on_progress)
        accuracy["routed"] = _score_questions(composed, base, questions, f"{name}, routed", on_progress)
    with fixed_slots(composed, {name: 1.0}):
        alone = _score_texts(composed, base, held_out, f"{name}, own experts", on_progress)
        if questions:
            accuracy["alone"] = _score_questions(composed, base, questions, f"{name}, own experts", on_progress)
    routed = _score_texts(composed, base, held_out, f"{name}, routed", on_progress)
    share_interval, share_reason = _oracle_share(before, alone, routed)
    return DomainScores(
        base=before.bits_per_byte,
        alone=alone.bits_per_byte,
        routed=routed.bits_per_byte,
        interval=confidence_interval(routed),
        bytes=routed.bytes,
        share_interval=share_interval,
        routed_right=routing_accuracy(composed, base, name, limit_bytes(held_out, MAX_SCORED_BYTES)),
        accuracy=accuracy,
        share_reason=share_reason,
    )


@torch.inference_mode()
def routing_accuracy(
    composed: PreTrainedModel, base: LoadedBase, name: str, examples: Sequence[Example]
) -> float | None:
    """Return the share of positions, among the first tokens of each text, whose largest slot gate is this domain's.

    None if the composition is static or does not contain the domain.
    """
    routing = routing_of(composed)
    if routing.router is None or name not in routing.stack.names:
        return None
    correct = total = 0
    for example in examples:
        ids = torch.tensor([encode(example, base.tokenizer)[0][:ROUTED_TOKENS]], device=base.model.device)
        with recording_routes(composed) as routes:
            composed(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        correct += int((routes[-1].slot_gate.argmax(-1) == routing.stack.names.index(name)).sum())
        total += ids.shape[1]
    return correct / total


def _score_texts(
    model: PreTrainedModel, base: LoadedBase, examples: Sequence[Example], stage: str, on_progress: OnProgress
) -> LanguageScore:
    return score_language(
        model,
        base.tokenizer,
        examples,
        max_bytes=MAX_SCORED_BYTES,
        on_progress=lambda done, total: on_progress(Progress(f"scoring {stage}", done, total)),
    )


def _score_questions(
    model: PreTrainedModel, base: LoadedBase, questions: Sequence[Example], stage: str, on_progress: OnProgress
) -> dict[str, Any]:
    score: ChoiceScore = score_choices(
        model,
        base.tokenizer,
        questions,
        on_progress=lambda done, total: on_progress(Progress(f"asking {stage}", done, total)),
    )
    return {
        "accuracy": round(score.accuracy, 4),
        "correct": score.correct,
        "total": score.total,
        "interval": [round(bound, 4) for bound in score.interval],
    }


def _oracle_share(
    before: LanguageScore, alone: LanguageScore, routed: LanguageScore
) -> tuple[tuple[float, float] | None, str | None]:
    """Return the 95 % interval of the share of oracle gain, by the paired bootstrap over texts, or why it has none."""
    nats = [score.text_nats for score in (before, alone, routed)]
    base, oracle, composed = ratio_draws(nats, before.text_bytes).T / math.log(2)
    gain = before.bits_per_byte - alone.bits_per_byte
    reason = why_not_measurable(gain, percentile_interval(base - oracle), texts=before.texts, base=before.bits_per_byte)
    if reason is not None:
        return None, reason
    has_gain = base > oracle
    return percentile_interval((base - composed)[has_gain] / (base - oracle)[has_gain]), None


def evaluate_composition(
    store: Store,
    plan: Plan,
    model: PreTrainedModel,
    base: LoadedBase,
    *,
    data: Sequence[Source],
    with_questions: bool,
    on_progress: OnProgress,
) -> dict[str, DomainScores]:
    """Score every slot of a composition, KP included.

    Args:
        data: Held-out text of the only domain, instead of what was held out when it was added.
        with_questions: Also score the domain's questions.

    Raises:
        InputError: `data` is given for several domains, or the held-out text of a domain is not available.
    """
    names = [slot.name for slot in plan.slots]
    domains = [name for name in names if name != GENERAL] or [GENERAL]
    if data and len(domains) != 1:
        raise InputError(
            "--data is the held-out text of one domain.",
            cause=f"the composition has {len(domains)}: {', '.join(domains)}",
            fix=f"registry evaluate {domains[0]} --data FILE",
        )
    scores = {}
    for slot in plan.slots:
        if data and slot.name not in domains:
            continue
        found = find_held_out(
            store, slot.manifest, data=data, max_bytes=MAX_SCORED_BYTES, with_questions=with_questions
        )
        scores[slot.name] = score_in_composition(
            model, base, slot.name, found.texts, questions=found.questions, on_progress=on_progress
        )
    return scores


class _GateObserver:
    """Sums of slot gates per text, over the positions that predict a scored token."""

    def __init__(self, model: PreTrainedModel, texts: int, routes: list[Route]):
        self._routing = routing_of(model)
        self._routes = routes  # of the forwards since the last call
        self.gates = torch.zeros(texts, len(self._routing.stack.names), dtype=torch.float64)
        self.positions = torch.zeros(texts, 1, dtype=torch.float64)

    def __call__(self, rows: Sequence[int], predicts: Bool[Tensor, "rows length"]) -> None:
        weight = predicts.double()
        used = self._routes.pop().slot_gate[:, : predicts.shape[1]].double()
        texts = torch.tensor(rows)
        self.gates.index_add_(0, texts, torch.einsum("rts,rt->rs", used, weight))
        self.positions.index_add_(0, texts, weight.sum(1, keepdim=True))

    def taken(self) -> dict[str, int]:
        """Return the number of texts by the slot with the largest mean gate."""
        largest = self.gates[self.positions[:, 0] > 0].argmax(1)
        counts = torch.bincount(largest, minlength=self.gates.shape[1]).tolist()
        return {name: count for name, count in zip(self._routing.stack.names, counts, strict=True) if count}

    def means(self) -> dict[str, float]:
        """Return the mean gate of each slot over all positions."""
        means = (self.gates.sum(0) / self.positions.sum()).tolist()
        return {name: round(mean, 6) for name, mean in zip(self._routing.stack.names, means, strict=True)}


def score_held_out(
    model: PreTrainedModel, base: LoadedBase, data: HeldOut, *, stage: str, on_progress: OnProgress
) -> CellScores:
    """Score texts and questions under one model; of a routed composition also count which slot took each text.

    Args:
        model: The base model or a composition of it.
        stage: Name of the stage in progress reports.
    """
    routing = getattr(model, "routing", None)
    is_routed = routing is not None and routing.router is not None and routing.fixed_here is None

    def report(done: int, total: int) -> None:
        on_progress(Progress(stage, done, total))

    with recording_routes(model) if is_routed else nullcontext([]) as routes:
        observer = _GateObserver(model, len(data.texts), routes) if is_routed else None
        language = score_language(model, base.tokenizer, data.texts, block=BLOCK, on_progress=report, on_batch=observer)
    right: tuple[bool, ...] = ()
    if data.questions:
        right = score_choices(model, base.tokenizer, data.questions, on_progress=report).right
    return CellScores(
        text_nats=language.text_nats,
        text_bytes=language.text_bytes,
        right=right,
        taken=observer.taken() if observer else {},
        gates=observer.means() if observer else {},
    )
