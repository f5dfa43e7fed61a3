"""What belongs to one forward pass stays in it: threads, nested calls, exceptions, settings of one context, memory."""

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lorary.adapters.kernels.dispatch import use_kernels
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.forward_state import running_state
from lorary.adapters.layer.fused import FusedLinear
from lorary.adapters.layer.routing import fixed_slots, recording_routes
from lorary.adapters.layer.stack import Stack

THREADS = 8
NAMES = ("general", "a", "b", "c")


def together(work: list[Callable[[], Any]]) -> list[Any]:
    """Run functions in as many threads, which start at once."""
    start = threading.Barrier(len(work))

    def run(one: Callable[[], Any]) -> Any:
        start.wait()
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(run, one) for one in work]]


@pytest.fixture
def compositions(base: Any, compose: Any) -> list[Any]:
    """Two compositions over one base, another number of slots each."""
    return [compose(base, seed=1), compose(base, seed=2, names=NAMES)]


def wrong_forwards(models: list[Any], some_ids: Any, logits: Any, rounds: int) -> int:
    """Return how many of `rounds` forwards in each thread differ in any bit from the same forward alone."""
    jobs = [(model, some_ids(1 + i % 2, 3 + 5 * i, seed=i)) for i in range(THREADS // 2) for model in models]
    alone = [logits(model, input_ids=ids) for model, ids in jobs]

    def work(first: int) -> int:
        order = [(first + step) % len(jobs) for step in range(rounds)]
        return sum(not torch.equal(logits(jobs[i][0], input_ids=jobs[i][1]), alone[i]) for i in order)

    return sum(together([lambda first=first: work(first) for first in range(THREADS)]))


def test_forwards_in_threads_are_bit_equal_to_forwards_alone(compositions: Any, some_ids: Any, logits: Any) -> None:
    assert wrong_forwards(compositions, some_ids, logits, rounds=15) == 0


@pytest.mark.own_failure(
    "two threads on one composed model",
    before="85 to 107 of 120 answers off by up to 5.5; later ones, too",
    now="each answer bit-equal to the one alone",
)
@pytest.mark.slow
def test_ten_thousand_forwards_in_threads_are_bit_equal(compositions: Any, some_ids: Any, logits: Any) -> None:
    assert wrong_forwards(compositions, some_ids, logits, rounds=10_000 // THREADS) == 0


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_generate_in_threads_gives_what_it_gives_alone(
    compositions: Any, some_ids: Any, generated: Any, rounds: int
) -> None:
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}]
    jobs = list(itertools.product(compositions, enumerate(ways)))

    def answer(model: Any, seed: int, way: dict[str, Any]) -> Tensor:
        with model.reading_prompts(4 + 3 * seed):
            return generated(model, input_ids=some_ids(1, 4 + 3 * seed, seed=seed), **way)

    alone = [answer(model, seed, way) for model, (seed, way) in jobs]

    found = together([lambda m=m, s=s, w=w: [answer(m, s, w) for _ in range(rounds)] for m, (s, w) in jobs])

    assert all(torch.equal(one, expected) for ones, expected in zip(found, alone, strict=True) for one in ones)


# --- exceptions ---


@contextmanager
def failing(model: Any, call: int, error: BaseException) -> Iterator[None]:
    """Raise at one call of a module, counted over a whole forward; in the thread that opened it only."""
    left, here = itertools.count(), threading.get_ident()

    def fail(_module: nn.Module, _args: Any) -> None:
        if threading.get_ident() == here and next(left) == call:
            raise error

    with nn.modules.module.register_module_forward_pre_hook(fail):
        yield


def calls_of(model: Any, ids: Tensor) -> int:
    """Return how many modules a forward calls."""
    called: list[nn.Module] = []
    with nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.append(module)), torch.no_grad():
        model(input_ids=ids)
    return len(called)


