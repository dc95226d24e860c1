"""Sensors and the schedule. Their logic is in the modules for planning, dead runs, orphaned clusters and alerts."""

import dagster as dg

from ml_platform.assets.raw import raw_file_observation
from ml_platform.checks import feature_checks, intake_checks
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dataproc.orphans import delete_orphans
from ml_platform.jobs import process_new_files
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.resource import LakeResource
from ml_platform.operations.alerts import deliver_alerts
from ml_platform.operations.changes import SENSOR_NAME, ChangeReader
from ml_platform.operations.dead_runs import fail_dead_runs
from ml_platform.operations.destinations import build_destinations
from ml_platform.operations.shared_instance import shared_instance
from ml_platform.planning import log_plan, plan_runs, prepare, run_requests
from ml_platform.settings import AlertSettings
from ml_platform.spark.engine import SparkEngine

DAY_S = 24 * 60 * 60
REAPER_INTERVAL_S = 5 * 60
ALERT_INTERVAL_S = 60
#: Same interval as Dagster's run monitoring (run_monitoring in dagster.yaml).
DEAD_RUNS_INTERVAL_S = 30


@dg.sensor(
    job=process_new_files,
    minimum_interval_seconds=DAY_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Registers new raw files once a day and starts runs for those without a cleaned counterpart.",
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
    description="Same as the sensor new_raw_files, at a fixed hour. Enable only one of the two.",
)
def process_new_files_daily(
    context: dg.ScheduleEvaluationContext, lake: LakeResource
) -> list[dg.RunRequest] | dg.SkipReason:
    plan = plan_runs(context.instance, lake)
    log_plan(lambda: context.log, plan)
    prepare(context.instance, plan)
    return run_requests(plan) or dg.SkipReason(plan.reason)


@dg.sensor(
    minimum_interval_seconds=DEAD_RUNS_INTERVAL_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reports runs whose process died as failed, so that the queue continues and Dagster can retry them.",
)
def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Evaluated in the code server, and so on the host of the run processes."""
    dead = fail_dead_runs(shared_instance(context))
    for run_id in dead:
        context.log.warning(f"reported run {run_id} as failed: its process died")
    return dg.SkipReason(f"reported as failed: {', '.join(dead)}" if dead else "no run's process has died")


def build_orphaned_clusters(default_status: dg.DefaultSensorStatus) -> dg.SensorDefinition:
    """Create the sensor ``orphaned_clusters``, enabled by default in deployments that use clusters.

    It requests deletions itself instead of in a run, which would be queued behind the run that left the cluster.
    """

    @dg.sensor(
        minimum_interval_seconds=REAPER_INTERVAL_S,
        default_status=default_status,
        description="Deletes clusters whose run has ended or is unknown, or whose lifetime is over. Starts no run.",
    )
    def orphaned_clusters(context: dg.SensorEvaluationContext, spark: dg.ResourceParam[SparkEngine]) -> dg.SkipReason:
        if not isinstance(spark, DataprocEngine):
            return dg.SkipReason("this deployment does not use clusters (ML_PLATFORM_DEPLOYMENT)")
        return dg.SkipReason(delete_orphans(context.instance, spark, lambda: context.log))

    return orphaned_clusters


#: Checks that stop files: each file has a state of its own.
FILE_CHECKS = frozenset([*intake_checks.check_keys, *feature_checks.check_keys])


def build_report_failed_runs(settings: AlertSettings, ui_url: str | None) -> dg.SensorDefinition:
    """Create the sensor ``report_failed_runs``, enabled by default if alerts have a destination."""

    @dg.sensor(
        name=SENSOR_NAME,
        minimum_interval_seconds=ALERT_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.has_destination else dg.DefaultSensorStatus.STOPPED,
        description="Tells operators what changed: failed runs, checks, freshness, the champion, failing sensors, "
        "clusters that cannot be deleted (ML_PLATFORM_ALERT_...). Starts no run.",
    )
    def report_failed_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        if not settings.has_destination:
            return dg.SkipReason(
                "no destination: set ML_PLATFORM_ALERT_EMAIL_TO, ML_PLATFORM_ALERT_WEBHOOK_URL or "
                "ML_PLATFORM_ALERT_APPRISE_FILE"
            )
        reader = ChangeReader(shared_instance(context), ui_url=ui_url, kinds=settings.on, per_partition=FILE_CHECKS)
        delivery = deliver_alerts(reader, build_destinations(settings), context.cursor)
        # Log failures instead of raising: a failed tick would not save the cursor.
        for failure in delivery.failures:
            context.log.error(failure)
        context.update_cursor(delivery.cursor)
        return dg.SkipReason("; ".join([*delivery.done, *delivery.failures]) or "nothing to report")

    return report_failed_runs
