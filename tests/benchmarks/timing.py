"""Timing for the benchmarks: interleaved runs on one thread's CPU clock, which keeps ratios stable on a busy machine.

Variants alternate in rotating order; time taken by other processes is not counted. Results are lower quartiles over the
rounds, as ratios to the first variant of the same run.
"""

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Variants = Mapping[str, Callable[[], Any]]


def measure(variants: Variants, *, rounds: int, repeat: int = 1) -> dict[str, float]:
    """Return seconds per call of each variant: the lower quartile over the rounds."""
    names = list(variants)
    for name in names:  # warm-up: the first call allocates and fills caches
        variants[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            began = time.thread_time()
            for _ in range(repeat):
                variants[name]()
            times[name].append((time.thread_time() - began) / repeat)
    return {name: sorted(values)[len(values) // 4] for name, values in times.items()}


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return all times relative to the first."""
    base = next(iter(seconds.values()))
    return {name: value / base for name, value in seconds.items()}


def geomean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


def environment() -> dict[str, str]:
    """Return the environment of the measurement: commit, CPU, threads, versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "commit": commit.stdout.strip(),
        "cpu": model.partition(":")[2].strip() or platform.processor(),
        "threads": str(torch.get_num_threads()),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def report(title: str, rows: list[dict[str, Any]], out: Path | None, about: Mapping[str, str] | None = None) -> None:
    """Print a Markdown table and add it to a JSON file.

    Args:
        title: Of the table; it replaces one of the same title.
        rows: Cells by column.
        out: The file.
        about: What the file says about the measurement beside the environment, which is then that of the last table.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |", flush=True)
    if out is not None:
        document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"environment": environment()}
        if about is not None:
            document["environment"] = {**about, **environment()}
        document[title] = rows
        out.write_text(json.dumps(document, indent=2) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
