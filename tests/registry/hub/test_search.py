"""Searching the Hub for packs."""

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from lorary.registry.hub.client import Hub
from lorary.registry.hub.search import search

BASE = "meta-llama/Llama-3.2-1B"


@pytest.fixture
def registry(local_hub, light_store, light_pack):
    """Two packs on the Hub, and a repository without a pack."""
    registry = light_store("store")
    light_pack(registry, evaluation={"base": 2.0, "routed": 1.5})
    base = registry.store.manifest("general").base
    light_pack(registry, "medicine", base=type(base)(**vars(base) | {"id": BASE}))
    registry.push("legal", "acme")
    registry.push("medicine", "alice", private=True)
    HfApi().create_repo("acme/legal-model")
    return registry


def found(query=None, base=None, limit=10):
    return [pack.repo for pack in search(query, base=base, limit=limit, hub=Hub())]


def test_search_filters_by_text_base_and_limit(registry):
    assert found() == ["acme/lorary-legal", "alice/lorary-medicine"]
    assert found("LEGAL") == ["acme/lorary-legal"]
    assert found(base=BASE) == ["alice/lorary-medicine"]
    assert found(limit=1) == ["acme/lorary-legal"]
    assert found("nothing") == []


def test_private_packs_are_found_by_their_owner_only(registry, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_carol")

    assert found() == ["acme/lorary-legal"]


def test_a_result_has_the_values_of_the_model_card(registry):
    pack = search("legal", base=None, limit=1, hub=Hub())[0]

    assert (pack.name, pack.version, pack.base) == ("legal", 1, registry.base_record.id)
    assert (pack.bits_per_byte, pack.bits_per_byte_of_base) == (1.5, 2.0)


@pytest.mark.parametrize("own", ["7", "[1, 2]", "{name: 5, version: x, bits_per_byte: [1]}", "null"])
def test_an_unexpected_front_matter_is_ignored(registry, own):
    card = f"---\ntags: [lorary]\nlorary: {own}\n---\n".encode()
    HfApi().create_commit("acme/legal-model", [CommitOperationAdd("README.md", card)], commit_message="odd")

    pack = search("legal-model", base=None, limit=1, hub=Hub())[0]

    assert (pack.name, pack.version, pack.bits_per_byte) == (None, None, None)
