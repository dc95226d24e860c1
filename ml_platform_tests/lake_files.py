"""The files of a lake, in a directory or on S3, and what must be equal in two lakes of the same raw files."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_platform.lake.reports import CLEANED_TABLE, FEATURES_TABLE, REJECTED_TABLE

if TYPE_CHECKING:
    from ml_platform.dev.cloud.s3_server import LocalS3

TABLES = (CLEANED_TABLE, REJECTED_TABLE, FEATURES_TABLE)


@dataclass(frozen=True)
class LakeFiles:
    """Files by their names within the lake: a directory, or "lake/" of a bucket."""

    directory: Path | None = None
    s3: LocalS3 | None = None
    bucket: str = ""

    def changed(self, prefix: str = "") -> dict[str, datetime]:
        """When each file was last written."""
        if self.s3 is None:
            assert self.directory is not None
            paths = [path for path in self.directory.rglob("*") if path.is_file()]
            times = {str(path.relative_to(self.directory)): path.stat().st_mtime for path in paths}
            return {name: datetime.fromtimestamp(at) for name, at in times.items() if name.startswith(prefix)}
        pages = self.s3.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"lake/{prefix}")
        items = [item for page in pages for item in page.get("Contents", [])]
        return {item["Key"].removeprefix("lake/"): item["LastModified"] for item in items}

    def read(self, name: str) -> bytes:
        if self.s3 is None:
            assert self.directory is not None
            return (self.directory / name).read_bytes()
        return self.s3.client().get_object(Bucket=self.bucket, Key=f"lake/{name}")["Body"].read()

    def read_json(self, name: str) -> dict[str, Any]:
        return json.loads(self.read(name))

    def report(self, key: str, table: str = CLEANED_TABLE) -> dict[str, Any]:
        """The report of a partition."""
        return self.read_json(f"{table}/raw_file={key}/_report.json")

    def rows(self, table: str, key: str) -> list[dict[str, Any]]:
        """The rows of a partition, in a fixed order."""
        return self.rows_of(f"{table}/raw_file={key}/")

    def rows_of(self, directory: str) -> list[dict[str, Any]]:
        """The rows of all Parquet files below a directory, in a fixed order."""
        import pyarrow.parquet as pq

        names = [name for name in self.changed(directory) if name.endswith(".parquet")]
        found = [row for name in names for row in pq.ParquetFile(io.BytesIO(self.read(name))).read().to_pylist()]
        return sorted(found, key=lambda row: json.dumps(row, default=str, sort_keys=True))


def assert_same_tables(lake: LakeFiles, expected: LakeFiles, keys: list[str]) -> None:
    """The same rows, and the same reports except for what differs from run to run."""

    def comparable(report: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in report.items() if name not in {"run_id", "seconds", "raw", "inputs"}}

    for key in keys:
        for table in TABLES:
            rows = expected.rows(table, key)
            assert rows
            assert lake.rows(table, key) == rows
        for table in (CLEANED_TABLE, FEATURES_TABLE):
            assert comparable(lake.report(key, table)) == comparable(expected.report(key, table))


def assert_same_model(lake: LakeFiles, run_id: str, expected: LakeFiles, expected_run_id: str, cutoff: str) -> None:
    """The same model file, byte for byte, of the same search."""
    directory, expected_directory = f"models/{cutoff}/{run_id}", f"models/{cutoff}/{expected_run_id}"
    report = lake.read_json(f"{directory}/_report.json")
    expected_report = expected.read_json(f"{expected_directory}/_report.json")
    for name in ("best", "profile"):
        assert report[name] == expected_report[name]
    assert {name: report["metrics"][name] for name in expected_report["metrics"]} == expected_report["metrics"]
    assert report["best"]["learner"] == "xgboost"
    assert lake.read(f"{directory}/model.json") == expected.read(f"{expected_directory}/model.json")


def assert_reports_last(lake: LakeFiles, keys: list[str]) -> None:
    """A partition's report is written after its rows, and nothing temporary stays."""
    changed = lake.changed()
    assert not [name for name in changed if "_temporary" in name]
    for table in (CLEANED_TABLE, FEATURES_TABLE):
        for key in keys:
            directory = f"{table}/raw_file={key}"
            rows = [at for name, at in changed.items() if name.startswith(f"{directory}/part-")]
            assert rows
            assert max(rows) <= changed[f"{directory}/_report.json"]
