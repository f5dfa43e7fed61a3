"""What is replaced under a composition is seen or refused at its next call; a base in parts is refused at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from lorary.adapters.layer.attach import attach, detach
from lorary.adapters.layer.merge import merge_experts, unmerge_experts
from lorary.domains.errors import IncompatibleError

KINDS = ("routed", "static", "merged")


@pytest.fixture(scope="module")
def composed_of(compose: Any, random_stack: Any) -> Callable[..., Any]:
    """`composed_of("static", base)`: three random banks over a base."""

    def make(kind: str, base: Any) -> Any:
        if kind == "routed":
            return compose(base, all_targets=True)
        stack = random_stack(base, static=True, all_targets=True)
        model = attach(base, stack, router=None, fixed=torch.tensor([0.2, 0.3, 0.5]))
        return merge_experts(model) if kind == "merged" else model

    return make


def halved(weight: Any) -> nn.Parameter:
    return nn.Parameter(weight.detach() * 0.5, requires_grad=False)


def assign_state_dict(model: Any) -> None:
    state = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def copy_state_dict(model: Any) -> None:
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})


def replace_weight(model: Any) -> None:
    attention = model.model.layers[2].self_attn
    attention.q_proj.weight = halved(attention.q_proj.weight)


def replace_weight_of_layer_without_experts(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight = halved(attention.q_proj.weight)


def replace_module(model: Any) -> None:
    new = nn.Linear(32, 32, bias=False)
    model.model.layers[2].self_attn.q_proj = new.requires_grad_(False)


def replace_head(model: Any) -> None:
    model.lm_head = nn.Linear(32, 64, bias=False).requires_grad_(False)


def replace_norm(model: Any) -> None:
    model.model.norm.weight = halved(model.model.norm.weight)


def resize(model: Any) -> None:
    model.resize_token_embeddings(80)


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.mul_(0.5)


def write_to_norm(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)


REPLACED = (
    assign_state_dict,
    replace_weight,
    replace_weight_of_layer_without_experts,
    replace_module,
    replace_head,
    replace_norm,
    resize,
)


@pytest.mark.parametrize("change", [*REPLACED, copy_state_dict, write_in_place, write_to_norm])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_the_base_is_seen_or_refused_and_never_stale(
    base: Any, composed_of: Any, some_ids: Any, logits: Any, kind: str, change: Any
) -> None:
    composed = composed_of(kind, base)
    logits(composed, input_ids=some_ids())  # whatever is derived from weights is there

    change(base)

    is_norm = change is write_to_norm  # which is no weight that is merged
    if change in REPLACED or (kind == "merged" and not is_norm):
        with pytest.raises(IncompatibleError, match="compose it again"):
            logits(composed, input_ids=some_ids())
    else:
        found = logits(composed, input_ids=some_ids())
        assert torch.equal(found, logits(composed_of(kind, base), input_ids=some_ids()))


def composed_weight(model: Any) -> None:
    linear = model.model.layers[2].self_attn.o_proj.base
    linear.weight = halved(linear.weight)


def composed_assigned(model: Any) -> None:
    layer = model.model.layers[2]
    layer.load_state_dict({name: tensor * 0.5 for name, tensor in layer.state_dict().items()}, assign=True)


def composed_in_place(model: Any) -> None:
    write_to = model.model.layers[2].self_attn.q_proj.base.weight
    with torch.no_grad():
        write_to.mul_(0.5)


class Halving(nn.Linear):
    """Stand-in for a module that a quantiser puts in place of a Linear."""

    def forward(self, input: Any) -> Any:
        return super().forward(input) * 0.5


def composed_module(model: Any) -> None:
    q = model.model.layers[2].self_attn.q_proj
    new = Halving(32, 32, bias=False).requires_grad_(False)
    new.weight = q.base.weight
    q.base = new


def composed_fused_module(model: Any) -> None:
    model.model.layers[2].self_attn.q_proj = model.model.layers[2].self_attn.q_proj.base


@pytest.mark.parametrize(
    "change", [composed_weight, composed_assigned, composed_in_place, composed_module, composed_fused_module]
)
@pytest.mark.parametrize("kind", ["routed", "static"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_change_of_the_composition_is_seen_or_refused_and_never_stale(
    make_base: Any, composed_of: Any, some_ids: Any, logits: Any, kind: str, change: Any, gradients: bool
) -> None:
    composed, fresh = composed_of(kind, make_base("llama")), composed_of(kind, make_base("llama"))

    def run(model: Any) -> Any:
        with torch.set_grad_enabled(gradients):
            return model(input_ids=some_ids()).logits.detach()

    before = run(composed)  # whatever is derived from weights is there
    change(composed)
    change(fresh)

    if change in (composed_module, composed_fused_module):
        with pytest.raises(IncompatibleError, match=r"layers\.2\.self_attn\.q_proj"):
            run(composed)
    else:
        found = run(composed)
        assert not torch.equal(found, before)
        torch.testing.assert_close(found, run(fresh), rtol=0, atol=0)


def test_a_sibling_of_a_changed_composition_is_as_before(
    base: Any, composed_of: Any, some_ids: Any, logits: Any
) -> None:
    first, second = composed_of("routed", base), composed_of("routed", base)
    expected = logits(second, input_ids=some_ids())

    composed_weight(first)

    assert torch.equal(logits(second, input_ids=some_ids()), expected)
    assert torch.equal(logits(detach(second), input_ids=some_ids()), logits(base, input_ids=some_ids()))


def test_unmerging_after_the_base_was_written_to_computes_with_it(
    base: Any, composed_of: Any, some_ids: Any, logits: Any
) -> None:
    model = composed_of("merged", base)
    write_in_place(base)

    unmerge_experts(model)

    assert torch.equal(logits(model, input_ids=some_ids()), logits(composed_of("static", base), input_ids=some_ids()))


# --- placement ---


def on_meta(model: Any, folder: Any) -> Any:
    return model.to("meta")


def partly_on_meta(model: Any, folder: Any) -> Any:
    model.lm_head.to("meta")
    return model


def to_cpu_memory(model: Any, folder: Any) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model: Any, folder: Any) -> Any:
    return disk_offload(model, str(folder / "offloaded"), execution_device=torch.device("cpu"))


def partly_to_disk(model: Any, folder: Any) -> Any:
    device_map: Any = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    device_map |= dict.fromkeys(["model.layers.2", "model.layers.3"], "disk")
    device_map |= dict.fromkeys(["model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return dispatch_model(model, device_map, main_device=torch.device("cpu"), offload_dir=str(folder / "offloaded"))


@pytest.mark.parametrize("place", [on_meta, partly_on_meta, to_cpu_memory, to_disk, partly_to_disk])
def test_a_base_in_parts_is_refused_before_anything_moves(
    base: Any, random_stack: Any, tmp_path: Any, place: Any
) -> None:
    stack = random_stack(base)
    placed = place(base, tmp_path)
    before = {name: (id(p), p.device) for name, p in placed.named_parameters()}

    with pytest.raises(IncompatibleError, match="not on one device") as refusal:
        attach(placed, stack, router=None, fixed=torch.ones(3))

    assert "--device cuda" in str(refusal.value)
    assert {name: (id(p), p.device) for name, p in placed.named_parameters()} == before


def test_a_device_map_of_one_device_is_composed(
    base: Any, compose: Any, make_base: Any, some_ids: Any, logits: Any
) -> None:
    placed = dispatch_model(base, {"": "cpu"}, force_hooks=True)

    found = logits(compose(placed), input_ids=some_ids())

    assert torch.equal(found, logits(compose(make_base("llama")), input_ids=some_ids()))
