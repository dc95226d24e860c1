"""Asset ``cleaned_transactions``: typed, repaired and deduplicated transactions; rejects are quarantined."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
from pydantic import Field

from ml_platform.assets.documentation import with_links
from ml_platform.assets.outcomes import (
    OWNERS,
    record_outcomes,
    record_partitions,
    split_verdicts,
    table_schema,
)
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import QualityLimits, judge_files
from ml_platform.lake.reports import (
    CLEANED_TABLE,
    REJECTED_TABLE,
    CleanedReport,
    CleanedReports,
    FeaturesReport,
    FeaturesReports,
    UncleanedFile,
    instant_text,
)
from ml_platform.lake.resource import BYTES_PER_ROW, LakeResource, RawFile
from ml_platform.lake.storage import readable_path
from ml_platform.run_config import check_run_config
from ml_platform.spark.engine import SparkEngine
from spark_jobs.schema import CLEANED_COLUMNS, FIX_RULES, KEY_COLUMNS, REJECT_RULES, SCHEMA_VERSION

#: Counts that are shown even if they are 0.
ROW_COUNTS = ("raw_rows", "clean_rows", "duplicate_rows", "rejected_rows")

#: Counts of a report and their meaning, in display order.
COUNTS_SHOWN = {
    "raw_rows": "lines of the file, without its header",
    "clean_rows": "rows in the cleaned table",
    "duplicate_rows": "dropped: equal to a row that is kept",
    "rejected_rows": "in rejected_transactions, with their reasons",
    **{name: f"rejected: {text}" for name, text in REJECT_RULES.items()},
    **{name: f"kept: {text}" for name, text in FIX_RULES.items()},
    "fraud_rows": "clean rows that are frauds",
    "zero_amount": "clean rows with the amount 0",
}


class CleaningConfig(dg.Config):
    """Options of one materialization."""

    rebuild: bool = Field(False, description="Clean files again even if they are up to date.")


#: Why a withdrawn file is not cleaned.
WITHDRAWN = "it was withdrawn (undo with: ml-platform withdraw --undo KEY)"


def files_to_clean_again(cleaned: CleanedReports, features: FeaturesReports, limits: QualityLimits) -> set[str]:
    """Stopped files that another limit `out_of_range` was used for, or whose ids are not compared with others."""
    verdicts = judge_files(cleaned, features, limits)
    return verdicts.uncompared | {key for key in verdicts.problems if cleaned[key].out_of_range != limits.out_of_range}


def is_cleaned(report: CleanedReport | None, raw: RawFile, epoch: str) -> bool:
    """Return True if the report matches the raw file's current content and the epoch."""
    return report is not None and report.epoch == epoch and report.raw.fingerprint == raw.fingerprint


@dg.asset(
    partitions_def=raw_files,
    backfill_policy=dg.BackfillPolicy.single_run(),
    deps=["raw_transactions"],
    group_name="fraud_detection",
    kinds={"pyspark", "parquet"},
    owners=OWNERS,
    code_version=str(SCHEMA_VERSION),
    metadata={
        "dagster/column_schema": table_schema(
            CLEANED_COLUMNS,
            never_null=[name for name, *_ in CLEANED_COLUMNS if name not in KEY_COLUMNS],
        )
    },
    description=with_links(
        """Transactions of one raw file: typed, times in UTC, duplicates dropped, known faults repaired.

Rejected rows go to `rejected_transactions` with their reasons; no row is lost:
raw rows = clean rows + duplicate rows + rejected rows. A file that is already clean is neither read nor rewritten.

**How to read its metadata:** `counts` has the rows that each rule rejected, repaired or noted; `rejected_path` holds
the rejected lines (`ml-platform rejects KEY` shows one for each reason).

**If a check fails:** the file gets no features and trains no model; all others go on. The check says what is wrong.
Correct the raw file, or take it as it is (`accept: true` in the run configuration of `transaction_features`):
docs/operations.md, “A file is bad: what do I do?”, and docs/cleaning.md."""
    ),
)
def cleaned_transactions(
    context: dg.AssetExecutionContext,
    config: CleaningConfig,
    lake: LakeResource,
    spark: SparkEngine,
    limits: QualityLimits,
) -> Iterator[dg.MaterializeResult]:
    """Clean the run's new or changed files in one Spark job."""
    check_run_config(context.run.run_config)
    keys = record_partitions(context)
    files, ignored = lake.list_raw_files()
    for name, reason in ignored.items():
        context.log.warning(f"ignored raw file {name!r}: {reason}")
    reports, withdrawn = lake.reports(CleanedReport), lake.withdrawn()
    failed = {key: f"file not found in {lake.raw_uri}" for key in keys if key not in files}
    failed |= {key: WITHDRAWN for key in keys if key in withdrawn}
    again = files_to_clean_again(reports, lake.reports(FeaturesReport), limits)
    current = {
        key: reports[key]
        for key in keys
        if key not in failed
        and not config.rebuild
        and is_cleaned(reports.get(key), files[key], lake.epoch)
        and key not in again
    }
    wanted = [key for key in keys if key not in failed and key not in current]
    context.log.info(f"{len(wanted)} files to clean, {len(current)} already clean, {len(failed)} left out")
    cleaned: CleanedReports = {}
    refused: dict[str, str] = {}
    if wanted:
        report = spark.run_job(
            context,
            lake,
            "clean_transactions",
            _request(lake, [files[key] for key in wanted], reports, limits),
            rows=sum(files[key].text_bytes for key in wanted) // BYTES_PER_ROW,
        )
        cleaned, errors = split_verdicts(report["partitions"], CleanedReport)
        refused = {key: error for key, error in errors.items() if report["partitions"][key]["status"] == "refused"}
        failed |= errors
    uncleaned = lake.uncleaned()
    for key, reason in failed.items():
        if key in withdrawn:
            continue
        version = files[key].version(lake.epoch) if key in files else ""
        file = UncleanedFile(reason=reason, refused=key in refused, run_id=context.run.run_id, version=version)
        lake.set_uncleaned(key, file)
    for key in cleaned.keys() & uncleaned.keys():
        lake.set_uncleaned(key, None)
    metadata = {key: _metadata(lake, report, key in cleaned) for key, report in (current | cleaned).items()}
    if not metadata:
        yield from record_outcomes(context, succeeded={}, failed=failed)
    yield from record_outcomes(context, succeeded=metadata, failed={}, left_out=failed)


