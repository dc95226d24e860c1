"""Properties of a Spark session that a process of this machine drives, and the class archive that starts it faster.

A third of a short job is Java loading and checking the classes of Spark. ``python -m ml_platform.spark.class_archive``
has Java keep them in an archive (class-data sharing) that later sessions map instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spark_jobs.runtime import START_PROPERTIES

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MEGABYTE = 1 << 20

#: The collector for throughput took 10 % less than Java's default to clean a file of 4.9 M rows, and the young
#: generation at an eighth of the heap 2.4 GB of memory in place of 4.
GARBAGE_COLLECTOR = "-XX:+UseParallelGC -XX:NewRatio=7"

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
    if master.startswith(("local", "spark://")):
        # Java and Python's workers not by TCP, over which both, their buffers full of each other's rows, came to wait
        # for ever (once, on Linux 6.18). Unknown to Spark before 4.1. YARN's directories are too deep for such sockets.
        config["spark.python.unix.domain.socket.enabled"] = "true"
    return config | {
        **START_PROPERTIES,
        "spark.driver.memory": driver_memory or f"{default_driver_memory_mb()}m",
        "spark.driver.defaultJavaOptions": java_options(CLASS_ARCHIVE),
    }


def default_driver_memory_mb() -> int:
    """Memory for an embedded Spark: a third of the machine's, from 1 to 8 GB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEGABYTE
    return min(8192, max(1024, total // 3))


def java_options(archive: Path, *, write: bool = False) -> str:
    """Options of the driver's Java, which uses `archive`, or writes it when it exits.

    Without such a file, or with an empty one, Java loads all classes itself. It takes an archive only for the very Java
    and jars it was made with, and goes without, silently, where it is not of them.
    """
    try:
        if not write and archive.stat().st_size == 0:
            return GARBAGE_COLLECTOR
    except OSError:
        return GARBAGE_COLLECTOR
    # Quoted as Spark's launcher reads it.
    path = str(archive).replace("\\", "\\\\").replace('"', '\\"')
    name = "ArchiveClassesAtExit" if write else "SharedArchiveFile"
    return f'{GARBAGE_COLLECTOR} "-XX:{name}={path}" -Xlog:cds*=off'
