"""Which data is accepted as a source; split and digest depend on the content of examples only."""

import io
import random
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.data.corpus import (
    CorpusCounts,
    as_sources,
    corpus_counts,
    corpus_digest,
    is_held_out,
    read_examples,
    split,
)
from lorary.domains.data.example import Example
from lorary.domains.data.row_list import RowList
from lorary.domains.data.spec import HubData
from lorary.domains.errors import InputError, NotFoundError

EXAMPLES = st.lists(st.builds(Example, prompt=st.text(max_size=3), completion=st.text(max_size=3)), max_size=20)
FRACTION = st.floats(0.01, 0.99)


def test_sources_are_read_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.jsonl").write_text('{"text": "Two."}\n')

    examples = read_examples([tmp_path / "b.jsonl", str(tmp_path / "a.txt")])

    assert [example.completion for example in examples] == ["Two.", "One."]


def test_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere\.jsonl"):
        list(read_examples([tmp_path / "nowhere.jsonl"]))


def test_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        list(read_examples([tmp_path]))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rows.docx", "'.docx'"),
        ("rows", "no suffix"),
        ("rows.gz", "no suffix"),
        ("rows.tar.gz", "'.tar.gz'"),
        ("rows.parquet.gz", "'.parquet.gz'"),
    ],
)
def test_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name, found):
    (tmp_path / name).touch()

    with pytest.raises(InputError) as raised:
        list(read_examples([tmp_path / name]))

    assert found in str(raised.value)
    assert ".jsonl, .ndjson, .json, .csv, .tsv, .txt, .md, .parquet" in str(raised.value)


def test_suffix_may_be_upper_case_and_names_may_have_dots(tmp_path):
    path = tmp_path / "rows.v1.2.TXT"
    path.write_text("One.")

    assert len(list(read_examples([path]))) == 1


@given(examples=EXAMPLES, fraction=FRACTION, seed=st.integers(0, 99))
def test_split_does_not_depend_on_order(examples, fraction, seed):
    shuffled = random.Random(seed).sample(examples, len(examples))

    parts, shuffled_parts = split(examples, fraction), split(shuffled, fraction)

    for part, other in zip(parts, shuffled_parts, strict=True):
        assert sorted(part, key=Example.digest) == sorted(other, key=Example.digest)


@given(examples=EXAMPLES, fraction=FRACTION)
def test_split_keeps_all_examples_and_separates_no_equal_ones(examples, fraction):
    train, held_out = split(examples, fraction)

    assert sorted(train + held_out, key=Example.digest) == sorted(examples, key=Example.digest)
    assert not {e.digest() for e in train} & {e.digest() for e in held_out}


@given(examples=EXAMPLES, fraction=FRACTION)
def test_no_part_is_empty_if_two_examples_differ(examples, fraction):
    train, held_out = split(examples, fraction)

    differ = len({example.digest() for example in examples}) >= 2
    assert bool(train and held_out) == differ


@given(completion=st.text(max_size=9), low=FRACTION, high=FRACTION)
def test_larger_fraction_only_adds_to_the_held_out_part(completion, low, high):
    example = Example(completion=completion)

    assert is_held_out(example, max(low, high)) or not is_held_out(example, min(low, high))


def test_held_out_share_is_near_the_fraction():
    share = sum(is_held_out(Example(completion=str(i)), 0.1) for i in range(5000)) / 5000

    assert 0.08 < share < 0.12


def test_held_out_examples_never_change():
    held_out = [i for i in range(60) if is_held_out(Example("", f"text {i}"), 0.1)]

    # other indices would move rows between training set and held-out set of every existing domain
    assert held_out == [0, 17, 21, 37, 39, 57]


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, float("nan")])
def test_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        split([], fraction)


@given(examples=EXAMPLES, seed=st.integers(0, 99))
def test_digest_does_not_depend_on_order(examples, seed):
    shuffled = random.Random(seed).sample(examples, len(examples))

    assert corpus_digest(examples) == corpus_digest(shuffled)


def test_digest_changes_with_every_row():
    rows = [Example(completion="a"), Example(completion="b")]

    digests = {corpus_digest(some) for some in ([], rows, rows[:1], [*rows, rows[0]])}

    assert len(digests) == 4
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


def test_rows_and_bytes_are_counted():
    rows = [Example("é", "ab", ("ab", "c")), Example(messages=(("user", "x"), ("assistant", "ü")))]

    assert corpus_counts(rows) == CorpusCounts(rows=2, bytes=7)


# --- as_sources ---

ROWS = ({"text": "One."}, {"text": "Two."})


class TinyDataset:
    """The part of `datasets.Dataset` that is used: column names, and rows that can be iterated again."""

    column_names = ("text", "source")

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __iter__(self):
        return iter([{"text": text, "source": None} for text in self.texts])


class TinyDatasetDict(dict):
    """The part of `datasets.DatasetDict` that is used."""

    @property
    def column_names(self):
        return {split: list(dataset.column_names) for split, dataset in self.items()}


def completions(data):
    return [example.completion for example in read_examples(as_sources(data))]


@pytest.mark.parametrize("data", [None, [], ()])
def test_no_data_is_no_source(data):
    assert as_sources(data) == []


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ("rows.jsonl", [Path("rows.jsonl")]),
        (Path("rows.jsonl"), [Path("rows.jsonl")]),
        (PurePosixPath("rows.jsonl"), [Path("rows.jsonl")]),
        ("hf:a/b:c", ["hf:a/b:c"]),
        (HubData(id="a/b"), [HubData(id="a/b")]),
        (RowList(ROWS), [RowList(ROWS)]),
        (["a.txt", Path("b.txt"), "hf:a/b"], [Path("a.txt"), Path("b.txt"), "hf:a/b"]),
        (("a.txt",), [Path("a.txt")]),
        ([["a.txt"], ["b.txt", ["c.txt"]]], [Path("a.txt"), Path("b.txt"), Path("c.txt")]),
        (list(ROWS), [RowList(ROWS)]),
        (ROWS, [RowList(ROWS)]),
    ],
)
def test_data_is_a_name_rows_or_a_list(data, sources):
    assert as_sources(data) == sources


