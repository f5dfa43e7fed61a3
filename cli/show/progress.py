"""Progress of long work on stderr: a bar on a terminal, otherwise a line now and then, with --json as JSON."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from ...domains.progress import Progress
from . import output
from .numbers import clock

MAX_SILENCE_S = 30.0  # the longest time without a line
MIN_PAUSE_S = 1.0  # the shortest time between two lines of one stage
FIRST_LINE_S = 2.0  # a stage without reports is named after this time


class ProgressTracker:
    """Follows the reports of long work, stage by stage: which of them deserve a line, and how much time is left."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._stage = ""
        self._began = 0.0
        self._first_done = 0
        self._line_at = 0.0
        self._line_tenth = 0

    def update(self, progress: Progress) -> bool:
        """Take a report; return whether a line is due: for a new stage, another tenth, or after 30 seconds."""
        now, tenth = self._now(), 10 * progress.done // max(1, progress.total)
        if progress.stage != self._stage:
            self._stage, self._began, self._first_done = progress.stage, now, progress.done
            is_due = True
        else:
            waited = now - self._line_at
            is_due = waited >= MAX_SILENCE_S or (tenth > self._line_tenth and waited >= MIN_PAUSE_S)
            is_due = is_due or (progress.done == progress.total and self._line_tenth < 10 and now - self._began > 2)
        if is_due:
            self._line_at, self._line_tenth = now, tenth
        return is_due

    def seconds_left(self, progress: Progress) -> float | None:
        """Estimate the time left in this stage; None while it is unknown."""
        done = progress.done - self._first_done
        if done <= 0 or progress.done >= progress.total:
            return None
        return (progress.total - progress.done) * (self._now() - self._began) / done

    def figures(self, progress: Progress) -> str:
        """Format loss, speed and time left, as far as they are known."""
        parts = [_format_figure(name, value) for name, value in progress.figures.items()]
        left = self.seconds_left(progress)
        return "  ".join([*parts, *([] if left is None else [f"{clock(left)} left"])])

    def line(self, progress: Progress) -> str:
        """Format a report as one line of plain text."""
        share = 100 * progress.done // max(1, progress.total)
        figures = self.figures(progress)
        head = f"{progress.stage}: {share} % ({progress.done} of {progress.total})"
        return f"{head}  {figures}" if figures else head

    def record(self, progress: Progress) -> dict[str, object]:
        """Return a report for --json."""
        left = self.seconds_left(progress)
        figures = {name: round(value, 5) for name, value in progress.figures.items()}
        head = {"stage": progress.stage, "done": progress.done, "total": progress.total}
        return {"progress": head | figures | ({} if left is None else {"seconds_left": round(left, 1)})}


def _format_figure(name: str, value: float) -> str:
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    return f"{name.replace('_', ' ')} {value:.3f}"


class ProgressDisplay:
    """Takes the library's progress reports and shows them; made by `show_progress`."""

    def __init__(self, *, as_json: bool, bar: output.ProgressBar | None):
        self._as_json = as_json
        self._bar = bar
        self._tracker = ProgressTracker()
        self._timer: threading.Timer | None = None
        self._has_logged = False

    def start(self, stage: str) -> None:
        """Start a stage that does not report how far it is."""
        self._cancel_timer()
        if self._bar:
            self._bar.start(stage)
            return
        self._timer = threading.Timer(FIRST_LINE_S, self._name_stage, [stage])
        self._timer.daemon = True
        self._timer.start()

    def on_progress(self, progress: Progress) -> None:
        """Show a report of the library."""
        if not progress.total:
            self.start(progress.stage)
            return
        self._cancel_timer()
        is_due = self._tracker.update(progress)
        if self._bar:
            figures = f"{progress.done:,}/{progress.total:,}  {self._tracker.figures(progress)}"
            self._bar.update(progress.stage, progress.done, progress.total, figures)
        elif is_due and self._as_json:
            output.write_json_line(self._tracker.record(progress))
        elif is_due:
            output.write_line(self._tracker.line(progress))

    def log(self, text: str) -> None:
        """Write a line that stays above the bar; not with --json."""
        self._cancel_timer()
        if self._bar:
            self._bar.log(text)
            self._has_logged = True
        elif not self._as_json:
            output.write_line(text)

    def close(self) -> None:
        """End the display, with an empty line between what was logged and the result."""
        self._cancel_timer()
        if self._bar and self._has_logged:
            self._bar.log("")

    def _cancel_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _name_stage(self, stage: str) -> None:
        if self._as_json:
            output.write_json_line({"progress": {"stage": stage}})
        else:
            output.write_line(f"{stage} ...")


@contextmanager
def show_progress(stage: str, *, as_json: bool) -> Iterator[ProgressDisplay]:
    """Show progress while the context is open; `stage` names the work before its first report."""
    has_bar = sys.stderr.isatty() and not as_json
    with output.progress_bar(stage) if has_bar else nullcontext() as bar:
        display = ProgressDisplay(as_json=as_json, bar=bar)
        display.start(stage)
        try:
            yield display
        finally:
            display.close()
