"""A harmed domain, and shares of noise, in a terminal, in a pipe and in JSON."""

import json

import pytest

from lorary.cli.commands.report import retention_page
from lorary.cli.show import output
from lorary.registry.measure.thresholds import judge, parse_threshold


@pytest.fixture
def printed(harmed, capsys, monkeypatch):
    """`printed(colour, ..)` is what a person, a pipe or a program gets."""

    def show(*, is_terminal: bool = True, as_json: bool = False, width: int = 120) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("FORCE_COLOR", "1" if is_terminal else "")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        verdicts = judge(harmed, [parse_threshold("retention>=0.98")])
        output.show(retention_page(harmed, verdicts), command="report", as_json=as_json)
        return capsys.readouterr().out

    return show


def test_harm_is_said_first_in_words_and_in_red(printed):
    first, *lines = printed().splitlines()

    assert "worse: medicine" in first
    red = [line for line in lines if "\x1b[31mworse: +54 % bits, most with + legal" in line]
    assert len(red) == 1
    assert any("\x1b[31m1.540" in line for line in lines), "the score of the table of domains is red as well"
    assert any("\x1b[31mworse: -33.3 points of accuracy, most with + legal" in line for line in lines)
    assert any("\x1b[31m67 %" in line for line in lines)


def test_no_word_needs_a_colour(printed):
    lines = printed(is_terminal=False).splitlines()

    assert "medicine\tworse: +54 % bits, most with + legal\t1\t1.54\t0.54 0.54\t30" in lines
    assert not any("\x1b" in line for line in lines)
    kept = next(line.split("\t") for line in lines if line.startswith("legal\t2\t2\t2"))
    assert kept[5:7] == ["not measurable", "not measurable"]


def test_a_share_of_noise_is_null_in_json(printed):
    found = json.loads(printed(as_json=True))

    assert found["figures"]["retention"]["domains"]["legal"]["value"] is None
    assert "no gain" in found["figures"]["retention"]["domains"]["legal"]["reason"]
    assert found["gates"] == [
        {
            "gate": "retention>=0.98",
            "holds": False,
            "checked": 2,
            "failed": {"medicine": 0.46, "legal": None},
            "reasons": {"legal": "there is no gain over the base (+0.0000)"},
        }
    ]
    assert [one["domain"] for one in found["changes"] if one["verdict"] == "worse"] == ["medicine", "medicine"]
