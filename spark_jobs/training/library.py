"""The learners' library on a cluster: an archive of the installed package that Spark carries to its tasks.

The images of clusters lack XGBoost. Its package is the same for every Python (Linux, x86_64), so the engine sends the
one that is installed beside it, as a zip whose name ends in the SHA-256 of its content. `ship` hands it to Spark and
proves that it works on the driver; `use` makes it importable in a task.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: What is in the archive.
PACKAGE = "xgboost"


class LibraryError(RuntimeError):
    """The library is not there, or is not what its name says."""


def ship(spark: SparkSession, uri: str | None) -> str | None:
    """Hand the archive at `uri` to Spark, and load the library on the driver; returns what `use` takes in tasks.

    Without a `uri`, tasks use the package that is installed beside PySpark, as on the machine of the driver.

    Raises:
        LibraryError: there is no such archive, it is damaged, or the library does not load.
    """
    name = None
    if uri is not None:
        name = uri.rpartition("/")[2]
        try:
            spark.sparkContext.addFile(uri)
        except Exception as error:
            from spark_jobs.runtime import describe

            raise LibraryError(f"the library for the tasks cannot be fetched from {uri}: {describe(error)}") from None
    use(name)
    return name


def use(name: str | None) -> None:
    """Make the library importable in this process; with a `name`, that of the archive which Spark has brought here."""
    if name is not None:
        from pyspark import SparkFiles

        directory = unpacked(Path(SparkFiles.get(name)))
        if directory not in sys.path:
            sys.path.insert(0, directory)
            importlib.invalidate_caches()
    try:
        importlib.import_module(PACKAGE)
    except Exception as error:
        where = f"the archive {name}" if name else "the Python of Spark's tasks"
        raise LibraryError(f"{PACKAGE} does not load from {where}: {type(error).__name__}: {error}") from None


def unpacked(archive: Path) -> str:
    """Directory with the content of an archive, unpacked once per host and user.

    Raises LibraryError: the content is not the one whose hash is in the name.
    """
    wanted = re.search(r"-([0-9a-f]{64})\.zip$", archive.name)
    if not wanted:
        raise LibraryError(f"{archive.name} does not end in the SHA-256 of its content")
    directory = _own_directory() / wanted[1]
    if directory.is_dir():
        return str(directory)
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise LibraryError(f"Spark did not bring {archive.name} here: {error}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != wanted[1]:
        raise LibraryError(f"{archive.name} is damaged: the SHA-256 of its {len(content):,} bytes is {found}")
    # Several tasks may do this at the same time: whoever is first counts.
    draft = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        with zipfile.ZipFile(archive) as members:
            members.extractall(draft)
        draft.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return str(directory)


def _own_directory() -> Path:
    """A directory for this user alone: code is loaded from it, and anybody may write beside it."""
    path = Path(tempfile.gettempdir()) / f"ml-platform-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise LibraryError(f"{path} is not a directory of this user alone: remove it")
    return path
