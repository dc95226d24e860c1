"""The lake as Dagster's assets use it: raw files, partitions, reports."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from ml_platform.lake.partitions import RAW_SUFFIX, is_partition_key, partition_key
from ml_platform.lake.reports import PartitionReport, ReportT
from ml_platform.lake.storage import READERS, Store, open_store
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION


class SchemaVersionError(Exception):
    """The lake was written by a newer version of the platform, which this one must neither read nor replace."""


@dataclass(frozen=True)
class RawFile:
    """A raw file: partition key, URI for Spark, size in bytes, fingerprint of its present content."""

    key: str
    uri: str
    size: int
    fingerprint: str

    def as_request(self) -> dict[str, Any]:
        """The file as the cleaning job and its report know it."""
        return {"uri": self.uri, "size": self.size, "fingerprint": self.fingerprint}


#: Reports that this process has read, by lake and table: key → fingerprint and report (as an object, or, of an older
#: version, as it stands; None if it is unreadable). A run looks at all of them in every step, and Dagster makes a
#: resource anew for each.
_reports_read: dict[tuple[str, str], dict[str, tuple[str, PartitionReport | dict[str, Any] | None]]] = {}


class LakeResource(dg.ConfigurableResource):
    """Raw files and the lake. A partition of the lake exists if and only if its report does."""

    raw_uri: str = Field(description="Directory or s3://bucket/prefix of the raw files.")
    lake_uri: str = Field(description="Directory or s3://bucket/prefix of the lake.")
    epoch: str = Field(description="First day of the data set, YYYY-MM-DD; tx_time_seconds counts from it.")

    @cached_property
    def raw(self) -> Store:
        """Store of the raw files."""
        return open_store(self.raw_uri)

    @cached_property
    def store(self) -> Store:
        """Store of the lake."""
        return open_store(self.lake_uri)

    def list_raw_files(self) -> tuple[dict[str, RawFile], dict[str, str]]:
        """Raw files by key, in order of their keys; and names that cannot be a key, each with the reason."""
        files, ignored = {}, {}
        for stored in self.raw.list_directory():
            if not stored.name.endswith(RAW_SUFFIX):
                continue
            try:
                key = partition_key(stored.name)
            except ValueError as error:
                ignored[stored.name] = str(error)
            else:
                files[key] = RawFile(key, self.raw.spark_uri(stored.name), stored.size, stored.fingerprint)
        return dict(sorted(files.items())), ignored

    def partition_path(self, table: str, key: str) -> str:
        """Name of a partition's directory in the lake."""
        return f"{table}/raw_file={key}"

    def partition_uri(self, table: str, key: str) -> str:
        """URI of a partition's directory as Spark takes it."""
        return self.store.spark_uri(self.partition_path(table, key))

    def reports(self, kind: type[ReportT]) -> dict[str, ReportT]:
        """Reports of all complete partitions of a table, by key.

        A report that is unreadable or lacks a field does not mark its partition as complete, and neither does one of
        an older version: see `outdated_reports`. Raises SchemaVersionError: there is one of a newer version.
        """
        return self.split_reports(kind)[0]

    def outdated_reports(self, kind: type[ReportT]) -> dict[str, dict[str, Any]]:
        """Reports of a table that an older version of the platform wrote, as they stand. Raises as `reports` does."""
        return self.split_reports(kind)[1]

    def split_reports(self, kind: type[ReportT]) -> tuple[dict[str, ReportT], dict[str, dict[str, Any]]]:
        """What `reports` and `outdated_reports` return, by one listing."""
        reports = self._all_reports(kind)
        return (
            {key: report for key, report in reports.items() if isinstance(report, kind)},
            {key: report for key, report in reports.items() if isinstance(report, dict)},
        )

    def _all_reports(self, kind: type[ReportT]) -> dict[str, PartitionReport | dict[str, Any] | None]:
        """By one listing; read are those that are new since the last one."""
        prefix = f"{kind.table}/raw_file="
        listed = {}
        for stored in self.store.list_reports(kind.table):
            key = stored.name.removeprefix(prefix).removesuffix(f"/{REPORT_NAME}")
            # Other writers may name a directory as they like; the platform only makes keys.
            if stored.name.startswith(prefix) and is_partition_key(key):
                listed[key] = stored
        known = _reports_read.get((self.lake_uri, kind.table), {})
        current = {key: known[key] for key, stored in listed.items() if known.get(key, ("",))[0] == stored.fingerprint}
        new = [key for key in listed if key not in current]
        with ThreadPoolExecutor(READERS) as pool:
            contents = list(pool.map(self._read_if_there, [listed[key].name for key in new]))
        for key, content in zip(new, contents, strict=True):
            if content is not None:
                current[key] = listed[key].fingerprint, self._parsed(kind, key, content)
        _reports_read[self.lake_uri, kind.table] = current
        return {key: current[key][1] for key in listed if key in current}

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def _parsed(self, kind: type[ReportT], key: str, content: bytes) -> ReportT | dict[str, Any] | None:
        try:
            report = json.loads(content)
        except (ValueError, RecursionError):
            return None
        version = report.get("schema_version") if isinstance(report, dict) else None
        if type(version) is not int or version < 1:  # not True, which equals 1
            return None
        if version > SCHEMA_VERSION:
            raise SchemaVersionError(
                f"{self.partition_path(kind.table, key)} in {self.lake_uri} was written by a newer version of "
                f"ml_platform (schema {version}; this one knows up to {SCHEMA_VERSION}): run that version "
                "here, or set ML_PLATFORM_LAKE_URI to another lake"
            )
        if version < SCHEMA_VERSION:
            return dict(report)
        try:
            return kind.model_validate(report)
        except ValidationError:
            return None

    def read_json(self, name: str) -> Any:
        """A small JSON file of the lake. Raises FileNotFoundError, or ValueError if it is not JSON."""
        return json.loads(self.store.read(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file to the lake, whole or not at all."""
        self.store.write(name, json.dumps(value, indent=1, sort_keys=True).encode())