def test_rows_directly_in_a_list_are_one_source_at_the_place_of_the_first():
    first, second = ROWS

    assert as_sources(["a.txt", first, "b.txt", second, first]) == [
        Path("a.txt"),
        RowList((first, second, first)),
        Path("b.txt"),
    ]


def test_source_of_a_list_is_a_copy():
    rows = list(ROWS)

    (source,) = as_sources(rows)
    rows.append({"text": "Three."})

    assert len(list(read_examples([source]))) == 2


def test_data_set_can_be_read_more_than_once():
    (source,) = as_sources(TinyDataset(["One.", "Two."]))

    assert [len(list(read_examples([source]))) for _ in range(2)] == [2, 2]


def test_other_collections_of_rows_are_read():
    assert completions({1: {"text": "One."}, 2: {"text": "Two."}}.values()) == ["One.", "Two."]


def test_a_list_may_mix_names_rows_and_data_sets(tmp_path):
    (tmp_path / "a.txt").write_text("One.")

    found = completions([str(tmp_path / "a.txt"), {"text": "Two."}, TinyDataset(["Three."]), [{"text": "Four."}]])

    assert found == ["One.", "Two.", "Three.", "Four."]


def test_row_lists_have_unique_names():
    sources = as_sources([TinyDataset(["One."]), {"text": "Two."}, TinyDataset([""])])

    assert [str(source) for source in sources] == ["rows in memory", "rows in memory (2)", "rows in memory (3)"]
    with pytest.raises(InputError, match=r"rows in memory \(3\):1: 'text' is empty"):
        list(read_examples(sources))


@pytest.mark.parametrize(
    ("data", "problem", "fix"),
    [
        (3, "data is of type 'int', which is not a source of rows", "give a path"),
        (True, "data is of type 'bool'", "give a path"),
        (b"rows.jsonl", "data is of type 'bytes'", "give a path"),
        (b"", "data is of type 'bytes'", "give a path"),
        ({"a.txt"}, "data is of type 'set'", "or a list of these"),
        (set(), "data is of type 'set'", "or a list of these"),
        (range(3), "data is of type 'range'", "give a path"),
        (["a.txt", 3], "data[1] is of type 'int'", "give a path"),
        ([{"text": "One."}, None, [{"text": "Two."}, 2.0]], "data[2][1] is of type 'float'", "give a path"),
        ({"text": "One."}, "data is one row, expected a list of rows", "put it into a list: data=[row]"),
        ({}, "data is one row", "data=[row]"),
        (iter(ROWS), "data is of type 'tuple_iterator', which can be read only once", "data=list(rows)"),
        ((row for row in ROWS), "data is of type 'generator', which can be read only once", "data=list(rows)"),
        (io.StringIO("One."), "data is of type 'StringIO', which can be read only once", "give its path"),
        (
            TinyDatasetDict(train=TinyDataset(["One."]), test=TinyDataset(["Two."])),
            "which has several splits.\nCause: its splits: train, test",
            "choose one, such as dataset['train']",
        ),
        ([TinyDatasetDict(a=TinyDataset(["One."]))], "data[0] is of type 'TinyDatasetDict'", "dataset['a']"),
        (TinyDatasetDict(), "its splits: none", "give a path"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_other_data_is_refused_with_what_to_give_instead(data, problem, fix):
    with pytest.raises(InputError) as raised:
        as_sources(data)

    assert problem in str(raised.value)
    assert fix in str(raised.value.fix)


def test_path_of_bytes_is_refused():
    class BytesPath:
        def __fspath__(self):
            return b"rows.jsonl"

    with pytest.raises(InputError, match="'BytesPath'"):
        as_sources(cast(Any, BytesPath()))


def test_text_in_place_of_a_path_is_refused_with_a_fix():
    with pytest.raises((InputError, NotFoundError)) as raised:
        completions(["The patient was given five milligrams twice a day. " * 20])

    assert '[{"text": "..."}]' in str(raised.value.fix)


def test_datasets_of_the_package_are_read_and_dataset_dicts_refused():
    datasets = pytest.importorskip("datasets")
    import pyarrow  # pyright: ignore[reportMissingImports]

    rows = [{"text": "One.", "id": 1}, {"text": "Two.", "id": 2}]
    # with a fingerprint, which `Dataset.from_list` would compute with dill: that fails on types of pyarrow 26
    dataset = datasets.Dataset(pyarrow.Table.from_pylist(rows), fingerprint="rows")

    assert list(read_examples(as_sources(dataset))) == list(read_examples(as_sources(rows)))
    assert list(read_examples(as_sources([dataset.to_iterable_dataset()]))) == list(read_examples(as_sources(rows)))
    with pytest.raises(InputError, match="its splits: train, test"):
        as_sources(datasets.DatasetDict(train=dataset, test=dataset))
    with pytest.raises(InputError, match="its splits: train"):
        as_sources(datasets.IterableDatasetDict(train=dataset.to_iterable_dataset()))


def test_datasets_are_recognised_without_importing_the_package():
    program = "import sys; from lorary.domains.data.corpus import as_sources; as_sources([{'text': 'One.'}])"
    check = "assert not {'datasets', 'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)"

    done = subprocess.run([sys.executable, "-c", f"{program}; {check}"], cwd=Path.home(), check=False)

    assert done.returncode == 0
