"""A prompt is a user's turn of the base's chat template, once, unless it is raw: in rows, questions and generation."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.domains.data.blocks import encode
from lorary.domains.data.example import Example
from lorary.domains.data.prompt import is_chat, prompt_ids
from lorary.domains.data.rows import Row, to_example
from lorary.domains.errors import CorpusError, InputError

# the templates that many published models have, and their special tokens
PUBLISHED = {
    "ChatML": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "Llama 3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role']"
        " + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "Gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "Mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant!') }}"
        "{% endif %}{% endfor %}",
        (),
    ),
    "pocket": (
        "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        (),
    ),
}
END_OF_ANSWER = {"ChatML": "<|im_end|>\n", "Llama 3": "<|eot_id|>", "Gemma": "<end_of_turn>\n"}
texts = st.text(min_size=1, max_size=20).map(lambda text: text.replace("\0", "0").strip()).filter(bool)
# what begins like nothing that a template writes
prompts = texts.filter(lambda text: text[0].isalnum())


@pytest.fixture(scope="module")
def published(tiny_tokenizer: Any) -> dict[str, Any]:
    """A tokenizer with each of the templates."""
    found = {}
    for name, (template, special) in PUBLISHED.items():
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        found[name] = tokenizer
    return found


def ids_of(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(tokenizer: Any, *messages: dict[str, str]) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("name", PUBLISHED)
@given(prompt=prompts, completion=texts)
@settings(max_examples=25)
def test_a_prompt_with_a_completion_is_the_conversation_of_the_two(
    name: str, prompt: str, completion: str, published: Any
) -> None:
    tokenizer = published[name]

    ids, is_target = encode(Example(prompt, completion), tokenizer)

    assert (ids, is_target) == encode(Example(messages=(("user", prompt), ("assistant", completion))), tokenizer)
    learned = tokenizer.decode([token for token, flag in zip(ids, is_target, strict=True) if flag])
    assert learned.strip(" ") == completion + END_OF_ANSWER.get(name, "<|end|>")
    assert ids[: is_target.index(True)] == prompt_ids(prompt, tokenizer)


@pytest.mark.parametrize("name", PUBLISHED)
@given(prompt=prompts)
@settings(max_examples=25)
def test_a_prompt_is_rendered_once(name: str, prompt: str, published: Any) -> None:
    tokenizer = published[name]
    text = rendered(tokenizer, user(prompt))

    found = prompt_ids(prompt, tokenizer)

    assert found == ids_of(text, tokenizer)
    assert prompt_ids(text, tokenizer) == found
    assert prompt_ids([user(prompt)], tokenizer) == found
    # a template that writes a begin token: without it the text is still rendered
    assert prompt_ids(text.removeprefix("<|begin|>"), tokenizer) in (found, [1, *found])


@pytest.mark.parametrize("name", PUBLISHED)
@given(prompt=prompts, completion=texts)
@settings(max_examples=10)
def test_a_raw_prompt_is_the_text_as_it_is(name: str, prompt: str, completion: str, published: Any) -> None:
    tokenizer = published[name]
    without = copy.copy(tokenizer)
    without.chat_template = None

    assert prompt_ids(prompt, tokenizer, raw=True) == tokenizer(prompt)["input_ids"] == prompt_ids(prompt, without)
    raw = encode(Example(prompt, completion, raw=True), tokenizer)
    assert raw == encode(Example(prompt, completion), without)
    assert raw[0][: raw[1].index(True)] == prompt_ids(prompt, tokenizer, raw=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rendered_rows_are_not_rendered_twice(name: str, published: Any) -> None:
    tokenizer = published[name]
    text = rendered(tokenizer, user("What ran?"))

    ids, is_target = encode(Example(text, "The dog"), tokenizer)

    assert not is_chat(text, tokenizer)
    assert ids[: is_target.index(True)] == ids_of(text, tokenizer)
    assert ids.count(1) <= 1


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("text", ["The dog ran.", "(a) The dog", "\n", "[a] list", "<b>bold</b>", "| a | table |"])
def test_a_text_row_stays_a_text(name: str, text: str, published: Any) -> None:
    without = copy.copy(published[name])
    without.chat_template = None

    assert encode(Example(completion=text), published[name]) == encode(Example(completion=text), without)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("text", ["(a) The dog", "[a] list", "<b>bold</b>", "| a | table |", "/route", "- so"])
def test_a_prompt_that_begins_with_a_sign_is_a_prompt_of_a_user(name: str, text: str, published: Any) -> None:
    assert is_chat(text, published[name])
    assert text in published[name].decode(prompt_ids(text, published[name]))


def test_white_space_between_prompt_and_completion_is_no_part_of_the_question(published: Any) -> None:
    for space in (" ", "\n\n"):
        assert encode(Example("Sum up." + space, "So."), published["ChatML"]) == encode(
            Example("Sum up.", "So."), published["ChatML"]
        )


def test_a_conversation_is_answered_at_its_end(published: Any) -> None:
    talk = [user("What ran?"), {"role": "assistant", "content": "The dog."}, user("When?")]

    for tokenizer in published.values():
        assert prompt_ids(talk, tokenizer) == ids_of(rendered(tokenizer, *talk), tokenizer)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "list of messages that is not empty"),
        (["What ran?"], "messages\\[0\\] is a string"),
        ([{"role": "user"}], "expected 'role' and 'content'"),
        ([{"role": "wizard", "content": "?"}], "unknown role"),
        ([user(" ")], "empty"),
        ([user("?"), {"role": "assistant", "content": "So."}], "nothing to answer"),
        ([user("?") | {"mood": "glad"}], "ignores messages\\[0\\].mood"),
        ([{"role": "system", "content": "Be brief."}, user("?")], "cannot render"),
    ],
)
def test_messages_that_cannot_be_answered_as_they_are_are_refused(messages: Any, problem: str, published: Any) -> None:
    with pytest.raises(InputError, match=problem) as raised:
        prompt_ids(messages, published["Gemma"])
    assert raised.value.fix


def test_messages_need_a_template(published: Any) -> None:
    tokenizer = copy.copy(published["ChatML"])
    with pytest.raises(InputError, match="without a chat template"):
        prompt_ids([user("?")], tokenizer, raw=True)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        prompt_ids([user("?")], tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m['content'][:2] }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_loses_the_prompt_is_refused_with_the_way_out(template: str, tiny_tokenizer: Any) -> None:
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = template

    with pytest.raises(InputError) as raised:
        prompt_ids("What ran?", tokenizer)
    assert "--raw" in str(raised.value.fix)
    with pytest.raises(CorpusError, match=r"^rows.jsonl:7: ") as refused:
        encode(to_example(Row(7, {"prompt": "What ran?", "completion": "The dog"}), "rows.jsonl"), tokenizer)
    assert "--raw" in str(refused.value.fix)
    assert prompt_ids("What ran?", tokenizer, raw=True) == tokenizer("What ran?")["input_ids"]
