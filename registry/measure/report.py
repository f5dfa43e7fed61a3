"""Compute a retention report from measured cells: matrices with intervals, metrics, routing and drift.

Intervals are 95 %: Wilson's for accuracies, otherwise the bootstrap over texts (over questions for metrics of
accuracies). The bootstrap is paired: all steps of a column share their draws, so a difference or a ratio of steps has
its own interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...adapters.composition import GENERAL
from ...domains.statistics.intervals import DRAWS, percentile_interval, ratio_draws, wilson_interval
from ..compose.notebook import html_table
from ..store.manifest import PackManifest
from .changes import Change, find_changes
from .held_out import HeldOut
from .kinds import KindPortrait, portrait, rows_by_kind
from .measurable import NOT_MEASURABLE, why_not_measurable
from .metrics import METRICS, Metric, RetentionMatrix, Values, mean
from .scores import CellScores

if TYPE_CHECKING:
    from ..compose.drift import Drift

Interval = tuple[float, float]

_BITS: Final = "bits/byte"
_SHARE: Final = "share"
_OF_KIND: Final = ": "  # no name of a domain has a colon
# figures that compare a text with itself: others differ between kinds without any harm
KIND_METRICS: Final = ("backward_transfer", "forgetting", "retention", "oracle_share")


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number with its 95 % interval; both are None where the figure does not apply, or cannot be measured."""

    value: float | None
    interval: Interval | None = None
    reason: str | None = None  # why it is not measurable; None where it is, or does not apply

    def as_json(self) -> dict[str, Any]:
        """Return the rounded content for JSON; only what is not measurable has a reason."""
        bounds = self.interval and [round(bound, 6) for bound in self.interval]
        found = {"value": None if self.value is None else round(self.value, 6), "interval": bounds}
        return found if self.reason is None else found | {"reason": self.reason}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric of a report: its description, overall value, and value for each domain."""

    name: str  # in thresholds and in JSON
    title: str
    formula: str
    source: str
    meaning: str
    unit: str  # bits/byte, share, nats or count
    whole: Value
    domains: Mapping[str, Value] = field(default_factory=dict)
    is_less_better: bool = False

    @property
    def applying(self) -> dict[str, Value]:
        """The domains that the metric applies to: those with a value, and those where it is not measurable."""
        return {name: v for name, v in self.domains.items() if v.value is not None or v.reason is not None}

    @property
    def not_measurable(self) -> dict[str, str]:
        """The domains without a value that should have one, with the reason."""
        return {name: v.reason for name, v in self.domains.items() if v.reason is not None}

    def as_json(self) -> dict[str, Any]:
        """Return the content for JSON, with formula and source."""
        about = {"title": self.title, "formula": self.formula, "source": self.source, "meaning": self.meaning}
        domains = {name: value.as_json() for name, value in self.domains.items()}
        better = "less" if self.is_less_better else "more"
        return about | {"unit": self.unit, "better": better} | self.whole.as_json() | {"domains": domains}


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """A retention matrix with the interval of each cell and the draws of the bootstrap."""

    matrix: RetentionMatrix
    draws: RetentionMatrix
    intervals: tuple[tuple[Interval | None, ...], ...]  # (steps, domains)
    counts: Mapping[str, int]  # number of texts or questions of each column

    def value(self, step: int, column: int) -> float | None:
        """Return a score; None where nothing was measured."""
        return _number(self.matrix.R[step, column])


@dataclass(frozen=True, kw_only=True)
class RetentionScores:
    """Measured cells of a retention matrix, with what they were measured on."""

    steps: tuple[str, ...]  # "base", "general", then the domains as added
    manifests: tuple[PackManifest, ...]  # one for each step but the base, KP's first
    data: tuple[HeldOut, ...]  # one for each column: general text first
    cells: Mapping[tuple[int, int], CellScores]  # by step and column
    alone: tuple[CellScores, ...]  # each column under its own experts alone
    drift: "tuple[Drift, ...]"  # of each domain's addition, without general

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns: general text, then the domains."""
        return self.steps[1:]


