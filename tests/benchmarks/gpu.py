"""The fused layer on one GPU, at the shapes of Llama-3-8B in bfloat16 with a stacked rank of 128.

    python tests/benchmarks/gpu.py [--budget 480] [--out gpu.json]

Written for an H100 or H200, and not run on one yet. Jobs run in the order of what matters most and stop when the budget
of seconds is spent; the JSON is written after each. Every variant is checked against the reference before it is timed.
Decoding and prefill are timed as CUDA graphs over several layers' weights, so that weights come from memory and not
from the cache; eager figures stand beside. Columns are ratios to the bare linears in the same job.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import report
from torch import Tensor

from lorary.adapters.kernels import eager, reference, triton_group
from lorary.adapters.kernels.group import GroupWeights

WIDTH, KEYS, INNER = 4096, 1024, 14336
RANK = 128
GROUPS = {
    "q, k, v": (WIDTH, (WIDTH, KEYS, KEYS)),
    "o": (WIDTH, (WIDTH,)),
    "gate, up": (WIDTH, (INNER, INNER)),
    "down": (INNER, (WIDTH,)),
}
LAYERS = 4  # copies of the weights in one graph
TOLERANCE = 2e-2


class Group:
    """Weights of one group in one decoder layer, and inputs for it."""

    def __init__(self, tokens: int, d_in: int, d_outs: tuple[int, ...]):
        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", dtype=torch.bfloat16) * size[-1] ** -0.5

        self.x = torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16)
        self.W = [normal(size, d_in) for size in d_outs]
        self.gates = torch.rand(tokens, RANK, device="cuda")
        self.weights = GroupWeights(A=normal(RANK * len(d_outs), d_in), Bt=tuple(normal(RANK, size) for size in d_outs))

    def base(self) -> list[Tensor]:
        return [self.x @ weight.t() for weight in self.W]

    def composed(self, kernels: Any) -> list[Tensor]:
        outputs = self.base()
        kernels.update_(self.x, outputs, self.gates, self.weights)
        return outputs

    def peft(self) -> list[Tensor]:
        """As PEFT adds 8 active adapters of rank 16, one after the other; without gates."""
        found = []
        for place, output in enumerate(self.base()):
            own = self.weights.A[place * RANK : (place + 1) * RANK]
            for A, Bt in zip(own.split(RANK // 8), self.weights.Bt[place].split(RANK // 8), strict=True):
                output = output + (self.x @ A.t()) @ Bt * 1.0
            found.append(output)
        return found

    def check(self, kernels: Any) -> None:
        for found, expected in zip(self.composed(kernels), self.composed(reference), strict=True):
            error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
            if not error <= TOLERANCE:
                raise AssertionError(f"{kernels.__name__} is off by {float(error):.3g}")

    def train(self, kernels: Any | None) -> None:
        """Forward, gradient of x, and with kernels the experts' part of both, 16 of the ranks trainable."""
        outputs = self.base()
        low = None
        if kernels is not None:
            low = kernels.update_(self.x, outputs, self.gates, self.weights, keep=True)
        grad_x = sum((output @ weight for output, weight in zip(outputs, self.W, strict=True)), self.x.new_zeros(()))
        if kernels is not None:
            kernels.gradients_(
                outputs, self.x, low, self.gates, self.weights,
                trainable=[16] * len(outputs), grad_x=grad_x, wants_gates=True,
            )  # fmt: skip


def graph(run: Callable[[], Any]) -> Callable[[], None]:
    """The run as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def milliseconds(variants: dict[str, Callable[[], Any]], *, rounds: int = 15, repeat: int = 5) -> dict[str, float]:
    """Medians of interleaved rounds, by the device's own clock."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for run in variants.values():
        run()
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
    """All four groups of a decoder layer, several layers after one another."""
    groups = [Group(tokens, d_in, d_outs) for _ in range(LAYERS) for d_in, d_outs in GROUPS.values()]
    for kernels in (triton_group, eager):
        for group in groups[: len(GROUPS)]:
            group.check(kernels)
    variants: dict[str, Callable[[], Any]] = {
        "base": lambda: [group.base() for group in groups],
        "triton": lambda: [group.composed(triton_group) for group in groups],
        "torch": lambda: [group.composed(eager) for group in groups],
        "PEFT": lambda: [group.peft() for group in groups],
    }
    times = milliseconds({name: graph(run) if in_graph else run for name, run in variants.items()})
    floor = 1 + sum((d_in * len(o) + sum(o)) * RANK for d_in, o in GROUPS.values()) / sum(
        d_in * sum(o) for d_in, o in GROUPS.values()
    )
    row = {"T": tokens, "graph": in_graph, "floor": floor, "base ms": times["base"] / LAYERS}
    return row | {name: value / times["base"] for name, value in times.items()}


def training_job(tokens: int) -> dict[str, Any]:
    """Forward and backward of all linears of one decoder layer."""
    groups = [Group(tokens, d_in, d_outs) for d_in, d_outs in GROUPS.values()]
    variants = {
        name: (lambda kernels=kernels: [group.train(kernels) for group in groups])
        for name, kernels in (("base", None), ("triton", triton_group), ("torch", eager))
    }
    times = milliseconds(variants, rounds=9, repeat=2)
    return {"T": tokens, "base ms": times["base"], **{name: value / times["base"] for name, value in times.items()}}


def kernel_job(tokens: int) -> list[dict[str, Any]]:
    """Each group's experts alone, over the larger of their FLOP floor and byte floor as the device was measured."""
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
        rows.append({"group": name, "T": tokens, "ms": found, "floor ms": floor, "over floor": found / floor})
    return rows


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large bfloat16 product and bytes/s of a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(1 << 29, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(big)
    times = milliseconds({"product": lambda: a @ b, "copy": lambda: other.copy_(big)}, rounds=7, repeat=3)
    return 2 * 8192**3 / times["product"] * 1e3, 2 * big.nbytes / times["copy"] * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no further job begins")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")
    print(torch.cuda.get_device_name())
    began = time.monotonic()
    jobs: list[tuple[str, Callable[[], Any]]] = [
        ("Decoder layer, decoding in a graph", lambda: [layer_job(1, in_graph=True)]),
        ("Decoder layer, prefill in a graph", lambda: [layer_job(2048, in_graph=True)]),
        ("Training", lambda: [training_job(2048)]),
        ("Decoder layer, decoding eagerly", lambda: [layer_job(1, in_graph=False)]),
        ("Decoder layer, a batch of 16", lambda: [layer_job(16, in_graph=True)]),
        ("Decoder layer, long prefill", lambda: [layer_job(8192, in_graph=True)]),
        ("Kernels at one token", lambda: kernel_job(1)),
        ("Kernels at 2048 tokens", lambda: kernel_job(2048)),
    ]
    for title, job in jobs:
        if time.monotonic() - began > args.budget:
            print(f"The budget is spent before: {title}")
            break
        with torch.inference_mode():
            report(title, job(), args.out)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
