"""ExpertGroup: modules of one input are computed together, and nothing stale is ever handed out."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorary.adapters.layer import forward_state
from lorary.adapters.layer.forward_state import ForwardState, OpenGates
from lorary.adapters.layer.fused import ExpertGroup, FusedLinear
from lorary.adapters.layer.stack import same_input_groups
from lorary.domains.errors import InputError

D_IN, RANK = 6, 4


@pytest.fixture
def group() -> ExpertGroup:
    """Two modules of one input."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    members = []
    for d_out in (5, 7):
        base = nn.Linear(D_IN, d_out, bias=False).requires_grad_(False)
        base.weight.copy_(normal(d_out, D_IN))
        members.append(FusedLinear(base))
    return ExpertGroup(
        members,
        "layer",
        A=normal(2 * RANK, D_IN),
        ranks=[RANK] * 2,
        Bt=[normal(RANK, 5), normal(RANK, 7)],
        slot_of_rank=(0, 0, 1, 2),
    )


@pytest.fixture(autouse=True)
def state() -> Iterator[ForwardState]:
    """The forward pass that a test is a part of, with its gates."""
    state = ForwardState(None)
    state.gates["layer"] = torch.randn(1, 3, RANK, generator=torch.Generator().manual_seed(2)).abs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_state._running, "state", state)
        yield state


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 3, D_IN, generator=torch.Generator().manual_seed(1))


def expected(group: Any, place: int, x: Tensor) -> Tensor:
    A, Bt = group.A.split(group.frozen_ranks)[place], group.get_buffer(f"Bt{place}")
    running: Any = forward_state.running_state()
    return group.members[place].base(x) + (running.gates["layer"] * (x @ A.T)) @ Bt


