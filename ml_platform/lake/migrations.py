"""What moves a lake to this version of the platform: ``ml-platform migrate``.

Data of an older version count as missing and are made again by the next run, from the raw files. A step spares that
where the data stay as they are and only the report changes, and keeps partitions whose raw file is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_platform.lake.reports import FEATURES_TABLE, CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION

#: From the name of a table and one of its reports, the report that the next version would have written; None if the
#: data have to be made again. It must not change the report it is given, and writes nothing.
Step = Callable[[str, Mapping[str, Any]], "dict[str, Any] | None"]

#: Steps by the version that they start from. Whoever raises SCHEMA_VERSION adds one, or data are made again. The
#: ``inputs`` of a features report name the version of the cleaned data, so a step that moves both changes them, too.
STEPS: dict[int, Step] = {}


@dataclass(frozen=True)
class Outcome:
    """What became, or in a dry run would become, of one partition of an older version."""

    table: str
    key: str
    version: int
    can_move: bool
    outcome: str


def migrate_lake(lake: LakeResource, *, dry_run: bool = False, steps: Mapping[int, Step] = STEPS) -> Iterator[Outcome]:
    """Move each partition of an older version, one by one, by replacing its report at once.

    So it may be interrupted, and run again: what was moved is not touched any more.

    Raises:
        SchemaVersionError: something in the lake is of a newer version; nothing was done.
    """
    outdated = {
        CleanedReport.table: lake.outdated_reports(CleanedReport),
        FeaturesReport.table: lake.outdated_reports(FeaturesReport),
    }
    raw_files, _ = lake.list_raw_files()
    for table, reports in outdated.items():
        for key, report in sorted(reports.items()):
            version, moved = report["schema_version"], _move(table, report, steps)
            if moved is not None:
                if not dry_run:
                    lake.write_json(f"{lake.partition_path(table, key)}/{REPORT_NAME}", moved)
                outcome = f"{'can be' if dry_run else 'was'} moved to {SCHEMA_VERSION}"
            elif table == FEATURES_TABLE or key in raw_files:
                outcome = "the next run makes it again"
            else:
                outcome = "left out: its raw file, from which it could be made again, is gone; put it back"
            yield Outcome(table, key, version, moved is not None, outcome)


def _move(table: str, report: Mapping[str, Any], steps: Mapping[int, Step]) -> dict[str, Any] | None:
    """The report as this version would have written it; None where a step is missing or declines."""
    moved: dict[str, Any] | None = dict(report)
    for version in range(report["schema_version"], SCHEMA_VERSION):
        step = steps.get(version)
        moved = step(table, moved) if step and moved is not None else None
        if moved is not None and moved.get("schema_version") != version + 1:
            raise RuntimeError(f"the step from schema {version} left a report of {table} at another version")
    return moved
