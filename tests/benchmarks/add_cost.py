"""Cost of adding the n-th domain, n = 2 to 10, relative to the second: seconds and peak memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/add_cost.py [--base FOLDER] [--steps 5] [--domains 10] [--repeat 3]

Each domain is added in a separate process, as a command does, so that its peak memory can be measured. Texts are rows
of random words that differ between domains: what is learned is irrelevant here, and with few training steps the cost of
stored domains is visible. CPU seconds exclude other processes. The table has the minimum over `--repeat` streams for
each step.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ADD = """
import json, resource, sys, time
from lorary.adapters.config import TrainingConfig
from lorary.registry import Registry

store, name, data, steps = sys.argv[1:]
registry = Registry.open(store)
registry.base.model  # load it before timing
began, wall = time.process_time(), time.monotonic()
registry.add_domain(name, data=[data], training=TrainingConfig(steps=int(steps)))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"cpu_s": time.process_time() - began, "wall_s": time.monotonic() - wall, "peak": peak}))
"""
INIT = """
import sys
from lorary.adapters.config import TrainingConfig
from lorary.registry import Registry

Registry.init(sys.argv[1], base=sys.argv[2], training=TrainingConfig(steps=int(sys.argv[3])))
"""


def write_rows(path: Path, *, seed: int) -> Path:
    """Write about 60 kB of random words, different for each seed."""
    chooser = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chooser.choices(letters, k=chooser.randint(3, 9))) for _ in range(300)]
    rows = ({"text": " ".join(chooser.choices(words, k=60))} for _ in range(160))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(program: str, *words: object) -> str:
    """Run a program and return its output."""
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def stream(folder: Path, base: str, *, steps: int, domains: int) -> list[dict[str, float]]:
    """Return the cost of each addition to a new registry."""
    store = folder / "store"
    run(INIT, store, base, steps)
    costs = []
    for n in range(1, domains + 1):
        data = write_rows(folder / f"{n}.jsonl", seed=n)
        costs.append(json.loads(run(ADD, store, f"domain-{n}", data, steps)))
        print(f"domain {n}: {costs[-1]}", file=sys.stderr, flush=True)
    return costs


def main() -> None:
    """Print a table of the minimum cost of each step and its ratio to the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--domains", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    chosen = parser.parse_args()
    streams = []
    for _ in range(chosen.repeat):
        with tempfile.TemporaryDirectory() as folder:
            streams.append(stream(Path(folder), chosen.base, steps=chosen.steps, domains=chosen.domains))
    minima = [{key: min(costs[i][key] for costs in streams) for key in streams[0][0]} for i in range(chosen.domains)]
    print("| n | CPU s | ratio | wall s | ratio | peak MB | ratio |\n|---|---|---|---|---|---|---|")
    for n, cost in enumerate(minima, start=1):
        cells = [f"{cost[key] / (1e6 if key == 'peak' else 1):.2f} | {cost[key] / minima[1][key]:.3f}" for key in cost]
        print(f"| {n} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
