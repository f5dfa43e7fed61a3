"""A split by document: no document, and no two texts that are nearly the same, stand on both sides."""

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.domains.data.catalog import builtin_domains
from lorary.domains.data.corpus import read_examples, split
from lorary.domains.data.documents import rows_apart, split_documents
from lorary.domains.data.example import Example
from lorary.domains.data.row_list import RowList
from lorary.domains.errors import CorpusError

WORDS = [f"{first}{second}" for first, second in product("bdfgklmnprst", ("ale", "ono", "iri", "umu", "ete"))]


def text(seed: int, words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def row(content: str, document: str = "") -> Example:
    return Example(completion=content, document=document)


def sides(examples: Sequence[Example], share: float = 0.3) -> dict[str, bool]:
    """Whether each text is held out."""
    found = split_documents(examples, share)
    return {one.completion: False for one in found.train} | {one.completion: True for one in found.held_out}


# --- what stays together ---


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_rows_of_one_named_document_are_on_one_side(sizes: list[int], seed: int) -> None:
    rows = [row(text(100 * d + i), f"doc {d} of {seed}") for d, size in enumerate(sizes) for i in range(size)]
    random.Random(seed).shuffle(rows)

    found = split_documents(rows, 0.3)

    assert {one.document for one in found.train}.isdisjoint(one.document for one in found.held_out)
    assert sorted(found.train + found.held_out, key=Example.digest) == sorted(rows, key=Example.digest)
    assert found.documents == len(sizes)
    assert found.train
    assert found.held_out


@settings(max_examples=30)
@given(seed=st.integers(0, 999), change=st.sampled_from(["case", "digits", "punctuation", "a word", "nothing"]))
def test_texts_that_are_nearly_the_same_are_on_one_side(seed: int, change: str) -> None:
    base = text(seed) + " 17"
    other = {
        "case": base.upper(),
        "digits": base.replace("17", "4"),
        "punctuation": base.replace(" ", ", ") + ".",
        "a word": base.replace(base.split()[20], "zebra", 1),
        "nothing": base,
    }[change]
    rows = [row(text(1000 + i)) for i in range(20)] + [row(base), row(other)]

    found = sides(rows)

    assert found[base] == found[other]


def test_a_document_and_what_nearly_repeats_it_are_one() -> None:
    rows = [row(text(1), "a"), row(text(2), "a"), row(text(2) + " more"), row(text(3), "b"), row(text(4), "c")]

    found = sides(rows)

    assert found[text(1)] == found[text(2)] == found[text(2) + " more"]


def test_rows_in_one_frame_are_apart_if_they_say_different_things() -> None:
    rows = [row(f"Customer of our bank writes: {text(i, 12)}\nThe intent of this request is") for i in range(40)]

    found = split_documents(rows, 0.3)

    assert found.documents == 40


def test_rows_that_are_nothing_but_a_template_are_one_document() -> None:
    rows = [row(f"The dose for patient number {i} is {i} mg a day, taken with water.") for i in range(60)]

    found = split_documents(rows, 0.15)

    assert found.documents == 1
    assert found.train
    assert found.held_out
    assert "all 60 rows are of one document" in found.problems[0]


# --- what a side depends on ---


@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_order_and_other_rows_do_not_change_a_side(seed: int) -> None:
    rows = [row(text(i), f"d{i // 3}") for i in range(30)]
    more = [row(text(1000 + i), f"e{i // 2}") for i in range(20)]
    shuffled = random.Random(seed).sample(rows + more, 50)

    before, after = sides(rows), sides(shuffled)

    assert all(after[content] == held for content, held in before.items())


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5, 0.9])
def test_without_documents_of_several_rows_it_is_the_split_by_content(share: float) -> None:
    rows = [row(text(i)) for i in range(50)]

    found = split_documents(rows, share)

    assert (found.train, found.held_out) == split(rows, share)


def test_the_bundled_corpora_are_split_as_ever() -> None:
    for spec in builtin_domains().values():
        assert spec.corpus is not None
        rows = list(read_examples([spec.corpus]))
        found = split_documents(rows, 0.15)
        assert (found.train, found.held_out) == split(rows, 0.15), spec.name


def test_a_large_document_is_not_held_out() -> None:
    for name in map(str, range(40)):
        rows = [row(text(i), name) for i in range(30)] + [row(text(100 + i), f"s{i}") for i in range(10)]
        found = split_documents(rows, 0.5)
        assert name not in {one.document for one in found.held_out}


# --- what was held out before ---


def test_rows_apart_leaves_out_what_nearly_repeats_a_held_out_row() -> None:
    held, rows = [row(text(1)), row(text(2), "a")], [row(text(1) + " again"), row(text(3), "a"), row(text(4), "b")]

    assert rows_apart(rows, held) == rows[2:]


# --- what is pointed out ---


def test_what_makes_scores_uncertain_is_pointed_out() -> None:
    many = [row(text(i)) for i in range(60)]
    framed = [row(f"Please say in one word what this customer of ours wants: {text(i, 4)}") for i in range(60)]

    assert split_documents(many, 0.3).problems == ()
    large = split_documents(many + [row(text(100 + i), "a") for i in range(40)], 0.3)
    assert any("40 of 100 rows are of one document" in one for one in large.problems)
    assert any("repeat an earlier one" in one for one in split_documents(many + many[:20], 0.3).problems)
    assert any("template" in one for one in split_documents(framed, 0.3).problems)
    assert any("held out, of 4" in one for one in split_documents(many[:4], 0.3).problems)


# --- names of documents in rows ---


@pytest.mark.parametrize("key", ["doc", "document", "doc_id", "document_id", "group"])
@pytest.mark.parametrize("value", ["contract 7", 7])
def test_a_row_names_its_document(key: str, value: object) -> None:
    (found,) = read_examples([RowList([{"text": "some text", key: value}])])

    assert found.document == str(value)
    assert found.digest() == Example(completion="some text").digest()


@pytest.mark.parametrize("value", [True, 1.5, ["a"], {"a": 1}])
def test_a_document_without_a_name_is_refused(value: object) -> None:
    with pytest.raises(CorpusError, match="'doc' is"):
        list(read_examples([RowList([{"text": "some text", "doc": value}])]))


def test_a_file_of_documents(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "doc": null, "group": "g"}\n{"text": "two"}\n', encoding="utf-8")

    assert [one.document for one in read_examples([path])] == ["g", ""]


def test_rows_in_memory_keep_their_documents_when_they_are_read_again(tmp_path: Path) -> None:
    rows = RowList([{"text": "one", "group": "g"}, {"prompt": "a", "completion": "b", "doc": 7}, {"text": "two"}])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows.to_jsonl())

    assert [one.document for one in read_examples([path])] == ["g", "7", ""]
    assert rows.to_jsonl() == path.read_bytes()