def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Collects the shape of the A of every A product."""
    seen: list[torch.Size] = []
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: (seen.append(b.shape), plain(a, b))[1])
    return seen


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_product_serves_all_modules_that_read_the_same_tensor(
    order: tuple[int, int], group: Any, x: Tensor, state: ForwardState, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = products(monkeypatch)

    found = {place: group.members[place](x) for place in order}

    assert seen == [(D_IN, 2 * RANK)]
    for place in order:
        torch.testing.assert_close(found[place], expected(group, place, x))
    assert not state.siblings[group].outputs


def test_another_tensor_is_computed_anew(group: Any, x: Tensor) -> None:
    group.members[0](x)
    other = x + 1

    torch.testing.assert_close(group.members[1](other), expected(group, 1, other))


def test_an_equal_tensor_is_not_the_same_tensor(group: Any, x: Tensor) -> None:
    group.members[0](x)
    twin = x.clone()
    x.zero_()

    torch.testing.assert_close(group.members[1](twin), expected(group, 1, twin))


def test_a_tensor_that_was_written_to_is_not_the_same_tensor(group: Any, x: Tensor) -> None:
    group.members[0](x)
    x.mul_(2)

    torch.testing.assert_close(group.members[1](x), expected(group, 1, x))


def test_a_hook_may_write_to_the_input_of_one_module(group: Any, x: Tensor) -> None:
    def double(_module: nn.Module, args: Any) -> None:
        args[0].mul_(2)

    with torch.inference_mode():
        given = x.clone()  # torch counts no writes to it
        wanted = [expected(group, 0, x), expected(group, 1, x * 2)]
        group.members[1].register_forward_pre_hook(double)

        found = [group.members[0](given), group.members[1](given)]

    torch.testing.assert_close(found, wanted)


def test_outputs_under_other_gates_are_not_used(group: Any, x: Tensor, state: Any) -> None:
    group.members[0](x)
    state.gates["layer"] = state.gates["layer"] * 2

    torch.testing.assert_close(group.members[1](x), expected(group, 1, x))


def test_the_same_module_twice_gives_the_same_twice(group: Any, x: Tensor) -> None:
    first, second = group.members[0](x), group.members[0](x)

    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_modules_that_never_read_the_same_tensor_are_soon_computed_alone(
    group: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(4):
        group.members[0](x + step)
        group.members[1](x - step)
    seen = products(monkeypatch)

    one, other = x + 9, x - 9
    torch.testing.assert_close(group.members[0](one), expected(group, 0, one))
    torch.testing.assert_close(group.members[1](other), expected(group, 1, other))

    assert seen == [(D_IN, RANK)] * 2


def test_modules_called_alone_run_on_their_own_experts(group: Any, x: Tensor, state: Any) -> None:
    for _ in range(3):
        for place in (0, 1):
            twin = x.clone()
            torch.testing.assert_close(group.members[place](twin), expected(group, place, twin))
    whole = state.gates["layer"]

    for first, stop in ((0, 1), (1, 3), (0, 3), (2, 3)):
        is_open = torch.tensor([first <= slot < stop for slot in group.slot_of_rank])
        state.gates["layer"] = (OpenGates(0, 3, True, (first, stop), whole[0][:, is_open]),)
        for place in (1, 0):
            found = group.members[place](x.clone())
            A, Bt = group.A.split(group.frozen_ranks)[place], group.get_buffer(f"Bt{place}")
            wanted = group.members[place].base(x) + (whole * is_open * (x @ A.T)) @ Bt
            torch.testing.assert_close(found, wanted)


def test_an_error_between_two_modules_leaves_nothing_behind(group: Any, x: Tensor) -> None:
    group.members[0](x)
    with pytest.raises(RuntimeError):
        group.members[0](torch.zeros(1, 3, D_IN + 1))

    again = x * 2
    torch.testing.assert_close(group.members[0](again), expected(group, 0, again))
    torch.testing.assert_close(group.members[1](again), expected(group, 1, again))


def test_a_copy_takes_no_outputs_along(group: Any, x: Tensor, state: ForwardState) -> None:
    group.members[0](x)

    twin = copy.deepcopy(group)

    assert not twin._bases
    assert twin not in state.siblings
    assert twin.members[1].group is twin
    assert twin.members[0] is not group.members[0]


def test_the_output_of_a_foreign_module_is_not_written_to(x: Tensor) -> None:
    class Keeper(nn.Module):
        kept = torch.ones(1, 3, 5)

        def forward(self, _x: Tensor) -> Tensor:
            return self.kept

    member = FusedLinear(Keeper())
    ExpertGroup([member], "layer", A=torch.ones(RANK, D_IN), ranks=[RANK], Bt=[torch.ones(RANK, 5)])

    found = member(x)

    assert torch.equal(Keeper.kept, torch.ones(1, 3, 5))
    assert not torch.equal(found, Keeper.kept)


def test_a_hook_on_the_base_module_may_keep_its_output(group: Any, x: Tensor) -> None:
    kept: list[Tensor] = []
    base = group.members[0].base
    base.register_forward_hook(lambda _m, _a, y: kept.append(y))

    group.members[0](x)

    assert torch.equal(kept[0], nn.functional.linear(x, base.weight))


def test_names_of_families_tell_which_targets_read_one_input() -> None:
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "attn.c_attn"]

    assert same_input_groups(dict.fromkeys(names, 8)) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
        ["attn.c_attn"],
    ]


def test_modules_of_one_parent_with_other_input_widths_are_not_grouped() -> None:
    # RWKV's channel mixing: value reads what key returns
    widths = {"attention.key": 8, "attention.value": 8, "feed_forward.key": 8, "feed_forward.value": 32}

    assert same_input_groups(widths) == [
        ["attention.key", "attention.value"],
        ["feed_forward.key"],
        ["feed_forward.value"],
    ]


def test_a_base_weight_that_someone_trains_gets_its_gradient(group: Any, x: Tensor) -> None:
    weight = group.members[0].base.weight.requires_grad_(True)

    (group.members[0](x).sum() + group.members[1](x).sum()).backward()

    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(5, D_IN))


def test_an_input_of_other_positions_than_the_layers_is_refused(group: Any, x: Tensor, state: Any) -> None:
    group.names = ("attn.kv_b_proj", "other")
    state.gates["layer"] = state.gates["layer"][:, :1]

    with pytest.raises(InputError, match=r"attn.kv_b_proj cannot have experts") as caught:
        group.members[0](x)

    assert caught.value.cause == "it is called with 3 positions, its decoder layer with 1"


def test_a_replaced_weight_is_seen(group: Any, x: Tensor) -> None:
    with torch.no_grad():
        group.members[0](x)
        group.members[0].base.weight = nn.Parameter(torch.ones(5, D_IN), requires_grad=False)

        torch.testing.assert_close(group.members[0](x), expected(group, 0, x))
