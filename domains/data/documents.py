"""Documents: rows that must stay on one side of a split, since they are of one text or nearly the same.

Rows are of one document if they name the same (`doc`, `document`, `doc_id`, `document_id` or `group` of a row), or if
their words are nearly the same. A score on held-out rows would otherwise reward what was learned by heart.

Words are compared by shingles, runs of `SHINGLE` words without case, punctuation and digits. Shingles that many rows
have are the frame of a template ("Customer: ... Intent:") and say nothing, but for rows that have nothing else. Pairs
with a Jaccard similarity of about `SIMILAR` and more are found by MinHash signatures in bands (Broder 1997; Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, ch. 3), in time and memory linear in the text.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .corpus import is_below, split
from .example import Example

SHINGLE = 3  # words
SIMILAR = 0.6  # share of shingles that two rows have in common
COMMON = 0.1  # share of the rows from which on a shingle is part of a template
LEAST_COMMON = 5  # rows, at least
LARGE = 0.3  # share of the rows in one document that is pointed out
TEMPLATED = 0.5  # share of shingles that are part of a template that is pointed out
LEAST_DOCUMENTS = 5  # held out, or it is pointed out
_SIGNATURE, _BANDS = 32, 8  # numbers of a signature, and parts of it by which candidates are found
_WORD = re.compile(r"[^\W\d_]+|\d+")
_DIGIT = re.compile(r"\d+")

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows for training and held-out rows; both sides have whole documents, unless there is only one."""

    train: list[Example]
    held_out: list[Example]
    documents: int
    held_out_documents: int
    largest: int  # rows of the largest document
    repeated: int  # rows that equal an earlier one
    templated: float  # share of the rows' shingles that are part of a template

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes scores on the held-out rows say little."""
        rows, found = len(self.train) + len(self.held_out), []
        if self.documents == 1:
            found.append(
                f"all {rows} rows are of one document, or nearly the same: scores on held-out rows say nothing about "
                "new text"
            )
        else:
            if self.largest >= LARGE * rows and self.largest >= LEAST_COMMON:
                found.append(f"{self.largest} of {rows} rows are of one document, or nearly the same")
            held = self.held_out_documents
            if held < LEAST_DOCUMENTS:
                count = "one document is" if held == 1 else f"{held} documents are"
                found.append(f"only {count} held out, of {self.documents}: scores on them are uncertain")
        if self.repeated >= COMMON * rows and self.repeated >= LEAST_COMMON:
            found.append(f"{self.repeated} of {rows} rows repeat an earlier one")
        if self.templated >= TEMPLATED and self.documents > 1:
            found.append(
                f"{self.templated:.0%} of the wording is a template that many rows share: scores on held-out rows "
                "reward it"
            )
        return tuple(found)


def split_documents(examples: Sequence[Example], fraction: float) -> Split:
    """Split examples into training set and held-out set by document, keeping the order.

    A document's side is a hash of its name, or of the smallest digest of its rows: it does not change when others are
    added or rows are shuffled. Without documents of several rows this is `split`. A document of several rows is never
    held out where that would leave less than half of the rows.
    """
    documents, templated = _documents(examples)
    members: dict[int, list[Example]] = {}
    for example, document in zip(examples, documents, strict=True):
        members.setdefault(document, []).append(example)
    keys = {document: _key(rows) for document, rows in members.items()}
    if len(members) < 2:
        train, held_out = split(examples, fraction)
        held = {0} if held_out else set()
    else:
        held = _held_out(members, keys, fraction)
        train = [one for one, document in zip(examples, documents, strict=True) if document not in held]
        held_out = [one for one, document in zip(examples, documents, strict=True) if document in held]
    return Split(
        train=train,
        held_out=held_out,
        documents=len(members),
        held_out_documents=len(held),
        largest=max(map(len, members.values()), default=0),
        repeated=len(examples) - len({example.digest() for example in examples}),
        templated=templated,
    )


def rows_apart(examples: Sequence[Example], held_out: Sequence[Example]) -> list[Example]:
    """Return the examples that are of no document of held-out ones, in order."""
    documents, _ = _documents([*held_out, *examples])
    taken = set(documents[: len(held_out)])
    return [one for one, document in zip(examples, documents[len(held_out) :], strict=True) if document not in taken]


def _documents(examples: Sequence[Example]) -> tuple[list[int], float]:
    """Return the document of each example, as the index of its first one, and the share of templates in their words."""
    parents = list(range(len(examples)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(pairs: Iterable[tuple[int, int]]) -> None:
        for first, second in pairs:
            low, high = sorted((root(first), root(second)))
            parents[high] = low

    named: dict[str, int] = {}
    join((named.setdefault(one.document, index), index) for index, one in enumerate(examples) if one.document)
    shingles = [_shingles(example.text) for example in examples]
    own = _without_templates(shingles)
    join(_near_duplicates(shingles, own))
    shares = [1 - len(rest) / len(whole) for rest, whole in zip(own, shingles, strict=True) if len(whole)]
    return [root(index) for index in range(len(examples))], sum(shares) / max(len(shares), 1)


def _held_out(members: dict[int, list[Example]], keys: dict[int, bytes], fraction: float) -> set[int]:
    rows = sum(map(len, members.values()))
    held = {document for document, key in keys.items() if is_below(key, fraction)}
    if not held:
        small = [one for one, group in members.items() if len(group) == 1 or 2 * len(group) <= rows]
        held = {min(small or members, key=keys.__getitem__)}
    elif len(held) == len(members):
        held.discard(max(members, key=keys.__getitem__))
    for document in sorted(held, key=lambda one: (-len(members[one]), keys[one])):
        if len(held) > 1 and len(members[document]) > 1 and 2 * sum(len(members[one]) for one in held) > rows:
            held.discard(document)
    return held


def _key(rows: Sequence[Example]) -> bytes:
    """Return the digest that decides a document's side."""
    names = [example.document for example in rows if example.document]
    if names and len(rows) > 1:
        return hashlib.sha256(f"document {min(names)}".encode()).digest()
    return min(example.digest() for example in rows)


