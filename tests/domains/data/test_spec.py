"""Domain specs in TOML, and errors of invalid ones."""

from pathlib import Path

import pytest

from lorary.domains.data.spec import DomainSpec, HubData
from lorary.domains.errors import InputError, NotFoundError

COMPLETE = {"name": "law", "description": "Contracts.", "license": "Apache-2.0"}


def test_paths_are_relative_to_the_folder_of_the_file(tmp_path):
    path = tmp_path / "law" / "domain.toml"
    path.parent.mkdir()
    path.write_text('description = "Contracts."\nlicense = "MIT"\ncorpus = "rows.jsonl"\n[[hub]]\nid = "a/b"\n')

    spec = DomainSpec.load(path)

    assert spec == DomainSpec(
        name="law",
        description="Contracts.",
        license="MIT",
        corpus=tmp_path / "law" / "rows.jsonl",
        hub=(HubData(id="a/b"),),
    )


def test_default_name_of_another_file_is_its_stem(tmp_path):
    path = tmp_path / "tax.toml"
    path.write_text('description = "Taxes."\nlicense = "MIT"\n')

    assert DomainSpec.load(path).name == "tax"


def test_spec_is_hashable():
    spec = DomainSpec.from_dict(COMPLETE | {"hub": [{"id": "a/b", "columns": {"text": "body"}}]}, source="test")

    assert {spec: 1}[spec] == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"colour": 1, "size": 2}, "'colour', 'size'"),
        ({"description": 3}, "'description' is a number"),
        ({"license": " "}, "'license' is a string, expected a non-empty string"),
        ({"license": ""}, "'license' is an empty string"),
        ({"corpus": ["a"]}, "'corpus' is a list"),
        ({"hub": "a/b"}, "'hub' is a string"),
        ({"hub": [3]}, "expected a table, found a number"),
        ({"hub": [{}]}, "missing key 'id'"),
        ({"hub": [{"id": "a/b", "subset": "c"}]}, "unknown key 'subset'"),
        ({"hub": [{"id": "no-owner"}]}, "'no-owner'"),
        ({"hub": [{"id": "a/b", "columns": {"text": 1}}]}, "'columns' is a table"),
        ({"name": "Law & Order"}, "Law & Order"),
    ],
)
def test_error_names_the_key(change, problem):
    with pytest.raises(InputError) as raised:
        DomainSpec.from_dict(COMPLETE | change, source="law.toml")

    assert problem in str(raised.value)


def test_error_names_source_and_all_missing_keys():
    with pytest.raises(InputError, match=r"law\.toml: missing key 'description', 'license'"):
        DomainSpec.from_dict({"name": "law"}, source="law.toml")


def test_error_of_bad_toml_has_file_and_line(tmp_path):
    path = tmp_path / "law.toml"
    path.write_text("description = \n")

    with pytest.raises(InputError, match=r"law\.toml") as raised:
        DomainSpec.load(path)

    assert "line 1" in str(raised.value)


def test_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        DomainSpec.load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("hf:a/b", HubData(id="a/b")),
        ("hf:a/b:c", HubData(id="a/b", config="c")),
        ("hf:a/b::test", HubData(id="a/b", split="test")),
        ("hf:a/b.x:c:test", HubData(id="a/b.x", config="c", split="test")),
    ],
)
def test_hub_names_are_parsed_and_formatted(text, data):
    assert HubData.parse(text) == data
    assert str(data) == text


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/b/c", "hf:a/b:", "hf:a/b:c:d:e", "hf:../b"])
def test_other_hub_names_are_refused(text):
    with pytest.raises(InputError):
        HubData.parse(text)


def test_specs_are_read_without_torch():
    import subprocess
    import sys

    program = "import sys, lorary.domains.data.catalog, lorary.domains.data.corpus; assert 'torch' not in sys.modules"

    assert subprocess.run([sys.executable, "-c", program], cwd=Path.home(), check=False).returncode == 0
