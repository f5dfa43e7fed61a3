"""A corpus: examples read from files or the Hub, checked, split and described by a digest.

`read_examples` stops at the first bad row; `check_corpus` collects them. Which files are read and how is in files.py,
which rows mean what in rows.py. The split and the digest depend on the content of the examples alone: not on their
order, their ids or the file that they come from.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import CorpusError, InputError, NotFoundError
from .example import Example
from .files import READERS, Rows, read_rows
from .hub import read_hub, read_parquet
from .rows import to_example
from .spec import HubData

Source = Path | str | HubData  # a file, `hf:owner/name[:config[:split]]`, or a data set of a domain spec

_SUFFIXES = ", ".join([*READERS, ".parquet"])
_COMPRESSED = (".gz", ".xz")


@dataclass(frozen=True, kw_only=True)
class CorpusCounts:
    """How much text there is."""

    rows: int
    bytes: int  # UTF-8 bytes of prompts, completions and messages; choices are not counted


def read_examples(sources: Sequence[Source]) -> Iterator[Example]:
    """The examples of all sources, in order, each read as it is asked for.

    Raises:
        CorpusError: A row cannot be used, or a file holds none; names the file and the line.
        NotFoundError: There is no such file.
        InputError: A folder, an unknown suffix, or data that needs a package which is not installed.
    """
    for source in sources:
        for found in _read(source):
            if isinstance(found, CorpusError):
                raise found
            yield found


def check_corpus(sources: Sequence[Source], limit: int = 20) -> list[CorpusError]:
    """What is wrong with the rows of all sources, at most `limit` of them; empty if every row can be used.

    Raises:
        NotFoundError: There is no such file.
        InputError: A folder, an unknown suffix, or data that needs a package which is not installed.
    """
    errors = (found for source in sources for found in _read(source) if isinstance(found, CorpusError))
    return list(islice(errors, limit))


def is_held_out(example: Example, fraction: float) -> bool:
    """Whether the example belongs to the held-out part.

    True if the first 8 bytes of the SHA-256 of its content, as a number in [0, 1), are below the fraction. So the
    answer never changes when rows are added or shuffled, equal rows are never divided, and a larger fraction only adds
    rows.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}, expected 0 to 1")
    return int.from_bytes(example.digest()[:8], "big") < fraction * 2**64


def split(examples: Iterable[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """The examples to train on and the held-out ones, both in the given order.

    The rule is `is_held_out`. If that leaves one side empty although there are two different examples, the one with the
    smallest digest (largest, if nothing is left to train on) changes sides, with all that equal it.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected more than 0 and less than 1")
    keyed = [(example, example.digest()) for example in examples]
    digests = {digest for _, digest in keyed}
    held_out = {digest for example, digest in keyed if is_held_out(example, fraction)}
    if len(digests) >= 2 and not held_out:
        held_out = {min(digests)}
    elif len(digests) >= 2 and held_out == digests:
        held_out = digests - {max(digests)}
    train = [example for example, digest in keyed if digest not in held_out]
    return train, [example for example, digest in keyed if digest in held_out]


def first_within(examples: Iterable[Example], max_bytes: int | None) -> list[Example]:
    """The first examples whose target bytes together stay within a limit; at least one."""
    chosen: list[Example] = []
    total = 0
    for example in examples:
        total += example.target_bytes
        if chosen and max_bytes is not None and total > max_bytes:
            break
        chosen.append(example)
    return chosen


def corpus_digest(examples: Iterable[Example]) -> str:
    """`sha256:` and the SHA-256 of the sorted digests of the examples: the same for any order, files and ids."""
    whole = hashlib.sha256()
    for digest in sorted(example.digest() for example in examples):
        whole.update(digest)
    return f"sha256:{whole.hexdigest()}"


def corpus_counts(examples: Iterable[Example]) -> CorpusCounts:
    """How many rows and UTF-8 bytes there are."""
    sizes = [_size(example) for example in examples]
    return CorpusCounts(rows=len(sizes), bytes=sum(sizes))


def _size(example: Example) -> int:
    texts = [example.prompt, example.completion, *(content for _, content in example.messages)]
    return sum(len(text.encode()) for text in texts)


def _read(source: Source) -> Iterator[Example | CorpusError]:
    """The examples of one source; a bad row is the error that describes it."""
    is_empty = True
    for row in _open(source):
        is_empty = False
        try:
            yield row if isinstance(row, CorpusError) else to_example(row, str(source))
        except CorpusError as error:
            yield error
    if is_empty:
        yield CorpusError(str(source), "is empty: it holds no row")


def _open(source: Source) -> Rows:
    if isinstance(source, HubData):
        return read_hub(source)
    if str(source).startswith("hf:"):
        return read_hub(HubData.parse(Path(source).as_posix() if isinstance(source, Path) else source))
    path = Path(source)
    suffix = _check_file(path)
    return read_parquet(path) if suffix == ".parquet" else read_rows(path, suffix)


def _check_file(path: Path) -> str:
    """The suffix that names the format, without .gz or .xz."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a file.", fix=f"name files that end in {_SUFFIXES}")
    if not path.exists():
        raise NotFoundError(
            f"There is no file {path}.", fix="check the path, or write hf:OWNER/NAME for a Hub data set"
        )
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    suffix = "".join(suffixes[-2:-1] if is_compressed else suffixes[-1:])
    if suffix not in READERS and (suffix != ".parquet" or is_compressed):
        found = f"the suffix {''.join(suffixes[-2:])!r}" if suffix else "no suffix that names a format"
        fix = f"use one of {_SUFFIXES}; all but .parquet also as .gz or .xz"
        raise InputError(f"{path}: the format of the file is unknown.", cause=f"it has {found}", fix=fix)
    return suffix