@pytest.mark.own_failure(
    "an exception in the middle of a forward pass",
    before="the model could stay wrong for good",
    now="nothing of it is left",
)
def test_an_exception_at_any_point_of_a_forward_leaves_nothing_behind(
    base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    composed, ids = compose(base), some_ids(2, 5)
    expected, step = logits(composed, input_ids=ids), logits(composed, input_ids=ids[:, :3])

    for call in range(calls_of(composed, ids)):
        error = KeyboardInterrupt() if call % 2 else RuntimeError("on purpose")
        with pytest.raises(type(error)), failing(composed, call, error):
            logits(composed, input_ids=ids)

        assert running_state() is None
        if call % 5 == 0:
            assert torch.equal(logits(composed, input_ids=ids[:, :3]), step)

    assert torch.equal(logits(composed, input_ids=ids), expected)


def test_exceptions_in_one_thread_change_nothing_in_others(base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed, ids = compose(base), some_ids(2, 9)
    expected, calls = logits(composed, input_ids=ids), calls_of(composed, ids)

    def fail() -> int:
        for call in range(0, calls, 3):
            with pytest.raises(RuntimeError, match="on purpose"), failing(composed, call, RuntimeError("on purpose")):
                logits(composed, input_ids=some_ids(1, 4))
        return 0

    def work() -> int:
        return sum(not torch.equal(logits(composed, input_ids=ids), expected) for _ in range(20))

    assert together([fail, work, work, fail]) == [0, 0, 0, 0]


@pytest.mark.own_failure(
    "modules of one group computed one by one",
    before="k and v got the experts of q: off by 2.44",
    now="each has its own",
)
def test_a_module_alone_with_any_open_slots_after_any_exception_adds_its_own_experts(
    base: Any, random_stack: Any, some_ids: Any, logits: Any
) -> None:
    """The members of a group are called one by one, because a hook gives each a tensor of its own."""
    stack: Stack = random_stack(base, names=NAMES)
    ids = some_ids(2, 5)

    def clone(_module: nn.Module, args: Any) -> Any:
        return (args[0].clone(), *args[1:])

    for gates in itertools.product((0.0, 0.25), repeat=len(NAMES)):
        composed: Any = attach(base, stack, router=None, fixed=torch.tensor(gates))
        with use_kernels("reference"):
            expected = logits(attach(base, stack, router=None, fixed=torch.tensor(gates), threshold=0.0), input_ids=ids)
        torch.testing.assert_close(logits(composed, input_ids=ids), expected, rtol=1e-4, atol=1e-4)
        for module in composed.modules():
            if isinstance(module, FusedLinear):
                module.register_forward_pre_hook(clone)
        for call in (7, 12, 13, 14, 40):  # between the members of groups, among others
            with pytest.raises(RuntimeError, match="on purpose"), failing(composed, call, RuntimeError("on purpose")):
                logits(composed, input_ids=ids)
            torch.testing.assert_close(logits(composed, input_ids=ids), expected, rtol=1e-4, atol=1e-4)


# --- nested and other calls ---


def test_a_forward_inside_a_forward_is_one_of_its_own(compositions: Any, some_ids: Any, logits: Any) -> None:
    outer, inner = compositions
    expected = [logits(outer, input_ids=some_ids(1, 9)), logits(inner, input_ids=some_ids(2, 5))]
    again = logits(outer, input_ids=some_ids(2, 4))
    seen: list[Tensor] = []

    def ask(_module: nn.Module, _args: Any) -> None:
        hook.remove()
        seen.append(logits(inner, input_ids=some_ids(2, 5)))
        seen.append(logits(outer, input_ids=some_ids(2, 4)))  # the very model that is running

    hook = outer.model.layers[2].mlp.register_forward_pre_hook(ask)
    found = logits(outer, input_ids=some_ids(1, 9))

    assert torch.equal(found, expected[0])
    assert torch.equal(seen[0], expected[1])
    assert torch.equal(seen[1], again)


def test_a_layer_outside_a_forward_of_its_model_is_refused(compositions: Any, some_ids: Any, logits: Any) -> None:
    first, second = compositions
    hidden = torch.zeros(1, 3, 32)

    with pytest.raises(RuntimeError, match="outside"):
        first.model.layers[2](hidden)
    with (
        second.model.layers[1].register_forward_pre_hook(lambda *_: first.model.layers[2](hidden)),
        pytest.raises(RuntimeError, match="outside"),
    ):
        logits(second, input_ids=some_ids())


# --- settings of one context ---


def test_settings_hold_in_the_thread_that_opened_them(base: Any, compose: Any, some_ids: Any, slot_gates: Any) -> None:
    composed, ids = compose(base), some_ids()
    causal = slot_gates(composed, input_ids=ids)
    open_now, done = threading.Barrier(2), threading.Barrier(2)

    def whole() -> Tensor:
        with composed.reading_prompts(), fixed_slots(composed, {"legal": 1.0}):
            open_now.wait()
            found = slot_gates(composed, input_ids=ids)
            done.wait()
        return found

    def plain() -> Tensor:
        open_now.wait()
        found = slot_gates(composed, input_ids=ids)
        done.wait()
        return found

    inside, outside = together([whole, plain])

    assert torch.equal(inside, torch.tensor([0.0, 0.0, 1.0]).expand(1, 12, 3))
    assert torch.equal(outside, causal)


def test_settings_hold_in_the_task_that_opened_them(base: Any, compose: Any, some_ids: Any, slot_gates: Any) -> None:
    composed, ids = compose(base), some_ids()
    causal = slot_gates(composed, input_ids=ids)

    async def ask(slot: str | None) -> list[Tensor]:
        if slot is None:
            return [await asyncio.sleep(0, slot_gates(composed, input_ids=ids)) for _ in range(4)]
        with fixed_slots(composed, {slot: 1.0}):
            found = []
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(slot_gates(composed, input_ids=ids))
            return [*found, await asyncio.to_thread(slot_gates, composed, input_ids=ids)]

    async def all_of_them() -> tuple[list[Tensor], ...]:
        return await asyncio.gather(ask("medicine"), ask(None), ask("legal"))

    medicine, plain, legal = asyncio.run(all_of_them())

    assert all((gates[..., 1] == 1).all() for gates in medicine)
    assert all((gates[..., 2] == 1).all() for gates in legal)
    assert all(torch.equal(gates, causal) for gates in plain)


def test_settings_are_those_of_one_composition(compositions: Any, some_ids: Any, slot_gates: Any) -> None:
    first, second = compositions
    causal = slot_gates(second, input_ids=some_ids())

    with fixed_slots(first, {"legal": 1.0}), recording_routes(first) as routes:
        assert torch.equal(slot_gates(second, input_ids=some_ids()), causal)
        assert not routes
        with fixed_slots(second, {"c": 1.0}):
            assert slot_gates(first, input_ids=some_ids())[0, 0].tolist() == [0.0, 0.0, 1.0]


# --- memory ---


def bytes_held() -> int:
    """Return the bytes of all memory that tensors of this process hold."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), Tensor)  # `isinstance` would ask objects for a class, and some warn
    }
    return sum(storages.values())


@pytest.mark.own_failure(
    "decoding text that changes its domains",
    before="weights copied for 16 sets of slots: 959 MB for a composition of 169 MB",
    now="views: no copy",
)
def test_decoding_under_changing_slots_holds_no_more_memory_than_before(
    base: Any, random_stack: Any, some_ids: Any, logits: Any
) -> None:
    names = ("general", *(f"d{i}" for i in range(15)))
    composed: Any = attach(base, random_stack(base, names=names), router=None, fixed=torch.full((16,), 1 / 16))
    generator = torch.Generator().manual_seed(0)

    def decode(steps: int) -> None:
        cache = DynamicCache(config=base.config)
        for _ in range(steps):
            chosen = torch.randperm(15, generator=generator)[:3].tolist()
            with fixed_slots(composed, {"general": 0.4} | {f"d{i}": 0.2 for i in chosen}):
                logits(composed, input_ids=some_ids(1, 1), past_key_values=cache)

    decode(20)
    before = bytes_held()

    decode(100)

    experts = sum(buffer.nbytes for name, buffer in composed.named_buffers() if "expert_groups" in name)
    assert bytes_held() - before < 0.02 * experts
