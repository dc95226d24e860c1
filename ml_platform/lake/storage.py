"""File storage: a local directory or an S3 prefix behind one interface."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from spark_jobs.schema import REPORT_NAME

#: Threads that read small files.
READ_THREADS = 32

#: An unreachable S3 must fail within a minute: Dagster's limit for a sensor tick.
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 18
S3_ATTEMPTS = 3


class StorageError(OSError):
    """S3 cannot be used with these settings; the message names the variable to check."""


@dataclass(frozen=True)
class StoredFile:
    """A file or object: name relative to the root, size in bytes, and fingerprint of its content."""

    name: str
    size: int
    fingerprint: str


def checked_name(name: str) -> str:
    """Return `name` if it stays below the root of a store; otherwise raise ValueError."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name!r} is an invalid name: it points outside the lake")
    return name


def readable_path(uri: str) -> str:
    """A URI of Spark's as a path for people and other readers: an absolute path, or s3://bucket/key.

    Dagster would make a link of a file URI, which browsers refuse to open.
    """
    return uri.removeprefix("file://").replace("s3a://", "s3://", 1)


class Store(Protocol):
    """A tree of files. Names are relative to its root and separated by ``/``; other names raise ValueError."""

    def spark_uri(self, name: str = "") -> str:
        """URI of `name` for Spark."""

    def list_directory(self, name: str = "") -> Iterator[StoredFile]:
        """Files directly in a directory, unordered; empty if it does not exist. Directories have a ``/`` at the end."""

    def list_reports(self, name: str) -> Iterator[StoredFile]:
        """Reports one directory below `name`, from a single listing."""

    def read(self, name: str) -> bytes:
        """Read a small file. Raises FileNotFoundError."""

    def read_start(self, name: str, size: int = 1) -> bytes:
        """Read the first bytes of a non-empty file. Raises FileNotFoundError."""

    def write(self, name: str, content: bytes) -> None:
        """Atomically write a small file."""

    def delete(self, name: str) -> None:
        """Delete a file, or a directory with all that is in it, if it exists."""

    def open_new(self, name: str) -> BinaryIO:
        """Context manager for writing a large file, which becomes visible once it is closed without an error."""

    def delete_leftovers(self) -> None:
        """Delete what killed processes left directly below the root: files that they had not finished."""


#: Names of files that an _AtomicFile is writing.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}", re.DOTALL)


class LocalStore:
    """A local directory."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def _path(self, name: str) -> Path:
        return self._root / checked_name(name)

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
                    if _TEMPORARY.fullmatch(entry.name):
                        continue
                    if entry.is_file():
                        status = entry.stat()
                        yield StoredFile(entry.name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")
                    elif entry.is_dir():
                        yield StoredFile(f"{entry.name}/", 0, "")
                except FileNotFoundError:  # deleted during the listing
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
                with suppress(FileNotFoundError):  # deleted during the listing
                    status = path.stat()
                    # The inode tells apart two reports of the same size written within one clock tick.
                    fingerprint = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"
                    yield StoredFile(report, status.st_size, fingerprint)

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def read_start(self, name: str, size: int = 1) -> bytes:
        with self._path(name).open("rb") as file:
            return file.read(size)

    def write(self, name: str, content: bytes) -> None:
        with self.open_new(name) as file:
            file.write(content)

    def delete(self, name: str) -> None:
        path = self._path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def open_new(self, name: str) -> BinaryIO:
        return _AtomicFile(self._path(name))  # type: ignore[return-value]

    def delete_leftovers(self) -> None:
        for path in self._root.glob(".*"):
            if _TEMPORARY.fullmatch(path.name):
                # Its writer, if alive, holds the lock.
                with suppress(OSError), path.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


class _AtomicFile:
    """A temporary file that is renamed to its final name once it is written without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")

    def __enter__(self) -> BinaryIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self._file

    def __exit__(self, error_type: object, *_: object) -> None:
        try:
            self._file.close()
            if error_type is None:
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


