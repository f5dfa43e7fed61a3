"""Fixtures for adapters: tiny models of many families, random banks, gates, statistics and routers.

All random values come from seeds: same seed, same tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorary.adapters.bank import Expert, ExpertBank, LayerExperts
from lorary.adapters.config import BankConfig
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.forward_state import OpenGates, running_state
from lorary.adapters.layer.gates import LayerGates
from lorary.adapters.layer.routing import recording_routes
from lorary.adapters.layer.stack import Stack
from lorary.adapters.router.router import DomainRouter, Temperatures
from lorary.domains.base_model import find_layout
from lorary.domains.linear import linear_shape
from lorary.domains.statistics.hashing import PAIR_BUCKETS, pair_buckets
from lorary.domains.statistics.statistics import DomainStatistics
from lorary.domains.target_modules import find_targets

torch.set_num_threads(1)

VOCABULARY = 64
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi")


def tiny_config(family: str) -> Any:
    """Return a config with 4 layers of width 32; sliding windows, if any, have 8 tokens, so that tests exceed them."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,  # logits far apart: no ties in greedy decoding
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gpt2":
        return AutoConfig.for_model("gpt2", n_embd=32, n_layer=4, n_head=4, n_positions=128, **common)
    common |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    if family != "gpt_neox":
        common["num_key_value_heads"] = 2
    if family in ("qwen3", "gemma", "gemma2", "gemma3"):
        common["head_dim"] = 8
    if family in ("mistral", "gemma2", "gemma3"):
        common["sliding_window"] = 8
    if family == "gemma3":
        common["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return AutoConfig.for_model({"gemma3": "gemma3_text"}.get(family, family), **common)


@pytest.fixture(scope="session")
def make_base() -> Callable[..., PreTrainedModel]:
    """`make_base(family)`: a new frozen random model in eval mode."""

    def make(family: str = "llama", *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def base(make_base: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A new llama."""
    return make_base("llama")


@pytest.fixture(params=FAMILIES)
def any_base(request: Any, make_base: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A new model, of every family in turn."""
    return make_base(request.param)


@pytest.fixture(scope="session")
def compose(random_stack: Callable[..., Stack], random_router: Any) -> Callable[..., Any]:
    """`compose(base, seed=..)`: the base with three random banks, routed."""

    def make(base: PreTrainedModel, *, seed: int = 0, **options: Any) -> Any:
        stack = random_stack(base, seed=seed, **options)
        return attach(base, stack, router=random_router(base, slots=len(stack.names), seed=seed))

    return make


@pytest.fixture(scope="session")
def some_ids() -> Callable[..., Tensor]:
    """`some_ids(batch, seq, seed=..)`: random ids without special tokens."""

    def make(batch: int = 1, seq: int = 12, seed: int = 0) -> Tensor:
        return torch.randint(3, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def prompts(some_ids: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
    """`prompts()`: three prompts of different lengths, one longer than the sliding windows."""
    return lambda: [some_ids(1, seq, seed=seq) for seq in (12, 5, 1)]


@pytest.fixture(scope="session")
def padded() -> Callable[..., dict[str, Tensor]]:
    """`padded(texts, left=..)`: a padded batch of several texts, with its attention mask."""

    def make(texts: list[Tensor], *, left: bool) -> dict[str, Tensor]:
        longest = max(text.shape[1] for text in texts)
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            length = text.shape[1]
            place = slice(longest - length, None) if left else slice(0, length)
            ids[row, place], mask[row, place] = text[0], 1
        return {"input_ids": ids, "attention_mask": mask}

    return make


@pytest.fixture(scope="session")
def logits() -> Callable[..., Tensor]:
    """`logits(model, **inputs)`, without gradients."""

    def run(model: Any, **inputs: Any) -> Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    return run


@pytest.fixture(scope="session")
def slot_gates() -> Callable[..., Tensor]:
    """`slot_gates(model, **inputs)`: the slot gates of one forward, without gradients."""

    def run(model: Any, **inputs: Any) -> Tensor:
        with torch.no_grad(), recording_routes(model) as routes:
            model(**inputs)
        (route,) = routes
        return route.slot_gate

    return run


@pytest.fixture(scope="session")
def layer_gates() -> Callable[..., dict[int, tuple[OpenGates, ...]]]:
    """`layer_gates(model, **inputs)`: the gates of each layer with experts in one forward without gradients."""

    def run(model: Any, **inputs: Any) -> dict[int, tuple[OpenGates, ...]]:
        found: dict[int, tuple[OpenGates, ...]] = {}

        def keep(layer: Any, _args: Any, index: int) -> None:
            state = running_state()
            assert state is not None
            gates = state.gates[layer.expert_gates]
            assert isinstance(gates, tuple)
            found[index] = gates

        layers, indices = model.get_submodule(model.routing.layout.layers), model.routing.stack.layers
        hooks = [layers[i].register_forward_pre_hook(lambda layer, args, i=i: keep(layer, args, i)) for i in indices]
        with torch.no_grad():
            model(**inputs)
        for hook in hooks:
            hook.remove()
        return found

    return run


@pytest.fixture(scope="session")
def generated() -> Callable[..., Tensor]:
    """`generated(model, **inputs)`: eight new tokens, greedy by default; inputs override."""

    def run(model: Any, **inputs: Any) -> Tensor:
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return model.generate(**({"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | inputs))

    return run


@pytest.fixture(scope="session")
def random_gates() -> Callable[..., LayerGates]:
    """`random_gates([[2], [3, 1]], width=.., slots=[0, 0], new=1)`: gates from the ranks of experts by softmax group.

    `slots` has the slot of each group, by default a new one for each; the last `new` groups are trainable.
    """

    def make(
        groups: Sequence[Sequence[int]],
        *,
        width: int,
        slots: Sequence[int] | None = None,
        new: int = 0,
        rank_gates: bool = True,
    ) -> LayerGates:
        group = [g for g, ranks in enumerate(groups) for _ in ranks]
        ranks = [rank for group in groups for rank in group]
        generator = torch.Generator().manual_seed(0)
        expert_gate = torch.randn(len(ranks), width, generator=generator)
        rank_gate = torch.randn(sum(ranks), width, generator=generator) * 0.3
        experts = sum(map(len, groups[: len(groups) - new]))  # frozen ones
        frozen = sum(ranks[:experts])
        return LayerGates(
            expert_gate=expert_gate[:experts],
            rank_gate=rank_gate[:frozen],
            new_expert_gate=expert_gate[experts:] if new else None,
            new_rank_gate=rank_gate[frozen:] if new and rank_gates else None,
            slot_of_expert=torch.tensor(group if slots is None else [slots[g] for g in group]),
            group_of_expert=torch.tensor(group),
            expert_of_rank=torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)),
        )

    return make


@pytest.fixture(scope="session")
def random_layer() -> Callable[..., LayerExperts]:
    """`random_layer([(rank, alpha, method), ..], {target: (d_in, d_out), ..}, width=.., seed=..)`."""

    def make(
        experts: Sequence[tuple[int, float, str]],
        shapes: dict[str, tuple[int, int]],
        *,
        width: int,
        seed: int = 0,
        rank_gates: bool = True,
        mean_gate: bool = False,
    ) -> LayerExperts:
        generator = torch.Generator().manual_seed(seed)
        rank = sum(expert[0] for expert in experts)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return LayerExperts(
            experts=tuple(
                Expert(id=f"e{i}", rank=rank, alpha=alpha, method=method)
                for i, (rank, alpha, method) in enumerate(experts)
            ),
            A={target: normal(rank, d_in) * d_in**-0.5 for target, (d_in, _) in shapes.items()},
            B={target: normal(d_out, rank) * 0.05 for target, (_, d_out) in shapes.items()},
            expert_gate=normal(len(experts), width),
            rank_gate=normal(rank, width) * width**-0.5 if rank_gates else None,
            mean_gate=normal(rank).abs() if mean_gate else None,
        )

    return make


@pytest.fixture(scope="session")
def random_bank(random_layer: Callable[..., LayerExperts]) -> Callable[..., ExpertBank]:
    """`random_bank(model, seed=..)`: experts from layer 1 on with random counts, ranks, alphas, methods and targets."""

    def make(
        model: Any,
        *,
        seed: int = 0,
        first_layer: int = 1,
        all_targets: bool = False,
        rank_gates: bool | None = None,
        zero_B: bool = False,
    ) -> ExpertBank:
        layout = find_layout(model)
        generator = torch.Generator().manual_seed(seed)

        def choose(maximum: int) -> int:
            return 1 + int(torch.randint(maximum, (), generator=generator))

        bank = ExpertBank()
        by_layer = find_targets(model, layout).choose()
        for index in range(first_layer, layout.count):
            layer, targets = model.get_submodule(f"{layout.layers}.{index}"), by_layer[index]
            if not targets:
                continue
            if not all_targets:  # a random subset of at least one
                order = torch.randperm(len(targets), generator=generator).tolist()
                targets = tuple(targets[i] for i in order[: choose(len(targets))])
            experts = [(choose(5), float(choose(16)), ("lora", "rslora")[choose(2) - 1]) for _ in range(choose(3))]
            bank.layers[index] = random_layer(
                experts,
                {target: linear_shape(layer.get_submodule(target)) for target in targets},
                width=layout.width,
                seed=seed * 1000 + index,
                rank_gates=seed % 3 != 2 if rank_gates is None else rank_gates,
            )
            if zero_B:
                for matrix in bank.layers[index].B.values():
                    matrix.zero_()
        return bank

    return make


@pytest.fixture(scope="session")
def random_statistics() -> Callable[..., DomainStatistics]:
    """`random_statistics(seed=.., tokens=ids that occur)`: counts and features of a synthetic domain."""

    def make(
        *,
        seed: int = 0,
        vocabulary: int = 64,
        features: int = 32,
        rows: int = 200,
        tokens: Sequence[int] | None = None,
        total: int = 20_000,
    ) -> DomainStatistics:
        generator = torch.Generator().manual_seed(seed)
        weights = torch.zeros(vocabulary)
        weights[list(tokens) if tokens is not None else slice(None)] = 1.0
        weights *= torch.rand(vocabulary, generator=generator) + 0.05
        drawn = torch.multinomial(weights, total, replacement=True, generator=generator)
        center = torch.randn(features, generator=generator, dtype=torch.float64) * 0.3
        data = center + torch.randn(rows, features, generator=generator, dtype=torch.float64)
        return DomainStatistics(
            torch.bincount(drawn, minlength=vocabulary),
            torch.bincount(pair_buckets(drawn[:-1], drawn[1:]), minlength=PAIR_BUCKETS),
            float(rows),
            data.sum(0),
            data.T @ data,
        ).without_rare_tokens()

    return make


@pytest.fixture(scope="session")
def random_stack(random_bank: Callable[..., ExpertBank]) -> Callable[..., Stack]:
    """`random_stack(model, names=(..), seed=..)`: one random bank per slot; other keywords go to `random_bank`."""

    def make(
        model: Any,
        *,
        names: tuple[str, ...] = ("general", "medicine", "legal"),
        seed: int = 0,
        trainable: bool = False,
        static: bool = False,
        **options: Any,
    ) -> Stack:
        banks = tuple(random_bank(model, seed=10 * seed + slot, **options) for slot in range(len(names)))
        return Stack(names=names, banks=banks, trainable=trainable, static=static)

    return make


@pytest.fixture(scope="session")
def random_router(random_statistics: Callable[..., DomainStatistics]) -> Callable[..., DomainRouter]:
    """`random_router(model, slots=.., seed=..)`: router of synthetic domains for the model's vocabulary and width."""

    def make(model: Any, *, slots: int = 3, seed: int = 0) -> DomainRouter:
        config = model.config.get_text_config()
        statistics = [
            random_statistics(seed=10 * seed + i, vocabulary=config.vocab_size, features=config.hidden_size)
            for i in range(slots)
        ]
        prior = torch.arange(slots, 0, -1).float()
        return DomainRouter(statistics, prior=prior, temperatures=Temperatures(), width=config.hidden_size)

    return make


@pytest.fixture(scope="session")
def bank_config() -> Callable[..., BankConfig]:
    """`bank_config(rank=2, ..)`: a small bank's configuration."""
    return lambda **changes: BankConfig(**({"rank": 2, "experts": 2.0, "expert_free": 0.25} | changes))


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """`relative_error(found, expected)`: max |found - expected| / max(max |expected|, floor)."""

    def error(found: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
        scale = expected.detach().double().abs().max().clamp(min=floor)
        return float((found.detach().double() - expected.detach().double()).abs().max() / scale)

    return error


@pytest.fixture(scope="session")
def digest() -> Callable[[nn.Module], dict[str, str]]:
    """`digest(module)`: sha256 of every parameter and buffer, by name."""
    import hashlib

    def of(module: nn.Module) -> dict[str, str]:
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return {
            name: hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in tensors
        }

    return of


@pytest.fixture(scope="session")
def two_steps() -> Callable[[Sequence[float], Tensor], Tensor]:
    """`two_steps(prior, evidence)`: slot gates by definition, KP against the strongest domain first."""

    def gates(prior: Sequence[float], evidence: Tensor) -> Tensor:
        weights = torch.tensor(prior[1:], dtype=torch.float64)
        domains = evidence.double()[..., 1:] + (weights / weights.max()).log()
        odds = prior[0] / sum(prior[1:])
        against_kp = torch.exp(domains.max(-1).values - evidence.double()[..., 0]) / odds
        kp = 1 / (1 + against_kp)
        return torch.cat([kp[..., None], (1 - kp)[..., None] * torch.softmax(domains, -1)], -1)

    return gates
