"""The learners' library on a cluster: an archive of the installed package, distributed to the tasks by Spark.

Cluster images lack XGBoost. Its package is the same for every Python (Linux, x86_64), so the engine sends its own
installed copy, as a zip whose name ends in the SHA-256 of its content. `ship` hands it to Spark and checks that it
loads on the driver; `use` makes it importable in a task.
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

#: Name of the package in the archive.
PACKAGE = "xgboost"


class LibraryError(RuntimeError):
    """The library is missing, or its content does not match its name."""


def ship(spark: SparkSession, uri: str | None) -> str | None:
    """Hand the archive at `uri` to Spark and load the library on the driver; return the argument of `use` in tasks.

    Without a `uri`, tasks use the package installed alongside PySpark, as the driver does.

    Raises:
        LibraryError: the archive is missing or damaged, or the library does not load.
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
    """Make the library importable in this process, from the archive `name` distributed by Spark if there is one."""
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

    Raises LibraryError if the content does not have the hash in the name.
    """
    expected = re.search(r"-([0-9a-f]{64})\.zip$", archive.name)
    if not expected:
        raise LibraryError(f"{archive.name} does not end in the SHA-256 of its content")
    directory = _private_directory() / expected[1]
    if directory.is_dir():
        return str(directory)
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise LibraryError(f"Spark did not bring {archive.name} here: {error}") from None
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected[1]:
        raise LibraryError(f"{archive.name} is damaged: the SHA-256 of its {len(content):,} bytes is {actual}")
    # Several tasks may do this at the same time; the first one to rename wins.
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


def _private_directory() -> Path:
    """Directory accessible to this user only: code is loaded from it, and anyone can write to its parent."""
    path = Path(tempfile.gettempdir()) / f"ml-platform-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise LibraryError(f"{path} is not a directory of this user alone: remove it")
    return path
