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
from lorary.domains.errors import CorpusError, InputError

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
    "contents in parts": (
        "{% for m in messages %}" + HEADER + "{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% endif %}",
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


@pytest.mark.own_failure(
    "a one-letter answer that stands in the question",
    before="found there: a part of the question was learned, the rest of the row cut",
    now="placed by markers, or refused by file and line",
)
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

    turns: list[Any] = [{"role": role, "content": content} for role, content in messages]
    if name == "contents in parts":
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith(tokenizer.decode(ids))


# --- fields of messages and rows: used, or refused by name ---

TOOLS = [{"type": "function", "function": {"name": "find_dose", "parameters": {}}}]
CALL = [{"id": "c1", "type": "function", "function": {"name": "find_dose", "arguments": {"drug": "x", "unit": "mg"}}}]
CHATML = TEMPLATES["chatml"][0]
HERMES = (
    "{% if tools %}<|system|>\nTools: {{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}" + HEADER + "{% if"
    " m['reasoning_content'] %}<t>{{ m['reasoning_content'] }}</t>{% endif %}{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}<call>{\"name\": \"{{ c['function']['name'] }}\", "
    '"arguments": ARGUMENTS}</call>{% endfor %}<|end|>{% endfor %}'
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
AS_OBJECTS = HERMES.replace("ARGUMENTS", "{{ c['function']['arguments'] | tojson }}")
AS_TEXTS = HERMES.replace("ARGUMENTS", "{{ c['function']['arguments'] }}")
ONE_BY_ONE = HERMES.replace(
    "ARGUMENTS", "{% for k, v in c['function']['arguments'].items() %}{{ k }}={{ v }};{% endfor %}"
)
CALLED = 'Look.<call>{"name": "find_dose", "arguments": {"drug": "x", "unit": "mg"}}</call>'
ASKED = [("user", "Which dose?"), ("assistant", "Five mg.")]


@pytest.mark.parametrize(
    "arguments", [{"drug": "x", "unit": "mg"}, '{"drug": "x", "unit": "mg"}'], ids=["object", "text"]
)
@pytest.mark.parametrize(
    ("template", "called"),
    [
        (AS_OBJECTS, CALLED),
        (AS_TEXTS, CALLED),
        (ONE_BY_ONE, CALLED.replace('{"drug": "x", "unit": "mg"}', "drug=x;unit=mg;")),
    ],
    ids=["objects", "texts", "one by one"],
)
def test_calls_of_tools_are_learned_and_their_results_are_not(
    template: str, called: str, arguments: Any, tiny_tokenizer: Any
) -> None:
    call = [{**CALL[0], "function": {"name": "find_dose", "arguments": arguments}}]
    value = {
        "tools": TOOLS,
        "messages": talk(
            ("user", "Which dose of find_dose?"),
            ("assistant", "Look.", {"tool_calls": call}),
            ("tool", "5", {"tool_call_id": "c1", "name": "find_dose"}),
            ("assistant", "5"),
        ),
    }

    rendered, found = row(tiny_tokenizer, template, value)

    assert found == called + END + "5" + END
    assert "Tools: [" in rendered
    value["messages"][1]["content"] = None
    assert row(tiny_tokenizer, template, value)[1] == called.removeprefix("Look.") + END + "5" + END


def test_results_in_another_order_than_the_calls_need_a_template_with_ids(tiny_tokenizer: Any) -> None:
    calls = [{**CALL[0], "id": name} for name in ("a", "b")]
    results = [("tool", "2", {"tool_call_id": "b"}), ("tool", "1", {"tool_call_id": "a"})]
    value = {"messages": talk(("user", "?"), ("assistant", "", {"tool_calls": calls}), *results)}

    assert "messages[2].tool_call_id" in refused(tiny_tokenizer, AS_OBJECTS, value)
    value["messages"][2:] = value["messages"][:1:-1]
    assert row(tiny_tokenizer, AS_OBJECTS, value)[1].count("find_dose") == 2


def test_reasoning_is_learned_where_the_template_shows_it(tiny_tokenizer: Any) -> None:
    value = {"messages": talk(("user", "?"), ("assistant", "Five mg.", {"reasoning_content": "As written."}))}

    assert row(tiny_tokenizer, AS_OBJECTS, value)[1] == "<t>As written.</t>Five mg." + END


@pytest.mark.own_failure(
    "fields of a message that the chat template ignores",
    before="dropped",
    now="refused by name, exit 2",
)
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("tools", {"tools": TOOLS}),
        ("messages[1].tool_calls", {"messages": talk(ASKED[0], (*ASKED[1], {"tool_calls": CALL}))}),
        ("messages[1].reasoning_content", {"messages": talk(ASKED[0], (*ASKED[1], {"reasoning_content": "Hm."}))}),
        ("messages[1].thinking", {"messages": talk(ASKED[0], (*ASKED[1], {"thinking": "Hm."}))}),
        ("messages[0].name", {"messages": talk((*ASKED[0], {"name": "Ann"}), ASKED[1])}),
        ("messages[1].prefix", {"messages": talk(ASKED[0], (*ASKED[1], {"prefix": True}))}),
    ],
)
def test_a_field_that_the_template_ignores_is_refused_by_name(
    field: str, change: dict[str, Any], tiny_tokenizer: Any
) -> None:
    problem = refused(tiny_tokenizer, CHATML, {"messages": talk(*ASKED), **change})

    assert field in problem


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_message_that_the_template_leaves_out_is_refused(role: str, tiny_tokenizer: Any) -> None:
    template = (
        "{% for m in messages if m['role'] in ('user', 'assistant') %}" + HEADER + "{{ m['content'] }}{% endfor %}"
    )

    problem = refused(tiny_tokenizer, template, {"messages": talk((role, "Be brief."), *ASKED)})

    assert f"leaves out messages[0] ({role})" in problem


