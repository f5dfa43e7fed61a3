"""FusedLinear against the definition: one gated rank-one update after another, in float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lorary.adapters.bank import LayerExperts
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.forward_state import ForwardState, run_with
from lorary.adapters.layer.fused import ExpertGroup, FusedLinear
from lorary.adapters.layer.gates import TEMPERATURE, LayerGates
from lorary.adapters.layer.routing import recording_routes
from lorary.adapters.layer.stack import Stack, _Slice, build_gates, build_group, stack_gates, stack_group
from lorary.adapters.layer.stacked import StackedLayer
from lorary.domains.errors import IncompatibleError

WIDTH, D_IN, D_OUT = 16, 24, 10
EXPERT = st.tuples(st.integers(1, 6), st.floats(0.5, 32), st.sampled_from(("lora", "rslora")))
BANK = st.tuples(st.lists(EXPERT, min_size=1, max_size=3), st.booleans(), st.booleans())  # experts, has target, V
SEED = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="session")
def naive_gates() -> Callable[..., list[Tensor]]:
    """Each bank's gates (tokens, rank) from the definition, in the precision of `hidden`."""

    def gates(layers: Sequence[LayerExperts], hidden: Tensor, slot_gate: Tensor) -> list[Tensor]:
        found = []
        length = hidden.norm(dim=-1, keepdim=True)
        for slot, layer in enumerate(layers):
            rows = layer.expert_gate.to(hidden.dtype)
            cosine = (hidden / length) @ (rows / rows.norm(dim=-1, keepdim=True)).T
            expert_gate = torch.softmax(cosine / TEMPERATURE, dim=-1)
            rank_gate = torch.ones(len(hidden), layer.rank, dtype=hidden.dtype)
            if layer.rank_gate is not None:
                of_unit_size = hidden / length * math.sqrt(hidden.shape[-1])
                rank_gate = 2 * torch.sigmoid(of_unit_size @ layer.rank_gate.to(hidden.dtype).T)
            columns, rank = [], 0
            for e, expert in enumerate(layer.experts):
                for _ in range(expert.rank):
                    columns.append(slot_gate[:, slot] * expert_gate[:, e] * rank_gate[:, rank])
                    rank += 1
            found.append(torch.stack(columns, dim=1))
        return found

    return gates


@pytest.fixture(scope="session")
def naive_update() -> Callable[..., Tensor]:
    """The sum over slots, experts and ranks of gate * scale * (B[:, r] A[r, :]) x, one weight matrix after another."""

    def update(layers: Sequence[LayerExperts], target: str, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        total: Any = 0
        for layer, gate in zip(layers, gates, strict=True):
            if target not in layer.A:
                continue
            A, B, rank = layer.A[target].to(x.dtype), layer.B[target].to(x.dtype), 0
            for expert in layer.experts:
                divisor = math.sqrt(expert.rank) if expert.method == "rslora" else expert.rank
                for _ in range(expert.rank):
                    delta_W = expert.alpha / divisor * torch.outer(B[:, rank], A[rank])
                    total = total + gate[:, rank : rank + 1] * (x @ delta_W.T)
                    rank += 1
        return total

    return update


@pytest.fixture(scope="session")
def fused_layer() -> Callable[..., tuple[FusedLinear, LayerGates, list[LayerExperts]]]:
    """One target module and the gates of its layer, from layers of experts; the last may be trainable."""

    def make(
        layers: list[LayerExperts], *, trainable: bool, d_in: int = D_IN, d_out: int = D_OUT, dtype: Any = torch.float32
    ) -> tuple[FusedLinear, LayerGates, list[LayerExperts]]:
        base = nn.Linear(d_in, d_out, dtype=dtype).requires_grad_(False)
        with torch.no_grad():
            base.weight.copy_(torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(7)) * d_in**-0.5)
            base.bias.zero_()
        last = len(layers) - 1
        slices = [_Slice(slot=i, experts=layer, is_new=trainable and i == last) for i, layer in enumerate(layers)]
        stacked = StackedLayer(
            groups=(stack_group(["a"], slices, dtype),),
            slot_of_rank=(),
            gates=stack_gates(slices, static=False),
            new=layers[-1] if trainable else None,
        )
        _, modules = build_group({"a": base}, stacked, stacked.groups[0], "layer")
        return modules["a"], build_gates(stacked), layers

    return make


@pytest.fixture(scope="session")
def layers_of(random_layer: Callable[..., LayerExperts]) -> Callable[..., list[LayerExperts]]:
    """Layers of experts from hypothesis' description of the banks; the first and last always have the target `a`."""

    def make(banks: list[Any], seed: int, shape: tuple[int, int] = (D_IN, D_OUT)) -> list[LayerExperts]:
        last = len(banks) - 1
        return [
            random_layer(
                experts,
                {"a": shape, "b": (3, 4)} if has_target or i in (0, last) else {"b": (3, 4)},
                width=WIDTH,
                seed=seed + i,
                rank_gates=rank_gates,
            )
            for i, (experts, has_target, rank_gates) in enumerate(banks)
        ]

    return make