class RetentionReport:
    """Retention report: how each domain's scores change as domains are added. Figures are computed on first use."""

    def __init__(self, scores: RetentionScores, *, left_out: Mapping[str, str] | None = None):
        self.scores = scores
        self.left_out = dict(left_out or {})  # domains that could not be measured, with the reason
        self.steps = scores.steps
        self.columns = scores.columns
        self.domains = scores.columns[1:]

    @cached_property
    def bits(self) -> ScoreTable:
        """Bits per byte of every column, general text first; lower is better."""
        return self._table(
            self.columns,
            lower_is_better=True,
            above=lambda cell: [nats / math.log(2) for nats in cell.text_nats],
            below=lambda cell: cell.text_bytes,
        )

    @cached_property
    def accuracy(self) -> ScoreTable | None:
        """Accuracy of the domains with questions, higher is better; None if there are no questions."""
        asked = [name for name, cell in zip(self.columns, self.scores.alone, strict=True) if cell.right]
        if not asked:
            return None
        return self._table(
            asked, lower_is_better=False, above=lambda cell: cell.right, below=lambda cell: [1.0] * len(cell.right)
        )

    @cached_property
    def figures(self) -> tuple[Figure, ...]:
        """All metrics, with intervals."""
        figures = [_figure(name, self.bits, self.domains, prefix="", unit=_BITS) for name in METRICS]
        if self.accuracy:
            asked = [name for name in self.accuracy.matrix.domains if name != GENERAL]
            figures += [_figure(name, self.accuracy, asked, prefix="accuracy_", unit=_SHARE) for name in METRICS]
        return (*figures, *self._general(), self._routing(), *self._drift())

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """What became of each domain, and of general text: bits per byte, then accuracy; what got worse is first."""
        tables = (self.bits, *([self.accuracy] if self.accuracy else []))
        found = [one for t in tables for one in find_changes(t.matrix, t.draws, t.counts)]
        return tuple(sorted(found, key=lambda one: not one.is_worse))

    @property
    def worse(self) -> tuple[Change, ...]:
        """What got worse beyond its interval."""
        return tuple(one for one in self.changes if one.is_worse)

    @cached_property
    def kinds(self) -> ScoreTable | None:
        """Bits per byte of each kind of text with enough rows; None if no domain has several."""
        parts = {
            kind_label(data.name, kind): (j, rows)
            for j, data in enumerate(self.scores.data)
            if j > 0
            for kind, rows in rows_by_kind(data.texts).items()
        }
        if not parts:
            return None
        return self._table(
            list(parts),
            lower_is_better=True,
            above=lambda cell: [nats / math.log(2) for nats in cell.text_nats],
            below=lambda cell: cell.text_bytes,
            parts=parts,
        )

    @cached_property
    def kind_figures(self) -> dict[str, Figure]:
        """The figures that compare a kind with itself, by name; their domains are kinds."""
        table = self.kinds
        if table is None:
            return {}
        names = [name for name in METRICS if name in KIND_METRICS]
        return {name: _figure(name, table, table.matrix.domains, prefix="", unit=_BITS) for name in names}

    @cached_property
    def kind_changes(self) -> tuple[Change, ...]:
        """What became of each kind; what got worse is first."""
        table = self.kinds
        found = find_changes(table.matrix, table.draws, table.counts) if table else ()
        return tuple(sorted(found, key=lambda one: (not one.is_worse, -one.change)))

    def portrait(self, label: str) -> KindPortrait:
        """Describe a kind, by its name among `kinds`."""
        domain, kind = split_label(label)
        j = self.columns.index(domain)
        learned, now = self.scores.cells[j + 1, j], self.scores.cells[len(self.steps) - 1, j]
        nats = zip(learned.text_nats, now.text_nats, now.text_bytes, strict=True)
        rises = [(after - before) / max(size, 1) for before, after, size in nats]
        return replace(portrait(self.scores.data[j].texts, kind, rises), kind=label)

    @cached_property
    def confusion(self) -> dict[str, dict[str, int]]:
        """Number of texts by true domain and by the slot with the largest mean gate, after the last step."""
        last = len(self.steps) - 1
        return {name: dict(self.scores.cells[last, j].taken) for j, name in enumerate(self.columns)}

    @cached_property
    def mean_gates(self) -> dict[str, dict[str, float]]:
        """Mean slot gates on each domain's text, after the last step."""
        last = len(self.steps) - 1
        return {name: dict(self.scores.cells[last, j].gates) for j, name in enumerate(self.columns)}

    def __repr__(self) -> str:
        left_out = f", left_out={list(self.left_out)}" if self.left_out else ""
        return f"RetentionReport(domains={list(self.domains)}, cells={len(self.scores.cells)}{left_out})"

    def _repr_html_(self) -> str:
        matrix, columns = self.bits.matrix, range(len(self.columns))
        retained, share = (self.figure(name).domains for name in ("retention", "oracle_share"))
        rows = [
            (
                name,
                *(_decimals(self.bits.value(step, j)) for step in (0, matrix.learned[j], matrix.last)),
                *(_decimals_of(values[name]) if name in values else "" for values in (retained, share)),
                "; ".join(change.words for change in self.changes if change.domain == name),
            )
            for j, name in zip(columns, self.columns, strict=True)
        ]
        caption = f"Retention after {len(self.domains)} domains, bits per byte"
        if self.left_out:
            caption += f"; left out: {', '.join(self.left_out)}"
        headings = ("domain", "base", "when learned", "now", "retention", "share of oracle gain", "verdict")
        return html_table(caption, headings, rows)

    def figure(self, name: str) -> Figure:
        """Return the metric of this name.

        Raises:
            KeyError: There is no such metric.
        """
        return {figure.name: figure for figure in self.figures}[name]

    def as_json(self) -> dict[str, Any]:
        """Return the whole report for JSON."""
        manifests = zip(self.columns, self.scores.manifests, strict=True)
        return {
            "steps": list(self.steps),
            "domains": list(self.columns),
            "versions": {name: {"version": m.version, "digest": m.digest} for name, m in manifests},
            "data": {
                data.name: {
                    "texts": len(data.texts),
                    "bytes": sum(cell.text_bytes),
                    "questions": len(data.questions),
                    "digest": data.digest,
                }
                for data, cell in zip(self.scores.data, self.scores.alone, strict=True)
            },
            **_table_json(self.bits, "bits per byte"),
            "accuracy": _table_json(self.accuracy, "accuracy") if self.accuracy else None,
            "figures": {figure.name: figure.as_json() for figure in self.figures},
            "changes": [change.as_json() for change in self.changes],
            "kinds": [change.as_json() for change in self.kind_changes],
            "routing": {"texts": self.confusion, "mean_gates": self.mean_gates},
            "left_out": self.left_out,
        }

    def _table(
        self,
        columns: Sequence[str],
        *,
        lower_is_better: bool,
        above: Callable[[CellScores], Sequence[float]],
        below: Callable[[CellScores], Sequence[float]],
        parts: Mapping[str, tuple[int, Sequence[int]]] | None = None,
    ) -> ScoreTable:
        """Return point values, draws and intervals of some columns; a score is sum(above) / sum(below).

        Args:
            parts: For columns that are parts of one: the index of that, and its texts.
        """
        shape = len(self.steps), len(columns)
        R, draws = np.full(shape, np.nan), np.full((DRAWS, *shape), np.nan)
        oracle, oracle_draws = np.full(shape[1], np.nan), np.full((DRAWS, shape[1]), np.nan)
        counts = {}
        for k, name in enumerate(columns):
            j, texts = (self.columns.index(name), None) if parts is None else parts[name]
            rows = [i for i in range(len(self.steps)) if (i, j) in self.scores.cells]
            cells = [*(self.scores.cells[i, j] for i in rows), self.scores.alone[j]]
            numerators, denominator = [above(cell) for cell in cells], below(cells[0])
            if texts is not None:
                numerators = [[values[i] for i in texts] for values in numerators]
                denominator = [denominator[i] for i in texts]
            values = np.asarray(numerators, dtype=np.float64).sum(1) / sum(denominator)
            drawn = ratio_draws(numerators, denominator, seed=j)  # one seed per column: domains are independent
            R[rows, k], oracle[k] = values[:-1], values[-1]
            draws[:, rows, k], oracle_draws[:, k] = drawn[:, :-1], drawn[:, -1]
            counts[name] = len(denominator)
        about: dict[str, Any] = {"steps": self.steps, "domains": columns, "lower_is_better": lower_is_better}
        if parts is not None:
            about["learned"] = [parts[name][0] + 1 for name in columns]
        matrix = RetentionMatrix(R=R, oracle=oracle, **about)
        intervals = tuple(
            tuple(_cell_interval(R[i, k], draws[:, i, k], counts[columns[k]], lower_is_better) for k in range(shape[1]))
            for i in range(shape[0])
        )
        drawn_matrix = RetentionMatrix(R=draws, oracle=oracle_draws, **about)
        return ScoreTable(matrix=matrix, draws=drawn_matrix, intervals=intervals, counts=counts)

    def _general(self) -> list[Figure]:
        """Return the figure of general text."""
        before, after = self.bits.matrix.R[0, 0], self.bits.matrix.R[-1, 0]
        drawn_before, drawn_after = self.bits.draws.R[:, 0, 0], self.bits.draws.R[:, -1, 0]
        return [
            Figure(
                name="general_delta",
                title="general text against the base",
                formula="(R[T, general] - R[0, general]) / R[0, general]",
                source="this project",
                meaning="relative increase of bits per byte of general text over the bare base; lower is better",
                unit=_SHARE,
                whole=_value((after - before) / before, (drawn_after - drawn_before) / drawn_before),
                is_less_better=True,
            )
        ]

    def _routing(self) -> Figure:
        """Return the routing accuracy."""
        right = {name: self.confusion[name].get(name, 0) for name in self.columns}
        texts = {name: sum(self.confusion[name].values()) for name in self.columns}
        return Figure(
            name="routing_accuracy",
            title="routing accuracy",
            formula="texts of a domain whose largest mean slot gate is the domain's / its texts",
            source="this project",
            meaning="share of held-out texts routed to their own domain, by the mean slot gate over scored tokens",
            unit=_SHARE,
            whole=_share(sum(right.values()), sum(texts.values())),
            domains={name: _share(right[name], texts[name]) for name in self.columns},
        )

    def _drift(self) -> list[Figure]:
        """Return how much each addition changed the routing of older domains."""
        measured = dict(zip(self.domains, self.scores.drift, strict=True))
        others = {name: drift for name, drift in measured.items() if drift.domains}
        shared: dict[str, Any] = {"source": "this project", "is_less_better": True}
        kl = {name: Value(value=drift.mean_kl) for name, drift in others.items()}
        flips = {name: Value(value=float(drift.top1_flips)) for name, drift in others.items()}
        return [
            Figure(
                name="drift_kl",
                title="routing drift",
                formula="mean over older domains of KL(gates before || gates after) on their typical text",
                meaning="change of older domains' slot gates when a domain is added; the largest of all additions",
                unit="nats",
                whole=Value(value=max((v.value for v in kl.values() if v.value is not None), default=None)),
                domains=kl,
                **shared,
            ),
            Figure(
                name="drift_flips",
                title="domains routed elsewhere",
                formula="older domains whose typical text has another largest gate afterwards",
                meaning="number of older domains routed to another slot after an addition; the sum of all additions",
                unit="count",
                whole=Value(value=math.fsum(v.value or 0 for v in flips.values())),
                domains=flips,
                **shared,
            ),
        ]


