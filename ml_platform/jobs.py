"""Jobs. A run is one process with one Spark session, hence the in-process executor."""

from typing import Any

import dagster as dg

from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dataproc.orphans import delete_orphans
from ml_platform.model.config import problem_of_run_config
from ml_platform.settings import SettingsError, load_settings
from ml_platform.spark.engine import SparkEngine

process_new_files = dg.define_asset_job(
    "process_new_files",
    selection=dg.AssetSelection.assets("cleaned_transactions", "transaction_features", "fraud_model"),
    executor_def=dg.in_process_executor,
    description="Clean the partitions' files, build their features, train a model.",
)


def run_config() -> dict[str, Any]:
    """Run config of the runs that a sensor, a schedule or a command starts: that of ML_PLATFORM_RUN_CONFIG.

    Raises:
        SettingsError: the file cannot be read, is no YAML, or says something impossible about training.
    """
    # The logger by its name: otherwise Dagster takes its own default and not that of the definitions.
    config: dict[str, Any] = {"loggers": {"console": {"config": {"log_level": "INFO"}}}}
    path = load_settings().run_config_file
    if path is not None:
        try:
            config |= dg.config_from_files([str(path)])
        except Exception as error:  # whatever is wrong with a file that people write
            raise SettingsError(f"ML_PLATFORM_RUN_CONFIG: cannot read {path}: {error}") from None
        if problem := problem_of_run_config(config):
            raise SettingsError(f"ML_PLATFORM_RUN_CONFIG: {path}: fraud_model: {problem}")
    return config


@dg.op(description="Ask for the deletion of clusters whose run has ended, is unknown, or is past their lifetime.")
def delete_clusters(context: dg.OpExecutionContext, spark: dg.ResourceParam[SparkEngine]) -> None:
    if not isinstance(spark, DataprocEngine):
        raise dg.Failure("this deployment makes no clusters (ML_PLATFORM_DEPLOYMENT)", allow_retries=False)
    context.log.info(delete_orphans(context.instance, spark, lambda: context.log))


@dg.job(
    executor_def=dg.in_process_executor,
    description="What the sensor orphaned_clusters does, by hand.",
)
def delete_orphaned_clusters() -> None:
    delete_clusters()
