"""The Spark code as a cluster takes it: one zip, the same bytes for the same code, under a hash of them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import spark_jobs

ARCHIVE_NAME = "spark_jobs.zip"


def build_archive() -> bytes:
    """The package ``spark_jobs`` as a zip that is the same for the same files: entries in order, without times."""
    root = Path(spark_jobs.__file__).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(root.glob("*.py")):
            entry = zipfile.ZipInfo(f"{root.name}/{path.name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())
    return buffer.getvalue()


def main_file(job: str) -> bytes:
    """The file that starts a job; the rest comes from the archive."""
    return (Path(spark_jobs.__file__).parent / f"{job}.py").read_bytes()


def content_hash(archive: bytes) -> str:
    """Name of the directory that an archive and its main files are kept in."""
    return hashlib.sha256(archive).hexdigest()[:16]
