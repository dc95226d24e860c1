"""Jobs. They use the in-process executor, because a run is one process with one Spark session."""

import dagster as dg

from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dataproc.orphans import delete_orphans
from ml_platform.spark.engine import SparkEngine

#: Assets that process_new_files materializes, in this order.
ASSETS = ["cleaned_transactions", "transaction_features", "scored_transactions", "fraud_model"]

process_new_files = dg.define_asset_job(
    "process_new_files",
    selection=dg.AssetSelection.assets(*ASSETS),
    executor_def=dg.in_process_executor,
    description="Clean the partitions' files, build their features, score them with the champion, train a model.",
)


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