def random_inputs(seed: int, slots: int, *, batch: int = 2, seq: int = 5, d_in: int = D_IN) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, seq, d_in, generator=generator)
    hidden = torch.randn(batch, seq, WIDTH, generator=generator)
    slot_gate = torch.softmax(torch.randn(batch, seq, slots, generator=generator), -1)
    return x, hidden, slot_gate


def run(fused: FusedLinear, gates: LayerGates, x: Tensor, hidden: Tensor, slot_gate: Tensor) -> Tensor:
    return under(gates(hidden, slot_gate), fused, x)


def under(gates: Tensor, fused: FusedLinear, x: Tensor) -> Tensor:
    """Run a module as part of a forward whose layer has these gates."""
    state = ForwardState(None)
    state.gates["layer"] = gates
    return run_with(state, fused, x)


def flat(tensor: Any) -> Tensor:
    return tensor.double().reshape(-1, tensor.shape[-1])


@settings(deadline=None, max_examples=60)
@given(banks=st.lists(BANK, min_size=1, max_size=4), trainable=st.booleans(), seed=SEED)
def test_output_is_the_sum_of_all_gated_weight_updates(
    banks: list[Any],
    trainable: bool,
    seed: int,
    layers_of: Any,
    fused_layer: Any,
    naive_gates: Any,
    naive_update: Any,
    relative_error: Any,
) -> None:
    fused, gates, layers = fused_layer(layers_of(banks, seed), trainable=trainable)
    x, hidden, slot_gate = random_inputs(seed, len(banks))

    y = run(fused, gates, x, hidden, slot_gate)

    by_bank = naive_gates(layers, flat(hidden), flat(slot_gate))
    expected = flat(x) @ fused.base.weight.double().T + naive_update(layers, "a", flat(x), by_bank)
    assert relative_error(flat(y), expected) <= 1e-5


@settings(deadline=None, max_examples=30)
@given(banks=st.lists(BANK, min_size=1, max_size=4), seed=SEED)
def test_every_gradient_is_that_of_the_sum(
    banks: list[Any],
    seed: int,
    layers_of: Any,
    fused_layer: Any,
    naive_gates: Any,
    naive_update: Any,
    relative_error: Any,
) -> None:
    fused, gates, layers = fused_layer(layers_of(banks, seed), trainable=True)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(seed, len(banks))]
    wanted = torch.randn(10, D_OUT, generator=torch.Generator().manual_seed(seed))
    last, naive = as_float64_leaves(layers[-1])
    naive_inputs = [flat(tensor.detach()).requires_grad_() for tensor in inputs]

    (run(fused, gates, *inputs).reshape(10, D_OUT) * wanted).sum().backward()

    x, hidden, slot_gate = naive_inputs
    by_bank = naive_gates([*layers[:-1], last], hidden, slot_gate)
    y = x @ fused.base.weight.double().T + naive_update([*layers[:-1], last], "a", x, by_bank)
    (y * wanted.double()).sum().backward()
    found = {"A": fused.new_A, "B": fused.new_B, "W_e": gates.new_expert_gate, "V": gates.new_rank_gate}
    for name, leaf in naive.items():
        assert relative_error(found[name].grad, leaf.grad, floor=1.0) <= 1e-5, name
    for tensor, leaf in zip(inputs, naive_inputs, strict=True):
        assert tensor.grad is not None
        assert relative_error(flat(tensor.grad), leaf.grad, floor=1.0) <= 1e-5


def as_float64_leaves(layer: LayerExperts) -> tuple[LayerExperts, dict[str, Tensor]]:
    """A copy of a layer in float64 whose tensors collect gradients."""
    leaves = {"A": layer.A["a"], "B": layer.B["a"], "W_e": layer.expert_gate}
    if layer.rank_gate is not None:
        leaves["V"] = layer.rank_gate
    leaves = {name: tensor.double().clone().requires_grad_() for name, tensor in leaves.items()}
    copy = LayerExperts(
        experts=layer.experts,
        A={"a": leaves["A"]},
        B={"a": leaves["B"]},
        expert_gate=leaves["W_e"],
        rank_gate=leaves.get("V"),
    )
    return copy, leaves


