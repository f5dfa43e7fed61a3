"""Scores of stored domains: under which model each is measured, and on which held-out text."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorary.adapters.layer.routing import fixed_slots
from lorary.domains.data.corpus import read_examples, split
from lorary.domains.data.example import Example
from lorary.domains.errors import CorpusError, InputError
from lorary.domains.scoring.language import score_language
from lorary.registry import Registry
from lorary.registry.measure.evaluate import DomainScores, routing_accuracy, score_in_composition
from lorary.registry.measure.held_out import HELD_OUT, stored_held_out


def scores(**changes: Any) -> DomainScores:
    values: dict[str, Any] = {"base": 4.0, "alone": 2.0, "routed": 2.5, "interval": (2.4, 2.6), "bytes": 100}
    return DomainScores(**(values | changes))


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ({}, 0.75),
        ({"routed": 2.0}, 1.0),
        ({"routed": 4.0}, 0.0),
        ({"routed": 1.0}, 1.5),
        ({"routed": 5.0}, -0.5),
    ],
    ids=str,
)
def test_the_share_of_oracle_gain_is_its_formula(values: dict[str, float], share: float) -> None:
    assert scores(**values).share_of_oracle_gain == pytest.approx(share)


@pytest.mark.parametrize("alone", [4.0, 4.5])
def test_without_an_oracle_gain_the_share_is_undefined(alone: float) -> None:
    assert math.isnan(scores(alone=alone).share_of_oracle_gain)
    assert scores(alone=alone).as_json()["share_of_oracle_gain"] is None


def test_scores_as_json_are_rounded_and_named() -> None:
    document = scores(routed=2.123456789).as_json()

    assert document["routed"] == 2.12346
    assert document["metric"] == "bits per byte"
    assert document["interval"] == [2.4, 2.6]


def test_evaluating_again_gives_the_scores_of_the_manifest(whole: Registry, cooking_store: Path) -> None:
    stored = whole.show("cooking").evaluation

    found = Registry.open(cooking_store).evaluate("cooking")["cooking"]

    for part in ("base", "alone", "routed", "routed_right"):
        assert getattr(found, part) == pytest.approx(stored[part], abs=1e-4), part
    assert found.bytes == stored["bytes"]


def test_each_score_is_measured_under_its_model(whole: Registry, texts: Any) -> None:
    held_out = split(read_examples([texts["cooking"]]), HELD_OUT)[1]
    model = whole.compose("cooking+sailing")

    found = whole.evaluate("cooking+sailing")["cooking"]

    def bits(of: Any) -> float:
        return score_language(of, whole.tokenizer, held_out).bits_per_byte

    assert found.base == bits(whole.base.model)
    assert found.routed == bits(model)
    with fixed_slots(model, {"cooking": 1.0}):
        assert found.alone == bits(model)
    assert found.interval[0] <= found.routed <= found.interval[1]


def test_routing_is_measured_on_the_scored_part_of_long_text(whole: Registry, texts: Any, monkeypatch: Any) -> None:
    examples = list(read_examples([texts["cooking"]]))
    monkeypatch.setattr("lorary.registry.measure.evaluate.MAX_SCORED_BYTES", examples[0].target_bytes)
    asked: list[list[Example]] = []

    def right(_model: Any, _base: Any, _name: str, chosen: list[Example]) -> float:
        asked.append(chosen)
        return 1.0

    monkeypatch.setattr("lorary.registry.measure.evaluate.routing_accuracy", right)
    found = score_in_composition(
        whole.compose("cooking"), whole.base, "cooking", examples, on_progress=lambda _progress: None
    )

    assert found.bytes == examples[0].target_bytes
    assert asked == [examples[:1]]


def test_held_out_text_is_never_trained_on(whole: Registry, texts: Any) -> None:
    train, held_out = split(read_examples([texts["cooking"]]), HELD_OUT)

    found = stored_held_out(whole.store, whole.show("cooking"))

    assert found == held_out
    assert not {e.text for e in found} & {e.text for e in train}


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_data_that_is_not_what_it_was_is_refused(
    change: str, cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any, tmp_path: Path
) -> None:
    registry, file = fresh_copy(cooking_store), Path(shutil.copy(texts["sailing"], tmp_path / "boats.jsonl"))
    manifest = registry.add_domain("boats", data=[file], **short_run(steps=1)).manifest
    if change == "gone":
        file.unlink()
    else:
        file.write_text(file.read_text(encoding="utf-8") + '{"text": "one more"}\n', encoding="utf-8")

    with pytest.raises(InputError, match="not on this machine, or has changed") as caught:
        registry.evaluate("boats")

    assert manifest.train["data"]["digest"] in str(caught.value.cause)
    assert "--data" in str(caught.value.fix)


def test_given_text_replaces_the_held_out_text(whole: Registry, texts: Any) -> None:
    found = whole.evaluate("cooking", data=[texts["sailing"]])

    assert list(found) == ["cooking"]
    assert found["cooking"].bytes == sum(e.target_bytes for e in read_examples([texts["sailing"]]))


def test_text_given_for_two_domains_is_refused(whole: Registry, texts: Any) -> None:
    with pytest.raises(InputError, match="one domain") as caught:
        whole.evaluate("cooking+sailing", data=[texts["sailing"]])

    assert "cooking, sailing" in str(caught.value.cause)


def test_an_invalid_row_is_reported_with_its_line(whole: Registry, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n', encoding="utf-8")

    with pytest.raises(CorpusError, match=":2"):
        whole.evaluate("cooking", data=[tmp_path / "bad.jsonl"])


def test_routing_accuracy_needs_routing_and_the_domain(whole: Registry, texts: Any) -> None:
    examples = list(read_examples([texts["cooking"]]))[:2]

    assert routing_accuracy(whole.compose("cooking", static=True), whole.base, "cooking", examples) is None
    assert routing_accuracy(whole.compose("cooking"), whole.base, "sailing", examples) is None
    share = routing_accuracy(whole.compose("cooking"), whole.base, "cooking", examples)
    assert share is not None
    assert 0.5 < share <= 1
