"""Drawing: the same page for people and for pipes, and text of others made harmless."""

import sys

import pytest

from lorary.cli.show import output, progress
from lorary.cli.show.page import Page, Paragraph, SlotRuns, Span, cell, fields, line, table, title
from lorary.domains.progress import Progress

PAGE = Page(
    data={"answer": 42},
    blocks=(
        title("For people"),
        fields([("file", cell("[red]a\tb\x1b[31m[/red]")), None, ("size", cell("1.2 K", 1234))]),
        table(("NAME", "SIZE"), [("x" * 200, cell("1 K", 1000))], right=("SIZE",)),
        Paragraph(line("said ", Span("so", "good"))),
    ),
    hints=("go on",),
)


def test_a_pipe_gets_every_character_and_exact_numbers(capsys):
    output.show(PAGE, command="test", as_json=False)

    assert capsys.readouterr().out == (
        "file\t[red]a b[/red]\nsize\t1234\n\nNAME\tSIZE\n" + "x" * 200 + "\t1000\n\nsaid so\n"
    )


def test_people_get_markup_as_it_is_and_no_escapes(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")

    output.show(PAGE, command="test", as_json=False)

    drawn = capsys.readouterr().out
    assert "For people" in drawn
    assert "[red]a" in drawn
    assert "1.2 K" in drawn
    assert "\x1b[31m" not in drawn


def test_json_has_no_hints(capsys):
    output.show(PAGE, command="test", as_json=True)

    printed = capsys.readouterr()
    assert '"command": "test"' in printed.out
    assert printed.err == ""


def test_runs_are_bracketed_where_there_is_no_colour(capsys):
    output.show(Page(data={}, blocks=(SlotRuns((("a b", 0), (" c", 1))),)), command="test", as_json=False)

    assert capsys.readouterr().out == "[0:a b][1: c]\n"


def test_a_person_who_waits_is_told_after_two_seconds(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.01)

    with progress.show_progress("loading", as_json=False):
        import time

        time.sleep(0.2)

    assert capsys.readouterr().err == "loading ...\n"


def test_a_bar_is_drawn_on_a_terminal_and_goes_away(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    with progress.show_progress("loading", as_json=False) as display:
        display.on_progress(Progress("training", 1, 2, {"loss": 1.5}))
        display.log("half of it")
        display.on_progress(Progress("training", 2, 2))

    drawn = capsys.readouterr().err
    assert "training" in drawn
    assert "half of it" in drawn
    assert drawn.endswith(("\x1b[2K", "\x1b[?25h")) or "\x1b[2K" in drawn


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_without_a_cause_has_no_empty_line(capsys, as_json):
    record = {"code": "x", "exit": 1, "message": "It is off.", "cause": None, "fix": "do this"}

    output.show_error(record, as_json=as_json)

    expected = '{"error": {"code": "x", "exit": 1, "message": "It is off.", "cause": null, "fix": "do this"}}\n'
    assert capsys.readouterr().err == (expected if as_json else "Error: It is off.\nFix: do this\n")
