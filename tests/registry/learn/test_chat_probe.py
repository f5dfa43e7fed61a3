"""The chat probe: what a newcomer takes of everyday chat and of older domains' text, and what `strict` refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.adapters.layer.routing import recording_routes
from lorary.domains.data.blocks import encode
from lorary.domains.data.catalog import everyday_questions
from lorary.domains.data.example import Example
from lorary.domains.errors import GateFailedError
from lorary.domains.statistics.measure import measure_statistics
from lorary.domains.statistics.statistics import DomainStatistics
from lorary.registry import Registry
from lorary.registry.learn.chat_probe import ChatProbe, OlderText, ProbedText, probe_chat
from lorary.registry.measure.held_out import held_out_at_hand, stored_held_out
from lorary.registry.pack.check_pack import check_pack
from lorary.registry.pack.pack import DomainPack, read_pack

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REFUSES_NOTHING = "{% if not messages[0]['content'] %}{{ raise_exception('say something') }}{% endif %}" + TEMPLATE
REFUSES_ALL = "{{ raise_exception('only tools may speak') }}"


@pytest.fixture(scope="module")
def packs(whole: Registry) -> dict[str, DomainPack]:
    return {name: read_pack(whole.store, whole.show(name)) for name in ("general", "cooking", "sailing")}


@pytest.fixture(scope="module")
def of_questions(whole: Registry, packs: dict[str, DomainPack]) -> DomainStatistics:
    """Statistics of the everyday questions themselves."""
    rows = [encode(Example(completion=question), whole.tokenizer) for question in everyday_questions()]
    base, layer = whole.base, packs["general"].feature_layer
    return measure_statistics(base.model, base.layout, rows, layer=layer, roles=base.roles)


@pytest.fixture
def probe(whole: Registry, packs: dict[str, DomainPack]) -> Callable[..., ChatProbe]:
    """`probe(new=..)` probes `sailing` as the newcomer beside KP and `cooking`, with changes."""

    def run(**changes: Any) -> ChatProbe:
        usual: dict[str, Any] = {"others": {"cooking": packs["cooking"]}, "new": packs["sailing"], "held_out": {}}
        given: dict[str, Any] = {"preservation": packs["general"]} | usual | changes
        return probe_chat("sailing", whole.base, **given)

    return run


@pytest.fixture
def template(whole: Registry, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    return lambda text: monkeypatch.setattr(whole.tokenizer, "chat_template", text)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """The everyday questions as a domain's text."""
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"text": f"{q} " * 3}) + "\n" for q in everyday_questions()), encoding="utf-8")
    return path


def share(after: float, *, before: float = 0.0, largest: int = 0, texts: int = 60) -> Any:
    return ProbedText(texts=texts, before=before, after=after, largest=largest)


def a_probe(**changes: Any) -> ChatProbe:
    fine = {
        "name": "sailing",
        "rendered": "chat template",
        "template": share(0.1, texts=1),
        "everyday": share(0.01),
        "general_before": 0.9,
        "general_after": 0.89,
        "older": (),
        "taken": (),
        "questions": "sha256:" + "0" * 64,
    }
    return ChatProbe(**(fine | changes))


# --- the questions ---


def test_there_are_some_dozens_of_different_questions() -> None:
    questions = everyday_questions()

    assert len(questions) >= 60
    assert len({question.casefold() for question in questions}) == len(questions)
    assert all(question == question.strip() != "" for question in questions)


# --- what is measured ---


@pytest.mark.parametrize("text", [None, TEMPLATE], ids=["plain text", "chat template"])
def test_the_probe_has_the_gates_that_a_composed_model_reads_each_prompt_with(
    text: str | None, whole: Registry, probe: Any, template: Any
) -> None:
    template(text)
    model: Any = whole.compose("cooking+sailing")
    tokenizer, prompts = whole.tokenizer, everyday_questions()
    if text:
        talks = [[{"role": "user", "content": question}] for question in prompts]
        prompts = [str(tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True)) for t in talks]
    padded: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    with recording_routes(model) as routes, model.reading_prompts():
        model(**tokenizer(prompts, add_special_tokens=not text, **padded))
    expected = routes[-1].slot_gate[:, -1]

    found = probe()

    assert found.rendered == ("chat template" if text else "plain text")
    assert found.everyday.after == pytest.approx(expected[:, 2].mean().item(), abs=1e-4)
    assert found.general_after == pytest.approx(expected[:, 0].mean().item(), abs=1e-4)
    assert found.everyday.largest == len(found.taken) == int((expected.argmax(1) == 2).sum())


