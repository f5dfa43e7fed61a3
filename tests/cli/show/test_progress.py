"""What deserves a line of progress, and what it says."""

from lorary.cli.show.progress import ProgressTracker
from lorary.domains.progress import Progress


class Clock:
    def __init__(self):
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def reported(total: int, *, seconds_each: float, stage: str = "training") -> list[int]:
    clock = Clock()
    tracker = ProgressTracker(clock)
    told = []
    for done in range(1, total + 1):
        clock.time += seconds_each
        if tracker.update(Progress(stage, done, total)):
            told.append(done)
    return told


def test_a_line_for_each_tenth():
    assert reported(100, seconds_each=1) == [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_a_line_every_thirty_seconds_when_it_is_slow():
    assert reported(40, seconds_each=20)[:4] == [1, 3, 4, 6]


def test_short_work_says_one_line():
    assert reported(100, seconds_each=0.005) == [1]


def test_a_new_stage_begins_with_a_line():
    clock = Clock()
    tracker = ProgressTracker(clock)

    assert tracker.update(Progress("reading", 1, 2))
    assert not tracker.update(Progress("reading", 2, 2))
    assert tracker.update(Progress("training", 1, 100))


def test_time_left_counts_from_the_first_report():
    clock = Clock()
    tracker = ProgressTracker(clock)
    tracker.update(Progress("training", 50, 100))
    clock.time = 10.0
    progress = Progress("training", 60, 100, {"loss": 2.5, "tokens_per_second": 5120.0})
    tracker.update(progress)

    assert tracker.seconds_left(progress) == 40.0
    assert tracker.line(progress) == "training: 60 % (60 of 100)  loss 2.500  5,120 tokens/s  0:40 left"
    assert tracker.record(progress)["progress"] == {
        "stage": "training", "done": 60, "total": 100, "loss": 2.5, "tokens_per_second": 5120.0, "seconds_left": 40.0
    }  # fmt: skip
