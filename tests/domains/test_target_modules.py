"""Targets are found layer by layer; what experts could not extend exactly is left out, with the reason."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorary.domains.base_model import find_layout
from lorary.domains.errors import IncompatibleError, InputError
from lorary.domains.target_modules import (
    ARGUMENTS,
    POSITIONS,
    READ,
    ROUTER,
    SHARED,
    UNCALLED,
    Targets,
    find_targets,
    probe_ids,
)

torch.set_num_threads(1)

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WIDTH = 32


class Odd(nn.Module):
    """A wrapper of an MLP that also uses a module `inner` in its own way."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


class ReadsWeight(Odd):
    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # a fused kernel; elsewhere the module is called
            return F.linear(x, self.inner.weight)  # type: ignore[arg-type]
        return self.inner(x)


class ReadsDtype(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.inner.weight.dtype))  # type: ignore[union-attr]


class Ignores(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return x


class ReadsFirst(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x[:, :1])


class Permutes(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flip(1)).flip(1)


class TakesFirst(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Routes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, WIDTH), nn.ParameterList([nn.Parameter(torch.ones(2, WIDTH, WIDTH))])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).softmax(-1)


class Pair(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output = super().forward(input)
        return output, output


def targets_of(model: PreTrainedModel) -> Targets:
    """Find the targets of a model in evaluation mode."""
    return find_targets(model.eval(), find_layout(model))


def test_every_layer_has_the_modules_that_it_has(tiny_llama: Any) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = nn.Identity()

    found = targets_of(model)

    assert found.by_layer == (ATTENTION + MLP, ATTENTION, ATTENTION + MLP, ATTENTION + MLP)
    assert found.choose(["up_proj"]) == (("mlp.up_proj",), (), ("mlp.up_proj",), ("mlp.up_proj",))


def test_targets_are_chosen_by_the_last_part_of_their_path(tiny_llama: Any) -> None:
    found = targets_of(tiny_llama()).choose(("v_proj", "q_proj", "down_proj"))

    assert found == (("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"),) * 4


def test_an_unknown_target_is_refused_with_the_known_ones(tiny_llama: Any) -> None:
    with pytest.raises(InputError, match="no target module named 'c_attn'") as refusal:
        targets_of(tiny_llama()).choose(("q_proj", "c_attn"))

    assert "q_proj" in str(refusal.value.fix)


@pytest.mark.parametrize(
    ("around", "inner", "reason"),
    [
        (ReadsWeight, nn.Linear, READ),
        (ReadsDtype, nn.Linear, None),
        (Ignores, nn.Linear, UNCALLED),
        (ReadsFirst, nn.Linear, POSITIONS),
        (TakesFirst, Pair, ARGUMENTS),
    ],
)
def test_what_experts_cannot_extend_is_left_out_and_refused_by_name(
    around: type[Odd], inner: type[nn.Linear], reason: str | None, tiny_llama: Any
) -> None:
    model = tiny_llama()
    model.model.layers[2].mlp = around(inner(WIDTH, WIDTH))

    found = targets_of(model)

    assert found.by_layer[2] == (ATTENTION if reason else (*ATTENTION, "mlp.inner"))
    assert found.excluded.get("mlp.inner") == reason
    if reason:
        with pytest.raises(InputError, match="'inner' of LlamaForCausalLM cannot have experts") as refusal:
            found.choose(["inner"])
        assert refusal.value.cause == reason


def test_tokens_in_another_order_are_noticed(tiny_llama: Any) -> None:
    model = tiny_llama()
    model.model.layers[2].mlp = Permutes(nn.Linear(WIDTH, WIDTH))

    assert targets_of(model).excluded == {"mlp.inner": POSITIONS}


def test_the_router_of_a_base_is_no_target(tiny_llama: Any) -> None:
    model = tiny_llama()
    model.model.layers[2].mlp = Routes()

    found = targets_of(model)

    assert found.excluded["mlp.gate"] == ROUTER
    assert "mlp.gate" not in found.by_layer[2]


def test_a_module_that_several_layers_share_is_no_target(tiny_llama: Any) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[3].mlp

    found = targets_of(model)

    assert found.by_layer == (ATTENTION + MLP, ATTENTION, ATTENTION + MLP, ATTENTION)
    assert set(found.excluded.values()) == {SHARED}


def test_an_expert_of_the_base_that_happened_to_get_all_tokens_is_no_exception(tiny_llama: Any) -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.parts[0](x)  # the first expert gets everything, as it happens

    model = tiny_llama()
    model.model.layers[0].mlp = Mixture()

    assert targets_of(model).by_layer[0] == ATTENTION


def test_the_share_counts_the_weights_of_all_layers(tiny_llama: Any) -> None:
    model = tiny_llama()
    layers = model.model.layers
    layers[0].mlp.experts = nn.Parameter(torch.zeros(4, WIDTH, WIDTH))
    linear = sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear))

    assert targets_of(model).share == linear / sum(parameter.numel() for parameter in layers.parameters())


def bert(**changes: Any) -> PreTrainedModel:
    """A tiny encoder, or a decoder with `is_decoder=True`."""
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("bert", vocab_size=64, num_attention_heads=4, **small, **changes)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="BertLMHeadModel is no causal language model") as refusal:
        targets_of(bert())

    assert refusal.value.cause == "what it computes for a token depends on later tokens"


def test_the_same_model_as_a_decoder_is_accepted() -> None:
    assert all(targets_of(bert(is_decoder=True)).by_layer)


def test_hidden_states_with_another_axis_are_refused(tiny_llama: Any) -> None:
    model = tiny_llama()
    model.model.layers[1].register_forward_hook(lambda _m, _a, output: output.expand(3, *output.shape))

    with pytest.raises(IncompatibleError, match=r"cannot have experts.*\n.*\(3, 2, 6, 32\) instead of \(2, 6, 32\)"):
        targets_of(model)


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left_behind(fails: bool, tiny_llama: Any) -> None:
    model = tiny_llama()
    if fails:
        model.lm_head = nn.Linear(WIDTH + 1, 4)

    try:
        targets_of(model)
    except RuntimeError:
        assert fails

    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_texts_of_the_probe_avoid_special_tokens_and_differ_in_the_last_one(tiny_llama: Any) -> None:
    ids = probe_ids(tiny_llama(vocab_size=16, pad_token_id=9, eos_token_id=[10, 12]))

    assert not set(ids.flatten().tolist()) & {9, 10, 12}
    assert torch.equal(ids[0, :-1], ids[1, :-1])
    assert ids[0, -1] != ids[1, -1]
