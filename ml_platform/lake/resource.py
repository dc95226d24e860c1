"""The lake: raw files and the platform's own data, in a directory or an S3 bucket."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol, cast

import dagster as dg
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from ml_platform.lake.partitions import RAW_SUFFIX, is_partition_key, partition_key
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION

CLEANED = "cleaned_transactions"
REJECTED = "rejected_transactions"
FEATURES = "transaction_features"

#: Reports read at a time; each is one small request.
READERS = 32

#: An S3 that is away is an error within a minute, which is what Dagster gives a sensor.
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 18
S3_ATTEMPTS = 3


class StorageError(OSError):
    """S3 cannot be used as the settings say; the message names the variable to look at."""


class SchemaVersionError(Exception):
    """The lake was written by a newer version of the platform, which this one must neither read nor replace."""


@dataclass(frozen=True)
class StoredFile:
    """A file or object: name below the root, size in bytes, and what tells this content from another."""

    name: str
    size: int
    fingerprint: str


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


#: Reports of a table by partition.
Reports = dict[str, dict[str, Any]]


def instant(text: str) -> datetime:
    """An instant of a report's ``tx_datetime``."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")


def _checked_instant(text: str) -> str:
    instant(text)
    return text


class _Part(BaseModel, strict=True):
    """A part of a report, as far as the platform reads it. Somebody may have edited the file."""


class _Raw(_Part):
    size: int
    fingerprint: str


class _CleanedCounts(_Part):
    raw_rows: int
    clean_rows: int
    duplicate_rows: int
    rejected_rows: int
    fraud_rows: int


class _Ends(_Part):
    min: Any
    max: Any

    @model_validator(mode="after")
    def _both_or_none(self) -> _Ends:
        if (self.min is None) != (self.max is None):
            raise ValueError("one end alone")
        return self


class _Instants(_Ends):
    min: Annotated[str, AfterValidator(_checked_instant)] | None
    max: Annotated[str, AfterValidator(_checked_instant)] | None


class _Ids(_Ends):
    min: int | None
    max: int | None


class _CleanedReport(_Part):
    epoch: str
    raw: _Raw
    counts: _CleanedCounts
    tx_datetime: _Instants
    transaction_id: _Ids


class _FeaturesCounts(_Part):
    rows: int
    fraud_rows: int
    unusable_rows: int


class _FeaturesReport(_Part):
    inputs: dict[str, Any]
    features: list[str]
    counts: _FeaturesCounts


_REPORTS: dict[str, type[_Part]] = {CLEANED: _CleanedReport, FEATURES: _FeaturesReport}


def checked(name: str) -> str:
    """`name`, if it stays below the root of a store. Raises ValueError: it leads out of it."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name!r} is no name in the lake: it leads out of it")
    return name


class Store(Protocol):
    """A tree of files. Names are relative to its root and separated by ``/``; others are a ValueError."""

    def spark_uri(self, name: str = "") -> str:
        """URI of `name` as Spark takes it."""

    def list_directory(self, name: str = "") -> Iterator[StoredFile]:
        """Files right below a directory, in no order; none if it does not exist."""

    def list_reports(self, name: str) -> Iterator[StoredFile]:
        """The reports that stand one directory below `name`, by one listing."""

    def read(self, name: str) -> bytes:
        """Content of a small file. Raises FileNotFoundError."""

    def read_start(self, name: str) -> bytes:
        """The first byte of a file that is not empty. Raises FileNotFoundError."""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""

    def open_new(self, name: str) -> BinaryIO:
        """A context manager for writing a large file, which appears when it is closed without an error."""

    def download(self, name: str, target: Path) -> None:
        """Copy the directory `name` with all below it to `target`."""

    def upload(self, source: Path, name: str) -> None:
        """Copy the directory `source` with all below it to `name`."""


class LocalStore:
    """A directory."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def _path(self, name: str) -> Path:
        return self._root / checked(name)

    def spark_uri(self, name: str = "") -> str:
        return f"file://{self._path(name)}".rstrip("/")

    def list_directory(self, name: str = "") -> Iterator[StoredFile]:
        try:
            entries = os.scandir(self._path(name))
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                try:
                    if entry.is_file():
                        found = entry.stat()
                        yield StoredFile(entry.name, found.st_size, f"{found.st_size}-{found.st_mtime_ns}")
                except FileNotFoundError:  # it vanished while we listed
                    continue

    def list_reports(self, name: str) -> Iterator[StoredFile]:
        try:
            entries = os.scandir(self._path(name))
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                report = f"{name}/{entry.name}/{REPORT_NAME}"
                path = self._path(report)
                if not path.is_file():
                    continue
                with suppress(FileNotFoundError):  # it vanished while we listed
                    found = path.stat()
                    # A report is replaced by another file, perhaps of the same size within one tick of the clock.
                    fingerprint = f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"
                    yield StoredFile(report, found.st_size, fingerprint)

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def read_start(self, name: str) -> bytes:
        with self._path(name).open("rb") as file:
            return file.read(1)

    def write(self, name: str, content: bytes) -> None:
        with self.open_new(name) as file:
            file.write(content)

    def open_new(self, name: str) -> BinaryIO:
        return _Draft(self._path(name))  # type: ignore[return-value]

    def download(self, name: str, target: Path) -> None:
        import shutil

        shutil.copytree(self._path(name), target, dirs_exist_ok=True)

    def upload(self, source: Path, name: str) -> None:
        import shutil

        shutil.copytree(source, self._path(name), dirs_exist_ok=True)


