"""Shows on stderr how far long work has come: a bar on a terminal, else a line now and then, with --json as JSON."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ...domains.progress import Progress
from . import output
from .progress import Pace

QUIET_S = 2.0  # nobody is left waiting for longer without a word


class Watch:
    """Takes reports from the library and shows them; made by `watch`."""

    def __init__(self, *, as_json: bool, bar: output.Bar | None):
        self._as_json = as_json
        self._bar = bar
        self._pace = Pace()
        self._timer: threading.Timer | None = None
        self._has_said = False

    def wait(self, text: str) -> None:
        """Begins something that does not tell how far it has come."""
        self._rest()
        if self._bar:
            self._bar.restart(text)
            return
        self._timer = threading.Timer(QUIET_S, self._tell_stage, [text])
        self._timer.daemon = True
        self._timer.start()

    def on_progress(self, progress: Progress) -> None:
        """What the library is given to report to."""
        if not progress.total:
            self.wait(progress.stage)
            return
        self._rest()
        is_due = self._pace.follow(progress)
        if self._bar:
            figures = f"{progress.done:,}/{progress.total:,}  {self._pace.figures(progress)}"
            self._bar.move(progress.stage, progress.done, progress.total, figures)
        elif is_due and self._as_json:
            output.tell_json(self._pace.record(progress))
        elif is_due:
            output.tell(self._pace.line(progress))

    def say(self, text: str) -> None:
        """A line that stays: what has been reached."""
        self._rest()
        if self._bar:
            self._bar.say(text)
            self._has_said = True
        elif not self._as_json:
            output.tell(text)

    def close(self) -> None:
        """Ends it all; the result stands apart from what was said."""
        self._rest()
        if self._bar and self._has_said:
            self._bar.say("")

    def _rest(self) -> None:
        """Ends what `wait` began."""
        if self._timer:
            self._timer.cancel()

    def _tell_stage(self, stage: str) -> None:
        if self._as_json:
            output.tell_json({"progress": {"stage": stage}})
        else:
            output.tell(f"{stage} ...")


@contextmanager
def watch(waiting: str, *, as_json: bool) -> Iterator[Watch]:
    """Watches long work while it is open; `waiting` says what comes before its first report."""
    is_drawn = sys.stderr.isatty() and not as_json
    with output.bar(waiting) if is_drawn else nullcontext() as bar:
        watching = Watch(as_json=as_json, bar=bar)
        watching.wait(waiting)
        try:
            yield watching
        finally:
            watching.close()
