"""A trained domain is pushed and pulled with the same bytes and logits, and plain PEFT loads it from the Hub."""

import pytest
import torch

REPO = "acme/lorary-cooking"


@pytest.fixture
def other(light_store):
    """A registry for the same base with the same KP bank, which has never seen the domain."""
    return light_store("other")


@pytest.fixture
def pushed(local_hub, cooking_store, fresh_copy):
    """A registry whose trained domain is on the Hub."""
    registry = fresh_copy(cooking_store)
    registry.push("cooking", REPO)
    return registry


def test_packs_and_logits_are_bit_identical(pushed, other, logits_of):
    other.pull(REPO)

    mine, theirs = pushed.show("cooking"), other.show("cooking")
    assert theirs.to_json() == mine.to_json()
    assert all(other.store.read(theirs, file.path) == pushed.store.read(mine, file.path) for file in mine.files)
    for static in (False, True):
        expected = logits_of(pushed.compose("cooking", static=static))
        assert torch.equal(logits_of(other.compose("cooking", static=static)), expected)


def test_a_composition_pulls_its_hub_terms(pushed, other, logits_of):
    model = other.compose(f"hf://{REPO}@v1:0.4+general")

    assert other.store.domains() == ["cooking", "general"]
    assert torch.equal(logits_of(model), logits_of(pushed.compose("cooking@1:0.4")))
    assert str(other.plan(f"hf://{REPO}@v1:0.4+general").composition) == "cooking@1:0.4"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks for it
def test_plain_peft_loads_the_pack_from_the_hub(pushed, base_folder, logits_of):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), REPO, revision="v1")

    torch.testing.assert_close(logits_of(model.eval()), logits_of(pushed.compose("cooking", static=True)))


def test_a_pushed_kp_bank_is_recognised_when_pulled(pushed, other):
    pushed.push("general", "acme")

    done = other.pull("acme/lorary-general")

    assert (done.is_new, done.manifest.version) == (False, 1)
