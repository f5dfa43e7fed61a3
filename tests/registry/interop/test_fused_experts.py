"""Base models with routed experts in fused parameters, whose names PEFT and transformers convert: exports are exact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from transformers import AutoConfig, AutoModelForCausalLM

from lorary.adapters.bank import Expert, ExpertBank, LayerExperts
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.merge import merge_experts
from lorary.adapters.layer.stack import Stack
from lorary.domains.errors import IncompatibleError
from lorary.domains.linear import linear_shape
from lorary.registry.base.load import LoadedBase
from lorary.registry.interop.export import adapter_files, has_fused_experts
from lorary.registry.interop.peft_reader import read_config
from lorary.registry.interop.peft_tensors import convert_adapter

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),  # those PEFT converted
]

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
TINY: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}
TINY |= {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DENSE_FIRST = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, "mlp_only_layers": [0]},
    "deepseek_v3": DENSE_FIRST | LATENT,
    "glm4_moe": DENSE_FIRST | {"head_dim": 16},
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedBase]:
    """`base_of("mixtral")` is a random base model that was saved and loaded."""
    made: dict[str, LoadedBase] = {}

    def make(family: str) -> LoadedBase:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                config = AutoConfig.for_model(family, **(TINY | FAMILIES[family]))
                AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            made[family] = Loaded(folder)
        return made[family]

    return make


class Loaded(LoadedBase):
    """A base model without a tokenizer."""

    @property
    def model(self) -> Any:
        if "_model" not in self.__dict__:
            self.__dict__["_model"] = fresh(self)
        return self.__dict__["_model"]


def fresh(base: LoadedBase) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval().requires_grad_(False)


def bank_of(base: LoadedBase, *, only: tuple[str, ...] | None = None) -> ExpertBank:
    """One random expert on all targets of every layer, whose rank grows with the layer."""
    generator, bank = torch.Generator().manual_seed(1), ExpertBank()
    for index, targets in enumerate(base.targets.choose(only)):
        rank = index + 1
        layer = base.model.get_submodule(f"{base.layout.layers}.{index}")
        shapes = {target: linear_shape(layer.get_submodule(target)) for target in targets}
        if targets:
            bank.layers[index] = LayerExperts(
                experts=(Expert(id="all", rank=rank, alpha=float(rank)),),
                A={t: torch.randn(rank, d_in, generator=generator) * 0.2 for t, (d_in, _) in shapes.items()},
                B={t: torch.randn(d_out, rank, generator=generator) * 0.1 for t, (_, d_out) in shapes.items()},
                expert_gate=torch.zeros(1, base.layout.width),
                rank_gate=None,
                mean_gate=torch.ones(rank),
            )
    return bank


def composed_of(base: LoadedBase, bank: ExpertBank) -> Any:
    return attach(base.model, Stack(names=("one",), banks=(bank,), static=True), router=None, fixed=torch.ones(1))


@pytest.mark.parametrize("only", [None, ("gate_proj", "up_proj", "down_proj"), ("o_proj",)])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_was_exported(
    family: str, only: tuple[str, ...] | None, base_of: Any, tmp_path: Path, logits_of: Any
) -> None:
    base = base_of(family)
    if only is not None and not any(name.endswith(only) for layer in base.targets.by_layer for name in layer):
        return
    bank = bank_of(base, only=only)
    ours = logits_of(composed_of(base, bank))
    for name, data in adapter_files(bank, base, base_id="some/base", revision=None).items():
        (tmp_path / name).write_bytes(data)

    model = peft.PeftModel.from_pretrained(fresh(base), str(tmp_path)).eval()

    assert has_fused_experts(base)
    torch.testing.assert_close(logits_of(model), ours, **CLOSE)
    assert (ours - logits_of(base.model)).abs().max() > 1e-2
    loaded = {name.replace(".default", "") for name, _ in model.named_parameters() if ".lora_" in name}
    assert loaded == load((tmp_path / "adapter_model.safetensors").read_bytes()).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_imported_again(family: str, base_of: Any, logits_of: Any) -> None:
    base = base_of(family)
    bank = bank_of(base)
    files = adapter_files(bank, base, base_id="some/base", revision=None)

    config = read_config(files["adapter_config.json"], source="export")
    again = convert_adapter(load(files["adapter_model.safetensors"]), config, base.model, base.layout, source="export")

    torch.testing.assert_close(logits_of(composed_of(base, again)), logits_of(composed_of(base, bank)), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft_is_imported_exactly_or_refused(
    family: str, base_of: Any, tmp_path: Path, logits_of: Any
) -> None:
    base = base_of(family)
    for targets in (["o_proj"], ["o_proj", "gate_proj", "up_proj", "down_proj"], "all-linear"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            settings: Any = {"r": 3, "target_modules": targets, "init_lora_weights": False}
            model = peft.get_peft_model(fresh(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        model.save_pretrained(tmp_path / "adapter")
        data = (tmp_path / "adapter" / "adapter_config.json").read_bytes()
        tensors = load((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes())

        try:
            bank = convert_adapter(
                tensors, read_config(data, source="theirs"), base.model, base.layout, source="theirs"
            )
        except IncompatibleError:
            assert any(".experts." in name or ".gate." in name for name in tensors), targets
            continue
        torch.testing.assert_close(logits_of(composed_of(base, bank)), logits_of(model), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_saved_and_loaded(family: str, base_of: Any, tmp_path: Path, logits_of: Any) -> None:
    base = base_of(family)
    composed = composed_of(base, bank_of(base))
    ours = logits_of(composed)

    merge_experts(composed).save_pretrained(tmp_path)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(merged), ours, **CLOSE)
