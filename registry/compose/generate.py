"""Generate text with a composed model, and record the slot gates of every token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ...adapters.layer.merge import Merged
from ...adapters.layer.routing import Route, recording_routes, routing_of
from ...domains.base_model import max_positions
from ...domains.errors import InputError
from .notebook import html_table

SHOWN_CHARACTERS = 80  # of the text, in `repr`
# what a generation_config may say otherwise; `_Sampler` samples
ONE_GREEDY_TEXT = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Continuation of a prompt, with its route."""

    text: str
    prompt_tokens: int
    new_tokens: int
    slots: tuple[str, ...]
    route: dict[str, float]  # mean slot gate over the new tokens
    tokens: tuple[tuple[str, tuple[float, ...]], ...]  # every token of prompt and answer, with its slot gates

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= SHOWN_CHARACTERS else f"{self.text[: SHOWN_CHARACTERS - 3]}..."
        route = ", ".join(f"{name}: {gate:.3f}" for name, gate in self.route.items())
        return f"Answer({text!r}, new_tokens={self.new_tokens}, route={{{route}}})"

    def _repr_html_(self) -> str:
        table = html_table(
            f"Mean slot gate of {self.new_tokens} new tokens",
            ("slot", "slot gate"),
            [(name, f"{gate:.3f}") for name, gate in self.route.items()],
        )
        return f'<pre style="white-space: pre-wrap">{escape(self.text)}</pre>{table}'


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> Answer:
    """Continue a prompt until an end token of the tokenizer or of the model's generation_config.

    Args:
        model: A composed model.
        tokenizer: The tokenizer of its base model.
        prompt: Plain text.
        max_new_tokens: Maximum number of new tokens.
        temperature: 0 decodes greedily; a higher value samples.
        seed: Random seed of sampling, which has a generator of its own: threads do not change each other's answers.
        chat: Apply the tokenizer's chat template to the prompt as a user's turn.

    Raises:
        InputError: The prompt has no tokens or is too long, or the tokenizer has no chat template.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, found {max_new_tokens}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature must be 0 or more, found {temperature}.")
    text = _chat_text(tokenizer, prompt) if chat else prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(next(model.parameters()).device)
    length = inputs["input_ids"].shape[1]
    context = max_positions(model)
    if length == 0:
        raise InputError("The prompt has no tokens.", fix="give some text")
    if context is not None and length + max_new_tokens > context:
        raise InputError(
            "The prompt is too long.",
            cause=f"{length} tokens and {max_new_tokens} new ones exceed the base model's context of {context}",
            fix="shorten it, or lower --max-new-tokens",
        )
    generator: Any = model
    sampler = [_Sampler(model, temperature=temperature, seed=seed)] if temperature > 0 else []
    with recording_routes(model) as routes, generator.reading_prompts(length):
        output = generator.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList(sampler),
            eos_token_id=_end_tokens(model, tokenizer) or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            tokenizer=tokenizer,  # generation_config may have stop_strings
            **ONE_GREEDY_TEXT,
        )[0]
    gates = _gates_of(model, routes, len(output) - 1)
    new = output[length:]
    names = routing_of(model).stack.names
    mean = gates[length - 1 :].mean(0).tolist()
    # the last token is never an input: it gets the gates of the position that predicted it
    gates = torch.cat([gates, gates[-1:].expand(len(output) - len(gates), -1)])
    pieces = [str(tokenizer.decode([token])) for token in output[: len(gates)].tolist()]
    return Answer(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=length,
        new_tokens=len(new),
        slots=names,
        route=dict(zip(names, mean, strict=True)),
        tokens=tuple((piece, tuple(gate)) for piece, gate in zip(pieces, gates.tolist(), strict=True)),
    )


class _Sampler(LogitsProcessor):
    """Draw the next token with a random generator of this call, and leave no other; greedy decoding then takes it.

    transformers samples from torch's global generator, which all threads share.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, seed: int):
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        config: Any = model.generation_config
        if config.top_p is not None and config.top_p < 1:
            self.warpers.append(TopPLogitsWarper(config.top_p))
        if config.min_p is not None:
            self.warpers.append(MinPLogitsWarper(config.min_p))
        if config.typical_p is not None and config.typical_p < 1:
            self.warpers.append(TypicalLogitsWarper(config.typical_p))
        if config.epsilon_cutoff is not None and 0 < config.epsilon_cutoff < 1:
            self.warpers.append(EpsilonLogitsWarper(config.epsilon_cutoff))
        if config.eta_cutoff is not None and 0 < config.eta_cutoff < 1:
            self.warpers.append(EtaLogitsWarper(config.eta_cutoff, device=str(model.device)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that leave one token."""
        shares = torch.softmax(self.warpers(input_ids, scores), dim=-1)  # type: ignore[arg-type]
        drawn = torch.multinomial(shares, 1, generator=self.generator)
        return torch.full_like(scores, -math.inf).scatter(1, drawn, 0.0)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: those of the tokenizer and of the model's generation_config."""
    config: Any = model.generation_config
    found: list[Any] = [config.eos_token_id, tokenizer.eos_token_id]
    return sorted({token for ids in found for token in (ids if isinstance(ids, list) else [ids])} - {None})


def _gates_of(model: PreTrainedModel, routes: Sequence[Route], tokens: int) -> Float[Tensor, "tokens slots"]:
    """Return the slot gates under which each token was read; a merged composition has the same for all."""
    merged = getattr(model, "merged", None)
    if isinstance(merged, Merged):
        return merged.slot_gate.expand(tokens, -1)
    found = torch.zeros(tokens, routes[0].slot_gate.shape[-1])
    for slot_gate, past in routes:  # a forward without a cache reads earlier tokens again
        found[past : past + slot_gate.shape[1]] = slot_gate[0]
    return found


def _chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise InputError("The tokenizer of the base model has no chat template.", fix="leave out --chat")
    turn = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
