"""Rows in memory give the same examples as a JSONL file of them, also when stored and read again."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.data import row_list
from lorary.domains.data.corpus import check_corpus, corpus_digest, read_examples
from lorary.domains.data.row_list import RowList
from lorary.domains.errors import CorpusError

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
FILLED = TEXT.filter(str.strip)
LABEL = st.fixed_dictionaries({}, optional={"id": TEXT | st.integers(), "url": TEXT})


def choices() -> st.SearchStrategy[dict[str, Any]]:
    several = st.lists(FILLED, min_size=2, max_size=4, unique=True)
    return several.map(lambda found: {"completion": found[0], "choices": sorted(found)})


FORMS = st.one_of(
    st.fixed_dictionaries({"text": FILLED}),
    st.fixed_dictionaries({"prompt": st.text("ab \n", max_size=5), "completion": FILLED}),
    st.builds(lambda prompt, rest: {"prompt": prompt, **rest}, st.text("ab \n", max_size=5), choices()),
    st.fixed_dictionaries({"instruction": FILLED, "output": FILLED}, optional={"input": FILLED}),
    st.fixed_dictionaries({"user": FILLED, "assistant": FILLED}).map(
        lambda turns: {"messages": [{"role": role, "content": content} for role, content in turns.items()]}
    ),
    st.fixed_dictionaries({"human": FILLED, "gpt": FILLED}).map(
        lambda turns: {"conversations": [{"from": role, "value": content} for role, content in turns.items()]}
    ),
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "reasoning_content": FILLED,
        "train": st.booleans(),
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {"name": FILLED, "arguments": st.dictionaries(TEXT, TEXT | st.integers() | st.none())}
            ),
            max_size=2,
        ),
    },
)
TOOLS = st.lists(st.dictionaries(FILLED, TEXT, min_size=1), max_size=2)
FORMS |= st.builds(
    lambda content, fields, tools: {
        "messages": [
            {"role": "user", "content": "Hi?", "name": content},
            {"role": "assistant", "content": content, **fields},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "So."},
        ],
        "tools": tools,
    },
    FILLED,
    FIELDS,
    TOOLS,
)
ROWS = st.lists(st.builds(lambda label, form: label | form, LABEL, FORMS), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File that each hypothesis example overwrites."""
    return tmp_path_factory.mktemp("rows") / "rows.jsonl"


@given(rows=ROWS)
def test_rows_in_memory_are_read_like_those_of_a_file(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    from_file, from_memory = list(read_examples([path])), list(read_examples([RowList(rows)]))

    assert from_memory == from_file
    assert corpus_digest(from_memory) == corpus_digest(from_file)


@given(rows=ROWS)
def test_stored_rows_read_back_as_the_same_examples(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(RowList(rows).to_jsonl())

    assert list(read_examples([path])) == list(read_examples([RowList(rows)]))


def test_equal_examples_in_different_forms_are_stored_as_equal_bytes() -> None:
    alpaca = {"instruction": "Greet.", "output": "Hé.", "source": object()}
    plain = {"completion": "Hé.", "prompt": "Greet.\n\n"}

    stored = RowList([alpaca, {"id": 7, "text": "One."}]).to_jsonl()

    assert stored == RowList([plain, {"text": "One.", "id": "7"}]).to_jsonl()
    assert stored.decode() == '{"completion": "Hé.", "prompt": "Greet.\\n\\n"}\n{"id": "7", "text": "One."}\n'


def test_all_bad_rows_are_found_with_their_numbers() -> None:
    rows = RowList([{"text": "ok"}, {"text": ""}, 3, {"body": "x"}, {"text": "ok"}])

    found = check_corpus([rows])

    assert [error.line for error in found] == [2, 3, 4]
    assert found[0].message == "rows in memory:2: 'text' is empty"
    assert found[1].problem == "expected an object, found a number"


@pytest.mark.parametrize("read", [lambda rows: list(read_examples([rows])), RowList.to_jsonl])
def test_first_bad_row_stops_reading_and_storing(read: Any) -> None:
    with pytest.raises(CorpusError, match="rows in memory:2: 'text' is a number"):
        read(RowList([{"text": "ok"}, {"text": 1}]))


def test_empty_list_is_refused() -> None:
    with pytest.raises(CorpusError, match="rows in memory: has no rows"):
        list(read_examples([RowList([])]))


def test_row_over_the_line_limit_of_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_list, "MAX_LINE_BYTES", 40)
    fits = {"text": "a" * 26}
    assert len(RowList([fits]).to_jsonl()) == 40 - 1

    found = check_corpus([RowList([fits, {"text": "a" * 28}, fits])])

    assert [(error.line, error.problem) for error in found] == [(2, "the row is over 0 MiB")]
