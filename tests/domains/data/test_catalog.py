"""Specs of built-in domains and of a catalog folder."""

import pytest

from lorary.domains.data.catalog import builtin_domains, domains_in, find_domain
from lorary.domains.errors import NotFoundError


@pytest.fixture
def folder(tmp_path):
    for name in ("tax", "medicine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "domain.toml").write_text('description = "Our own."\nlicense = "MIT"\n')
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_builtin_domains_are_known_by_name():
    assert list(builtin_domains()) == ["code", "finance", "general", "legal", "medicine"]


def test_folders_without_a_spec_are_skipped(folder):
    assert list(domains_in(folder)) == ["medicine", "tax"]


def test_specs_of_a_folder_take_precedence_over_built_in_ones(folder):
    assert find_domain("tax", folder).name == "tax"
    assert find_domain("medicine", folder).description == "Our own."
    assert find_domain("legal", folder) == find_domain("legal")


def test_unknown_name_is_refused_with_known_names_and_the_closest(folder):
    with pytest.raises(NotFoundError) as raised:
        find_domain("leagl", folder)

    assert "code, finance, general, legal, medicine, tax" in str(raised.value)
    assert "did you mean 'legal'?" in str(raised.value)


def test_missing_folder_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        find_domain("legal", tmp_path / "nowhere")
