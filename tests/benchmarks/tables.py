"""Results of the retention benchmark as Markdown tables and a plot."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streams import GENERAL_COLUMNS

from lorary.registry.measure.metrics import (
    RetentionMatrix,
    Values,
    backward_transfer,
    final_score,
    forgetting,
    mean,
    oracle_share,
)

ORDER = ("separate", "joint", "ours", "replay", "olora", "sequential", "xlora", "arrow", "anyssr", "lorauter")
HEAD = (
    "average",
    "share of gain",
    "min share",
    "backward transfer",
    "forgetting",
    *GENERAL_COLUMNS,
    "parameters",
    "steps",
)

Result = dict[str, Any]
Group = dict[tuple[str, float], Result]  # by method and learning rate
Groups = dict[tuple, Group]  # by stream, order and seed


class Run:
    """Retention matrix of one method in one metric, with the separate adapters as the oracle."""

    def __init__(self, result: Result, metric: str, separate: Result):
        rows, steps = result["rows"], result["steps"]
        self.result = result
        self.label = result["method"]
        if rate(result) != rate(separate):
            self.label += f", rate {rate(result):.2g}"
        self.domains = [domain for domain in result["domains"] if metric in rows[0][domain]]
        self.matrix = RetentionMatrix(
            steps=steps,
            domains=self.domains,
            R=[[row.get(domain, {}).get(metric, math.nan) for domain in self.domains] for row in rows],
            lower_is_better=metric == "bits",
            oracle=[separate["rows"][-1][domain][metric] for domain in self.domains],
            # methods with a last step only learned everything there
            learned=[steps.index(domain) if domain in steps else len(steps) - 1 for domain in self.domains],
        )

    def general_changes(self) -> list[float]:
        """Return the relative change of bits per byte on both general texts; positive is worse."""
        first, last = self.result["rows"][0], self.result["rows"][-1]
        return [last[column]["bits"] / first[column]["bits"] - 1 for column in GENERAL_COLUMNS]


def write_tables(out: Path, plot: Path | None) -> Iterator[str]:
    """Write the plot and yield the lines of all tables."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "results").glob("*.json"))]
    groups: Groups = {}
    for result in results:
        key = (result["stream"], result["order"], result["seed"])
        groups.setdefault(key, {})[result["method"], rate(result)] = result
    for (stream, order, seed), group in groups.items():
        yield f"### Stream {stream}, {order} order, seed {seed}"
        yield from _group_tables(group)
    if plot is not None:
        plot.write_text(draw(groups), encoding="utf-8")


def rate(result: Result) -> float:
    """Return the learning rate of a run."""
    return result["recipe"]["learning_rate"]


def _group_tables(group: Group) -> Iterator[str]:
    first = _only(group, "separate") or next(iter(group.values()))
    recipe = first["recipe"]
    yield ""
    yield (
        f"{recipe['steps']} steps per domain of {recipe['batch']} x {recipe['block']} tokens, learning rate "
        f"{recipe['learning_rate']:.4g}; domains: {', '.join(first['domains'])}."
    )
    for metric in ("bits", "accuracy"):
        runs = _runs(group, metric)
        if runs and runs[0].domains:
            yield from _method_table(runs, metric)
            yield from _domain_table(runs)
    if ours := _only(group, "ours"):
        for metric in ("bits", "accuracy"):
            yield from _own_table(ours, metric)
        yield from _routing_table(ours)
    yield ""


def _only(group: Group, method: str) -> Result | None:
    """Return a method's run with the highest learning rate."""
    return max((result for (name, _), result in group.items() if name == method), key=rate, default=None)


def _runs(group: Group, metric: str) -> list[Run]:
    """Return the group's runs in table order; empty without the oracle that defines their shares."""
    separate = _only(group, "separate")
    if separate is None:
        return []
    ordered = sorted(group, key=lambda key: (ORDER.index(key[0]), -key[1]))
    return [Run(group[key], metric, separate) for key in ordered]


