"""The picture of a report: a PNG, complete, the same twice; and what is said where it cannot be drawn."""

import io
import sys
from pathlib import Path

import pytest

from lorary.cli.report.formatting import heat_levels
from lorary.cli.report.plot import check_plot, retention_png
from lorary.cli.show.charts import HEAT_COLOURS, HEAT_LEVELS
from lorary.domains.errors import InputError
from lorary.registry import Registry


def test_a_report_is_drawn(run, store, tmp_path):
    from matplotlib import image

    assert run("report", "--png", "retention.png", "--no-questions", store=store).exit_code == 0

    pixels = image.imread(tmp_path / "retention.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 900
    scores = Registry.open(store).retention(questions=False).bits
    levels = {level for j in range(3) for level in heat_levels(scores, j, levels=HEAT_LEVELS)} - {None}
    for level, (_, colour) in enumerate(HEAT_COLOURS):
        sought = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        count = (abs(pixels[..., :3] * 255 - sought).max(-1) < 1.5).sum()
        assert (count > 2_000) == (level in levels), colour


def test_the_same_report_gives_the_same_bytes(store):
    report = Registry.open(store).retention()

    assert retention_png(report) == retention_png(report)


def test_names_are_no_formulas(store):
    from matplotlib.figure import Figure

    from lorary.cli.report.plot import _plain

    figure = Figure()
    figure.text(0, 0, _plain(r"a$\frac$b$"))

    figure.savefig(io.BytesIO(), format="png")  # raises where the text is read as a formula


def test_without_matplotlib_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(InputError, match="needs the package 'matplotlib'") as raised:
        check_plot(Path("retention.png"))

    assert raised.value.fix == "pip install 'lorary[plot]'"


def test_only_png_is_written(run, store):
    result = run("report", "--png", "retention.pdf", store=store)

    assert result.exit_code == 2
    assert "would not be a PNG" in result.stderr
