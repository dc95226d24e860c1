"""Composition root: settings → resources → ``defs``."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import dagster as dg
from dagster_shared.libraries import DagsterLibraryRegistry

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.features import transaction_features
from ml_platform.assets.model import fraud_model
from ml_platform.assets.raw import raw_transactions
from ml_platform.assets.scores import scored_transactions
from ml_platform.checks import ASSET_CHECKS
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.jobs import delete_orphaned_clusters, process_new_files
from ml_platform.lake.quality import QualityLimits
from ml_platform.lake.resource import LakeResource
from ml_platform.model.mlflow import MlflowResource
from ml_platform.operations.console_logger import console_logger
from ml_platform.sensors import (
    build_orphaned_clusters,
    build_report_failed_runs,
    dead_runs,
    new_raw_files,
    process_new_files_daily,
)
from ml_platform.settings import (
    ClusterOptions,
    ClusterSpec,
    Settings,
    load_alert_settings,
    load_cluster_settings,
    load_settings,
)
from ml_platform.spark.engine import LocalSparkEngine, SparkEngine
from ml_platform.version import PLATFORM_VERSION


def build_engine(settings: Settings) -> SparkEngine:
    """Create the Spark engine of the deployment."""
    if settings.deployment == "local":
        return LocalSparkEngine(
            master=settings.spark_master,
            driver_memory=settings.spark_driver_memory,
            spark_config=settings.spark_properties,
            with_s3=any(uri.startswith("s3://") for uri in (settings.raw_uri, settings.lake_uri)),
        )
    cluster = load_cluster_settings()
    return DataprocEngine(
        deployment=settings.deployment_name or settings.deployment,
        lake_uri=settings.lake_uri,
        cluster=cluster.model_dump(include=set(ClusterSpec.model_fields)),
        **cluster.model_dump(include=set(ClusterOptions.model_fields), exclude={"iam_token"}),
        # An EnvVar, so that Dagster's UI shows the variable's name and not the token.
        iam_token=dg.EnvVar("YC_IAM_TOKEN") if cluster.iam_token else None,
    )


def build_resources(settings: Settings) -> dict[str, dg.ConfigurableResource]:
    """Create the resources; their keys are the same in every deployment."""
    return {
        "lake": LakeResource.from_settings(settings),
        "spark": build_engine(settings),
        "mlflow": MlflowResource(
            # An EnvVar if set: the URI may contain a password, and Dagster's UI shows plain values.
            tracking_uri=dg.EnvVar("MLFLOW_TRACKING_URI") if settings.mlflow_tracking_uri else settings.tracking_uri,
            artifact_root=settings.artifact_root,
            ui_url=settings.mlflow_ui_url,
        ),
        "limits": QualityLimits(),
    }


#: Allowance for the sensor's daily interval and the run itself.
FRESHNESS_SLACK_DAYS = 2


def freshness_policy(files_every_days: int) -> dg.FreshnessPolicy:
    """Freshness policy: WARN when the next file is overdue, FAIL when the one after it is overdue, too."""
    return dg.FreshnessPolicy.time_window(
        warn_window=timedelta(days=files_every_days + FRESHNESS_SLACK_DAYS),
        fail_window=timedelta(days=2 * files_every_days + FRESHNESS_SLACK_DAYS),
    )


# The UI lists these versions on the page of the code location.
DagsterLibraryRegistry.register("ml-platform", PLATFORM_VERSION, is_dagster_package=False)

_settings = load_settings()
_with_freshness = partial(dg.apply_freshness_policy, policy=freshness_policy(_settings.files_every_days))

defs = dg.Definitions(
    assets=[
        raw_transactions,
        cleaned_transactions.map_asset_specs(_with_freshness),
        transaction_features,
        scored_transactions,
        fraud_model.map_asset_specs(_with_freshness),
    ],
    asset_checks=ASSET_CHECKS,
    jobs=[process_new_files, delete_orphaned_clusters],
    sensors=[
        new_raw_files,
        dead_runs,
        build_orphaned_clusters(
            dg.DefaultSensorStatus.RUNNING if _settings.deployment == "yandex" else dg.DefaultSensorStatus.STOPPED
        ),
        build_report_failed_runs(load_alert_settings(), _settings.dagster_ui_url),
    ],
    schedules=[process_new_files_daily],
    resources=build_resources(_settings),
    executor=dg.in_process_executor,
    loggers={"console": dg.json_console_logger if _settings.log_format == "json" else console_logger},
)