@pytest.mark.own_failure(
    "turns with weight 0",
    before="learned",
    now="read, not learned",
)
@pytest.mark.parametrize("said", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}])
def test_turns_without_weight_are_read_and_not_learned(said: dict[str, Any], tiny_tokenizer: Any) -> None:
    value = {"messages": talk(ASKED[0], (*ASKED[1], said), ("user", "Sure?"), ("assistant", "Six mg.", {"weight": 1}))}
    plain = {"messages": talk(*ASKED, ("user", "Sure?"), ("assistant", "Six mg."))}
    blocks = TEMPLATES["generation blocks"][0]

    for template, end in ((CHATML, END + "\n"), (blocks, END)):
        rendered, found = row(tiny_tokenizer, template, value)
        assert found == "Six mg." + end
        assert rendered == row(tiny_tokenizer, template, plain)[0]


def test_a_system_of_sharegpt_is_the_first_message(tiny_tokenizer: Any) -> None:
    value = {"system": "Be brief.", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "No."}]}

    rendered, found = row(tiny_tokenizer, CHATML, value)

    assert rendered.startswith("<|system|>\nBe brief.<|end|>")
    assert found == "No." + END + "\n"


def test_of_prompt_and_completion_in_messages_the_completion_is_learned(tiny_tokenizer: Any) -> None:
    value = {"prompt": talk(*ASKED, ("user", "Sure?")), "completion": talk(("assistant", "Yes."))}

    rendered, found = row(tiny_tokenizer, CHATML, value)

    assert found == "Yes." + END + "\n"
    assert "Five mg." in rendered


def test_parts_of_text_are_joined(tiny_tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "Five "}, {"type": "text", "text": "mg.", "image": None}]

    assert row(tiny_tokenizer, CHATML, {"messages": talk(ASKED[0], ("assistant", parts))})[1] == "Five mg." + END + "\n"


# --- templates that say something else than what they are given ---

