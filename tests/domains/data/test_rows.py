"""Keys of rows, and errors of rows that cannot be used."""

import pytest

from lorary.domains.data.example import Example
from lorary.domains.data.rows import Row, to_example
from lorary.domains.errors import CorpusError

USER, ASSISTANT = ("user", "Hi?"), ("assistant", "Hello.")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": 2}}}


def said(content: object = "Hello.", **fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **fields}


@pytest.mark.parametrize(
    ("value", "example"),
    [
        ({"text": " A text.\n"}, Example(completion=" A text.\n")),
        ({"text": "A text.", "id": 7, "url": "x"}, Example(completion="A text.", id="7")),
        ({"prompt": "1 + 1 =", "completion": "2"}, Example("1 + 1 =", "2")),
        ({"prompt": "", "completion": "2"}, Example("", "2")),
        (
            {"prompt": "?", "completion": "b", "choices": ["a", "b"], "id": "q1"},
            Example("?", "b", ("a", "b"), "q1"),
        ),
        (
            {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]},
            Example(messages=(USER, ASSISTANT)),
        ),
        ({"instruction": "Add.", "input": "1, 1", "output": "2"}, Example("Add.\n\n1, 1\n\n", "2")),
        ({"instruction": "Greet.", "input": "", "output": "Hello."}, Example("Greet.\n\n", "Hello.")),
        (
            {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
            Example(messages=(USER, ASSISTANT)),
        ),
        (
            {"system": "Be brief.", "instruction": "Greet.", "output": "Hello."},
            Example("Be brief.\n\nGreet.\n\n", "Hello."),
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "user", "value": "Hi?"}, {"from": "bot", "value": "Hi."}],
            },
            Example(messages=(("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hi."))),
        ),
        # null and empty fields say nothing; neither does what is so anyway
        (
            {
                "tools": [],
                "system": "",
                "messages": [
                    {"role": "user", "content": "Hi?", "tool_calls": None, "weight": 0},
                    {"role": "assistant", "content": [{"type": "text", "text": "Hello."}], "name": "", "train": True},
                ],
            },
            Example(messages=(USER, ASSISTANT)),
        ),
        # of several forms, the first that is not empty
        ({"text": "", "instruction": "Greet.", "output": "Hello."}, Example("Greet.\n\n", "Hello.")),
        ({"text": None, "messages": [], "prompt": "?", "completion": "!"}, Example("?", "!")),
        ({"text": "A text.", "prompt": "?", "completion": "!"}, Example(completion="A text.")),
    ],
)
def test_known_keys_become_an_example(value, example):
    assert to_example(Row(1, value), "rows.jsonl") == example


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([1], "expected an object, found a list of 1"),
        (None, "expected an object, found null"),
        ({}, "no known keys: found no keys; accepted are text | prompt, completion"),
        ({"body": "x", "title": "y"}, "found 'body', 'title'"),
        ({"prompt": "x"}, "no known keys: found 'prompt'"),
        ({"text": ""}, "'text' is empty"),
        ({"text": " \n\t"}, "'text' is empty"),
        ({"text": 5}, "'text' is a number, expected a string"),
        ({"text": True}, "'text' is a boolean"),
        ({"text": "a\0b"}, "'text' has a NUL character at position 2"),
        ({"text": "ab\udc80"}, "'text' is not valid UTF-8 at position 3"),
        ({"text": "a", "id": [1]}, "'id' is a list of 1"),
        ({"prompt": "?", "completion": ""}, "'completion' is empty"),
        ({"prompt": "?", "completion": "c", "choices": ["a", "b"]}, "'completion' 'c' is not among the choices"),
        ({"prompt": "?", "completion": "a", "choices": ["a"]}, "'choices' is a list of 1"),
        ({"prompt": "?", "completion": "a", "choices": ["a", "a"]}, "'choices' has duplicates"),
        ({"prompt": "?", "completion": "a", "choices": ["a", 2]}, "'choices[1]' is a number"),
        ({"messages": "hi"}, "'messages' is a string"),
        ({"messages": []}, "'messages' is a list of 0"),
        ({"messages": ["hi"]}, "messages[0] is a string, expected an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "messages[0] has the keys ['role']"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "messages[0] has the unknown role 'poet'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "'messages[0].content' is empty"),
        ({"messages": [{"role": "assistant", "content": None}]}, "'messages[0].content' is null"),
        ({"messages": [{"role": "user", "content": None, "tool_calls": [CALL]}]}, "only the assistant calls tools"),
        ({"messages": [said(tool_calls="f()")]}, "'messages[0].tool_calls' is a string"),
        ({"messages": [said(tool_calls=[{"id": "1"}])]}, "'messages[0].tool_calls[0]' has no function with a name"),
        ({"messages": [said(weight=0.5)]}, "'messages[0].weight' is 0.5"),
        ({"messages": [said(train="no")]}, "'messages[0].train' is 'no'"),
        ({"messages": [said(weight=1, train=False)]}, "has weight 1 and train false"),
        ({"messages": [said(weight=0)]}, "no assistant message that is to be learned"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}, said()]}, "only the assistant is learned"),
        ({"messages": [said(name="a\0b")]}, "NUL character"),
        ({"messages": [said(score=float("nan"))]}, "cannot be represented in JSON"),
        ({"messages": [said(made=object())]}, "cannot be represented in JSON"),
        ({"messages": [{"from": "gpt", "value": "x", "role": "user"}]}, "has 'role' beside 'from'"),
        ({"messages": [said(content=[{"type": "image_url", "image_url": "x"}])]}, "only text can be learned"),
        ({"messages": [said(content=[{"type": "text", "text": "x", "cache": 1}])]}, "with 'type', 'text', 'cache'"),
        ({"messages": [said(content=["x"])]}, "messages[0].content[0] is a string"),
        ({"messages": [said()], "tools": "[1"}, "'tools' holds bad JSON"),
        ({"messages": [said()], "tools": ["f"]}, "'tools' is a list of 1, expected a list of objects"),
        ({"messages": [said()], "functions": [{}]}, "has a key 'functions', which a conversation cannot use"),
        ({"messages": [said()], "weight": 0.3}, "has a key 'weight'"),
        ({"messages": [said()], "chat_template_kwargs": {"a": 1}}, "has a key 'chat_template_kwargs'"),
        ({"messages": [{"role": "system", "content": "x"}, said()], "system": "y"}, "begins with a system message"),
        ({"prompt": "?", "completion": "!", "system": "y"}, "has a key 'system'"),
        ({"prompt": "?", "completion": "!", "tools": [{}]}, "has a key 'tools'"),
        ({"instruction": "?", "output": "!", "history": [["a", "b"]]}, "has a key 'history'"),
        ({"prompt": "?", "completion": [said()]}, "'prompt' is a string and 'completion' a list of 1"),
        ({"prompt": [said()], "completion": [{"role": "user", "content": "x"}]}, "is to be learned"),
        ({"prompt": [said()], "completion": [said()], "choices": ["a", "b"]}, "'choices' cannot be given"),
    ],
)
def test_error_has_file_line_and_problem(value, problem):
    with pytest.raises(CorpusError) as raised:
        to_example(Row(12, value), "rows.jsonl")

    assert str(raised.value).startswith("rows.jsonl:12: ")
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [("a", "b", "a b"), ("a ", "b", "a b"), ("a", " b", "a b"), ("a\n", "\nb", "a\n\nb"), ("", "b", "b")],
)
def test_prompt_and_completion_are_joined_by_a_space_unless_there_is_white_space(prompt, completion, text):
    assert Example(prompt, completion).text == text


