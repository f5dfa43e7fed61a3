"""Speed of a whole model with E experts of rank 8 on all seven linears, against its bare base and PEFT methods.

    OMP_NUM_THREADS=1 python tests/benchmarks/model.py [--quick] [--only prefill,decode,...] [--out model.json]
    OMP_NUM_THREADS=1 python tests/benchmarks/model.py --only profile       time by operator

Times of lorary include gates and router. Columns are ratios to the bare base in the same run.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from timing import measure, ratios, report
from transformers import DynamicCache

from lorary.adapters.layer.merge import merge_experts, unmerge_experts

torch.set_num_threads(1)
PROMPT = 512  # tokens


def prefill(model: Any, ids: torch.Tensor, **options: Any) -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> Any:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1, **options)

    return run


def decode(model: Any, prompt: torch.Tensor, *, steps: int = 4) -> Callable[[], Any]:
    """Return a run of some decode steps after a prompt, which stays in the cache between calls."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=prompt, past_key_values=cache)
    length = prompt.shape[1]

    @torch.inference_mode()
    def run() -> Any:
        for step in range(steps):
            token = prompt[:, length - 1 - step : length - step]
            model(input_ids=token, past_key_values=cache, logits_to_keep=1)
        cache.crop(-steps)

    return run


def peers(base: Any, experts: int, folder: Path, *, with_all: bool) -> dict[str, Any]:
    found = {"PEFT": models.peft_multi(base, experts)}
    if with_all:
        paths = models.saved_adapters(base, experts, folder)
        found |= {"X-LoRA": models.peft_xlora(base, paths), "Arrow": models.peft_arrow(base, paths)}
    return found


