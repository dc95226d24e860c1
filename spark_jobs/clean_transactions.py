"""Clean raw transaction files: text in; Parquet, rejects with their reasons and a report out.

A file is read once. Its lines are parsed in numpy, a hundred thousand at a time, and shuffled in blocks by
``transaction_id``, so that copies meet; there duplicates are counted, and the rest is sorted and written. Rejected
lines are few in real files: the tasks send them to the driver, which writes them. The file is read again only where
they are many or long, or where good rows contradict each other.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Callable, Iterator

from spark_jobs import partitions, runtime
from spark_jobs.cleaning import duplicates, rejects
from spark_jobs.cleaning.plain_lines import PADDING, Parser
from spark_jobs.cleaning.rules import FIX_BITS, LONG_LINE, MAX_ROW_BYTES, header_line
from spark_jobs.io import blocks, parquet_files
from spark_jobs.schema import CLEANED_COLUMNS, REJECT_RULES, REJECTED_COLUMNS, ddl

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.io.blocks import Array, Columns
    from spark_jobs.progress import Progress

#: Bytes at either end of a file that show its header and its range of ids.
END_BYTES = 64 << 10

#: Columns with few values, which Parquet keeps as dictionaries; for the others these cost time and space.
REPEATING = ("terminal_id", "tx_amount", "tx_time_days", "tx_fraud", "tx_fraud_scenario")


def run(spark: SparkSession, request: dict[str, Any]) -> dict[str, Any]:
    """Clean the files of `request`, one verdict per partition (see partitions.run_partitions).

    Request: ``run_id``; ``epoch`` (YYYY-MM-DD, where tx_time_seconds counts from); ``partitions``, a list of
    ``partition`` (key), ``raw`` (``uri``, ``size`` in bytes, ``fingerprint``), ``output_uri``, ``rejected_uri``.
    """
    return partitions.run_partitions(
        spark,
        request,
        lambda item, progress: clean_file(spark, item, request["epoch"], progress),
        what="cleaning",
        size=lambda item: item["raw"]["size"],
    )


def clean_file(spark: SparkSession, item: dict[str, Any], epoch: str, progress: Progress) -> dict[str, Any]:
    """Write the cleaned and the rejected rows of one file; returns what its report says.

    Raises RuntimeError if the file changes meanwhile.
    """
    raw, files = item["raw"], runtime.Files(spark)
    _require_unchanged(files, raw)
    head = files.read(raw["uri"], END_BYTES)
    tail = files.read(raw["uri"], END_BYTES, start=raw["size"] - END_BYTES) if raw["size"] > END_BYTES else head
    tasks = runtime.shuffle_partitions(spark, raw["size"])
    parser = Parser(header_line(head), _unix_seconds(epoch))
    ranges = duplicates.IdRanges(head, tail, raw["size"], tasks)
    lines = read_lines(spark, raw, tasks)

    tally, collected = write_cleaned(spark, lines, parser, ranges, item["output_uri"], progress)
    files.delete(item["rejected_uri"])
    if tally["rejected"]:
        write_rejected(spark, lines, parser, tally, collected, item["rejected_uri"])
    _require_unchanged(files, raw)
    return {
        "raw": raw,
        "epoch": epoch,
        "header": parser.header is not None,
        "counts": _counts(tally),
        "tx_datetime": {"min": _iso(tally["min_seconds"]), "max": _iso(tally["max_seconds"])},
        "transaction_id": {"min": tally["min_id"], "max": tally["max_id"]},
    }


def read_lines(spark: SparkSession, raw: dict[str, Any], tasks: int) -> DataFrame:
    """The lines of a raw file, column `value`, in parts of the size that they have after a shuffle into `tasks`."""
    # In this way whole rounds of the cores read it. Opening a file costs as much as reading 4 MB.
    spark.conf.set("spark.sql.files.maxPartitionBytes", str(max(4 << 20, raw["size"] // tasks + 1)))
    return spark.read.option("lineSep", "\n").text(runtime.literal_path(raw["uri"]))


def write_cleaned(
    spark: SparkSession,
    lines: DataFrame,
    parser: Parser,
    ranges: duplicates.IdRanges,
    uri: str,
    progress: Progress,
) -> tuple[dict[str, Any], dict[int, list[rejects.Reject]]]:
    """Replace a partition of `cleaned_transactions`; returns its tally and the rejects that each task collected."""
    tallies, task_rejects = partitions.list_accumulator(spark), partitions.list_accumulator(spark)
    progress.follow(tallies)
    options = parquet_files.options(spark, REPEATING)
    parquet_files.write(cleaned_files(lines, parser, ranges, options, tallies.add, task_rejects.add), uri)
    # By task, because one that is retried reports its rejects twice.
    collected = dict(task_rejects.value)
    task_rejects.value.clear()
    return duplicates.total_tally(partitions.tallies_of(tallies, ranges.partitions)), collected


def cleaned_files(
    lines: DataFrame,
    parser: Parser,
    ranges: duplicates.IdRanges,
    options: dict[str, Any],
    report_tally: Callable[[list[dict[str, Any]]], None],
    report_rejects: Callable[[list[tuple[int, list[rejects.Reject]]]], None],
) -> DataFrame:
    """Parquet files (see parquet_files) of `cleaned_transactions`, each sorted, from the column `value` of `lines`.

    `options` are those of the files. Each task that writes files reports its tally (see `duplicates.deduplicated`),
    each that parses lines its number and the rejects that it collected.
    """
    from pyspark.sql import functions as F

    keys = blocks.partition_keys(ranges.partitions)

    def parsed(texts: Iterator[tuple[Array, Array]]) -> Iterator[Columns]:
        collector = rejects.Collector()
        for data, offsets in texts:
            rows = parser.parse(data, offsets)
            collector.add(data, offsets, rows)
            rows = duplicates.without_reject_rows(rows)
            yield blocks.split(rows, duplicates.LAYOUT, ranges.partition(rows["transaction_id"]), keys)
        report_rejects([(blocks.task_number(), collector.lines)])

    def deduplicated(packed: list[bytes]) -> Iterator[Columns]:
        kept, tally = duplicates.deduplicated(blocks.unpack(packed, duplicates.LAYOUT))
        report_tally([tally])
        return parquet_files.files_of(duplicates.sorted_rows(kept, parser.epoch), CLEANED_COLUMNS, options)

    # Long lines do not go to Python, which would have to hold a hundred thousand of them.
    short = F.when(F.expr("octet_length(value)") <= MAX_ROW_BYTES, F.col("value")).otherwise(LONG_LINE)
    shuffled = blocks.exchange(
        blocks.map_text(lines.select(short.cast("binary")), parsed, blocks.BLOCK_SCHEMA, PADDING), ranges.partitions
    )
    return blocks.map_blocks(shuffled, deduplicated, parquet_files.FILE_SCHEMA)


def write_rejected(
    spark: SparkSession,
    lines: DataFrame,
    parser: Parser,
    tally: dict[str, Any],
    collected: dict[int, list[rejects.Reject]],
    uri: str,
) -> None:
    """Write a partition of `rejected_transactions`: the collected lines, or all that a second reading of `lines` finds.

    Raises RuntimeError if the second reading finds other lines than the first.
    """
    few = rejects.collected_rejects(collected, tally, parser.header)
    if few is not None:
        content = rejects.parquet_file(few, spark.conf.get("spark.sql.parquet.compression.codec"))
        runtime.Files(spark).write(f"{uri}/part-00000.parquet", content)
        return
    rejected = rejects.read_again(lines, parser, tally).repartition(1 + tally["rejected"] // 1000000)
    rejected.write.mode("overwrite").parquet(uri)
    if spark.read.schema(ddl(REJECTED_COLUMNS)).parquet(runtime.literal_path(uri)).count() != tally["rejected"]:
        raise RuntimeError("the raw file changed while it was read")


def _counts(tally: dict[str, Any]) -> dict[str, int]:
    names = (*REJECT_RULES, "duplicate", *FIX_BITS, "unknown_terminal", "unknown_customer", "fraud_rows", "zero_amount")
    return {
        "raw_rows": tally["rows"],
        "clean_rows": tally["clean_rows"],
        "duplicate_rows": tally["duplicate"],
        "rejected_rows": tally["rejected"],
        **{name: tally[name] for name in names},
    }


def _unix_seconds(day: str) -> int:
    return int(datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp())


def _require_unchanged(files: runtime.Files, raw: dict[str, Any]) -> None:
    size = files.size(raw["uri"])
    if size != raw["size"]:
        raise RuntimeError(
            f"the raw file is changing: {raw['size']} bytes when it was listed, {size} now; it is cleaned once it stays"
        )


def _iso(unix_seconds: int | None) -> str | None:
    if unix_seconds is None:
        return None
    # Unlike strftime's %Y, isoformat has four digits for every year on every platform.
    return datetime.fromtimestamp(unix_seconds, timezone.utc).replace(tzinfo=None).isoformat() + "Z"


if __name__ == "__main__":
    runtime.main(run, "clean_transactions")
