"""Speed of one linear with E experts of rank 8, and of a decoder layer's seven with gates, against the bare modules.

    OMP_NUM_THREADS=1 python tests/benchmarks/layer.py [--quick] [--out layer.json]

Columns: d is the width, T the tokens; the others are ratios to the bare modules in the same run. `floor` is the ratio
of multiply-adds (for one token: of weight bytes) with and without experts; the gates are part of the time but not of
the floor. For the single linear the gates are given, for the seven they are computed. PEFT has E active adapters and no
gates.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from timing import geomean, measure, ratios, report
from torch import Tensor, nn

from lorary.adapters.bank import Expert, LayerExperts
from lorary.adapters.layer.forward_state import ForwardState, OpenGates, run_with
from lorary.adapters.layer.stack import _Slice, build_gates, build_group, same_input_groups, stack_gates, stack_group
from lorary.adapters.layer.stacked import StackedLayer

torch.set_num_threads(1)
RANK = 8
REPEATS = {1: 100, 64: 20, 512: 3}


def shapes_of(width: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of a Llama layer's linears, with a third of the heads for keys and values."""
    inner, keys = 8 * width // 3 // 64 * 64, width // 3 // 64 * 64
    attention = {"q_proj": (width, width), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (width, width)}
    return attention | {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}


class Layer:
    """Bare modules and their fused counterparts."""

    def __init__(self, shapes: dict[str, tuple[int, int]], experts: int, width: int):
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator) * size[-1] ** -0.5

        slots = max(1, experts // 2)
        slices = []
        for slot in range(slots):
            mine = [Expert(id=f"e{i}", rank=RANK, alpha=2.0 * RANK) for i in range(experts // slots)]
            rank = RANK * len(mine)
            bank = LayerExperts(
                experts=tuple(mine),
                A={name: normal(rank, d_in) for name, (d_in, _) in shapes.items()},
                B={name: normal(d_out, rank) for name, (_, d_out) in shapes.items()},
                expert_gate=normal(len(mine), width),
                rank_gate=normal(rank, width),
            )
            slices.append(_Slice(slot=slot, experts=bank, is_new=False))
        widths = {name: d_in for name, (d_in, _) in shapes.items()}
        groups = tuple(stack_group(names, slices, torch.float32) for names in same_input_groups(widths))
        stacked = StackedLayer(groups=groups, slot_of_rank=(), gates=stack_gates(slices, static=False))
        self.state, self.gates = ForwardState(None), build_gates(stacked)
        self.slot_gate = torch.full((1, slots), 1 / slots)
        self.base = {
            name: nn.Linear(d_in, d_out, bias=False).requires_grad_(False) for name, (d_in, d_out) in shapes.items()
        }
        self.fused: dict[str, Any] = {}
        self.kept = []  # modules know their group, nothing else holds it
        for group in groups:
            made, modules = build_group(self.base, stacked, group, self.gates)
            self.kept.append(made)
            self.fused |= modules

    def compute_gates(self, hidden: Tensor) -> None:
        flat = hidden.view(-1, hidden.shape[-1])
        gates = self.gates(flat, self.slot_gate.expand(len(flat), -1))
        self.state.gates[self.gates] = (OpenGates(0, len(flat), True, None, gates),)


def peft_linear(width: int, experts: int) -> nn.Module:
    config = LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), config, adapter_name="e0")  # type: ignore
    for index in range(1, experts):
        model.add_adapter(f"e{index}", config)
    model.base_model.set_adapter([f"e{index}" for index in range(experts)])
    return model.eval().base_model.model[0]


def inference(run: Callable[[], Any]) -> Callable[[], Any]:
    @torch.inference_mode()
    def wrapped() -> Any:
        return run()

    return wrapped


def bench_linear(width: int, tokens: int, experts: int, args: argparse.Namespace) -> dict[str, Any]:
    layer = Layer({"o_proj": (width, width)}, experts, width)
    x = torch.randn(1, tokens, width)
    with torch.inference_mode():
        layer.compute_gates(x)
    variants = {
        "base": lambda: layer.base["o_proj"](x),
        "ours": lambda: run_with(layer.state, layer.fused["o_proj"], x),
    }
    if not args.quick:
        peft = peft_linear(width, experts)
        variants["PEFT"] = lambda: peft(x)
    times = timed(variants, tokens, args)
    return {"d": width, "T": tokens, "E": experts, "floor": 1 + 2 * experts * RANK / width, **ratios(times)}


def bench_layer(width: int, tokens: int, experts: int, args: argparse.Namespace) -> dict[str, Any]:
    shapes = shapes_of(width)
    layer = Layer(shapes, experts, width)
    inputs = {d_in: torch.randn(1, tokens, d_in) for d_in, _ in shapes.values()}
    # q, k and v read one tensor, o another, gate and up a third
    read = {name: inputs[d_in] if name in ("q_proj", "down_proj") else None for name, (d_in, _) in shapes.items()}
    read["k_proj"] = read["v_proj"] = read["q_proj"]
    read["o_proj"], read["gate_proj"] = torch.randn(1, tokens, width), torch.randn(1, tokens, width)
    read["up_proj"] = read["gate_proj"]
    hidden = torch.randn(1, tokens, width)

    def ours() -> None:
        layer.compute_gates(hidden)
        for name, module in layer.fused.items():
            module(read[name])

    def base() -> None:
        for name, module in layer.base.items():
            module(read[name])

    times = timed({"base": base, "ours": lambda: run_with(layer.state, ours)}, tokens, args)
    macs = sum(d_in * d_out for d_in, d_out in shapes.values())
    floor = 1 + experts * RANK * sum(map(sum, shapes.values())) / macs
    return {"d": width, "T": tokens, "E": experts, "floor": floor, **ratios(times)}


def timed(variants: dict[str, Callable[[], Any]], tokens: int, args: argparse.Namespace) -> dict[str, float]:
    repeat = max(1, REPEATS[tokens] // args.divide)
    return measure({name: inference(run) for name, run in variants.items()}, rounds=args.rounds, repeat=repeat)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return geometric means of ratio / floor over E, and over d from 1024 on."""
    found = []
    for tokens in sorted({row["T"] for row in rows}):
        for name, fits in (("d = 576", lambda d: d < 1024), ("d >= 1024", lambda d: d >= 1024)):
            chosen = [row for row in rows if row["T"] == tokens and fits(row["d"])]
            if chosen:
                line = {"T": tokens, "width": name, "ours / floor": geomean([r["ours"] / r["floor"] for r in chosen])}
                if "PEFT" in chosen[0]:
                    line["PEFT / ours"] = geomean([r["PEFT"] / r["ours"] for r in chosen])
                found.append(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="without PEFT")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--divide", type=int, default=1, help="divisor of the calls per round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = [(d, t, e) for d in (576, 1024, 2048) for t in REPEATS for e in (2, 4, 8, 16, 32)]
    for title, bench in (("One linear, gates given", bench_linear), ("Seven linears with their gates", bench_layer)):
        rows = [bench(*case, args) for case in cases]
        report(title, rows, args.out)
        report(f"{title}: ratio / floor", summary(rows), args.out)


if __name__ == "__main__":
    main()
