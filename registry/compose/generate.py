"""Generate text with a composed model, and record the slot gates of every token."""

import itertools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final, Literal, overload

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
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from ...adapters.layer.merge import Merged
from ...adapters.layer.routing import Route, recording_routes, routing_of
from ...domains.base_model import max_positions
from ...domains.data.frame import following_ids
from ...domains.data.prompt import Message, Prompt, prompt_ids
from ...domains.errors import InputError
from ..store.manifest import BaseRecord, check_same_base
from .notebook import html_table

Prompts = list[str] | list[Sequence[Message]] | list[list[dict[str, Any]]]
Answers = list["Answer"]
Finish = Literal["end", "stop", "length", "interrupted"]

MAX_ROWS: Final = 16  # prompts that are answered together
REPLACEMENT: Final = "\ufffd"  # what a part of a character is decoded to
# of a generation_config
_READ_EARLIER_TOKENS: Final = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("sequence_bias", "bad_words_ids"),
)
# what a generation_config says of other things than the text, and what every call says for itself
_NO_PART_OF_THE_TEXT: Final = {
    *("transformers_version", "_from_model_config", "eos_token_id", "bos_token_id", "pad_token_id", "use_cache"),
    *("max_length", "max_new_tokens", "return_dict_in_generate", "cache_implementation", "cache_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "prefill_chunk_size"),
}
_SAMPLING: Final = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # what `_Sampler` follows
_KINDS: Final[dict[str, tuple[type, str]]] = {
    **dict.fromkeys(("max_new_tokens", "top_k", "seed"), (numbers.Integral, "whole number")),
    **dict.fromkeys(("temperature", "top_p"), (numbers.Real, "number")),
}
_SEEDS: Final = range(-(2**63), 2**64)  # what torch takes
SHOWN_CHARACTERS = 80  # of the text, in `repr`
# what a generation_config may say otherwise; `_Sampler` samples
ONE_GREEDY_TEXT = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "stop_strings": None,  # `_Ending` stops
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Continuation of a prompt, with its route."""

    text: str
    finish: Finish = "length"  # why it ended: an end token, a stop string, enough tokens, or the caller's wish
    prompt_tokens: int
    new_tokens: int
    slots: tuple[str, ...]
    route: dict[str, float]  # mean slot gate over the new tokens
    tokens: tuple[tuple[str, tuple[float, ...]], ...]  # every token of prompt and answer, with its slot gates
    followed: Mapping[str, Any] = field(default_factory=dict)  # of the base's generation_config, what shaped the text
    not_followed: Mapping[str, Any] = field(default_factory=dict)  # of it, what the settings of the call replaced

    @property
    def empty_because(self) -> str | None:
        """Why there is no text to read; None if there is."""
        if self.text.strip():
            return None
        if self.finish == "end" and self.new_tokens == 1:
            return f"the first token was the end token {self.tokens[-1][0]}"
        reasons = {"end": "an end token came", "stop": "a stop string came", "interrupted": "it was stopped"}
        tokens = f"{self.new_tokens} token{'s' if self.new_tokens > 1 else ''}"
        return f"{reasons.get(self.finish, 'the tokens ended')} after {tokens} without text"

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


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How a prompt is answered.

    Attributes:
        max_new_tokens: Maximum number of new tokens.
        temperature: 0 decodes greedily; a higher value samples.
        top_p: Sample among the most probable tokens whose probabilities sum up to this.
        top_k: Sample among this many most probable tokens.
        stop: Texts before which the answer ends.
        seed: Random seed of sampling. Each prompt has a generator of its own: neither threads nor the other prompts of
            a batch change an answer.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    stop: str | Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 or more, found {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, found {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, found {self.top_k}.")
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise InputError(
                "Greedy decoding has no top_p and no top_k.",
                cause="the temperature is 0",
                fix="sample: --temperature 0.7, in Python temperature=0.7; or leave them out",
            )
        if "" in self.stops:
            raise InputError("A stop string is empty.", fix='for example --stop "\\n\\n"')
        for stop in self.stops:
            check_text(stop, "A stop string")

    def _check_types(self) -> None:
        for name, value in vars(self).items():
            kind, what = _KINDS.get(name, (object, ""))
            is_left_out = value is None and name in ("top_p", "top_k")
            if not is_left_out and (not isinstance(value, kind) or isinstance(value, bool)):
                raise InputError(f"{name} must be a {what}, found {value!r}.")
        if self.seed not in _SEEDS:
            raise InputError(f"seed must be at least -2**63 and below 2**64, found {self.seed}.")
        if not isinstance(self.stop, Sequence) or not all(isinstance(stop, str) for stop in self.stop):
            raise InputError(f"Stop strings are texts, found {self.stop!r}.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


DEFAULTS: Final = GenerationSettings()


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    settings: GenerationSettings = ...,
    *,
    raw: bool = ...,
    streamer: BaseStreamer | None = ...,
    should_stop: Callable[[], bool] | None = ...,
) -> Answer: ...


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompts,
    settings: GenerationSettings = ...,
    *,
    raw: bool = ...,
    streamer: BaseStreamer | None = ...,
    should_stop: Callable[[], bool] | None = ...,
) -> Answers: ...


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Prompts,
    settings: GenerationSettings = DEFAULTS,
    *,
    raw: bool = False,
    streamer: BaseStreamer | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Answer | Answers:
    """Answer a prompt until an end token of the tokenizer or of the model's generation_config.

    Args:
        model: A composed model.
        tokenizer: The tokenizer of its base model.
        prompt: A text, the messages of a conversation, or a list of either, whose answers are those of each alone but
            for the rounding of batched matrix products.
        settings: How it is answered.
        raw: Continue a text as it is, without the tokenizer's chat template.
        streamer: Gets the prompt and each token of the answer, as transformers defines it; no token of a stop string.
        should_stop: Asked after each token whether to end the answer there.

    Raises:
        InputError: A prompt has no tokens, is too long, or cannot be rendered by the chat template.
    """
    if not _is_batch(prompt):
        return _answers(model, tokenizer, [prompt], settings, raw=raw, streamer=streamer, should_stop=should_stop)[0]
    if streamer is not None:
        raise InputError("A streamer takes one answer at a time.", fix="give one prompt, or leave out the streamer")
    return _answers(model, tokenizer, prompt, settings, raw=raw, streamer=None, should_stop=should_stop)


def check_model(model: PreTrainedModel, base: BaseRecord) -> None:
    """Raise an error if a composed model stands on another base model than the registry that shall use it.

    Raises:
        IncompatibleError: Its tokens would mean something else.
    """
    plan: Any = getattr(model, "composition", None)
    for slot in getattr(plan, "slots", ()):
        check_same_base(wanted=base, found=slot.manifest.base, what="The registry that was asked to use the model")


def check_text(text: Any, what: str) -> None:
    """Raise an error if this is no text that has a UTF-8 form.

    Raises:
        InputError: It is of another type, or has half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is of type {type(text).__name__}.", fix="give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} has a character that is no text.",
            cause=f"character {error.start + 1} is {text[error.start]!r}, half of a surrogate pair",
            fix="decode the text as UTF-8, or replace the character",
        ) from error


