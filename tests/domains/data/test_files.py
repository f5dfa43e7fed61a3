"""All formats give the same rows; errors name the line."""

import csv
import gzip
import io
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.data import files
from lorary.domains.data.corpus import check_corpus, read_examples
from lorary.domains.data.example import Example
from lorary.domains.errors import CorpusError

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
FILLED = TEXT.filter(str.strip)
ROWS = st.lists(st.fixed_dictionaries({"id": TEXT, "prompt": TEXT, "completion": FILLED}), min_size=1, max_size=8)


@pytest.fixture
def write(tmp_path):
    def write(name: str, data: str | bytes):
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_table(rows, delimiter):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def examples(path):
    return list(read_examples([path]))


def problems(path):
    return [(error.line, error.problem) for error in check_corpus([path])]


@given(rows=ROWS, compressed=st.sampled_from(["", ".gz", ".xz"]))
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_written_rows_are_read_back_unchanged(scratch, suffix, rows, compressed):
    write = {
        ".jsonl": as_jsonl,
        ".json": lambda rows: json.dumps(rows, indent=1).encode(),
        ".csv": lambda rows: as_table(rows, ","),
        ".tsv": lambda rows: as_table(rows, "\t"),
    }[suffix]
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[compressed]
    path = scratch / f"rows{suffix}{compressed}"
    path.write_bytes(compress(write(rows)))

    assert examples(path) == [Example(row["prompt"], row["completion"], id=row["id"]) for row in rows]


def test_text_file_without_a_break_is_one_document(write):
    path = write("notes.txt", "\n\n\nFirst line.\r\nSecond.\n\nThird.\n\n\n\n")

    assert examples(path) == [Example(completion="First line.\nSecond.\n\nThird.")]


def test_two_blank_lines_separate_documents(write):
    path = write("notes.txt", "One.\n\nStill one.\n\n\nTwo.\n\n \n\n  Three.")

    assert [e.completion for e in examples(path)] == ["One.\n\nStill one.", "Two.", "  Three."]


def test_byte_order_mark_and_blank_lines_are_skipped(write):
    path = write("rows.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')

    assert [e.completion for e in examples(path)] == ["a", "b"]


def test_json_file_that_begins_with_an_object_is_read_as_jsonl(write):
    assert len(examples(write("rows.json", '\n{"text": "a"}\n{"text": "b"}\n'))) == 2


def test_table_cells_may_hold_choices_and_messages_as_json(write):
    path = write("q.csv", 'prompt,completion,choices\n?,b,"[""a"", ""b""]"\n?,c,\n')

    assert examples(path) == [Example("?", "b", ("a", "b")), Example("?", "c")]


def test_long_table_cells_are_read_and_the_global_limit_is_restored(write):
    limit = csv.field_size_limit()
    path = write("rows.csv", "text\n" + "a" * 200_000 + "\n")

    assert len(examples(path)[0].completion) == 200_000
    assert csv.field_size_limit() == limit


def test_all_bad_lines_are_found_with_their_numbers(write):
    lines = [b'{"text": "ok"}', b'{"text": }', b"[1]", b"", b'{"text": "\xff"}', b'{"body": 1}', b'{"text": ""}']
    path = write("rows.jsonl", b"\n".join(lines))

    found = problems(path)

    assert [line for line, _ in found] == [2, 3, 5, 6, 7]
    assert found[0][1] == "bad JSON at column 10: Expecting value"
    assert found[2][1] == "not valid UTF-8: byte 0xff at byte 11"
    assert check_corpus([path], limit=2)[1].line == 3


def test_first_bad_row_stops_reading(write):
    reading = read_examples([write("rows.jsonl", '{"text": "ok"}\n{"text": 1}\n')])

    assert next(reading).completion == "ok"
    with pytest.raises(CorpusError, match=r"rows\.jsonl:2: 'text' is a number"):
        next(reading)


@pytest.mark.parametrize(
    ("name", "data", "line", "problem"),
    [
        ("r.json", '[{"text": "a"},\n {"text": 1}]', 2, "'text' is a number"),
        ("r.json", '[\n{"text": "a"}\n,\n{"text" 1}]', 4, "bad JSON at column 9"),
        ("r.json", '[{"text": "a"}\n{"text": "b"}]', 1, "expected ',' or the end of the list"),
        ("r.json", '[{"text": "a"}', 1, "expected ',' or the end of the list"),
        ("r.json", '"text"', None, "expected a list, found '\"'"),
        ("r.json", b'[\n"\xff"]', 2, "not valid UTF-8"),
        ("r.jsonl", "[" * 200_000, 1, "bad JSON"),
        ("r.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}", 1, "bad JSON"),
        ("r.csv", "text\na\nb,c\n", 3, "has 2 cells, the header has 1"),
        ("r.csv", 'text,id\n"a\nb",1\n"c"x,2\n', 4, "bad row"),
        ("r.csv", 'text\na\n"b\n', 3, "bad row: unexpected end of data"),
        ("r.csv", b"text\na\n\xff\n", 3, "not valid UTF-8"),
        ("r.csv", "text,text\na,b\n", 1, "has a duplicate column"),
        ("r.csv", "prompt,completion,choices\na,b,[b\n", 2, "column 'choices' holds bad JSON"),
        ("r.csv", "body\na\n", 2, "no known keys: found 'body'"),
        ("r.tsv", "text\n\0\n", 2, "NUL"),
        ("r.txt", b"a\n\xff\n", 2, "not valid UTF-8"),
        ("r.txt", "a\n\n\n\nb\0\n", 5, "NUL"),
    ],
)
def test_error_has_line_and_problem(write, name, data, line, problem):
    found = problems(write(name, data))

    assert found[0][0] == line
    assert problem in found[0][1]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.txt", "r.jsonl.gz"])
@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_file_without_rows_is_refused(write, name, data):
    path = write(name, gzip.compress(data) if name.endswith("gz") else data)

    assert problems(path) == [(None, "has no rows")]


def test_table_with_only_a_header_and_empty_list_are_refused(write):
    assert problems(write("r.csv", "text\n")) == [(None, "has no rows")]
    assert problems(write("r.json", "[ ]")) == [(None, "has no rows")]


@pytest.mark.parametrize(("name", "line"), [("r.jsonl", 2), ("r.csv", 2), ("r.txt", 2)])
def test_too_long_line_is_reported_and_later_ones_are_read(write, monkeypatch, name, line):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    first, text = ("text", "%s") if name == "r.csv" else ('{"text": "a"}', '{"text": "%s"}')
    path = write(name, "\n".join([first, text % ("b" * 250), text % "c", text % 3]))

    found = problems(path)

    assert found == [(line, "the line is over 16 MiB")]


def test_too_long_document_is_reported(write, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    path = write("r.txt", "short\n\n\n" + "0123456789\n" * 20)

    assert problems(path) == [(4, "a document is over 16 MiB")]


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.jsonl.xz"])
def test_damaged_compression_is_reported(write, name):
    compress = gzip.compress if name.endswith("gz") else lzma.compress
    whole = compress(b'{"text": "abc"}\n' * 100)

    assert "the compressed data is damaged" in problems(write(name, whole[:-20]))[-1][1]
    assert "the compressed data is damaged" in problems(write(name, b'{"text": "a"}'))[0][1]