def test_target_bytes_are_those_of_the_completion_or_the_assistant():
    conversation = Example(messages=(("user", "é"), ("assistant", "ü"), ("user", "x"), ("assistant", "abc")))

    assert Example("prompt", "é").target_bytes == 2
    assert conversation.target_bytes == 5


def test_digest_ignores_the_id_and_nothing_else():
    example = Example("a", "b", ("b", "c"), "1")

    assert example.digest() == Example("a", "b", ("b", "c"), "2").digest()
    assert len({e.digest() for e in (example, Example("ab", ""), Example("a", "b"), Example("", "ab"))}) == 4


def test_digests_of_plain_conversations_are_those_of_earlier_versions():
    digest = Example(messages=(USER, ASSISTANT)).digest().hex()

    assert digest == "5fa182a844979885f878a860a4f96d320289b24015a163e174fbba9bec8b1ff4"


@pytest.mark.parametrize(
    "change",
    [{"tool_calls": [CALL]}, {"reasoning_content": "Hm."}, {"name": "a"}, {"tool_calls": [CALL, CALL]}],
)
def test_fields_are_part_of_the_content(change):
    def example(**fields):
        return to_example(Row(1, {"messages": [{"role": "user", "content": "x"}, said(**fields)]}), "rows.jsonl")

    changed, plain = example(**change), example()

    assert changed != plain
    assert changed.digest() != plain.digest()
    assert changed.turns[1] == {"role": "assistant", "content": "Hello.", **change}
    assert changed.target_bytes > plain.target_bytes
    assert list(changed.turns[1].get("tool_calls", [CALL])[0]["function"]["arguments"]) == ["b", "a"]


def test_turns_that_are_not_learned_are_not_counted():
    value = {"messages": [said("No.", weight=0), {"role": "user", "content": "x"}, said("Yes!")]}

    example = to_example(Row(1, value), "rows.jsonl")

    assert example.learned_turns == (2,)
    assert example.target_bytes == 4
    assert example.digest() != Example(messages=example.messages).digest()
