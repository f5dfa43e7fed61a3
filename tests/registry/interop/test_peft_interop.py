"""Packs loaded by PEFT: `PeftModel.from_pretrained` computes the same as the fused layer. Only tests import PEFT."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from lorary.adapters.bank import Expert, ExpertBank, LayerExperts
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.stack import Stack
from lorary.adapters.router.router import Temperatures
from lorary.domains.base_model import find_layout
from lorary.domains.linear import linear_shape
from lorary.domains.statistics.statistics import PAIR_BUCKETS, DomainStatistics
from lorary.domains.target_modules import find_targets
from lorary.registry import Registry
from lorary.registry.pack.pack import DomainPack, pack_files

ROOT = Path(__file__).resolve().parents[3]
FAMILIES = ("llama", "gpt2", "gpt_neo")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_llama: Any) -> Any:
    """A random base model; GPT-2's weights are transposed, GPT-Neo's are not, under the same names."""
    if request.param == "llama":
        return tiny_llama(vocab_size=300)
    torch.manual_seed(0)
    if request.param == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=4, n_head=4, n_positions=64)).eval()
    shape: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_layers": 4, "num_heads": 4}
    layers = [[["global", "local"], 2]]
    return GPTNeoForCausalLM(GPTNeoConfig(**shape, attention_types=layers, max_position_embeddings=64)).eval()


# --- packs of a real registry ---


def test_the_root_adapter_of_a_stored_pack_is_its_static_composition(
    whole: Registry, tmp_path: Path, by_peft: Any, logits_of: Any
) -> None:
    pack = whole.save("cooking", tmp_path / "out") / "packs" / "cooking"

    theirs = logits_of(by_peft(pack))

    torch.testing.assert_close(theirs, logits_of(whole.compose("cooking", static=True)), **CLOSE)
    assert (theirs - logits_of(whole.base.model)).abs().max() > 1e-3


@pytest.mark.parametrize("expert", ["e0", "e1", "e2"])
def test_an_expert_of_a_stored_pack_is_the_fused_layer_with_that_expert_alone(
    expert: str, whole: Registry, tmp_path: Path, by_peft: Any, logits_of: Any
) -> None:
    from lorary.registry.pack.pack import read_pack

    folder = whole.save("cooking", tmp_path / "out") / "packs" / "cooking" / "experts" / expert
    bank = read_pack(whole.store, whole.show("cooking")).bank

    theirs = logits_of(by_peft(folder))

    torch.testing.assert_close(theirs, logits_of(_alone(whole.base.model, bank, expert)), **CLOSE)
    assert (theirs - logits_of(whole.base.model)).abs().max() > 1e-4


# --- packs of mixed ranks, alphas and methods, over three families ---


def test_the_root_adapter_is_the_bank_with_constant_gates(
    model: Any, tmp_path: Path, by_peft: Any, logits_of: Any
) -> None:
    bank = _random_bank(model)
    _write(bank, model, tmp_path)
    static = attach(model, Stack(names=("legal",), banks=(bank,), static=True), router=None, fixed=torch.ones(1))
    ours, plain = logits_of(static), logits_of(model)

    theirs = logits_of(by_peft(tmp_path, model))

    torch.testing.assert_close(theirs, ours, **CLOSE)
    assert (ours - plain).abs().max() > 0.01


@pytest.mark.parametrize("expert", ["e0", "e1", "e2"])
def test_each_expert_is_a_plain_adapter(expert: str, model: Any, tmp_path: Path, by_peft: Any, logits_of: Any) -> None:
    bank = _random_bank(model)
    _write(bank, model, tmp_path)
    ours, plain = logits_of(_alone(model, bank, expert)), logits_of(model)

    theirs = logits_of(by_peft(tmp_path / "experts" / expert, model))

    torch.testing.assert_close(theirs, ours, **CLOSE)
    assert (ours - plain).abs().max() > 0.001


def test_every_tensor_of_a_pack_reaches_the_peft_model(model: Any, tmp_path: Path, by_peft: Any) -> None:
    from safetensors.torch import load_file

    _write(_random_bank(model), model, tmp_path)

    for folder in (tmp_path, *sorted((tmp_path / "experts").iterdir())):
        loaded = {
            name.replace(".default", ""): tensor
            for name, tensor in by_peft(folder, model).state_dict().items()
            if ".lora_" in name
        }
        saved = load_file(folder / "adapter_model.safetensors")
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        _strip(model)


def test_the_config_has_only_keys_that_peft_knows(model: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _write(_random_bank(model), model, tmp_path)

    for path in tmp_path.rglob("adapter_config.json"):
        keys = json.loads(path.read_text(encoding="utf-8")).keys()
        assert keys <= peft.LoraConfig.__dataclass_fields__.keys()


def test_our_code_never_imports_peft() -> None:
    for path in [p for folder in ("domains", "adapters", "registry", "cli") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert not any(name.split(".")[0] == "peft" for name in [module, *names]), path


def _strip(model: Any) -> None:
    """Remove PEFT's layers from a model."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            model.set_submodule(name, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _random_bank(model: Any) -> ExpertBank:
    """Three experts of different rank, alpha and method; layer 1 has one of them, 2 two, 3 all."""
    layout = find_layout(model)
    generator = torch.Generator().manual_seed(7)
    experts = (
        Expert(id="e0", rank=2, alpha=8.0),
        Expert(id="e1", rank=3, alpha=6.0, method="rslora"),
        Expert(id="e2", rank=1, alpha=4.0),
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bank, targets = ExpertBank(), find_targets(model, layout).choose()
    for index, count in ((1, 1), (2, 2), (3, 3)):
        layer = model.get_submodule(f"{layout.layers}.{index}")
        shapes = {t: linear_shape(layer.get_submodule(t)) for t in targets[index]}
        rank = sum(expert.rank for expert in experts[:count])
        bank.layers[index] = LayerExperts(
            experts=experts[:count],
            A={t: normal(rank, d_in) * d_in**-0.5 for t, (d_in, _) in shapes.items()},
            B={t: normal(d_out, rank) * 0.05 for t, (_, d_out) in shapes.items()},
            expert_gate=normal(count, 32),
            rank_gate=normal(rank, 32),
            mean_gate=normal(rank).abs(),
        )
    return bank


def _write(bank: ExpertBank, model: Any, folder: Path) -> None:
    statistics = DomainStatistics(
        torch.ones(300, dtype=torch.int64),
        torch.zeros(PAIR_BUCKETS, dtype=torch.int64),
        1.0,
        torch.zeros(32).double(),
        torch.eye(32).double(),
    )
    prototypes = torch.eye(32)[:1]
    pack = DomainPack(
        bank=bank, statistics=statistics, prototypes=prototypes, temperatures=Temperatures(), feature_layer=1
    )
    for path, (data, _) in pack_files(pack, layout=find_layout(model), base_id="some/base", revision=None).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def _alone(model: Any, bank: ExpertBank, wanted: str) -> Any:
    """The fused layer with one expert of a bank, sliced by hand, at gate 1."""
    only = ExpertBank()
    for index, layer in bank.layers.items():
        start = 0
        for expert in layer.experts:
            part = slice(start, start + expert.rank)
            start += expert.rank
            if expert.id == wanted:
                only.layers[index] = LayerExperts(
                    experts=(expert,),
                    A={target: A[part] for target, A in layer.A.items()},
                    B={target: B[:, part] for target, B in layer.B.items()},
                    expert_gate=layer.expert_gate[:1],
                    rank_gate=None,
                )
    return attach(model, Stack(names=("one",), banks=(only,), static=True), router=None, fixed=torch.ones(1))
