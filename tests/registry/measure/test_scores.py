"""Cached scores: returned for their own key only, and only if they are undamaged."""

import json
import os
from pathlib import Path

import pytest

from lorary.registry.measure.scores import CellScores, ScoreCache

SCORES = CellScores(
    text_nats=(1.5, 2.25), text_bytes=(10, 20), right=(True, False), taken={"legal": 2}, gates={"legal": 0.75}
)
KEY = {"model": [["legal", "sha256:1", 0.3]], "data": "sha256:2"}


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    return ScoreCache(tmp_path / "scores", {"scorer": 1, "device": "cpu"})


def only_file(tmp_path: Path) -> Path:
    [file] = (tmp_path / "scores").rglob("*.json")
    return file


def test_scores_are_returned_bit_for_bit(cache: ScoreCache):
    precise = CellScores(text_nats=(0.1 + 0.2, 1e-17), text_bytes=(1, 1))
    cache.put(KEY, precise)

    assert cache.get(KEY) == precise


@pytest.mark.parametrize(
    "other", [{"data": "sha256:3"}, {"model": "base"}, {"model": [["legal", "sha256:1", 0.30000000000000004]]}]
)
def test_another_key_returns_nothing(cache: ScoreCache, other: dict):
    cache.put(KEY, SCORES)

    assert cache.get(KEY | other) is None


def test_another_shared_key_returns_nothing(cache: ScoreCache, tmp_path: Path):
    cache.put(KEY, SCORES)

    assert ScoreCache(tmp_path / "scores", {"scorer": 2, "device": "cpu"}).get(KEY) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("2.25", "2.26"),
        lambda text: text.replace('"sha256:2"', '"sha256:9"'),
        lambda text: text.replace("lorary.scores/1", "lorary.scores/2"),
        lambda text: text.replace("true", "1"),
        lambda text: json.dumps(json.loads(text) | {"more": 1}),
        lambda text: "[]",
    ],
    ids=["cut", "score", "key", "schema", "type", "unknown", "list"],
)
def test_a_damaged_file_is_ignored_and_replaced(cache: ScoreCache, tmp_path: Path, damage):
    cache.put(KEY, SCORES)
    file = only_file(tmp_path)
    file.write_text(damage(file.read_text()))

    assert cache.get(KEY) is None
    cache.put(KEY, SCORES)
    assert cache.get(KEY) == SCORES


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_caches_nothing(cache: ScoreCache, tmp_path: Path):
    tmp_path.chmod(0o500)

    cache.put(KEY, SCORES)

    assert cache.get(KEY) is None
    tmp_path.chmod(0o700)


def test_inconsistent_scores_are_refused():
    with pytest.raises(ValueError, match="2 texts and 1"):
        CellScores(text_nats=(1.0, 2.0), text_bytes=(3,))


def test_sums_are_over_all_texts():
    assert SCORES.bits_per_byte == pytest.approx(3.75 / 30 / 0.6931471805599453)
    assert SCORES.accuracy == 0.5
    assert CellScores(text_nats=(1.0,), text_bytes=(1,)).accuracy is None