class _Draft:
    """A file that takes its name only once it is written without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")

    def __enter__(self) -> BinaryIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._draft.open("wb")
        return self._file

    def __exit__(self, error_type: object, *_: object) -> None:
        try:
            self._file.close()
            if error_type is None:
                self._draft.replace(self._path)
        finally:
            self._draft.unlink(missing_ok=True)


class S3Store:
    """A prefix of an S3 bucket. Credentials, region and endpoint are those of boto3.

    What S3 refuses is a StorageError.
    """

    def __init__(self, uri: str) -> None:
        self._bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    @cached_property
    def _client(self) -> Any:
        with _named_variables(self._bucket):
            return _s3_resource().get_client()

    def spark_uri(self, name: str = "") -> str:
        return f"s3a://{self._bucket}/{self._key(name)}".rstrip("/")

    def _key(self, name: str) -> str:
        return self._prefix + checked(name)

    def _objects(self, prefix: str, delimiter: str = "") -> Iterator[Mapping[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._key(prefix), Delimiter=delimiter
        )
        with _named_variables(self._bucket):
            for page in pages:
                yield from page.get("Contents", [])

    def list_directory(self, name: str = "") -> Iterator[StoredFile]:
        prefix = f"{name}/" if name else ""
        for item in self._objects(prefix, "/"):
            base_name = item["Key"][len(self._prefix + prefix) :]
            if base_name:  # an object named like the directory is a console's placeholder
                yield self._stored(base_name, item)

    def list_reports(self, name: str) -> Iterator[StoredFile]:
        for item in self._objects(f"{name}/"):
            below = item["Key"][len(self._prefix) :]
            if below.endswith(f"/{REPORT_NAME}") and below.count("/") == name.count("/") + 2:
                yield self._stored(below, item)

    @staticmethod
    def _stored(name: str, item: Mapping[str, Any]) -> StoredFile:
        etag = item["ETag"].strip('"')
        return StoredFile(name, item["Size"], f"{item['Size']}-{etag}")

    def read(self, name: str) -> bytes:
        with _named_variables(self._bucket, self._key(name)):
            return self._client.get_object(Bucket=self._bucket, Key=self._key(name))["Body"].read()

    def read_start(self, name: str) -> bytes:
        with _named_variables(self._bucket, self._key(name)):
            item = self._client.get_object(Bucket=self._bucket, Key=self._key(name), Range="bytes=0-0")
            return item["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        with _named_variables(self._bucket, self._key(name)):
            self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content)

    def open_new(self, name: str) -> BinaryIO:
        return _Upload(self._client, self._bucket, self._key(name))  # type: ignore[return-value]

    def download(self, name: str, target: Path) -> None:
        prefix = f"{name}/"
        for item in self._objects(prefix):
            below = item["Key"][len(self._prefix + prefix) :]
            if below.endswith("/") or not below:  # a directory's placeholder
                continue
            # An object may have any name, with which it would leave the directory.
            path = target / checked(below)
            path.parent.mkdir(parents=True, exist_ok=True)
            with _named_variables(self._bucket, item["Key"]):
                self._client.download_file(self._bucket, item["Key"], str(path))

    def upload(self, source: Path, name: str) -> None:
        for path in source.rglob("*"):
            if path.is_file():
                key = self._key(f"{name}/{path.relative_to(source).as_posix()}")
                with _named_variables(self._bucket, key):
                    self._client.upload_file(str(path), self._bucket, key)


@cache
def _boto_models(data_path: str | None) -> Any:
    """boto3's descriptions of services, which each session would read anew: a tenth of a second for each store."""
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _s3_resource() -> Any:
    """dagster-aws's S3Resource, with timeouts, which it lacks, and heeding AWS_CA_BUNDLE."""
    import boto3
    from botocore.config import Config
    from botocore.session import Session
    from dagster_aws.s3 import S3Resource

    class TimedS3Resource(S3Resource):
        def get_client(self) -> Any:
            core = Session(profile=self.profile_name)
            core.register_component("data_loader", _boto_models(core.get_config_variable("data_path")))
            return boto3.Session(botocore_session=core).client(
                "s3",
                config=Config(
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=READ_TIMEOUT_S,
                    retries={"mode": "standard", "total_max_attempts": self.max_attempts},
                    max_pool_connections=READERS,
                ),
            )

    return TimedS3Resource(max_attempts=S3_ATTEMPTS)


