"""Ablations: what one part of lorary brings, everything else equal.

    python tests/benchmarks/ablations.py --row uniform --domain legal --seed 0 --data DATA --out FOLDER
    python tests/benchmarks/ablations.py --row no-kp --store STORE --data DATA --out FOLDER
    python tests/benchmarks/ablations.py --table --out FOLDER

Rows of three kinds. Each is one line of FOLDER/ablations.jsonl with the command that gives it; what is there already is
not measured again.

    shape          a bank alone (slot gate 1, no KP) of another shape with about as many parameters: held-out bits
    start          the default bank from other first values: held-out bits, and the steps until its training loss is
                   what the start from zero ends with
    composition    the domains of a stored registry (as retention.py makes one) composed in another way: nothing is
                   trained, the share of the oracle's gain and both general texts are measured

At eight layers `quarters` gives the counts of `linear`, so it has no row.
"""

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from ours import code_version
from streams import TEXT, Domain, general_columns, read_stream
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lorary.adapters.attach import attach, fixed_slots, trained_bank
from lorary.adapters.bank import ExpertBank, new_bank
from lorary.adapters.config import BankConfig
from lorary.adapters.stack import Stack
from lorary.adapters.training import TrainingConfig, train_bank
from lorary.adapters.warm_start import activation_weights, lend, seed_expert_gates
from lorary.domains.blocks import Blocks, encode, pack_blocks
from lorary.domains.evaluation import score_language
from lorary.domains.example import Example
from lorary.domains.progress import silent
from lorary.registry import Registry
from lorary.registry.compose import build_router, read_packs
from lorary.registry.composing import GENERAL
from lorary.registry.fingerprint import POCKET, find_base
from lorary.registry.learning import feature_layer
from lorary.registry.loaded_base import LoadedBase
from lorary.registry.pack import DomainPack

SHAPES: dict[str, dict[str, Any]] = {  # alpha stays, so scale times expert gate is the same for any number of experts
    "linear": {},
    "uniform": {"schedule": "uniform"},
    "data": {"schedule": "data"},
    "no-rank-gates": {"rank_gates": False},
    "one-expert": {"experts": 1.0, "rank": 8},
    "four-experts": {"experts": 4.0, "rank": 2},
    "one-expert-no-rank-gates": {"experts": 1.0, "rank": 8, "rank_gates": False},
}
STARTS = ("zero", "activations", "random", "neighbour", "stranger")
COMPOSITIONS = ("both", "tokens", "hidden", "no-kp", "static-experts", "static")
RANDOM_B = 0.02  # standard deviation of B in the row `random`
SMOOTH = 8  # steps over which a training loss is averaged


def main() -> None:
    """Measures the row that the command line asks for, or prints what was measured."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    disable_progress_bar()
    results = arguments.out / "ablations.jsonl"
    if arguments.table:
        print("\n".join(table(results)))
        return
    command = command_of(arguments)
    print(command, flush=True)
    if any(line["command"] == command for line in read_lines(results)):
        print("  measured before")
        return
    measure = measure_composition if arguments.row in COMPOSITIONS else measure_bank
    line = {"row": arguments.row, "seed": arguments.seed, "command": command, "code": code_version()}
    line |= measure(arguments)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"  {line}", flush=True)


# --- one bank alone ---


def measure_bank(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one bank over the bare base and scores it on the domain's test text."""
    base = LoadedBase(find_base(POCKET))
    found = {domain.name: domain for domain in _stream(arguments)}
    domain = found[arguments.domain]
    blocks = _blocks(domain.training_examples(), base, arguments)
    config = BankConfig(**SHAPES.get(arguments.row, {}))
    bank = _fresh(base, config, blocks, arguments.seed)
    start_bank(bank, arguments, base, found, blocks)
    model, losses = _trained(base, bank, blocks, arguments)
    return {
        "domain": domain.name,
        "bank": asdict(config),
        "parameters": bank.parameters,
        "base": _bits(base.model, base, domain.texts),
        "bits": _bits(model, base, domain.texts),
        "losses": losses,
    }


