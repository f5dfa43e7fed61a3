"""The benchmark's results as Markdown tables and as one plot."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from streams import GENERAL_COLUMNS

ORDER = ("separate", "joint", "ours", "replay", "olora", "sequential", "xlora", "arrow")
HEAD = ("method", "average", "share of gain", "least share", "backward transfer", "general text", "trained", "steps")

Result = dict[str, Any]


class Run:
    """One method's result in one metric; `gain` turns both metrics so that more is better."""

    def __init__(self, result: Result, metric: str):
        self.result = result
        self.metric = metric
        self.domains: list[str] = [d for d in result["domains"] if metric in result["rows"][0][d]]

    @property
    def method(self) -> str:
        return self.result["method"]

    def value(self, domain: str, step: int = -1) -> float:
        """The score on a domain after a step; nan where it was not measured."""
        return self.result["rows"][step][domain].get(self.metric, math.nan)

    def gain(self, domain: str, step: int = -1) -> float:
        """By how much the score is better than the bare base's."""
        difference = self.value(domain, step) - self.value(domain, 0)
        return difference if self.metric == "accuracy" else -difference

    @property
    def average(self) -> float:
        return fmean(self.value(domain) for domain in self.domains)

    def shares(self, oracle: "Run") -> list[float]:
        """What of the oracle's gain is there after the last step, by domain; nan where it has none."""
        return [share(self.gain(domain), oracle.gain(domain)) for domain in self.domains]

    def backward_transfer(self) -> float:
        """Mean over all domains but the last of the gain after the last step less that when it was learned."""
        steps = self.result["steps"]
        earlier = [domain for domain in self.domains if domain in steps[:-1]]
        if not earlier:
            return math.nan
        return fmean(self.gain(domain) - self.gain(domain, steps.index(domain)) for domain in earlier)

    def general_change(self) -> float:
        """Change of bits per byte on general text, as a share of the base's; positive is worse."""
        first, last = self.result["rows"][0], self.result["rows"][-1]
        return fmean(last[column]["bits"] / first[column]["bits"] - 1 for column in GENERAL_COLUMNS)


def share(gain: float, whole: float) -> float:
    """The part of a gain that is there; nan if there was none to have."""
    return gain / whole if whole > 0 else math.nan


def write_tables(out: Path, plot: Path | None) -> Iterator[str]:
    """The lines of all tables; the plot is written on the way."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "results").glob("*.json"))]
    groups: dict[tuple, dict[str, Result]] = {}
    for result in results:
        key = (result["stream"], result["order"], result["seed"])
        groups.setdefault(key, {})[result["method"]] = result
    for (stream, order, seed), group in groups.items():
        yield f"### Stream {stream}, {order} order, seed {seed}"
        yield from _group_tables(group)
    if plot is not None:
        plot.write_text(draw(groups), encoding="utf-8")


def _group_tables(group: dict[str, Result]) -> Iterator[str]:
    first = next(iter(group.values()))
    recipe = first["recipe"]
    yield ""
    yield (
        f"{recipe['steps']} steps a domain of {recipe['batch']} x {recipe['block']} tokens, rate "
        f"{recipe['learning_rate']:.4g}; domains: {', '.join(first['domains'])}."
    )
    for metric in ("bits", "accuracy"):
        runs = [Run(group[method], metric) for method in ORDER if method in group]
        if "separate" in group and runs[0].domains:
            yield from _method_table(runs, Run(group["separate"], metric), metric)
            yield from _domain_table(runs, metric)
    if "ours" in group:
        yield from _own_table(group["ours"])


def _method_table(runs: list[Run], oracle: Run, metric: str) -> Iterator[str]:
    yield ""
    yield from _header("bits per byte" if metric == "bits" else metric, HEAD[1:])
    for run in runs:
        shares = run.shares(oracle)
        yield _line(
            run.method,
            f"{run.average:.4f}",
            f"{fmean(shares):.3f}",
            f"{min(shares):.3f}",
            _signed(run.backward_transfer()),
            f"{100 * run.general_change():+.2f} %",
            f"{sum(run.result['parameters']):,}",
            str(sum(run.result["training_steps"])),
        )


def _domain_table(runs: list[Run], metric: str) -> Iterator[str]:
    yield ""
    yield from _header("after the last step", runs[0].domains)
    yield _line("base", *(f"{runs[0].value(domain, 0):.4f}" for domain in runs[0].domains))
    for run in runs:
        yield _line(run.method, *(f"{run.value(domain):.4f}" for domain in runs[0].domains))


def _own_table(result: Result) -> Iterator[str]:
    """lorary's figures by domain: the oracle is its own experts alone."""
    notes, last = result["notes"], result["notes"][result["domains"][-1]]
    yield ""
    yield from _header(
        "ours", ("base", "own experts", "explicit", "routed", "share", "right", "explicit, backward", "drift, nats")
    )
    for domain in result["domains"]:
        base, routed = result["rows"][0][domain]["bits"], result["rows"][-1][domain]["bits"]
        alone, explicit = last["alone"][domain]["bits"], last["explicit_at_the_end"][domain]["bits"]
        kept = explicit - notes[domain]["explicit"]["bits"]
        yield _line(
            domain,
            *(f"{value:.4f}" for value in (base, alone, explicit, routed)),
            f"{share(base - routed, base - alone):.3f}",
            f"{last['routed_right'][domain]:.3f}",
            "0" if kept == 0 else f"{-kept:+.2e}",
            f"{notes[domain]['drift']['mean_kl']:.4f}",
        )
    largest = max(last["order_invariance"].values())
    yield ""
    yield f"Router rows in this order and in the reverse differ by at most {largest:.1e}, relative."


def _header(first: str, columns: tuple[str, ...] | list[str]) -> Iterator[str]:
    yield _line(first, *columns)
    yield "|" + "---|" * (len(columns) + 1)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.4f}"


def draw(groups: dict[tuple, dict[str, Result]]) -> str:
    """Bars of the mean share of the separate adapters' gain that each method has after the last step, as SVG."""
    height, left, width = 18, 110, 420
    parts, y = [], 10
    for (stream, order, seed), group in groups.items():
        metric = "accuracy" if stream == "B" else "bits"
        if "separate" not in group:
            continue
        oracle = Run(group["separate"], metric)
        parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">stream {stream}, {order}, seed {seed}</text>')
        y += height + 4
        for method in (m for m in ORDER if m in group):
            kept = fmean(Run(group[method], metric).shares(oracle))
            bar, shown = max(0.0, min(kept, 1.2)) * width / 1.2, f"{kept:.2f}"
            colour = "#2f6fab" if method == "ours" else "#9aa5b1"
            parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{method}</text>')
            parts.append(f'<rect x="{left}" y="{y}" width="{bar:.1f}" height="{height - 5}" fill="{colour}"/>')
            parts.append(f'<text x="{left + bar + 6:.1f}" y="{y + 11}">{shown}</text>')
            y += height
        y += 12
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 580 {y}" width="580" font-family="sans-serif"'
    title = "<title>Share of the separate adapters' gain after the last step</title>"
    background = f'<rect width="580" height="{y}" fill="white"/>'
    return f'{head} font-size="12">{title}{background}{"".join(parts)}</svg>\n'
