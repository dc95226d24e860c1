"""What starts runs: the sensor ``new_raw_files`` and its twin on a fixed hour, ``process_new_files_daily``.
And what clears up after killed ones: the sensors ``dead_runs`` and ``orphaned_clusters``. And what tells people of
failed ones: ``report_failed_runs``.

The lake decides what is cleaned, not Dagster's memory: a file needs a run when the lake has no report of it as it is
now. Dagster's memory only adds what a failed run left unfinished, and keeps two runs off the same file.
"""

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from logging import Logger

import dagster as dg

from ml_platform.assets.cleaned import is_cleaned
from ml_platform.assets.outcomes import some_of
from ml_platform.assets.raw import raw_file_observation
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dataproc.orphans import delete_orphans
from ml_platform.jobs import process_new_files, run_config
from ml_platform.lake.partitions import contiguous_ranges, keys_of_run, range_tags, raw_files
from ml_platform.lake.resource import CLEANED, LakeResource, RawFile
from ml_platform.operations.alerts import AlertError, Destination, FailedRun, describe_failed_run
from ml_platform.operations.dead_runs import fail_dead_runs
from ml_platform.settings import SettingsError
from ml_platform.spark.engine import SparkEngine

DAY_S = 24 * 60 * 60
REAPER_INTERVAL_S = 5 * 60
ALERT_INTERVAL_S = 60
#: As often as Dagster's own monitoring looks (run_monitoring in dagster.yaml).
DEAD_RUNS_INTERVAL_S = 30

#: Failed runs that one message tells of; the next tick tells of the next.
RUNS_PER_ALERT = 25

#: Runs of the past that are looked at for unfinished work.
REMEMBERED_RUNS = 200

#: A run that has shown no end for so long is not waited for: its process died unseen.
LONGEST_RUN = timedelta(days=1)

#: Dagster's daemon retries a run within seconds (run_retries in dagster.yaml); after so long there is none that would.
RETRY_WITHIN = timedelta(minutes=5)

_WAITING = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED]
_RUNNING = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


@dataclass(frozen=True)
class Plan:
    """What there is to do: partitions to register, ranges to run, and the reason in one sentence."""

    new_partitions: list[str]
    ranges: list[tuple[str, str]]
    files: list[RawFile]
    ignored: dict[str, str]
    reason: str


def plan_runs(instance: dg.DagsterInstance, lake: LakeResource) -> Plan:
    """Compare the raw files with the lake.

    A run is wanted per contiguous range of files without a cleaned counterpart, and per range of cleaned files
    whose last run failed afterwards; never for a file that a queued or running run already covers. The two are
    apart, so that a file that cannot be cleaned does not hold up others for ever.
    """
    dead = fail_dead_runs(instance)
    files, ignored = lake.list_raw_files()
    reports, outdated = lake.split_reports(CLEANED)
    registered = list(instance.get_dynamic_partitions(str(raw_files.name)))
    known = set(registered)
    new = [key for key in files if key not in known]
    order = registered + new

    uncleaned = {key for key, file in files.items() if not is_cleaned(reports.get(key), file, lake.epoch)}
    unfinished = set(_partitions_of_failed_runs(instance, order)) & set(files) - uncleaned
    active = set(_partitions_of_active_runs(instance, order))
    ranges = contiguous_ranges(uncleaned - active, order) + contiguous_ranges(unfinished - active, order)

    wanted = sorted((uncleaned | unfinished) - active)
    parts = [f"{len(files)} raw files"]
    if ranges:
        parts.append(f"{len(uncleaned - active)} without a cleaned counterpart")
        if unfinished - active:
            parts.append(f"{len(unfinished - active)} left unfinished by a failed run")
    elif not uncleaned | unfinished:
        parts.append("every one has a cleaned counterpart")
    if active & (uncleaned | unfinished):
        parts.append(f"{len(active & (uncleaned | unfinished))} are in a queued or running run")
    if dead:
        parts.append(f"{len(dead)} runs reported as failed because their process died")
    if stranded := sorted(outdated.keys() - files.keys()):
        parts.append(
            f"{len(stranded)} of an older version are left out, for their raw files are gone "
            f"(see ml-platform migrate): {some_of(stranded)}"
        )
    if ignored:
        parts.append(f"{len(ignored)} ignored for their names: {some_of(sorted(ignored))}")
    return Plan(new, ranges, [files[key] for key in wanted], ignored, ", ".join(parts))


def has_active_runs(instance: dg.DagsterInstance) -> bool:
    """Whether a run may still write to the lake, or is about to."""
    return bool(instance.get_runs(dg.RunsFilter(statuses=[*_WAITING, *_RUNNING]), limit=1))


