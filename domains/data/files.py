"""Read the rows of data files, with the number of the line where each begins.

    .jsonl .ndjson    one JSON value per line; blank lines are skipped
    .json             a list of JSON values; a file that begins with `{` is read as JSONL
    .csv .tsv         a header, then rows; cells of `choices`, `messages` and `conversations` are JSON
    .txt .md          documents separated by two or more blank lines; without such a break the file is one document

Each may be compressed as .gz or .xz. A byte order mark is ignored. No line, record or document may be over 16 MiB.

Readers yield a CorpusError in place of a bad row, so that a caller can stop at the first or collect all of them. They
use the standard library only.
"""

import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import CorpusError
from .rows import Row

MAX_LINE_BYTES = 16 * 2**20
MAX_LIST_BYTES = 2**30  # a JSON list is read into memory
_TOO_LONG = f"is over {MAX_LINE_BYTES // 2**20} MiB"
_JSON_COLUMNS = ("choices", "messages", "conversations")
_OPENERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # pyright: ignore[reportAssignmentType]

Rows = Iterator[Row | CorpusError]


def read_rows(path: Path, suffix: str) -> Rows:
    """Yield the rows of a file in the format `suffix` (without .gz or .xz), and an error for each bad row."""
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield from READERS[suffix](path, file)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        yield CorpusError(path, f"the compressed data is damaged: {error}")
    except OSError as error:
        yield CorpusError(path, f"cannot be read: {error.strerror or error}")


def _read_jsonl(path: Path, file: IO[bytes]) -> Rows:
    for line, text in _lines(path, file):
        if isinstance(text, CorpusError):
            yield text
        elif text.strip():
            yield _parse_line(path, line, text)


def _parse_line(path: Path, line: int, text: str) -> Row | CorpusError:
    try:
        return Row(line, json.loads(text))
    except json.JSONDecodeError as error:
        return CorpusError(path, f"bad JSON at column {error.colno}: {error.msg}", line=line)
    except (ValueError, RecursionError) as error:  # such as 5,000 digits, or 100,000 nested lists
        return CorpusError(path, f"bad JSON: {error}", line=line)


def _read_json(path: Path, file: IO[bytes]) -> Rows:
    head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    if head.startswith(b"{"):
        yield from _read_jsonl(path, file)
        return
    data = file.read(MAX_LIST_BYTES + 1)
    if len(data) > MAX_LIST_BYTES:
        yield CorpusError(path, "is over 1 GiB", fix="convert it to JSONL, which is read line by line")
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield CorpusError(path, _not_utf8(error), line=data[: error.start].count(b"\n") + 1)
        return
    if text.strip():
        yield from _parse_list(path, text)


def _parse_list(path: Path, text: str) -> Rows:
    """Yield the items of a JSON list up to the first error, after which positions are unreliable."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _after(r"\s*\[\s*", text, 0)
    if position is None:
        found = text.lstrip()[:1]
        yield CorpusError(
            path, f"bad JSON: expected a list, found {found!r}", fix="write a list, or one row per line (.jsonl)"
        )
        return
    if _after(r"\]\s*$", text, position) is not None:
        return
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield CorpusError(path, f"bad JSON at column {error.colno}: {error.msg}", line=error.lineno)
            return
        except (ValueError, RecursionError) as error:
            yield CorpusError(path, f"bad JSON: {error}", line=line)
            return
        yield Row(line, value)
        if _after(r"\s*\]\s*$", text, end) is not None:
            return
        position = _after(r"\s*,\s*", text, end)
        if position is None:
            line += text.count("\n", counted, end)
            yield CorpusError(path, "bad JSON: expected ',' or the end of the list after an item", line=line)
            return


def _after(pattern: str, text: str, position: int) -> int | None:
    """Return the end of a match of `pattern` at `position`, or None."""
    found = re.compile(pattern).match(text, position)
    return found.end() if found else None


def _read_csv(path: Path, file: IO[bytes]) -> Rows:
    return _read_table(path, file, delimiter=",")


def _read_tsv(path: Path, file: IO[bytes]) -> Rows:
    return _read_table(path, file, delimiter="\t")


def _read_table(path: Path, file: IO[bytes], *, delimiter: str) -> Rows:
    problems: list[CorpusError] = []
    reader = csv.reader(_csv_lines(path, file, problems), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = _next_record(reader)
        except StopIteration:
            yield from problems
            return
        except csv.Error as error:
            yield CorpusError(path, f"bad row: {error}", line=line)
            continue
        yield from problems
        problems.clear()
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                yield CorpusError(path, "the header has a duplicate column", line=line)
                return
        else:
            yield _table_row(path, line, header, cells)


def _table_row(path: Path, line: int, header: list[str], cells: list[str]) -> Row | CorpusError:
    if len(cells) != len(header):
        return CorpusError(path, f"has {len(cells)} cells, the header has {len(header)}", line=line)
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for column in _JSON_COLUMNS:
        if cell := row.get(column):
            try:
                row[column] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                return CorpusError(path, f"column {column!r} holds bad JSON: {error}", line=line)
    return Row(line, row)


def _next_record(reader: Any) -> list[str]:
    # the limit is global and 128 KiB by default, too small for documents: raised for one record
    limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(limit)


def _csv_lines(path: Path, file: IO[bytes], problems: list[CorpusError]) -> Iterator[str]:
    # a blank line replaces an unreadable one: an exception here would end the reader
    for _, text in _lines(path, file):
        if isinstance(text, CorpusError):
            problems.append(text)
        yield "\n" if isinstance(text, CorpusError) else text


def _read_text(path: Path, file: IO[bytes]) -> Rows:
    document: list[str] = []
    began = size = blank_lines = 0
    for line, text in _lines(path, file):
        if isinstance(text, CorpusError):
            yield text
            continue
        if not text.strip():
            blank_lines += 1
            continue
        if document and blank_lines >= 2:
            yield _document(path, began, document, size)
            document, size = [], 0
        if not document:
            began, blank_lines = line, 0
        size += len(text) + blank_lines
        if size <= MAX_LINE_BYTES:
            document += ["\n"] * blank_lines + [text]
        blank_lines = 0
    if document:
        yield _document(path, began, document, size)


def _document(path: Path, line: int, lines: list[str], size: int) -> Row | CorpusError:
    if size > MAX_LINE_BYTES:
        return CorpusError(path, f"a document {_TOO_LONG}", line=line, fix="separate documents by two blank lines")
    return Row(line, {"text": "".join(lines).replace("\r\n", "\n").rstrip("\n")})


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str | CorpusError]]:
    """Yield decoded lines with their numbers, from 1; the rest of a line over the limit is skipped, not kept."""
    line = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(data) > MAX_LINE_BYTES:
            while data and not data.endswith(b"\n"):
                data = file.readline(MAX_LINE_BYTES)
            yield line, CorpusError(path, f"the line {_TOO_LONG}", line=line)
            continue
        try:
            yield line, data.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield line, CorpusError(path, _not_utf8(error), line=line)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"


READERS: dict[str, Callable[[Path, IO[bytes]], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_text,
    ".md": _read_text,
}