@contextmanager
def _named_variables(bucket: str, key: str = "") -> Generator[None]:
    """Turn boto3's errors into a StorageError that names the variable at fault; no such object: FileNotFoundError."""
    import boto3.exceptions
    import botocore.exceptions as boto

    try:
        yield
    except boto3.exceptions.S3UploadFailedError as error:
        cause = error.__context__ if isinstance(error.__context__, boto.ClientError) else error
        raise _storage_error(cause, bucket, key) from error
    except (boto.BotoCoreError, boto.ClientError) as error:
        raise _storage_error(error, bucket, key) from error
    except ValueError as error:
        if "endpoint" in str(error):
            raise StorageError(f"{error}: AWS_ENDPOINT_URL_S3 takes https://host") from error
        raise


_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_S3_REFUSALS = {
    "InvalidAccessKeyId": f"S3 does not know the access key: check {_KEYS}",
    "XAdminUserNotFound": f"S3 does not know the access key: check {_KEYS}",  # the same, of versitygw
    "SignatureDoesNotMatch": f"the secret does not belong to the access key: check {_KEYS}",
    "ExpiredToken": "the credentials have expired: renew AWS_SESSION_TOKEN and the keys that go with it",
    "InvalidToken": "the session token is not valid: check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "the clock of this machine differs too much from that of S3",
    "AuthorizationHeaderMalformed": "S3 expects another region: check AWS_DEFAULT_REGION",
    "PermanentRedirect": "the bucket is in another region: check AWS_DEFAULT_REGION",
    "IllegalLocationConstraintException": "the bucket is in another region: check AWS_DEFAULT_REGION",
}


def _storage_error(error: Exception, bucket: str, key: str) -> OSError:
    import botocore.exceptions as boto

    where = f"s3://{bucket}/{key}"
    if isinstance(error, boto.ClientError):
        code = str(error.response.get("Error", {}).get("Code"))
        if code == "NoSuchBucket":
            return StorageError(
                f"there is no bucket {bucket}: create it, or check ML_PLATFORM_RAW_URI, ML_PLATFORM_LAKE_URI and "
                "AWS_ENDPOINT_URL_S3"
            )
        if code in ("NoSuchKey", "404"):
            return FileNotFoundError(where)
        if code in ("AccessDenied", "403"):
            doing = f"{error.operation_name} on {where}"
            return StorageError(f"S3 denies {doing}: check {_KEYS}, and what this key may do")
        refusal = _S3_REFUSALS.get(code, str(error))
        return StorageError(f"{refusal} ({code}, {where})")
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return StorageError(f"there are no credentials for S3: set {_KEYS}, or AWS_PROFILE")
    if isinstance(error, boto.ProfileNotFound):
        return StorageError(f"{error}: check AWS_PROFILE")
    if isinstance(error, boto.SSLError):
        return StorageError(f"{error}: for a private authority, set AWS_CA_BUNDLE to its certificate (docs/s3.md)")
    if isinstance(error, (boto.ConnectionError, boto.HTTPClientError)):
        return StorageError(f"S3 does not answer: {error}: check AWS_ENDPOINT_URL_S3 and the network")
    return StorageError(f"{type(error).__name__}: {error} ({where})")


