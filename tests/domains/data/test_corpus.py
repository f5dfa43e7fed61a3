"""A corpus: which sources are accepted, and a split and a digest that depend on content alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.data.corpus import (
    CorpusCounts,
    corpus_counts,
    corpus_digest,
    is_held_out,
    read_examples,
    split,
)
from lorary.domains.data.example import Example
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
def test_unknown_suffix_is_refused_with_those_known(tmp_path, name, found):
    (tmp_path / name).touch()

    with pytest.raises(InputError) as raised:
        list(read_examples([tmp_path / name]))

    assert found in str(raised.value)
    assert ".jsonl, .ndjson, .json, .csv, .tsv, .txt, .md, .parquet" in str(raised.value)


def test_suffix_may_be_in_capitals_and_names_may_have_dots(tmp_path):
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
def test_split_keeps_all_examples_and_divides_no_equal_ones(examples, fraction):
    train, held_out = split(examples, fraction)

    assert sorted(train + held_out, key=Example.digest) == sorted(examples, key=Example.digest)
    assert not {e.digest() for e in train} & {e.digest() for e in held_out}


@given(examples=EXAMPLES, fraction=FRACTION)
def test_both_parts_have_something_if_two_examples_differ(examples, fraction):
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


def test_held_out_examples_stay_the_same_for_ever():
    held_out = [i for i in range(60) if is_held_out(Example("", f"text {i}"), 0.1)]

    # other numbers would move rows between the training and the held-out text of every existing domain
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


def test_counts_are_rows_and_bytes():
    rows = [Example("é", "ab", ("ab", "c")), Example(messages=(("user", "x"), ("assistant", "ü")))]

    assert corpus_counts(rows) == CorpusCounts(rows=2, bytes=7)
