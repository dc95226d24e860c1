"""What every job needs around its Spark code: session settings, small files, word from the tasks, ``main()``."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Callable

from spark_jobs.progress import Progress

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("spark_jobs")

#: The jobs rely on these, whatever the cluster's defaults are.
SESSION_SETTINGS = {
    # As before Spark 4, which raises where a value does not fit: the jobs mean the same in every version.
    "spark.sql.ansi.enabled": "false",
    "spark.sql.session.timeZone": "UTC",
    # Cleaning has its own for each file.
    "spark.sql.files.maxPartitionBytes": "134217728",
    # A damaged or vanished input is an error of its partition, never fewer rows.
    "spark.sql.files.ignoreCorruptFiles": "false",
    "spark.sql.files.ignoreMissingFiles": "false",
    # INT96, the default, has no statistics that readers can use.
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # Years before 1582 are rows like any other; the default is to fail on them. First name: Spark 3.0.
    "spark.sql.legacy.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.legacy.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    # Spark 4 raises on bytes that are no UTF-8; the rejects keep such lines (see clean_transactions).
    "spark.sql.legacy.codingErrorAction": "true",
    # The jobs say how many partitions they want, and each of their tasks tells what it wrote: planning anew on the way
    # takes time, and leaves out tasks that have no rows (Spark 3.3).
    "spark.sql.adaptive.enabled": "false",
    # Rows pass through numpy; a batch of 10,000 of them, the default, costs more than its rows.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "100000",
    # No limit, so that Spark (4.1 and later) does not add up the bytes of a batch after every row.
    "spark.sql.execution.arrow.maxBytesPerBatch": "2147483647",
}


#: Properties that a session is to be started with.
START_PROPERTIES = {
    # Python's workers keep the memory that numpy has freed, up to 512 MB, for the next columns: to give it back and
    # fetch it anew was a third of their time. (glibc's own names; the first is the largest that it always takes.)
    "spark.executorEnv.MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "spark.executorEnv.MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    # Without it Arrow fails on Java 9 and later. Spark sets it by itself from 3.3 on; the image 2.0 has 3.0.
    "spark.executor.defaultJavaOptions": "-Dio.netty.tryReflectionSetAccessible=true",
}


def configure(spark: SparkSession) -> None:
    """Apply the settings that the jobs rely on to a session, in place."""
    settings = dict(SESSION_SETTINGS)
    # zstd needs no native library from Spark 3.2 on.
    settings["spark.sql.parquet.compression.codec"] = "zstd" if spark_version(spark) >= (3, 2) else "snappy"
    for name, value in settings.items():
        spark.conf.set(name, value)


def session(frame: DataFrame) -> SparkSession:
    """The session of a data frame."""
    # DataFrame.sparkSession is public from Spark 3.3 on.
    found: Any = frame.sparkSession if hasattr(frame, "sparkSession") else frame.sql_ctx.sparkSession
    return found


def spark_version(spark: SparkSession) -> tuple[int, int]:
    """(major, minor) of a session's Spark."""
    major, minor = spark.version.split(".")[:2]
    return int(major), int(minor)


