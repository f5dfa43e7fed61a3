"""PEFT format of a pack: adapter_config.json and tensor names that PEFT and vLLM read.

Only PEFT's own keys are written, in canonical JSON, so equal experts give equal bytes.
"""

import re
from collections import Counter
from typing import Any, Final

from ...adapters.bank import Expert, ExpertBank, LayerExperts
from ...domains.base_model import ModelLayout
from ...domains.errors import IntegrityError

VLLM_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)  # values that --max-lora-rank accepts (vllm/config/lora.py)

_KEY = re.compile(
    r"base_model\.model\.(?P<layers>[\w.]+)\.(?P<index>\d+)\.(?P<target>[\w.]+)\.lora_(?P<letter>[AB])\.weight"
)


def tensor_key(layers: str, index: int, target: str, letter: str) -> str:
    """Return PEFT's name of a LoRA matrix: `base_model.model.model.layers.3.mlp.up_proj.lora_A.weight`."""
    return f"base_model.model.{layers}.{index}.{target}.lora_{letter}.weight"


def parse_key(key: str, *, source: str) -> tuple[int, str, str]:
    """Return decoder layer, target and letter of a tensor's name.

    Raises:
        IntegrityError: The name is not that of a LoRA matrix.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise IntegrityError(f"{source} has a tensor that is no LoRA matrix.", cause=f"its name is {key[:120]!r}")
    return int(match["index"]), match["target"], match["letter"]


def expert_config(
    bank: ExpertBank, expert: Expert, *, layout: ModelLayout, base_id: str, revision: str | None
) -> dict[str, Any]:
    """Return the adapter_config.json of one expert."""
    return _config(bank.select_expert(expert).layers, layout, base_id, revision) | {
        "r": expert.rank,
        "lora_alpha": expert.alpha,
        "use_rslora": expert.method == "rslora",
    }


def bank_config(bank: ExpertBank, *, layout: ModelLayout, base_id: str, revision: str | None) -> dict[str, Any]:
    """Return the adapter_config.json of the whole bank: ranks concatenated, scale and gate folded into B, alpha = r."""
    ranks = {index: layer.rank for index, layer in sorted(bank.layers.items())}  # sorted: ties go to the first layer
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {
        rf"{layout.layers}.{index}.{target}": rank
        for index, rank in ranks.items()
        if rank != common
        for target in bank.layers[index].A
    }
    return _config(bank.layers, layout, base_id, revision) | {
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }


def _config(layers: dict[int, LayerExperts], layout: ModelLayout, base_id: str, revision: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "revision": revision,
        **_places(layers, layout),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": layout.transposed,
        "inference_mode": True,
    }


def _places(layers: dict[int, LayerExperts], layout: ModelLayout) -> dict[str, Any]:
    """Return the PEFT keys that select exactly the adapted modules.

    Full paths are used where layers differ, and for the GPT-2 family, because there both blocks have a `c_proj`.
    """
    targets = {index: sorted(layer.A) for index, layer in sorted(layers.items())}
    if layout.transposed or len({tuple(names) for names in targets.values()}) > 1:
        paths = [f"{layout.layers}.{index}.{target}" for index, names in targets.items() for target in names]
        return {"target_modules": paths}
    return {
        "target_modules": sorted({target.rpartition(".")[2] for names in targets.values() for target in names}),
        "layers_to_transform": list(targets),
        "layers_pattern": layout.layers.rpartition(".")[2],
    }
