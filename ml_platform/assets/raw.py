"""Asset ``raw_transactions``: raw files written by an external system."""

from collections.abc import Iterator

import dagster as dg

from ml_platform.assets.documentation import with_links
from ml_platform.assets.outcomes import OWNERS, table_schema
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.resource import LakeResource, RawFile
from ml_platform.lake.storage import readable_path
from spark_jobs.schema import RAW_COLUMNS

DATA_VERSION_TAG = "dagster/data_version"


def raw_file_observation(file: RawFile) -> dg.AssetObservation:
    """Observation of a raw file, with its fingerprint as the data version."""
    return dg.AssetObservation(
        asset_key="raw_transactions",
        partition=file.key,
        metadata={
            "path": readable_path(file.uri),
            "size_bytes": file.size,
            "fingerprint": file.fingerprint,
        },
        tags={DATA_VERSION_TAG: file.fingerprint},
    )


@dg.multi_observable_source_asset(
    specs=[
        dg.AssetSpec(
            "raw_transactions",
            # Observations are logged per partition; a yielded result would cover the whole asset, without a version.
            skippable=True,
            partitions_def=raw_files,
            group_name="fraud_detection",
            kinds={"file"},
            owners=OWNERS,
            metadata={
                "format": "text, 9 comma-separated fields per line, optional header line",
                "dagster/column_schema": table_schema(RAW_COLUMNS),
            },
            description=with_links(
                """Raw transaction files as they arrive in the raw store, one partition per file.

**How to read it:** files are observed, never materialized. The latest observation of a partition has the path, the size
and the fingerprint of the file, from which the platform notices that a file has changed.

**If a file is missing here:** `ml-platform sync` registers files now and names those that it ignores; the sensor
`new_raw_files` does the same each day. What a file must look like: docs/cleaning.md, “File requirements”."""
            ),
        )
    ]
)
def raw_transactions(context: dg.AssetExecutionContext, lake: LakeResource) -> Iterator[dg.ObserveResult]:
    """Observe the raw files that are registered as partitions."""
    files, ignored = lake.list_raw_files()
    for name, reason in ignored.items():
        context.log.warning(f"ignored raw file {name!r}: {reason}")
    registered = set(context.instance.get_dynamic_partitions(str(raw_files.name)))
    registered_files = [file for key, file in files.items() if key in registered]
    if len(registered_files) < len(files):
        context.log.info(f"{len(files) - len(registered_files)} raw files are not registered yet: run ml-platform sync")
    for file in registered_files:
        context.log_event(raw_file_observation(file))
    yield from ()