THOUGHTS = (  # as Qwen3: thoughts are taken out of contents, and dropped from all answers but the last
    "{% for m in messages %}" + HEADER + "{% if '</t>' in m['content'] and m['role'] == 'assistant' %}"
    "{% set thought = m['content'].split('</t>')[0].split('<t>')[-1] %}"
    "{% set content = m['content'].split('</t>')[-1].lstrip() %}{% else %}{% set thought = '' %}"
    "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'assistant' and loop.last %}"
    "<t>\n{{ thought.strip() }}\n</t>\n\n{% endif %}{{ content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_thoughts_in_the_last_answer_are_learned_and_earlier_ones_are_not_cut_in_silence(tiny_tokenizer: Any) -> None:
    last = {"messages": talk(*ASKED, ("user", "<t>y</t>"), ("assistant", "<t>Hm, y.</t>\ny"))}
    earlier = {"messages": talk(("user", "?"), ("assistant", "<t>Hm.</t>No."), *ASKED)}

    assert row(tiny_tokenizer, THOUGHTS, last)[1] == f"Five mg.{END}<t>\nHm, y.\n</t>\n\ny{END}\n"
    assert "messages[1]" in refused(tiny_tokenizer, THOUGHTS, earlier)


def pieces(*words: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words), min_size=1, max_size=5).map("".join).filter(str.strip)


QUESTIONS, ANSWERS = pieces("X", "Y ", "<t>", "</t>"), pieces("a", "b ", "\n", "<t>", "</t>")


@given(talks=st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=3))
@settings(max_examples=100)
def test_a_template_that_reads_contents_learns_whole_answers_or_refuses(talks: Any, tiny_tokenizer: Any) -> None:
    tokenizer = with_template(tiny_tokenizer, THOUGHTS)
    messages = tuple(turn for asked, said in talks for turn in (("user", asked), ("assistant", said)))

    try:
        found = learned(encode(Example(messages=messages), tokenizer), tokenizer)
    except InputError:
        assert any("t>" in said for _, said in talks)
        return
    assert not {"X", "Y"} & set(found)
    assert found.count(END) == len(talks)
    for (_, said), shown in zip(talks, "".join(found.split()).split(END), strict=False):
        assert "".join(said.split()) in shown
        assert set(shown) <= set("ab<t>/")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no roles here') }}", "cannot render"),
        ("{{ messages[0]['content']['x']['y'] }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{% for m in messages %}{{ m['content'][:3] }}<|end|>{% endfor %}", "leaves out messages[0]"),
        ("{% for m in messages %}{{ m['content'] | upper }}<|end|>{% endfor %}", "leaves out messages[0]"),
        ("{% for m in messages %}{{ m['content'] | replace('mg', 'g') }}<|end|>{% endfor %}", "messages[1]"),
        ("{{ messages[0]['content'] }}", "leaves out messages[1]"),
        ("{{ strftime_now('%f') }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "differently each time"),
        ("{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}" * 2, "messages[1]"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}", "messages[1]"),
        (
            "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}",
            "belongs to no assistant",
        ),
    ],
)
def test_a_template_that_cuts_changes_or_mixes_contents_is_refused(
    template: str, problem: str, tiny_tokenizer: Any
) -> None:
    assert problem in refused(tiny_tokenizer, template, {"messages": talk(*ASKED)})


@given(messages=talks(), cut=st.integers(1, 3))
@settings(max_examples=40)
def test_no_text_of_others_is_learned_from_a_template_that_repeats_the_question(
    messages: Any, cut: int, tiny_tokenizer: Any
) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
        "{{ messages[loop.index0 - 1]['content'][:CUT] }}{{ m['content'] }}<|end|>{% else %}"
        + HEADER
        + "{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = with_template(tiny_tokenizer, template.replace("CUT", str(cut)))

    try:
        found = learned(encode(Example(messages=messages), tokenizer), tokenizer)
    except InputError:
        return
    assert found == "".join(content + END for role, content in messages if role == "assistant")
