"""A corpus: examples read from files, the Hub or memory, checked, split and described by a digest.

`as_sources` takes data in any form that a caller may give. `read_examples` stops at the first bad row; `check_corpus`
collects bad rows. File formats are in files.py, the keys of rows in rows.py. Split and digest depend on the content of
the examples only: not on their order, ids or source.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import CorpusError, InputError, NotFoundError
from .example import Example
from .files import READERS, Rows, read_rows
from .hub import read_hub, read_parquet
from .row_list import RowList
from .rows import to_example
from .spec import HubData

# a file, `hf:owner/name[:config[:split]]`, a data set of a domain spec, or rows in memory
Source: TypeAlias = Path | str | HubData | RowList
# what `as_sources` takes: one source, rows (dicts, a `datasets.Dataset`), or a list of them
Data: TypeAlias = str | os.PathLike[str] | HubData | RowList | Iterable[Any] | None

_SUFFIXES = ", ".join([*READERS, ".parquet"])
_COMPRESSED = (".gz", ".xz")
_MAX_NAME = 255  # characters; longer names are most likely text in the place of a path
_DATA_FIX = 'give a path, "hf:OWNER/NAME", rows such as [{"text": "..."}], a datasets.Dataset, or a list of these'


@dataclass(frozen=True, kw_only=True)
class CorpusCounts:
    """Number of rows and bytes of a corpus."""

    rows: int
    bytes: int  # UTF-8 bytes of prompts, completions and messages with all fields; choices are not counted


def as_sources(data: Data) -> list[Source]:
    """Return the sources that `data` names or contains, in order; all rows directly in a list become one source.

    Args:
        data: A path, `hf:owner/name[:config[:split]]`, a list of rows (dicts), a `datasets.Dataset`, a list of any of
            these, or None for no sources. A string is always one name. Rows are checked when they are read.

    Raises:
        InputError: `data`, or a part of it, has another type, or can be iterated only once.
    """
    return _with_unique_names(_sources(data, "data"))


def read_examples(sources: Sequence[Source]) -> Iterator[Example]:
    """Yield the examples of all sources in order, reading lazily.

    Raises:
        CorpusError: A row cannot be used, or a file has no rows; names the file and the line.
        NotFoundError: A file does not exist.
        InputError: A folder, an unknown suffix, or data that needs a package which is not installed.
    """
    for source in sources:
        for found in _read(source):
            if isinstance(found, CorpusError):
                raise found
            yield found


def check_corpus(sources: Sequence[Source], limit: int = 20) -> list[CorpusError]:
    """Return the errors of rows that cannot be used, at most `limit`.

    Raises:
        NotFoundError: A file does not exist.
        InputError: A folder, an unknown suffix, or data that needs a package which is not installed.
    """
    errors = (found for source in sources for found in _read(source) if isinstance(found, CorpusError))
    return list(islice(errors, limit))


def is_held_out(example: Example, fraction: float) -> bool:
    """Return whether an example belongs to the held-out set.

    True if the SHA-256 of its content is below `fraction`. So the result does not change when rows are added or
    shuffled, equal rows are never separated, and a larger fraction only adds rows.
    """
    return is_below(example.digest(), fraction)


def is_below(digest: bytes, fraction: float) -> bool:
    """Return whether the first 8 bytes of a digest, as a number in [0, 1), are below `fraction`."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}, expected 0 to 1")
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split(examples: Iterable[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Split examples into training set and held-out set, keeping the order.

    By `is_held_out`. If that leaves one set empty although there are two different examples, the one with the smallest
    digest (the largest, if the training set is empty) is moved, with all equal ones.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected more than 0 and less than 1")
    keyed = [(example, example.digest()) for example in examples]
    digests = {digest for _, digest in keyed}
    held_out = {digest for digest in digests if is_below(digest, fraction)}
    if len(digests) >= 2 and not held_out:
        held_out = {min(digests)}
    elif len(digests) >= 2 and held_out == digests:
        held_out = digests - {max(digests)}
    train = [example for example, digest in keyed if digest not in held_out]
    return train, [example for example, digest in keyed if digest in held_out]


def limit_bytes(examples: Iterable[Example], max_bytes: int | None) -> list[Example]:
    """Return the first examples with at most `max_bytes` target bytes in total, but at least one."""
    chosen: list[Example] = []
    total = 0
    for example in examples:
        total += example.target_bytes
        if chosen and max_bytes is not None and total > max_bytes:
            break
        chosen.append(example)
    return chosen


def corpus_digest(examples: Iterable[Example]) -> str:
    """Return `sha256:` and the SHA-256 of the sorted digests of the examples, independent of order, files and ids."""
    whole = hashlib.sha256()
    for digest in sorted(example.digest() for example in examples):
        whole.update(digest)
    return f"sha256:{whole.hexdigest()}"


def corpus_counts(examples: Iterable[Example]) -> CorpusCounts:
    """Count rows and UTF-8 bytes."""
    sizes = [_size(example) for example in examples]
    return CorpusCounts(rows=len(sizes), bytes=sum(sizes))


def _size(example: Example) -> int:
    texts = [example.prompt, example.completion, *(content for _, content in example.messages), example.more]
    return sum(len(text.encode()) for text in texts)


def _sources(data: object, where: str) -> Iterator[Source]:
    match data:
        case None:
            return
        case RowList() | HubData():
            yield data
        case str():
            yield data if data.startswith("hf:") else Path(data)
        case os.PathLike() if isinstance(os.fspath(data), str):
            yield Path(data)
        case list() | tuple():
            yield from _sources_of_list(data, where)
        case _:
            yield RowList(_checked_rows(data, where))


def _sources_of_list(items: Sequence[object], where: str) -> Iterator[Source]:
    rows = tuple(item for item in items if _is_row(item))
    first_row = next((position for position, item in enumerate(items) if _is_row(item)), None)
    for position, item in enumerate(items):
        if position == first_row:
            yield RowList(rows)
        elif not _is_row(item):
            yield from _sources(item, f"{where}[{position}]")


def _is_row(value: object) -> bool:
    return isinstance(value, Mapping) and not hasattr(value, "column_names")


def _checked_rows(data: object, where: str) -> Iterable[object]:
    """Return `data` if it yields rows every time it is iterated: a `datasets.Dataset`, or a collection of dicts."""
    if isinstance(data, Mapping):
        raise _not_rows(data, where)
    if isinstance(data, Iterator):
        fix = "give its path" if hasattr(data, "read") else f"make a list of it: {where}=list(rows)"
        raise InputError(f"{where} is {_type_of(data)}, which can be read only once.", fix=fix)
    # by its attributes: `datasets` is optional and slow to import
    if isinstance(data, Iterable) and (hasattr(data, "column_names") or any(map(_is_row, islice(data, 1)))):
        return data
    raise InputError(f"{where} is {_type_of(data)}, which is not a source of rows.", fix=_DATA_FIX)


def _not_rows(data: Mapping[Any, Any], where: str) -> InputError:
    if hasattr(data, "column_names"):
        splits = [str(split) for split in data]
        return InputError(
            f"{where} is {_type_of(data)}, which has several splits.",
            cause=f"its splits: {', '.join(splits) or 'none'}",
            fix=f"choose one, such as dataset[{splits[0]!r}]" if splits else _DATA_FIX,
        )
    return InputError(f"{where} is one row, expected a list of rows.", fix=f"put it into a list: {where}=[row]")


def _type_of(value: object) -> str:
    return f"of type {type(value).__name__!r}"


def _with_unique_names(sources: Iterable[Source]) -> list[Source]:
    """Append a number to names of row lists that occur again, so that errors are unambiguous."""
    found: list[Source] = []
    names: set[str] = set()
    for source in sources:
        if isinstance(source, RowList):
            name, number = source.name, 1
            while source.name in names:
                number += 1
                source = replace(source, name=f"{name} ({number})")
            names.add(source.name)
        found.append(source)
    return found


def _read(source: Source) -> Iterator[Example | CorpusError]:
    """Yield the examples of one source, and an error in place of each bad row."""
    is_empty = True
    for found in source.read() if isinstance(source, RowList) else _read_stored(source):
        is_empty = False
        yield found
    if is_empty:
        yield CorpusError(str(source), "has no rows")


def _read_stored(source: Path | str | HubData) -> Iterator[Example | CorpusError]:
    for row in _open(source):
        try:
            yield row if isinstance(row, CorpusError) else to_example(row, str(source))
        except CorpusError as error:
            yield error


def _open(source: Path | str | HubData) -> Rows:
    if isinstance(source, HubData):
        return read_hub(source)
    if str(source).startswith("hf:"):
        return read_hub(HubData.parse(Path(source).as_posix() if isinstance(source, Path) else source))
    path = Path(source)
    suffix = _check_file(path)
    return read_parquet(path) if suffix == ".parquet" else read_rows(path, suffix)


def _check_file(path: Path) -> str:
    """Return the suffix that names the format, without .gz or .xz."""
    fix = "check the path, or write hf:OWNER/NAME for a Hub data set"
    if len(str(path)) > _MAX_NAME:
        fix = 'give a path; a text is given as a row: [{"text": "..."}]'
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # no permission, or the name is too long
        raise InputError(f"{path} cannot be opened.", cause=error.strerror, fix=fix) from error
    if is_folder:
        raise InputError(f"{path} is a folder, expected a file.", fix=f"give files that end in {_SUFFIXES}")
    if not is_there:
        raise NotFoundError(f"There is no file {path}.", fix=fix)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    suffix = "".join(suffixes[-2:-1] if is_compressed else suffixes[-1:])
    if suffix not in READERS and (suffix != ".parquet" or is_compressed):
        found = f"the suffix {''.join(suffixes[-2:])!r}" if suffix else "no suffix of a known format"
        fix = f"use one of {_SUFFIXES}; all but .parquet also as .gz or .xz"
        raise InputError(f"{path}: unknown file format.", cause=f"it has {found}", fix=fix)
    return suffix
