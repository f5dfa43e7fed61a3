"""Retention benchmark: scores of every domain after others were learned, by method.

    python tests/benchmarks/retention.py --stream A --method ours separate sequential --data DATA --out FOLDER
    python tests/benchmarks/retention.py --table --out FOLDER --plot docs/retention.svg

Each stream, method, order and seed gives one file FOLDER/results/*.json. Everything trained and scored is stored in
FOLDER, so that an interrupted run resumes and nothing is measured twice: after a change of the router only the scores
of lorary are computed again. docs/benchmarks.md explains the figures.
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from baselines import METHODS
from method import Bench, Step
from ours import code_version, ours
from scores import ScoreBook
from streams import STREAMS, Domain, general_columns, read_stream
from tables import write_tables
from transformers.utils.logging import disable_progress_bar

from lorary.adapters.config import TrainingConfig
from lorary.domains.progress import Progress
from lorary.registry.base.find import POCKET, find_base
from lorary.registry.base.load import LoadedBase

RECIPES = {"A": (50, 256), "B": (100, 64), "C": (50, 256)}  # optimizer steps per domain, tokens per block


def main() -> None:
    """Run the requested methods, or print the tables."""
    arguments = parse_arguments()
    if arguments.table:
        for line in write_tables(arguments.out, arguments.plot):
            print(line)
        return
    disable_progress_bar()
    base = LoadedBase(find_base(POCKET))
    domains = read_stream(
        arguments.stream,
        arguments.data,
        order=arguments.order,
        domains=arguments.domains,
        max_bytes=arguments.max_bytes,
        questions=arguments.questions,
    )
    steps, block = RECIPES[arguments.stream]
    recipe = TrainingConfig(
        steps=arguments.steps or steps,
        block=arguments.block or block,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
    ).for_width(base.layout.width)
    bench = Bench(
        base=base,
        domains=domains,
        recipe=recipe,
        out=arguments.out,
        general=arguments.general,
        on_progress=report,
        encoder=arguments.encoder,
    )
    book = ScoreBook(arguments.out / "scores.jsonl", base.tokenizer)
    columns = [*general_columns(arguments.data, max_bytes=arguments.max_bytes), *domains]
    methods = METHODS | {"ours": partial(ours, book=book)}
    for method in arguments.method:
        command = command_of(arguments, method)
        print(command, flush=True)
        result = measure(methods[method](bench), bench, book, columns, sparse=arguments.sparse)
        head = {"stream": arguments.stream, "method": method, "order": arguments.order, "seed": arguments.seed}
        write_result(arguments.out, head | {"command": command, "recipe": asdict(recipe)} | result)


def measure(
    steps: Iterator[Step], bench: Bench, book: ScoreBook, columns: list[Domain], *, sparse: bool
) -> dict[str, Any]:
    """Score every column after every step; accuracy only for the domain just added and after the last step.

    Args:
        sparse: Skip older domains before the last step, which neither averages nor backward transfer need.
    """
    rows = [{c.name: book.cell(bench.base_scored, c, with_questions=True) for c in columns}]
    done = []
    for step in steps:
        is_last = step.name == bench.domains[-1].name
        row = {
            c.name: book.cell(step.model_for(c.name), c, with_questions=is_last or c.name == step.name)
            for c in columns
            if is_last or c.name == step.name or not sparse
        }
        rows.append(row)
        done.append(step)
        print(f"  after {step.name}: " + ", ".join(f"{n} {cell['bits']:.4f}" for n, cell in row.items()), flush=True)
    return {
        "domains": [domain.name for domain in bench.domains],
        "steps": ["base", *(step.name for step in done)],
        "rows": rows,
        "parameters": [step.trained_parameters for step in done],
        "training_steps": [step.steps for step in done],
        "seconds": [step.seconds for step in done],
        "notes": {step.name: step.notes for step in done if step.notes},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"python": platform.python_version(), "commit": code_version()},
    }


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Write the file of a stream, method, order, seed and learning rate; later recipes overwrite earlier ones."""
    name = "-".join(str(result[key]) for key in ("stream", "method", "order", "seed"))
    name += f"-{result['recipe']['learning_rate']:.3g}"
    path = out / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def command_of(arguments: argparse.Namespace, method: str) -> str:
    """Return the command that reproduces one row."""
    given = {
        "stream": arguments.stream,
        "method": method,
        "order": arguments.order,
        "seed": arguments.seed,
        "data": arguments.data,
        "out": arguments.out,
        "general": arguments.general,
        "steps": arguments.steps,
        "block": arguments.block,
        "learning-rate": arguments.learning_rate,
        "domains": arguments.domains,
        "max-bytes": arguments.max_bytes,
        "questions": arguments.questions,
        "encoder": arguments.encoder,
    }
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    words += ["--sparse"] if arguments.sparse else []
    return shlex.join(["python", "tests/benchmarks/retention.py", *words])


def report(progress: Progress) -> None:
    """Show progress on the terminal, one line per stage."""
    if sys.stderr.isatty():
        print(f"\r{progress.stage} {progress.done}/{progress.total}\033[K", end="", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", choices=STREAMS, default="A")
    parser.add_argument("--method", choices=["ours", *METHODS], nargs="+", default=["ours"])
    parser.add_argument("--order", choices=["forward", "reverse"], default="forward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder with medicine/lm.train.jsonl etc.")
    parser.add_argument("--out", type=Path, required=True, help="folder of adapters, scores and results")
    parser.add_argument("--general", type=Path, help="training text of lorary's KP bank; default: the bundled corpus")
    parser.add_argument("--steps", type=int, help="optimizer steps per domain")
    parser.add_argument("--block", type=int, help="tokens per block; a step has 8 blocks")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--domains", type=int, help="number of domains, from the start of the stream")
    parser.add_argument("--max-bytes", type=int, default=40_000, help="bytes of held-out text per domain")
    parser.add_argument("--questions", type=int, default=100, help="questions per domain, for accuracy")
    parser.add_argument("--encoder", type=Path, help="folder of LORAUTER's sentence encoder; default: the base")
    parser.add_argument("--sparse", action="store_true", help="score older domains after the last step only")
    parser.add_argument("--table", action="store_true", help="print tables of all results")
    parser.add_argument("--plot", type=Path, help="with --table: also draw this SVG file")
    arguments = parser.parse_args()
    if not arguments.table and arguments.data is None:
        parser.error("--data is required to measure")
    return arguments


if __name__ == "__main__":
    main()
