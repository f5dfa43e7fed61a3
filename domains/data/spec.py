"""Domain specs: TOML files that describe a domain and where its data is.

    description = "Clinical notes, pharmacology, anatomy."
    license = "Apache-2.0"
    corpus = "corpus.jsonl"           # optional; relative to the folder of the TOML file
    questions = "questions.jsonl"     # optional

    [[hub]]                           # optional, any number: larger data sets on the Hugging Face Hub
    id = "qiaojin/PubMedQA"
    config = "pqa_artificial"         # optional
    split = "train"                   # optional
    columns = { prompt = "question", completion = "long_answer" }     # optional: row key = column
    note = "MIT"                      # optional

`name` is optional in a file; the default is the name of its folder. Unknown and missing keys and values of the wrong
type are errors. Paths are not checked until a file is read.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, NotFoundError
from ..names import check_name

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


@dataclass(frozen=True, kw_only=True)
class HubData:
    """Data set on the Hugging Face Hub, and the columns to read."""

    id: str  # owner/name
    config: str | None = None
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)  # row key -> column; empty: unchanged
    note: str = ""  # licence and description

    @classmethod
    def from_dict(cls, data: object, *, source: str | Path) -> "HubData":
        """Return the data set that a `[[hub]]` table describes.

        Raises:
            InputError: A key is unknown, missing or of the wrong type.
        """
        table = _Table(data, source)
        table.check_keys(required={"id"}, optional={"config", "split", "columns", "note"})
        return cls(
            id=check_hub_id(table.text("id"), source=source),
            config=table.optional_text("config"),
            split=table.optional_text("split") or "train",
            columns=table.texts("columns"),
            note=table.optional_text("note") or "",
        )

    @classmethod
    def parse(cls, text: str) -> "HubData":
        """Parse `hf:owner/name[:config[:split]]`, the inverse of `str`; the config may be empty.

        Columns and note are not part of the text.

        Raises:
            InputError: The text has another form.
        """
        name, config, split, *more = [*text.removeprefix("hf:").split(":"), "", ""]
        if len(more) > 2 or text.endswith(":"):
            raise InputError(f"{text!r} is not a valid Hub data set.", fix="write hf:OWNER/NAME[:CONFIG[:SPLIT]]")
        return cls(id=check_hub_id(name, source=text), config=config or None, split=split or "train")

    def __str__(self) -> str:
        split = "" if self.split == "train" else f":{self.split}"
        return f"hf:{self.id}" + (f":{self.config or ''}" if self.config or split else "") + split


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """Description of a domain, and the paths of its corpus and questions."""

    name: str
    description: str
    license: str  # SPDX identifier of the corpus
    corpus: Path | None = None  # rows to train on
    questions: Path | None = None  # rows with choices, for evaluation
    hub: tuple[HubData, ...] = ()

    @classmethod
    def from_dict(cls, data: object, *, source: str | Path, folder: Path | None = None) -> "DomainSpec":
        """Return the spec that parsed TOML describes; `corpus` and `questions` are relative to `folder`.

        Raises:
            InputError: A key is unknown, missing or of the wrong type, or the name is not valid.
        """
        table = _Table(data, source)
        table.check_keys(required={"name", "description", "license"}, optional={"corpus", "questions", "hub"})
        return cls(
            name=check_name(table.text("name")),
            description=table.text("description"),
            license=table.text("license"),
            corpus=table.optional_path("corpus", folder),
            questions=table.optional_path("questions", folder),
            hub=tuple(HubData.from_dict(row, source=f"{source}, [[hub]]") for row in table.rows("hub")),
        )

    @classmethod
    def load(cls, path: Path) -> "DomainSpec":
        """Read a spec from a TOML file; the default name is that of its folder (`medicine/domain.toml`).

        Raises:
            NotFoundError: The file does not exist.
            InputError: The file is not TOML, or not a domain spec.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise NotFoundError(f"There is no domain spec {path}.") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path} cannot be read as a domain spec.", cause=str(error)) from error
        name = path.parent.name if path.name == "domain.toml" else path.stem
        return cls.from_dict({"name": name} | data, source=path, folder=path.parent)


def check_hub_id(text: str, *, source: str | Path) -> str:
    """Return `text` unchanged if it is the id of a Hub data set.

    Raises:
        InputError: The text is not `owner/name`.
    """
    if not re.fullmatch(_HUB_ID, text):
        raise InputError(f"{source}: {text!r} is not a valid Hub data set id.", cause="expected 'owner/name'")
    return text


class _Table:
    """Parsed TOML table with type-checked access."""

    def __init__(self, data: object, source: str | Path):
        if not isinstance(data, dict):
            raise InputError(f"{source}: expected a table, found {_kind(data)}.")
        self.data: dict[str, Any] = data
        self.source = source

    def check_keys(self, *, required: set[str], optional: set[str]) -> None:
        known = ", ".join(sorted(required | optional))
        if unknown := sorted(self.data.keys() - required - optional):
            raise InputError(f"{self.source}: unknown key {_quoted(unknown)}.", fix=f"known keys: {known}")
        if missing := sorted(required - self.data.keys()):
            raise InputError(f"{self.source}: missing key {_quoted(missing)}.", fix=f"known keys: {known}")

    def text(self, key: str) -> str:
        value = self.data[key]
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(key, "a non-empty string")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if key in self.data else None

    def optional_path(self, key: str, folder: Path | None) -> Path | None:
        text = self.optional_text(key)
        return None if text is None else (folder or Path()) / text

    def texts(self, key: str) -> dict[str, str]:
        value = self.data.get(key, {})
        if not isinstance(value, dict) or not all(isinstance(item, str) and item for item in value.values()):
            raise self._wrong(key, "a table of strings")
        return dict(value)

    def rows(self, key: str) -> list[object]:
        value = self.data.get(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, "an array of tables")
        return value

    def _wrong(self, key: str, expected: str) -> InputError:
        found = "an empty string" if self.data[key] == "" else _kind(self.data[key])
        return InputError(f"{self.source}: key {key!r} is {found}, expected {expected}.")


def _quoted(keys: list[str]) -> str:
    return ", ".join(repr(key) for key in keys)


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", str: "a string", int: "a number", float: "a number", list: "a list", dict: "a table"}
    return kinds.get(type(value), type(value).__name__)
