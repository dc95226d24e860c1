"""Jobs. They use the in-process executor, because a run is one process with one Spark session."""

from typing import Any

import dagster as dg
from pydantic import ValidationError

from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dataproc.orphans import delete_orphans
from ml_platform.lake.quality import QualityLimits
from ml_platform.settings import SettingsError, problems_of
from ml_platform.spark.engine import SparkEngine

#: Assets that process_new_files materializes, in this order.
ASSETS = ["cleaned_transactions", "transaction_features", "scored_transactions", "fraud_model"]

process_new_files = dg.define_asset_job(
    "process_new_files",
    selection=dg.AssetSelection.assets(*ASSETS),
    executor_def=dg.in_process_executor,
    description="Clean the partitions' files, build their features, score them with the champion, train a model.",
)


def run_limits(config: dict[str, Any]) -> QualityLimits:
    """Quality limits of the runs with this run config. Raises SettingsError if they are invalid."""
    options = config
    for name in ("resources", "limits", "config"):
        options = (options.get(name) if isinstance(options, dict) else None) or {}
    place, known = "ML_PLATFORM_RUN_CONFIG: resources.limits", QualityLimits.model_fields
    if not isinstance(options, dict):
        raise SettingsError(f"{place}: config must be a mapping of limits, not {options!r}")
    if unknown := [str(name) for name in options if name not in known]:
        raise SettingsError(f"{place}: no limit {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        return QualityLimits(**options)
    except ValidationError as error:
        raise SettingsError(f"{place}: {problems_of(error)}") from None


@dg.op(description="Request the deletion of clusters whose run has ended or is unknown, or whose lifetime is over.")
def delete_clusters(context: dg.OpExecutionContext, spark: dg.ResourceParam[SparkEngine]) -> None:
    if not isinstance(spark, DataprocEngine):
        raise dg.Failure("this deployment does not use clusters (ML_PLATFORM_DEPLOYMENT)", allow_retries=False)
    context.log.info(delete_orphans(context.instance, spark, lambda: context.log))


@dg.job(
    executor_def=dg.in_process_executor,
    description="Manual equivalent of the sensor orphaned_clusters.",
)
def delete_orphaned_clusters() -> None:
    delete_clusters()