def _is_batch(prompt: Any) -> bool:
    """Return whether these are several prompts.

    Raises:
        InputError: It is neither a text, nor messages, nor a list of these.
    """
    if isinstance(prompt, str):
        return False
    if not isinstance(prompt, list | tuple):
        raise InputError(f"The prompt is of type {type(prompt).__name__}.", fix="give a text, or a list of messages")
    if not prompt:
        raise InputError("There is no prompt.", fix="give a text, or a list of messages")
    return not isinstance(prompt[0], Mapping)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    settings: GenerationSettings,
    *,
    raw: bool,
    streamer: BaseStreamer | None,
    should_stop: Callable[[], bool] | None,
) -> Answers:
    for prompt in prompts:
        for text in _texts_of(prompt):
            check_text(text, "A prompt")
    rows = [prompt_ids(prompt, tokenizer, raw=raw) for prompt in prompts]
    for number, row in enumerate(rows, start=1):
        _check_length(row, settings, max_positions(model), which=f" {number}" if len(rows) > 1 else "")
    answers: dict[int, Answer] = {}
    for group in _batches(rows, may_pad=not _reads_earlier_tokens(model)):
        ending = _Ending(model, tokenizer, settings, longest=max(len(rows[i]) for i in group), should_stop=should_stop)
        found = _generate_rows(model, tokenizer, [rows[i] for i in group], ending, streamer)
        answers |= dict(zip(group, found, strict=True))
    return [answers[i] for i in range(len(rows))]


def _texts_of(prompt: Any) -> Iterator[str]:
    """Yield the texts of a prompt or of messages, however deep they lie."""
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, Mapping | list | tuple):
        for part in prompt.values() if isinstance(prompt, Mapping) else prompt:
            yield from _texts_of(part)


def _check_length(row: Sequence[int], settings: GenerationSettings, context: int | None, *, which: str) -> None:
    if not row:
        raise InputError(f"The prompt{which} has no tokens.", fix="give some text")
    if context is not None and len(row) + settings.max_new_tokens > context:
        raise InputError(
            f"The prompt{which} is too long.",
            cause=f"{len(row)} tokens and {settings.max_new_tokens} new ones exceed the base model's context of"
            f" {context}",
            fix="shorten it, or lower --max-new-tokens",
        )


