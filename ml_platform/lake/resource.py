"""Dagster resource for the lake: raw files, partitions, reports."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from ml_platform.lake.partitions import is_partition_key, partition_key
from ml_platform.lake.reports import (
    CLEANED_TABLE,
    CleanedReport,
    CleanedReports,
    PartitionReport,
    ReportT,
    UncleanedFile,
)
from ml_platform.lake.storage import READ_THREADS, Store, StoredFile, open_store
from ml_platform.settings import Settings
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION


class SchemaVersionError(Exception):
    """The lake was written by a newer version of the platform; this version must not read or overwrite it."""


MODELS_DIRECTORY = "models"
WITHDRAWN_DIRECTORY = "_withdrawn"
UNCLEANED_DIRECTORY = "_uncleaned"

#: Average bytes of a raw row: 1.88 billion rows in 112 GiB.
BYTES_PER_ROW = 64

#: Bytes of text that a compressed byte stands for, in files like the course's.
TEXT_PER_BYTE = {".gz": 3, ".bz2": 4}


@dataclass(frozen=True)
class RawFile:
    """A raw file: partition key, URI for Spark, size in bytes, fingerprint of its current content."""

    key: str
    uri: str
    size: int
    fingerprint: str

    @property
    def name(self) -> str:
        """Name in the raw store."""
        return self.uri.rpartition("/")[2]

    @property
    def text_bytes(self) -> int:
        """Size of its text, estimated if the file is compressed."""
        suffix = next((suffix for suffix in TEXT_PER_BYTE if self.uri.endswith(suffix)), None)
        return self.size * TEXT_PER_BYTE[suffix] if suffix else self.size

    def version(self, epoch: str) -> str:
        """All that the cleaning of the file depends on, but for limits."""
        return f"{SCHEMA_VERSION}/{epoch}/{self.fingerprint}"

    def as_request(self) -> dict[str, Any]:
        """The file in the format of the cleaning job's request."""
        return {"uri": self.uri, "size": self.size, "fingerprint": self.fingerprint}


#: Cache of reports by lake and table: key → fingerprint and report (typed; a dict if of an older version; None if
#: unreadable). Every step of a run reads all reports, and Dagster creates a new resource for each step, so the cache is
#: global.
_report_cache: dict[tuple[str, str], dict[str, tuple[str, PartitionReport | dict[str, Any] | None]]] = {}


