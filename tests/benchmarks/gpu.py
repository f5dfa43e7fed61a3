"""Speed of the fused layer on one GPU, at the shapes of Llama-3-8B in bfloat16 with a stacked rank of 128.

    python tests/benchmarks/gpu.py [--budget 480] [--out gpu.json]
    TRITON_INTERPRET=1 python tests/benchmarks/gpu.py --dry     smoke test with small shapes on the CPU

Written for an H100 or H200 and not yet run on one. Jobs run in order of importance until the budget (seconds) is spent;
the JSON is written after each. All variants are checked against the reference before they are timed. Decoding and
prefill are timed as CUDA graphs over the weights of several layers, so that weights are read from memory and not from
the cache; eager execution is timed as well. Columns are ratios to the bare linears in the same job. Times of lorary
include the gates of every layer; PEFT has none.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import report
from torch import Tensor

from lorary.adapters.kernels import eager, reference, triton_group
from lorary.adapters.kernels.group import GroupWeights
from lorary.adapters.layer.gates import LayerGates

DRY = not torch.cuda.is_available()
DEVICE = "cpu" if DRY else "cuda"
WIDTH, KEYS, INNER = (96, 32, 160) if DRY else (4096, 1024, 14336)
RANK, EXPERTS, SLOTS = (32 if DRY else 128), 8, 4
GROUPS = {
    "q, k, v": (WIDTH, (WIDTH, KEYS, KEYS)),
    "o": (WIDTH, (WIDTH,)),
    "gate, up": (WIDTH, (INNER, INNER)),
    "down": (INNER, (WIDTH,)),
}
LAYERS = 1 if DRY else 4  # copies of the weights in one graph
TOLERANCE = 2e-2


def normal(*size: int) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=torch.bfloat16) * size[-1] ** -0.5


class Group:
    """Weights and inputs of one group in one decoder layer."""

    def __init__(self, tokens: int, d_in: int, d_outs: tuple[int, ...]):
        self.x = torch.randn(tokens, d_in, device=DEVICE, dtype=torch.bfloat16)
        self.linears = [(normal(size, d_in), None) for size in d_outs]
        self.gates = torch.rand(tokens, RANK, device=DEVICE)
        self.weights = GroupWeights(A=normal(RANK * len(d_outs), d_in), Bt=tuple(normal(RANK, size) for size in d_outs))

    def base(self) -> list[Tensor]:
        return [F.linear(self.x, weight) for weight, _ in self.linears]

    def composed(self, kernels: Any, gates: Tensor) -> list[Tensor]:
        return kernels.outputs(self.x, self.linears, gates, self.weights)[0]

    def base_first(self, gates: Tensor) -> list[Tensor]:
        """Run the base modules first, then add the update to their outputs."""
        outputs = self.base()
        triton_group.update_(self.x, outputs, gates, self.weights)
        return outputs

    def peft(self) -> list[Tensor]:
        """Add 8 active adapters of rank 16 one by one without gates, as PEFT does."""
        found = []
        for place, output in enumerate(self.base()):
            own = self.weights.A[place * RANK : (place + 1) * RANK]
            for A, Bt in zip(own.split(RANK // 8), self.weights.Bt[place].split(RANK // 8), strict=True):
                output = output + (self.x @ A.t()) @ Bt * 1.0
            found.append(output)
        return found

    def train(self, kernels: Any | None) -> None:
        """Run forward and the gradient of x; with `kernels`, those of experts too, with 16 trainable ranks."""
        if kernels is None:
            outputs = self.base()
            grad_x = outputs[0] @ self.linears[0][0]
            rest = 1
        else:
            outputs, low = kernels.outputs(self.x, self.linears, self.gates, self.weights, keep=True)
            found = kernels.gradients(
                outputs, self.x, low, self.gates, self.weights,
                trainable=[16] * len(outputs), needs_x_grad=True, needs_gates_grad=True,
            )  # fmt: skip
            grad_x, rest = found.x, 0
        for output, (weight, _) in list(zip(outputs, self.linears, strict=True))[rest:]:
            grad_x.addmm_(output, weight)


class Layer:
    """Groups and gates of one decoder layer."""

    def __init__(self, tokens: int):
        self.groups = [Group(tokens, d_in, d_outs) for d_in, d_outs in GROUPS.values()]
        self.hidden = torch.randn(tokens, WIDTH, device=DEVICE, dtype=torch.bfloat16)
        self.slot_gate = torch.full((tokens, SLOTS), 1 / SLOTS, device=DEVICE)
        slot_of_expert = torch.arange(EXPERTS) // (EXPERTS // SLOTS)
        gates = LayerGates(
            expert_gate=torch.randn(EXPERTS, WIDTH),
            rank_gate=0.02 * torch.randn(RANK, WIDTH),
            new_expert_gate=None,
            new_rank_gate=None,
            slot_of_expert=slot_of_expert,
            group_of_expert=slot_of_expert,
            expert_of_rank=torch.arange(RANK) // (RANK // EXPERTS),
        )
        self.tables = gates.to(DEVICE).tables()

    def gates(self, kernels: Any) -> Tensor:
        return kernels.gates(self.hidden, self.slot_gate, self.tables)

    def composed(self, kernels: Any) -> list[Tensor]:
        gates = self.gates(kernels)
        return [output for group in self.groups for output in group.composed(kernels, gates)]

    def base_first(self) -> list[Tensor]:
        gates = self.gates(triton_group)
        return [output for group in self.groups for output in group.base_first(gates)]

    def check(self) -> None:
        expected = self.composed(reference)
        variants = {"triton": self.composed(triton_group), "torch": self.composed(eager), "base": self.base_first()}
        for name, found in variants.items():
            for mine, wanted in zip(found, expected, strict=True):
                error = (mine.float() - wanted.float()).abs().max() / wanted.float().abs().max()
                if not error <= TOLERANCE:
                    raise AssertionError(f"{name} is off by {float(error):.3g}")


def graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a run as a CUDA graph."""
    if DRY:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def milliseconds(variants: dict[str, Callable[[], Any]], *, rounds: int = 15, repeat: int = 5) -> dict[str, float]:
    """Return median times over interleaved rounds, measured with CUDA events."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for run in variants.values():
        run()
    if DRY:
        return dict.fromkeys(variants, 1.0)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()  # type: ignore[call-arg]
            for _ in range(repeat):
                variants[name]()
            ended.record()  # type: ignore[call-arg]
            torch.cuda.synchronize()
            times[name].append(began.elapsed_time(ended) / repeat)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def layer_job(tokens: int, *, in_graph: bool) -> dict[str, Any]:
    """Time the four groups and the gates of several consecutive decoder layers."""
    layers = [Layer(tokens) for _ in range(LAYERS)]
    layers[0].check()
    variants: dict[str, Callable[[], Any]] = {
        "base": lambda: [group.base() for layer in layers for group in layer.groups],
        "triton": lambda: [layer.composed(triton_group) for layer in layers],
        "triton, base first": lambda: [layer.base_first() for layer in layers],
        "torch": lambda: [layer.composed(eager) for layer in layers],
        "PEFT": lambda: [group.peft() for layer in layers for group in layer.groups],
        "gates only": lambda: [layer.gates(triton_group) for layer in layers],
    }
    times = milliseconds({name: graph(run) if in_graph else run for name, run in variants.items()})
    floor = 1 + sum((d_in * len(o) + sum(o)) * RANK for d_in, o in GROUPS.values()) / sum(
        d_in * sum(o) for d_in, o in GROUPS.values()
    )
    row = {"T": tokens, "graph": in_graph, "floor": floor, "base ms": times["base"] / LAYERS}
    return row | {name: value / times["base"] for name, value in times.items()}


def training_job(tokens: int) -> dict[str, Any]:
    """Time forward and backward of all linears of one decoder layer, with given gates."""
    groups = [Group(tokens, d_in, d_outs) for d_in, d_outs in GROUPS.values()]
    variants = {
        name: (lambda kernels=kernels: [group.train(kernels) for group in groups])
        for name, kernels in (("base", None), ("triton", triton_group), ("torch", eager))
    }
    times = milliseconds(variants, rounds=9, repeat=2)
    return {"T": tokens, "base ms": times["base"], **{name: value / times["base"] for name, value in times.items()}}


def kernel_job(tokens: int) -> list[dict[str, Any]]:
    """Time the experts of each group relative to the larger of their FLOP and byte floors on this device."""
    flops, bandwidth = ceilings()
    rows = []
    for name, (d_in, d_outs) in GROUPS.items():
        group = Group(tokens, d_in, d_outs)
        outputs = group.base()
        run = graph(
            lambda group=group, outputs=outputs: triton_group.update_(group.x, outputs, group.gates, group.weights)
        )
        found = milliseconds({"experts": run})["experts"]
        columns = RANK * len(d_outs)
        work = 2 * tokens * RANK * (d_in * len(d_outs) + sum(d_outs)) / flops * 1e3
        moved = 2 * (tokens * d_in + columns * d_in + RANK * sum(d_outs) + 2 * tokens * sum(d_outs))
        floor = max(work, moved / bandwidth * 1e3)
        rows.append({"group": name, "T": tokens, "ms": found, "floor ms": floor, "ms / floor": found / floor})
    return rows


def ceilings() -> tuple[float, float]:
    """Measure FLOP/s of a large bfloat16 product and bytes/s of a large copy."""
    side, long = (64, 1 << 10) if DRY else (8192, 1 << 29)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    big = torch.zeros(long, device=DEVICE, dtype=torch.bfloat16)
    other = torch.empty_like(big)
    times = milliseconds({"product": lambda: a @ b, "copy": lambda: other.copy_(big)}, rounds=7, repeat=3)
    return 2 * side**3 / times["product"] * 1e3, 2 * big.nbytes / times["copy"] * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no further job starts")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--dry", action="store_true", help="smoke test with small shapes on the CPU, without timings")
    args = parser.parse_args()
    if args.dry != DRY:
        raise SystemExit("This benchmark needs a CUDA device." if DRY else "--dry is for machines without CUDA.")
    if not DRY:
        print(torch.cuda.get_device_name())
    began = time.monotonic()
    prefill, long = (20, 17) if DRY else (2048, 8192)
    jobs: list[tuple[str, Callable[[], Any]]] = [
        ("Decoder layer, decoding, CUDA graph", lambda: [layer_job(1, in_graph=True)]),
        ("Decoder layer, prefill, CUDA graph", lambda: [layer_job(prefill, in_graph=True)]),
        ("Training", lambda: [training_job(prefill)]),
        ("Decoder layer, decoding, eager", lambda: [layer_job(1, in_graph=False)]),
        ("Decoder layer, decoding, batch of 16", lambda: [layer_job(16, in_graph=True)]),
        ("Decoder layer, long prefill", lambda: [layer_job(long, in_graph=True)]),
        ("Kernels, 1 token", lambda: kernel_job(1)),
        ("Kernels, 2048 tokens", lambda: kernel_job(prefill)),
    ]
    for title, job in jobs:
        if time.monotonic() - began > args.budget:
            print(f"Budget spent, skipped: {title} and all that follow")
            break
        with torch.inference_mode():
            rows = job()
        if DRY:
            print(f"{title}: ok")
        else:
            report(title, rows, args.out)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
