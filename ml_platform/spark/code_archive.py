"""Code archives for clusters: the Spark jobs and the learners' library, each a zip named by its content hash."""

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

#: Distribution of the learners' library for clusters, which run Linux on x86_64.
DISTRIBUTION = "xgboost-cpu"
CLUSTER_PLATFORM = ("Linux", "x86_64")
WHEEL_PLATFORM = "manylinux2014_x86_64"

#: Jobs whose tasks need the library.
LIBRARY_JOBS = ("score_transactions", "train_model")

#: Time limit for pip to download the library if this machine's platform differs from the clusters'.
DOWNLOAD_TIMEOUT_S = 120


class CodeArchiveError(Exception):
    """A file that clusters need is unavailable; the message says what to do."""


def build_archive() -> bytes:
    """Reproducible zip of the package ``spark_jobs``: sorted entries, fixed timestamps."""
    root = Path(spark_jobs.__file__).parent
    paths = sorted(root.rglob("*.py"))
    return _zip((path.relative_to(root.parent).as_posix(), path.read_bytes()) for path in paths)


def main_file(job: str) -> bytes:
    """Content of a job's main file; it imports the rest from the archive."""
    return (Path(spark_jobs.__file__).parent / f"{job}.py").read_bytes()


def content_hash(archive: bytes) -> str:
    """Name of the lake directory for an archive and its main files."""
    return hashlib.sha256(archive).hexdigest()[:16]


@cache
def library_archive() -> tuple[str, bytes]:
    """Name and content of the archive of the learners' library, as expected by `spark_jobs.training.library`.

    It contains the package for Linux on x86_64 in the version installed here: the installed files, or those of a wheel
    that pip downloads.

    Raises:
        CodeArchiveError: pip cannot download it.
    """
    installed = version(PACKAGE if this_platform() != CLUSTER_PLATFORM else DISTRIBUTION)
    members = _installed_members() if this_platform() == CLUSTER_PLATFORM else _wheel_members(installed)
    content = _zip(
        (name, data)
        for name, data in sorted(members)
        # Only the package and its shared libraries are needed at run time.
        if name.split("/")[0] in (PACKAGE, f"{DISTRIBUTION.replace('-', '_')}.libs") and "__pycache__" not in name
    )
    return f"{PACKAGE}-{installed}-{hashlib.sha256(content).hexdigest()}.zip", content


def this_platform() -> tuple[str, str]:
    """Operating system and processor architecture of this machine."""
    return platform.system(), platform.machine()


def _installed_members() -> Iterable[tuple[str, bytes]]:
    from importlib.metadata import files

    return [(str(path), path.read_binary()) for path in files(DISTRIBUTION) or ()]


def _wheel_members(installed: str) -> Iterable[tuple[str, bytes]]:
    """Files of the wheel for clusters; pip caches the download."""
    requirement = f"{DISTRIBUTION}=={installed}"
    with tempfile.TemporaryDirectory(prefix="ml-platform-") as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--platform", WHEEL_PLATFORM, "--dest", directory, requirement]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
            problem = (process.stderr.strip().splitlines() or ["no reason given"])[-1] if process.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"timed out after {DOWNLOAD_TIMEOUT_S} s"
        if problem:
            raise CodeArchiveError(
                f"clusters need {requirement} for Linux on x86_64, which is not installed on this machine "
                f"({' '.join(this_platform())}) and pip cannot download: {problem}. Check pip's package index, or run "
                "the platform on Linux on x86_64"
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
