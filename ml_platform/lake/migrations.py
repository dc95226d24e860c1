"""Migration of a lake from an older version of the platform: ``ml-platform migrate``.

Data of an older version count as missing, and the next run rebuilds them from the raw files. A migration step avoids
the rebuild where only the report changes, and keeps partitions whose raw file is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_platform.lake.reports import FEATURES_TABLE, CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION

#: Converts a report of a table to the next schema version; returns None if the data must be rebuilt. A step has no side
#: effects and does not modify its argument.
Step = Callable[[str, Mapping[str, Any]], "dict[str, Any] | None"]

#: Steps by the schema version they start from. Add one when you raise SCHEMA_VERSION; otherwise all data are rebuilt.
#: The ``inputs`` of a features report contain the version of the cleaned data, so a step that moves both updates them.
STEPS: dict[int, Step] = {}


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
    for table, reports in outdated.items():
        for key, report in sorted(reports.items()):
            moved = _move(table, report, steps)
            if moved is not None:
                if not dry_run:
                    lake.write_json(f"{lake.partition_path(table, key)}/{REPORT_NAME}", moved)
                outcome = f"{'can be' if dry_run else 'was'} moved to {SCHEMA_VERSION}"
            elif table == FEATURES_TABLE or key in raw_files:
                outcome = "the next run makes it again"
            else:
                outcome = "left out: its raw file, from which it could be made again, is gone; put it back"
            yield Outcome(table, key, report["schema_version"], moved is not None, outcome)


def _move(table: str, report: Mapping[str, Any], steps: Mapping[int, Step]) -> dict[str, Any] | None:
    """Report converted to the current schema; None if a step is missing or returns None."""
    moved = dict(report)
    for version in range(report["schema_version"], SCHEMA_VERSION):
        step = steps.get(version)
        converted = step(table, moved) if step else None
        if converted is None:
            return None
        if converted.get("schema_version") != version + 1:
            raise RuntimeError(f"the step from schema {version} did not set the next version in a report of {table}")
        moved = converted
    return moved
