"""What got worse: beyond its interval, since which step, in bits per byte and in accuracy."""

import pytest

from .test_measurable import noise, report_of


def change_of(report, metric: str = "bits per byte"):
    (found,) = [one for one in report.changes if (one.domain, one.metric) == ("legal", metric)]
    return found


def test_a_domain_that_another_one_harms_is_worse_since_that_one():
    report = report_of([2.0] * 30, [1.0] * 30, [1.54 + e for e in noise(30, 0.1)])
    found = change_of(report)

    assert (found.verdict, found.step, found.against) == ("worse", "medicine", "when it was learned")
    assert found.change == pytest.approx(0.54)
    assert found.interval is not None
    assert found.interval[0] < 0.54 < found.interval[1]
    assert found.words == "worse: +54 % bits, most with + medicine"
    assert report.worse == (found,)
    assert report.changes[0] == found, "what got worse is first"


def test_a_domain_below_the_base_is_worse_even_if_it_was_learned_so():
    found = change_of(report_of([2.0] * 30, [2.2] * 30, [2.2] * 30))

    assert (found.verdict, found.step, found.against) == ("worse", "legal", "the bare base")


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ([1.0] * 30, "kept"),
        ([0.9] * 30, "kept"),
        ([1.004] * 30, "kept"),  # less than two seeds differ by
        ([1.1 + e for e in noise(30, 1.0)], "unclear"),
        ([1.1] * 30, "worse"),
    ],
)
def test_noise_is_no_harm(now: list[float], verdict: str):
    assert change_of(report_of([2.0] * 30, [1.0] * 30, now)).verdict == verdict


@pytest.mark.parametrize("texts", [1, 4])
def test_few_texts_cannot_hide_harm(texts: int):
    found = change_of(report_of([2.0] * texts, [1.0] * texts, [1.5] * texts))

    assert (found.verdict, found.interval) == ("worse", None)
    assert found.words.endswith(f"n = {texts}")


@pytest.mark.parametrize(
    ("now", "verdict", "words"),
    [
        ("+" * 24, "kept", "accuracy kept"),
        ("+" * 12 + "-" * 12, "worse", "worse: -50 points of accuracy, most with + medicine"),
        ("+" * 23 + "-", "unclear", "perhaps worse: -4.17 points of accuracy, most with + medicine"),
    ],
)
def test_accuracy_that_falls_is_flagged(now: str, verdict: str, words: str):
    texts = [2.0] * 24
    report = report_of(
        texts, texts, texts, right={"base": "-" * 24, "general": "-" * 24, "learned": "+" * 24, "now": now}
    )
    found = change_of(report, "accuracy")

    assert (found.verdict, found.words) == (verdict, words)
    assert [one["verdict"] for one in report.as_json()["changes"] if one["metric"] == "accuracy"] == [verdict]
