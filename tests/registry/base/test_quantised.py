"""Registries over quantised base models: learned, composed, proved frozen; another quantisation is refused.

bitsandbytes and torchao are optional, and both compute on a CPU. GPTQ and AWQ need libraries that do not: their modules
are recognised by what they store (tests/domains/test_linear.py).
"""

import importlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from lorary.adapters.layer.attach import copy_sharing_parameters
from lorary.adapters.layer.fused import FusedLinear
from lorary.domains.base_model import load_base_model
from lorary.domains.errors import IncompatibleError
from lorary.domains.linear import hidden_tensors
from lorary.registry import Registry
from lorary.registry.base.fingerprint import fingerprint
from lorary.registry.learn.proof import digest_of_tensors, frozen_digests
from lorary.registry.store.manifest import check_same_base

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

KINDS = ("nf4", "nf4-bfloat16", "int8", "torchao")
NAMES = {
    "nf4": "bitsandbytes nf4",
    "nf4-bfloat16": "bitsandbytes nf4",
    "int8": "bitsandbytes int8",
    "torchao": "torchao Int8WeightOnlyConfig",
}


def method(kind: str) -> Any:
    if kind.startswith("torchao"):
        pytest.importorskip("torchao")
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
        )
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8DynamicActivationInt8WeightConfig() if "dynamic" in kind else Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if kind == "nf4-bfloat16" else torch.float32
    double = kind == "nf4-bfloat16"
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=compute
    )


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random Qwen2: two layers of width 64, biases on q, k and v."""
    folder = tmp_path_factory.mktemp("plain")
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(
            Qwen2Config(vocab_size=len(tiny_tokenizer), initializer_range=0.1, pad_token_id=0, eos_token_id=2, **shape)
        )
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias, std=0.1)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantised(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`quantised("nf4")`: the same model, saved in a quantisation."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            how, folder = method(kind), tmp_path_factory.mktemp(kind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model: Any = AutoModelForCausalLM.from_pretrained(
                    plain_folder, quantization_config=how, dtype=torch.float32, device_map="cpu"
                )
                model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(plain_folder).save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture(scope="module")
def learned(
    quantised: Any, tmp_path_factory: pytest.TempPathFactory, texts: dict[str, Path], short_run: Any
) -> Callable[[str], Registry]:
    """`learned("nf4")`: a registry over that base with one domain; tests only read it."""
    made: dict[str, Registry] = {}

    def make(kind: str) -> Registry:
        if kind not in made:
            folder = tmp_path_factory.mktemp("stores") / kind
            run = short_run(steps=3)
            made[kind] = Registry.init(folder, base=str(quantised(kind)), data=[texts["general"]], **run)
            made[kind].add_domain("cooking", data=[texts["cooking"]], **run)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ["nf4-bfloat16", pytest.param("int8", marks=pytest.mark.slow), "torchao"])
def test_a_domain_is_learned_composed_and_generated_beside_quantised_weights(
    kind: str, learned: Any, logits_of: Any, tmp_path: Path
) -> None:
    registry = learned(kind)
    static, routed = registry.compose("cooking", static=True), registry.compose("cooking")

    assert (logits_of(static) - logits_of(registry.base.model)).abs().max() > 1e-3
    assert {m.base.in_features for m in static.modules() if isinstance(m, FusedLinear)} == {64}
    ids = torch.randint(6, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, cached = routed(input_ids=ids).logits, []
        found = routed(input_ids=ids[:, :4], use_cache=True)
        cached.append(found.logits)
        for place in range(4, 9):
            found = routed(input_ids=ids[:, place : place + 1], past_key_values=found.past_key_values, use_cache=True)
            cached.append(found.logits)
    # int8 activations are rounded by the row, so a last bit may become a step of the grid
    torch.testing.assert_close(torch.cat(cached, 1), whole, rtol=1e-2, atol=1e-2)
    assert registry.generate(routed, "The butter", max_new_tokens=3).tokens
    assert registry.show("cooking").base.quantization == NAMES[kind]
    assert registry.show("cooking").proof["unchanged"] is True
    again = Registry.open(registry.store.path)
    torch.testing.assert_close(logits_of(again.compose("cooking", static=True)), logits_of(static))
    with pytest.raises(IncompatibleError, match="cannot be merged") as refusal:
        registry.export("cooking", tmp_path / "merged", to="merged")
    assert NAMES[kind] in str(refusal.value.cause)
    assert "--to peft" in str(refusal.value.fix)


@pytest.mark.parametrize("kind", KINDS)
def test_no_forward_pass_changes_the_base(kind: str, quantised: Any) -> None:
    model, _ = load_base_model(quantised(kind))

    def digest() -> str:
        return digest_of_tensors((name, part) for name, part in flattened(model.state_dict(keep_vars=True)))

    before, ids = digest(), torch.arange(6, 30)[None]
    with torch.no_grad():
        first = model(input_ids=ids).logits
    model.train()
    model(inputs_embeds=model.get_input_embeddings()(ids).requires_grad_(True)).logits.sum().backward()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, first)

    assert digest() == before


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_after_forward_passes_without_them(kind: str, quantised: Any) -> None:
    model, _ = load_base_model(quantised(kind))
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        model(input_ids=ids)
    embedded = model.get_input_embeddings()(ids).requires_grad_(True)

    model(inputs_embeds=embedded).logits.square().sum().backward()

    assert embedded.grad is not None
    direction = embedded.grad / embedded.grad.norm()
    with torch.no_grad():
        ends = [model(inputs_embeds=embedded + step * direction).logits.square().sum() for step in (-0.05, 0.05)]
    slope = (ends[1] - ends[0]) / 0.1
    torch.testing.assert_close(slope, embedded.grad.norm(), rtol=0.2, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_share_the_quantised_weights(kind: str, quantised: Any) -> None:
    model, _ = load_base_model(quantised(kind))

    copied = copy_sharing_parameters(model)

    assert sum(nbytes for place, nbytes in memory_of(copied).items() if place not in memory_of(model)) < 1000
    with torch.no_grad():
        ids = torch.arange(6, 30)[None]
        assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
    own: Any = model.model.layers[0].mlp.up_proj  # type: ignore[union-attr]
    copied.train()
    assert not own.training


@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_covers_every_quantised_tensor(kind: str, quantised: Any, cooking_store: Path) -> None:
    model, _ = load_base_model(quantised(kind))
    store = Registry.open(cooking_store).store
    copied = copy_sharing_parameters(model)
    before = frozen_digests(model, copied, store)

    weight: Any = model.model.layers[1].mlp.up_proj.weight  # type: ignore[union-attr]
    bytes_of_it = getattr(weight, "qdata", weight.data)
    with torch.no_grad():
        bytes_of_it.view(torch.uint8).view(-1)[0] ^= 1

    assert frozen_digests(model, copied, store).base != before.base
    assert frozen_digests(model, copied, store).attached == before.attached


@pytest.mark.parametrize("kind", KINDS)
def test_another_quantisation_of_the_same_model_is_refused_with_both_names(
    kind: str, quantised: Any, plain_folder: Path, cooking_store: Path
) -> None:
    records = {name: fingerprint(quantised(name), source=str(quantised(name))) for name in {kind, "int8"}}
    plain = fingerprint(plain_folder, source=str(plain_folder))
    for other, named in [
        (plain, "not quantised"),
        *((records[n], NAMES[n]) for n in records if NAMES[n] != NAMES[kind]),
    ]:
        for wanted, found in ((records[kind], other), (other, records[kind])):
            with pytest.raises(IncompatibleError, match="another quantisation") as refusal:
                check_same_base(wanted=wanted, found=found, what="cooking@1")
            assert refusal.value.exit_code == 6
            assert NAMES[kind] in str(refusal.value.cause)
            assert named in str(refusal.value.cause)
    assert b"quantization" not in Registry.open(cooking_store).show("cooking").to_json()


def test_weights_that_no_gradient_passes_are_refused_before_training(
    quantised: Any, texts: dict[str, Path], short_run: Any, tmp_path: Path
) -> None:
    folder = quantised("torchao-dynamic")

    with pytest.raises(IncompatibleError, match="cannot be trained") as refusal:
        Registry.init(tmp_path / "store", base=str(folder), data=[texts["general"]], **short_run(steps=1))

    assert "no gradient" in str(refusal.value.cause)


@pytest.mark.parametrize(
    ("library", "quantizer", "found"),
    [
        ("bitsandbytes", "bnb_4bit", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("bitsandbytes", "bnb_8bit", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        (
            "torchao",
            "torchao",
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
        ),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_has_it(
    library: str,
    quantizer: str,
    found: Any,
    plain_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(plain_folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": found}), encoding="utf-8")
    module = importlib.import_module(f"transformers.quantizers.quantizer_{quantizer}")
    monkeypatch.setattr(module, f"is_{library}_available", lambda *_: False)
    for name in (library, f"{library}.core", f"{library}.core.config"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(IncompatibleError, match="cannot be loaded here") as refusal:
        load_base_model(folder)

    assert library in str(refusal.value.cause)
    assert refusal.value.fix == "pip install 'lorary[quantized]'"


def flattened(tensors: dict[str, Tensor]) -> Any:
    for name, tensor in tensors.items():
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None  # type: ignore[operator]
        yield from [(name, tensor)] if parts is None else [(f"{name}.{part}", getattr(tensor, part)) for part in parts]


def memory_of(model: Any) -> dict[int, int]:
    """Addresses and bytes of the tensors that the modules of a model reach."""
    found: dict[int, int] = {}
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *hidden_tensors(module)]:
            for _, part in flattened({"": tensor}):
                found[part.data_ptr()] = part.nbytes
    return found
