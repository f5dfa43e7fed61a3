"""Choices are scored as in a plain loop without cache and batches."""

import copy
from dataclasses import replace

import pytest
import torch

from lorary.domains.data.example import Example
from lorary.domains.errors import InputError
from lorary.domains.scoring.choices import score_choices
from lorary.domains.scoring.questions import find_labels, find_questions
from lorary.domains.statistics.intervals import wilson_interval

QUESTIONS = [
    Example(
        "Question: What fell?\nAnswer:",
        "The price",
        ("The dog", "The price", "A long river in the chest", "é"),
        raw=True,
    ),
    Example("The dog ran after", "the ball", ("the ball", "a patient", "contracts"), raw=True),
    Example("1 + 1 = ", "2", ("1", "2"), raw=True),
]
INTENTS = [Example(f"User: {text}\nIntent:", label) for label in ("pay bill", "freeze account") for text in "abcde"]


@pytest.fixture(scope="module")
def model(tiny_llama, tiny_tokenizer):
    return tiny_llama(vocab_size=len(tiny_tokenizer), initializer_range=0.2)


def nats_of(model, context, tokens):
    """Negative log-likelihood of each token, by one forward pass without batch, padding or cache."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([context + tokens])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    return (-rows[range(len(tokens)), tokens]).tolist()


def plain(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def preferred(model, tokenizer, question):
    space = "" if question.prompt.endswith(" ") else " "
    context = [1, *plain(question.prompt, tokenizer)]

    def per_byte(choice):
        return -sum(nats_of(model, context, plain(space + choice, tokenizer))) / len(choice.encode())

    return max(question.choices, key=per_byte)


@pytest.mark.parametrize("lead", ["", " ", "<t></t>\n", "A: "])
def test_a_question_is_a_turn_of_the_template_and_its_choice_the_answer(model, tiny_tokenizer, lead):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' %}{{ LEAD }}{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ).replace("LEAD", repr(lead))
    before, space = lead.rstrip(" "), " " * lead.count(" ")
    winners = []
    for question in QUESTIONS:
        context = plain(f"<|begin|><|user|>{question.prompt.rstrip()}<|end|><|assistant|>{before}", tokenizer)
        scores = {
            choice: -sum(nats_of(model, context, plain(space + choice, tokenizer))) / len(choice.encode())
            for choice in question.choices
        }
        winners.append(max(scores, key=scores.__getitem__))

    asked = [
        replace(question, raw=False, completion=winner) for question, winner in zip(QUESTIONS, winners, strict=True)
    ]

    assert score_choices(model, tokenizer, asked).right == (True, True, True)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_choices_are_scored_as_in_a_plain_loop(model, tiny_tokenizer, batch):
    winners = [preferred(model, tiny_tokenizer, question) for question in QUESTIONS]
    answered = [
        Example(question.prompt, winner, question.choices, raw=True)
        for question, winner in zip(QUESTIONS, winners, strict=True)
    ]

    assert score_choices(model, tiny_tokenizer, answered, batch=batch).correct == 3
    score = score_choices(model, tiny_tokenizer, QUESTIONS, batch=batch)
    assert score.correct == sum(q.completion == winner for q, winner in zip(QUESTIONS, winners, strict=True))
    assert score.accuracy == score.correct / 3
    assert score.interval == wilson_interval(score.correct, 3)
    assert list(score.right) == [q.completion == winner for q, winner in zip(QUESTIONS, winners, strict=True)]


def test_examples_without_choices_are_skipped(model, tiny_tokenizer):
    assert score_choices(model, tiny_tokenizer, [Example(completion="The dog ran."), *QUESTIONS]).total == 3
    with pytest.raises(InputError, match="no questions"):
        score_choices(model, tiny_tokenizer, [Example("1 + 1 = ", "2")])


def test_each_prompt_is_computed_once(model, tiny_tokenizer):
    read = []
    handle = model.register_forward_pre_hook(
        lambda _model, _args, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )

    score_choices(model, tiny_tokenizer, find_questions(INTENTS, find_labels(INTENTS)))

    handle.remove()
    assert sum(rows for rows, _ in read[::2]) == 10
    assert sum(rows for rows, _ in read[1::2]) == 20
