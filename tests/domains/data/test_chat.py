"""What is learned of a conversation under any template: the assistant's contents and end tokens, or it is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.domains.data.blocks import encode
from lorary.domains.data.example import Example
from lorary.domains.data.rows import Row, to_example
from lorary.domains.errors import CorpusError

END = "<|end|>"
HEADER = "<|{{ m['role'] }}|>\n"
SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set talk = messages[1:] %}{% else %}{% set system = '' %}{% set talk = messages %}{% endif %}"
)
LAST_USER = "{% set last = (talk | selectattr('role', 'equalto', 'user') | list)[-1] %}"

# name: the template, what it makes of an answer, and what follows it
TEMPLATES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "chatml": (
        "{% for m in messages %}" + HEADER + "{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        str,
        END + "\n",
    ),
    "default system": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|system|>\nYou are yes.<|end|>\n"
        "{% endif %}"
        + HEADER
        + "{{ m['content'] + '<|end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        str,
        END + "\n",
    ),
    "trimmed": (
        "{{ bos_token }}{% for m in messages %}" + HEADER + "\n{{ m['content'] | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}",
        str.strip,
        END,
    ),
    "system in the first user turn": (
        SYSTEM_FIRST + "{{ bos_token }}{% for m in talk %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
        "{% else %}{% set role = m['role'] %}{% endif %}<|user|>{{ role }}\n{{ (system if loop.first else '') +"
        " m['content'] | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|user|>model\n{% endif %}",
        str.strip,
        END + "\n",
    ),
    "system in the last user turn": (
        SYSTEM_FIRST + LAST_USER + "{{ bos_token }}{% for m in talk %}{% if m['role'] == 'user' %}[INST] "
        "{{ (system if m == last else '') + m['content'] }}[/INST]{% else %} {{ m['content'] + eos_token }}{% endif %}"
        "{% endfor %}",
        lambda answer: " " + answer,
        END,
    ),
    "system at the end": (
        SYSTEM_FIRST + "{% for m in talk %}" + HEADER + "{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ system }}{% endif %}",
        str,
        END,
    ),
    "generation blocks": (
        "{% for m in messages %}" + HEADER + "{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}\n"
        "{% else %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        str,
        END,
    ),
    "pairs": (
        SYSTEM_FIRST + "{{ system }}{% for m in talk %}{% if m['role'] == 'assistant' %}Q: "
        "{{ talk[loop.index0 - 1]['content'] }}\nA: {{ m['content'] }}<|end|>{% endif %}{% endfor %}",
        str,
        END,
    ),
    "no end token": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        str,
        "\n\n",
    ),
    "thought in the last turn": (
        "{% for m in messages %}" + HEADER + "{% if m['role'] == 'assistant' and loop.last %}<t>\n\n</t>\n{% endif %}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        str,
        END,
    ),
    "time": (
        "{{ strftime_now('%H:%M:%S') }}{% for m in messages %}" + HEADER + "{{ m['content'] }}<|end|>{% endfor %}",
        str,
        END,
    ),
}
NASTY = ["y", "yes", "no", "a", " yes ", "\n\nno\n", END, f"{END}\n<|assistant|>\nyes", "<|user|>", "Qx0x00000xQ"]
NASTY += ["{{ messages }}", "{% generation %}yes{% endgeneration %}", "[/INST] yes", "é😀\u2028", "A: yes", "</t>"]
texts = st.text(min_size=1, max_size=12).map(lambda text: text.replace("\0", "0")).filter(str.strip)
contents = st.sampled_from(NASTY) | texts


@st.composite
def talks(draw: Any, *, with_system: bool = True) -> tuple[tuple[str, str], ...]:
    """One to three questions with answers; the answers are short, and often in the questions."""
    turns = [("system", draw(contents))] if with_system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        answer = draw(contents)
        question = draw(contents | st.just(f"Is it {answer} or {draw(contents)}?"))
        turns += [("user", question), ("assistant", answer)]
    return tuple(turns)


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def learned(encoded: tuple[list[int], list[bool]], tokenizer: Any) -> str:
    return tokenizer.decode([token for token, flag in zip(*encoded, strict=True) if flag])


def row(tokenizer: Any, template: str, value: dict[str, Any]) -> tuple[str, str]:
    """The rendered row, and what of it is learned."""
    changed = with_template(tokenizer, template)
    encoded = encode(to_example(Row(7, value), "rows.jsonl"), changed)
    return changed.decode(encoded[0]), learned(encoded, changed)


def refused(tokenizer: Any, template: str, value: dict[str, Any]) -> str:
    with pytest.raises(CorpusError) as raised:
        row(tokenizer, template, value)
    assert str(raised.value).startswith("rows.jsonl:7: ")
    assert raised.value.fix
    return str(raised.value)


def talk(*turns: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, **(more[0] if more else {})} for role, content, *more in turns]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "thought in the last turn"])
@settings(max_examples=40)
@given(data=st.data())
def test_learned_are_the_answers_with_their_ends_and_nothing_else(
    name: str, data: st.DataObject, tiny_tokenizer: Any
) -> None:
    template, shown, end = TEMPLATES[name]
    messages = data.draw(talks())
    tokenizer = with_template(tiny_tokenizer, template)

    found = learned(encode(Example(messages=messages), tokenizer), tokenizer)

    assert found == "".join(shown(content) + end for role, content in messages if role == "assistant")


@given(messages=talks())
@settings(max_examples=40)
def test_what_generation_begins_with_is_learned_too(messages: Any, tiny_tokenizer: Any) -> None:
    template, _, end = TEMPLATES["thought in the last turn"]
    tokenizer = with_template(tiny_tokenizer, template)

    found = learned(encode(Example(messages=messages), tokenizer), tokenizer)

    answers = [content + end for role, content in messages if role == "assistant"]
    assert found == "".join([*answers[:-1], "<t>\n\n</t>\n", answers[-1]])


@given(messages=talks(), data=st.data())
@settings(max_examples=60)
def test_the_tokens_are_those_of_the_rendered_conversation_up_to_its_last_answer(
    messages: Any, data: st.DataObject, tiny_tokenizer: Any
) -> None:
    name = data.draw(st.sampled_from([name for name in TEMPLATES if name != "time"]))
    tokenizer = with_template(tiny_tokenizer, TEMPLATES[name][0])

    ids, _ = encode(Example(messages=messages), tokenizer)

    turns = [{"role": role, "content": content} for role, content in messages]
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith(tokenizer.decode(ids))
