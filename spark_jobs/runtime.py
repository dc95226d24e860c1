"""Common base of the jobs: session settings, small files, one-line errors, the command line."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

#: Settings that the jobs rely on, set whatever the cluster's defaults are.
SESSION_SETTINGS = {
    # Spark 4 raises where a value does not fit its type; earlier versions return NULL.
    "spark.sql.ansi.enabled": "false",
    "spark.sql.session.timeZone": "UTC",
    # Cleaning sets its own for each file.
    "spark.sql.files.maxPartitionBytes": "134217728",
    # A damaged or missing input fails its partition instead of yielding fewer rows.
    "spark.sql.files.ignoreCorruptFiles": "false",
    "spark.sql.files.ignoreMissingFiles": "false",
    # INT96, the default, has no statistics that readers can use.
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # By default, Spark fails on years before 1582. The `legacy` names are those of Spark 3.0.
    "spark.sql.legacy.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.legacy.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    # Spark 4 raises on bytes that are not UTF-8; rejected lines may contain some.
    "spark.sql.legacy.codingErrorAction": "true",
    # The jobs set the numbers of partitions, and every task reports a tally; adaptive execution costs time and skips
    # tasks without rows (Spark 3.3).
    "spark.sql.adaptive.enabled": "false",
    # With the default of 10,000 rows, numpy's overhead per batch exceeds the cost of the rows.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "100000",
    # Unlimited, so that Spark (4.1 and later) does not measure the batch after every row.
    "spark.sql.execution.arrow.maxBytesPerBatch": "2147483647",
}

#: Properties that must be set when a session starts.
START_PROPERTIES = {
    # Let Python workers keep up to 512 MB freed by numpy: returning memory to the system and allocating it again took a
    # third of their time. (glibc variables; the first is the largest value that it always accepts.)
    "spark.executorEnv.MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "spark.executorEnv.MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    # Arrow needs it on Java 9 and later. Spark itself sets it from 3.3 on; image 2.0 has 3.0.
    "spark.executor.defaultJavaOptions": "-Dio.netty.tryReflectionSetAccessible=true",
}


def configure(spark: SparkSession) -> None:
    """Apply the settings that the jobs rely on to a session."""
    # From Spark 3.2 on, zstd needs no native library.
    codec = "zstd" if tuple(map(int, spark.version.split(".")[:2])) >= (3, 2) else "snappy"
    for name, value in {**SESSION_SETTINGS, "spark.sql.parquet.compression.codec": codec}.items():
        spark.conf.set(name, value)


def session(frame: DataFrame) -> SparkSession:
    """Spark session of a DataFrame."""
    # DataFrame.sparkSession is public from Spark 3.3 on.
    spark: Any = frame.sparkSession if hasattr(frame, "sparkSession") else frame.sql_ctx.sparkSession
    return spark


def round_up_to_cores(spark: SparkSession, tasks: int) -> int:
    """`tasks`, rounded up to a multiple of the cores, so that all of them are busy to the end."""
    cores = spark.sparkContext.defaultParallelism
    return -(-max(tasks, 1) // cores) * cores


def shuffle_partitions(spark: SparkSession, input_bytes: int) -> int:
    """Number of partitions for `input_bytes` of raw text.

    About 64 MB of text each (1 million rows, 13 MB of Parquet, 300 MB in a Python process), rounded up to a multiple of
    the cores; for less text, one partition per 8 MB, at most one per core.
    """
    cores = spark.sparkContext.defaultParallelism
    by_size = -(-input_bytes // (64 << 20))
    by_cores = min(cores, max(1, -(-input_bytes // (8 << 20))))
    return by_cores if by_size <= by_cores else round_up_to_cores(spark, by_size)


def set_shuffle_partitions(spark: SparkSession, input_bytes: int) -> None:
    """Set the session's number of shuffle partitions to that for `input_bytes` of raw text."""
    spark.conf.set("spark.sql.shuffle.partitions", str(shuffle_partitions(spark, input_bytes)))


