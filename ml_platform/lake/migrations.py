"""Migration of a lake from an older version of the platform: ``ml-platform migrate``.

Data of an older version count as missing, and the next run rebuilds them from the raw files. A migration step avoids
the rebuild where only the report changes, and keeps partitions whose raw file is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from ml_platform.lake.quality import QualityLimits, own_problems
from ml_platform.lake.reports import CLEANED_TABLE, FEATURES_TABLE, CleanedReport, FeaturesReport, instant_text
from ml_platform.lake.resource import LakeResource, RawFile
from spark_jobs.cleaning.bulk import EXAMPLES, OUTSIDE_PER_MILLE, Bulk, bulk_of, tails
from spark_jobs.cleaning.raw_text import END_BYTES
from spark_jobs.cleaning.rules import has_only_carriage_returns, header_line
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION


@dataclass(frozen=True)
class Migration:
    """What steps may look at: the lake, and the cleaned reports of this version, those that were moved included."""

    lake: LakeResource
    raw_files: Mapping[str, RawFile]
    cleaned: dict[str, CleanedReport]
    with_features: Container[str]


#: Converts a report of a table to the next schema version; returns None if the data must be rebuilt. A step has no side
#: effects and does not modify its argument. Cleaned reports come first.
Step = Callable[[Migration, str, Mapping[str, Any]], "dict[str, Any] | None"]


def _to_schema_2(migration: Migration, table: str, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Schema 2 reads ids by value and has another rule for headers; its reports have percentiles."""
    key = report["partition"]
    if table == FEATURES_TABLE:
        return _features_to_schema_2(migration, report)
    raw, counts = migration.raw_files.get(key), report["counts"]
    if raw is None or raw.fingerprint != report["raw"]["fingerprint"]:
        return None
    # Ids that were unknown may be integers by value.
    if counts["unknown_customer"] or counts["unknown_terminal"]:
        return None
    head = migration.lake.raw.read_start(raw.name, END_BYTES) if raw.size else b""
    if has_only_carriage_returns(head) or (header_line(head) is not None) != report["header"]:
        return None
    bulk = _bulk_of_partition(migration.lake, key, counts["clean_rows"])
    days = bulk and [_instant_of(day) for day in bulk.days]
    moved = {
        **report,
        "schema_version": 2,
        "counts": {**counts, "out_of_range": 0, "respelled_id": 0},
        "tx_datetime": {**report["tx_datetime"], "p0_1": days and days[0], "p99_9": days and days[1]},
        "transaction_id": {**report["transaction_id"], "p0_1": bulk and bulk.ids[0], "p99_9": bulk and bulk.ids[1]},
        "rows_per_day": {_instant_of(day): count for day, count in bulk.rows_per_day.items()} if bulk else {},
        "odd_rows": {"rows": 0, "usual_days": [], "examples": []},
        "out_of_range": None,
        "text_bytes": report["raw"]["size"],
        "shared_ids": {},
        "reject_samples": {},
        "accepted": False,
    }
    # Before, a file that checks stopped was taken as it is by building its features.
    stopped = own_problems(CleanedReport.model_validate(moved), QualityLimits())
    return {**moved, "accepted": bool(stopped) and key in migration.with_features}


def _instant_of(day: int) -> str:
    """Beginning of a day since 1970, as reports have it."""
    return instant_text(datetime(1970, 1, 1) + timedelta(days=day))