class LakeResource(dg.ConfigurableResource):
    """Raw files and the lake. A partition of the lake exists if and only if its report does."""

    raw_uri: str = Field(description="Directory or s3://bucket/prefix of the raw files.")
    lake_uri: str = Field(description="Directory or s3://bucket/prefix of the lake.")
    epoch: str = Field(description="First day of the data set, YYYY-MM-DD; tx_time_seconds counts from it.")

    @classmethod
    def from_settings(cls, settings: Settings) -> LakeResource:
        """The lake of a deployment."""
        return cls(raw_uri=settings.raw_uri, lake_uri=settings.lake_uri, epoch=settings.epoch.isoformat())

    @cached_property
    def raw(self) -> Store:
        """Store of the raw files."""
        return open_store(self.raw_uri)

    @cached_property
    def store(self) -> Store:
        """Store of the lake."""
        return open_store(self.lake_uri)

    def list_raw_files(self) -> tuple[dict[str, RawFile], dict[str, str]]:
        """Raw files by key, sorted, and names that are not taken, each with the reason."""
        files: dict[str, list[StoredFile]] = defaultdict(list)
        ignored = {}
        for stored in self.raw.list_directory():
            try:
                files[partition_key(stored.name)].append(stored)
            except ValueError as error:
                # A lake may lie in a directory among the raw files; a file whose name begins alike is not it.
                in_raw = f"{self.lake_uri}/".removeprefix(f"{self.raw_uri.rstrip('/')}/")
                if not (stored.name.endswith("/") and in_raw.startswith(stored.name)):
                    ignored[stored.name] = str(error)
        for key, several in list(files.items()):
            if len(several) > 1:
                names = sorted(stored.name for stored in several)
                ignored |= {name: f"there are several files of partition {key}: {', '.join(names)}" for name in names}
                del files[key]
        return {
            key: RawFile(key, self.raw.spark_uri(stored.name), stored.size, stored.fingerprint)
            for key, (stored,) in sorted(files.items())
        }, dict(sorted(ignored.items()))

    def withdrawn(self) -> list[str]:
        """Keys that were withdrawn and are kept out, whatever their raw file."""
        return list(self._records(WITHDRAWN_DIRECTORY))

    def accept(self, reports: Iterable[CleanedReport]) -> CleanedReports:
        """Note in the reports of cleaned files that their rows are taken as they are; returns the new reports."""
        accepted = {}
        for report in reports:
            accepted[report.partition] = report.model_copy(update={"accepted": True})
            name = f"{self.partition_path(CLEANED_TABLE, report.partition)}/{REPORT_NAME}"
            if not report.accepted:
                content = self.read_json(name)
                self.write_json(name, {**content, "accepted": True})
        return accepted

    def uncleaned(self) -> dict[str, UncleanedFile]:
        """Raw files that the last run over them could not clean."""
        files = {}
        for key, name in self._records(UNCLEANED_DIRECTORY).items():
            content = self._read_or_none(name)
            try:
                files[key] = UncleanedFile.model_validate_json(content or b"")
            except ValidationError:  # broken: it will be tried again
                continue
        return files

    def set_uncleaned(self, key: str, file: UncleanedFile | None) -> None:
        """Note that a raw file could not be cleaned; None: that it was."""
        name = f"{UNCLEANED_DIRECTORY}/{key}.json"
        if file is not None:
            self.write_json(name, file.model_dump())
        else:
            self.store.delete(name)

    def _records(self, directory: str) -> dict[str, str]:
        """JSON files of a directory of the lake by key."""
        names = [stored.name.rpartition("/")[2] for stored in self.store.list_directory(directory)]
        keys = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return {key: f"{directory}/{key}.json" for key in keys if is_partition_key(key)}

    def partition_path(self, table: str, key: str) -> str:
        """Name of a partition's directory in the lake."""
        return f"{table}/raw_file={key}"

    def partition_uri(self, table: str, key: str) -> str:
        """URI of a partition's directory for Spark."""
        return self.store.spark_uri(self.partition_path(table, key))

    def model_path(self, cutoff: str, run_id: str) -> str:
        """Name of the directory in the lake of the model that a run trained."""
        return f"{MODELS_DIRECTORY}/{cutoff}/{run_id}"

    def reports(self, kind: type[ReportT]) -> dict[str, ReportT]:
        """Reports of all complete partitions of a table, by key.

        A partition whose report is unreadable, lacks a field or is of an older version (see `outdated_reports`) is not
        complete. Raises SchemaVersionError if a report is of a newer version.
        """
        return self.split_reports(kind)[0]

    def outdated_reports(self, kind: type[ReportT]) -> dict[str, dict[str, Any]]:
        """Reports of a table written by an older version of the platform, unparsed. Raises as `reports` does."""
        return self.split_reports(kind)[1]

    def split_reports(self, kind: type[ReportT]) -> tuple[dict[str, ReportT], dict[str, dict[str, Any]]]:
        """Results of `reports` and `outdated_reports` from a single listing."""
        reports = self._all_reports(kind)
        return (
            {key: report for key, report in reports.items() if isinstance(report, kind)},
            {key: report for key, report in reports.items() if isinstance(report, dict)},
        )

    def _all_reports(self, kind: type[ReportT]) -> dict[str, PartitionReport | dict[str, Any] | None]:
        """All reports from a single listing; reads only those that changed since the last one."""
        prefix = f"{kind.table}/raw_file="
        listed = {}
        for stored in self.store.list_reports(kind.table):
            key = stored.name.removeprefix(prefix).removesuffix(f"/{REPORT_NAME}")
            # Ignore directories that other programs created: the platform only writes valid keys.
            if stored.name.startswith(prefix) and is_partition_key(key):
                listed[key] = stored
        cached = _report_cache.get((self.lake_uri, kind.table), {})
        current = {
            key: cached[key] for key, stored in listed.items() if cached.get(key, ("",))[0] == stored.fingerprint
        }
        new = [key for key in listed if key not in current]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            contents = list(pool.map(self._read_or_none, [listed[key].name for key in new]))
        for key, content in zip(new, contents, strict=True):
            if content is not None:
                current[key] = listed[key].fingerprint, self._parse(kind, key, content)
        _report_cache[self.lake_uri, kind.table] = current
        return {key: current[key][1] for key in listed if key in current}

    def _read_or_none(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def _parse(self, kind: type[ReportT], key: str, content: bytes) -> ReportT | dict[str, Any] | None:
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
                f"ml_platform (schema {version}; this version supports up to {SCHEMA_VERSION}): run the "
                "newer version, or set ML_PLATFORM_LAKE_URI to another lake"
            )
        if version < SCHEMA_VERSION:
            return dict(report)
        try:
            return kind.model_validate(report)
        except ValidationError:
            return None

    def read_json(self, name: str) -> Any:
        """Read a small JSON file of the lake. Raises FileNotFoundError, or ValueError if it is not JSON."""
        return json.loads(self.store.read(name))

    def write_json(self, name: str, value: Any) -> None:
        """Atomically write a small JSON file to the lake."""
        self.store.write(name, json.dumps(value, indent=1, sort_keys=True).encode())