def test_a_newcomer_that_learned_everyday_questions_takes_them(
    probe: Any, packs: dict[str, DomainPack], of_questions: DomainStatistics
) -> None:
    found = probe(new=replace(packs["sailing"], statistics=of_questions))

    assert not found.holds
    assert found.everyday.after > 0.5
    assert found.general_after < found.general_before
    assert [gate for _, gate in found.taken] == sorted((gate for _, gate in found.taken), reverse=True)
    assert found.taken[0][0] in everyday_questions()
    assert "everyday questions" in found.problems[0]
    assert any("registry init" in one for one in found.advice)


def test_a_newcomer_beside_a_kp_that_knows_questions_takes_none(
    probe: Any, packs: dict[str, DomainPack], of_questions: DomainStatistics
) -> None:
    knowing = replace(packs["general"], statistics=of_questions)

    found = probe(preservation=knowing)

    assert found.everyday.after < 0.05
    assert found.everyday.largest == len(found.taken) <= 1  # of 64; the base is a random one
    assert found.holds


def test_a_first_domain_is_compared_with_kp_alone(probe: Any) -> None:
    found = probe(others={})

    assert (found.general_before, found.everyday.before, found.older) == (1.0, 0.0, ())
    assert found.general_after + found.everyday.after == pytest.approx(1, abs=1e-5)


def test_a_new_version_is_compared_with_its_parent(probe: Any, packs: dict[str, DomainPack]) -> None:
    found = probe(parent=packs["sailing"])

    assert found.everyday.before == found.everyday.after > 0
    assert found.general_before == found.general_after


@pytest.mark.parametrize("at_hand", [True, False])
def test_a_copy_of_an_older_domain_takes_its_text(
    at_hand: bool, whole: Registry, probe: Any, packs: dict[str, DomainPack]
) -> None:
    rows = stored_held_out(whole.store, whole.show("cooking"))

    distinct, copy = (
        probe(new=packs[name], held_out={"cooking": rows} if at_hand else {}) for name in ("sailing", "cooking")
    )

    for one in (distinct, copy):
        assert [(older.domain, older.measured_on) for older in one.older] == [
            ("cooking", "held-out text" if at_hand else "statistics")
        ]
    assert distinct.older[0].after < copy.older[0].after
    assert 0.05 < copy.older[0].after <= 0.5 + 1e-3
    assert any("cooking" in problem for problem in copy.problems)
    assert any("registry retrain cooking --data FILE" in one for one in copy.advice)


def test_the_order_of_older_domains_does_not_matter(probe: Any, packs: dict[str, DomainPack]) -> None:
    others = {"cooking": packs["cooking"], "baking": packs["general"]}

    assert probe(others=others) == probe(others=dict(reversed(others.items())))


@pytest.mark.parametrize(
    ("text", "rendered", "has_template"),
    [
        (TEMPLATE, "chat template", True),
        (REFUSES_NOTHING, "chat template", True),
        (REFUSES_ALL, "plain text", False),
    ],
)
def test_a_template_that_refuses_some_turns_is_probed_as_far_as_it_renders(
    text: str, rendered: str, has_template: bool, probe: Any, template: Any
) -> None:
    template(text)

    found = probe()

    assert found.rendered == rendered
    assert (found.template is not None) == has_template


# --- the verdict ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"template": share(0.7, largest=1, texts=1)}, "the bare chat template is routed to sailing"),
        ({"everyday": share(0.051)}, "sailing takes 5.1% of 60 everyday questions"),
        (
            {"older": (OlderText(texts=9, before=0, after=0.2, largest=1, domain="law", measured_on="held-out text"),)},
            "sailing takes 20.0% of 9 held-out rows of law",
        ),
    ],
)
def test_each_taking_is_a_problem_with_advice(changes: dict[str, Any], says: str) -> None:
    found = a_probe(**changes)

    assert not found.holds
    assert len(found.problems) == 1
    assert says in found.problems[0]
    assert found.advice
    assert says in repr(found)


