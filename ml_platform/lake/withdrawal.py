"""Withdraws raw files from the lake: deletes their data, and keeps runs from cleaning them until that is undone."""

from __future__ import annotations

from ml_platform.lake.partitions import is_partition_key
from ml_platform.lake.reports import (
    ALERTS_TABLE,
    CLEANED_TABLE,
    FEATURES_TABLE,
    REJECTED_TABLE,
    SCORED_TABLE,
    FeaturesReport,
)
from ml_platform.lake.resource import MODELS_DIRECTORY, WITHDRAWN_DIRECTORY, LakeResource
from spark_jobs.schema import REPORT_NAME


def withdraw_file(lake: LakeResource, key: str) -> list[str]:
    """Delete a file's partitions and keep the file out; returns the effects on other data, a sentence each.

    Raises ValueError if there is neither a raw file nor a partition of this key.
    """
    features = lake.reports(FeaturesReport)
    files, _ = lake.list_raw_files()
    tables = (SCORED_TABLE, ALERTS_TABLE, FEATURES_TABLE, CLEANED_TABLE, REJECTED_TABLE)
    paths = [lake.partition_path(table, key) for table in tables]
    if not is_partition_key(key) or not (key in files or any(any(lake.store.list_directory(path)) for path in paths)):
        raise ValueError(f"{key!r} is neither a raw file nor a partition of the lake")
    effects = []
    stale = sorted(other for other, report in features.items() if other != key and key in report.inputs.history)
    if stale:
        effects.append(f"features of {', '.join(stale)} become stale; the next run builds them again")
    if models := models_trained_on(lake, key):
        effects.append(f"models that were trained or tested on its rows, and their test scores: {', '.join(models)}")
    effects.append("the reports of its runs below _runs/ keep samples of its rejected rows and alerts")
    # The mark comes first: from then on no run cleans the file.
    lake.write_json(f"{WITHDRAWN_DIRECTORY}/{key}.json", {"partition": key})
    for path in paths:
        lake.store.delete(f"{path}/{REPORT_NAME}")  # without it, the partition does not exist
        lake.store.delete(path)
    lake.set_uncleaned(key, None)
    return effects


def allow_again(lake: LakeResource, key: str) -> bool:
    """Undo a withdrawal; False if there is none."""
    if key not in lake.withdrawn():
        return False
    lake.store.delete(f"{WITHDRAWN_DIRECTORY}/{key}.json")
    return True


def models_trained_on(lake: LakeResource, key: str) -> list[str]:
    """Directories in the lake of the models that a partition was an input of, by their reports.

    Reports of earlier versions name the cut-off alone.
    """
    found = []
    for cutoff in _directories(lake, MODELS_DIRECTORY):
        for directory in _directories(lake, cutoff):
            try:
                report = lake.read_json(f"{directory}/{REPORT_NAME}")
            except (OSError, ValueError, RecursionError):
                continue
            partitions = report.get("partitions") if isinstance(report, dict) else None
            if key in (partitions if isinstance(partitions, list) else [cutoff.rpartition("/")[2]]):
                found.append(directory)
    return sorted(found)


def _directories(lake: LakeResource, name: str) -> list[str]:
    """Directories directly in a directory of the lake."""
    return [f"{name}/{found.name[:-1]}" for found in lake.store.list_directory(name) if found.name.endswith("/")]
