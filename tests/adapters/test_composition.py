"""The text form of compositions: parsing, canonical form, errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.adapters.composition import Composition, Term
from lorary.domains.errors import InputError
from lorary.domains.names import NAME_PATTERN, is_name

names = st.from_regex(NAME_PATTERN, fullmatch=True).filter(is_name) | st.just("general")
selectors = st.none() | st.integers(1, 999_999_999).map(str) | st.sampled_from(["latest", "production", "v2"])
weights = st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
repos = st.sampled_from(["hf://acme/lorary-legal", "hf://a/b", "hf://Alice_1/x.y-z", "hf://e5/1e5"])
revisions = st.none() | st.sampled_from(["v2", "main", "refs/pr/3", "0" * 40, "1.5", "1e5"])
terms = st.builds(Term, names, selectors, weights) | st.builds(Term, repos, revisions, weights)
# compositions are built in the tests: beartype checks them with `random`, which hypothesis forbids in strategies
term_lists = st.lists(terms, min_size=1, max_size=6, unique_by=lambda term: term.name)


def test_example_is_parsed():
    composition = Composition.parse("medicine@2:0.7+legal:0.3+general")

    assert composition.terms == (Term("legal", None, 0.3), Term("medicine", "2", 0.7))


@given(term_lists)
def test_text_form_round_trips(drawn):
    composition = Composition(tuple(drawn))

    assert Composition.parse(str(composition)) == composition


@given(term_lists)
def test_text_form_is_canonical(drawn):
    written = str(Composition(tuple(drawn)))

    assert str(Composition.parse(written)) == written


@given(term_lists, st.randoms())
def test_order_is_irrelevant(drawn, random):
    shuffled = random.sample(drawn, len(drawn))

    assert Composition(tuple(shuffled)) == Composition(tuple(drawn))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("general", "general"),
        ("legal+general", "legal"),
        ("legal+general:0.5", "general:0.5+legal"),
        ("legal+general@1", "general@1+legal"),
        ("b+a", "a+b"),
        ("a:1.0", "a:1"),
        ("a:.5", "a:0.5"),
        ("a:1e22", "a:1e22"),
        ("a:1e-7", "a:1e-07"),
        ("hf://acme/lorary-legal@v2:0.50+general", "hf://acme/lorary-legal@v2:0.5"),
        ("medicine+hf://a/b@refs/pr/3:2", "hf://a/b@refs/pr/3:2+medicine"),
    ],
)
def test_canonical_form(text, written):
    assert str(Composition.parse(text)) == written


@pytest.mark.parametrize("text", ["legal", "general+legal", "general:0.5+legal", "general"])
def test_general_is_always_among_the_slots(text):
    slots = Composition.parse(text).slots

    assert slots[0].name == "general"
    assert [slot.name for slot in slots].count("general") == 1


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 1),
        ("a+", 3),
        ("+a", 1),
        ("a++b", 3),
        ("medicine+Legal", 10),
        ("medicine + legal", 1),
        ("a+all", 3),
        ("a@", 3),
        ("a@02", 3),
        ("a@-1", 3),
        ("a@1@2", 3),
        ("a:", 3),
        ("a:x", 3),
        ("a:0", 3),
        ("a:-1", 3),
        ("a:nan", 3),
        ("a:inf", 3),
        ("a:1e999", 3),
        ("a:1e-999", 3),
        ("a:1_0", 3),
        ("a:\u0661", 3),
        ("a:0.5@2", 3),
        ("a@2:0.5:1", 5),
        ("a+b+a@2", 5),
        ("general+general", 9),
        ("hf://a", 1),
        ("x+hf://a/b/c", 3),
        ("hf:/a/b", 4),
        ("hf://a/b@", 10),
        ("hf://a/b@v1:x", 13),
        ("hf://a/b+hf://a/b@v1", 10),
    ],
)
def test_error_names_text_position_and_example(text, position):
    with pytest.raises(InputError) as caught:
        Composition.parse(text)

    assert repr(text) in caught.value.message
    assert f"At character {position}:" in str(caught.value.cause)
    assert "medicine@2:0.7+legal:0.3" in str(caught.value.fix)


@pytest.mark.parametrize("text", ["hf://a/b@v1:0.5", "hf://a/b"])
def test_a_remote_term_names_a_pack_on_the_hub(text):
    remote, local = Composition.parse(f"{text}+medicine@2").terms

    assert str(remote.remote) == text.removesuffix(":0.5")
    assert local.remote is None


@given(st.text(alphabet="ab2@:+.-e ", max_size=20) | st.text(alphabet="hf:/ab2@+.v", max_size=24))
def test_any_text_is_parsed_or_refused_as_input(text):
    try:
        composition = Composition.parse(text)
    except InputError:
        return

    assert Composition.parse(str(composition)) == composition


def test_empty_composition_is_refused():
    with pytest.raises(InputError):
        Composition(())


def test_same_domain_in_two_versions_is_refused():
    with pytest.raises(InputError, match="'legal' twice"):
        Composition((Term("legal", "1"), Term("legal", "2")))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_term_refuses_invalid_weights(weight):
    with pytest.raises(InputError):
        Term("legal", None, weight)
