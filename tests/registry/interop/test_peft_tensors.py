"""Adapters saved by the installed PEFT, in its LoRA variants and several families: imported exactly, or refused."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lorary.adapters.bank import ExpertBank
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.stack import Stack
from lorary.domains.base_model import find_layout
from lorary.domains.errors import IncompatibleError, IntegrityError, LoraryError
from lorary.registry.interop.peft_reader import read_config
from lorary.registry.interop.peft_tensors import convert_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of PEFT about its own adapters

SMALL: dict[str, Any] = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE: dict[str, Any] = SMALL | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "gpt2": SMALL | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "qwen3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "phi": LLAMA_LIKE,
}
# names of the attention input, attention output and last MLP modules
NAMES = {"gpt2": ("c_attn", "attn.c_proj", "mlp.c_proj"), "phi": ("q_proj", "dense", "fc2")}
LLAMA_NAMES = ("q_proj", "o_proj", "down_proj")
STACK = {"gpt2": "h"}  # name of the list of decoder layers

IMPORTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"{a}": 2, "{c}": 6}},
    "alpha_pattern": {"alpha_pattern": {"{b}": 3, "{stack}.1.*{c}": 40}},
    "both patterns, rslora": {
        "rank_pattern": {"{stack}\\.0\\..*{a}": 1, "{c}": 5},
        "alpha_pattern": {"{a}": 7, "{stack}.1.*{c}": 40},
        "use_rslora": True,
    },
    "one target": {"target_modules": ["{a}"]},
    "layers_to_transform": {"layers_to_transform": [0, 2], "layers_pattern": "{stack}"},
    "one layer": {"layers_to_transform": 3},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, excluded by name": {"target_modules": "all-linear", "exclude_modules": ["{b}"]},
    "all-linear, excluded by pattern": {"target_modules": "all-linear", "exclude_modules": ".*{c}"},
    "targets by pattern": {"target_modules": ".*{stack}\\.[13]\\..*({a}|{c})"},
    "weights": {"target_modules": ["{a}"], "target_parameters": ["{c}.weight"]},
    "dropout": {"lora_dropout": 0.3},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica", "r": 2},
    "velora": {"velora_config": "VeloraConfig"},
    "fractional alpha": {"lora_alpha": 0.75},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora is True"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True"),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "bias of LoRA": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "pissa by iteration": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "alora": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication"),
    "kasa": ({"kasa_config": "KasaConfig"}, "kasa_config"),
    "monteclora": ({"monteclora_config": "MontecloraConfig"}, "monteclora_config"),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, "it targets lm_head, a Linear"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "it targets model.embed_tokens, a Embedding"),
}
OTHER_METHODS = ("AdaLoraConfig", "IA3Config", "LoHaConfig", "LoKrConfig", "OFTConfig", "VeraConfig", "LNTuningConfig")


@pytest.fixture(scope="module")
def make_base() -> Callable[..., Any]:
    """`make_base(family)` is a new model with the same random weights every time."""

    def make(family: str, **changes: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()

    return make


@pytest.fixture
def saved(tmp_path: Path, make_base: Any) -> Callable[..., Path]:
    """`saved("llama", **settings)` is the folder of an adapter with random B, saved by PEFT."""

    def save(family: str = "llama", *, kind: str = "LoraConfig", dtype: torch.dtype | None = None, **settings: Any):
        a, b, c = NAMES.get(family, LLAMA_NAMES)
        usual: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": [a, b, c]}
        if kind == "LoraConfig":
            usual |= {"r": 4, "lora_alpha": 12}
        filled = _filled(usual | settings, {"a": a, "b": b, "c": c, "stack": STACK.get(family, "layers")})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = peft.get_peft_model(make_base(family), getattr(peft, kind)(**filled))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
                elif "lora_A" in name and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
        if dtype is not None:
            model = model.to(dtype)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


@pytest.fixture
def imported(make_base: Any) -> Callable[..., tuple[ExpertBank, Any]]:
    """`imported(folder, "llama")` is the bank of a saved adapter, and the model with that bank alone at gate 1."""

    def read(folder: Path, family: str = "llama", **changes: Any) -> tuple[ExpertBank, Any]:
        model = make_base(family, **changes)
        config = read_config((folder / "adapter_config.json").read_bytes(), source="adapter_config.json")
        tensors = load_file(folder / "adapter_model.safetensors")
        bank = convert_adapter(tensors, config, model, find_layout(model), source="the adapter")
        return bank, attach(model, Stack(names=("one",), banks=(bank,)), router=None, fixed=torch.ones(1))

    return read


def _cases() -> Iterator[Any]:
    """Every variant in every family; not slow are the plain one in each family, and each variant in one family."""
    for i, variant in enumerate(IMPORTED):
        for j, family in enumerate(FAMILIES):
            is_fast = variant == "plain" or i % len(FAMILIES) == j
            if (variant, family) != ("weights", "gpt2"):  # refused: its weights are transposed
                yield pytest.param(variant, family, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(("variant", "family"), list(_cases()))
def test_an_adapter_that_peft_saved_is_imported_exactly(
    variant: str, family: str, saved: Any, imported: Any, make_base: Any, logits_of: Any
) -> None:
    folder = saved(family, **IMPORTED[variant])
    theirs = logits_of(peft.PeftModel.from_pretrained(make_base(family), str(folder)).eval())

    ours = logits_of(imported(folder, family)[1])

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - logits_of(make_base(family))).abs().max() > 1e-3


def test_half_precision_tensors_keep_their_dtype(saved: Any, imported: Any, make_base: Any, logits_of: Any) -> None:
    folder = saved(dtype=torch.bfloat16)

    bank, model = imported(folder)

    theirs = logits_of(peft.PeftModel.from_pretrained(make_base("llama"), str(folder)).eval())
    torch.testing.assert_close(logits_of(model), theirs, rtol=1e-5, atol=1e-5)
    assert bank.layers[0].A["self_attn.q_proj"].dtype == torch.bfloat16


def test_a_uniform_rank_and_alpha_keep_every_byte(saved: Any, imported: Any) -> None:
    folder = saved(use_rslora=True)
    before = load_file(folder / "adapter_model.safetensors")

    bank, _ = imported(folder)

    expert = bank.experts[0]
    assert (expert.rank, expert.alpha, expert.method) == (4, 12.0, "rslora")
    for index, layer in bank.layers.items():
        for target in layer.A:
            stem = f"base_model.model.model.layers.{index}.{target}"
            assert torch.equal(layer.A[target], before[f"{stem}.lora_A.weight"])
            assert torch.equal(layer.B[target], before[f"{stem}.lora_B.weight"])


def test_ambiguous_alpha_patterns_are_refused(saved: Any, imported: Any, make_base: Any, logits_of: Any) -> None:
    patterns = {"q_proj": 3, "layers.0.self_attn.q_proj": 40}  # PEFT takes the first, and saves them sorted
    folder = saved(alpha_pattern=patterns)
    assert list(json.loads((folder / "adapter_config.json").read_text())["alpha_pattern"]) == sorted(patterns)

    with pytest.raises(IncompatibleError, match="several patterns of alpha_pattern match") as refusal:
        imported(folder)

    assert refusal.match("40.0, 3.0")


# --- refused by name ---


@pytest.mark.parametrize("variant", REFUSED)
def test_variants_beyond_plain_lora_are_refused_by_name(variant: str, saved: Any, imported: Any) -> None:
    settings, said = REFUSED[variant]
    folder = saved(**settings)

    with pytest.raises(IncompatibleError) as refusal:
        imported(folder)

    assert refusal.value.exit_code == 6
    assert refusal.value.cause is not None
    assert refusal.match(said)


@pytest.mark.parametrize("kind", OTHER_METHODS)
def test_another_method_is_refused_by_name(kind: str, saved: Any, imported: Any) -> None:
    more: dict[str, Any] = {"IA3Config": {"feedforward_modules": ["down_proj"]}, "AdaLoraConfig": {"total_step": 10}}
    more |= {"OFTConfig": {"r": 4, "oft_block_size": 0}, "LNTuningConfig": {"target_modules": ["input_layernorm"]}}
    more |= {"VeraConfig": {"target_modules": ["q_proj"]}}
    folder = saved(kind=kind, **more.get(kind, {}))

    with pytest.raises(IncompatibleError, match="peft_type is"):
        imported(folder)


def test_an_adapter_of_a_classifier_is_refused(saved: Any, imported: Any) -> None:
    with pytest.raises(IncompatibleError, match="task_type is 'FEATURE_EXTRACTION'"):
        imported(saved(task_type="FEATURE_EXTRACTION"))


def test_a_pissa_adapter_that_peft_converted_is_imported_exactly(
    tmp_path: Path, make_base: Any, imported: Any, logits_of: Any
) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(make_base("llama"), config)
    model.peft_config["default"].init_lora_weights = True  # as in PEFT's guide, to save the initial adapter
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    trained = logits_of(model.eval())
    start = str(tmp_path / "start")
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=start)

    bank, ours = imported(tmp_path / "adapter")

    assert bank.experts[0].rank == 8
    torch.testing.assert_close(logits_of(ours), trained, rtol=1e-4, atol=1e-4)  # PEFT subtracts, we do not


# --- damaged or of another base ---


@pytest.fixture
def altered(saved: Any) -> Callable[[Callable[[dict[str, Any], dict[str, Any]], None]], Path]:
    """`altered(change)` is a saved adapter after `change(tensors, config)`."""

    def alter(change: Any) -> Path:
        folder = saved()
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        change(tensors, config)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return alter


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], type[LoraryError], str]] = {
    "extra": (lambda t, c: t.update(other=torch.ones(2)), IntegrityError, "not in its config: other"),
    "extra magnitude": (
        lambda t, c: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}),
        IntegrityError,
        "a DoRA magnitude",
    ),
    "missing": (lambda t, c: t.pop(f"{Q}.lora_B.weight"), IntegrityError, "1 tensors of its config are missing"),
    "another rank": (lambda t, c: c.update(r=8), IntegrityError, "rank 8 in the config"),
    "B is zero": (lambda t, c: [t[k].zero_() for k in t if "lora_B" in k], IntegrityError, "has no effect"),
    "three axes": (
        lambda t, c: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"][None].clone()}),
        IntegrityError,
        "A is \\(1, 4, 32\\)",
    ),
    "weight of a norm": (
        lambda t, c: c.update(target_parameters=["input_layernorm.weight"]),
        IncompatibleError,
        "input_layernorm, a LlamaRMSNorm",
    ),
    "no weights": (
        lambda t, c: c.update(target_parameters=["mlp.experts.gate_up_proj"]),
        IncompatibleError,
        "target_parameters has 'mlp.experts.gate_up_proj'",
    ),
    "routed experts": (
        lambda t, c: t.update(
            {Q.replace("self_attn.q_proj", "mlp.experts.0.up_proj") + ".lora_A.weight": torch.ones(4, 32)}
        ),
        IncompatibleError,
        "1 of its tensors adapt routed experts",
    ),
    "float64": (
        lambda t, c: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].double()}),
        IncompatibleError,
        "float64",
    ),
    "no rank": (lambda t, c: c.pop("r"), IntegrityError, "r must be a positive integer"),
    "rank of text": (lambda t, c: c.update(r="8"), IntegrityError, "r must be"),
    "alpha of text": (lambda t, c: c.update(lora_alpha=[1]), IntegrityError, "lora_alpha must be a number"),
    "no targets": (lambda t, c: c.update(target_modules=None), IncompatibleError, "target_modules is empty"),
    "unknown targets": (
        lambda t, c: c.update(target_modules=["no_such_module"]),
        IncompatibleError,
        "targets no module",
    ),
    "unknown setting": (lambda t, c: c.update(use_newer=True), IncompatibleError, "use_newer: True"),
    "bad pattern": (lambda t, c: c.update(target_modules="(q_proj"), IntegrityError, "not a valid regular expression"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_and_config_that_disagree_are_refused(damage: str, altered: Any, imported: Any) -> None:
    change, error, said = DAMAGE[damage]
    folder = altered(change)

    with pytest.raises(error, match=said):
        imported(folder)


def test_an_unknown_setting_that_is_off_is_accepted(altered: Any, imported: Any) -> None:
    bank, _ = imported(altered(lambda tensors, config: config.update(use_newer=False, newer_config=None)))

    assert len(bank.layers) == 4


def test_other_matrix_widths_are_reported_as_another_base_model(saved: Any, imported: Any) -> None:
    folder = saved("llama")

    with pytest.raises(IncompatibleError, match="has in_features 32 and out_features 32|has in_features 48") as refusal:
        imported(folder, "llama", hidden_size=48, head_dim=12)

    assert refusal.value.exit_code == 6


def test_a_transposed_weight_as_a_parameter_is_refused(saved: Any, imported: Any) -> None:
    folder = saved("gpt2")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"target_parameters": ["attn.c_proj.weight"]}
    path.write_text(json.dumps(config), encoding="utf-8")

    with pytest.raises(IncompatibleError, match="A and B change places"):
        imported(folder, "gpt2")


def test_slow_patterns_time_out(saved: Any, imported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorary.registry.interop.peft_reader.MATCHING_TIMEOUT_S", 0.2)
    folder = saved()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"] = r"(?:\w|\w\w|.)+\d\d"
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    with pytest.raises(IncompatibleError, match="takes too long"):
        imported(folder)


def test_every_setting_of_the_installed_peft_is_known() -> None:
    from lorary.registry.interop import peft_reader as rules

    known = rules._IGNORED_KEYS | rules._READ_KEYS | rules._UNSUPPORTED_KEYS.keys()

    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


def _filled(value: Any, names: dict[str, str]) -> Any:
    """Replace placeholders in settings by the family's module names."""
    if isinstance(value, str):
        for key, name in names.items():
            value = value.replace("{" + key + "}", name)
        is_nested = value.endswith("Config") and hasattr(peft.tuners.lora.config, value)
        return getattr(peft.tuners.lora.config, value)() if is_nested else value
    if isinstance(value, list):
        return [_filled(item, names) for item in value]
    if isinstance(value, dict):
        return {_filled(key, names): _filled(item, names) for key, item in value.items()}
    return value
