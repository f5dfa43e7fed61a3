"""`registry report --format github`: a comment for a pull request, which names in the data cannot turn into markup."""

import math

from lorary.cli.report.markdown import retention_markdown
from lorary.cli.report.terminal import kind_blocks
from lorary.domains.data.example import Example
from lorary.registry.measure.held_out import HeldOut
from lorary.registry.measure.report import RetentionReport
from lorary.registry.measure.scores import CellScores
from lorary.registry.measure.thresholds import judge, parse_threshold

HOSTILE = "<img src=x>|`x`[a](b) @team"


def with_kinds(harmed: RetentionReport, kind: str) -> RetentionReport:
    """The harmed report, where 24 texts of medicine are better and 6 of one kind much worse."""
    kinds = ["usual"] * 24 + [kind] * 6
    texts = tuple(Example(completion=f"{name} text {i}", kind=name) for i, name in enumerate(kinds))
    nats = tuple((1.0 if name == "usual" else 1.5) * math.log(2) for name in kinds)
    scores = type(harmed.scores)(**vars(harmed.scores))
    scores.data = list(scores.data)  # type: ignore[misc]
    scores.data[1] = HeldOut(name="medicine", texts=texts)  # type: ignore[index]
    old = scores.cells[3, 1]
    scores.cells = {**scores.cells, (3, 1): CellScores(text_nats=nats, text_bytes=(1,) * 30, right=old.right)}  # type: ignore[misc]
    return RetentionReport(scores)


def test_harm_and_thresholds_are_in_tables(harmed):
    found = retention_markdown(harmed, judge(harmed, [parse_threshold("retention>=0.98")]))
    lines = found.splitlines()

    assert lines[0] == "### Retention after 2 domains: :red_circle: worse: medicine"
    assert "| `retention>=0.98` | :red_circle: fails | medicine 0.460, legal not measurable |" in lines
    assert "| medicine | :red_circle: worse: +54 % bits, most with + legal | 1.000 | 1.540 | 54–54 | n = 30 |" in lines
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in found.split("\n\n")]
    assert all(len({row.count("|") for row in table}) <= 1 for table in tables)


def test_kinds_that_an_average_hides_are_printed_with_their_words_and_rows(harmed):
    report = with_kinds(harmed, "faq")
    verdicts = judge(report, [parse_threshold("backward_transfer>=-0.2")])
    found = retention_markdown(report, verdicts)

    assert list(verdicts[0].failed) == ["medicine: faq"], "the average of medicine is within the threshold"
    assert "| medicine: faq | :red_circle: worse: +50 % bits, most with + legal, n = 6 |" in found
    assert "<details><summary>medicine: faq: " in found
    assert found.count("- faq text") == 3
    shown = "".join(span.text for block in kind_blocks(report, verdicts)[2:] for span in block.line)  # type: ignore[union-attr]
    assert "faq stands out by: " in shown
    assert shown.count("- faq text") == 3


def test_names_in_the_data_are_no_markup(harmed):
    found = retention_markdown(with_kinds(harmed, HOSTILE), [])

    assert "<img" not in found
    assert "@team" not in found
    assert "](b)" not in found
    assert {row.count("|") for row in found.splitlines() if "img" in row and row.startswith("|")} == {7}
