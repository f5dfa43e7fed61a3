"""Ablations: the effect of one part of lorary, everything else equal.

    python tests/benchmarks/ablations.py --row uniform --domain legal --seed 0 --data DATA --out FOLDER
    python tests/benchmarks/ablations.py --row token+pair --store STORE --data DATA --out FOLDER
    python tests/benchmarks/ablations.py --table --out FOLDER

There are rows of three kinds, and one call can measure several. Each becomes a line of FOLDER/ablations.jsonl with the
command that reproduces it; rows that are already there are skipped.

    shape          a single bank of another shape with about as many parameters: held-out bits (bank_rows.py)
    start          the default bank with another initialization: held-out bits, and the steps until its training loss
                   reaches the final one of the start from zero
    composition    the domains of a stored registry composed in another way (composition_rows.py): the share of the
                   oracle's gain, correct answers and both general texts; no training

STORE is a registry made by `registry init` and `registry add-domain`, with domains named as in streams.py.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bank_rows import SHAPES, STARTS, measure_bank
from composition_rows import COMPOSITIONS, measure_composition
from ours import code_version
from streams import STREAMS
from transformers.utils.logging import disable_progress_bar

SMOOTHING = 8  # steps over which training losses are averaged

Line = dict[str, Any]


def main() -> None:
    """Measure the requested rows, or print the table of all measured rows."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    disable_progress_bar()
    results = arguments.out / "ablations.jsonl"
    if arguments.table:
        print("\n".join(table(read_lines(results))))
        return
    for row in arguments.row:
        command = command_of(arguments, row)
        print(command, flush=True)
        if any(line["command"] == command for line in read_lines(results)):
            print("  already measured")
            continue
        measure = measure_composition if row in COMPOSITIONS else measure_bank
        line = {"row": row, "stream": arguments.stream, "command": command, "code": code_version()}
        line |= {} if row in COMPOSITIONS else {"seed": arguments.seed}
        line |= measure(arguments, row)
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"  {line}", flush=True)


def read_lines(path: Path) -> list[Line]:
    """Return the measured rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def table(lines: list[Line]) -> list[str]:
    """Return Markdown tables: banks by domain, with bits in the order of the seeds; then compositions by stream."""
    seeded = sorted((line for line in lines if "bits" in line), key=lambda line: line["seed"])
    banks: dict[tuple[str, str], list[Line]] = {}
    for line in sorted(seeded, key=_place):
        banks.setdefault((line["domain"], line["row"]), []).append(line)
    lines_out = [
        "| domain | row | experts by layer | parameters | bits per byte by seed | mean | steps to final loss of zero |",
        "|---|---|---|---|---|---|---|",
    ]
    for (domain, row), same in banks.items():
        bits = [line["bits"] for line in same]
        source = (
            f" ({same[0]['lender']}, {fmean(line['similarity'] for line in same):.2f})" if "lender" in same[0] else ""
        )
        cells = [domain, row + source, " ".join(map(str, same[0]["counts"])), f"{same[0]['parameters']:,}"]
        cells += [" ".join(f"{value:.4f}" for value in bits), f"{fmean(bits):.4f}", _steps(same, banks)]
        lines_out.append(f"| {' | '.join(cells)} |")
    composed = sorted((line for line in lines if "share" in line), key=_place)
    lines_out += ["", "| stream | composition | share of the oracle's gain | mean | correct | general | bundled |"]
    lines_out += ["|---|---|---|---|---|---|---|"]
    for line in composed:
        cells = [line["stream"], line["row"], " ".join(f"{value:.3f}" for value in line["share"].values())]
        cells += [f"{fmean(line['share'].values()):.3f}", _correct(line)]
        cells += [f"{value:+.2%}" for value in line["general"].values()]
        lines_out.append(f"| {' | '.join(cells)} |")
    return lines_out


def _place(line: Line) -> tuple[str, str, int]:
    return line["stream"], line.get("domain", ""), [*SHAPES, *STARTS, *COMPOSITIONS].index(line["row"])


def _correct(line: Line) -> str:
    """Return the correct answers of the composition and of the own experts, summed over domains."""
    pairs = line["right"].values()
    return f"{sum(here for here, _ in pairs)} of {sum(known for _, known in pairs)}" if pairs else ""


def _steps(same: list[Line], banks: dict[tuple[str, str], list[Line]]) -> str:
    """Return the steps until the smoothed loss reaches the final one of `zero`, same domain and seed; `-`: never."""
    goals = {line["seed"]: smoothed(line["losses"])[-1] for line in banks.get((same[0]["domain"], "zero"), [])}
    if same[0]["row"] not in (*STARTS, "linear"):
        return ""
    found = []
    for line in same:
        reached = (i + 1 for i, loss in enumerate(smoothed(line["losses"])) if loss <= goals.get(line["seed"], 0.0))
        found.append(str(next(reached, "-")))
    return " ".join(found)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the running means over the last `SMOOTHING` steps."""
    return [fmean(losses[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(losses))]


def command_of(arguments: argparse.Namespace, row: str) -> str:
    """Return the command that reproduces one row."""
    own = ("store", "questions") if row in COMPOSITIONS else ("domain", "seed", "steps", "block")
    words = ["python", "tests/benchmarks/ablations.py", "--row", row]
    for name in ("stream", *own, "data", "out", "max_bytes"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return shlex.join(words)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=[*SHAPES, *STARTS, *COMPOSITIONS], nargs="+", metavar="ROW")
    parser.add_argument("--stream", choices=STREAMS, default="A")
    parser.add_argument("--domain", default="legal", help="domain of the stream, for rows of a single bank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--block", type=int, default=256, help="tokens; a step has 8 blocks")
    parser.add_argument("--store", type=Path, help="registry with domains of the stream, for rows of compositions")
    parser.add_argument("--questions", type=int, default=40, help="questions per domain, for rows of compositions")
    parser.add_argument("--data", type=Path, help="folder with medicine/lm.train.jsonl etc.")
    parser.add_argument("--out", type=Path, required=True, help="folder of ablations.jsonl")
    parser.add_argument("--max-bytes", type=int, default=40_000, help="bytes of held-out text per domain")
    parser.add_argument("--table", action="store_true", help="print the table of measured rows")
    arguments = parser.parse_args()
    if arguments.table:
        return arguments
    if not arguments.row or not arguments.data:
        parser.error("--row and --data are required to measure")
    is_composition = [row in COMPOSITIONS for row in arguments.row]
    if any(is_composition) and not arguments.store:
        parser.error("rows of compositions need --store")
    if not all(is_composition) and arguments.domain not in STREAMS[arguments.stream]:
        parser.error(f"stream {arguments.stream} has no domain {arguments.domain}, choose one with --domain")
    return arguments


if __name__ == "__main__":
    main()
