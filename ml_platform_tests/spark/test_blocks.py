"""Blocks: columns through Python, Spark's shuffle and back."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any, Iterator

import numpy as np
import pytest

from spark_jobs.io import blocks

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.images

LAYOUT = (("id", "i8"), ("amount", "f8"), ("label", "u1"))


def columns(rows: int) -> dict[str, Any]:
    """Columns of LAYOUT."""
    numbers = np.arange(rows)
    return {"id": numbers, "amount": numbers / 7, "label": numbers % 2}


def test_packed_columns_come_back_in_order() -> None:
    found, none = (
        blocks.unpack([blocks.pack(columns(rows), LAYOUT) for rows in sizes], LAYOUT) for sizes in ((3, 0, 2), ())
    )
    for unpacked in (found, none):
        assert [values.dtype for values in unpacked.values()] == [np.dtype(kind) for _, kind in LAYOUT]
    assert [len(values) for values in none.values()] == [0, 0, 0]
    assert found["id"].tolist() == [0, 1, 2, 0, 1]
    assert found["amount"].tolist() == [0, 1 / 7, 2 / 7, 0, 1 / 7]


def test_arrow_arrays_equal_those_of_pyarrow() -> None:
    import pyarrow

    numbers = np.arange(-5, 20)
    texts = [b"", b"\x00\xff", b"", b"abc"]
    seconds = pyarrow.timestamp("s", tz="UTC")
    for found, expected in (
        (blocks.arrow_array(numbers), pyarrow.array(numbers)),
        (blocks.arrow_array(numbers[::3].astype("u1")), pyarrow.array(numbers[::3].astype("u1"))),
        (blocks.arrow_array(numbers / 7), pyarrow.array(numbers / 7)),
        (blocks.arrow_array(numbers, valid=numbers % 3 > 0), pyarrow.array(numbers, mask=numbers % 3 == 0)),
        (blocks.arrow_array(numbers, seconds), pyarrow.array(numbers).cast(seconds)),
        (blocks.arrow_array(texts), pyarrow.array(texts, pyarrow.binary())),
        (blocks.arrow_array([b"", b"abc"], pyarrow.string()), pyarrow.array(["", "abc"])),
    ):
        found.validate()
        assert found.equals(expected)
        assert found.type == expected.type
    with pytest.raises(TypeError, match="int64 is not as wide as int32"):
        blocks.arrow_array(numbers, pyarrow.int32())


def test_no_pandas_is_imported() -> None:
    """In a new process, because this one may have imported it."""
    program = """
import sys
import numpy, pyarrow
from spark_jobs.cleaning import rejects
from spark_jobs.io import blocks, parquet_files

batch = pyarrow.RecordBatch.from_arrays([blocks.arrow_array(numpy.arange(5))], names=["id"])
assert blocks._array_of(batch, "id").tolist() == [0, 1, 2, 3, 4]
assert rejects.parquet_file([(b"garbage", 1)], "snappy")
options = {"compression": "snappy"}
assert list(parquet_files.files_of({"id": numpy.arange(5)}, [("id", "bigint")], options))
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bytes_that_arrow_cannot_hold_are_an_error() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return 1 << 30

    with pytest.raises(OverflowError, match="2,147,483,648 bytes"):
        blocks.arrow_array([Long(), Long()])


@pytest.mark.spark
def test_keys_lead_to_their_partitions_in_spark(spark: SparkSession) -> None:
    expected = [(count, int(key), n) for count in (1, 2, 7, 200) for n, key in enumerate(blocks.partition_keys(count))]
    frame = spark.createDataFrame(expected, "count int, key int, expected int").coalesce(1)
    assert frame.where("pmod(hash(key), count) = expected").count() == len(expected) == 210


@pytest.mark.spark
def test_each_row_arrives_once_in_its_partition(spark: SparkSession) -> None:
    keys = blocks.partition_keys(3)

    def sent(texts: Iterator[tuple[Any, Any]]) -> Iterator[dict[str, Any]]:
        for data, offsets in texts:
            numbers = np.array([int(data[a:b].tobytes()) for a, b in zip(offsets[:-1], offsets[1:])], dtype="i8")
            rows = {"id": numbers, "amount": numbers / 7, "label": numbers % 2}
            yield blocks.split(rows, LAYOUT, numbers % 3, keys)

    def received(packed: list[bytes]) -> Iterator[dict[str, Any]]:
        rows = blocks.unpack(packed, LAYOUT)
        yield {
            "id": rows["id"],
            "amount": rows["amount"],
            "remainders": np.full(len(rows["id"]), len(set(rows["id"] % 3))),
        }

    lines = spark.range(1000).selectExpr("CAST(CAST(id AS STRING) AS BINARY) AS line").repartition(5)
    moved = blocks.exchange(blocks.map_text(lines, sent, blocks.BLOCK_SCHEMA, padding=4), 3)
    found = blocks.map_blocks(moved, received, "id bigint, amount double, remainders bigint").collect()
    assert sorted((row.id, row.amount) for row in found) == [(n, n / 7) for n in range(1000)]
    assert {row.remainders for row in found} == {1}


@pytest.mark.spark
def test_much_text_comes_in_parts(spark: SparkSession) -> None:
    """Five lines of 40% of a part, and an empty one, in one Arrow batch."""

    def measured(texts: Iterator[tuple[Any, Any]]) -> Iterator[dict[str, Any]]:
        for data, offsets in texts:
            assert set(data[:4]) == set(data[-4:]) == {0}
            assert set(data[4:-4]) <= set(b"x")
            yield {"lines": np.array([len(offsets) - 1]), "bytes": np.array([offsets[-1] - offsets[0]])}

    size = blocks.TEXT_PER_BATCH * 2 // 5
    lines = spark.range(6).coalesce(1).selectExpr(f"CAST(repeat('x', IF(id = 2, 0, {size})) AS BINARY) AS line")
    found = blocks.map_text(lines, measured, "lines bigint, bytes bigint", padding=4).collect()
    assert [(row.lines, row.bytes) for row in found] == [(3, 2 * size), (2, 2 * size), (1, size)]
