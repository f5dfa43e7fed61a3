"""Accuracy on multiple-choice questions, answered by likelihood. Questions are selected in questions.py."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.blocks import encode
from ..data.chat import text_before_answer
from ..data.example import Example
from ..data.frame import end_ids, following_ids, text_ids
from ..data.prompt import AS_TEXT, as_conversation, is_chat
from ..errors import InputError
from ..statistics.intervals import wilson_interval
from .language import evaluation_mode, pad_rows, reading_prompts, start_ids


@dataclass(frozen=True, kw_only=True)
class ChoiceScore:
    """Accuracy on questions; higher is better."""

    accuracy: float  # correct / total
    correct: int
    total: int
    interval: tuple[float, float]  # Wilson, 95 %
    right: tuple[bool, ...]  # per question, in the given order


@dataclass(frozen=True)
class _EncodedQuestion:
    """Question as tokens."""

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
    """Compute the share of questions whose right choice gets the highest score; examples without choices are skipped.

    The score of a choice is the sum of the log-probabilities of its tokens after the prompt (separated by one space,
    unless the prompt ends in white space; without end token), divided by the UTF-8 bytes of the choice. If the
    tokenizer has a chat template and the question is not `raw`, the prompt is a user's turn and the choice the
    assistant's, without what ends it. Of equal scores the first is chosen. Each prompt is computed once; its choices
    continue from the key-value cache.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Questions.
        batch: Maximum number of choices per forward pass; a question with more has a pass of its own.
        on_progress: Called with the number of finished questions and their total.

    Raises:
        InputError: No example has choices.
    """
    questions = [example for example in examples if example.choices]
    if not questions:
        raise InputError("There are no questions to score.", cause="no row has 'choices'")
    right = [False] * len(questions)
    done = 0
    for group in _batches([_encode_question(i, q, tokenizer) for i, q in enumerate(questions)], batch):
        with evaluation_mode(model), torch.inference_mode():
            found = _log_likelihoods(model, group)
        for encoded, values in zip(group, found, strict=True):
            question = questions[encoded.number]
            scores = [v / len(choice.encode()) for v, choice in zip(values, question.choices, strict=True)]
            right[encoded.number] = question.choices[scores.index(max(scores))] == question.completion
        done += len(group)
        if on_progress:
            on_progress(done, len(questions))
    interval = wilson_interval(sum(right), len(right))
    return ChoiceScore(
        accuracy=sum(right) / len(right), correct=sum(right), total=len(right), interval=interval, right=tuple(right)
    )


def _encode_question(number: int, question: Example, tokenizer: PreTrainedTokenizerBase) -> _EncodedQuestion:
    if is_chat(question.prompt, tokenizer, raw=question.raw):
        return _encode_turns(number, question, tokenizer)
    encoded = [encode(Example(question.prompt, choice, raw=True), tokenizer) for choice in question.choices]
    ends = len(end_ids(tokenizer))
    begins = [is_target.index(True) for _, is_target in encoded]
    prompt = encoded[0][0][: begins[0]] or start_ids(tokenizer)
    if not prompt:
        raise InputError("A question without a prompt needs a tokenizer with a begin or end token.")
    choices = [ids[begin : len(ids) - ends] for (ids, _), begin in zip(encoded, begins, strict=True)]
    return _EncodedQuestion(number, prompt, choices)


def _encode_turns(number: int, question: Example, tokenizer: PreTrainedTokenizerBase) -> _EncodedQuestion:
    before = text_before_answer(as_conversation(question), tokenizer, fix=AS_TEXT)
    # a space before an answer is part of its first token
    prompt = before.rstrip(" ")
    space = before[len(prompt) :]
    choices = [following_ids(space + choice, tokenizer) for choice in question.choices]
    return _EncodedQuestion(number, text_ids(prompt, tokenizer), choices)


def _batches(questions: Sequence[_EncodedQuestion], batch: int) -> Iterator[list[_EncodedQuestion]]:
    """Yield questions with prompts of equal length, so that prompts need no padding; longest first."""
    by_length: dict[int, list[_EncodedQuestion]] = defaultdict(list)
    for question in questions:
        by_length[len(question.prompt)].append(question)
    for _, group in sorted(by_length.items(), reverse=True):
        rows: list[_EncodedQuestion] = []
        for question in group:
            if rows and sum(len(other.choices) for other in [*rows, question]) > batch:
                yield rows
                rows = []
            rows.append(question)
        yield rows


def _log_likelihoods(model: nn.Module, group: Sequence[_EncodedQuestion]) -> list[list[float]]:
    """Return the log-probability of each choice of each question; all prompts have the same length."""
    device = next(model.parameters()).device
    prompts = torch.tensor([one.prompt for one in group], device=device)
    with reading_prompts(model, [prompts.shape[1]] * len(prompts)):
        read = model(input_ids=prompts, attention_mask=torch.ones_like(prompts), use_cache=True)
    owner = torch.tensor([i for i, one in enumerate(group) for _ in one.choices], device=device)
    rows = [choice for one in group for choice in one.choices]
    ids = pad_rows(rows).to(device)
    counts = pad_rows([[1] * len(row) for row in rows]).to(device)
    logits = read.logits[:, -1:][owner]
    if ids.shape[1] > 1:
        cache = read.past_key_values
        cache.batch_select_indices(owner)
        mask = torch.cat([torch.ones_like(prompts)[owner], counts[:, :-1]], dim=1)
        following = model(input_ids=ids[:, :-1], attention_mask=mask, past_key_values=cache, use_cache=True)
        logits = torch.cat([logits, following.logits], dim=1)
    values = _sum_log_probabilities(logits, ids, counts).split([len(one.choices) for one in group])
    return [part.tolist() for part in values]


def _sum_log_probabilities(
    logits: Float[Tensor, "rows length vocabulary"], ids: Tensor, counts: Tensor
) -> Float[Tensor, " rows"]:
    """Sum the log-probabilities of the counted tokens, computed in float32, in float64."""
    picked = logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return (picked.double() * counts).sum(1).cpu()
