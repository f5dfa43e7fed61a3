"""Stream rows from Parquet files and Hugging Face Hub data sets, using the optional package `datasets`."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, NotFoundError, RemoteError
from .rows import Row
from .spec import HubData

MIN_MAJOR = 4  # earlier versions of `datasets` run the Python script of a data set


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, numbered from 1.

    Raises:
        InputError: `datasets` is not installed or too old, or the file is not Parquet.
    """
    datasets = _datasets(f"{path} is a Parquet file")
    try:
        table = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
        yield from _rows(table, {})
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise InputError(f"{path} cannot be read as Parquet.", cause=str(error)) from error


def read_hub(data: HubData) -> Iterator[Row]:
    """Yield the rows of a Hub data set, numbered from 1, with columns renamed as `data.columns` specifies.

    Raises:
        NotFoundError: The data set does not exist.
        InputError: `datasets` is not installed or too old, or the data set has no such config, split or column.
        RemoteError: The Hub cannot be reached.
    """
    datasets = _datasets(f"{data} is a data set of the Hub")
    try:
        table = datasets.load_dataset(data.id, data.config, split=data.split, streaming=True)
        yield from _rows(table, dict(data.columns))
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no data set {data.id!r} on the Hub.", cause=str(error)) from error
    except OSError as error:  # connection errors, and huggingface_hub's HfHubHTTPError
        raise RemoteError(f"{data} cannot be read from the Hub.", cause=str(error)) from error
    except ValueError as error:
        raise InputError(
            f"{data} cannot be read.", cause=str(error), fix="check config and split on the page of the data set"
        ) from error


def _rows(table: Iterable[dict[str, Any]], columns: dict[str, str]) -> Iterator[Row]:
    for number, row in enumerate(table, start=1):
        if missing := sorted(set(columns.values()) - row.keys()):
            raise InputError(f"The data set has no column {missing[0]!r}.", cause=f"its columns: {', '.join(row)}")
        yield Row(number, {key: row[column] for key, column in columns.items()} if columns else row)


def _datasets(why: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        fix = "pip install 'lorary[data]'"
        raise InputError(f"{why}, and the package 'datasets' is not installed.", fix=fix) from error
    if int(datasets.__version__.partition(".")[0]) < MIN_MAJOR:
        raise InputError(
            f"{why}, and the installed version of the package 'datasets' can execute code of a data set.",
            cause=f"expected {MIN_MAJOR}.0 or later, found {datasets.__version__}",
            fix=f"pip install 'datasets>={MIN_MAJOR}'",
        )
    return datasets
