"""An S3 server on this machine, for trials and tests.

`S3Server` is versitygw, a real server over a directory, built once with Go. If it cannot be built, `MotoServer` is the
fallback: a mock, good enough for trials but not for verification. `start_s3_server` chooses between them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from ml_platform.dev.cloud.processes import TetheredProcess, free_port, listens
from ml_platform.spark.s3a import DEFAULT_CACHE

VERSITYGW = "github.com/versity/versitygw/cmd/versitygw"
VERSITYGW_VERSION = "v1.8.0"
BUILD_TIMEOUT_S = 900
START_ATTEMPTS = 5


class BuildError(RuntimeError):
    """The server's program cannot be built here; the message says why and what to do."""


def build_versitygw(cache: Path = DEFAULT_CACHE) -> Path:
    """Path of the versitygw program, built with Go if the directory `cache` does not hold it yet.

    Safe to call from several processes at once: one builds, the others wait.

    Raises:
        BuildError: Go is missing, or the build failed.
    """
    directory = cache / f"versitygw-{VERSITYGW_VERSION}"
    program = directory / "versitygw"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None:
        raise BuildError(f"Go is missing; the S3 server is built with it (install Go, or put the program at {program})")
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if program.exists():
            return program
        print(f"building the S3 server versitygw {VERSITYGW_VERSION} once, about a minute …", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=directory) as draft:
            try:
                # Without debug information the build takes four fifths of the time.
                plain = ("-gcflags=all=-dwarf=false", "-ldflags=-s -w")
                built = subprocess.run(
                    ["env", f"GOBIN={draft}", go, "install", *plain, f"{VERSITYGW}@{VERSITYGW_VERSION}"],
                    capture_output=True,
                    text=True,
                    timeout=BUILD_TIMEOUT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise BuildError(f"go install took more than {BUILD_TIMEOUT_S} s") from None
            if built.returncode:
                (directory / "build.log").write_text(built.stderr)
                reason = (built.stderr.strip().splitlines() or ["no output"])[-1]
                raise BuildError(f"go install {VERSITYGW}@{VERSITYGW_VERSION} failed: {reason}")
            (Path(draft) / "versitygw").replace(program)
    return program


@dataclass
class LocalS3(ABC):
    """An S3 server on this machine: a context manager that starts it and creates the buckets."""

    directory: Path
    buckets: Sequence[str] = ()
    region: str = "ru-central1"
    port: int = field(default=0, init=False)
    access_key: str = field(default_factory=lambda: secrets.token_hex(10), repr=False)
    secret_key: str = field(default_factory=lambda: secrets.token_hex(20), repr=False)
    _process: TetheredProcess | None = field(default=None, init=False, repr=False)

    kind: ClassVar[str]

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Environment variables that point boto3, and so the platform, to this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    def client(self) -> Any:
        """A boto3 client of this server, independent of the environment; always the same one."""
        return self._client

    @cached_property
    def _client(self) -> Any:
        import boto3

        return boto3.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )

    @abstractmethod
    def _command(self, port: int) -> list[str | Path]:
        """Command line of the server."""

    def _process_environment(self) -> dict[str, str] | None:
        """Environment of the server's process; None to inherit this process's."""
        return None

    def _is_ready(self, port: int) -> bool:
        return listens(port)

    def start(self) -> None:
        """Start, or restart after `stop` or `kill` on the same port with the same objects."""
        attempts = 1 if self.port else START_ATTEMPTS
        for attempt in range(1, attempts + 1):
            # Another process may take the free port before the server does.
            port = self.port or free_port()
            command, environment = self._command(port), self._process_environment()
            process = TetheredProcess(command, log=self.directory / "log", env=environment)
            try:
                process.wait_until(partial(self._is_ready, port), what="the S3 server")
            except BaseException as error:
                process.kill()
                if attempt == attempts or not isinstance(error, RuntimeError):
                    raise
            else:
                self._process, self.port = process, port
                return

    def stop(self) -> None:
        """Stop the server; its objects are kept."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def kill(self) -> None:
        """Kill the server, as in a crash."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def __enter__(self) -> LocalS3:
        self.start()
        try:
            client = self.client()
            for bucket in self.buckets:
                with contextlib.suppress(
                    # The second one if the earlier server had another access key.
                    client.exceptions.BucketAlreadyOwnedByYou,
                    client.exceptions.BucketAlreadyExists,
                ):
                    client.create_bucket(Bucket=bucket)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


@dataclass
class S3Server(LocalS3):
    """versitygw over `directory`: objects are files in ``directory/buckets/BUCKET``, its log ``directory/log``.

    Entering it raises BuildError if versitygw cannot be built. A key cannot extend another one after a slash (``a`` and
    ``a/b``), and no part of a key can be longer than a file name.
    """

    kind = "versitygw"
    cache: Path = DEFAULT_CACHE

    def _command(self, port: int) -> list[str | Path]:
        objects = self.directory / "buckets"
        objects.mkdir(parents=True, exist_ok=True)
        posix: list[str | Path] = ["posix"]
        if not _has_extended_attributes(objects):
            metadata = self.directory / "metadata"
            metadata.mkdir(exist_ok=True)
            posix += ["--sidecar", metadata]
        listen = ["--port", f"127.0.0.1:{port}", "--region", self.region, "--health", "/health", "--quiet"]
        return [build_versitygw(self.cache), *listen, *posix, objects]

    def _process_environment(self) -> dict[str, str]:
        return {"ROOT_ACCESS_KEY_ID": self.access_key, "ROOT_SECRET_ACCESS_KEY": self.secret_key}

    def _is_ready(self, port: int) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@dataclass
class MotoServer(LocalS3):
    """moto's mock of S3, in its own process. Its objects are lost when it stops; it checks no credentials."""

    kind = "moto"
    region: str = "us-east-1"  # elsewhere, moto requires the region when a bucket is created

    def _command(self, port: int) -> list[str | Path]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def start_s3_server(
    directory: Path, *, buckets: Sequence[str] = (), cache: Path = DEFAULT_CACHE
) -> tuple[LocalS3, str]:
    """(server, not yet started; reason why it is a mock, or "" for a real one)."""
    try:
        build_versitygw(cache)
    except BuildError as error:
        return MotoServer(directory, buckets), str(error)
    return S3Server(directory, buckets, cache=cache), ""


def _has_extended_attributes(directory: Path) -> bool:
    """True if the server can store metadata with the files of a directory."""
    try:
        os.setxattr(directory, "user.ml_platform", b"")
    except AttributeError:  # not Linux: left to the server
        return True
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            return False
        raise
    os.removexattr(directory, "user.ml_platform")
    return True
