"""Questions with choices, answered by likelihood: how often a model is right. questions.py says which rows are some."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.blocks import encode, end_ids
from ..data.example import Example
from ..errors import InputError
from ..statistics.intervals import wilson_interval
from .language import evaluation_mode, padded, reading_prompts, start_ids


@dataclass(frozen=True, kw_only=True)
class ChoiceScore:
    """How often a model prefers the right choice; higher is better."""

    accuracy: float  # correct / total
    correct: int
    total: int
    interval: tuple[float, float]  # Wilson, 95 %
    right: tuple[bool, ...]  # of each question, in the given order


@dataclass(frozen=True)
class _Asked:
    """One question as tokens."""

    number: int
    prompt: list[int]
    choices: list[list[int]]


def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    *,
    batch: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> ChoiceScore:
    """The share of questions whose right choice gets the highest score; examples without choices are passed over.

    The score of a choice is the sum of the log-probabilities of its tokens after the prompt (one space between the two
    unless the prompt ends in white space; no end token), divided by the UTF-8 bytes of the choice. The first of equal
    scores wins. Each prompt is read once: its choices continue from the key-value cache.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Questions.
        batch: Choices that are read at once, if a question has no more than that.
        on_progress: Told how many questions are done, of how many.

    Raises:
        InputError: No example has choices.
    """
    questions = [example for example in examples if example.choices]
    if not questions:
        raise InputError("There are no questions to score.", cause="no row has 'choices'")
    right = [False] * len(questions)
    done = 0
    for group in _groups([_asked(i, question, tokenizer) for i, question in enumerate(questions)], batch):
        with evaluation_mode(model), torch.inference_mode():
            found = _log_likelihoods(model, group)
        for asked, values in zip(group, found, strict=True):
            question = questions[asked.number]
            scores = [v / len(choice.encode()) for v, choice in zip(values, question.choices, strict=True)]
            right[asked.number] = question.choices[scores.index(max(scores))] == question.completion
        done += len(group)
        if on_progress:
            on_progress(done, len(questions))
    interval = wilson_interval(sum(right), len(right))
    return ChoiceScore(
        accuracy=sum(right) / len(right), correct=sum(right), total=len(right), interval=interval, right=tuple(right)
    )


def _asked(number: int, question: Example, tokenizer: PreTrainedTokenizerBase) -> _Asked:
    encoded = [encode(Example(question.prompt, choice), tokenizer) for choice in question.choices]
    ends = len(end_ids(tokenizer))
    begins = [is_target.index(True) for _, is_target in encoded]
    prompt = encoded[0][0][: begins[0]] or start_ids(tokenizer)
    if not prompt:
        raise InputError("A question without a prompt needs a tokenizer that has a begin or an end token.")
    choices = [ids[begin : len(ids) - ends] for (ids, _), begin in zip(encoded, begins, strict=True)]
    return _Asked(number, prompt, choices)


def _groups(asked: Sequence[_Asked], batch: int) -> Iterator[list[_Asked]]:
    """Questions whose prompts are equally long, so that nothing is padded before the choices; longest first."""
    by_length: dict[int, list[_Asked]] = defaultdict(list)
    for one in asked:
        by_length[len(one.prompt)].append(one)
    for _, group in sorted(by_length.items(), reverse=True):
        taken: list[_Asked] = []
        for one in group:
            if taken and sum(len(other.choices) for other in [*taken, one]) > batch:
                yield taken
                taken = []
            taken.append(one)
        yield taken


def _log_likelihoods(model: nn.Module, group: Sequence[_Asked]) -> list[list[float]]:
    """The log-probability of each choice of each question, the prompts all of one length."""
    device = next(model.parameters()).device
    prompts = torch.tensor([one.prompt for one in group], device=device)
    with reading_prompts(model, [prompts.shape[1]] * len(prompts)):
        read = model(input_ids=prompts, attention_mask=torch.ones_like(prompts), use_cache=True)
    owner = torch.tensor([i for i, one in enumerate(group) for _ in one.choices], device=device)
    rows = [choice for one in group for choice in one.choices]
    ids = padded(rows).to(device)
    counts = padded([[1] * len(row) for row in rows]).to(device)
    logits = read.logits[:, -1:][owner]
    if ids.shape[1] > 1:
        cache = read.past_key_values
        cache.batch_select_indices(owner)
        mask = torch.cat([torch.ones_like(prompts)[owner], counts[:, :-1]], dim=1)
        following = model(input_ids=ids[:, :-1], attention_mask=mask, past_key_values=cache, use_cache=True)
        logits = torch.cat([logits, following.logits], dim=1)
    values = _summed(logits, ids, counts).split([len(one.choices) for one in group])
    return [part.tolist() for part in values]


def _summed(logits: Float[Tensor, "rows length vocabulary"], ids: Tensor, counts: Tensor) -> Float[Tensor, " rows"]:
    """The log-probabilities of the tokens that count, in float32 and added up in float64."""
    picked = logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return (picked.double() * counts).sum(1).cpu()
