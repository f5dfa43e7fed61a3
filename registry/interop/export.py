"""Export static compositions: an adapter for PEFT or vLLM, or a merged transformers checkpoint.

All exports have constant gates. The banks of a composition become one adapter, side by side on the rank axis, with
scales, gates and slot weights folded into B:

    update = sum over slots s of prior_s sum over ranks of gate scale B[:, rank] A[rank, :]

so alpha equals the rank. Slots with weight 0 are left out.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ...adapters.bank import Expert, ExpertBank, LayerExperts, concat_layers
from ...adapters.layer.merge import merge_experts
from ...domains.base_model import ModelLayout
from ...domains.data.blocks import encode
from ...domains.errors import IncompatibleError, IntegrityError
from ..base.load import LoadedBase, check_fit
from ..compose.build import compose_packs
from ..compose.plan import Plan
from ..measure.held_out import general_examples
from ..pack.pack import DomainPack, merged_tensors
from ..pack.peft_config import VLLM_RANKS, bank_config
from ..pack.tensor_file import save_tensors
from ..store.blobs import hex_of, sha256_of
from ..store.files import new_path
from ..store.manifest import ADAPTER_CONFIG, ADAPTER_TENSORS, BaseRecord
from ..store.strict_json import canonical_json
from .export_plan import ExportResult, check_static

# maximum difference between the logits of the merged and the composed model, relative to the largest logit
TOLERANCES: Final = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# names that PEFT converts where it loads an adapter (_MOE_TARGET_MODULE_MAPPING of version 0.21), and what they become
CONVERTED_TARGETS: Final = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
FUSED_PARAMETERS: Final = ("gate_up_proj", "down_proj")
CHECKED_TEXTS: Final = 4
CHECKED_TOKENS: Final = 128  # per text


def export_composition(
    plan: Plan, packs: list[DomainPack], base: LoadedBase, out: Path, *, to: str, served_base: str | None = None
) -> ExportResult:
    """Export a static composition as `peft`, `vllm` or `merged`.

    Args:
        served_base: Name of the base model in the vLLM server; None for its Hub id or folder.

    Raises:
        IncompatibleError: The composition is routed, or vLLM cannot serve it.
        ConflictError: `out` exists.
        IntegrityError: The merged model computes other logits, or a pack does not fit the base model.
    """
    check_static(plan, to=to)
    for slot, pack in zip(plan.slots, packs, strict=True):
        check_fit(pack, base, source=f"{slot.name}@{slot.manifest.version}")
    if to == "merged":
        return export_merged(plan, packs, base, out)
    if to == "vllm":
        record = plan.slots[0].manifest.base
        return export_vllm(plan, packs, base, out, served_base=served_base or _served_base(record, base))
    return export_peft(plan, packs, base, out)


def export_peft(plan: Plan, packs: list[DomainPack], base: LoadedBase, out: Path) -> ExportResult:
    """Export an adapter folder for `PeftModel.from_pretrained`.

    Raises:
        ConflictError: `out` exists.
    """
    record = plan.slots[0].manifest.base
    bank = fold_banks(packs, [slot.prior for slot in plan.slots])
    _write_folder(out, adapter_files(bank, base, base_id=record.id, revision=record.revision))
    rank = max(layer.rank for layer in bank.layers.values())
    command = f"PeftModel.from_pretrained(base_model, {str(out.resolve())!r})"
    return ExportResult(out=out, pinned=_pinned(plan), command=command, facts={"rank": rank})


def export_vllm(plan: Plan, packs: list[DomainPack], base: LoadedBase, out: Path, *, served_base: str) -> ExportResult:
    """Export an adapter folder for vLLM: one rank for all modules, alpha equal to it, the base model's served name.

    Raises:
        IncompatibleError: vLLM cannot serve it.
        ConflictError: `out` exists.
    """
    if base.layout.transposed:
        raise IncompatibleError(
            "vLLM cannot serve these experts.",
            cause="this base model has Conv1D modules, which vLLM ignores: it would serve the bare base model",
            fix=f"registry export {plan.composition} --static --to merged --out DIR",
        )
    bank = pad_to_max_rank(fold_banks(packs, [slot.prior for slot in plan.slots]))
    rank = next(iter(bank.layers.values())).rank
    if rank > VLLM_RANKS[-1]:
        raise IncompatibleError(
            "The rank is too large for vLLM.",
            cause=f"the experts of a layer have rank {rank} in total; vLLM supports up to {VLLM_RANKS[-1]}",
            fix=f"registry export {plan.composition} --static --to merged --out DIR",
        )
    files = peft_files(bank, base.layout, base_id=served_base, revision=None)
    _write_folder(out, files)
    max_rank = next(allowed for allowed in VLLM_RANKS if rank <= allowed)
    name = served_name(plan, files[ADAPTER_TENSORS])
    words = ["vllm", "serve", served_base, "--enable-lora", "--max-lora-rank", str(max_rank)]
    command = shlex.join([*words, "--lora-modules", f"{name}={out.resolve()}"])
    facts: dict[str, str | int | float] = {"served_name": name, "rank": rank, "max_rank": max_rank}
    return ExportResult(out=out, pinned=_pinned(plan), command=command, facts=facts)


def served_name(plan: Plan, tensors: bytes) -> str:
    """Return the adapter's name in vLLM: `medicine-v2`, or several domains with a part of the tensors' digest.

    vLLM caches adapters by name, so the name changes with the version and with the slot weights.
    """
    slots = [slot for slot in plan.slots if slot.prior]
    name = "-".join(f"{slot.name}-v{slot.manifest.version}" for slot in slots)
    is_plain = len(slots) == 1 and slots[0].prior == 1
    return name if is_plain else f"{name}-{hex_of(sha256_of(tensors))[:8]}"


@torch.inference_mode()
def export_merged(plan: Plan, packs: list[DomainPack], base: LoadedBase, out: Path) -> ExportResult:
    """Export a merged transformers checkpoint in the base model's dtype.

    The checkpoint is loaded again, and its logits on general text are compared with the composed model's, before it is
    renamed to `out`.

    Raises:
        IncompatibleError: The base model is quantised, or has a module that cannot be merged.
        IntegrityError: The logits differ; nothing is written.
        ConflictError: `out` exists.
    """
    record = plan.slots[0].manifest.base
    if record.quantization:
        raise IncompatibleError(
            f"{plan.composition} cannot be merged.",
            cause=f"the base model is quantised ({record.quantization}), and merged weights would be rounded once more",
            fix=f"keep the experts beside it: registry export {plan.composition} --static --to peft --out DIR",
        )
    composed = compose_packs(plan, packs, base)
    texts = [encode(example, base.tokenizer)[0][:CHECKED_TOKENS] for example in general_examples()[:CHECKED_TEXTS]]
    ids = [torch.tensor([text], device=base.model.device) for text in texts]
    expected = [composed(input_ids=row).logits.float() for row in ids]
    merge_experts(composed)
    with new_path(out) as temporary:
        composed.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
        merged: Any = AutoModelForCausalLM.from_pretrained(
            temporary, dtype=base.model.dtype, trust_remote_code=base.trust_remote_code
        )
        merged.to(base.model.device).eval()
        actual = [merged(input_ids=row).logits.float() for row in ids]
        difference = _check_logits(expected, actual, base.model.dtype, plan)
    command = f"AutoModelForCausalLM.from_pretrained({str(out.resolve())!r})"
    dtype = str(base.model.dtype).removeprefix("torch.")
    facts: dict[str, str | int | float] = {"numbers": dtype, "difference": difference}
    return ExportResult(out=out, pinned=_pinned(plan), command=command, facts=facts)


def fold_banks(packs: Sequence[DomainPack], weights: Sequence[float]) -> ExpertBank:
    """Concatenate the banks of a static composition on the rank axis, with gates of 1.

    Args:
        weights: Slot weight of each pack.
    """
    bank = ExpertBank()
    for pack, weight in zip(packs, weights, strict=True):
        for index, layer in pack.bank.layers.items() if weight else ():
            folded = _fold_gates(layer, weight)
            bank.layers[index] = concat_layers(bank.layers[index], folded) if index in bank.layers else folded
    return bank


def pad_to_max_rank(bank: ExpertBank) -> ExpertBank:
    """Pad the ranks of every layer with zeros to the largest one."""
    max_rank = max(layer.rank for layer in bank.layers.values())
    return ExpertBank({index: _pad_ranks(layer, max_rank - layer.rank) for index, layer in bank.layers.items()})


def peft_files(bank: ExpertBank, layout: ModelLayout, *, base_id: str, revision: str | None) -> dict[str, bytes]:
    """Return the two files of a PEFT adapter, by name."""
    config = bank_config(bank, layout=layout, base_id=base_id, revision=revision)
    return {
        ADAPTER_CONFIG: canonical_json(config),
        ADAPTER_TENSORS: save_tensors(merged_tensors(bank, layout)),
    }


def adapter_files(bank: ExpertBank, base: LoadedBase, *, base_id: str, revision: str | None) -> dict[str, bytes]:
    """Return the two files of an adapter that PEFT loads over this base model, by name."""
    if has_fused_experts(base):
        bank = pad_to_max_rank(bank)  # PEFT warns of a rank_pattern for parameters, though it follows it
    files = peft_files(bank, base.layout, base_id=base_id, revision=revision)
    if has_fused_experts(base):
        config = bank_config(bank, layout=base.layout, base_id=base_id, revision=revision)
        files[ADAPTER_CONFIG] = canonical_json(targeting_parameters(config, bank, base.layout))
    return files


def has_fused_experts(base: LoadedBase) -> bool:
    """Return whether a layer of the base model keeps its routed experts in one parameter, as in transformers 5."""
    layers = base.model.get_submodule(base.layout.layers)
    return any(
        parameter.ndim == 3 and name.rpartition(".")[2] in FUSED_PARAMETERS
        for name, parameter in layers.named_parameters()
    )


def targeting_parameters(config: dict[str, Any], bank: ExpertBank, layout: ModelLayout) -> dict[str, Any]:
    """Return the config of an adapter for a base model with fused experts, which PEFT reads as it is.

    PEFT takes target modules named like a projection of a routed expert for the fused parameters, also where they name
    a dense or shared MLP. `target_parameters` is not converted, and adapts a linear module's weight in the same way.
    All layers of the bank must have the same rank.
    """
    layers = sorted(bank.layers.items())
    paths = [f"{layout.layers}.{index}.{target}" for index, layer in layers for target in sorted(layer.A)]
    as_parameters = [path for path in paths if path.rpartition(".")[2] in CONVERTED_TARGETS]
    kept = {key: value for key, value in config.items() if key not in ("layers_to_transform", "layers_pattern")}
    return kept | {
        "target_modules": [path for path in paths if path not in as_parameters],
        "target_parameters": [f"{path}.weight" for path in as_parameters],
    }


def _fold_gates(layer: LayerExperts, weight: float) -> LayerExperts:
    factor = layer.scales() * layer.static_gate() * weight
    return LayerExperts(
        experts=(Expert(id="all", rank=layer.rank, alpha=float(layer.rank)),),
        A=layer.A,
        B={target: B * factor for target, B in layer.B.items()},
        expert_gate=torch.zeros(1, layer.expert_gate.shape[1]),
        rank_gate=None,
        mean_gate=torch.ones(layer.rank),
    )


def _pad_ranks(layer: LayerExperts, count: int) -> LayerExperts:
    rank = layer.rank + count
    return LayerExperts(
        experts=(Expert(id="all", rank=rank, alpha=float(rank)),),
        A={target: F.pad(A, (0, 0, 0, count)) for target, A in layer.A.items()},
        B={target: F.pad(B, (0, count)) for target, B in layer.B.items()},
        expert_gate=layer.expert_gate[:1],
        rank_gate=None,
        mean_gate=torch.ones(rank),
    )


def _pinned(plan: Plan) -> str:
    """Return the composition with explicit versions, and with weights if there are several slots."""
    slots = [slot for slot in plan.slots if slot.prior]
    return "+".join(f"{s.name}@{s.manifest.version}" + (f":{s.prior:g}" if len(slots) > 1 else "") for s in slots)


def _served_base(record: BaseRecord, base: LoadedBase) -> str:
    return record.id if "/" in record.id else str(base.folder)


def _write_folder(out: Path, files: dict[str, bytes]) -> None:
    with new_path(out) as temporary:
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)


def _check_logits(expected: list[torch.Tensor], actual: list[torch.Tensor], dtype: torch.dtype, plan: Plan) -> float:
    """Return the largest difference, relative to the largest logit."""
    largest = max(logits.abs().max().item() for logits in expected)
    difference = max((a - b).abs().max().item() for a, b in zip(expected, actual, strict=True)) / largest
    tolerance = TOLERANCES[dtype]
    if not difference <= tolerance:  # also if it is NaN
        raise IntegrityError(
            f"The merged model of {plan.composition} differs from the composed model.",
            cause=f"relative difference of logits {difference:.2g}; at most {tolerance:g} is allowed for {dtype}",
            fix="merge in float32: --dtype float32",
        )
    return difference