def _batches(rows: Sequence[Sequence[int]], *, may_pad: bool) -> Iterator[list[int]]:
    """Yield the indices of rows that are generated together, of about the same length."""
    group: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if group and (len(group) == MAX_ROWS or (not may_pad and len(rows[i]) != len(rows[group[0]]))):
            yield group
            group = []
        group.append(i)
    yield group


def _reads_earlier_tokens(model: PreTrainedModel) -> bool:
    """Return whether the model's generation_config makes scores depend on earlier tokens, where padding would count."""
    config: Any = model.generation_config
    return any(getattr(config, name, None) not in (None, 0, 1, 1.0) for name in _READ_EARLIER_TOKENS)


def _generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    ending: "_Ending",
    streamer: BaseStreamer | None,
) -> Answers:
    """Answer left-padded prompts."""
    settings, longest = ending.settings, ending.longest
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad or 0] * (longest - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    generator: Any = model
    sampler = [_Sampler(model, settings, rows=len(rows))] if settings.temperature > 0 else []
    with recording_routes(model) as routes, generator.reading_prompts(longest), _ended(streamer):
        output = generator.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=settings.max_new_tokens,
            logits_processor=LogitsProcessorList(sampler),
            stopping_criteria=StoppingCriteriaList([ending]),
            streamer=None if streamer is None else _Feed(streamer, ending),
            eos_token_id=ending.tokens or None,
            pad_token_id=pad,
            **ONE_GREEDY_TEXT,
        )
    gates = _gates_of(model, routes, len(rows), output.shape[1] - 1)
    names = routing_of(model).stack.names
    return [
        ending.answer(output[i, longest - len(row) :].tolist(), gates[i, longest - len(row) :], len(row), names)
        for i, row in enumerate(rows)
    ]


@contextmanager
def _ended(streamer: BaseStreamer | None) -> Iterator[None]:
    """End the stream after an exception too: who reads it in another thread would wait forever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


class _Ending(StoppingCriteria):
    """Decide where answers end, and make them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        *,
        longest: int,
        should_stop: Callable[[], bool] | None,
    ):
        self.tokenizer, self.settings, self.longest, self.should_stop = tokenizer, settings, longest, should_stop
        self.tokens = _end_tokens(model, tokenizer)
        config: Any = model.generation_config
        said = config.stop_strings or ()
        self.stops = (*settings.stops, *((said,) if isinstance(said, str) else said))
        self.followed, self.not_followed = said_by_base(model, settings)

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Any:
        """Return which rows are done."""
        if self.should_stop is not None and self.should_stop():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        done = [bool(self.stops) and self.stop_in(self.decode(row)) for row in input_ids[:, self.longest :].tolist()]
        return torch.tensor(done, device=input_ids.device)

    def decode(self, new: Sequence[int]) -> str:
        """Return the text of an answer's tokens, up to an end token."""
        return str(self.tokenizer.decode(self.before_end(new), skip_special_tokens=True))

    def before_end(self, new: Sequence[int]) -> list[int]:
        """Return the tokens before the first end token."""
        return list(itertools.takewhile(lambda token: token not in self.tokens, new))

    def cut(self, text: str) -> str | None:
        """Return the text before the first stop string; None if it has none."""
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(found)] if found else None

    def stop_in(self, text: str) -> bool:
        """Return whether a text has a stop string."""
        return self.cut(text) is not None

    def settled(self, text: str) -> str:
        """Return the beginning of an unfinished answer that no stop string can take back."""
        cut = self.cut(text)
        if cut is not None:
            return cut
        open_ends = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(open_ends, default=0)]

    def answer(
        self, ids: Sequence[int], gates: Float[Tensor, "tokens slots"], length: int, names: tuple[str, ...]
    ) -> Answer:
        """Make the answer of one row of prompt and new tokens; what came after its end is left out."""
        new, finish = self._ended_at(ids[length:])
        text = self.decode(new)
        cut = self.cut(text)
        ids, gates = [*ids[:length], *new], gates[: length + len(new) - 1]
        mean = gates[length - 1 :].mean(0).tolist()
        # the last token is never an input: it gets the gates of the position that predicted it
        gates = torch.cat([gates, gates[-1:]])
        pieces = [str(self.tokenizer.decode([token])) for token in ids]
        return Answer(
            text=text if cut is None else cut,
            finish=finish,
            prompt_tokens=length,
            new_tokens=len(new),
            slots=names,
            route=dict(zip(names, mean, strict=True)),
            tokens=tuple(zip(pieces, map(tuple, gates.tolist()), strict=True)),
            followed=self.followed,
            not_followed=self.not_followed,
        )

    def _ended_at(self, new: Sequence[int]) -> tuple[list[int], Finish]:
        kept = self.before_end(new)
        if self.stops and self.stop_in(self.decode(kept)):
            # the first token with which the text has a stop string
            ends = (n for n in range(1, len(kept) + 1) if self.stop_in(self.decode(kept[:n])))
            return kept[: next(ends, len(kept))], "stop"
        if len(kept) < len(new):
            return list(new[: len(kept) + 1]), "end"
        return kept, "length" if len(kept) == self.settings.max_new_tokens else "interrupted"