def bench_prefill_decode(base: Any, args: argparse.Namespace) -> None:
    rows = []
    for experts in (8, 16):
        # threshold 0 computes all experts; `sparse` measures the skipping of closed slots
        ours = models.compose(base, slots=experts // 2, experts=2, threshold=0.0)
        ids = models.text_of(0, 1, PROMPT)
        with tempfile.TemporaryDirectory() as folder:
            others = {} if args.quick else peers(base, experts, Path(folder), with_all=experts == 8)
            variants = {"base": base, "ours": ours, **others}
            if "prefill" in args.only:
                times = measure({name: prefill(model, ids) for name, model in variants.items()}, rounds=args.rounds)
                rows.append(
                    {
                        "phase": "prefill",
                        "E": experts,
                        "floor": models.flop_floor(experts, with_head=False),
                        "base ms": times["base"] * 1e3,
                        **ratios(times),
                    }
                )
            if "decode" in args.only:
                variants.pop("X-LoRA", None)  # has no key-value cache
                times = measure(
                    {name: decode(model, ids[:, :64]) for name, model in variants.items()}, rounds=3 * args.rounds
                )
                rows.append(
                    {
                        "phase": "decode",
                        "E": experts,
                        "floor": models.flop_floor(experts, with_head=True),
                        "base ms": times["base"] * 250,
                        **ratios(times),
                    }
                )
    report("Prefill (512 tokens) and decoding, batch size 1", rows, args.out)


def bench_sparse(base: Any, args: argparse.Namespace) -> None:
    slots = 32
    ours = models.compose(base, slots=slots, experts=1)
    rows = []
    one = models.text_of(5, slots, PROMPT)
    mixed = torch.cat([models.text_of(4 * row + 1, slots, PROMPT // 4, seed=row) for row in range(8)])
    for what, ids in (("1 row, 1 domain", one), ("8 rows, 8 domains", mixed)):
        for name, run in (("prefill", prefill), ("decode", decode)):
            variants = {"base": run(base, ids), "ours": run(ours, ids)}
            times = measure(variants, rounds=args.rounds * (1 if name == "prefill" else 3))
            dense = models.flop_floor(slots, with_head=name == "decode")
            rows.append({"input": what, "phase": name, "dense floor": dense, **ratios(times)})
    report("32 composed domains, few active", rows, args.out)


def bench_merged(base: Any, args: argparse.Namespace) -> None:
    ids = models.text_of(0, 1, 64)
    ours = models.compose(base, slots=4, experts=2, static=True)
    unmerged = models.compose(base, slots=4, experts=2, static=True)
    merged = merge_experts(ours)
    times = measure(
        {name: decode(model, ids) for name, model in {"base": base, "merged": merged, "static": unmerged}.items()},
        rounds=3 * args.rounds,
    )

    def merge_and_unmerge() -> None:
        unmerge_experts(ours)
        merge_experts(ours)

    merging = measure({"merge": merge_and_unmerge}, rounds=args.rounds)["merge"]
    row = {"E": 8, **ratios(times), "merge / decode step": merging / (times["base"] / 4)}
    report("Decoding with merged experts", [row], args.out)


def bench_training(base: Any, args: argparse.Namespace) -> None:
    rows = []
    for experts, new in ((8, 2), (16, 4)):
        ours = models.compose(base, slots=experts // new, experts=new, trainable=True).train()
        peft = models.peft_multi(base, experts, new=new).train()
        ids = torch.randint(0, models.VOCABULARY, (2, 256), generator=torch.Generator().manual_seed(0))
        variants = {
            "base": base_gradient_step(base, ids),
            "ours": training_step(ours, ids),
            "PEFT": training_step(peft, ids),
        }
        if not args.quick:
            variants["PEFT, one adapter"] = training_step(models.peft_multi(base, 1, new=1).train(), ids)
        saved = {name: saved_bytes(run) / 2**20 for name, run in variants.items()}
        times = ratios(measure(variants, rounds=args.rounds))
        rows.append(
            {
                "E": experts,
                "new experts": new,
                **times,
                "PEFT / ours": times["PEFT"] / times["ours"],
                **{f"activations MB, {name}": value for name, value in saved.items()},
                "activations, ours / PEFT": saved["ours"] / saved["PEFT"],
            }
        )
    report("Training step of 2 x 256 tokens, relative to forward and input gradient of the base", rows, args.out)


def base_gradient_step(base: Any, ids: torch.Tensor) -> Callable[[], Any]:
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_()

    def run() -> None:
        embedded.grad = None
        base(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    return run


def training_step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def saved_bytes(run: Callable[[], Any]) -> int:
    """Return the bytes of distinct storage that autograd saves for backward, without parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def bench_profile(base: Any, args: argparse.Namespace) -> None:
    """Report self time by operator and time outside of operators; both include the profiler's overhead."""
    ids = models.text_of(0, 1, PROMPT)
    ours = models.compose(base, slots=4, experts=2, threshold=0.0)
    trained = models.compose(base, slots=4, experts=2, trainable=True).train()
    halves = ids.view(2, -1)
    for what, of_ours, of_base in (
        ("prefill", prefill(ours, ids), prefill(base, ids)),
        ("decode", decode(ours, ids[:, :64]), decode(base, ids[:, :64])),
        ("training", training_step(trained, halves), base_gradient_step(base, halves)),
    ):
        mine, theirs = operators(of_ours), operators(of_base)
        rows = [
            {"operator": name, "ours ms": own, "calls": calls, "base ms": theirs.get(name, (0.0, 0))[0]}
            for name, (own, calls) in sorted(mine.items(), key=lambda item: -item[1][0])[:12]
        ]
        report(f"Profile: {what}", rows, args.out)


def operators(run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Return milliseconds and calls of each operator in one run."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        began = time.thread_time()
        run()
        took = time.thread_time() - began
    found = {event.key: (event.self_cpu_time_total / 1e3, event.count) for event in profiler.key_averages()}
    return found | {"outside of operators": (took * 1e3 - sum(own for own, _ in found.values()), 1)}


PARTS = {
    "prefill": bench_prefill_decode,
    "decode": bench_prefill_decode,
    "sparse": bench_sparse,
    "merged": bench_merged,
    "training": bench_training,
    "profile": bench_profile,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="without the PEFT methods that are slow to build")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[name for name in PARTS if name != "profile"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = models.make_base()
    for part in dict.fromkeys(PARTS[name] for name in args.only):
        part(base, args)


if __name__ == "__main__":
    main()
