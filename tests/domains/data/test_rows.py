"""Keys of rows, and errors of rows that cannot be used."""

import pytest

from lorary.domains.data.example import Example
from lorary.domains.data.rows import Row, to_example
from lorary.domains.errors import CorpusError

USER, ASSISTANT = ("user", "Hi?"), ("assistant", "Hello.")


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
