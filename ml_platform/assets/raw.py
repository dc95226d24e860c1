"""Asset ``raw_transactions``: the raw files, which somebody else writes."""

import dagster as dg

from ml_platform.assets.common import table_schema
from ml_platform.partitions import raw_files
from ml_platform.resources.lake import LakeResource, RawFile
from spark_jobs.schema import CLEANED_COLUMNS

DATA_VERSION_TAG = "dagster/data_version"


def raw_file_observation(file: RawFile) -> dg.AssetObservation:
    """What is known of a raw file, its fingerprint being the data version."""
    return dg.AssetObservation(
        asset_key="raw_transactions",
        partition=file.key,
        metadata={
            "path": dg.MetadataValue.path(file.uri),
            "size_bytes": file.size,
            "fingerprint": file.fingerprint,
        },
        tags={DATA_VERSION_TAG: file.fingerprint},
    )


@dg.observable_source_asset(
    partitions_def=raw_files,
    group_name="fraud_detection",
    metadata={
        "format": "text, 9 comma-separated fields a line, first line a header",
        "dagster/column_schema": table_schema((name, "string", text) for name, _, text in CLEANED_COLUMNS),
    },
    tags={"dagster/kind/file": ""},
    description="Raw transaction files as they land in the raw store; one partition per file. They are observed, "
    "never materialized: see the events for size and fingerprint.",
)
def raw_transactions(context: dg.OpExecutionContext, lake: LakeResource) -> dg.DataVersionsByPartition:
    """Observe the raw files: the data version of a partition is its file's fingerprint."""
    files, ignored = lake.list_raw_files()
    for name, reason in ignored.items():
        context.log.warning(f"ignored raw file {name!r}: {reason}")
    registered = set(context.instance.get_dynamic_partitions(str(raw_files.name)))
    known = {key: file for key, file in files.items() if key in registered}
    if len(known) < len(files):
        context.log.info(f"{len(files) - len(known)} raw files are not registered yet: run ml-platform sync")
    return dg.DataVersionsByPartition({key: file.fingerprint for key, file in known.items()})