def _partitions_of_active_runs(instance: dg.DagsterInstance, order: list[str]) -> Iterable[str]:
    oldest = datetime.now(timezone.utc) - LONGEST_RUN
    waiting, running = dg.RunsFilter(statuses=_WAITING), dg.RunsFilter(statuses=_RUNNING, updated_after=oldest)
    for run in [*instance.get_runs(waiting), *instance.get_runs(running), *_runs_to_be_retried(instance)]:
        yield from keys_of_run(run.tags, order)


def _runs_to_be_retried(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Failed runs that Dagster's daemon is about to start again: one of a command line it cannot."""
    since = datetime.now(timezone.utc) - RETRY_WITHIN
    failed = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=since))
    return [run for run in failed if run.is_complete_and_waiting_to_retry and run.remote_job_origin]


def _partitions_of_failed_runs(instance: dg.DagsterInstance, order: list[str]) -> Iterable[str]:
    """Partitions whose last ended run of `process_new_files` did not succeed."""
    settled: set[str] = set()
    runs = dg.RunsFilter(job_name=process_new_files.name, statuses=_ENDED)
    for record in instance.get_run_records(runs, limit=REMEMBERED_RUNS):  # newest first
        keys = set(keys_of_run(record.dagster_run.tags, order)) - settled
        if record.dagster_run.status != dg.DagsterRunStatus.SUCCESS:
            yield from keys
        settled |= keys


def prepare(instance: dg.DagsterInstance, plan: Plan) -> None:
    """Register the plan's new partitions, and record what its raw files are now.

    That comes before the runs: Dagster calls an asset stale whose input was observed while it was made.
    """
    instance.add_dynamic_partitions(str(raw_files.name), plan.new_partitions)
    for file in plan.files:
        instance.report_runless_asset_event(raw_file_observation(file))


def run_requests(plan: Plan) -> list[dg.RunRequest]:
    """One run per range of the plan."""
    config = run_config() if plan.ranges else {}
    return [dg.RunRequest(tags=range_tags(start, end), run_config=config) for start, end in plan.ranges]


def log_plan(get_log: Callable[[], Logger], plan: Plan) -> None:
    """Say what the runs come from, and name the raw files that no partition can stand for.

    With neither, `get_log` is not called: the log of a tick is a file, which Dagster keeps for ever, and a skipped
    tick has its reason anyway.
    """
    for name, reason in plan.ignored.items():
        get_log().warning(f"ignored raw file {name!r}: {reason}")
    if plan.ranges:
        get_log().info(plan.reason)


@dg.sensor(
    job=process_new_files,
    minimum_interval_seconds=DAY_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Once a day: registers new raw files and starts a run for those without a cleaned counterpart.",
)
def new_raw_files(context: dg.SensorEvaluationContext, lake: LakeResource) -> dg.SensorResult:
    plan = plan_runs(context.instance, lake)
    log_plan(lambda: context.log, plan)
    requests = run_requests(plan)
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else plan.reason,
        dynamic_partitions_requests=[raw_files.build_add_request(plan.new_partitions)] if plan.new_partitions else [],
        asset_events=[raw_file_observation(file) for file in plan.files],
    )


@dg.schedule(
    job=process_new_files,
    cron_schedule="0 6 * * *",
    execution_timezone="UTC",
    description="What the sensor new_raw_files does, at a fixed hour. Turn one of the two on.",
)
def process_new_files_daily(
    context: dg.ScheduleEvaluationContext, lake: LakeResource
) -> list[dg.RunRequest] | dg.SkipReason:
    plan = plan_runs(context.instance, lake)
    log_plan(lambda: context.log, plan)
    prepare(context.instance, plan)
    return run_requests(plan) or dg.SkipReason(plan.reason)


#: Dagster's storage as it is open, after what it was opened by; see `lasting_instance`.
_opened: list[tuple[object, dg.DagsterInstance]] = []
_opening = threading.Lock()


def lasting_instance(context: dg.SensorEvaluationContext) -> dg.DagsterInstance:
    """Dagster's storage, opened once for all ticks of the code server that often tick.

    Each tick opens `context.instance` anew. With SQLite, Dagster then has alembic look for its scripts, which each time
    registers something to be done at the end of the process: memory that only its end gives back.
    """
    ref = context.instance_ref
    if ref is None:  # a test brings its own
        return context.instance
    with _opening:  # sensors tick in threads
        found = next((instance for opened_by, instance in _opened if opened_by == ref), None)
        if found is None:
            found = dg.DagsterInstance.from_ref(ref)
            _opened[:] = [(ref, found)]
    return found


