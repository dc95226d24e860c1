"""Jobs. A run is one process with one Spark session, hence the in-process executor."""

from __future__ import annotations

import dagster as dg

process_new_files = dg.define_asset_job(
    "process_new_files",
    selection=dg.AssetSelection.assets("cleaned_transactions", "transaction_features", "fraud_model"),
    executor_def=dg.in_process_executor,
    description="Clean the partitions' files, build their features, train a model.",
)