def test_what_is_tolerated_is_no_problem() -> None:
    older = OlderText(texts=9, before=0, after=0.05, largest=0, domain="law", measured_on="held-out text")

    found = a_probe(everyday=share(0.05), older=(older,))

    assert (found.holds, found.problems, found.advice) == (True, (), ())


# --- in a registry ---


def test_a_result_has_the_probe_and_the_manifest_its_figures(
    cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any
) -> None:
    registry, seen = fresh_copy(cooking_store), []

    added = registry.add_domain("sailing", data=[texts["sailing"]], on_probe=seen.append, **short_run(steps=1))

    record = registry.show("sailing").proof["chat"]
    assert seen == [added.probe]
    assert record["everyday"]["after"] == added.probe.everyday.after
    assert record["older_domains"] == 1
    assert added.probe.older[0].measured_on == "held-out text"
    assert not any(question in json.dumps(record) for question in everyday_questions())
    check_pack(registry.store, added.manifest)


def test_strict_refuses_before_training_and_stores_nothing(
    cooking_store: Path, fresh_copy: Any, asked: Path, short_run: Any, state_of: Any
) -> None:
    registry, stages = fresh_copy(cooking_store), set()
    before = state_of(registry.store)

    with pytest.raises(GateFailedError, match="Nothing was stored") as caught:
        registry.add_domain(
            "talk", data=[asked], strict=True, on_progress=lambda p: stages.add(p.stage), **short_run(steps=1)
        )

    assert caught.value.exit_code == 9
    assert "everyday questions" in (caught.value.cause or "")
    assert "leave out --strict" in (caught.value.fix or "")
    assert state_of(registry.store) == before
    assert "training talk" not in stages


def test_strict_refuses_a_new_version_before_training(
    cooking_store: Path, fresh_copy: Any, asked: Path, short_run: Any, state_of: Any
) -> None:
    registry, settings = fresh_copy(cooking_store), {"training": short_run(steps=1)["training"], "tolerance": 99.0}
    before = state_of(registry.store)

    with pytest.raises(GateFailedError, match="Nothing was stored"):
        registry.retrain("cooking", data=[asked], strict=True, **settings)
    assert state_of(registry.store) == before

    done = registry.retrain("cooking@1", data=[asked], **settings)
    assert not done.probe.holds
    assert done.probe.everyday.before < done.probe.everyday.after
    assert registry.show("cooking").version == 2
    again = registry.retrain("cooking@1", data=[asked], **settings)
    assert again.is_repeated
    assert again.probe == done.probe


def test_strict_refuses_an_adapter(
    cooking_store: Path, fresh_copy: Any, asked: Path, save_adapter: Any, state_of: Any
) -> None:
    registry, adapter = fresh_copy(cooking_store), save_adapter(seed=3)
    before = state_of(registry.store)

    with pytest.raises(GateFailedError, match="Nothing was stored"):
        registry.import_adapter("talk", adapter, data=[asked], strict=True)

    assert state_of(registry.store) == before
    assert not registry.import_adapter("talk", adapter, data=[asked]).probe.holds


def test_only_what_is_quickly_read_is_at_hand(cooking_store: Path, tmp_path: Path) -> None:
    store = Registry.open(shutil.copytree(cooking_store, tmp_path / "copy")).store
    manifest = store.manifest("cooking")
    data = manifest.train["data"]

    def with_data(**changes: Any) -> Any:
        return replace(manifest, train={**manifest.train, "data": {**data, **changes}})

    assert held_out_at_hand(store, manifest, max_bytes=10**6) == stored_held_out(store, manifest)
    assert not held_out_at_hand(store, manifest, max_bytes=data["bytes"] - 1)
    assert not held_out_at_hand(store, with_data(files=["hf:acme/text"]), max_bytes=10**6)
    assert not held_out_at_hand(store, with_data(digest="sha256:" + "0" * 64), max_bytes=10**6)
    assert not held_out_at_hand(store, replace(manifest, train={}), max_bytes=10**6)