def _features_to_schema_2(migration: Migration, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Features stay if all that they were built from was moved."""
    key, inputs = report["partition"], report["inputs"]
    versions = {key: inputs["cleaned"], **inputs["history"]}
    now = {name: migration.cleaned[name].version for name in versions if name in migration.cleaned}
    if {name: version.partition("/")[2] for name, version in versions.items()} != {
        name: version.partition("/")[2] for name, version in now.items()
    }:
        return None
    return {
        **report,
        "schema_version": 2,
        "inputs": {"cleaned": now.pop(key), "history": now},
    }


def _bulk_of_partition(lake: LakeResource, key: str, rows: int) -> Bulk | None:
    """The bulk of a cleaned partition, from its Parquet files, one at a time."""
    import io

    import pyarrow as pa
    from pyarrow import parquet

    parts = []
    directory = lake.partition_path(CLEANED_TABLE, key)
    for stored in lake.store.list_directory(directory):
        if not stored.name.startswith("part-"):
            continue
        file = io.BytesIO(lake.store.read(f"{directory}/{stored.name}"))
        columns = ["transaction_id", "tx_datetime"]
        table = parquet.read_table(file, columns=columns).sort_by("transaction_id")
        instants = table["tx_datetime"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
        ids = table["transaction_id"].to_numpy()
        if part := tails(ids, instants // 1_000_000, rows * OUTSIDE_PER_MILLE // 1000 + EXAMPLES + 1):
            parts.append(part)
    return bulk_of(parts, rows)


#: Steps by the schema version they start from. Add one when you raise SCHEMA_VERSION; otherwise all data are rebuilt.
#: The ``inputs`` of a features report contain the version of the cleaned data, so a step that moves both updates them.
STEPS: dict[int, Step] = {1: _to_schema_2}


@dataclass(frozen=True)
class Outcome:
    """Result of migrating one partition of an older version; in a dry run, the expected result."""

    table: str
    key: str
    version: int
    can_move: bool
    outcome: str


def migrate_lake(lake: LakeResource, *, dry_run: bool = False, steps: Mapping[int, Step] = STEPS) -> Iterator[Outcome]:
    """Migrate the partitions of older versions one by one, each by replacing its report.

    Safe to interrupt and run again: migrated partitions are skipped.

    Raises:
        SchemaVersionError: the lake contains data of a newer version; nothing was changed.
    """
    outdated = {
        CleanedReport.table: lake.outdated_reports(CleanedReport),
        FeaturesReport.table: lake.outdated_reports(FeaturesReport),
    }
    raw_files, _ = lake.list_raw_files()
    migration = Migration(lake, raw_files, lake.reports(CleanedReport), outdated[FeaturesReport.table])
    for table, reports in outdated.items():
        for key, report in sorted(reports.items()):
            moved = _move(migration, table, report, steps)
            if moved is not None:
                if table == CLEANED_TABLE:
                    migration.cleaned[key] = CleanedReport.model_validate(moved)
                if not dry_run:
                    lake.write_json(f"{lake.partition_path(table, key)}/{REPORT_NAME}", moved)
                outcome = f"{'can be' if dry_run else 'was'} moved to {SCHEMA_VERSION}"
            elif table == FEATURES_TABLE or key in raw_files:
                outcome = "the next run makes it again"
            else:
                outcome = "left out: its raw file, from which it could be made again, is gone; put it back"
            yield Outcome(table, key, report["schema_version"], moved is not None, outcome)


def _move(
    migration: Migration, table: str, report: Mapping[str, Any], steps: Mapping[int, Step]
) -> dict[str, Any] | None:
    """Report converted to the current schema; None if a step is missing or returns None."""
    moved = dict(report)
    for version in range(report["schema_version"], SCHEMA_VERSION):
        step = steps.get(version)
        converted = _converted(step, migration, table, moved) if step else None
        if converted is None:
            return None
        if converted.get("schema_version") != version + 1:
            raise RuntimeError(f"the step from schema {version} did not set the next version in a report of {table}")
        moved = converted
    return moved


def _converted(step: Step, migration: Migration, table: str, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """A valid report after a step; None if the step cannot be made: anyone can damage a partition."""
    kind = CleanedReport if table == CLEANED_TABLE else FeaturesReport
    try:
        converted = step(migration, table, report)
        if converted is not None:
            kind.model_validate(converted)
    except (KeyError, TypeError, AttributeError, ValueError, OSError):
        return None
    return converted
