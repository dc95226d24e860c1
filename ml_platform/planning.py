"""Planning of runs: raw files without a cleaned counterpart, and work that a failed run left unfinished.

The lake is the source of truth, not Dagster's run history: a file needs a run if the lake has no report of its current
content. The run history only adds unfinished work of failed runs, and prevents two runs on the same file.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from logging import Logger
from typing import Any

import dagster as dg

from ml_platform.assets.cleaned import files_to_clean_again, is_cleaned
from ml_platform.assets.raw import raw_file_observation
from ml_platform.escaping import shorten_list
from ml_platform.jobs import process_new_files
from ml_platform.lake.partitions import contiguous_ranges, is_partition_key, keys_of_run, range_tags, raw_files
from ml_platform.lake.quality import QualityLimits, judge_files, problem_of_features
from ml_platform.lake.reports import CleanedReport, CleanedReports, FeaturesReport, FeaturesReports
from ml_platform.lake.resource import LakeResource, RawFile
from ml_platform.operations.dead_runs import fail_dead_runs
from ml_platform.run_config import run_config, run_limits

#: Number of most recent finished runs searched for unfinished work.
RUN_HISTORY_LIMIT = 200

#: A run without a status change for this long is ignored: its process must have died.
MAX_RUN_TIME = timedelta(days=1)

#: Dagster's daemon retries a run within seconds (run_retries in dagster.yaml); after this time it will not.
RETRY_WINDOW = timedelta(minutes=5)

#: Backup of all partition keys while `sort_partitions` rewrites them.
SAVED_PARTITIONS = "_partitions.json"

FRAUD_MODEL = dg.AssetKey("fraud_model")

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
    run_config: dict[str, Any]


def plan_runs(instance: dg.DagsterInstance, lake: LakeResource) -> Plan:
    """Compare the raw files with the lake, after reporting runs whose process died as failed.

    One run is planned per contiguous range of files without a cleaned counterpart, and one per range of cleaned
    files whose last run failed later; never for a file that a queued or running run covers, or that is stopped, refused
    or withdrawn. The two kinds are separate, so that a file that cannot be cleaned does not block others forever.
    """
    dead = fail_dead_runs(instance)
    config = run_config()
    files, ignored = lake.list_raw_files()
    withdrawn = sorted(files.keys() & set(lake.withdrawn()))
    for key in withdrawn:
        del files[key]
    registered = list(instance.get_dynamic_partitions(str(raw_files.name)))
    known = set(registered)
    new = [key for key in files if key not in known]
    order = registered + new

    reports, outdated = lake.split_reports(CleanedReport)
    uncleaned, left_out = _sort_out(lake, files, reports, lake.reports(FeaturesReport), run_limits(config))
    unfinished = set(_partitions_of_failed_runs(instance, order)) & set(files) - uncleaned - set(left_out)
    active = set(_partitions_of_active_runs(instance, order))
    ranges = contiguous_ranges(uncleaned - active, order) + contiguous_ranges(unfinished - active, order)
    pending = uncleaned | unfinished

    parts = [f"{len(files)} raw files"]
    if ranges:
        parts.append(f"{len(uncleaned - active)} without a cleaned counterpart")
        if unfinished - active:
            parts.append(f"{len(unfinished - active)} left unfinished by a failed run")
    elif not pending:
        parts.append("all others are done" if left_out else "all have a cleaned counterpart")
    if active & pending:
        parts.append(f"{len(active & pending)} are in a queued or running run")
    if dead:
        parts.append(f"{len(dead)} runs reported as failed because their process died")
    unrecoverable = sorted(outdated.keys() - files.keys())
    for keys, text in (
        ([f"{key}: {reason}" for key, reason in left_out.items()], "left out"),
        (withdrawn, "withdrawn"),
        (
            unrecoverable,
            "left out because they are of an older version and their raw files are gone (restore these; ml-platform "
            "migrate --dry-run lists them)",
        ),
        ([f"{name!r} ({why})" for name, why in ignored.items()], "ignored"),
    ):
        if keys:
            parts.append(f"{len(keys)} {text}: {shorten_list(keys)}")
    return Plan(new, ranges, [files[key] for key in sorted(pending - active)], ignored, ", ".join(parts), config)


def waiting_files(lake: LakeResource, cleaned: CleanedReports, features: FeaturesReports) -> list[str]:
    """Raw files without a cleaned counterpart, except those that are refused or withdrawn. Has no side effects."""
    files, _ = lake.list_raw_files()
    for key in lake.withdrawn():
        files.pop(key, None)
    uncleaned, _ = _sort_out(lake, files, cleaned, features, run_limits(run_config()))
    return sorted(uncleaned)


def _sort_out(
    lake: LakeResource,
    files: Mapping[str, RawFile],
    reports: CleanedReports,
    features: FeaturesReports,
    limits: QualityLimits,
) -> tuple[set[str], dict[str, str]]:
    """(the files to clean; those that stay out until they, a limit or a neighbour change, with the reason)."""
    refused = {
        key: file.reason
        for key, file in lake.uncleaned().items()
        if file.refused and key in files and key not in reports and file.version == files[key].version(lake.epoch)
    }
    uncleaned = {key for key, file in files.items() if not is_cleaned(reports.get(key), file, lake.epoch)}
    uncleaned |= files_to_clean_again(reports, features, limits) & set(files)
    uncleaned -= set(refused)
    unusable = {
        key: problem
        for key, report in features.items()
        if key in reports and key in files and (problem := problem_of_features(reports[key], report))
    }
    left_out = unusable | judge_files(reports, features, limits).stopped(files) | refused
    return uncleaned, {key: reason for key, reason in left_out.items() if key not in uncleaned}


def has_active_runs(instance: dg.DagsterInstance) -> bool:
    """Return True if any run or backfill is queued, running or about to be retried, and so may write to the lake."""
    from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus

    runs = instance.get_runs(dg.RunsFilter(statuses=[*_WAITING, *_RUNNING]), limit=1)
    backfills = instance.get_backfills(BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED]), limit=1)
    return bool(runs or backfills or _runs_to_be_retried(instance))


def sort_partitions(instance: dg.DagsterInstance, lake: LakeResource) -> str:
    """Put the partitions in order of their keys, as ranges expect them; returns what was done.

    Dagster keeps them in order of registration. It can only delete and add, so all keys are written to the lake first:
    after a kill in between, the next call adds what is missing.
    """
    name = str(raw_files.name)
    registered = list(instance.get_dynamic_partitions(name))
    try:
        saved = lake.read_json(SAVED_PARTITIONS)
    except (FileNotFoundError, ValueError, RecursionError):
        saved = []
    saved = saved if isinstance(saved, list) else []
    lost = [key for key in saved if isinstance(key, str) and is_partition_key(key) and key not in registered]
    ordered = sorted({*registered, *lost})
    if registered == ordered:
        return "partitions are in order"
    if has_active_runs(instance):
        instance.add_dynamic_partitions(name, lost)
        return "partitions are out of order and cannot be sorted while runs are queued or running: sync again later"
    lake.write_json(SAVED_PARTITIONS, ordered)
    kept = next((n for n, key in enumerate(registered) if key != ordered[n]), len(registered))
    for key in registered[kept:]:
        instance.delete_dynamic_partition(name, key)
    instance.add_dynamic_partitions(name, ordered[kept:])
    lake.store.delete(SAVED_PARTITIONS)
    return "partitions were put in order"


def active_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Runs that are queued, running or about to be retried; a running run without any update for a day is not."""
    oldest = datetime.now(timezone.utc) - MAX_RUN_TIME
    waiting, running = dg.RunsFilter(statuses=_WAITING), dg.RunsFilter(statuses=_RUNNING, updated_after=oldest)
    return [*instance.get_runs(waiting), *instance.get_runs(running), *_runs_to_be_retried(instance)]


