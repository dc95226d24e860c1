"""Withdraws raw files from the lake: their data go, and no run cleans them again until that is undone."""

from __future__ import annotations

from ml_platform.lake.partitions import is_partition_key
from ml_platform.lake.reports import (
    CLEANED_TABLE,
    FEATURES_TABLE,
    REJECTED_TABLE,
    CleanedReport,
    FeaturesReport,
)
from ml_platform.lake.resource import WITHDRAWN_DIRECTORY, LakeResource
from spark_jobs.schema import REPORT_NAME

MODELS_DIRECTORY = "models"


def withdraw_file(lake: LakeResource, key: str) -> list[str]:
    """Delete a file's partitions and keep the file out; returns the effects on other data, a sentence each.

    Raises ValueError if there is neither a raw file nor a partition of this key.
    """
    cleaned, features = lake.reports(CleanedReport), lake.reports(FeaturesReport)
    files, _ = lake.list_raw_files()
    tables = (FEATURES_TABLE, CLEANED_TABLE, REJECTED_TABLE)
    if not is_partition_key(key) or (key not in files and key not in cleaned and key not in features):
        raise ValueError(f"{key!r} is neither a raw file nor a partition of the lake")
    effects = []
    stale = sorted(other for other, report in features.items() if other != key and key in report.inputs.history)
    if stale:
        effects.append(f"features of {', '.join(stale)} become stale; the next run builds them again")
    if models := models_trained_on(lake, key):
        effects.append(f"models that were trained or tested on its rows, and their test scores: {', '.join(models)}")
    # The mark comes first: from then on no run cleans the file.
    lake.write_json(f"{WITHDRAWN_DIRECTORY}/{key}.json", {"partition": key})
    for table in tables:
        path = lake.partition_path(table, key)
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
    """Directories in the lake of the models that a partition was an input of, by their reports."""
    found = []
    for cutoff in lake.store.list_directory(MODELS_DIRECTORY):
        for run in lake.store.list_directory(f"{MODELS_DIRECTORY}/{cutoff.name.rstrip('/')}"):
            directory = f"{MODELS_DIRECTORY}/{cutoff.name}{run.name}".rstrip("/")
            try:
                report = lake.read_json(f"{directory}/{REPORT_NAME}")
            except (OSError, ValueError):
                continue
            if isinstance(report, dict) and key in report.get("partitions", [cutoff.name.rstrip("/")]):
                found.append(directory)
    return sorted(found)
