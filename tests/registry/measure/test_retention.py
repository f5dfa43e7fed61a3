"""The cells of the retention matrix: what each one is, which are measured, and that none is measured twice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.adapters.layer.routing import fixed_slots
from lorary.domains.errors import InputError, NotFoundError
from lorary.domains.progress import Progress
from lorary.domains.scoring.language import score_language
from lorary.registry import Registry
from lorary.registry.measure.held_out import general_examples, stored_held_out
from lorary.registry.measure.retention import measured_cells, sort_by_addition
from lorary.registry.pack import pack


def measured_now(registry: Registry, *domains: str) -> list[str]:
    """Return the cells that a report measures, such as "legal after medicine"."""
    reports: list[Progress] = []
    registry.retention(domains, on_progress=reports.append)
    return list(dict.fromkeys(progress.stage.partition(": ")[2] for progress in reports))


@pytest.fixture(scope="module")
def reported(whole: Registry) -> Any:
    return whole.retention()


def test_each_cell_is_a_domain_under_the_composition_of_its_step(whole: Registry, reported: Any) -> None:
    texts = {"general": general_examples()}
    texts |= {name: stored_held_out(whole.store, whole.show(name)) for name in ("cooking", "sailing")}
    models: dict[str, Any] = {"base": whole.base.model}
    models |= {"general": whole.compose("general"), "cooking": whole.compose("cooking")}
    models["sailing"] = whole.compose("cooking+sailing")

    assert reported.steps == ("base", "general", "cooking", "sailing")
    assert reported.columns == ("general", "cooking", "sailing")
    for i, step in enumerate(reported.steps):
        for j, domain in enumerate(reported.columns):
            expected = score_language(models[step], whole.tokenizer, texts[domain], max_bytes=120_000).bits_per_byte
            assert reported.bits.value(i, j) == pytest.approx(expected, rel=1e-5), (step, domain)


def test_the_oracle_is_the_domain_under_its_own_experts_alone(whole: Registry, reported: Any) -> None:
    composed = whole.compose("cooking")

    with fixed_slots(composed, {"cooking": 1.0}):
        text = stored_held_out(whole.store, whole.show("cooking"))
        expected = score_language(composed, whole.tokenizer, text).bits_per_byte

    assert reported.bits.matrix.oracle[1] == pytest.approx(expected, rel=1e-5)


def test_learning_a_domain_lowers_its_own_column(reported: Any) -> None:
    for j, learned in ((1, 2), (2, 3)):
        assert reported.bits.value(learned, j) < reported.bits.value(learned - 1, j)


@pytest.mark.parametrize("added", [1, 2, 7])
def test_cells_without_a_metric_are_not_measured(added: int) -> None:
    cells = measured_cells(added)

    assert len(set(cells)) == len(cells)
    for i in range(added + 2):
        for j in range(added + 1):
            learned = j + 1
            assert ((i, j) in cells) == (i <= 1 or i >= learned - 1)


def test_one_more_domain_measures_its_row_and_the_beginning_of_its_column(both_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(both_store)
    registry.retention(["cooking"])

    assert measured_now(registry, "cooking") == []
    assert measured_now(registry, "cooking", "sailing") == [
        "sailing after base",
        "sailing after general",
        "sailing after cooking",
        "general after sailing",
        "cooking after sailing",
        "sailing after sailing",
        "sailing after its own experts",
    ]


def test_an_interrupted_report_resumes(both_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(both_store)

    def interrupt(progress: Progress) -> None:
        if progress.stage.startswith("4 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.retention(["cooking"], on_progress=interrupt)

    assert len(measured_now(registry, "cooking")) == 3 * 2 + 1 - 3


def test_a_cached_report_needs_neither_base_model_nor_experts(whole: Registry, reported: Any, monkeypatch: Any) -> None:
    again, read = Registry.open(whole.store.path), []

    def read_pack(files: Any, manifest: Any) -> Any:
        read.append(manifest.name)
        return pack.read_pack(files, manifest)

    monkeypatch.setattr("lorary.registry.measure.retention.read_pack", read_pack)

    found = again.retention()

    assert again._base is None
    assert read == ["general"]  # of the others only the data for routing, for drift
    assert found.as_json() == reported.as_json()


def test_domains_are_in_the_order_of_addition(whole: Registry) -> None:
    manifests = [whole.show(name) for name in ("sailing", "general", "cooking")]

    assert [m.name for m in sort_by_addition(whole.store, manifests)] == ["cooking", "sailing"]
    assert whole.retention(["sailing", "cooking"]).steps == ("base", "general", "sailing", "cooking")


def test_a_domain_with_missing_data_is_left_out_unless_it_is_named(
    cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any, tmp_path: Path
) -> None:
    registry, file = fresh_copy(cooking_store), tmp_path / "boats.jsonl"
    file.write_bytes(texts["sailing"].read_bytes())
    registry.add_domain("boats", data=[file], **short_run(steps=1))
    file.unlink()

    found = registry.retention()

    assert found.domains == ("cooking",)
    assert "not on this machine" in found.left_out["boats"]
    assert found.as_json()["left_out"] == found.left_out
    with pytest.raises(InputError, match="not on this machine"):
        registry.retention(["boats"])

    registry.remove("cooking")
    with pytest.raises(InputError, match="no held-out text is available") as caught:
        registry.retention()
    assert "boats@1 is not on this machine" in str(caught.value.cause)
    assert caught.value.fix == "evaluate a domain on your own text: registry evaluate boats --data FILE"


def test_invalid_choices_of_domains_are_refused(whole: Registry, kp_store: Path) -> None:
    with pytest.raises(NotFoundError):
        whole.retention(["boating"])
    with pytest.raises(InputError, match="twice"):
        whole.retention(["cooking", "cooking@1"])
    with pytest.raises(InputError, match="general cannot"):
        whole.retention(["general"])
    with pytest.raises(InputError, match="no domain to measure"):
        Registry.open(kp_store).retention()


def test_less_text_has_another_digest(whole: Registry) -> None:
    few = whole.retention(["cooking"], max_bytes=100)

    assert few.bits.counts["cooking"] < whole.retention(["cooking"]).bits.counts["cooking"]
    assert replace(few.scores.data[1], texts=()).digest != few.scores.data[1].digest
