"""Composition root: settings → resources → ``defs``."""

from __future__ import annotations

import dagster as dg

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.features import transaction_features
from ml_platform.assets.model import fraud_model
from ml_platform.assets.raw import raw_transactions
from ml_platform.checks import ASSET_CHECKS, QualityLimits
from ml_platform.jobs import process_new_files
from ml_platform.resources.lake import LakeResource
from ml_platform.resources.mlflow import MlflowResource
from ml_platform.resources.spark import LocalSparkEngine
from ml_platform.sensors import new_raw_files, process_new_files_daily
from ml_platform.settings import Settings, load_settings


def build_resources(settings: Settings) -> dict[str, dg.ConfigurableResource]:
    """The resources that `settings` ask for; the same keys in every deployment."""
    return {
        "lake": LakeResource(raw_uri=settings.raw_uri, lake_uri=settings.lake_uri, epoch=settings.epoch.isoformat()),
        "spark": LocalSparkEngine(master=settings.spark_master, driver_memory=settings.spark_driver_memory),
        "mlflow": MlflowResource(
            tracking_uri=settings.tracking_uri,
            artifact_root=settings.artifact_root,
            ui_url=settings.mlflow_ui_url,
        ),
        "limits": QualityLimits(),
    }


defs = dg.Definitions(
    assets=[raw_transactions, cleaned_transactions, transaction_features, fraud_model],
    asset_checks=ASSET_CHECKS,
    jobs=[process_new_files],
    sensors=[new_raw_files],
    schedules=[process_new_files_daily],
    resources=build_resources(load_settings()),
    executor=dg.in_process_executor,
)