def start_bank(
    bank: ExpertBank, arguments: argparse.Namespace, base: LoadedBase, domains: dict[str, Domain], blocks: Blocks
) -> None:
    """First values of a fresh bank, whose A is random and B zero.

    `neighbour` lends what was learned on the other half of the same domain's rows, `stranger` on the next domain.
    """
    if arguments.row == "zero":
        return
    if arguments.row == "random":
        generator = torch.Generator().manual_seed(arguments.seed + 1)
        for layer in bank.layers.values():
            for matrix in layer.B.values():
                matrix.normal_(std=RANDOM_B, generator=generator)
    if arguments.row in ("neighbour", "stranger"):
        names = list(domains)
        after = dict(pairwise([*names, names[0]]))
        name = arguments.domain if arguments.row == "neighbour" else after[arguments.domain]
        examples = domains[name].training_examples()
        rows = _blocks(examples[1::2] if arguments.row == "neighbour" else examples, base, arguments, whole=True)
        lender = _fresh(base, BankConfig(), rows, arguments.seed + 100)
        seed_expert_gates(lender, base.model, rows)
        lend(trained_bank(_trained(base, lender, rows, arguments)[0]), bank)
        return
    seed_expert_gates(bank, base.model, blocks)


def _stream(arguments: argparse.Namespace) -> list[Domain]:
    return read_stream("A", arguments.data, order="forward", domains=None, max_bytes=arguments.max_bytes, questions=0)


def _blocks(
    examples: Sequence[Example], base: LoadedBase, arguments: argparse.Namespace, *, whole: bool = False
) -> Blocks:
    """Every other row, so that the rest is left for a neighbour; or all of them."""
    chosen = examples if whole else examples[::2]
    return pack_blocks([encode(example, base.tokenizer) for example in chosen], arguments.block)


def _fresh(base: LoadedBase, config: BankConfig, blocks: Blocks, seed: int) -> ExpertBank:
    first = feature_layer(config, base)
    weights = activation_weights(base.model, blocks, first_layer=first) if config.schedule == "data" else None
    generator = torch.Generator().manual_seed(seed)
    return new_bank(base.model, base.anatomy, config, generator=generator, weights=weights)


def _trained(
    base: LoadedBase, bank: ExpertBank, blocks: Blocks, arguments: argparse.Namespace
) -> tuple[PreTrainedModel, list[float]]:
    stack = Stack(names=("alone",), banks=(bank,), trainable=True)
    model = attach(base.model, stack, router=None, fixed=torch.ones(1))
    recipe = TrainingConfig(
        steps=arguments.steps, block=arguments.block, seed=arguments.seed, checkpoint_every=arguments.steps
    )
    with tempfile.TemporaryDirectory() as run:
        figures = train_bank(model, blocks, recipe, run=Path(run), stage="training", on_progress=silent)
    return model, figures["losses"]


def _bits(model: PreTrainedModel, base: LoadedBase, texts: Sequence[Example]) -> float:
    return score_language(model, base.tokenizer, texts).bits_per_byte


# --- stored banks, composed ---


def measure_composition(arguments: argparse.Namespace) -> dict[str, Any]:
    """All domains of a registry in one composition: share of the oracle's gain by domain, and general text."""
    registry = Registry.open(arguments.store)
    base = registry.base
    domains = [domain for domain in _stream(arguments) if registry.store.versions(domain.name)]
    plan = registry.plan("+".join(domain.name for domain in domains))
    packs = read_packs(registry.store, plan)
    names = tuple(slot.name for slot in plan.slots)
    shares = torch.tensor([slot.prior for slot in plan.slots])
    model = composed(arguments.row, names, packs, shares, base)
    oracle = composed("both", names, packs, shares, base)
    gains = {}
    for domain in domains:
        before = _bits(base.model, base, domain.texts)
        with fixed_slots(oracle, {domain.name: 1.0}):
            alone = _bits(oracle, base, domain.texts)
        gains[domain.name] = (before - _bits(model, base, domain.texts)) / (before - alone)
    changes = {}
    for column in general_columns(arguments.data, max_bytes=arguments.max_bytes):
        before = _bits(base.model, base, column.texts)
        changes[column.name] = _bits(model, base, column.texts) / before - 1
    return {"domain": "+".join(names), "share": gains, "general": changes}


