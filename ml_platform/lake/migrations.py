"""Moves a lake of an older version of the platform to this one: ``ml-platform migrate``.

Data of an older version count as missing, and the next run makes them again from the raw files. A step spares that
where only the report changes, and keeps partitions whose raw file is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_platform.lake.reports import FEATURES_TABLE, CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION

#: Turns a report of a table into the one that the next version would have written; None if the data have to be made
#: again. A step changes neither the report that it is given nor anything else.
Step = Callable[[str, Mapping[str, Any]], "dict[str, Any] | None"]

#: Steps by the version that they start from. Add one when you raise SCHEMA_VERSION, or all data are made again. The
#: ``inputs`` of a features report name the version of the cleaned data, so a step that moves both changes them, too.
STEPS: dict[int, Step] = {}


@dataclass(frozen=True)
class Outcome:
    """The effect on one partition of an older version; in a dry run, the effect it would have."""

    table: str
    key: str
    version: int
    can_move: bool
    outcome: str


def migrate_lake(lake: LakeResource, *, dry_run: bool = False, steps: Mapping[int, Step] = STEPS) -> Iterator[Outcome]:
    """Move the partitions of older versions one by one, each by replacing its report.

    It may be interrupted and run again: partitions that were moved are no longer of an older version.

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
    """The report as this version would have written it; None if a step is missing or returns None."""
    moved = dict(report)
    for version in range(report["schema_version"], SCHEMA_VERSION):
        step = steps.get(version)
        after = step(table, moved) if step else None
        if after is None:
            return None
        if after.get("schema_version") != version + 1:
            raise RuntimeError(f"the step from schema {version} left a report of {table} at another version")
        moved = after
    return moved
