"""Cache scores in the store, so that a report measures each cell only once.

    <store>/cache/scores/ab/ab12....json       {schema, key, digest, scores}, named by the digest of the key

The key contains everything that the scores depend on: methods of scoring and routing, versions of the programs, base
model, composition with its digests and priors, text. A file is ignored if it is damaged or if its key does not match
its name. The cache can be deleted at any time.
"""

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ...domains.errors import IncompatibleError, IntegrityError
from ..store.blobs import hex_of, sha256_of
from ..store.files import make_folder, write_atomic
from ..store.strict_json import JsonObject, canonical_json, minor_of, parse_json, record_from_json, record_to_json

SCHEMA: Final = "lorary.scores/1"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CellScores:
    """Scores of one domain's held-out data under one model: one cell of the retention matrix."""

    text_nats: tuple[float, ...]  # of each text
    text_bytes: tuple[int, ...]
    right: tuple[bool, ...] = ()  # whether each question was answered correctly
    # number of texts by the slot with the largest mean gate; empty without a router
    taken: dict[str, int] = field(default_factory=dict)
    gates: dict[str, float] = field(default_factory=dict)  # mean slot gates over all texts

    def __post_init__(self) -> None:
        if len(self.text_nats) != len(self.text_bytes) or sum(self.text_bytes) <= 0:
            raise ValueError(f"{len(self.text_nats)} texts and {len(self.text_bytes)} sizes")
        if not all(map(math.isfinite, self.text_nats)):
            raise ValueError("text_nats are not all finite")

    @property
    def bits_per_byte(self) -> float:
        """Mean over all bytes; lower is better."""
        return math.fsum(self.text_nats) / math.log(2) / sum(self.text_bytes)

    @property
    def accuracy(self) -> float | None:
        """Share of questions answered correctly; None without questions."""
        return sum(self.right) / len(self.right) if self.right else None


@dataclass(frozen=True, kw_only=True)
class _CacheFile:
    key: JsonObject
    digest: str  # of the scores as canonical JSON
    scores: CellScores
    schema: str = SCHEMA


class ScoreCache:
    """Scores by key; `shared` is the part that all keys have in common."""

    def __init__(self, folder: Path, shared: JsonObject):
        self._folder = folder
        self._shared = shared

    def get(self, key: JsonObject) -> CellScores | None:
        """Return the scores with this key, or None if they are missing or damaged."""
        path = self._path(key)
        try:
            value = parse_json(path.read_bytes(), source=str(path))
            schema = value.get("schema") if isinstance(value, dict) else None
            minor_of(schema, known=SCHEMA, source=str(path))
            found = record_from_json(_CacheFile, value, source=str(path))
        except FileNotFoundError:
            return None
        except (IntegrityError, IncompatibleError) as error:
            logger.info("%s is ignored, its scores are measured again: %s", path, error)
            return None
        is_whole = found.key == self._shared | key and found.digest == _digest(found.scores)
        return found.scores if is_whole else None

    def put(self, key: JsonObject, scores: CellScores) -> None:
        """Write scores, unless the store is read-only."""
        path = self._path(key)
        if not os.access(self._folder.parent, os.W_OK):
            return
        make_folder(path.parent)
        content = _CacheFile(key=self._shared | key, digest=_digest(scores), scores=scores)
        write_atomic(path, canonical_json(record_to_json(content)))

    def _path(self, key: JsonObject) -> Path:
        name = hex_of(sha256_of(canonical_json(self._shared | key)))
        return self._folder / name[:2] / f"{name}.json"


def _digest(scores: CellScores) -> str:
    return sha256_of(canonical_json(record_to_json(scores)))
