"""hf:// terms of compositions are pulled and replaced by stored versions."""

import pytest
from huggingface_hub import constants

from lorary.domains.errors import InputError, RemoteError

REPO = "acme/lorary-legal"


@pytest.fixture
def ours(ours, light_pack):
    """The registry beside the Hub, with a domain of its own."""
    light_pack(ours, "medicine")
    return ours


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (f"hf://{REPO}", "legal@2"),
        (f"hf://{REPO}@v1+general", "legal@1"),
        (f"medicine+hf://{REPO}@v1:0.3+general:0.5", "general:0.5+legal@1:0.3+medicine"),
        ("medicine@1", "medicine@1"),
    ],
)
def test_terms_become_domains_of_the_store(ours, written, meant):
    assert ours.resolve_composition(written).composition == meant
    assert str(ours.plan(written).composition) == meant


def test_local_compositions_do_not_contact_the_hub(ours, local_hub):
    asked = len(local_hub.requests)

    ours.plan("medicine")

    assert len(local_hub.requests) == asked


def test_two_terms_for_one_domain_are_refused(ours, local_hub):
    with pytest.raises(InputError, match="'legal' twice"):
        ours.plan(f"hf://{REPO}@v1+legal@1")


def test_a_stored_commit_needs_no_network(ours, local_hub):
    commit = ours.pull(f"{REPO}@v1").origin.commit
    local_hub.stop()

    found = ours.resolve_composition(f"hf://{REPO}@{commit}")

    assert (found.composition, len(found.from_store)) == ("legal@1", 1)


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_when_the_hub_is_down_the_error_names_the_stored_version(ours, local_hub, revision):
    ours.pull(f"{REPO}@v1")
    local_hub.stop()

    with pytest.raises(RemoteError) as raised:
        ours.plan(f"hf://{REPO}{revision}")

    assert "legal@1" in str(raised.value.fix)


def test_offline_the_stored_version_is_used(ours, local_hub, monkeypatch):
    ours.pull(f"{REPO}@v1")
    ours.pull(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(local_hub.requests)

    assert ours.resolve_composition(f"hf://{REPO}@v1").composition == "legal@1"
    assert ours.resolve_composition(f"hf://{REPO}").composition == "legal@2"
    with pytest.raises(RemoteError):
        ours.resolve_composition("hf://acme/lorary-none")
    assert len(local_hub.requests) == asked
