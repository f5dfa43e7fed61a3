"""Exporting: what others load. An adapter for PEFT or vLLM, or a merged checkpoint for anything.

An adapter and a merged checkpoint have constant gates: they are static compositions. A version by itself stands for its
own static composition; several domains have to be asked for with `--static`, because what routes them is lost.
"""

import shlex
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from ...adapters.layer.merge import merge_experts
from ...domains.data.blocks import encode
from ...domains.errors import IncompatibleError, IntegrityError
from ..base.load import LoadedBase, check_fit
from ..compose.build import compose_packs
from ..compose.plan import Plan
from ..measure.held_out import general_examples
from ..pack.pack import DomainPack
from ..pack.peft_config import VLLM_RANKS
from ..store.blobs import hex_of, sha256_of
from ..store.files import new_path
from ..store.manifest import ADAPTER_TENSORS, BaseRecord
from .export_plan import ExportResult, check_static
from .static_adapter import adapter_files, one_rank, static_bank

# largest difference of logits, as a share of the largest logit, at which a merged model is the composed one
LIMITS: Final = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CHECKED_TEXTS: Final = 4
CHECKED_TOKENS: Final = 128  # of each


def export_composition(
    plan: Plan, packs: list[DomainPack], base: LoadedBase, out: Path, *, to: str, served_base: str | None = None
) -> ExportResult:
    """Writes a static composition as `peft`, `vllm` or `merged`.

    Args:
        served_base: How the base model is called where vLLM serves it; its Hub id or its folder if not given.

    Raises:
        IncompatibleError: It routes, or vLLM cannot serve it.
        ConflictError: There is something at `out`.
        IntegrityError: A merged model is not the composed one, or a pack does not fit the base.
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


def _pinned(plan: Plan) -> str:
    """The versions that have a share, with it where there are several."""
    slots = [slot for slot in plan.slots if slot.prior]
    return "+".join(f"{s.name}@{s.manifest.version}" + (f":{s.prior:g}" if len(slots) > 1 else "") for s in slots)


def _served_base(record: BaseRecord, base: LoadedBase) -> str:
    return record.id if "/" in record.id else str(base.folder)


def export_peft(plan: Plan, packs: list[DomainPack], base: LoadedBase, out: Path) -> ExportResult:
    """A folder for `PeftModel.from_pretrained`.

    Raises:
        ConflictError: There is something at `out`.
    """
    record = plan.slots[0].manifest.base
    bank = static_bank(packs, [slot.prior for slot in plan.slots])
    files = adapter_files(bank, base.layout, base_id=record.id, revision=record.revision)
    _write_folder(out, files)
    rank = max(layer.rank for layer in bank.layers.values())
    command = f"PeftModel.from_pretrained(base_model, {str(out.resolve())!r})"
    return ExportResult(out=out, pinned=_pinned(plan), command=command, facts={"rank": rank})


def export_vllm(plan: Plan, packs: list[DomainPack], base: LoadedBase, out: Path, *, served_base: str) -> ExportResult:
    """A folder as vLLM takes it: one rank for all modules, alpha equal to it, and the base's name as it is served.

    The version is in the name under which it is served, because vLLM keeps what it once loaded under a name.

    Raises:
        IncompatibleError: vLLM cannot serve it; says why.
        ConflictError: There is something at `out`.
    """
    if base.layout.transposed:
        raise IncompatibleError(
            "vLLM cannot serve these experts.",
            cause="this base model's modules are Conv1D, which vLLM does not extend: it would serve the bare base",
            fix=f"registry export {plan.composition} --static --to merged --out DIR",
        )
    bank = one_rank(static_bank(packs, [slot.prior for slot in plan.slots]))
    rank = next(iter(bank.layers.values())).rank
    if rank > VLLM_RANKS[-1]:
        raise IncompatibleError(
            "vLLM cannot serve so many ranks.",
            cause=f"all experts of a layer together have rank {rank}, vLLM takes at most {VLLM_RANKS[-1]}",
            fix=f"registry export {plan.composition} --static --to merged --out DIR",
        )
    files = adapter_files(bank, base.layout, base_id=served_base, revision=None)
    _write_folder(out, files)
    most = next(allowed for allowed in VLLM_RANKS if rank <= allowed)
    name = served_name(plan, files[ADAPTER_TENSORS])
    words = ["vllm", "serve", served_base, "--enable-lora", "--max-lora-rank", str(most)]
    command = shlex.join([*words, "--lora-modules", f"{name}={out.resolve()}"])
    return ExportResult(
        out=out, pinned=_pinned(plan), command=command, facts={"served_name": name, "rank": rank, "max_rank": most}
    )


def served_name(plan: Plan, tensors: bytes) -> str:
    """`medicine-v2`; of several domains with a piece of the digest, because their shares count as well."""
    slots = [slot for slot in plan.slots if slot.prior]
    name = "-".join(f"{slot.name}-v{slot.manifest.version}" for slot in slots)
    is_plain = len(slots) == 1 and slots[0].prior == 1
    return name if is_plain else f"{name}-{hex_of(sha256_of(tensors))[:8]}"


@torch.inference_mode()
def export_merged(plan: Plan, packs: list[DomainPack], base: LoadedBase, out: Path) -> ExportResult:
    """An ordinary checkpoint of transformers, in the numbers in which the base is loaded.

    It is loaded again, and its logits on general text are compared with the composed model's, before it gets its name.

    Raises:
        IntegrityError: They differ; nothing is written.
        ConflictError: There is something at `out`.
    """
    composed = compose_packs(plan, packs, base)
    texts = [encode(example, base.tokenizer)[0][:CHECKED_TOKENS] for example in general_examples()[:CHECKED_TEXTS]]
    ids = [torch.tensor([text], device=base.model.device) for text in texts]
    expected = [composed(input_ids=row).logits.float() for row in ids]
    merge_experts(composed)
    with new_path(out) as temporary:
        composed.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
        again: Any = AutoModelForCausalLM.from_pretrained(temporary, dtype=base.model.dtype)
        again.to(base.model.device).eval()
        found = [again(input_ids=row).logits.float() for row in ids]
        difference = _check_same_logits(expected, found, base.model.dtype, plan)
    command = f"AutoModelForCausalLM.from_pretrained({str(out.resolve())!r})"
    numbers = str(base.model.dtype).removeprefix("torch.")
    return ExportResult(
        out=out, pinned=_pinned(plan), command=command, facts={"numbers": numbers, "difference": difference}
    )


def _write_folder(out: Path, files: dict[str, bytes]) -> None:
    with new_path(out) as temporary:
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)


def _check_same_logits(
    expected: list[torch.Tensor], found: list[torch.Tensor], dtype: torch.dtype, plan: Plan
) -> float:
    """The largest difference as a share of the largest logit."""
    largest = max(logits.abs().max().item() for logits in expected)
    difference = max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True)) / largest
    limit = LIMITS[dtype]
    if not difference <= limit:
        raise IntegrityError(
            f"The merged model of {plan.composition} is not the composed one.",
            cause=f"logits differ by {difference:.2g} of the largest; at most {limit:g} is allowed for {dtype}",
            fix="merge in float32: --dtype float32",
        )
    return difference
