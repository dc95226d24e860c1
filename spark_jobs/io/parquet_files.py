"""Parquet files encoded by pyarrow in the tasks, and written and committed by Spark.

Spark encodes Parquet row by row; pyarrow encodes whole columns, in a third of the time and with nothing to compile
first. But Spark knows every file system, and which attempt of a task counts. So a task returns each file as one value,
and Spark's text writer, which writes values unchanged, makes each a file. The writer ends a value with the line
separator, which is set to the four bytes that end every Parquet file.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Iterable, Iterator

from spark_jobs import runtime
from spark_jobs.io import blocks
from spark_jobs.schema import KEY_COLUMNS, NO_KEY

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.io.blocks import Array, Columns

#: Schema of the rows that a task returns: files without their last bytes (MAGIC).
FILE_SCHEMA = "file binary NOT NULL"

#: The last bytes of every Parquet file.
MAGIC = "PAR1"

#: Maximum rows per file, because the JVM holds a whole file in memory: 100 MB of features.
ROWS_PER_FILE = 1_250_000

#: Small enough for readers to skip row groups without the days or customers they look for.
ROWS_PER_GROUP = 500_000


def options(spark: SparkSession, dictionary_columns: Iterable[str]) -> dict[str, Any]:
    """Options of pyarrow.parquet.write_table: the session's compression, dictionaries for `dictionary_columns`."""
    return {
        "compression": spark.conf.get("spark.sql.parquet.compression.codec"),
        "use_dictionary": list(dictionary_columns),
        "row_group_size": ROWS_PER_GROUP,
    }


def files_of(columns: Columns, table: Iterable[tuple[str, str, str]], options: dict[str, Any]) -> Iterator[Columns]:
    """Encode `columns` as rows of FILE_SCHEMA, in order.

    `table` lists the columns of the files (name, Spark type, ...). In `columns`, instants are Unix seconds, and NO_KEY
    stands for NULL in KEY_COLUMNS. If no task has rows, the first one makes an empty file.
    """
    import numpy as np
    import pyarrow

    fields = [pyarrow.field(name, arrow_type(kind), nullable=name in KEY_COLUMNS) for name, kind, *_ in table]
    rows = len(columns[fields[0].name])
    if not rows and blocks.task_number() > 0:
        return
    # Files of about equal size.
    bounds = np.linspace(0, rows, max(1, -(-rows // ROWS_PER_FILE)) + 1).astype("i8")
    for begin, end in zip(bounds[:-1], bounds[1:]):
        arrays = [_array(field, columns[field.name][begin:end]) for field in fields]
        file = file_of(pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields)), **options)
        yield {"file": [file[: -len(MAGIC)]]}


def arrow_type(kind: str) -> Any:
    """Arrow type of a column whose Spark type is `kind`."""
    import pyarrow

    return {
        "bigint": pyarrow.int64(),
        "int": pyarrow.int32(),
        "double": pyarrow.float64(),
        "boolean": pyarrow.bool_(),
        "string": pyarrow.string(),
        "timestamp": pyarrow.timestamp("us", tz="UTC"),
    }[kind]


def file_of(table: Any, **options: Any) -> bytes:
    """Encode an Arrow table as a Parquet file; `options` are those of pyarrow.parquet.write_table."""
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(table, content, **options)
    return content.getvalue()


def _array(field: Any, values: Array) -> Any:
    """Arrow array of the type of `field`."""
    import pyarrow

    if pyarrow.types.is_timestamp(field.type):
        values = values * 1_000_000
    return blocks.arrow_array(values, field.type, values != NO_KEY if field.nullable else None)


def write(files: DataFrame, uri: str) -> None:
    """Replace the directory `uri` with `files`, rows of FILE_SCHEMA."""
    writer = files.selectExpr("CAST(file AS STRING)").write.mode("overwrite")
    # Explicit, because a cluster's Hadoop may compress text by default.
    writer = writer.option("lineSep", MAGIC).option("maxRecordsPerFile", 1).option("compression", "none")
    writer.text(uri)
    runtime.Files(runtime.session(files)).change_suffix(uri, ".txt", ".parquet")