def _method_table(runs: list[Run], metric: str) -> Iterator[str]:
    yield ""
    yield from _header("bits per byte" if metric == "bits" else metric, HEAD)
    for run in runs:
        shares = oracle_share(run.matrix)
        yield _line(
            run.label,
            f"{mean(final_score(run.matrix)):.4f}",
            f"{mean(shares):.3f}",
            f"{shares.min():.3f}",
            _signed(mean(backward_transfer(run.matrix))),
            _signed(mean(forgetting(run.matrix))),
            *(f"{100 * change:+.2f} %" for change in run.general_changes()),
            f"{sum(run.result['parameters']):,}",
            str(sum(run.result["training_steps"])),
        )


def _domain_table(runs: list[Run]) -> Iterator[str]:
    yield ""
    yield from _header("after the last step", runs[0].domains)
    yield _line("base", *(f"{value:.4f}" for value in runs[0].matrix.R[0]))
    for run in runs:
        yield _line(run.label, *(f"{value:.4f}" for value in final_score(run.matrix)))


def _own_table(result: Result, metric: str) -> Iterator[str]:
    """Yield lorary's scores by domain; the oracle is the domain's own experts alone."""
    last = result["notes"][result["domains"][-1]]
    domains = [domain for domain in result["domains"] if metric in result["rows"][0][domain]]
    if not domains:
        return
    cells = (result["rows"][0], last["alone"], last["explicit_at_the_end"], result["rows"][-1])
    yield ""
    yield from _header(f"ours, {metric}", ("base", "own experts", "explicit", "routed", "share"))
    for domain in domains:
        base, alone, explicit, routed = (cell[domain][metric] for cell in cells)
        kept = (routed - base) / (alone - base) if alone != base else math.nan
        yield _line(domain, *(f"{value:.4f}" for value in (base, alone, explicit, routed)), f"{kept:.3f}")


def _routing_table(result: Result) -> Iterator[str]:
    """Yield lorary's routing accuracy, drift and backward transfer of explicit compositions."""
    notes, last = result["notes"], result["notes"][result["domains"][-1]]
    yield ""
    columns = ("accuracy", "explicit, backward transfer", "drift, nats", "top-1 flips", "new domain's share")
    yield from _header("ours, routing", columns)
    for domain in result["domains"]:
        kept = last["explicit_at_the_end"][domain]["bits"] - notes[domain]["explicit"]["bits"]
        drift = notes[domain]["drift"]
        yield _line(
            domain,
            f"{last['routed_right'][domain]:.3f}",
            "0" if kept == 0 else f"{-kept:+.2e}",
            f"{drift['mean_kl']:z.4f}",
            str(drift["top1_flips"]),
            f"{drift['newcomer_share']:.4f}",
        )
    largest = max(last["order_invariance"].values())
    yield ""
    yield f"Maximum relative difference of router rows between this order and its reverse: {largest:.1e}."


def _header(first: str, columns: tuple[str, ...] | list[str]) -> Iterator[str]:
    yield _line(first, *columns)
    yield "|" + "---|" * (len(columns) + 1)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _signed(value: Values) -> str:
    return "" if math.isnan(value) else f"{value:+.4f}"


def draw(groups: Groups) -> str:
    """Draw the mean share of the separate adapters' gain after the last step by method, as SVG bars."""
    height, left, width = 18, 160, 370
    parts, y = [], 10
    for (stream, order, seed), group in groups.items():
        metric = "accuracy" if stream == "B" else "bits"
        runs = _runs(group, metric)
        if not runs:
            continue
        parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">stream {stream}, {order}, seed {seed}</text>')
        y += height + 4
        for run in runs:
            kept = float(mean(oracle_share(run.matrix)))
            bar, shown = max(0.0, min(kept, 1.2)) * width / 1.2, f"{kept:.2f}"
            colour = "#2f6fab" if run.result["method"] == "ours" else "#9aa5b1"
            parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{run.label}</text>')
            parts.append(f'<rect x="{left}" y="{y}" width="{bar:.1f}" height="{height - 5}" fill="{colour}"/>')
            parts.append(f'<text x="{left + bar + 6:.1f}" y="{y + 11}">{shown}</text>')
            y += height
        y += 12
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 580 {y}" width="580" font-family="sans-serif"'
    title = "<title>Share of the separate adapters' gain after the last step</title>"
    background = f'<rect width="580" height="{y}" fill="white"/>'
    return f'{head} font-size="12">{title}{background}{"".join(parts)}</svg>\n'
