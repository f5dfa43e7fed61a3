"""Silent failures of adapters: what PEFT does today, run, and what lorary does.

Each test shows both sides and is a row of docs/reliability.md: see test_reliability.py.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
row = pytest.mark.silent_failure


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def _change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# --- another base model ---


@pytest.fixture
def refused_over(refused_with: Any, saved: Path, base_folder: Path, tmp_path: Path) -> Callable[[Any], str]:
    """`refused_over(model)` plans the saved composition over another base, and is what was said."""
    from lorary.registry.base.fingerprint import fingerprint
    from lorary.registry.compose.saved import open_plan

    def check(model: Any) -> str:
        other = shutil.copytree(base_folder, tmp_path / "other")
        model.save_pretrained(other)
        return refused_with(6, lambda: open_plan(saved, base=fingerprint(other, source=str(other), revision=None)))

    return check


@row("another base model of the same shapes", theirs="PEFT loads it, without a warning", ours="refused, exit 6")
def test_another_base_of_the_same_shapes(saved: Path, by_peft: Any, tiny_llama: Any, refused_over: Any) -> None:
    by_peft(saved / "packs" / "cooking", tiny_llama(seed=9, vocab_size=300))

    assert "weights" in refused_over(tiny_llama(seed=9, vocab_size=300))


@row("a base model with fewer layers", theirs="PEFT loads it, without a warning", ours="refused, exit 6")
def test_a_base_with_fewer_layers(save_adapter: Any, by_peft: Any, tiny_llama: Any, refused_over: Any) -> None:
    by_peft(save_adapter(), tiny_llama(vocab_size=300, num_hidden_layers=2))

    assert "another base model" in refused_over(tiny_llama(vocab_size=300, num_hidden_layers=2))


@row("a base model with more layers", theirs="PEFT loads it, with a warning", ours="refused, exit 6")
def test_a_base_with_more_layers(save_adapter: Any, by_peft: Any, tiny_llama: Any, refused_over: Any) -> None:
    with pytest.warns(UserWarning, match="missing adapter keys"):
        by_peft(save_adapter(), tiny_llama(vocab_size=300, num_hidden_layers=6))

    assert "another base model" in refused_over(tiny_llama(vocab_size=300, num_hidden_layers=6))


@row(
    "a base model of another width",
    theirs="PEFT raises a RuntimeError of hundreds of characters, which does not say so",
    ours="refused, exit 6, in three lines with both values",
)
def test_a_base_of_another_width(save_adapter: Any, by_peft: Any, tiny_llama: Any, refused_over: Any) -> None:
    with pytest.raises(RuntimeError, match="size mismatch") as raised:
        by_peft(save_adapter(), tiny_llama(vocab_size=300, hidden_size=64))
    assert len(str(raised.value)) > 500

    said = refused_over(tiny_llama(vocab_size=300, hidden_size=64))
    assert "expected that of" in said
    assert "found that of" in said


# --- a damaged or altered adapter ---


@row("a tensor is missing", theirs="PEFT loads it, with a warning", ours="refused, exit 5")
def test_a_missing_tensor(refused_with: Any, save_adapter: Any, by_peft: Any, importing: Any) -> None:
    folder = save_adapter()
    _change_tensors(folder, lambda tensors: tensors.pop(next(iter(tensors))))

    with pytest.warns(UserWarning, match="missing adapter keys"):
        by_peft(folder)

    refused_with(5, lambda: importing({"bad": folder}))


@row("weights that are NaN", theirs="PEFT loads them; every logit is NaN", ours="refused, exit 5")
def test_weights_that_are_not_numbers(
    refused_with: Any, save_adapter: Any, by_peft: Any, logits_of: Any, importing: Any
) -> None:
    folder = save_adapter()
    _change_tensors(folder, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))

    assert logits_of(by_peft(folder)).isnan().all()

    assert "not finite" in refused_with(5, lambda: importing({"bad": folder}))


@row("a tensor too many", theirs="PEFT ignores it, without a warning", ours="refused, exit 5")
def test_an_extra_tensor(refused_with: Any, save_adapter: Any, by_peft: Any, importing: Any) -> None:
    import torch

    folder = save_adapter()
    name = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    _change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4, 32)}))

    by_peft(folder)

    refused_with(5, lambda: importing({"bad": folder}))


@row(
    "`lora_alpha` and the base's name edited after training",
    theirs="PEFT loads it at the other scale, without a warning",
    ours="refused by its digest, exit 5",
)
def test_an_edited_config(refused_with: Any, saved: Path, whole: Any, by_peft: Any, logits_of: Any) -> None:
    pack = saved / "packs" / "cooking"
    before = logits_of(by_peft(pack))
    alphas = json.loads((pack / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"]
    _edit(pack / "adapter_config.json", lora_alpha=alphas * 100, alpha_pattern={}, base_model_name_or_path="other/base")

    assert (logits_of(by_peft(pack)) - before).abs().max() > 1e-2

    refused_with(5, lambda: whole.compose(str(saved)))


# --- names, and what is trainable ---


@row(
    "a second adapter called `layers`, `mlp` or `weight`",
    theirs="PEFT saves none, some, or twice the tensors of the first one",
    ours="works: names are never looked for in paths",
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks for it
def test_names_that_are_parts_of_paths(
    save_adapter: Any, peft: Any, base_folder: Path, tmp_path: Path, importing: Any, logits_of: Any, by_peft: Any
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    changes = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    saved = {}
    for name in ("other", "layers", "mlp", "weight"):
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), peft.LoraConfig(**changes))
        model.add_adapter(name, peft.LoraConfig(**changes))
        model.save_pretrained(tmp_path / name)
        saved[name] = len(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert saved == {"other": 16, "layers": 0, "mlp": 8, "weight": 32}

    folders = {name: save_adapter(seed) for seed, name in enumerate(("layers", "mlp", "weight"))}
    registry = importing(folders)
    for name, folder in folders.items():
        ours = logits_of(registry.compose(name, static=True))
        torch.testing.assert_close(ours, logits_of(by_peft(folder)), **CLOSE)


@row(
    "a frozen and a new adapter made active together, to train the new one",
    theirs="PEFT makes the frozen one trainable, without a warning",
    ours="only the new bank can train; anything else trainable stops it, exit 5",
)
def test_what_is_frozen_stays_frozen(refused_with: Any, save_adapter: Any, by_peft: Any, peft: Any, whole: Any) -> None:
    model = by_peft(save_adapter())
    model.add_adapter("new", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    frozen = [p for name, p in model.named_parameters() if ".default." in name]
    assert not any(p.requires_grad for p in frozen)
    model.base_model.set_adapter(["default", "new"])
    assert all(p.requires_grad for p in frozen)

    from lorary.registry.learn.proof import check_only_new_is_trainable

    composed = whole.compose("cooking")
    assert not any(p.requires_grad for p in composed.parameters())
    composed.get_submodule("model.layers.2.mlp.down_proj").group.Bt0.requires_grad_(True)
    refused_with(5, lambda: check_only_new_is_trainable(composed))


# --- composition ---


@row(
    "one rsLoRA, DoRA or `lora_bias` adapter composed with the weight 1",
    theirs="PEFT's `add_weighted_adapter` gives another model, and does not say so",
    ours="rsLoRA is exact; DoRA and `lora_bias` are refused by name, exit 6",
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")  # it warns of merging, not of this
def test_the_identity(refused_with: Any, save_adapter: Any, by_peft: Any, logits_of: Any, importing: Any) -> None:
    import torch

    kinds = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}
    folders = {kind: save_adapter(**changes) for kind, changes in kinds.items()}
    for kind, folder in folders.items():
        model = by_peft(folder)
        if kind != "rslora":  # as they would be after training: a magnitude, a bias
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "magnitude" in name or name.endswith("lora_B.default.bias"):
                        p.add_(0.5)
        expected = logits_of(model)
        model.add_weighted_adapter(["default"], [1.0], "again", combination_type="linear")
        model.set_adapter("again")
        assert (logits_of(model) - expected).abs().max() > 1e-2, kind

    ours = logits_of(importing({"exact": folders["rslora"]}).compose("exact", static=True))
    torch.testing.assert_close(ours, logits_of(by_peft(folders["rslora"])), **CLOSE)
    for kind, key in (("dora", "use_dora"), ("bias", "lora_bias")):
        assert key in refused_with(6, lambda kind=kind: importing({kind: folders[kind]}))


@row(
    "an rsLoRA and a plain adapter composed by `cat`",
    theirs="PEFT gives another model than their sum, without a warning",
    ours="their weighted sum, to 1e-5",
)
def test_a_sum_of_two_kinds(save_adapter: Any, by_peft: Any, logits_of: Any, importing: Any, tmp_path: Path) -> None:
    import torch

    one, two = save_adapter(seed=1, use_rslora=True), save_adapter(seed=2, r=2)
    model = by_peft(one)
    model.load_adapter(str(two), "two")
    model.base_model.set_adapter(["default", "two"])
    sum_of_both = logits_of(model)
    model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "cat", combination_type="cat")
    model.set_adapter("cat")
    assert (logits_of(model) - sum_of_both).abs().max() > 1e-2

    registry = importing({"one": one, "two": two})
    torch.testing.assert_close(
        logits_of(registry.compose("one:0.5+two:0.5", static=True)), _halves(by_peft, one, two, logits_of), **CLOSE
    )
    registry.export("one:0.5+two:0.5", tmp_path / "out", to="peft", static=True)
    torch.testing.assert_close(logits_of(by_peft(tmp_path / "out")), _halves(by_peft, one, two, logits_of), **CLOSE)


def _halves(by_peft: Any, one: Path, two: Path, logits_of: Any) -> Any:
    """The logits under half of each, both active at once, which PEFT does compute exactly."""
    model = by_peft(one)
    model.load_adapter(str(two), "two")
    model.base_model.set_adapter(["default", "two"])
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    return logits_of(model)


@row(
    "one of several adapters cannot be loaded",
    theirs="mflux goes on, and gives its weight to the next one (report: mflux#629)",
    ours="nothing is composed, exit 3; a weight stands in its own term, in any order",
)
def test_a_dropped_adapter_shifts_nothing(refused_with: Any, whole: Any, logits_of: Any) -> None:
    import torch

    refused_with(3, lambda: whole.compose("cooking:0.6+missing:0.1+sailing:0.3"))
    orders = itertools.permutations(["cooking:0.6", "sailing:0.3"])
    one, other = (logits_of(whole.compose("+".join(order), static=True)) for order in orders)
    assert torch.equal(one, other)
