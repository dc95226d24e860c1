"""Display of a run: a progress bar for each asset, or lines where there is no terminal, and the run's warnings.

All else is for the run's page in Dagster's UI: the whole log, and what Java and Python workers print, as compute logs.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from rich.progress import BarColumn, Progress, TextColumn

from ml_platform.cli.context import console, errors, plain
from ml_platform.escaping import printable
from ml_platform.operations.changes import error_line

#: Name of the line for the steps that are not assets.
CHECKS = "asset checks"

#: Part of an asset's bar for its Spark job; the rest is for what its step does afterwards.
SHARE_OF_JOB = 0.9


def execute_with_display(
    job: dg.JobDefinition, instance: dg.DagsterInstance, assets: list[str], output: Path, **options: Any
) -> dg.ExecuteInProcessResult:
    """Execute a job in this process, and show its progress.

    `assets` are the steps with a line of their own, in the order of the lines. What is printed outside of a step goes
    to the file `output`. `options` are those of ``JobDefinition.execute_in_process``.
    """
    with _output_to(output), _RunDisplay([*assets, CHECKS]) as display:

        @dg.logger
        def display_logger(_: dg.InitLoggerContext) -> logging.Logger:
            logger = logging.Logger("ml_platform.display")
            logger.addHandler(_Handler(display.show_event))
            return logger

        shown = job.with_logger_defs({"console": display_logger})
        others = [node.name for node in job.nodes if node.name not in assets]
        display.lines[CHECKS].steps = others
        # Dagster uses no logger that the run config does not name, unless the repository has it as a default.
        options["run_config"] = {**(options.get("run_config") or {}), "loggers": {"console": {}}}
        return shown.execute_in_process(instance=instance, **options)


class _Handler(logging.Handler):
    """Passes records to a function."""

    def __init__(self, function: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._function = function

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._function(record)
        except Exception:
            self.handleError(record)


class _Line:
    """State of one line: an asset, or all checks."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, [name]
        self.started: float | None = None
        self.ended = 0
        self.share = 0.0
        self.result = "done"


class _RunDisplay:
    """Context manager that shows the steps of one run."""

    def __init__(self, names: list[str]) -> None:
        self.lines = {name: _Line(name) for name in names}
        self._width = max(map(len, names))
        self._current: _Line | None = None
        self._bars: Progress | None = None
        self._tasks: Mapping[str, Any] = {}
        self._handler = _Handler(self.show_progress)

    def __enter__(self) -> _RunDisplay:
        if console.is_terminal:
            self._bars = Progress(
                TextColumn(f"{{task.description:<{self._width}}}"),
                BarColumn(20),
                TextColumn("{task.fields[detail]}"),
                console=console,
                # Else it would show what libraries print.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._tasks = {name: self._bars.add_task(name, total=1.0, detail="") for name in self.lines}
            self._bars.start()
        logger = logging.getLogger("spark_jobs")
        self._level = logger.level
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("spark_jobs")
        logger.removeHandler(self._handler)
        logger.setLevel(self._level)
        if self._bars is not None:
            self._bars.stop()

    def show_event(self, record: logging.LogRecord) -> None:
        """Show the beginning and end of a step, and warnings of the run."""
        meta: Mapping[str, Any] = getattr(record, "dagster_meta", {})
        event, step = meta.get("dagster_event"), meta.get("step_key")
        line = next((line for line in self.lines.values() if step in line.steps), None)
        if event is None:
            if record.levelno >= logging.WARNING:
                message = printable(meta.get("orig_message") or record.getMessage())
                console.print(plain(f"{step}: {message}" if step else message, "yellow"))
        elif line is not None and event.event_type == dg.DagsterEventType.STEP_START:
            self._current = line
            line.started = line.started or time.monotonic()
            self._draw(line, "running", is_milestone=False)
        elif line is not None and event.is_step_failure:
            console.print(plain(f"{step}: {printable(error_line(event.step_failure_data.error))}", "red"))
            self._end_step(line, "failed")
        elif line is not None and event.is_step_skipped:
            self._end_step(line, "skipped")
        elif line is not None and event.is_step_success:
            self._end_step(line, "done")

    def _end_step(self, line: _Line, result: str) -> None:
        line.ended += 1
        if result != "done" and line.result != "failed":
            line.result = result
        if line.ended < len(line.steps):
            self._draw(line, f"{line.ended} of {len(line.steps)}", is_milestone=False)
            return
        line.share = 1.0 if line.result == "done" else line.share
        after = f" in {time.monotonic() - line.started:.0f} s" if line.started is not None else ""
        self._draw(line, f"{line.result}{after}", is_milestone=True)

    def show_progress(self, record: logging.LogRecord) -> None:
        """Show the progress of a Spark job."""
        share = getattr(record, "share", None)
        if share is None or self._current is None:
            return
        line = self._current
        line.share = max(line.share, SHARE_OF_JOB * share)
        self._draw(line, record.getMessage(), is_milestone=record.levelno >= logging.INFO)

    def _draw(self, line: _Line, detail: str, *, is_milestone: bool) -> None:
        if self._bars is not None:
            self._bars.update(self._tasks[line.name], completed=line.share, detail=printable(detail))
        elif is_milestone:
            console.print(plain(f"{line.name:<{self._width}}  {detail}"))


@contextmanager
def _output_to(path: Path) -> Generator[None]:
    """Within it, what this process and its children print goes to a file, except through `console` and `errors`."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("wb"))
        for number, stream, output in ((1, sys.stdout, console), (2, sys.stderr, errors)):
            stream.flush()
            terminal = stack.enter_context(
                os.fdopen(os.dup(number), "w", encoding=stream.encoding, errors="backslashreplace")
            )
            stack.callback(_restore, number, stream, output, terminal.fileno())
            os.dup2(file.fileno(), number)
            output.file = terminal
        yield


def _restore(number: int, stream: Any, output: Any, terminal: int) -> None:
    stream.flush()
    output.file.flush()
    os.dup2(terminal, number)
    output.file = None  # whatever sys.stdout or sys.stderr is at the time
