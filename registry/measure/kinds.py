"""Tell the kinds of text inside a domain apart, and what stands out in one: an average hides harm to one of them.

A row's kind is the name in its field `source` or `label`. Rows without one are clustered by their words, and the
clusters are numbered; nothing of their text is in a kind's name.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from ...domains.data.example import Example
from ...domains.statistics.intervals import percentile_interval, ratio_draws
from .measurable import MIN_TEXTS

Interval = tuple[float, float]

MAX_CLUSTERS: Final = 4
ROWS_PER_CLUSTER: Final = 10  # on average; fewer rows are one kind
MAX_KINDS: Final = 40  # judged; a field with another value in each row names no kind
SHOWN_ROWS: Final = 3
SHOWN_WORDS: Final = 8
SHOWN_CHARACTERS: Final = 160  # of an example row
_WIDTH: Final = 256  # of a hashed bag of words
_WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class KindChange:
    """Bits per byte of one kind of text under a version and the next."""

    kind: str
    rows: int
    before: float
    now: float
    interval: Interval  # 95 %, of the relative change

    @property
    def change(self) -> float:
        """Relative change; positive is worse."""
        return self.now / self.before - 1

    def is_worse(self, tolerance: float) -> bool:
        """Whether it is worse by more than the tolerance, and its interval excludes zero."""
        return not self.now <= self.before * (1 + tolerance) and not self.interval[0] <= 0

    def as_json(self) -> dict[str, Any]:
        """Return the content for a manifest: names and numbers, no text."""
        return asdict(self) | {"interval": list(self.interval)}


@dataclass(frozen=True, kw_only=True)
class KindPortrait:
    """What people need to recognize a kind: word pairs that stand out, and some of its rows."""

    kind: str
    words: tuple[str, ...]
    examples: tuple[str, ...]  # shortened; those that got worse most are first


def rows_by_kind(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Return the indices of the rows of each kind with enough rows to be judged; empty if there is only one kind."""
    kinds = _kinds(examples)
    found: dict[str, list[int]] = {}
    for i, kind in enumerate(kinds):
        found.setdefault(kind, []).append(i)
    if len(found) < 2:
        return {}
    enough = {kind: rows for kind, rows in found.items() if len(rows) >= MIN_TEXTS}
    return dict(sorted(enough.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_KINDS])


def kind_changes(
    examples: Sequence[Example], before: Sequence[float], now: Sequence[float], sizes: Sequence[int]
) -> tuple[KindChange, ...]:
    """Return the change of each kind from nats of each text before and now, the worst first."""
    found = []
    for number, (kind, rows) in enumerate(rows_by_kind(examples).items()):
        nats = [[values[i] for i in rows] for values in (before, now)]
        size = [sizes[i] for i in rows]
        if not sum(size) or not sum(nats[0]) > 0:  # nothing of it is learned
            continue
        old, new = ratio_draws(nats, size, seed=number).T
        interval = percentile_interval(new / np.where(old > 0, old, np.nan) - 1)
        assert interval is not None
        scale = math.log(2) * sum(size)
        found.append(
            KindChange(
                kind=kind,
                rows=len(rows),
                before=round(sum(nats[0]) / scale, 5),
                now=round(sum(nats[1]) / scale, 5),
                interval=(round(interval[0], 5), round(interval[1], 5)),
            )
        )
    return tuple(sorted(found, key=lambda one: -one.change))


def portrait(examples: Sequence[Example], kind: str, rises: Sequence[float] | None = None) -> KindPortrait:
    """Describe one of the kinds of these rows.

    Args:
        examples: Rows of all kinds.
        kind: One of `rows_by_kind`.
        rises: How much worse each row got, to choose the examples by.
    """
    mine = rows_by_kind(examples)[kind]
    others = sorted(set(range(len(examples))) - set(mine))
    order = mine if rises is None else sorted(mine, key=lambda i: -rises[i])
    return KindPortrait(
        kind=kind,
        words=_standing_out([examples[i].text for i in mine], [examples[i].text for i in others]),
        examples=tuple(_shortened(examples[i].text) for i in order[:SHOWN_ROWS]),
    )


def _kinds(examples: Sequence[Example]) -> list[str]:
    kinds = [example.kind or "" for example in examples]
    unnamed = [i for i, kind in enumerate(kinds) if not kind]
    clusters = _clusters([examples[i].text for i in unnamed])
    for i, cluster in zip(unnamed, clusters, strict=True):
        kinds[i] = f"cluster {cluster + 1}"
    return kinds


def _clusters(texts: Sequence[str]) -> list[int]:
    """Return the cluster of each text, by the words that few texts have; the same texts give the same clusters."""
    count = min(MAX_CLUSTERS, len(texts) // ROWS_PER_CLUSTER)
    if count < 2:
        return [0] * len(texts)
    from ...domains.statistics.prototypes import cluster  # faiss and torch, which most reports do not need

    order = sorted(range(len(texts)), key=lambda i: texts[i])  # k-means depends on the order of its points
    points = _bags([texts[i] for i in order])
    centres = cluster(points, count, spherical=True)
    nearest = (points @ centres.T).argmax(1)
    found = [0] * len(texts)
    for place, i in enumerate(order):
        found[i] = int(nearest[place])
    return found


def _bags(texts: Sequence[str]) -> np.ndarray:
    counts = np.zeros((len(texts), _WIDTH), dtype=np.float32)
    for row, text in enumerate(texts):
        for word, number in Counter(_words(text)).items():
            counts[row, _hashed(word)] += 1 + math.log(number)
    rarity = np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))).astype(np.float32)
    weighted = counts * rarity
    return weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-6)


def _hashed(word: str) -> int:
    value = 0
    for byte in word.encode():
        value = (value * 257 + byte) % 1_000_003
    return value % _WIDTH


def _standing_out(mine: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Return words and pairs of words that are in many of these texts and in few others, by their log odds."""
    inside, outside = (Counter(gram for text in texts for gram in set(_grams(text))) for texts in (mine, others))
    least = min(len(mine), 3)

    def odds(gram: str) -> float:
        share, other = (inside[gram] + 0.5) / (len(mine) + 1), (outside[gram] + 0.5) / (len(others) + 1)
        return math.log(share / other)

    frequent = [gram for gram, count in inside.items() if count >= least and odds(gram) > 0]
    return tuple(sorted(frequent, key=lambda gram: (-odds(gram) * inside[gram], gram))[:SHOWN_WORDS])


def _grams(text: str) -> Iterator[str]:
    words = _words(text)
    yield from (word for word in words if len(word) > 3)
    yield from (f"{first} {second}" for first, second in zip(words, words[1:], strict=False))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "..."
