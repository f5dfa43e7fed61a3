"""Parquet files and Hub data sets are read with `datasets`, which is optional."""

import sys
from types import SimpleNamespace

import pytest

from lorary.domains.data.corpus import read_examples
from lorary.domains.data.example import Example
from lorary.domains.data.spec import HubData
from lorary.domains.errors import InputError, NotFoundError, RemoteError

ROWS = [{"question": "1 + 1?", "answer": "2", "source": None}, {"question": "2 + 2?", "answer": "4", "source": "x"}]


@pytest.fixture
def hub(monkeypatch):
    """Fake `datasets` module that records calls, and returns rows or raises."""
    hub = SimpleNamespace(calls=[], rows=ROWS, error=None)

    def load_dataset(*names, **options):
        hub.calls.append((names, options))
        if hub.error:
            raise hub.error
        return iter(hub.rows)

    hub.module = SimpleNamespace(load_dataset=load_dataset, __version__="4.0.0")
    monkeypatch.setitem(sys.modules, "datasets", hub.module)
    return hub


@pytest.mark.parametrize("version", ["2.14.5", "3.6.0"])
def test_a_version_that_runs_scripts_of_data_sets_is_refused(hub, version):
    hub.module.__version__ = version

    with pytest.raises(InputError, match="execute code") as raised:
        list(read_examples(["hf:a/b"]))

    assert version in raised.value.cause
    assert not hub.calls


@pytest.mark.parametrize("name", ["hf:a/b", "rows.parquet"])
def test_missing_package_is_refused_with_the_command_to_install_it(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.parquet").touch()
    source = name if name.startswith("hf:") else tmp_path / name

    with pytest.raises(InputError) as raised:
        list(read_examples([source]))

    assert raised.value.fix == "pip install 'lorary[data]'"


def test_columns_of_a_hub_data_set_are_renamed(hub):
    data = HubData(id="a/b", config="c", split="test", columns={"prompt": "question", "completion": "answer"})

    examples = list(read_examples([data]))

    assert examples == [Example("1 + 1?", "2"), Example("2 + 2?", "4")]
    assert hub.calls == [(("a/b", "c"), {"split": "test", "streaming": True})]


def test_hub_name_may_be_written_as_text(hub):
    hub.rows = [{"text": "One."}]

    assert list(read_examples(["hf:a/b:c"])) == [Example(completion="One.")]
    assert hub.calls == [(("a/b", "c"), {"split": "train", "streaming": True})]


def test_parquet_files_are_read_as_a_stream(hub, tmp_path):
    hub.rows = [{"text": "One."}]
    path = tmp_path / "rows.parquet"
    path.touch()

    assert list(read_examples([path])) == [Example(completion="One.")]
    assert hub.calls == [(("parquet",), {"data_files": str(path), "split": "train", "streaming": True})]


def test_error_has_data_set_and_row_number(hub):
    hub.rows = [{"text": "One."}, {"text": ""}]

    with pytest.raises(InputError, match=r"hf:a/b:2: 'text' is empty"):
        list(read_examples(["hf:a/b"]))


def test_missing_column_is_refused_with_the_known_ones(hub):
    with pytest.raises(InputError) as raised:
        list(read_examples([HubData(id="a/b", columns={"text": "body"})]))

    assert "'body'" in str(raised.value)
    assert "question, answer, source" in str(raised.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("no such data set"), NotFoundError),
        (ConnectionError("no route"), RemoteError),
        (ValueError("BuilderConfig 'c' not found"), InputError),
    ],
)
def test_errors_of_the_package_are_translated(hub, error, expected):
    hub.error = error

    with pytest.raises(expected) as raised:
        list(read_examples(["hf:a/b"]))

    assert raised.value.cause == str(error)
