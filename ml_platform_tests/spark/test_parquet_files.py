"""Parquet files that pyarrow makes and Spark's text writer writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator

import numpy as np
import pytest

from spark_jobs import runtime
from spark_jobs.io import blocks, parquet_files
from spark_jobs.schema import CLEANED_COLUMNS, NO_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from pyspark.sql import SparkSession

pytestmark = [pytest.mark.spark, pytest.mark.images]

NAMES = [name for name, _, _ in CLEANED_COLUMNS]


def columns(first: int, rows: int) -> dict[str, Any]:
    """Columns of CLEANED_COLUMNS, every third customer and every seventh terminal unknown."""
    numbers = np.arange(first, first + rows)
    return {
        **{name: (numbers % 2).astype("i4" if kind == "int" else "i8") for name, kind, _ in CLEANED_COLUMNS},
        "transaction_id": numbers,
        # From the year 1 on.
        "tx_datetime": -62_135_596_800 + numbers * 86400,
        "customer_id": np.where(numbers % 3 == 0, NO_KEY, numbers),
        "terminal_id": np.where(numbers % 7 == 0, NO_KEY, numbers),
        "tx_amount": numbers / 7,
    }


def write(spark: SparkSession, uri: str, rows_of_tasks: list[int]) -> None:
    """Write the given number of rows in each task, numbered across the tasks."""
    runtime.configure(spark)
    options = parquet_files.options(spark, ["tx_fraud"])

    def made(packed: list[bytes]) -> Iterator[dict[str, Any]]:
        task = blocks.task_number()
        rows = columns(sum(rows_of_tasks[:task]), rows_of_tasks[task])
        return parquet_files.files_of(rows, CLEANED_COLUMNS, options)

    tasks = spark.range(0, len(rows_of_tasks), 1, len(rows_of_tasks)).selectExpr("id", "CAST('' AS BINARY) AS block")
    parquet_files.write(blocks.map_blocks(tasks, made, parquet_files.FILE_SCHEMA), uri)


def files_in(directory: Path) -> list[str]:
    """The names that readers see."""
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith((".", "_")))


def test_rows_come_back_as_they_were_in_every_reader(spark: SparkSession, tmp_path: Path) -> None:
    import pyarrow.parquet

    write(spark, f"file://{tmp_path}/table", [5])  # which the next rows replace
    write(spark, f"file://{tmp_path}/table", [300, 0, 41])
    assert (tmp_path / "table/_SUCCESS").exists()
    frame = spark.read.parquet(f"file://{tmp_path}/table")
    assert [(field.name, field.dataType.simpleString()) for field in frame.schema] == [
        (name, kind) for name, kind, _ in CLEANED_COLUMNS
    ]
    seconds = frame.selectExpr(*["CAST(tx_datetime AS BIGINT)" if n == "tx_datetime" else n for n in NAMES])
    found = sorted(tuple(row) for row in seconds.collect())
    expected = columns(0, 341)
    for name in ("customer_id", "terminal_id"):
        expected[name] = np.where(expected[name] == NO_KEY, None, expected[name])
    assert found == list(zip(*[expected[name].tolist() for name in NAMES]))
    tables = [pyarrow.parquet.read_table(str(tmp_path / "table" / name)) for name in files_in(tmp_path / "table")]
    assert [table.num_rows for table in tables] == [300, 41]
    nullable = {field.name for field in tables[0].schema if field.nullable}
    assert nullable == {"customer_id", "terminal_id"}


def test_a_table_without_rows_is_one_file_with_its_columns(spark: SparkSession, tmp_path: Path) -> None:
    write(spark, f"file://{tmp_path}/table", [0, 0])
    (name,) = files_in(tmp_path / "table")
    assert name.endswith(".parquet")
    frame = spark.read.parquet(f"file://{tmp_path}/table")
    assert (frame.columns, frame.count()) == (NAMES, 0)


def test_many_rows_are_several_files_and_groups(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    monkeypatch.setattr(parquet_files, "ROWS_PER_FILE", 100)
    monkeypatch.setattr(parquet_files, "ROWS_PER_GROUP", 30)
    options = parquet_files.options(spark, ["tx_fraud"])
    # In this process, for the tasks have modules of their own.
    made = list(parquet_files.files_of(columns(0, 250), CLEANED_COLUMNS, options))
    files = [file for row in made for file in row["file"]]
    found = [pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file + b"PAR1")) for file in files]
    assert [file.metadata.num_rows for file in found] == [83, 83, 84]
    assert [file.metadata.num_row_groups for file in found] == [3, 3, 3]
    assert [n for file in found for n in file.read().to_pydict()["transaction_id"]] == list(range(250))

    frame = spark.createDataFrame([(bytearray(file),) for file in files], parquet_files.FILE_SCHEMA).coalesce(1)
    parquet_files.write(frame, f"file://{tmp_path}/table")
    assert len(files_in(tmp_path / "table")) == 3
    assert spark.read.parquet(f"file://{tmp_path}/table").count() == 250


def test_a_cluster_that_compresses_text_leaves_the_files_as_they_are(spark: SparkSession, tmp_path: Path) -> None:
    hadoop = spark._jsc.hadoopConfiguration()
    setting = "mapreduce.output.fileoutputformat.compress"
    hadoop.set(setting, "true")
    try:
        write(spark, f"file://{tmp_path}/table", [5])
    finally:
        hadoop.unset(setting)
    assert spark.read.parquet(f"file://{tmp_path}/table").count() == 5
