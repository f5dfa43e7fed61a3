"""PEFT adapters: trained with lorary's training loop, stored atomically, and loaded on a base model.

An adapter is stored under the digest of its inputs: methods share adapters, and an interrupted benchmark resumes.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from method import Bench, digest
from safetensors.torch import load_file, save_file
from torch import nn

from lorary.adapters.config import BankConfig, TrainingConfig
from lorary.adapters.training.train import train_bank
from lorary.domains.data.blocks import encode, pack_blocks
from lorary.domains.data.corpus import corpus_digest
from lorary.domains.data.example import Example
from lorary.domains.linear import linear_shape
from lorary.registry.base.load import LoadedBase

BANK = BankConfig(experts=1.5)  # lorary's bank: 12 experts of rank 4 over the 8 layers of the pocket base
PARAMETERS = 186_624  # of such a bank; the limit per domain for every method
SCALE = BANK.alpha / BANK.rank
ORTHOGONALITY = 0.5  # weight of O-LoRA's loss, as in its paper


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A trained adapter on disk."""

    folder: Path
    parameters: int
    seconds: float
    steps: int

    @property
    def id(self) -> str:
        """Digest of the adapter's inputs."""
        return self.folder.name


def lora_shape(base: LoadedBase, *, times: int) -> peft.LoraConfig:
    """Return a LoRA on all linear modules of all layers, as large as the budget of `times` domains allows.

    All layers have the same rank, except for the deepest ones, which get one more until the budget is spent.
    """
    layer = base.model.get_submodule(f"{base.layout.layers}.0")
    targets = base.targets.choose()[0]
    cost = sum(sum(linear_shape(layer.get_submodule(target))) for target in targets)
    rank, more = divmod(times * PARAMETERS // cost, base.layout.count)
    deepest = "|".join(str(base.layout.count - 1 - i) for i in range(more))
    pattern = rf"{base.layout.layers}\.({deepest})\..+".replace("model.layers", r"model\.layers")
    return peft.LoraConfig(
        r=rank,
        lora_alpha=int(SCALE * rank),
        rank_pattern={pattern: rank + 1} if more else {},
        alpha_pattern={pattern: SCALE * (rank + 1)} if more else {},
        target_modules=sorted({target.rpartition(".")[2] for target in targets}),
        task_type="CAUSAL_LM",
    )


def train_adapter(
    bench: Bench,
    examples: list[Example],
    *,
    name: str,
    parent: Adapter | None = None,
    frozen: tuple[Adapter, ...] = (),
    times: int = 1,
) -> Adapter:
    """Train an adapter with lorary's training loop: same optimizer, schedule, batches and seed as a bank.

    Args:
        parent: Adapter to initialize from; None: a new one.
        frozen: Frozen active adapters, to which the new one is kept orthogonal.
        times: Parameters and steps as a multiple of one domain's.
    """
    recipe = _times(bench.recipe, times)
    origin = [asdict(recipe), corpus_digest(examples), parent and parent.id, [a.id for a in frozen], times]
    folder = bench.out / "adapters" / digest(origin)
    if folder.is_dir():
        return _read_adapter(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = peft.get_peft_model(bench.fresh_base(), lora_shape(bench.base, times=times), adapter_name="new")
    if parent is not None:
        _load_values(model, parent, "new")
    _stack_frozen(model, frozen)
    if frozen:
        model.get_base_model().register_forward_hook(partial(_add_overlap, model, [a.id for a in frozen]))
    figures = _train(bench, model, examples, recipe, folder.name, name)
    return _keep(model, folder, figures)


def _train(
    bench: Bench, model: Any, examples: list[Example], recipe: TrainingConfig, run: str, name: str
) -> dict[str, Any]:
    blocks = pack_blocks([encode(example, bench.base.tokenizer) for example in examples], recipe.block, min_targets=1)
    folder = bench.out / "runs" / run
    alone = replace(recipe, balance=0.0)  # a LoRA has no experts to balance
    figures = train_bank(model, blocks, alone, run=folder, stage=f"training on {name}", on_progress=bench.on_progress)
    shutil.rmtree(folder, ignore_errors=True)
    return figures | {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad), "of": name}


def _keep(model: Any, folder: Path, figures: dict[str, Any]) -> Adapter:
    """Store an adapter atomically."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished), selected_adapters=["new"])
    for path in (unfinished / "new").iterdir():
        path.rename(unfinished / path.name)
    (unfinished / "training.json").write_text(json.dumps(figures), encoding="utf-8")
    unfinished.rename(folder)
    return _read_adapter(folder)


def _read_adapter(folder: Path) -> Adapter:
    figures = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return Adapter(folder=folder, parameters=figures["parameters"], seconds=figures["seconds"], steps=figures["steps"])


def _load_values(model: Any, adapter: Adapter, name: str) -> None:
    result = peft.set_peft_model_state_dict(
        model, load_file(adapter.folder / "adapter_model.safetensors"), adapter_name=name
    )
    assert not result.unexpected_keys, result.unexpected_keys


def _stack_frozen(model: Any, frozen: Sequence[Adapter]) -> None:
    """Activate earlier adapters, frozen, beside the trainable one."""
    for adapter in frozen:
        model.load_adapter(str(adapter.folder), adapter_name=adapter.id)
    model.base_model.set_adapter([*(adapter.id for adapter in frozen), "new"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".new." in name)


def _add_overlap(model: Any, frozen: list[str], _module: nn.Module, _args: Any, output: Any) -> Any:
    """Add O-LoRA's loss: the squared inner products of the new A's rows with those of the earlier ones."""
    if model.training and output.loss is not None:
        layers = [module.lora_A for module in model.modules() if hasattr(module, "lora_A")]
        overlaps = [(a[old].weight @ a["new"].weight.T).square().sum() for a in layers for old in frozen]
        output.loss = output.loss + ORTHOGONALITY * torch.stack(overlaps).sum()
    return output


def with_adapters(bench: Bench, adapters: Sequence[Adapter]) -> nn.Module:
    """Return the base with the sum of these adapters."""
    first, *others = adapters
    model: Any = peft.PeftModel.from_pretrained(bench.fresh_base(), str(first.folder), adapter_name=first.id)
    for adapter in others:
        model.load_adapter(str(adapter.folder), adapter_name=adapter.id)
    model.base_model.set_adapter([adapter.id for adapter in adapters])
    return model.eval()


def arrow_model(bench: Bench, adapters: Sequence[Adapter]) -> nn.Module:
    """Return Arrow over these adapters, with PEFT's default settings."""
    config = peft.ArrowConfig(top_k=min(3, len(adapters)), rng_seed=bench.recipe.seed)
    model = peft.create_arrow_model(bench.fresh_base(), [str(adapter.folder) for adapter in adapters], config)
    return model.eval()


def xlora_model(bench: Bench, adapters: Sequence[Adapter], router: Adapter | None) -> nn.Module:
    """Return X-LoRA over these adapters, with a new classifier if `router` is None."""
    base = bench.fresh_base()
    base.config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.recipe.seed)
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=bench.base.layout.width,
            adapters={
                str(i): str(adapter.folder) for i, adapter in enumerate(adapters)
            },  # PEFT loads them as 0, 1, ...
            layerwise_scalings=True,
        )
        model = peft.get_peft_model(base, config)
    if router is not None:
        _classifier(model).load_state_dict(load_file(router.folder / "classifier.safetensors"))
    return model.eval()


def train_xlora(bench: Bench, adapters: Sequence[Adapter], examples: list[Example]) -> Adapter:
    """Train X-LoRA's classifier on these examples; the adapters are frozen."""
    origin = ["xlora", asdict(bench.recipe), [adapter.id for adapter in adapters], corpus_digest(examples)]
    folder = bench.out / "adapters" / digest(origin)
    if folder.is_dir():
        return _read_adapter(folder)
    model: Any = xlora_model(bench, adapters, None)
    figures = _train(bench, model, examples, bench.recipe, folder.name, "X-LoRA's classifier")
    unfinished = folder.with_suffix(".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    save_file(_classifier(model).state_dict(), unfinished / "classifier.safetensors")
    (unfinished / "training.json").write_text(json.dumps(figures), encoding="utf-8")
    unfinished.rename(folder)
    return _read_adapter(folder)


def _classifier(model: Any) -> nn.Module:
    return model.base_model.internal_xlora_classifier


def _times(recipe: TrainingConfig, times: int) -> TrainingConfig:
    assert recipe.steps is not None
    return replace(recipe, steps=recipe.steps * times)
