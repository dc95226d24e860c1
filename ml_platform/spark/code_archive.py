"""The code as a cluster takes it: the Spark jobs, and the learners' library, each a zip under a hash of its content."""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import spark_jobs
from spark_jobs.training.library import PACKAGE

ARCHIVE_NAME = "spark_jobs.zip"

#: Distribution of the learners' library that clusters get: they run Linux on x86_64.
DISTRIBUTION = "xgboost-cpu"
CLUSTER_PLATFORM = ("Linux", "x86_64")
WHEEL_PLATFORM = "manylinux2014_x86_64"

#: Jobs whose tasks need the library.
LIBRARY_JOBS = ("train_model",)

#: How long pip may take to fetch the library where this machine is of another kind.
DOWNLOAD_TIMEOUT_S = 120


class CodeArchiveError(Exception):
    """The files that a cluster needs cannot be had; the message says what to do."""


def build_archive() -> bytes:
    """The package ``spark_jobs`` as a zip that is the same for the same files: entries in order, without times."""
    root = Path(spark_jobs.__file__).parent
    paths = sorted(root.rglob("*.py"))
    return _zip((path.relative_to(root.parent).as_posix(), path.read_bytes()) for path in paths)


def main_file(job: str) -> bytes:
    """The file that starts a job; the rest comes from the archive."""
    return (Path(spark_jobs.__file__).parent / f"{job}.py").read_bytes()


def content_hash(archive: bytes) -> str:
    """Name of the directory that an archive and its main files are kept in."""
    return hashlib.sha256(archive).hexdigest()[:16]


@cache
def library_archive() -> tuple[str, bytes]:
    """Name and content of the archive of the learners' library, as `spark_jobs.training.library` takes it.

    It holds the package for Linux on x86_64, in the version that is installed here: the installed files, or else those
    of the wheel that pip fetches.

    Raises:
        CodeArchiveError: pip cannot fetch it.
    """
    installed = version(PACKAGE if platform_here() != CLUSTER_PLATFORM else DISTRIBUTION)
    members = _installed_members() if platform_here() == CLUSTER_PLATFORM else _wheel_members(installed)
    content = _zip(
        (name, data)
        for name, data in sorted(members)
        # What builds and tests it is not used.
        if name.split("/")[0] in (PACKAGE, f"{DISTRIBUTION.replace('-', '_')}.libs") and "__pycache__" not in name
    )
    return f"{PACKAGE}-{installed}-{hashlib.sha256(content).hexdigest()}.zip", content


def platform_here() -> tuple[str, str]:
    """System and processor of this machine."""
    return platform.system(), platform.machine()


def _installed_members() -> Iterable[tuple[str, bytes]]:
    from importlib.metadata import files

    return [(str(path), path.read_binary()) for path in files(DISTRIBUTION) or ()]


def _wheel_members(installed: str) -> Iterable[tuple[str, bytes]]:
    """The files of the wheel for clusters, which pip keeps in its cache."""
    wanted = f"{DISTRIBUTION}=={installed}"
    with tempfile.TemporaryDirectory(prefix="ml-platform-") as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--platform", WHEEL_PLATFORM, "--dest", directory, wanted]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
            problem = (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"no answer within {DOWNLOAD_TIMEOUT_S} s"
        if problem:
            raise CodeArchiveError(
                f"clusters need {wanted} for Linux on x86_64, which this machine ({' '.join(platform_here())}) does "
                f"not have and pip cannot fetch: {problem}. Check pip's package index, or run the platform "
                "on such a machine"
            )
        (wheel,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return [(name, archive.read(name)) for name in archive.namelist() if not name.endswith("/")]


def _zip(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return buffer.getvalue()
