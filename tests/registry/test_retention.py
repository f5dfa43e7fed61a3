"""The retention matrix: its shape, its numbers, and the formula of forgetting."""

from typing import Any

import pytest

from lorary.domains.errors import NotFoundError
from lorary.domains.evaluation import score_language
from lorary.domains.progress import Progress
from lorary.registry import Registry
from lorary.registry.domain_data import general_examples, stored_held_out
from lorary.registry.retention import RetentionMatrix

MATRIX = RetentionMatrix(
    steps=("base", "general", "medicine", "legal"),
    domains=("general", "medicine", "legal"),
    bits_per_byte=((3.0, 4.0, 5.0), (2.0, 3.5, 4.5), (2.25, 2.0, 4.25), (2.5, 2.125, 2.5)),
)


@pytest.mark.parametrize(("domain", "expected"), [("general", 0.5), ("medicine", 0.125), ("legal", 0.0)])
def test_forgetting_is_the_last_score_minus_the_best_since_the_domain_was_added(domain: str, expected: float) -> None:
    assert MATRIX.forgetting(domain) == expected


def test_scores_from_before_a_domain_was_added_do_not_count() -> None:
    matrix = RetentionMatrix(
        steps=("base", "general", "legal"),
        domains=("general", "legal"),
        bits_per_byte=((1.0, 1.0), (2.0, 1.5), (2.0, 3.0)),
    )

    assert matrix.forgetting("legal") == 0
    assert matrix.forgetting("general") == 0


def test_it_is_written_with_its_metric() -> None:
    assert MATRIX.as_json() == {
        "metric": "bits per byte",
        "steps": ["base", "general", "medicine", "legal"],
        "domains": ["general", "medicine", "legal"],
        "matrix": [[3.0, 4.0, 5.0], [2.0, 3.5, 4.5], [2.25, 2.0, 4.25], [2.5, 2.125, 2.5]],
        "forgetting": {"general": 0.5, "medicine": 0.125, "legal": 0.0},
    }


def test_each_entry_is_a_domain_under_the_composition_of_its_step(whole: Registry) -> None:
    told: list[Progress] = []

    matrix = whole.retention(["cooking", "sailing"], on_progress=told.append)

    assert matrix.steps == ("base", "general", "cooking", "sailing")
    assert matrix.domains == ("general", "cooking", "sailing")
    texts = {"general": general_examples()}
    texts |= {name: stored_held_out(whole.store, whole.manifest(name)) for name in ("cooking", "sailing")}
    models: dict[str, Any] = {"base": whole.base.model}
    models |= {"general": whole.compose("general"), "cooking": whole.compose("cooking")}
    models["sailing"] = whole.compose("cooking+sailing")
    for i, step in enumerate(matrix.steps):
        for j, domain in enumerate(matrix.domains[1:], start=1):
            expected = score_language(models[step], whole.tokenizer, texts[domain]).bits_per_byte
            assert matrix.bits_per_byte[i][j] == expected, (step, domain)
    assert [(p.done, p.total) for p in told] == [(i + 1, 12) for i in range(12)]


def test_learning_a_domain_lowers_its_own_column(whole: Registry) -> None:
    matrix = whole.retention(["cooking"])

    before, after = matrix.bits_per_byte[1][1], matrix.bits_per_byte[2][1]
    assert after < before
    assert matrix.forgetting("cooking") == 0


def test_an_unknown_domain_is_not_found(whole: Registry) -> None:
    with pytest.raises(NotFoundError):
        whole.retention(["boating"])