def literal_path(uri: str) -> str:
    """`uri` with the glob characters escaped that Spark's readers would expand."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", uri)


def read_parquet(spark: SparkSession, *uris: str) -> DataFrame:
    """Read Parquet files whose columns have only Spark's built-in types.

    Raises ValueError for a column of a user-defined type: the file names the Python class of such a type, which PySpark
    imports and calls, and before 4.3 it unpickles content of the file. Anyone who can write to the lake could run code
    here.
    """
    frame = spark.read.parquet(*[literal_path(uri) for uri in uris])
    # The JVM's schema, because PySpark's own would run that code.
    jdf: Any = frame._jdf
    if '"udt"' in jdf.schema().json():
        raise ValueError(f"{uris[0]} has a column of a user-defined type, which no job writes")
    return frame


#: Files renamed concurrently.
CONCURRENT_RENAMES = 8


class Files:
    """Access to small files through Hadoop's FileSystem, the same for local paths and S3."""

    def __init__(self, spark: SparkSession) -> None:
        self._jvm: Any = spark._jvm
        self._conf = spark._jsc.hadoopConfiguration()

    def _open(self, uri: str) -> tuple[Any, Any]:
        path = self._jvm.org.apache.hadoop.fs.Path(uri)
        return path.getFileSystem(self._conf), path

    def size(self, uri: str) -> int:
        """Size of a file in bytes. Raises Py4JJavaError if it does not exist."""
        fs, path = self._open(uri)
        return fs.getFileStatus(path).getLen()

    def read(self, uri: str, limit: int | None = None, start: int = 0) -> bytes:
        """Read a file from the offset `start`, at most `limit` bytes."""
        fs, path = self._open(uri)
        stream = fs.open(path)
        try:
            stream.seek(start)
            io = self._jvm.org.apache.commons.io
            source = stream if limit is None else io.input.BoundedInputStream(stream, limit)
            return bytes(io.IOUtils.toByteArray(source))
        finally:
            stream.close()

    def delete(self, uri: str) -> None:
        """Delete a file or directory if it exists."""
        fs, path = self._open(uri)
        fs.delete(path, True)

    def change_suffix(self, uri: str, old: str, new: str) -> None:
        """Rename the files in a directory that end in `old` to end in `new`. Raises OSError if one cannot be renamed.

        Renames run concurrently: S3 copies each object, and most of that is waiting.
        """
        fs, directory = self._open(uri)
        names = [str(status.getPath().getName()) for status in fs.listStatus(directory)]
        path = self._jvm.org.apache.hadoop.fs.Path

        def rename(name: str) -> None:
            if not fs.rename(path(directory, name), path(directory, name[: -len(old)] + new)):
                raise OSError(f"cannot rename {name} in {uri}")

        with ThreadPoolExecutor(CONCURRENT_RENAMES) as pool:
            list(pool.map(rename, [name for name in names if name.endswith(old)]))

    def write_json(self, uri: str, value: Any) -> None:
        """Write `value` as JSON, atomically."""
        self.write(uri, json.dumps(value, indent=1, sort_keys=True).encode("utf-8"))

    def write(self, uri: str, content: bytes) -> None:
        """Write a file atomically: readers see all of it or nothing.

        An S3 object appears when its stream is closed; elsewhere a temporary file is renamed.
        """
        fs, path = self._open(uri)
        array = bytearray(content)  # Py4J passes it as a byte[]
        if path.toUri().getScheme() == "s3a":
            stream = fs.create(path, True)
            stream.write(array)
            stream.close()  # not after an error: closing would create the object
            return
        draft = self._jvm.org.apache.hadoop.fs.Path(path.getParent(), f"_{uuid.uuid4().hex}.tmp")
        stream = fs.create(draft, True)
        try:
            stream.write(array)
        finally:
            stream.close()
        fs.delete(path, False)
        if not fs.rename(draft, path):
            raise OSError(f"cannot rename {draft} to {path}")


def is_not_found(error: BaseException) -> bool:
    """True for Hadoop's error for a file that does not exist; others say that the storage cannot be reached."""
    java = getattr(error, "java_exception", None)
    return java is not None and "FileNotFoundException" in str(java.toString())


def describe(error: BaseException) -> str:
    """Type and message of an error in at most 500 printable characters, without stack traces of Java or of a task."""
    java = getattr(error, "java_exception", None)
    text = (java.toString() if java is not None else None) or str(error) or type(error).__name__
    # A Python task's error is the end of its stack trace, which Spark 3 puts among the causes.
    _, stack, rest = f"{text}\n{error}".rpartition("Traceback (most recent call last)")
    raised = re.search(r"^[\w.]*(?:Error|Exception): .*$", rest, re.MULTILINE)
    if stack and raised:
        text = raised[0]
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {''.join(char if char.isprintable() else ' ' for char in line)}"[:500]


def main(run: Callable[[SparkSession, dict[str, Any]], dict[str, Any]], app_name: str) -> None:
    """Run a job from the command line: ``--request URI --report URI``, accessed through Hadoop's FileSystem."""
    from pyspark.sql import SparkSession

    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__)
    parser.add_argument("--request", required=True, help="URI of the JSON request")
    parser.add_argument("--report", required=True, help="URI to write the JSON report to")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    spark = SparkSession.builder.appName(app_name).getOrCreate()
    # Keeps the driver's log readable: at INFO, Spark adds dozens of lines a second.
    spark.sparkContext.setLogLevel("WARN")
    try:
        files = Files(spark)
        request = json.loads(files.read(arguments.request).decode("utf-8"))
        files.write_json(arguments.report, run(spark, request))
    finally:
        spark.stop()