def composed(
    row: str, names: tuple[str, ...], packs: list[DomainPack], shares: torch.Tensor, base: LoadedBase
) -> PreTrainedModel:
    """The composition of one row.

    both              as it is
    tokens, hidden    without the other term of the router's evidence
    no-kp             the KP slot is there, but changes nothing
    static-experts    routed slots; expert and rank gates are their means
    static            all gates constant, every domain alike: what soft merging folds into the weights
    """
    banks = [pack.bank for pack in packs]
    if row == "no-kp":
        generator = torch.Generator().manual_seed(0)
        banks[0] = new_bank(base.model, base.anatomy, BankConfig(), generator=generator)
    stack = Stack(names=names, banks=tuple(banks), static=row.startswith("static"))
    if row == "static":
        fixed = torch.tensor([float(name != GENERAL) for name in names])
        return attach(base.model, stack, router=None, fixed=fixed / fixed.sum())
    off = {"tokens": {"hidden": 0.0}, "hidden": {"token": 1e-9}}.get(row, {})
    routed = [replace(pack, tempers=replace(pack.tempers, **off)) for pack in packs]
    return attach(base.model, stack, router=build_router(routed, shares, width=base.anatomy.width))


# --- lines and tables ---


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was measured."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def table(path: Path) -> list[str]:
    """Markdown: banks by domain with mean and spread over seeds, then compositions."""
    lines = read_lines(path)
    shown = ["| row | domain | parameters | bits per byte | seeds | steps to the loss that `zero` ends with |"]
    shown.append("|---|---|---|---|---|---|")
    banks = [line for line in lines if "bits" in line]
    for row, domain in sorted({(line["row"], line["domain"]) for line in banks}, key=_place):
        same = [line for line in banks if (line["row"], line["domain"]) == (row, domain)]
        bits = [line["bits"] for line in same]
        spread = f" ± {stdev(bits):.4f}" if len(bits) > 1 else ""
        steps = _mean_steps(same, banks) if row in STARTS else ""
        shown.append(
            f"| {row} | {domain} | {same[0]['parameters']:,} | {fmean(bits):.4f}{spread} | {len(bits)} | {steps} |"
        )
    shown += ["", "| composition | share of the oracle's gain | general text |", "|---|---|---|"]
    for line in (line for line in lines if "share" in line):
        gains = " ".join(f"{name} {value:.3f}" for name, value in line["share"].items())
        changes = " ".join(f"{name} {value:+.2%}" for name, value in line["general"].items())
        shown.append(f"| {line['row']} | {gains} | {changes} |")
    return shown


def _place(pair: tuple[str, str]) -> tuple[str, int]:
    return pair[1], [*SHAPES, *STARTS].index(pair[0])


def _mean_steps(same: list[dict[str, Any]], banks: list[dict[str, Any]]) -> str:
    """Steps until the smoothed training loss is where the start from zero ends, with the same domain and seed."""
    found = []
    for line in same:
        zero = [b for b in banks if b["row"] == "zero" and b["domain"] == line["domain"] and b["seed"] == line["seed"]]
        if zero:
            goal = smoothed(zero[0]["losses"])[-1]
            reached = [i + 1 for i, loss in enumerate(smoothed(line["losses"])) if loss <= goal]
            found.append(reached[0] if reached else None)
    if not found or None in found:
        return f"not in all of {len(found)}" if found else ""
    return f"{fmean(found):.0f}"


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means over the last `SMOOTH` steps, or over as many as there were."""
    return [fmean(losses[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(losses))]


def command_of(arguments: argparse.Namespace) -> str:
    """The command that gives this one row."""
    given: dict[str, Any] = {"row": arguments.row}
    if arguments.row in COMPOSITIONS:
        given["store"] = arguments.store
    else:
        given |= {
            "domain": arguments.domain,
            "seed": arguments.seed,
            "steps": arguments.steps,
            "block": arguments.block,
        }
    given |= {"data": arguments.data, "out": arguments.out, "max-bytes": arguments.max_bytes}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", "tests/benchmarks/ablations.py", *words])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=[*SHAPES, *STARTS, *COMPOSITIONS])
    parser.add_argument("--domain", choices=TEXT, default="legal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--block", type=int, default=256, help="tokens; a step has 8 blocks")
    parser.add_argument("--store", type=Path, help="of a registry with domains of stream A, for compositions")
    parser.add_argument("--data", type=Path, help="folder with medicine/lm.train.jsonl and so on")
    parser.add_argument("--out", type=Path, required=True, help="folder of ablations.jsonl")
    parser.add_argument("--max-bytes", type=int, default=40_000, help="of held-out text of a domain")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    arguments = parser.parse_args()
    needs_store = arguments.row in COMPOSITIONS
    if not arguments.table and (not arguments.row or not arguments.data or (needs_store and not arguments.store)):
        parser.error("a row and --data are needed to measure, and --store for a composition")
    return arguments


if __name__ == "__main__":
    main()