def _partitions_of_active_runs(instance: dg.DagsterInstance, order: list[str]) -> Iterable[str]:
    for run in active_runs(instance):
        yield from keys_of_run(run.tags, order)


def _runs_to_be_retried(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Failed runs that Dagster's daemon will retry; it cannot retry runs started from a command line."""
    since = datetime.now(timezone.utc) - RETRY_WINDOW
    failed = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=since))
    return [run for run in failed if run.is_complete_and_waiting_to_retry and run.remote_job_origin]


def _partitions_of_failed_runs(instance: dg.DagsterInstance, order: list[str]) -> Iterable[str]:
    """Partitions that their last finished run of `process_new_files` did not get a model for."""
    seen: set[str] = set()
    runs = dg.RunsFilter(job_name=process_new_files.name, statuses=_ENDED)
    for record in instance.get_run_records(runs, limit=RUN_HISTORY_LIMIT):  # newest first
        run = record.dagster_run
        keys = set(keys_of_run(run.tags, order)) - seen
        seen |= keys
        if keys and run.status != dg.DagsterRunStatus.SUCCESS:
            # A run that left files out has failed, though it finished the others.
            events = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
            models = [log.dagster_event for log in events if log.dagster_event]
            yield from keys - {event.partition for event in models if event.asset_key == FRAUD_MODEL}


def prepare(instance: dg.DagsterInstance, plan: Plan) -> None:
    """Register the plan's new partitions and record observations of its raw files.

    Must precede the runs: Dagster considers an asset stale if its input was observed during its materialization.
    """
    instance.add_dynamic_partitions(str(raw_files.name), plan.new_partitions)
    for file in plan.files:
        instance.report_runless_asset_event(raw_file_observation(file))


def run_requests(plan: Plan) -> list[dg.RunRequest]:
    """Create one run request per range of the plan."""
    return [dg.RunRequest(tags=range_tags(start, end), run_config=plan.run_config) for start, end in plan.ranges]


def log_plan(get_log: Callable[[], Logger], plan: Plan) -> None:
    """Log the reason for the runs, and the raw files that were ignored.

    If there are neither, `get_log` is not called: it creates a log file for the tick, which Dagster keeps forever, and
    a skipped tick shows its reason anyway.
    """
    for name, reason in plan.ignored.items():
        get_log().warning(f"ignored raw file {name!r}: {reason}")
    if plan.ranges:
        get_log().info(plan.reason)
