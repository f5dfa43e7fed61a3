"""A PEFT adapter into a registry and out again, with the same logits at every step.

    python examples/peft_round_trip.py --out /tmp/round-trip
    python examples/peft_round_trip.py --out /tmp/round-trip --adapter my-adapter --data notes.jsonl

Without --adapter, a small LoRA is trained with plain PEFT first. It is imported as a domain, composed, exported as an
adapter, and loaded with plain PEFT again. Needs `pip install peft`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorary.registry import Registry, TrainingConfig

SAMPLE = Path(__file__).parent / "beekeeping.jsonl"
TOLERANCE = 1e-4  # of logits in float32


def train_with_peft(base: Path, data: Path, out: Path, *, steps: int) -> None:
    """Train a LoRA as one would without lorary, and save it."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False), config
    )
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for step in range(steps):
        ids = tokenizer(texts[step % len(texts)], return_tensors="pt").input_ids
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits."""
    with torch.inference_mode():
        return model(input_ids=ids).logits


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the registry and the adapters")
    parser.add_argument("--base", default="pocket", help="pocket, a folder or a Hub id")
    parser.add_argument("--adapter", type=Path, help="an adapter saved by PEFT for this base model")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="text of the domain, which the router is made from")
    parser.add_argument("--steps", type=int, default=40, help="training steps of the adapter and of the registry")
    args = parser.parse_args()
    registry = Registry.init(args.out / "registry", base=args.base, training=TrainingConfig(steps=args.steps))
    base = registry.base.folder  # plain transformers and PEFT load the same files
    adapter = args.adapter or args.out / "adapter"
    if args.adapter is None:
        train_with_peft(base, args.data, adapter, steps=args.steps)

    # in: the adapter becomes version 1 of a domain; nothing is trained
    registry.import_adapter("beekeeping", adapter, data=args.data)

    # out: the domain becomes an adapter that PEFT and vLLM load
    exported = registry.export("beekeeping", args.out / "exported", to="peft")
    print(f"use it with: {exported.command}")

    ids = registry.tokenizer("A strong colony guards the entrance", return_tensors="pt").input_ids
    composed = logits_of(registry.compose("beekeeping", static=True), ids)
    plain = logits_of(registry.base.model, ids)
    for name, folder in (("the adapter that came in", adapter), ("the adapter that went out", exported.out)):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False), folder
        )
        difference = (logits_of(model.eval(), ids) - composed).abs().max().item()
        print(f"{name} differs from the composed model by {difference:.1e}")
        if difference > TOLERANCE:
            raise SystemExit(f"{name} computes something else")
    print(f"and the composed model from the bare base by {(composed - plain).abs().max().item():.2f}")


if __name__ == "__main__":
    main()
