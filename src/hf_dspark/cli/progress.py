"""The progress of a long run on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_BAR_SECONDS = 0.5
_LINE_SECONDS = 60.0


class RunBar:
    """A bar with a note and the time left; where stderr is no terminal, a line a minute.

    Args:
        what (`str`): first word of the line.
        silent (`bool`): show nothing.
    """

    def __init__(self, what: str, *, silent: bool = False) -> None:
        self.console = Console(stderr=True)
        self.lines = not self.console.is_terminal
        self.what, self.silent = what, silent
        columns = (TextColumn(what + " {task.fields[note]}"), BarColumn(), TextColumn("{task.percentage:>4.1f}%"), TimeElapsedColumn())
        # The time left follows the last quarter of an hour: the first responses to finish are short ones.
        left = TimeRemainingColumn(elapsed_when_finished=True)
        self.bar = Progress(*columns, left, console=self.console, speed_estimate_period=900, disable=self.lines or silent)
        self.task = self.bar.add_task(what, total=None, note="")
        self._first: tuple[float, float] | None = None
        self._shown = 0.0

    def __enter__(self) -> RunBar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, done: float, total: float, note: str) -> None:
        """Show how much of `total` is done; what was done before the first call says nothing about the speed."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
            self.bar.reset(self.task, total=total)
            self.bar.update(self.task, completed=done)
        if done < total and now - self._shown < (_LINE_SECONDS if self.lines else _BAR_SECONDS):
            return
        self._shown = now
        self.bar.update(self.task, completed=done, total=total, note=note)
        if self.lines and not self.silent:
            begin, before = self._first
            left = f", {(now - begin) * (total - done) / (done - before) / 60:.0f} min left" if done > before else ""
            print(f"{self.what} {done / (total or 1):.1%}, {note}{left}", file=sys.stderr, flush=True)

    def print(self, line: str) -> None:
        """Show a line above the bar."""
        if not self.silent:
            self.console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A `RunBar` over so many steps; yields a function of the steps just done."""
    done = 0
    with RunBar(what, silent=not show) as bar:

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            bar.update(done, total, f"{done} of {total}")

        yield advance
