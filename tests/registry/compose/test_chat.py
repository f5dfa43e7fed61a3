"""A conversation: each question is answered with all that was said before, and nothing is lost."""

import copy
from typing import Any

import pytest
from transformers import TextStreamer

from lorary.domains.data.prompt import prompt_ids
from lorary.domains.errors import InputError
from lorary.registry import Registry
from lorary.registry.compose.chat import Conversation
from lorary.registry.compose.generate import Answer, GenerationSettings

TEMPLATES = {
    "ChatML": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "Llama 3": "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}",
    "Gemma": "{{ bos_token }}{% for m in messages %}<|user|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|user|>model\n{% endif %}",
    "Mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] + eos_token }}{% endif %}{% endfor %}",
}
SHORT = GenerationSettings(max_new_tokens=3, temperature=0.7, seed=2)


@pytest.fixture(scope="module")
def model(whole: Registry) -> Any:
    return whole.compose("cooking+sailing")


def text_of(answer: Answer) -> str:
    return "".join(piece for piece, _ in answer.tokens[: answer.prompt_tokens])


def shown(text: str, tokenizer: Any) -> str:
    """The text of each token, as answers have it."""
    return "".join(tokenizer.decode([token]) for token in tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_prompt_is_the_whole_conversation(whole: Registry, model: Any, name: str) -> None:
    tokenizer: Any = copy.copy(whole.tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    conversation, said = Conversation(model, tokenizer, SHORT), []

    for question in ("butter?", "mast and keel?", "//?"):
        said.append({"role": "user", "content": question})
        answer = conversation.ask(question)
        rendered = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert text_of(answer) == shown(rendered, tokenizer)
        said.append({"role": "assistant", "content": answer.text})

    assert conversation.messages == said


def test_a_raw_conversation_is_one_text(whole: Registry, model: Any) -> None:
    tokenizer = copy.copy(whole.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="cannot chat") as caught:
        Conversation(model, tokenizer, SHORT)
    assert "--raw" in str(caught.value.fix)
    conversation = Conversation(model, tokenizer, SHORT, raw=True)

    first = conversation.ask("butter")
    second = conversation.ask("keel")

    assert text_of(second) == shown("<|begin|>butter\n" + first.text + "\nkeel", tokenizer)


def test_another_composition_goes_on_with_what_was_said(whole: Registry, model: Any) -> None:
    conversation = Conversation(model, whole.tokenizer, SHORT)
    conversation.ask("butter?")
    conversation.model = whole.compose("sailing")

    answer = conversation.ask("keel?")

    assert answer.slots == ("general", "sailing")
    assert text_of(answer).startswith("<|begin|><|user|>butter?<|end|>")
    conversation.reset()
    assert text_of(conversation.ask("keel?")) == "<|begin|><|user|>keel?<|end|><|assistant|>"


def test_a_conversation_beyond_the_context_is_refused_and_stays_as_it_was(whole: Registry, model: Any) -> None:
    conversation = Conversation(model, whole.tokenizer, SHORT)
    conversation.ask("butter?")
    before = conversation.messages

    with pytest.raises(InputError, match="longer than the base model's context") as caught:
        conversation.ask("mast " * 300)

    assert "/reset" in str(caught.value.fix)
    assert "512" in str(caught.value.cause)
    assert conversation.messages == before
    assert conversation.ask("keel?").new_tokens


def test_an_answer_ends_where_the_context_does_and_that_can_be_told(whole: Registry, model: Any) -> None:
    conversation = Conversation(model, whole.tokenizer, GenerationSettings(max_new_tokens=100, temperature=0.7, seed=2))
    question = "a " * 200
    while len(prompt_ids(question, whole.tokenizer)) < 508:
        question += "a"

    answer = conversation.ask(question)

    assert answer.prompt_tokens + answer.new_tokens <= 512
    assert conversation.is_full(answer) == (answer.prompt_tokens + answer.new_tokens == 512)
    assert not conversation.is_full(Conversation(model, whole.tokenizer, SHORT).ask("keel"))


def test_an_empty_answer_is_no_turn(whole: Registry) -> None:
    model: Any = whole.compose("cooking")
    model.generation_config.eos_token_id = list(range(300))
    conversation = Conversation(model, whole.tokenizer, SHORT)

    answer = conversation.ask("butter?")

    assert answer.empty_because == f"the first token was the end token {answer.tokens[-1][0]}"
    assert conversation.messages == []


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_got(whole: Registry, model: Any) -> None:
    conversation = Conversation(model, whole.tokenizer, GenerationSettings(max_new_tokens=20, temperature=0.7, seed=2))
    tokens: list[int] = []

    class Counting(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            tokens.append(len(text))

    answer = conversation.ask(
        "butter?", streamer=Counting(whole.tokenizer, skip_prompt=True), should_stop=lambda: len(tokens) >= 2
    )

    assert answer.finish == "interrupted"
    assert 1 <= answer.new_tokens < 20
    assert conversation.messages[-1]["content"] == answer.text