def _request(
    lake: LakeResource, files: list[RawFile], reports: CleanedReports, limits: QualityLimits
) -> dict[str, Any]:
    """Request of the job clean_transactions; its other partitions are neighbours, whose ids are compared."""
    keys = {file.key for file in files}
    return {
        "epoch": lake.epoch,
        "out_of_range": limits.out_of_range,
        "neighbours": {
            key: {
                "version": other.version,
                "uri": lake.partition_uri(CLEANED_TABLE, key),
                "transaction_id": other.transaction_id.model_dump(),
            }
            for key, other in reports.items()
            if key not in keys and other.transaction_id is not None
        },
        "partitions": [
            {
                "partition": file.key,
                "raw": file.as_request(),
                "output_uri": lake.partition_uri(CLEANED_TABLE, file.key),
                "rejected_uri": lake.partition_uri(REJECTED_TABLE, file.key),
                # The same rows stay accepted.
                "accepted": file.key in reports
                and reports[file.key].accepted
                and reports[file.key].out_of_range == limits.out_of_range
                and is_cleaned(reports[file.key], file, lake.epoch),
            }
            for file in files
        ],
    }


def _metadata(lake: LakeResource, report: CleanedReport, was_cleaned: bool) -> dict[str, Any]:
    counts, key = report.counts, report.partition
    rows_by_rule = counts.model_dump()
    metadata = {
        "outcome": ("cleaned" if counts.raw_rows else "empty file") if was_cleaned else "already clean",
        "dagster/row_count": counts.clean_rows,
        "path": readable_path(lake.partition_uri(CLEANED_TABLE, key)),
        "counts": dg.MetadataValue.table(
            [
                dg.TableRecord({"count": name, "rows": rows_by_rule[name], "meaning": COUNTS_SHOWN[name]})
                for name in COUNTS_SHOWN
                if rows_by_rule[name] or name in ROW_COUNTS
            ],
            schema=dg.TableSchema([dg.TableColumn("count"), dg.TableColumn("rows", "int"), dg.TableColumn("meaning")]),
        ),
        "raw_rows": counts.raw_rows,
        "rejected_rows": counts.rejected_rows,
        "duplicate_rows": counts.duplicate_rows,
        "fraud_rows": counts.fraud_rows,
        "raw_size_bytes": report.raw.size,
        "text_bytes": report.text_bytes,
        "fingerprint": report.raw.fingerprint,
        "cleaned_by_run": dg.MetadataValue.dagster_run(report.run_id),
        "spark_version": report.spark_version,
        "seconds": report.seconds,
    }
    if counts.rejected_rows:
        metadata["rejected_path"] = readable_path(lake.partition_uri(REJECTED_TABLE, key))
    if report.tx_datetime is not None:
        metadata["first_transaction"] = instant_text(report.tx_datetime.min)
        metadata["last_transaction"] = instant_text(report.tx_datetime.max)
    return metadata
