"""How the benchmarks measure: interleaved on one thread's CPU clock, so that a busy machine moves ratios least.

Variants take turns in rotating order; time that other processes take from the thread is not counted. What is reported
is the lower quartile over the rounds, as a ratio to the first variant of the same run.
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
    """Seconds of one call of each variant: lower quartile over the rounds."""
    names = list(variants)
    for name in names:  # the first call allocates, plans and fills caches
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
    """The same relative to the first."""
    base = next(iter(seconds.values()))
    return {name: value / base for name, value in seconds.items()}


def geomean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


def environment() -> dict[str, str]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "commit": commit.stdout.strip(),
        "cpu": model.partition(":")[2].strip() or platform.processor(),
        "threads": str(torch.get_num_threads()),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def report(title: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Prints a Markdown table, and writes the same as JSON."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |", flush=True)
    if out is not None:
        document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"environment": environment()}
        document[title] = rows
        out.write_text(json.dumps(document, indent=2) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