def kind_label(domain: str, kind: str) -> str:
    """Return how a kind of a domain's text is named."""
    return f"{domain}{_OF_KIND}{kind}"


def split_label(label: str) -> tuple[str, str]:
    """Return domain and kind of a label; the kind is empty for the name of a domain."""
    domain, _, kind = label.partition(_OF_KIND)
    return domain, kind


def figure_names() -> set[str]:
    """Return the names of all figures that a report can have."""
    others = {"general_delta", "routing_accuracy", "drift_kl", "drift_flips"}
    return {*METRICS, *(f"accuracy_{name}" for name in METRICS), *others}


def _figure(name: str, scores: ScoreTable, domains: Sequence[str], *, prefix: str, unit: str) -> Figure:
    metric = METRICS[name]
    matrix, drawn = scores.matrix.of(domains), scores.draws.of(domains)
    values, draws = metric.compute(matrix), metric.compute(drawn)
    reasons = _reasons(metric, matrix, drawn, scores.counts)
    for j, reason in enumerate(reasons):
        if reason is not None:
            values[j] = draws[:, j] = np.nan
    title = metric.title if not prefix else f"{metric.title}, accuracy"
    return Figure(
        name=prefix + name,
        title=title,
        formula=metric.formula,
        source=metric.source,
        meaning=metric.meaning,
        unit=_SHARE if metric.is_share else unit,
        whole=_value(mean(values), mean(draws), "it is not measurable for any domain" if all(reasons) else None),
        domains={domain: _value(values[j], draws[:, j], reasons[j]) for j, domain in enumerate(domains)},
        is_less_better=name == "forgetting" or (name == "average_score" and scores.matrix.lower_is_better),
    )


