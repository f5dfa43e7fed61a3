"""How far long work has come, in words: what a report deserves a line, how long a stage still takes."""

import time
from collections.abc import Callable

from ...domains.progress import Progress
from .numbers import clock

SILENT_S = 30.0  # the longest time without a line
MIN_S = 1.0  # the shortest time between two lines of one stage


class Pace:
    """Follows the reports of long work, stage by stage."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._stage = ""
        self._began = 0.0
        self._first_done = 0
        self._line_at = 0.0
        self._line_tenth = 0

    def follow(self, progress: Progress) -> bool:
        """Takes a report in; whether it deserves a line: a new stage, another tenth, or 30 seconds without one."""
        now, tenth = self._now(), 10 * progress.done // max(1, progress.total)
        if progress.stage != self._stage:
            self._stage, self._began, self._first_done = progress.stage, now, progress.done
            is_due = True
        else:
            waited = now - self._line_at
            is_due = waited >= SILENT_S or (tenth > self._line_tenth and waited >= MIN_S)
            is_due = is_due or (progress.done == progress.total and self._line_tenth < 10 and now - self._began > 2)
        if is_due:
            self._line_at, self._line_tenth = now, tenth
        return is_due

    def left_s(self, progress: Progress) -> float | None:
        """Seconds that the stage still takes at its pace so far; None while that is unknown."""
        done = progress.done - self._first_done
        if done <= 0 or progress.done >= progress.total:
            return None
        return (progress.total - progress.done) * (self._now() - self._began) / done

    def figures(self, progress: Progress) -> str:
        """Loss, speed and time left, as far as they are known."""
        parts = [_figure(name, value) for name, value in progress.figures.items()]
        left = self.left_s(progress)
        return "  ".join([*parts, *([] if left is None else [f"{clock(left)} left"])])

    def line(self, progress: Progress) -> str:
        """A report as one line of plain text."""
        share = 100 * progress.done // max(1, progress.total)
        figures = self.figures(progress)
        head = f"{progress.stage}: {share} % ({progress.done} of {progress.total})"
        return f"{head}  {figures}" if figures else head

    def record(self, progress: Progress) -> dict[str, object]:
        """A report for programs."""
        left = self.left_s(progress)
        figures = {name: round(value, 5) for name, value in progress.figures.items()}
        head = {"stage": progress.stage, "done": progress.done, "total": progress.total}
        return {"progress": head | figures | ({} if left is None else {"seconds_left": round(left, 1)})}


def _figure(name: str, value: float) -> str:
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    return f"{name.replace('_', ' ')} {value:.3f}"
