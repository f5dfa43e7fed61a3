"""Scores equal those of a plain loop over single texts, for any batch size and padding."""

import math

import pytest
import torch

from lorary.domains.data.example import Example
from lorary.domains.errors import InputError
from lorary.domains.scoring.language import confidence_interval, score_language

TEXTS = [
    Example(completion="The dog ran."),
    Example(completion="The court finds that the party pays, and the bank raised the rate. " * 3),
    Example("The patient was given", "five milligrams twice a day", raw=True),
    Example(completion="é"),
    Example(messages=(("user", "What fell?"), ("assistant", "The price of the bond."))),
]


@pytest.fixture(scope="module")
def model(tiny_llama, tiny_tokenizer):
    return tiny_llama(vocab_size=len(tiny_tokenizer), initializer_range=0.2)


@pytest.fixture
def other_tokenizer(tiny_tokenizer):
    """A copy of the tokenizer that a test may change."""
    import copy

    return copy.deepcopy(tiny_tokenizer)


def nats_of(model, context, tokens):
    """Negative log-likelihood of each token, by one forward pass without batch or padding."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([context + tokens])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    return (-rows[range(len(tokens)), tokens]).tolist()


def plain(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_short_text_is_scored_as_in_a_plain_loop(model, tiny_tokenizer):
    score = score_language(model, tiny_tokenizer, TEXTS[:1])

    tokens = plain("The dog ran.", tiny_tokenizer)
    expected = sum(nats_of(model, [1], tokens))
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / 12, rel=1e-5)
    assert (score.bytes, score.tokens, score.texts) == (12, len(tokens), 1)


def test_each_window_of_a_long_text_begins_with_the_begin_token(model, tiny_tokenizer):
    score = score_language(model, tiny_tokenizer, TEXTS[1:2], block=17, batch=3)

    tokens = plain(TEXTS[1].completion, tiny_tokenizer)
    expected = sum(sum(nats_of(model, [1], tokens[i : i + 16])) for i in range(0, len(tokens), 16))
    assert len(tokens) > 32
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.tokens == len(tokens)


def test_only_the_completion_counts_after_a_prompt(model, tiny_tokenizer):
    score = score_language(model, tiny_tokenizer, TEXTS[2:3])

    prompt = [1, *plain("The patient was given", tiny_tokenizer)]
    tokens = plain(" five milligrams twice a day", tiny_tokenizer)
    assert score.nats == pytest.approx(sum(nats_of(model, prompt, tokens)), rel=1e-5)
    assert score.bytes == len("five milligrams twice a day")


def test_only_assistant_turns_count_in_a_conversation(model, tiny_tokenizer):
    score = score_language(model, tiny_tokenizer, TEXTS[4:])

    user = plain("What fell?", tiny_tokenizer)
    tokens = plain("The price of the bond.", tiny_tokenizer)
    assert score.nats == pytest.approx(sum(nats_of(model, [1, 4, *user, 2, 5], tokens)), rel=1e-5)


def test_batch_and_padding_do_not_change_scores(model, tiny_tokenizer):
    alone = [score_language(model, tiny_tokenizer, [text], block=33, batch=1) for text in TEXTS]

    for batch in (1, 2, 8):
        batched = score_language(model, tiny_tokenizer, TEXTS, block=33, batch=batch)
        assert batched.text_nats == pytest.approx([score.nats for score in alone], rel=1e-5)
        assert batched.text_bytes == tuple(score.bytes for score in alone)
        assert batched.nats == pytest.approx(sum(batched.text_nats), rel=1e-12)


@pytest.mark.parametrize(("bos", "context"), [("<|begin|>", [1]), (None, [2])])
def test_window_of_a_tokenizer_without_prefix_begins_with_begin_or_end_token(model, other_tokenizer, bos, context):
    from tokenizers import processors

    other_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    other_tokenizer.bos_token = bos

    score = score_language(model, other_tokenizer, TEXTS[:1])

    assert score.nats == pytest.approx(sum(nats_of(model, context, plain("The dog ran.", other_tokenizer))), rel=1e-5)


def test_byte_limit_keeps_the_first_texts_and_at_least_one(model, tiny_tokenizer):
    assert score_language(model, tiny_tokenizer, TEXTS, max_bytes=220).texts == 2
    assert score_language(model, tiny_tokenizer, TEXTS, max_bytes=1).texts == 1


def test_training_modes_are_restored(tiny_llama, tiny_tokenizer):
    model = tiny_llama(vocab_size=len(tiny_tokenizer), attention_dropout=0.5)
    expected = score_language(model, tiny_tokenizer, TEXTS).nats
    model.train()
    model.model.layers[0].eval()

    score = score_language(model, tiny_tokenizer, TEXTS)

    assert score.nats == expected
    assert model.training
    assert not model.model.layers[0].training


def test_progress_counts_windows(model, tiny_tokenizer):
    reported = []

    score_language(
        model, tiny_tokenizer, TEXTS, batch=2, on_progress=lambda done, total: reported.append((done, total))
    )

    assert reported == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("examples", [[], [Example()]])
def test_no_text_is_refused(model, tiny_tokenizer, examples):
    with pytest.raises(InputError, match="no held-out text"):
        score_language(model, tiny_tokenizer, examples)


def test_confidence_interval_contains_the_score_and_is_seeded(model, tiny_tokenizer):
    score = score_language(model, tiny_tokenizer, TEXTS)

    low, high = confidence_interval(score)

    assert low < score.bits_per_byte < high
    assert confidence_interval(score) == (low, high)
    assert confidence_interval(score, draws=10, seed=1) != confidence_interval(score, draws=10, seed=2)


def test_confidence_interval_of_one_text_is_the_score(model, tiny_tokenizer):
    score = score_language(model, tiny_tokenizer, TEXTS[:1])

    assert confidence_interval(score) == pytest.approx((score.bits_per_byte, score.bits_per_byte))


def test_windows_are_no_longer_than_the_positions_of_the_model(tiny_tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=len(tiny_tokenizer), bos_token_id=1
    )
    learned_positions = AutoModelForCausalLM.from_config(config).eval()

    found = score_language(learned_positions, tiny_tokenizer, TEXTS)

    assert found == score_language(learned_positions, tiny_tokenizer, TEXTS, block=32)