@pytest.mark.parametrize("is_plain", [True, False], ids=["linear", "other-module"])
@pytest.mark.parametrize("frozen", [0, 3], ids=["only-new", "frozen-and-new"])
def test_gradients_of_a_group_agree_with_finite_differences(frozen: int, is_plain: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, gates = leaf(2, 3, 5).requires_grad_(), leaf(2, 3, frozen + 2).requires_grad_()
    bases = [nn.Linear(5, size, bias=bias, dtype=torch.float64) for size, bias in ((4, True), (6, False))]
    members = [
        FusedLinear(
            (base if is_plain else nn.Sequential(base)).requires_grad_(False),
            new_A=leaf(2, 5),
            new_B=leaf(base.out_features, 2),
            new_scale=leaf(2),
        )
        for base in bases
    ]
    group = ExpertGroup(
        members, "layer", A=leaf(2 * frozen, 5), ranks=[frozen] * 2, Bt=[leaf(frozen, 4), leaf(frozen, 6)]
    )
    trained: Any = [parameter for member in members for parameter in (member.new_A, member.new_B)]

    def run_group(x: Tensor, gates: Tensor, *_trained: Tensor) -> Any:
        return group.outputs(x, gates, (0, 1))

    assert torch.autograd.gradcheck(run_group, (x, gates, *trained))


@pytest.mark.parametrize(
    ("batch", "seq", "d_in", "d_out"),
    [(1, 1, 63, 63), (1, 63, 1, 63), (3, 63, 63, 1), (1, 1, 1, 1)],
    ids=["one-token", "one-input", "one-output", "ones"],
)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_odd_sizes_agree_with_the_sum(
    batch: int,
    seq: int,
    d_in: int,
    d_out: int,
    trainable: bool,
    layers_of: Any,
    fused_layer: Any,
    naive_gates: Any,
    naive_update: Any,
    relative_error: Any,
) -> None:
    banks = [([(1, 4.0, "lora")], True, True), ([(3, 8.0, "rslora"), (1, 1.0, "lora")], True, False)]
    layers = layers_of(banks, 3, (d_in, d_out))
    fused, gates, _ = fused_layer(layers, trainable=trainable, d_in=d_in, d_out=d_out)
    x, hidden, slot_gate = random_inputs(5, 2, batch=batch, seq=seq, d_in=d_in)

    y = run(fused, gates, x.requires_grad_(), hidden, slot_gate)
    y.sum().backward()

    by_bank = naive_gates(layers, flat(hidden), flat(slot_gate))
    leaf = flat(x.detach()).requires_grad_()
    expected = leaf @ fused.base.weight.double().T + naive_update(layers, "a", leaf, by_bank)
    expected.sum().backward()
    assert y.shape == (batch, seq, d_out)
    assert relative_error(flat(y), expected) <= 1e-5
    assert relative_error(flat(x.grad), leaf.grad) <= 1e-5


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16-model", "autocast"])
def test_bfloat16_is_close_in_outputs_and_gradients(
    autocast: bool, layers_of: Any, fused_layer: Any, naive_gates: Any, naive_update: Any, relative_error: Any
) -> None:
    banks = [([(4, 8.0, "lora")] * 2, True, True), ([(2, 8.0, "rslora")] * 3, True, True)]
    dtype = torch.float32 if autocast else torch.bfloat16
    fused, gates, layers = fused_layer(layers_of(banks, 1), trainable=True, dtype=dtype)
    x, hidden, slot_gate = random_inputs(2, 2, seq=63)
    x = x.to(dtype).requires_grad_()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(fused, gates, x, hidden, slot_gate)
    y.float().square().sum().backward()

    last, leaves = as_float64_leaves(layers[-1])
    leaf = flat(x.detach()).requires_grad_()
    by_bank = naive_gates([layers[0], last], flat(hidden), flat(slot_gate))
    expected = leaf @ fused.base.weight.double().T + naive_update([layers[0], last], "a", leaf, by_bank)
    expected.square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert relative_error(flat(y), expected) <= 2e-2
    assert relative_error(flat(x.grad), leaf.grad) <= 2e-2
    assert relative_error(fused.new_A.grad, leaves["A"].grad) <= 2e-2
    assert relative_error(fused.new_B.grad, leaves["B"].grad) <= 2e-2
    assert fused.new_A.grad.dtype == torch.float32


@pytest.mark.parametrize("trainable", [False, True], ids=["all-frozen", "last-bank-trainable"])
def test_matrix_products_are_two_thin_ones_each_way_and_none_for_weights_of_frozen_experts(
    trainable: bool, layers_of: Any, fused_layer: Any
) -> None:
    banks = [([(4, 8.0, "lora")] * 3, True, False), ([(2, 8.0, "lora")], True, False)]
    fused, gates, _ = fused_layer(layers_of(banks, 1), trainable=trainable)
    x, hidden, slot_gate = random_inputs(2, 2, batch=2, seq=63)
    given = gates(hidden, slot_gate).detach()

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        under(given, fused, x.requires_grad_()).sum().backward()

    tokens, rank, new = 126, 14, 2 * trainable
    base = 2 * tokens * D_IN * D_OUT  # once forward, once for the gradient of x
    thin = 2 * tokens * rank * (D_IN + D_OUT)
    new_weights = 2 * tokens * new * (D_IN + D_OUT)
    assert counter.get_total_flops() == 2 * base + 2 * thin + new_weights


def addmm_flops(_into: Any, left: Any, right: Any, out_shape: Any = None, **_: Any) -> int:
    """FlopCounterMode does not know the product that adds in place."""
    return 2 * left[0] * left[1] * right[1]


def test_frozen_experts_take_part_in_no_gradient(layers_of: Any, fused_layer: Any) -> None:
    fused, gates, _ = fused_layer(layers_of([([(2, 4.0, "lora")], True, True)] * 2, 1), trainable=True)
    x, hidden, slot_gate = random_inputs(2, 2)

    run(fused, gates, x, hidden, slot_gate).sum().backward()

    buffers = [*fused.buffers(), *fused.group.buffers(), *gates.buffers()]
    assert not any(buffer.requires_grad for buffer in buffers)
    assert all(buffer.grad is None for buffer in buffers)
    assert fused.base.weight.grad is None
    assert {name for name, _ in fused.named_parameters() if not name.startswith("base.")} == {"new_A", "new_B"}


def test_no_weight_gradient_is_computed_for_new_experts_that_need_none(layers_of: Any, fused_layer: Any) -> None:
    fused, gates, _ = fused_layer(layers_of([([(2, 4.0, "lora")], True, True)], 1), trainable=True)
    fused.requires_grad_(False)
    x, hidden, slot_gate = random_inputs(2, 1)

    run(fused, gates.requires_grad_(False), x.requires_grad_(), hidden, slot_gate).sum().backward()

    assert fused.new_A.grad is None
    assert x.grad is not None


def test_running_outside_its_decoder_layer_is_refused(layers_of: Any, fused_layer: Any) -> None:
    fused, _, _ = fused_layer(layers_of([([(2, 4.0, "lora")], True, True)], 1), trainable=False)

    with pytest.raises(RuntimeError, match="outside"):
        fused(torch.zeros(1, 1, D_IN))


@pytest.mark.parametrize("seed", range(3))
def test_every_module_of_an_attached_model_adds_the_sum_of_its_experts(
    seed: int,
    tiny_llama: Any,
    random_stack: Callable[..., Stack],
    random_router: Any,
    naive_gates: Any,
    naive_update: Any,
    relative_error: Any,
) -> None:
    base = tiny_llama(seed)
    stack = random_stack(base, seed=seed)
    composed: Any = attach(base, stack, router=random_router(base, seed=seed))
    entered: dict[int, Tensor] = {}
    seen: list[Any] = []

    def record(index: int, target: str) -> Any:
        return lambda module, args, y: seen.append((index, target, args[0], module.base(args[0]), y))

    for index in stack.layers:
        layer = composed.model.layers[index]
        layer.register_forward_pre_hook(lambda _m, args, i=index: entered.__setitem__(i, args[0]))
        for target, module in layer.named_modules():
            if isinstance(module, FusedLinear):
                module.register_forward_hook(record(index, target))

    with torch.no_grad(), recording_routes(composed) as routes:
        composed(torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(seed)))

    slot_gate = flat(routes[0].slot_gate)
    assert len(seen) == sum(len({t for bank in stack.banks for t in bank.layers[i].A}) for i in stack.layers)
    for index, target, x, before, y in seen:
        layers = [bank.layers[index] for bank in stack.banks]
        by_bank = naive_gates(layers, flat(entered[index]), slot_gate)
        expected = flat(before) + naive_update(layers, target, flat(x), by_bank)
        assert relative_error(flat(y), expected) <= 1e-5, (index, target)


@pytest.mark.own_failure(
    "a layer that reads the weight of a module with experts instead of calling it",
    before="a crash without a name; with a weight attribute, the experts would be lost",
    now="no target; read in a forward pass all the same, it is refused, exit 6",
)
def test_a_weight_in_a_forward_pass_can_be_described_and_not_computed_with(
    base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    composed = compose(base)
    module = composed.model.layers[-1].mlp.down_proj
    assert torch.equal(module.weight, module.base.weight)
    assert (module.in_features, module.out_features) == (48, 32)

    def read(_module: Any, args: Any) -> None:
        assert module.weight.shape == (32, 48)
        assert module.weight.dtype == torch.float32
        torch.nn.functional.linear(args[0], module.weight)

    module.register_forward_pre_hook(read)

    with pytest.raises(IncompatibleError, match="reads the weight of a module with experts"):
        logits(composed, input_ids=some_ids())
