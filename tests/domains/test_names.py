import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.errors import InputError
from lorary.domains.names import NAME_PATTERN, check_alias, check_name, is_name, parse_selector


@pytest.mark.parametrize("name", ["a", "7", "medicine", "contract-law", "a_b", "a" * 64, "2024", "general"])
def test_valid_name_is_returned_unchanged(name):
    assert check_name(name) == name
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", "_a", "A", "a b", "a.b", "a/b", "..", "a@b", "a:b", "a+b", "a" * 65, "é", "a\n", "\u0661", "a\0"],
)
def test_invalid_name_is_refused(name):
    with pytest.raises(InputError, match="cannot be a domain name") as caught:
        check_name(name)

    assert repr(name) in caught.value.message
    assert caught.value.cause
    assert caught.value.fix
    assert not is_name(name)


@pytest.mark.parametrize("name", ["latest", "base", "all", "none", "router", "con", "nul", "com1", "lpt9"])
def test_reserved_name_is_refused(name):
    with pytest.raises(InputError, match="reserved"):
        check_name(name)


@given(st.from_regex(NAME_PATTERN, fullmatch=True))
def test_check_name_agrees_with_is_name(name):
    if is_name(name):
        assert check_name(name) == name
    else:
        with pytest.raises(InputError):
            check_name(name)


@pytest.mark.parametrize("alias", ["latest", "production", "v2", "base"])
def test_valid_alias_is_returned_unchanged(alias):
    assert check_alias(alias) == alias


@pytest.mark.parametrize("alias", ["", "2", "007", "con", "Prod", "a/b", ".."])
def test_invalid_alias_is_refused(alias):
    with pytest.raises(InputError, match="cannot be an alias"):
        check_alias(alias)


@pytest.mark.parametrize(("selector", "expected"), [("1", 1), ("20", 20), ("latest", "latest"), ("v2", "v2")])
def test_selector_is_a_version_or_an_alias(selector, expected):
    assert parse_selector(selector) == expected


@pytest.mark.parametrize("selector", ["0", "02", "1234567890", "-1", "1.5", "", "\u00b2"])
def test_invalid_selector_is_refused(selector):
    with pytest.raises(InputError):
        parse_selector(selector)
