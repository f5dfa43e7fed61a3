"""Read, check and split the text of a domain, and find the held-out part of a stored version again.

Nothing heavy is imported here, so a command can refuse a name or a row before torch is loaded.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...adapters.composition import GENERAL
from ...domains.data.catalog import builtin_domains, find_domain
from ...domains.data.corpus import (
    Source,
    check_corpus,
    corpus_counts,
    corpus_digest,
    limit_bytes,
    read_examples,
    split,
)
from ...domains.data.documents import split_documents
from ...domains.data.example import Example
from ...domains.data.row_list import RowList
from ...domains.data.spec import DomainSpec
from ...domains.errors import ConflictError, InputError, LoraryError
from ...domains.names import check_name
from ...domains.scoring.questions import find_labels, find_questions
from ..store.blobs import sha256_of
from ..store.manifest import PackManifest
from ..store.store import Store

HELD_OUT = 0.15  # share of the rows that is held out
BY_DOCUMENT = "documents"  # how rows are split; before, by the content of each row
FRESH = "fresh"  # the mode of retraining that inherits nothing from the parent
UNKNOWN_LICENSE = "unknown"
MAX_SCORED_BYTES = 120_000  # maximum of held-out text that is scored
MAX_QUESTIONS = 400


@dataclass(frozen=True, kw_only=True)
class DomainData:
    """Examples of a domain, split, and their description for the manifest."""

    train: list[Example]
    held_out: list[Example]
    record: dict[str, Any]
    raw: bool = False  # whether prompts and completions are read without the base's chat template
    sources: list[str | RowList]  # for this machine only: absolute paths, names of Hub data sets, and rows in memory


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Texts and questions that a domain is measured on."""

    name: str
    texts: tuple[Example, ...]
    questions: tuple[Example, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Digest of the content, in this order."""
        parts = [b"".join(example.digest() for example in part) for part in (self.texts, self.questions)]
        if any(example.prompt and not example.raw for example in (*self.texts, *self.questions)):
            parts.append(b"chat")  # digests of raw prompts are older than chat templates around them
        return sha256_of(b"".join(sha256_of(part).encode() for part in parts))


def check_new_name(store: Store, name: str) -> None:
    """Raise if no domain can be added under this name.

    Raises:
        InputError: The name violates the grammar, or is that of the KP bank.
        ConflictError: The domain exists.
    """
    check_name(name)
    if name == GENERAL:
        raise InputError(
            "'general' is the name of the KP bank, which init trains.", fix="choose another name for the domain"
        )
    if store.versions(name):
        raise ConflictError(
            f"There already is a domain named {name!r}.",
            cause=f"its versions: {', '.join(map(str, store.versions(name)))}",
            fix=f"train its next version: registry retrain {name} --data FILE; or choose another name",
        )


def spec_of(name: str, data: Sequence[Source]) -> DomainSpec:
    """Return the built-in spec of a domain, or a minimal spec for a domain with the user's own data.

    The user's data has neither description nor licence of a built-in domain, even under its name.

    Raises:
        NotFoundError: No data is given, and no built-in domain has this name.
    """
    if not data:
        return find_domain(name)
    return DomainSpec(name=name, description=f"{name}, from the user's own data", license=UNKNOWN_LICENSE)


def read_domain_data(spec: DomainSpec, data: Sequence[Source], *, raw: bool = False) -> DomainData:
    """Read the examples of a domain from the user's files or the bundled corpus, and split them by document.

    Args:
        raw: Whether prompts and completions are read without the base's chat template.

    Raises:
        CorpusError: A row is invalid; gives the number of further invalid rows.
        InputError: There are too few rows to split.
    """
    sources: list[Source] = list(data) or ([spec.corpus] if spec.corpus else [])
    examples = read_checked(sources, raw=raw)
    found = split_documents(examples, HELD_OUT)
    if not found.train or not found.held_out:
        raise InputError(
            f"The data of {spec.name!r} has too few different rows: at least two are needed, {len(examples)} given.",
            cause="one part is for training, the other is held out for measurements",
            fix="give more rows, or split a long text into several",
        )
    counts = corpus_counts(examples)
    record = {
        "files": [_file_name(source) for source in sources],
        "digest": corpus_digest(examples),
        "rows": counts.rows,
        "bytes": counts.bytes,
        "held_out": len(found.held_out),
        "held_out_share": HELD_OUT,
        "split": BY_DOCUMENT,
        "documents": found.documents,
        "held_out_documents": found.held_out_documents,
        "held_out_digest": corpus_digest(found.held_out),
        "problems": list(found.problems),
    }
    where = [_absolute(source) for source in sources]
    return DomainData(train=found.train, held_out=found.held_out, record=record, raw=raw, sources=where)


def read_checked(sources: Sequence[Source], *, raw: bool = False) -> list[Example]:
    """Return all examples of these sources; `raw` ones are read without the base's chat template.

    Raises:
        CorpusError: A row is invalid; gives the number of further invalid rows.
    """
    problems = check_corpus(sources)
    if len(problems) > 1:
        problems[0].cause = f"{len(problems)} rows are invalid; the next one: {problems[1].message}"
    if problems:
        raise problems[0]
    return _in_form(read_examples(sources), raw=raw)


def is_raw(manifest: PackManifest) -> bool:
    """Return whether a version reads prompts and completions as plain text, as all did before they were a chat's."""
    return manifest.train.get("chat") is not True


def _in_form(examples: Iterable[Example], *, raw: bool) -> list[Example]:
    return [replace(example, raw=raw) for example in examples]


def general_examples() -> list[Example]:
    """Return the held-out part of the bundled general corpus, which general text is measured on."""
    corpus = builtin_domains()[GENERAL].corpus
    assert corpus is not None
    return split(list(read_examples([corpus])), HELD_OUT)[1]


def stored_held_out(store: Store, manifest: PackManifest) -> list[Example]:
    """Return the held-out text of a stored version, read from its original files and checked by digest.

    Rows are in the form in which the version was trained on them: rendered by the chat template, or as they are.

    A version that was retrained in another mode than `fresh` also holds out what its parent holds out.

    Raises:
        InputError: The files are no longer on this machine, or have changed.
    """
    return without_duplicates(*(_held_out_of(store, one) for one in _training_lineage(store, manifest)))


def _held_out_of(store: Store, manifest: PackManifest) -> list[Example]:
    """Return what a version itself holds out, by the rule of its time."""
    examples, data = _examples_of(store, manifest), manifest.train["data"]
    if data.get("split") != BY_DOCUMENT:
        return split(examples, data["held_out_share"])[1]
    found = split_documents(examples, data["held_out_share"]).held_out
    if corpus_digest(found) != data["held_out_digest"]:
        raise InputError(
            f"The held-out rows of {manifest.name}@{manifest.version} are not those of its training.",
            cause=f"expected {data['held_out_digest']}, found {corpus_digest(found)}: rows name other documents now",
            fix=f"give held-out text: registry evaluate {manifest.name} --data FILE",
        )
    return found


def held_out_at_hand(store: Store, manifest: PackManifest, *, max_bytes: int) -> list[Example]:
    """Return the held-out text of a stored version where it is quickly read: from files of this machine, not too large.

    Elsewhere none is returned.
    """
    data = [one.train.get("data") or {} for one in _training_lineage(store, manifest)]
    is_local = not any(_is_hub_data(str(file)) for one in data for file in one.get("files", ()))
    if not is_local or sum(one.get("bytes", max_bytes + 1) for one in data) > max_bytes:
        return []
    try:
        return stored_held_out(store, manifest)
    except InputError:
        return []


def without_duplicates(*parts: list[Example]) -> list[Example]:
    """Return the examples of all parts, each once."""
    return list({example.digest(): example for part in parts for example in part}.values())


def _training_lineage(store: Store, manifest: PackManifest) -> list[PackManifest]:
    """Return the versions whose data a version was trained on, oldest first: itself, and its parents unless fresh."""
    if manifest.parent is None or manifest.lineage.get("mode") == FRESH:
        return [manifest]
    parents = [older for older in store.history(manifest.name) if older.version == manifest.parent]
    return [one for parent in parents for one in _training_lineage(store, parent)] + [manifest]


def _examples_of(store: Store, manifest: PackManifest) -> list[Example]:
    if not manifest.is_routed:
        raise InputError(
            f"{manifest.name}@{manifest.version} was imported without text: there is nothing to measure it on.",
            fix=f"import it under another name, with text: registry import OTHER-{manifest.name} ADAPTER --data FILE",
        )
    data = manifest.train.get("data") or {"digest": "unknown", "files": ["unknown"]}
    for sources in _known_sources(store, manifest):
        try:
            examples = _in_form(read_examples(sources), raw=is_raw(manifest))
        except LoraryError:
            continue
        if corpus_digest(examples) == data["digest"]:
            return examples
    raise InputError(
        f"The data of {manifest.name}@{manifest.version} is not on this machine, or has changed.",
        cause=f"its digest is {data['digest']}, its files were {', '.join(data['files'])}",
        fix=f"give held-out text: registry evaluate {manifest.name} --data FILE",
    )


def find_held_out(
    store: Store, manifest: PackManifest, *, data: Sequence[Source] = (), max_bytes: int, with_questions: bool
) -> HeldOut:
    """Return what a stored version is measured on: its held-out rows, and the questions among them or of its spec.

    Args:
        data: Held-out rows to use instead.
        max_bytes: Maximum number of bytes of text.
        with_questions: Include questions.
    """
    held_out = read_checked(data, raw=is_raw(manifest)) if data else stored_held_out(store, manifest)
    questions: list[Example] = []
    if with_questions:
        # all of the data: a label may be missing in the held-out rows
        lineage = [] if data else _training_lineage(store, manifest)
        known = held_out if data else without_duplicates(*(_examples_of(store, one) for one in lineage))
        questions = find_questions(held_out, find_labels(known)) or domain_questions(store, manifest)
    return HeldOut(
        name=manifest.name,
        texts=tuple(limit_bytes(held_out, max_bytes)),
        questions=tuple(questions[:MAX_QUESTIONS]),
    )


def general_text(*, max_bytes: int) -> HeldOut:
    """Return the general text that every composition is measured on."""
    return HeldOut(name=GENERAL, texts=tuple(limit_bytes(general_examples(), max_bytes)))


def domain_questions(store: Store, manifest: PackManifest) -> list[Example]:
    """Return the questions of a built-in domain, in the form that the version reads; none for other domains.

    A version that was trained on other text alone is another domain, though its name is the same; but KP is always
    asked general questions.
    """
    spec = builtin_domains().get(manifest.name)
    if spec is None or spec.questions is None or not (manifest.name == GENERAL or _is_bundled(store, manifest, spec)):
        return []
    return _in_form(read_examples([spec.questions]), raw=is_raw(manifest))


def _is_bundled(store: Store, manifest: PackManifest, spec: DomainSpec) -> bool:
    """Return whether a version was trained on the bundled corpus, or one that it was retrained from."""
    bundled = corpus_digest(read_examples([spec.corpus])) if spec.corpus else None
    return any((one.train.get("data") or {}).get("digest") == bundled for one in _training_lineage(store, manifest))


def _known_sources(store: Store, manifest: PackManifest) -> list[list[Source]]:
    candidates: list[list[Source]] = []
    # the last part only: the manifest may come from an untrusted source
    run = store.runs / Path(str(manifest.train.get("run"))).name / "run.json"
    if run.is_file():
        sources = json.loads(run.read_text(encoding="utf-8"))["sources"]
        candidates.append([s if s.startswith("hf:") else Path(s) for s in sources])
    spec = builtin_domains().get(manifest.name)
    if spec and spec.corpus:
        candidates.append([spec.corpus])
    return candidates


def _file_name(source: Source) -> str:
    """Return the name of a source in the manifest: without folders, which are private."""
    return str(source) if _is_hub_data(source) or isinstance(source, RowList) else Path(str(source)).name


def _absolute(source: Source) -> str | RowList:
    if isinstance(source, RowList):
        return source
    return str(source) if _is_hub_data(source) else str(Path(str(source)).resolve())


def _is_hub_data(source: Source) -> bool:
    return str(source).startswith("hf:")
