"""Messages of alerts: what they consist of, and how they read.

Messages may be read by outsiders, so they contain one line of each error and never a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

#: Maximum length of a line of text from outside.
MAX_LINE_LENGTH = 500

#: Maximum number of runs and changes in a message, and of partitions listed in one of them.
MAX_ENTRIES = 25
MAX_LISTED = 25


@dataclass(frozen=True)
class FailedRun:
    """A failed run as shown in an alert.

    Attributes:
        steps: (failed step, first line of its error).
        stopped: partitions that checks of a failed step stopped, with the checks and their reasons; at most
            `MAX_LISTED` of `stopped_count`.
    """

    run_id: str
    job: str
    partitions: str
    failed_at: str
    reason: str
    steps: list[tuple[str, str]]
    url: str | None
    stopped: dict[str, str] = field(default_factory=dict)
    stopped_count: int = 0


@dataclass(frozen=True)
class Change:
    """Anything but a failed run that an alert reports: `title` says what changed, `lines` say more.

    `state` is ``bad``, ``good`` (again), or ``new`` for changes that are neither.
    """

    kind: str
    state: str
    title: str
    lines: list[str]
    at: str
    url: str | None = None


@dataclass
class Message:
    """One message to one destination."""

    runs: list[FailedRun] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.runs) + len(self.changes)

    @property
    def is_full(self) -> bool:
        """True if the rest must wait for the next message."""
        return len(self) >= MAX_ENTRIES

    @property
    def headline(self) -> str:
        """One-line summary."""
        runs, changes = self.runs, self.changes
        if not changes:
            return f"ml_platform: {_run_headline(runs[0]) if len(runs) == 1 else f'{len(runs)} runs failed'}"
        if runs:
            return f"ml_platform: {_count(len(runs), 'run')} failed, {_count(len(changes), 'other change')}"
        if len(changes) == 1:
            return f"ml_platform: {changes[0].title}"
        return f"ml_platform: {len(changes)} changes: {changes[0].title} …"

    def __str__(self) -> str:
        """The message as plain text."""
        return "\n\n".join([self.headline, *map(_run_text, self.runs), *map(_change_text, self.changes)]) + "\n"

    @property
    def summary(self) -> str:
        """What was reported, for the reason of a tick."""
        counts = ((len(self.runs), "failed run"), (len(self.changes), "change"))
        return f"{' and '.join(_count(number, noun) for number, noun in counts if number)} reported"


def one_line(text: str) -> str:
    """First non-blank line of `text`, without control characters, truncated to `MAX_LINE_LENGTH`."""
    lines = ("".join(char if char.isprintable() else " " for char in line).strip() for line in text.splitlines())
    line = next(filter(None, lines), "")
    return line if len(line) <= MAX_LINE_LENGTH else line[: MAX_LINE_LENGTH - 1] + "…"


def instant(timestamp: float) -> str:
    """A Unix timestamp as shown in alerts."""
    return datetime.fromtimestamp(timestamp, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def limited(lines: Sequence[str]) -> list[str]:
    """The first `MAX_LISTED` lines, and how many are left out."""
    return [*lines[:MAX_LISTED], *_rest(len(lines))]


def _rest(count: int) -> list[str]:
    return [f"and {count - MAX_LISTED} more"] if count > MAX_LISTED else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _run_headline(run: FailedRun) -> str:
    if run.stopped:
        return f"checks stopped {_count(run.stopped_count, 'partition')} of a run of {run.job} ({run.partitions})"
    return f"a run of {run.job} failed ({run.partitions})"


def _run_text(run: FailedRun) -> str:
    lines = [
        f"run:        {run.run_id}",
        f"job:        {run.job}",
        f"partitions: {run.partitions}",
        f"failed at:  {run.failed_at}",
        f"reason:     {run.reason}",
        *(f"step {step}: {error}" for step, error in run.steps),
        *(f"stopped {partition}: {reason}" for partition, reason in run.stopped.items()),
        *_rest(run.stopped_count),
    ]
    return "\n".join([*lines, run.url] if run.url else lines)


def _change_text(change: Change) -> str:
    lines = [change.title, *(f"  {line}" for line in change.lines), f"at: {change.at}"]
    return "\n".join([*lines, change.url] if change.url else lines)