def shuffle_partitions(spark: SparkSession, input_bytes: int) -> int:
    """How many partitions fit `input_bytes` of raw text.

    About 64 MB of text (a million rows, 13 MB of Parquet, 300 MB of a Python process) a partition where there is much,
    so many that all cores are busy to the end; as many partitions as cores where there is little, and one core's work
    where there is next to nothing.
    """
    cores = spark.sparkContext.defaultParallelism
    by_size = -(-input_bytes // (64 << 20))
    by_cores = min(cores, max(1, -(-input_bytes // (8 << 20))))
    return by_cores if by_size <= by_cores else -(-by_size // cores) * cores


def set_shuffle_partitions(spark: SparkSession, input_bytes: int) -> None:
    """Let the next shuffles of a session fit `input_bytes` of raw text."""
    spark.conf.set("spark.sql.shuffle.partitions", str(shuffle_partitions(spark, input_bytes)))


def gathering(spark: SparkSession) -> Any:
    """An accumulator of lists: what the tasks of an action add (a list) is in its `value` once the action has finished.

    Exactly once, whatever is tried again, if it is added by the tasks that produce the action's result. PySpark keeps
    it as long as the driver lives: clear what is large.
    """
    return spark.sparkContext.accumulator([], _ListParam())  # type: ignore[arg-type]


class _ListParam:
    """How an accumulator adds up lists."""

    def zero(self, value: list[Any]) -> list[Any]:
        return []

    def addInPlace(self, value: list[Any], added: list[Any]) -> list[Any]:
        value.extend(added)
        return value


def literal_path(uri: str) -> str:
    """`uri` as Spark's readers take it: they expand glob characters, which here are part of a name."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", uri)


def read_parquet(spark: SparkSession, *uris: str) -> DataFrame:
    """Rows of Parquet files, whose columns are of Spark's own types.

    Raises ValueError if a column is of a user-defined type: the file names the Python class of such a type, which
    PySpark imports and calls, and before 4.3 it unpickles what the file holds. Whoever may write to the lake could so
    run code here.
    """
    frame = spark.read.parquet(*[literal_path(uri) for uri in uris])
    # The JVM's schema: to ask for PySpark's would be to run that code.
    jdf: Any = frame._jdf
    if '"udt"' in jdf.schema().json():
        raise ValueError(f"{uris[0]} has a column of a user-defined type, which no job has written")
    return frame


#: Files that are renamed together.
RENAMES_AT_A_TIME = 8


class Files:
    """Small files through Hadoop's FileSystem, so that local paths and S3 are alike."""

    def __init__(self, spark: SparkSession) -> None:
        self._jvm: Any = spark._jvm
        self._conf = spark._jsc.hadoopConfiguration()

    def _open(self, uri: str) -> tuple[Any, Any]:
        path = self._jvm.org.apache.hadoop.fs.Path(uri)
        return path.getFileSystem(self._conf), path

    def size(self, uri: str) -> int:
        """Bytes of a file. Raises Py4JJavaError if there is none."""
        fs, path = self._open(uri)
        return fs.getFileStatus(path).getLen()

    def read(self, uri: str, limit: int | None = None, start: int = 0) -> bytes:
        """The bytes of a file from `start` on, at most `limit`."""
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
        """Delete a file or directory; fine if there is none."""
        fs, path = self._open(uri)
        fs.delete(path, True)

    def change_suffix(self, uri: str, old: str, new: str) -> None:
        """Let the files of a directory whose names end in `old` end in `new`. Raises OSError if one does not.

        S3 copies each, and most of that is waiting: several at a time.
        """
        fs, directory = self._open(uri)
        names = [str(status.getPath().getName()) for status in fs.listStatus(directory)]
        path = self._jvm.org.apache.hadoop.fs.Path

        def rename(name: str) -> None:
            if not fs.rename(path(directory, name), path(directory, name[: -len(old)] + new)):
                raise OSError(f"cannot rename {name} in {uri}")

        with ThreadPoolExecutor(RENAMES_AT_A_TIME) as pool:
            list(pool.map(rename, [name for name in names if name.endswith(old)]))

    def write_json(self, uri: str, value: Any) -> None:
        """Write `value` as JSON, as `write` does."""
        self.write(uri, json.dumps(value, indent=1, sort_keys=True).encode("utf-8"))

    def write(self, uri: str, content: bytes) -> None:
        """Write a file. Readers find the whole file or none.

        On S3 an object appears whole, when it is closed; elsewhere the file is renamed into its place.
        """
        fs, path = self._open(uri)
        array = bytearray(content)  # which Py4J passes as a byte[]
        if path.toUri().getScheme() == "s3a":
            stream = fs.create(path, True)
            stream.write(array)
            stream.close()  # and not after an error: closing is what makes the object
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


def for_each_partition(
    spark: SparkSession,
    partitions: list[dict[str, Any]],
    work: Callable[[dict[str, Any], Progress], dict[str, Any]],
    *,
    what: str,
    size: Callable[[dict[str, Any]], int],
) -> dict[str, dict[str, Any]]:
    """Do `work(item, progress)` for each of a request's `partitions`; one verdict each, whatever befalls the others.

    `size(item)` says how much work it is compared with the others, for the time left that is logged.

    Returns {partition: {"status": "succeeded", "report": ...} or {"status": "failed", "error": ...}}.
    """
    verdicts: dict[str, dict[str, Any]] = {}
    # One more each: empty files are some work, too.
    sizes = [size(item) + 1 for item in partitions]
    done = 0
    with Progress(spark, what) as progress:
        for number, item in enumerate(partitions, start=1):
            key, started = item["partition"], time.monotonic()
            name = f"{number}/{len(partitions)}: {key}"
            share = sizes[number - 1]
            progress.enter(name, done / sum(sizes), (done + share) / sum(sizes))
            try:
                report = work(item, progress)
            except Exception as error:
                log.exception("%s %s failed", what, name)
                verdicts[key] = {"status": "failed", "error": describe(error)}
            else:
                log.info("%s %s done in %.1f s", what, name, time.monotonic() - started)
                verdicts[key] = {"status": "succeeded", "report": report}
            done += share
    return verdicts


def describe(error: BaseException) -> str:
    """An error in at most a few hundred printable characters: its own words, without stacks of Java or of a task."""
    java = getattr(error, "java_exception", None)
    text = (java.toString() if java is not None else None) or str(error) or type(error).__name__
    # What a task of Python's raised stands at the end of its stack, which Spark 3 has among the causes.
    _, stack, rest = f"{text}\n{error}".rpartition("Traceback (most recent call last)")
    raised = re.search(r"^[\w.]*(?:Error|Exception): .*$", rest, re.MULTILINE)
    if stack and raised:
        text = raised[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = "".join(char if char.isprintable() else " " for char in lines[0]) if lines else ""
    return f"{type(error).__name__}: {line}"[:500]


def main(run: Callable[[SparkSession, dict[str, Any]], dict[str, Any]], app_name: str) -> None:
    """Command line of a job: ``--request URI --report URI``, both read and written through Hadoop's FileSystem."""
    from pyspark.sql import SparkSession

    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__)
    parser.add_argument("--request", required=True, help="URI of the JSON request")
    parser.add_argument("--report", required=True, help="URI to write the JSON report to")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    spark = SparkSession.builder.appName(app_name).getOrCreate()
    # The driver's log is shown to people: Spark itself says dozens of lines a second.
    spark.sparkContext.setLogLevel("WARN")
    try:
        files = Files(spark)
        request = json.loads(files.read(arguments.request).decode("utf-8"))
        files.write_json(arguments.report, run(spark, request))
    finally:
        spark.stop()