def _without_templates(shingles: "Sequence[np.ndarray]") -> "list[np.ndarray]":
    """Return the shingles of each text that few other texts have."""
    import numpy as np

    kinds, counts = np.unique(np.concatenate([*shingles, np.zeros(0, dtype=np.uint64)]), return_counts=True)
    common = kinds[counts >= max(LEAST_COMMON, COMMON * len(shingles))]
    return [one[~np.isin(one, common, assume_unique=True)] for one in shingles]


def _near_duplicates(shingles: "Sequence[np.ndarray]", own: "Sequence[np.ndarray]") -> Iterable[tuple[int, int]]:
    """Yield pairs of texts that are nearly the same, so that pairs connect every cluster of them."""
    signatures = [_signature(rest if len(rest) else whole) for rest, whole in zip(own, shingles, strict=True)]
    found: dict[tuple[int, bytes, bool], int] = {}
    for index, signature in enumerate(signatures):
        if signature is None:
            continue
        for band, part in enumerate(signature.reshape(_BANDS, -1)):
            # rows that are nothing but the template are only compared with each other
            first = found.setdefault((band, part.tobytes(), not len(own[index])), index)
            other = signatures[first]
            if first != index and other is not None and (other == signature).mean() >= SIMILAR:
                yield first, index


def _shingles(text: str) -> "np.ndarray":
    """Return the hashes of a text's shingles, each once; one of a text that is shorter than a shingle."""
    import numpy as np

    words = [zlib.crc32(_DIGIT.sub("0", word).encode()) for word in _WORD.findall(text.casefold())]
    if not words:
        return np.zeros(0, dtype=np.uint64)
    hashes = np.array(words, dtype=np.uint64)
    length = min(SHINGLE, len(hashes))
    joined = np.zeros(len(hashes) - length + 1, dtype=np.uint64)
    for offset in range(length):
        joined = joined * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(joined)] + np.uint64(1)
    return np.unique(joined ^ (joined >> np.uint64(29)))


def _signature(shingles: "np.ndarray") -> "np.ndarray | None":
    """Return the MinHash signature of shingles; None if there are none."""
    import numpy as np

    if not len(shingles):
        return None
    factors = np.array(_factors(), dtype=np.uint64)
    products = (shingles[None] * factors[:, None]) >> np.uint64(20)
    return products.min(axis=1)


@cache
def _factors() -> list[int]:
    """Return odd multipliers, each a hash function of its own; from integers, so that they never change."""
    digests = (hashlib.sha256(b"%d" % number).digest() for number in range(_SIGNATURE))
    return [int.from_bytes(digest[:8], "big") | 1 for digest in digests]
