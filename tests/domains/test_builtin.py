"""Built-in domains have enough clean text, and questions that are not in the text."""

import re
from collections import Counter

import pytest

from lorary.domains.data.catalog import builtin_domains, everyday_questions, everyday_requests, find_domain
from lorary.domains.data.corpus import check_corpus, corpus_counts, read_examples, split

NAMES = ["code", "finance", "general", "legal", "medicine"]


@pytest.fixture(scope="module", params=NAMES)
def spec(request):
    return find_domain(request.param)


@pytest.fixture(scope="module")
def corpus(spec):
    return list(read_examples([spec.corpus]))


@pytest.fixture(scope="module")
def questions(spec):
    return list(read_examples([spec.questions]))


def words(text):
    """Return the words of a text in lower case, separated by spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def sentences(text):
    return {sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+|\n+", text) if len(sentence.strip()) > 60}


def test_spec_is_complete(spec):
    assert spec.description.endswith(".")
    assert spec.license == "Apache-2.0"
    assert spec.hub
    assert all(data.note for data in spec.hub)


def test_every_row_can_be_used(spec):
    assert check_corpus([spec.corpus, spec.questions]) == []


def test_corpus_is_large_enough(corpus):
    assert corpus_counts(corpus).bytes >= 60_000


def test_ids_are_unique(corpus, questions):
    ids = [example.id for example in [*corpus, *questions]]

    assert all(ids)
    assert [label for label, count in Counter(ids).items() if count > 1] == []


def test_no_sentence_is_in_two_rows(corpus):
    rows_with = Counter(sentence for example in corpus for sentence in sentences(example.text))

    assert [sentence for sentence, count in rows_with.items() if count > 1] == []


def test_questions_have_four_choices_with_the_answer_among_them(questions):
    assert len(questions) >= 60
    assert [question.id for question in questions if len(set(question.choices)) != 4] == []
    assert [question.id for question in questions if question.completion not in question.choices] == []


def test_answers_are_in_different_places(questions):
    places = Counter(question.choices.index(question.completion) for question in questions)

    assert set(places) == {0, 1, 2, 3}
    assert max(places.values()) <= len(questions) / 2


def test_questions_are_unique(questions):
    assert [prompt for prompt, count in Counter(words(q.prompt) for q in questions).items() if count > 1] == []


def test_no_question_is_in_the_corpus(corpus, questions):
    text = "\n".join(words(example.text) for example in corpus)
    asked = {question.id: words(re.sub(r"^Question:|\nAnswer:$", "", question.prompt)) for question in questions}

    assert [label for label, question in asked.items() if question in text] == []


def test_a_tenth_can_be_held_out(corpus):
    train, held_out = split(corpus, 0.1)

    assert len(train) > len(held_out) >= 1


def test_everyday_requests_are_many_and_none_is_asked_elsewhere() -> None:
    requests = [words(request.completion) for request in everyday_requests()]
    asked = {words(question) for question in everyday_questions()}
    for spec in builtin_domains().values():
        rows = read_examples([spec.questions]) if spec.questions else ()
        asked |= {words(re.sub(r"^Question:|\nAnswer:$", "", row.prompt)) for row in rows}

    assert len(requests) > 300
    assert len(set(requests)) == len(requests)
    assert not set(requests) & asked
