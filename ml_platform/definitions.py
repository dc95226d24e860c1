"""Composition root: settings → resources → ``defs``."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.features import transaction_features
from ml_platform.assets.model import fraud_model
from ml_platform.assets.raw import raw_transactions
from ml_platform.checks import ASSET_CHECKS, QualityLimits
from ml_platform.jobs import delete_orphaned_clusters, process_new_files
from ml_platform.resources.dataproc import DataprocEngine
from ml_platform.resources.lake import LakeResource
from ml_platform.resources.mlflow import MlflowResource
from ml_platform.resources.spark import LocalSparkEngine, SparkEngine
from ml_platform.sensors import build_orphaned_clusters, new_raw_files, process_new_files_daily
from ml_platform.settings import Settings, load_cluster_settings, load_settings


def build_engine(settings: Settings) -> SparkEngine:
    """Where Spark runs in the deployment of `settings`."""
    if settings.deployment == "local":
        return LocalSparkEngine(
            master=settings.spark_master,
            driver_memory=settings.spark_driver_memory,
            with_s3=any(uri.startswith("s3://") for uri in (settings.raw_uri, settings.lake_uri)),
        )
    cluster = load_cluster_settings()
    return DataprocEngine(
        deployment=settings.deployment_name or settings.deployment,
        lake_uri=settings.lake_uri,
        cluster=cluster.cluster_spec().model_dump(),
        endpoint=cluster.api_endpoint,
        root_certificates_file=path_or_none(cluster.root_certificates_file),
        service_account_key_file=path_or_none(cluster.service_account_key_file),
        # By the variable's name, so that Dagster shows the name and not the token.
        iam_token=dg.EnvVar("YC_IAM_TOKEN") if cluster.iam_token else None,
        **{
            name: getattr(cluster, name)
            for name in (
                *("create_timeout_s", "job_timeout_s", "max_lifetime_s", "delete_timeout_s", "poll_s"),
                *("data_max_count", "target_s", "job_properties", "prices", "currency", "console_url"),
            )
        },
    )


def path_or_none(path: Path | None) -> str | None:
    """A path as a resource's field holds it."""
    return None if path is None else str(path)


def build_resources(settings: Settings) -> dict[str, dg.ConfigurableResource]:
    """The resources that `settings` ask for; the same keys in every deployment."""
    return {
        "lake": LakeResource(raw_uri=settings.raw_uri, lake_uri=settings.lake_uri, epoch=settings.epoch.isoformat()),
        "spark": build_engine(settings),
        "mlflow": MlflowResource(
            tracking_uri=settings.tracking_uri,
            artifact_root=settings.artifact_root,
            ui_url=settings.mlflow_ui_url,
        ),
        "limits": QualityLimits(),
    }


_settings = load_settings()

defs = dg.Definitions(
    assets=[raw_transactions, cleaned_transactions, transaction_features, fraud_model],
    asset_checks=ASSET_CHECKS,
    jobs=[process_new_files, delete_orphaned_clusters],
    sensors=[
        new_raw_files,
        build_orphaned_clusters(
            dg.DefaultSensorStatus.RUNNING if _settings.deployment == "yandex" else dg.DefaultSensorStatus.STOPPED
        ),
    ],
    schedules=[process_new_files_daily],
    resources=build_resources(_settings),
    executor=dg.in_process_executor,
)