class _Feed(BaseStreamer):
    """Pass tokens on to a streamer, and hold back those that may become a stop string."""

    def __init__(self, streamer: BaseStreamer, ending: _Ending):
        self.streamer, self.ending = streamer, ending
        self.has_prompt = False
        self.new: list[int] = []
        self.passed = 0  # tokens

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""
        if not self.has_prompt or not self.ending.stops:
            self.has_prompt = True
            self.streamer.put(value)
            return
        self.new += value.reshape(-1).tolist()
        settled = self.ending.settled(self.ending.decode(self.new))
        for tokens in range(self.passed + 1, len(self.new) + 1):
            text = self._text(tokens)
            if not settled.startswith(text):
                break
            if not text.endswith(REPLACEMENT):  # whole characters only
                self._pass_on(self.new[self.passed : tokens])
                self.passed = tokens

    def end(self) -> None:
        """Pass on what was held back, without a stop string."""
        text = self.ending.decode(self.new)
        cut = self.ending.cut(text)
        if cut is None:
            self._pass_on(self.new[self.passed :])
        else:
            rest = cut.removeprefix(self._text(self.passed))
            self._pass_on(following_ids(rest, self.ending.tokenizer) if rest else [])
        self.streamer.end()

    def _text(self, tokens: int) -> str:
        return self.ending.decode(self.new[:tokens])

    def _pass_on(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.streamer.put(torch.tensor([token]))


class _Sampler(LogitsProcessor):
    """Draw each row's next token with a random generator of its own, and leave no other; greedy decoding takes it.

    transformers samples from torch's global generator, which all threads share.
    """

    def __init__(self, model: PreTrainedModel, settings: GenerationSettings, *, rows: int):
        self.generators = [torch.Generator(model.device).manual_seed(settings.seed) for _ in range(rows)]
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
        config: Any = model.generation_config
        if settings.top_k is not None:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        top_p = config.top_p if settings.top_p is None else settings.top_p
        if top_p is not None and top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
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
        rows = zip(shares, self.generators, strict=True)
        drawn = torch.stack([torch.multinomial(share, 1, generator=generator) for share, generator in rows])
        return torch.full_like(scores, -math.inf).scatter(1, drawn, 0.0)


def said_by_base(model: PreTrainedModel, settings: GenerationSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what of the model's generation_config shapes an answer, and what of it the settings replace."""
    config: Any = model.generation_config
    followed, replaced = {}, {}
    for name, value in config.to_diff_dict().items():
        if name in _NO_PART_OF_THE_TEXT or value in (None, False, 0, 1, [], {}, ""):  # the last ones change nothing
            continue
        is_sampled = settings.temperature > 0 and name in _SAMPLING and getattr(settings, name, None) is None
        if name == "stop_strings" or is_sampled or name not in ONE_GREEDY_TEXT:
            followed[name] = value
        elif value != getattr(settings, name, None):
            replaced[name] = value
    if config.do_sample and settings.temperature == 0:
        replaced = {"do_sample": True, **replaced}
    return followed, replaced


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: those of the tokenizer and of the model's generation_config."""
    config: Any = model.generation_config
    found: list[Any] = [config.eos_token_id, tokenizer.eos_token_id]
    return sorted({token for ids in found for token in (ids if isinstance(ids, list) else [ids])} - {None})


def _gates_of(
    model: PreTrainedModel, routes: Sequence[Route], rows: int, tokens: int
) -> Float[Tensor, "rows tokens slots"]:
    """Return the slot gates under which each token was read; a merged composition has the same for all."""
    merged = getattr(model, "merged", None)
    if isinstance(merged, Merged):
        return merged.slot_gate.expand(rows, tokens, -1)
    found = torch.zeros(rows, tokens, routes[0].slot_gate.shape[-1])
    for slot_gate, past in routes:  # a forward without a cache reads earlier tokens again
        found[:, past : past + slot_gate.shape[1]] = slot_gate
    return found
