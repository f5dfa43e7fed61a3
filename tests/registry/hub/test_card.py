"""The model card has the right metadata, and hostile text in a manifest renders as plain text."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lorary.registry.hub.card import model_card
from lorary.registry.store.manifest import BaseRecord

HOSTILE = [
    "---\nlicense: mit\n---",
    "<script>alert(1)</script>",
    "](javascript:alert(1)) [x](http://evil.example)",
    "a | b\n| c |",
    "``` \n# heading",
    "`code`",
    "\x1b[31mred\x1b[0m \u202egnirts",
    "https://evil.example www.evil.example me@evil.example",
    "![x](http://evil.example/x.png) <img src=x onerror=alert(1)>",
    "&lt;b&gt; *bold* _it_ ~~s~~ $x$ :smile:",
    "- item\n1. item\n> quote\n# heading\n===",
    "!!python/object/apply:os.system ['id']",
]
REPO = "acme/lorary-legal"
PLAIN = MarkdownIt("gfm-like", {"linkify": False})


@pytest.fixture
def scored(draft):
    """A manifest with every value that a card shows."""
    return replace(
        draft,
        version=3,
        base=replace(draft.base, id="meta-llama/Llama-3.2-1B", revision="a" * 40),
        lineage={"parent": 2, "preservation": {"version": 1, "digest": draft.base.weights}},
        train={
            "data": {"files": ["contracts.jsonl"], "digest": draft.base.weights, "rows": 9, "held_out": 2},
            "steps": 6,
        },
        evaluation={"base": 2.0, "alone": 1.49, "routed": 1.5, "general_base": 1.6, "general_routed": 1.61}
        | {"share_of_oracle_gain": 0.98, "interval": [1.4, 1.6]},
        proof={
            "unchanged": True,
            "drift": {"domains": 2, "top1_flips": 0},
            "chat": {"everyday": {"texts": 64, "before": 0.0, "after": 0.024, "largest": 1}},
        },
    )


def front(card):
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def body(card):
    return card.split("\n---\n", 1)[1]


def shapes(card):
    """The types of the body's Markdown tokens: blocks, links, images, HTML, but not text."""
    tokens = [token for block in PLAIN.parse(body(card)) for token in [block, *(block.children or [])]]
    return [token.type for token in tokens if token.type not in ("text", "text_special", "softbreak", "code_inline")]


def test_the_front_matter_has_the_metadata_of_the_hub(scored):
    data = front(model_card(scored, repo=REPO))

    assert data["library_name"] == "peft"
    assert (data["base_model"], data["base_model_relation"]) == ("meta-llama/Llama-3.2-1B", "adapter")
    assert {"lora", "peft", "lorary", "lora-experts", "continual-learning"} <= set(data["tags"])
    assert "base_model:adapter:meta-llama/Llama-3.2-1B" in data["tags"]
    assert data["license"] == "apache-2.0"
    assert data["lorary"]["digest"] == scored.digest
    results = data["model-index"][0]["results"]
    assert [result["metrics"][0]["value"] for result in results] == [1.5, 1.61]


def test_huggingface_hub_parses_the_card(scored):
    data: Any = ModelCard(model_card(scored, repo=REPO)).data

    assert data.base_model == "meta-llama/Llama-3.2-1B"
    assert [result.metric_value for result in data.eval_results] == [1.5, 1.61]


@pytest.mark.parametrize("base", ["pocket", "local:0123456789abcdef", "../../etc", "x/y\n- evil"])
def test_a_base_that_is_not_on_the_hub_is_not_named_as_base_model(scored, base):
    card = model_card(replace(scored, base=replace(scored.base, id=base)), repo=REPO)

    assert "base_model" not in front(card)
    assert 'from_pretrained("PATH_TO_BASE_MODEL")' in card


@pytest.mark.parametrize(
    "text",
    ["registry pull acme/lorary-legal@v3", "registry generate legal", 'subfolder="experts/e0"', "--max-lora-rank 8"]
    + [
        "| `e0` | 4 | 8 | lora | `q_proj`, `v_proj` | 2-3 | 1,024 |",
        "98%",
        "1.4 to 1.6",
        "contracts.jsonl",
        "2.4% of 64 questions",
    ],
)
def test_the_body_has_usage_experts_and_scores(scored, text):
    assert text in body(model_card(scored, repo=REPO))


def test_the_card_of_an_adapter_without_text_does_not_promise_routing(scored):
    card = model_card(replace(scored, train={"imported": {"routing": "none"}}, evaluation={}, proof={}), repo=REPO)

    assert "registry generate legal --static" in body(card)
    assert "imported without text" in body(card)
    assert "analytic router" not in body(card)


def test_the_card_of_a_kp_bank_names_its_version_in_the_command(scored):
    card = model_card(replace(scored, name="general", role="preservation"), repo="acme/lorary-general")

    assert "Knowledge-preservation (KP) bank" in card
    assert "registry generate general@3" in card


def test_the_card_has_every_digest(scored):
    card = model_card(scored, repo=REPO)

    for digest in (scored.digest, scored.base.weights, scored.base.tokenizer):
        assert digest in card


def hostile_everywhere(manifest, text):
    """A manifest with the same text in every field that the manifest accepts it in."""
    base = BaseRecord(**vars(manifest.base) | {"id": text, "revision": text, "architecture": text, "dtype": text})
    expert = replace(manifest.experts[0], targets=(text,))
    data = {"files": [text, text], "digest": text, "rows": text, "held_out": text}
    return replace(
        manifest,
        description=text,
        license=text,
        base=base,
        experts=(expert,),
        lineage={"parent": text, "preservation": {"version": 1, "digest": text}},
        train={"data": data, "steps": text, "settings": {"seed": text}},
        created=text,
        tool={"name": text, text: text},
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(scored, text):
    harmless = shapes(model_card(hostile_everywhere(scored, "word word"), repo=REPO))

    card = model_card(hostile_everywhere(scored, text), repo=REPO)

    assert shapes(card) == harmless
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", card)
    assert front(card)["license"] == "other"
    assert json.dumps(front(card))


@settings(max_examples=200)
@given(text=st.text(alphabet="a1 .-_*`#<>[]()!|~&@:/\\\n\t${}=+^\u202e\x1b'\"%wht", max_size=30))
def test_escaped_text_renders_as_the_same_text(text):
    from lorary.registry.hub.card import escape_markdown

    tokens = PLAIN.parse(f"What it is about: {escape_markdown(text)}\n\n| a |\n|---|\n| x {escape_markdown(text)} |\n")

    types = [token.type for block in tokens for token in [block, *(block.children or [])]]
    assert set(types) <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"} | {
        f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")
    }
    shown = "".join(child.content for child in tokens[1].children or [])
    assert shown.split() == f"What it is about: {text}".replace("\u202e", " ").replace("\x1b", " ").split()
