"""Tokens of chat templates carry no evidence: found in any template, on any day, and nothing else is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.statistics.token_roles import (
    LINE,
    NEUTRAL,
    OPENS,
    SENTENCE,
    TokenRoles,
    ends_of_sentences,
    template_tokens,
    token_roles,
)

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant named Small, trained by Somebody<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set talk = messages[1:] %}{% else %}{% set system = '' %}{% set talk = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
    "{% for m in talk %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('Only user and assistant roles are supported') }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# name: the template, and its markers
TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "llama": (LLAMA, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"]),
}
QUESTION = "the court pays for the pain of the patient, and the dog fell"
ANSWER = "the bank raised the price on the same day"


@pytest.fixture(scope="module")
def tokenizers() -> Callable[[str], Any]:
    """`tokenizers(name)`: one that was trained with the markers of a template, on texts and on what templates say."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(name: str) -> Any:
        template, markers = TEMPLATES[name]
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        special = ["<pad>", "<s>", "</s>", *markers]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        texts = [QUESTION, ANSWER, "user\nassistant\nsystem\nmodel\n", "You are a helpful AI assistant named Small"]
        texts += [
            "好。是？不！好",
            "Cutting Knowledge Date: December 2023 Today Date: 01 Jan 2024",
            "trained by Somebody",
        ]
        model.train_from_iterator(texts * 3, trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template,
            clean_up_tokenization_spaces=False,
        )  # fmt: skip

    return make


def rendered(tokenizer: Any, *turns: tuple[str, str], prompt: bool = True) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_of_a_conversation_nothing_but_its_contents_carries_evidence(name: str, tokenizers: Any) -> None:
    tokenizer = tokenizers(name)
    neutral = token_roles(tokenizer, len(tokenizer)).neutral
    talk = [("user", QUESTION), ("assistant", ANSWER), ("user", QUESTION)]

    kept = [token for token in rendered(tokenizer, *talk) if not neutral[token]]

    contents = [token for _, text in talk for token in plain(tokenizer, text)]
    assert kept == [token for token in contents if not neutral[token]]
    assert len(kept) > 0.7 * len(contents)


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_are_neutral_and_words_are_not(name: str, tokenizers: Any) -> None:
    tokenizer = tokenizers(name)

    roles = token_roles(tokenizer, len(tokenizer) + 9)

    assert roles.neutral[tokenizer.all_special_ids].all()
    assert roles.neutral[plain(tokenizer, "".join(TEMPLATES[name][1]))].all()
    assert not roles.neutral[plain(tokenizer, " court patient")].all()
    assert not roles.flags[len(tokenizer) :].any()  # a vocabulary may be larger than the tokenizer's


def test_without_a_template_only_special_tokens_are_neutral(tokenizers: Any) -> None:
    tokenizer = tokenizers("chatml")
    tokenizer.chat_template = None

    assert template_tokens(tokenizer) == ()
    neutral = token_roles(tokenizer, len(tokenizer)).neutral.nonzero().flatten().tolist()
    assert neutral == sorted(tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", *TEMPLATES["chatml"][1]]))


def test_known_template_tokens_are_taken_as_they_are(tokenizers: Any) -> None:
    tokenizer = tokenizers("gemma")
    found = template_tokens(tokenizer)

    given_them = token_roles(tokenizer, len(tokenizer), found)
    given_one = token_roles(tokenizer, len(tokenizer), [300])

    assert torch.equal(given_them.flags, token_roles(tokenizer, len(tokenizer)).flags)
    assert given_one.neutral[300]
    assert given_one.neutral.sum() < given_them.neutral.sum()
    assert found == tuple(sorted(set(found)))


@pytest.mark.parametrize("date", ["2024-05-17", "2031-12-31", "2026-02-28"])
def test_the_tokens_do_not_depend_on_the_day(date: str, tokenizers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import datetime

    import transformers.utils.chat_template_utils as chat

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromisoformat(date).replace(tzinfo=tz)

    tokenizer = tokenizers("llama")
    expected = template_tokens(tokenizer)
    monkeypatch.setattr(chat, "datetime", Clock)
    other = copy.deepcopy(tokenizer)
    chat._compile_jinja_template.cache_clear()

    assert date[:4] in str(other.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    assert template_tokens(other) == expected
    chat._compile_jinja_template.cache_clear()


def test_dates_that_a_template_may_write_are_neutral(tokenizers: Any) -> None:
    tokenizer = tokenizers("llama")
    neutral = token_roles(tokenizer, len(tokenizer)).neutral

    for date in ("17 May 2024", "31 Dec 2033", "08 Sep 2026"):
        assert neutral[plain(tokenizer, f" {date}\n\n")].all(), date


# --- ends of sentences ---


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("Stop. Go on", [4]),
        ("Stop! Go? On", [4, 8]),
        ("It is 3.5 or 1.000 here", []),
        ("version 2.13 of a.b.c", []),
        ("one\ntwo\n\nthree", [3, 7, 8]),
        ("The end.", []),
        ("Stop.", []),
        ("Is it 3.5? It is 4.", [9]),
    ],
)
def test_ends_of_sentences_are_found_and_numbers_are_none(text: str, ends: list[int], tiny_tokenizer: Any) -> None:
    encoded = tiny_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    flags = token_roles(tiny_tokenizer, len(tiny_tokenizer)).flags[encoded["input_ids"]]

    found = ends_of_sentences(flags[None])[0].tolist()

    places = [start for (start, _), is_end in zip(encoded["offset_mapping"], found, strict=True) if is_end]
    assert places == ends


def test_sentences_of_a_script_without_spaces_end_too(tokenizers: Any) -> None:
    tokenizer = tokenizers("chatml")
    ids = plain(tokenizer, "好。是？不！好")

    flags = token_roles(tokenizer, len(tokenizer)).flags[ids]

    ends = ends_of_sentences(flags[None])[0].nonzero().flatten().tolist()
    assert tokenizer.convert_ids_to_tokens([ids[i] for i in ends]) == ["ãĢĤ", "ï¼Ł", "ï¼ģ"]  # their bytes


@given(st.lists(st.integers(0, 15), min_size=1, max_size=20))
def test_a_sentence_ends_where_white_space_follows_and_a_line_anyhow(flags: list[int]) -> None:
    found = ends_of_sentences(torch.tensor([flags], dtype=torch.uint8))[0].tolist()

    follows = [bool(flag & OPENS) for flag in flags[1:]] + [False]
    expected = [bool(flag & LINE or (flag & SENTENCE and space)) for flag, space in zip(flags, follows, strict=True)]
    assert found == expected


def test_roles_are_bits_of_their_own() -> None:
    roles = TokenRoles(torch.arange(16, dtype=torch.uint8))

    assert [NEUTRAL, SENTENCE, LINE, OPENS] == [1, 2, 4, 8]
    assert roles.neutral.tolist() == [bool(flag & 1) for flag in range(16)]
