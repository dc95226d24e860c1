"""Planning of runs: raw files without a cleaned counterpart, and work that a failed run left unfinished.

The lake is the source of truth, not Dagster's run history: a file needs a run if the lake has no report of its current
content. The run history only adds unfinished work of failed runs, and prevents two runs on the same file.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from logging import Logger

import dagster as dg

from ml_platform.assets.cleaned import is_cleaned
from ml_platform.assets.outcomes import shorten_list
from ml_platform.assets.raw import raw_file_observation
from ml_platform.jobs import process_new_files, run_config
from ml_platform.lake.partitions import contiguous_ranges, keys_of_run, range_tags, raw_files
from ml_platform.lake.reports import CleanedReport
from ml_platform.lake.resource import LakeResource, RawFile
from ml_platform.operations.dead_runs import fail_dead_runs

#: Number of most recent finished runs searched for unfinished work.
RUN_HISTORY_LIMIT = 200

#: A run without a status change for this long is ignored: its process must have died.
MAX_RUN_TIME = timedelta(days=1)

#: Dagster's daemon retries a run within seconds (run_retries in dagster.yaml); after this time it will not.
RETRY_WINDOW = timedelta(minutes=5)

_WAITING = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED]
_RUNNING = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


@dataclass(frozen=True)
class Plan:
    """Work to do: partitions to register, ranges to run, and the reason in one sentence."""

    new_partitions: list[str]
    ranges: list[tuple[str, str]]
    files: list[RawFile]
    ignored: dict[str, str]
    reason: str


def plan_runs(instance: dg.DagsterInstance, lake: LakeResource) -> Plan:
    """Compare the raw files with the lake.

    One run is planned per contiguous range of files without a cleaned counterpart, and one per range of cleaned
    files whose last run failed later; never for a file that a queued or running run covers. The two kinds are
    separate, so that a file that cannot be cleaned does not block others forever.
    """
    dead = fail_dead_runs(instance)
    files, ignored = lake.list_raw_files()
    reports, outdated = lake.split_reports(CleanedReport)
    registered = list(instance.get_dynamic_partitions(str(raw_files.name)))
    known = set(registered)
    new = [key for key in files if key not in known]
    order = registered + new

    uncleaned = {key for key, file in files.items() if not is_cleaned(reports.get(key), file, lake.epoch)}
    unfinished = set(_partitions_of_failed_runs(instance, order)) & set(files) - uncleaned
    active = set(_partitions_of_active_runs(instance, order))
    ranges = contiguous_ranges(uncleaned - active, order) + contiguous_ranges(unfinished - active, order)

    pending = sorted((uncleaned | unfinished) - active)
    parts = [f"{len(files)} raw files"]
    if ranges:
        parts.append(f"{len(uncleaned - active)} without a cleaned counterpart")
        if unfinished - active:
            parts.append(f"{len(unfinished - active)} left unfinished by a failed run")
    elif not uncleaned | unfinished:
        parts.append("all have a cleaned counterpart")
    if active & (uncleaned | unfinished):
        parts.append(f"{len(active & (uncleaned | unfinished))} are in a queued or running run")
    if dead:
        parts.append(f"{len(dead)} runs reported as failed because their process died")
    if unrecoverable := sorted(outdated.keys() - files.keys()):
        parts.append(
            f"{len(unrecoverable)} of an older version are left out, because their raw files are gone "
            f"(see ml-platform migrate): {shorten_list(unrecoverable)}"
        )
    if ignored:
        parts.append(f"{len(ignored)} ignored for their names: {shorten_list(sorted(ignored))}")
    return Plan(new, ranges, [files[key] for key in pending], ignored, ", ".join(parts))


def has_active_runs(instance: dg.DagsterInstance) -> bool:
    """Return True if any run is queued or running, and so may write to the lake."""
    return bool(instance.get_runs(dg.RunsFilter(statuses=[*_WAITING, *_RUNNING]), limit=1))


def _partitions_of_active_runs(instance: dg.DagsterInstance, order: list[str]) -> Iterable[str]:
    oldest = datetime.now(timezone.utc) - MAX_RUN_TIME
    waiting, running = dg.RunsFilter(statuses=_WAITING), dg.RunsFilter(statuses=_RUNNING, updated_after=oldest)
    for run in [*instance.get_runs(waiting), *instance.get_runs(running), *_runs_to_be_retried(instance)]:
        yield from keys_of_run(run.tags, order)


def _runs_to_be_retried(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Failed runs that Dagster's daemon will retry; it cannot retry runs started from a command line."""
    since = datetime.now(timezone.utc) - RETRY_WINDOW
    failed = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=since))
    return [run for run in failed if run.is_complete_and_waiting_to_retry and run.remote_job_origin]


def _partitions_of_failed_runs(instance: dg.DagsterInstance, order: list[str]) -> Iterable[str]:
    """Partitions whose last finished run of `process_new_files` did not succeed."""
    seen: set[str] = set()
    runs = dg.RunsFilter(job_name=process_new_files.name, statuses=_ENDED)
    for record in instance.get_run_records(runs, limit=RUN_HISTORY_LIMIT):  # newest first
        keys = set(keys_of_run(record.dagster_run.tags, order)) - seen
        if record.dagster_run.status != dg.DagsterRunStatus.SUCCESS:
            yield from keys
        seen |= keys


def prepare(instance: dg.DagsterInstance, plan: Plan) -> None:
    """Register the plan's new partitions and record observations of its raw files.

    Must precede the runs: Dagster considers an asset stale if its input was observed during its materialization.
    """
    instance.add_dynamic_partitions(str(raw_files.name), plan.new_partitions)
    for file in plan.files:
        instance.report_runless_asset_event(raw_file_observation(file))


def run_requests(plan: Plan) -> list[dg.RunRequest]:
    """Create one run request per range of the plan."""
    config = run_config() if plan.ranges else {}
    return [dg.RunRequest(tags=range_tags(start, end), run_config=config) for start, end in plan.ranges]


def log_plan(get_log: Callable[[], Logger], plan: Plan) -> None:
    """Log the reason for the runs, and the raw files that were ignored.

    If there are neither, `get_log` is not called: it creates a log file for the tick, which Dagster keeps forever, and
    a skipped tick shows its reason anyway.
    """
    for name, reason in plan.ignored.items():
        get_log().warning(f"ignored raw file {name!r}: {reason}")
    if plan.ranges:
        get_log().info(plan.reason)