@dg.sensor(
    minimum_interval_seconds=DEAD_RUNS_INTERVAL_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reports runs as failed whose process died, so that the queue goes on and Dagster can retry them.",
)
def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Evaluated where the code is, and so where the processes of the runs are."""
    dead = fail_dead_runs(lasting_instance(context))
    for run_id in dead:
        context.log.warning(f"reported run {run_id} as failed: its process died")
    return dg.SkipReason(f"reported as failed: {', '.join(dead)}" if dead else "no run's process has died")


def build_orphaned_clusters(default_status: dg.DefaultSensorStatus) -> dg.SensorDefinition:
    """The sensor ``orphaned_clusters``, which is on by default where clusters are made.

    It asks for deletions itself: a run would wait in the queue behind the very run whose cluster is left over.
    """

    @dg.sensor(
        minimum_interval_seconds=REAPER_INTERVAL_S,
        default_status=default_status,
        description="Deletes clusters whose run has ended, is unknown, or is past their lifetime. Starts no run.",
    )
    def orphaned_clusters(context: dg.SensorEvaluationContext, spark: dg.ResourceParam[SparkEngine]) -> dg.SkipReason:
        if not isinstance(spark, DataprocEngine):
            return dg.SkipReason("this deployment makes no clusters (ML_PLATFORM_DEPLOYMENT)")
        return dg.SkipReason(delete_orphans(context.instance, spark, lambda: context.log))

    return orphaned_clusters


def build_report_failed_runs(destinations: Sequence[Destination], ui_url: str | None) -> dg.SensorDefinition:
    """The sensor ``report_failed_runs``, which is on by default where there is somebody to tell.

    Dagster's own run failure sensors count a run as reported even if the report raised. This one keeps, per
    destination, how far the reports were delivered, and goes on from there at the next tick.
    """

    @dg.sensor(
        minimum_interval_seconds=ALERT_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING if destinations else dg.DefaultSensorStatus.STOPPED,
        description="Reports failed runs by e-mail or webhook (ML_PLATFORM_ALERT_...). Starts no run.",
    )
    def report_failed_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        if not destinations:
            return dg.SkipReason("nobody to tell: set ML_PLATFORM_ALERT_EMAIL_TO or ML_PLATFORM_ALERT_WEBHOOK_URL")
        delivered = _delivered(context.cursor)
        instance = lasting_instance(context)
        newest = _newest_failure(instance)
        done, troubles = [], []
        for destination in destinations:
            name = destination.name
            # A new destination starts with what fails from now on. Ids start anew where all runs were deleted.
            delivered[name] = min(delivered.get(name, newest), newest)
            try:
                runs, last = _failed_runs(instance, delivered[name], ui_url)
                if runs:
                    destination.send(runs)
                    done.append(f"{name}: {len(runs)} failed runs reported")
                delivered[name] = last
            except Exception as error:
                # Of any kind: the trouble of one destination must not repeat the messages of the other.
                known = isinstance(error, (AlertError, SettingsError))
                troubles.append(f"{name}: {error}" if known else f"{name}: {type(error).__name__}")
        cursor = json.dumps(delivered, sort_keys=True)
        if troubles and cursor == context.cursor:
            raise AlertError(f"{'; '.join(troubles)}. The next tick tries again.")
        # A failed tick would not keep the cursor, so here there is none.
        for trouble in troubles:
            context.log.error(trouble)
        context.update_cursor(cursor)
        return dg.SkipReason("; ".join([*done, *troubles]) or "no run has failed")

    return report_failed_runs


def _delivered(cursor: str | None) -> dict[str, int]:
    try:
        found = json.loads(cursor or "{}")
    except ValueError:
        return {}
    return {name: last for name, last in found.items() if type(last) is int} if isinstance(found, dict) else {}


def _newest_failure(instance: dg.DagsterInstance) -> int:
    records = instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1).records
    return records[0].storage_id if records else 0


def _failed_runs(instance: dg.DagsterInstance, after: int, ui_url: str | None) -> tuple[list[FailedRun], int]:
    """The next failed runs after an event, and the last event that was looked at. A deleted run is left out."""
    newer = dg.RunStatusChangeRecordsFilter(dg.DagsterEventType.RUN_FAILURE, after_storage_id=after)
    records = instance.fetch_run_status_changes(newer, limit=RUNS_PER_ALERT, ascending=True).records
    found = []
    for record in records:
        event = record.event_log_entry
        if run := instance.get_run_by_id(event.run_id):
            found.append(describe_failed_run(instance, event, run, ui_url))
    return found, records[-1].storage_id if records else after
