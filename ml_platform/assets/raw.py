"""Asset ``raw_transactions``: the raw files, which somebody else writes."""

from collections.abc import Iterator

import dagster as dg

from ml_platform.assets.outcomes import OWNERS, table_schema
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.resource import LakeResource, RawFile
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


@dg.multi_observable_source_asset(
    specs=[
        dg.AssetSpec(
            "raw_transactions",
            # Its observations are of partitions; as a result it would be observed as a whole, without a version.
            skippable=True,
            partitions_def=raw_files,
            group_name="fraud_detection",
            kinds={"file"},
            owners=OWNERS,
            metadata={
                "format": "text, 9 comma-separated fields a line, perhaps with a header line",
                "dagster/column_schema": table_schema((name, "string", text) for name, _, text in CLEANED_COLUMNS),
            },
            description="Raw transaction files as they land in the raw store; one partition per file. They are "
            "observed, never materialized: see the events for size and fingerprint.",
        )
    ]
)
def raw_transactions(context: dg.AssetExecutionContext, lake: LakeResource) -> Iterator[dg.ObserveResult]:
    """Observe the raw files that are registered as partitions."""
    files, ignored = lake.list_raw_files()
    for name, reason in ignored.items():
        context.log.warning(f"ignored raw file {name!r}: {reason}")
    registered = set(context.instance.get_dynamic_partitions(str(raw_files.name)))
    known = [file for key, file in files.items() if key in registered]
    if len(known) < len(files):
        context.log.info(f"{len(files) - len(known)} raw files are not registered yet: run ml-platform sync")
    for file in known:
        context.log_event(raw_file_observation(file))
    yield from ()
