"""Parquet files that Python makes, whole, and Spark puts into their places.

Spark writes Parquet row by row; pyarrow writes whole columns, in a third of the time and without code that has to be
compiled first. But it is Spark that knows every file system, and which of a task's attempts counts. So a task returns
each file as one value, and Spark's text writer, which writes values as they are, byte by byte, makes a file of each.
It ends a value with a line separator, and a Parquet file always ends in the same four bytes: these are the separator.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Iterable, Iterator

from spark_jobs import runtime
from spark_jobs.features.windows import NO_KEY
from spark_jobs.io import blocks
from spark_jobs.schema import KEY_COLUMNS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.features.windows import Array, Columns

#: What a task returns: files, without their last bytes.
FILE_SCHEMA = "file binary NOT NULL"

#: The last bytes of every Parquet file.
MAGIC = "PAR1"

#: More rows are several files: Java holds one as a whole. Of features these are 100 MB.
ROWS_PER_FILE = 1_250_000

#: Readers skip the row groups whose days or customers they do not look for.
ROWS_PER_GROUP = 500_000


def options(spark: SparkSession, repeating: Iterable[str]) -> dict[str, Any]:
    """How `files_of` is to write: as the session is set up, and the columns `repeating` as dictionaries."""
    return {
        "compression": spark.conf.get("spark.sql.parquet.compression.codec"),
        "use_dictionary": list(repeating),
        "row_group_size": ROWS_PER_GROUP,
    }


def files_of(columns: Columns, table: Iterable[tuple[str, str, str]], options: dict[str, Any]) -> Iterator[Columns]:
    """Rows of FILE_SCHEMA that hold all rows of `columns`, in their order.

    `table` are the files' columns (name, Spark type, ...), all in `columns`: an instant is there in Unix seconds, and
    NO_KEY where one of KEY_COLUMNS is NULL. `options` are those of pyarrow.parquet.write_table. A table without rows is
    one file, from its first task.
    """
    import numpy as np
    import pyarrow

    types = {
        "bigint": pyarrow.int64(),
        "int": pyarrow.int32(),
        "double": pyarrow.float64(),
        "timestamp": pyarrow.timestamp("us", tz="UTC"),
    }
    fields = [pyarrow.field(name, types[kind], nullable=name in KEY_COLUMNS) for name, kind, *_ in table]
    rows = len(columns[fields[0].name])
    if not rows and blocks.task_number() > 0:
        return
    # Parts as even as can be.
    bounds = np.linspace(0, rows, max(1, -(-rows // ROWS_PER_FILE)) + 1).astype("i8")
    for begin, end in zip(bounds[:-1], bounds[1:]):
        arrays = [_array(field, columns[field.name][begin:end]) for field in fields]
        file = file_of(pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields)), **options)
        yield {"file": [file[: -len(MAGIC)]]}


def file_of(table: Any, **options: Any) -> bytes:
    """A Parquet file of an Arrow table; `options` are those of pyarrow.parquet.write_table."""
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(table, content, **options)
    return content.getvalue()


def _array(field: Any, values: Array) -> Any:
    """An Arrow array of the type of `field`."""
    import pyarrow

    if pyarrow.types.is_timestamp(field.type):
        values = values * 1_000_000
    return blocks.arrow_array(values, field.type, values != NO_KEY if field.nullable else None)


def write(files: DataFrame, uri: str) -> None:
    """Replace the directory `uri` by `files`, rows of FILE_SCHEMA."""
    texts = files.selectExpr("CAST(file AS STRING)").write.mode("overwrite")
    # Whatever the cluster's Hadoop does with text by default, this is to be left as it is.
    texts = texts.option("lineSep", MAGIC).option("maxRecordsPerFile", 1).option("compression", "none")
    texts.text(uri)
    runtime.Files(runtime.session(files)).change_suffix(uri, ".txt", ".parquet")
