"""Where files are: a directory or a prefix of an S3 bucket, behind one interface."""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from spark_jobs.schema import REPORT_NAME

#: Small files that are read at a time.
READERS = 32

#: An S3 that is away is an error within a minute, which is what Dagster gives a sensor.
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 18
S3_ATTEMPTS = 3


class StorageError(OSError):
    """S3 cannot be used as the settings say; the message names the variable to look at."""


@dataclass(frozen=True)
class StoredFile:
    """A file or object: name below the root, size in bytes, and what tells this content from another."""

    name: str
    size: int
    fingerprint: str


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


def open_store(uri: str) -> Store:
    """The store behind a directory or ``s3://bucket/prefix``."""
    return S3Store(uri) if uri.startswith("s3://") else LocalStore(uri)