class _Upload:
    """A temporary file that is uploaded once it is written without an error."""

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self._client, self._bucket, self._key = client, bucket, key

    def __enter__(self) -> BinaryIO:
        import tempfile

        self._file = tempfile.NamedTemporaryFile()
        return cast("BinaryIO", self._file)

    def __exit__(self, error_type: object, *_: object) -> None:
        with self._file:
            if error_type is None:
                self._file.flush()
                with _named_variables(self._bucket, self._key):
                    self._client.upload_file(self._file.name, self._bucket, self._key)


#: The reports that this process has read, by lake and table: key → fingerprint and content, some 2 kB each. A run looks
#: at all of them in every step and check, and Dagster makes a resource anew for each.
_reports_read: dict[tuple[str, str], dict[str, tuple[str, bytes]]] = {}


def open_store(uri: str) -> Store:
    """The store behind a directory or ``s3://bucket/prefix``."""
    return S3Store(uri) if uri.startswith("s3://") else LocalStore(uri)


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
        """Raw files by key, in order of their keys; and names that are no safe key, each with the reason."""
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

    def reports(self, table: str) -> Reports:
        """Reports of all complete partitions of a table, by key.

        A report that is unreadable, or lacks what is read of it, marks nothing as complete, and neither does one of
        an older version: see `outdated_reports`. Raises SchemaVersionError: there is one of a newer version.
        """
        return self.split_reports(table)[0]

    def outdated_reports(self, table: str) -> Reports:
        """Reports of a table that an older version of the platform wrote, by key. Raises as `reports` does."""
        return self.split_reports(table)[1]

    def split_reports(self, table: str) -> tuple[Reports, Reports]:
        """What `reports` and `outdated_reports` return, each report read once."""
        current: Reports = {}
        outdated: Reports = {}
        for key, content in self._report_files(table).items():
            report = self._parsed_report(content)
            if report is None:
                continue
            version = report["schema_version"]
            if version == SCHEMA_VERSION:
                try:
                    _REPORTS[table].model_validate(report)
                except ValidationError:
                    continue
            if version > SCHEMA_VERSION:
                raise SchemaVersionError(
                    f"{self.partition_path(table, key)} in {self.lake_uri} was written by a newer version of "
                    f"ml_platform (schema {version}; this one knows up to {SCHEMA_VERSION}): run that version "
                    "here, or set ML_PLATFORM_LAKE_URI to another lake"
                )
            (current if version == SCHEMA_VERSION else outdated)[key] = report
        return current, outdated

    def _report_files(self, table: str) -> dict[str, bytes]:
        """The reports of a table as they stand, by key: by one listing, and those read that are new since the last."""
        prefix = f"{table}/raw_file="
        listed = {}
        for stored in self.store.list_reports(table):
            key = stored.name.removeprefix(prefix).removesuffix(f"/{REPORT_NAME}")
            # Whoever writes to the lake may name a directory as he likes; the platform only makes keys.
            if stored.name.startswith(prefix) and is_partition_key(key):
                listed[key] = stored
        known = _reports_read.get((self.lake_uri, table), {})
        read = {key: known[key] for key, stored in listed.items() if known.get(key, ("",))[0] == stored.fingerprint}
        new = [stored.name for key, stored in listed.items() if key not in read]
        with ThreadPoolExecutor(READERS) as pool:
            contents = dict(zip(new, pool.map(self._read_if_there, new), strict=True))
        for key, stored in listed.items():
            if (content := contents.get(stored.name)) is not None:
                read[key] = stored.fingerprint, content
        _reports_read[self.lake_uri, table] = read
        return {key: read[key][1] for key in listed if key in read}

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    @staticmethod
    def _parsed_report(content: bytes) -> dict[str, Any] | None:
        try:
            report = json.loads(content)
        except (ValueError, RecursionError):
            return None
        version = report.get("schema_version") if isinstance(report, dict) else None
        # True is no version, though Python takes it for 1.
        return report if type(version) is int and version >= 1 else None

    def read_json(self, name: str) -> Any:
        """A small JSON file of the lake. Raises FileNotFoundError, or ValueError if it is no JSON."""
        return json.loads(self.store.read(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file to the lake, whole or not at all."""
        self.store.write(name, json.dumps(value, indent=1, sort_keys=True).encode())