def _cell_interval(value: float, draws: Values, count: int, lower_is_better: bool) -> Interval | None:
    if np.isnan(value):
        return None
    return percentile_interval(draws) if lower_is_better else wilson_interval(round(value * count), count)


def _reasons(
    metric: Metric, matrix: RetentionMatrix, drawn: RetentionMatrix, counts: Mapping[str, int]
) -> list[str | None]:
    """Return for each domain why the metric's share is not measurable; None where it is, and for other metrics."""
    if metric.divisor is None:
        return [None] * len(matrix.domains)
    gains, drawn_gains = metric.divisor(matrix), metric.divisor(drawn)
    return [
        why_not_measurable(
            gains[j],
            percentile_interval(drawn_gains[:, j]),
            texts=counts[name],
            base=matrix.R[0, j] if matrix.lower_is_better else None,
        )
        for j, name in enumerate(matrix.domains)
    ]


def _value(value: Any, draws: Values, reason: str | None = None) -> Value:
    number = _number(value)
    return Value(value=number, interval=None if number is None else percentile_interval(draws), reason=reason)


def _share(right: int, total: int) -> Value:
    return Value(value=right / total, interval=wilson_interval(right, total)) if total else Value(value=None)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _decimals_of(value: Value) -> str:
    return _decimals(value.value) if value.reason is None else NOT_MEASURABLE


def _table_json(scores: ScoreTable, metric: str) -> dict[str, Any]:
    rows = range(len(scores.matrix.steps))
    columns = range(len(scores.matrix.domains))
    values = [[scores.value(i, j) for j in columns] for i in rows]
    oracle = [] if scores.matrix.oracle is None else scores.matrix.oracle.tolist()
    return {
        "metric": metric,
        "columns": list(scores.matrix.domains),
        "counts": dict(scores.counts),
        "matrix": [[None if v is None else round(v, 5) for v in row] for row in values],
        "intervals": [[b and [round(x, 5) for x in b] for b in row] for row in scores.intervals],
        "own_experts_alone": [round(v, 5) for v in oracle],
    }
