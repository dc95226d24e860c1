"""Properties of a Spark session that a process of this machine drives, and the class archive that starts it faster.

A third of a short job is Java loading and checking the classes of Spark. ``python -m ml_platform.class_archive`` has
Java keep them in an archive (class-data sharing) that later sessions map instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MEGABYTE = 1 << 20

#: Beside the packages whose classes it holds.
CLASS_ARCHIVE = Path(sys.prefix) / "spark.jsa"


def local_session(name: str, config: Mapping[str, str]) -> SparkSession:
    """A session with the properties of `config`, for what is no job of an engine: such a job sets up its own."""
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName(name)
    for key, value in config.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    spark.sparkContext.pythonExec = sys.executable
    return spark


def default_spark_config(master: str, driver_memory: str | None = None) -> dict[str, str]:
    """Properties of a session that this process drives."""
    config = {"spark.master": master, "spark.ui.showConsoleProgress": "false"}
    if master.startswith("local"):
        config |= {
            "spark.ui.enabled": "false",
            # Nothing here is served to others; without this Spark wants a host name that resolves.
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
        }
    return (
        config
        | {"spark.driver.memory": driver_memory or f"{default_driver_memory_mb()}m"}
        | class_archive_config(CLASS_ARCHIVE)
    )


def default_driver_memory_mb() -> int:
    """Memory for an embedded Spark: a third of the machine's, from 1 to 8 GB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEGABYTE
    return min(8192, max(1024, total // 3))


def class_archive_config(archive: Path) -> dict[str, str]:
    """Properties that let the driver's Java use `archive`; none where there is no such file, or an empty one.

    Java takes an archive only for the very Java and jars it was made with, and goes without, silently, where it is not
    of them.
    """
    try:
        if archive.stat().st_size == 0:
            return {}
    except OSError:
        return {}
    return {"spark.driver.defaultJavaOptions": f"{quoted_option('SharedArchiveFile', archive)} -Xlog:cds*=off"}


def quoted_option(name: str, path: Path) -> str:
    """A Java option that names a file, quoted as Spark's launcher reads it."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"-XX:{name}={escaped}"'
