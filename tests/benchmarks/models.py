"""Models to compare: a random base of about 100 M parameters, with the same experts in lorary and in PEFT methods."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora.config import ArrowConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from lorary.adapters.bank import new_bank
from lorary.adapters.config import BankConfig
from lorary.adapters.layer.active import SLOT_THRESHOLD
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.stack import Stack
from lorary.adapters.router.router import DomainRouter, Temperatures
from lorary.domains.base_model import find_layout
from lorary.domains.statistics.hashing import MAX_FEATURES, PAIR_BUCKETS
from lorary.domains.statistics.statistics import DomainStatistics

RANK = 8
LAYERS, WIDTH, INNER, HEADS, KEY_HEADS, VOCABULARY = 12, 768, 2048, 12, 4, 32_000
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
warnings.filterwarnings("ignore", module="peft")


def make_base(layers: int = LAYERS) -> Any:
    """Return the frozen base."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def make_stack(base: Any, *, slots: int, experts: int, trainable: bool = False, static: bool = False) -> Stack:
    """Return `slots` banks with `experts` experts per decoder layer, with random B and rank gates."""
    config = BankConfig(rank=RANK, experts=float(experts), schedule="uniform", expert_free=0.0)
    layout = find_layout(base)
    generator = torch.Generator().manual_seed(1)
    banks = []
    for _ in range(slots):
        bank = new_bank(base, layout, config, generator=generator)
        for layer in bank.layers.values():
            for B in layer.B.values():
                B.normal_(0.0, 0.01, generator=generator)
            assert layer.rank_gate is not None
            layer.rank_gate.normal_(0.0, 0.02, generator=generator)
        banks.append(bank)
    names = ("general", *(f"d{i}" for i in range(1, slots)))
    return Stack(names=names, banks=tuple(banks), trainable=trainable, static=static)


def make_statistics(slots: int) -> list[DomainStatistics]:
    """Return statistics of domains with disjoint parts of the vocabulary; slot 0 uses all of it."""
    part = VOCABULARY // slots
    statistics = []
    for slot in range(slots):
        counts = torch.full((VOCABULARY,), 20 if slot == 0 else 0)
        if slot:
            counts[slot * part : (slot + 1) * part] = 20 * slots
        features = torch.eye(min(WIDTH, MAX_FEATURES), dtype=torch.float64)
        pairs = torch.zeros(PAIR_BUCKETS, dtype=torch.int64)
        statistics.append(DomainStatistics(counts, pairs, 1000.0, features[slot] * 100, features * 1000))
    return statistics


def make_router(slots: int) -> DomainRouter:
    """Return the router of `make_statistics`."""
    statistics = make_statistics(slots)
    prior = torch.tensor([0.7, *[0.3 / (slots - 1)] * (slots - 1)])
    return DomainRouter(statistics, prior=prior, temperatures=Temperatures(), width=WIDTH)


def compose(base: Any, *, threshold: float = SLOT_THRESHOLD, **options: Any) -> Any:
    """Return a composed model; a threshold of 0 computes all slots, whatever their gates."""
    stack = make_stack(base, **options)
    if stack.static:
        return attach(base, stack, router=None, fixed=torch.full((len(stack.names),), 1 / len(stack.names)))
    return attach(base, stack, router=make_router(len(stack.names)), threshold=threshold)


def text_of(slot: int, slots: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Return tokens from one domain's part of the vocabulary."""
    part = VOCABULARY // slots
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(slot * part, (slot + 1) * part, (1, tokens), generator=generator)


def _config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, init_lora_weights=False)


def peft_multi(base: Any, experts: int, *, new: int = 0) -> Any:
    """Return a PEFT model with all adapters active and the last `new` trainable."""
    model: Any = get_peft_model(copy.deepcopy(base), _config(), adapter_name="e0")
    for index in range(1, experts):
        model.add_adapter(f"e{index}", _config())
    model.base_model.set_adapter([f"e{index}" for index in range(experts)])
    trained = tuple(f".e{index}." for index in range(experts - new, experts))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and any(part in name for part in trained))
    return model.eval()


def saved_adapters(base: Any, experts: int, folder: Path) -> list[str]:
    """Save the adapters of `peft_multi` and return their folders."""
    model = peft_multi(base, experts)
    model.save_pretrained(folder, selected_adapters=[f"e{index}" for index in range(experts)])
    return [str(folder / f"e{index}") for index in range(experts)]


def peft_xlora(base: Any, paths: list[str]) -> Any:
    """Return PEFT's X-LoRA, which runs the base first to compute its scalings."""
    copied = copy.deepcopy(base)
    copied.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=WIDTH,
        xlora_depth=1,
        adapters={str(index): path for index, path in enumerate(paths)},
    )
    return get_peft_model(copied, config).eval()


def peft_arrow(base: Any, paths: list[str]) -> Any:
    """Return PEFT's Arrow, which routes by the adapters' principal directions."""
    config = ArrowConfig(top_k=min(3, len(paths)), router_temperature=1.0)
    model = create_arrow_model(base_model=copy.deepcopy(base), task_specific_adapter_paths=paths, arrow_config=config)
    return model.eval()


def flop_floor(experts: int, *, with_head: bool) -> float:
    """Return the ratio of the linears' multiply-adds with and without experts, ignoring attention and gates.

    It is also the floor of the bytes read to decode one token; `with_head` includes the output head.
    """
    shapes = [(WIDTH, WIDTH), *[(WIDTH, WIDTH * KEY_HEADS // HEADS)] * 2, (WIDTH, WIDTH)]
    shapes += [(WIDTH, INNER)] * 2 + [(INNER, WIDTH)]
    linears = LAYERS * sum(math.prod(shape) for shape in shapes)
    added = LAYERS * experts * RANK * sum(map(sum, shapes))
    return 1 + added / (linears + VOCABULARY * WIDTH * with_head)