class S3Store:
    """A prefix of an S3 bucket. Credentials, region and endpoint come from boto3.

    S3 errors are raised as StorageError.
    """

    def __init__(self, uri: str) -> None:
        self._bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    @cached_property
    def _client(self) -> Any:
        with _translated_errors(self._bucket):
            return _s3_resource().get_client()

    def spark_uri(self, name: str = "") -> str:
        return f"s3a://{self._bucket}/{self._key(name)}".rstrip("/")

    def _key(self, name: str) -> str:
        return self._prefix + checked_name(name)

    def _objects(self, prefix: str, delimiter: str = "") -> Iterator[Mapping[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._key(prefix), Delimiter=delimiter
        )
        with _translated_errors(self._bucket):
            for page in pages:
                yield from page.get("Contents", [])
                yield from page.get("CommonPrefixes", [])

    def list_directory(self, name: str = "") -> Iterator[StoredFile]:
        prefix = f"{name}/" if name else ""
        for item in self._objects(prefix, "/"):
            base_name = item.get("Key", item.get("Prefix", ""))[len(self._prefix + prefix) :]
            if "Prefix" in item:
                yield StoredFile(base_name, 0, "")
            elif base_name:  # consoles create a placeholder object named like the directory
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
        with _translated_errors(self._bucket, self._key(name)):
            return self._client.get_object(Bucket=self._bucket, Key=self._key(name))["Body"].read()

    def read_start(self, name: str, size: int = 1) -> bytes:
        with _translated_errors(self._bucket, self._key(name)):
            item = self._client.get_object(Bucket=self._bucket, Key=self._key(name), Range=f"bytes=0-{size - 1}")
            return item["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        with _translated_errors(self._bucket, self._key(name)):
            self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content)

    def delete(self, name: str) -> None:
        keys = [self._key(name), *(item["Key"] for item in self._objects(f"{name}/"))]
        with _translated_errors(self._bucket, self._key(name)):
            for key in keys:
                self._client.delete_object(Bucket=self._bucket, Key=key)

    def open_new(self, name: str) -> BinaryIO:
        return _Upload(self._client, self._bucket, self._key(name))  # type: ignore[return-value]

    def delete_leftovers(self) -> None:
        """Nothing to do: an object that was not finished does not exist."""


@cache
def _service_models(data_path: str | None) -> Any:
    """boto3's service models, cached because loading them takes each session 0.1 s."""
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _s3_resource() -> Any:
    """dagster-aws's S3Resource extended with timeouts and support for AWS_CA_BUNDLE."""
    import boto3
    from botocore.config import Config
    from botocore.session import Session
    from dagster_aws.s3 import S3Resource

    class TimedS3Resource(S3Resource):
        def get_client(self) -> Any:
            session = Session(profile=self.profile_name)
            session.register_component("data_loader", _service_models(session.get_config_variable("data_path")))
            return boto3.Session(botocore_session=session).client(
                "s3",
                config=Config(
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=READ_TIMEOUT_S,
                    retries={"mode": "standard", "total_max_attempts": self.max_attempts},
                    max_pool_connections=READ_THREADS,
                ),
            )

    return TimedS3Resource(max_attempts=S3_ATTEMPTS)


@contextmanager
def _translated_errors(bucket: str, key: str = "") -> Generator[None]:
    """Convert boto3's errors to a StorageError that names the variable to check, or to FileNotFoundError."""
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
            raise StorageError(f"{error}: AWS_ENDPOINT_URL_S3 must be like https://host") from error
        raise


_KEY_VARIABLES = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_S3_ERROR_HINTS = {
    "InvalidAccessKeyId": f"S3 does not know the access key: check {_KEY_VARIABLES}",
    "XAdminUserNotFound": f"S3 does not know the access key: check {_KEY_VARIABLES}",  # versitygw's code for the same
    "SignatureDoesNotMatch": f"the secret key does not match the access key: check {_KEY_VARIABLES}",
    "ExpiredToken": "the credentials have expired: renew AWS_SESSION_TOKEN and its keys",
    "InvalidToken": "the session token is not valid: check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock differs too much from S3's",
    "AuthorizationHeaderMalformed": "S3 expects another region: check AWS_DEFAULT_REGION",
    "PermanentRedirect": "the bucket is in another region: check AWS_DEFAULT_REGION",
    "IllegalLocationConstraintException": "the bucket is in another region: check AWS_DEFAULT_REGION",
}


def _storage_error(error: Exception, bucket: str, key: str) -> OSError:
    import botocore.exceptions as boto

    uri = f"s3://{bucket}/{key}"
    if isinstance(error, boto.ClientError):
        code = str(error.response.get("Error", {}).get("Code"))
        if code == "NoSuchBucket":
            return StorageError(
                f"bucket {bucket} does not exist: create it, or check ML_PLATFORM_RAW_URI, ML_PLATFORM_LAKE_URI and "
                "AWS_ENDPOINT_URL_S3"
            )
        if code in ("NoSuchKey", "404"):
            return FileNotFoundError(uri)
        if code in ("AccessDenied", "403"):
            action = f"{error.operation_name} on {uri}"
            return StorageError(f"S3 denies {action}: check {_KEY_VARIABLES}, and this key's permissions")
        hint = _S3_ERROR_HINTS.get(code, str(error))
        return StorageError(f"{hint} ({code}, {uri})")
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return StorageError(f"no credentials for S3: set {_KEY_VARIABLES}, or AWS_PROFILE")
    if isinstance(error, boto.ProfileNotFound):
        return StorageError(f"{error}: check AWS_PROFILE")
    if isinstance(error, boto.SSLError):
        return StorageError(f"{error}: for a private CA, set AWS_CA_BUNDLE to its certificate (docs/s3.md)")
    if isinstance(error, (boto.ConnectionError, boto.HTTPClientError)):
        return StorageError(f"S3 does not answer: {error}: check AWS_ENDPOINT_URL_S3 and the network")
    return StorageError(f"{type(error).__name__}: {error} ({uri})")


class _Upload:
    """A temporary file that is uploaded to S3 once it is written without an error."""

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
                with _translated_errors(self._bucket, self._key):
                    self._client.upload_file(self._file.name, self._bucket, self._key)


def open_store(uri: str) -> Store:
    """Open the store at a directory or ``s3://bucket/prefix``."""
    return S3Store(uri) if uri.startswith("s3://") else LocalStore(uri)
