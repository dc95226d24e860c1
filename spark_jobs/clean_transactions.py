"""Clean raw transaction files into Parquet, with rejected rows, their reasons and a report.

Each file is read once. Lines are parsed in numpy, 100,000 at a time, and shuffled in blocks by ``transaction_id``,
which brings duplicates together; after deduplication, rows are sorted and written. Real files have few rejected lines,
so the tasks send them to the driver, which writes them. The file is read again only if rejected lines are many or long,
if valid rows with the same id differ, or if rows lie outside `out_of_range`.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Callable, Iterator

from spark_jobs import partitions, runtime
from spark_jobs.cleaning import duplicates, raw_text, rejects
from spark_jobs.cleaning.bulk import Bulk, bounds_of, tail_length
from spark_jobs.cleaning.plain_lines import PADDING, Parser
from spark_jobs.cleaning.rules import FIX_BITS, LONG_LINE, MAX_ROW_BYTES, header_line
from spark_jobs.cleaning.shared_ids import find_shared_ids
from spark_jobs.io import blocks, parquet_files
from spark_jobs.schema import CLEANED_COLUMNS, DAY_S, REJECT_RULES, REJECTED_COLUMNS, ddl, version_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.cleaning.bulk import Bounds
    from spark_jobs.io.blocks import Array, Columns
    from spark_jobs.progress import Progress

#: Columns with few distinct values, dictionary-encoded in Parquet; for others, dictionaries cost time and space.
DICTIONARY_COLUMNS = ("terminal_id", "tx_amount", "tx_time_days", "tx_fraud", "tx_fraud_scenario")


def run(spark: SparkSession, request: dict[str, Any]) -> dict[str, Any]:
    """Clean the files of `request`, one result per partition (see partitions.run_partitions).

    Request: ``run_id``; ``epoch`` (YYYY-MM-DD, the origin of tx_time_seconds); ``out_of_range`` (None, or how many
    times the width of its file's bulk a row may lie outside of it, see bulk.Bulk); ``partitions``, a list of
    ``partition`` (key), ``raw`` (``uri``, ``size`` in bytes, ``fingerprint``), ``output_uri``, ``rejected_uri``,
    ``accepted`` (copied into the report);
    ``neighbours``, cleaned partitions whose ids are compared: key → ``version``, ``uri``, ``transaction_id``.
    """
    neighbours = dict(request.get("neighbours", {}))

    def clean(item: dict[str, Any], progress: Progress) -> dict[str, Any]:
        report = clean_file(spark, item, request["epoch"], request.get("out_of_range"), progress)
        ids = report["transaction_id"]
        runtime.set_shuffle_partitions(spark, report["text_bytes"])
        report["shared_ids"] = find_shared_ids(spark, item["output_uri"], ids, neighbours)
        report["accepted"] = item.get("accepted", False)
        neighbours[item["partition"]] = {
            "version": version_of(report),
            "uri": item["output_uri"],
            "transaction_id": ids,
        }
        return report

    return partitions.run_partitions(spark, request, clean, what="cleaning", size=lambda item: item["raw"]["size"])


def clean_file(
    spark: SparkSession, item: dict[str, Any], epoch: str, out_of_range: float | None, progress: Progress
) -> dict[str, Any]:
    """Write the cleaned and rejected rows of one file; return the fields of its report.

    Raises RuntimeError if the file changes in the meantime, Refused if it is not a file of rows.
    """
    raw, files = item["raw"], runtime.Files(spark)
    _require_unchanged(files, raw)
    ends = raw_text.read_ends(files, raw)
    tasks = runtime.shuffle_partitions(spark, ends.size)
    parser = Parser(header_line(ends.head), _unix_seconds(epoch))
    ranges = duplicates.IdRanges(ends.head, ends.tail, ends.size, tasks)
    lines = read_lines(spark, raw, tasks)

    def write() -> tuple[dict[str, Any], dict[int, list[rejects.Reject]]]:
        length = tail_length(ends.size)
        return write_cleaned(spark, lines, parser, ranges, length, item["output_uri"], progress)

    try:
        tally, collected = write()
        if out_of_range is not None and tally["bulk"] is not None:
            parser.bounds = bounds_of(tally["bulk"], out_of_range)
            if _reaches_beyond(tally, parser.bounds):
                tally, collected = write()
        files.delete(item["rejected_uri"])
        samples: dict[str, str] = {}
        if tally["rejected"]:
            samples = write_rejected(spark, lines, parser, tally, collected, item["rejected_uri"])
    except Exception as error:
        if damage := raw_text.damage_of(files, raw):
            raise partitions.Refused(f"it cannot be decompressed: {damage}") from error
        raise
    _require_unchanged(files, raw)
    return {
        "raw": raw,
        "epoch": epoch,
        "out_of_range": out_of_range,
        "text_bytes": tally["text_bytes"] if raw_text.is_compressed(raw["uri"]) else raw["size"],
        "header": parser.header is not None,
        "counts": _counts(tally),
        "reject_samples": samples,
        **_extent(tally),
    }


def _extent(tally: dict[str, Any]) -> dict[str, Any]:
    """The fields of a report about the instants and ids of a file."""
    bulk: Bulk | None = tally["bulk"]
    return {
        "tx_datetime": {
            "min": _iso(tally["min_seconds"]),
            "max": _iso(tally["max_seconds"]),
            "p0_1": _iso(bulk.days[0] * DAY_S) if bulk else None,
            "p99_9": _iso(bulk.days[1] * DAY_S) if bulk else None,
        },
        "transaction_id": {
            "min": tally["min_id"],
            "max": tally["max_id"],
            "p0_1": bulk.ids[0] if bulk else None,
            "p99_9": bulk.ids[1] if bulk else None,
        },
        "rows_per_day": {_iso(day * DAY_S): rows for day, rows in bulk.rows_per_day.items()} if bulk else {},
        "odd_rows": {
            "rows": bulk.odd if bulk else 0,
            "usual_days": [_iso(day * DAY_S) for day in bulk.usual_days] if bulk else [],
            "examples": [{"transaction_id": row, "tx_datetime": _iso(at)} for row, at in bulk.examples] if bulk else [],
        },
    }


def _reaches_beyond(tally: dict[str, Any], bounds: Bounds) -> bool:
    return any(
        tally[f"min_{name}"] < low or tally[f"max_{name}"] > high
        for name, (low, high) in zip(("id", "seconds"), bounds)
    )


def read_lines(spark: SparkSession, raw: dict[str, Any], tasks: int) -> DataFrame:
    """Read the lines of a raw file (column `value`) in partitions as large as a shuffle into `tasks` makes them."""
    # So that no core idles in the last wave of the scan. Opening a file costs as much as reading 4 MB.
    spark.conf.set("spark.sql.files.maxPartitionBytes", str(max(4 << 20, raw["size"] // tasks + 1)))
    return spark.read.option("lineSep", "\n").text(runtime.literal_path(raw["uri"]))


def write_cleaned(
    spark: SparkSession,
    lines: DataFrame,
    parser: Parser,
    ranges: duplicates.IdRanges,
    tail_length: int,
    uri: str,
    progress: Progress,
) -> tuple[dict[str, Any], dict[int, list[rejects.Reject]]]:
    """Replace a partition of `cleaned_transactions`; return its tally and the rejects collected by each task."""
    tallies, task_rejects = partitions.list_accumulator(spark), partitions.list_accumulator(spark)
    progress.follow(tallies)
    options = parquet_files.options(spark, DICTIONARY_COLUMNS)
    files = cleaned_files(lines, parser, ranges, tail_length, options, tallies.add, task_rejects.add)
    parquet_files.write(files, uri)
    # Keyed by task, because a retried task reports its rejects twice.
    collected = dict(task_rejects.value)
    task_rejects.value.clear()
    tally = duplicates.merge_tallies(partitions.tallies_of(tallies, ranges.partitions))
    tally["text_bytes"] = sum(collector.text_bytes for collector in collected.values())
    return tally, {task: collector.lines for task, collector in collected.items()}


def cleaned_files(
    lines: DataFrame,
    parser: Parser,
    ranges: duplicates.IdRanges,
    tail_length: int,
    options: dict[str, Any],
    report_tally: Callable[[list[dict[str, Any]]], None],
    report_rejects: Callable[[list[tuple[int, rejects.Collector]]], None],
) -> DataFrame:
    """Sorted Parquet files (see parquet_files) of `cleaned_transactions`, from the column `value` of `lines`.

    `options` are those of the Parquet writer. Each task that writes files reports its tally (see
    `duplicates.deduplicate`); each task that parses lines reports its number and its collected rejects.
    """
    from pyspark.sql import functions as F

    keys = blocks.partition_keys(ranges.partitions)

    def parse(texts: Iterator[tuple[Array, Array]]) -> Iterator[Columns]:
        collector = rejects.Collector()
        for data, offsets in texts:
            rows = parser.parse(data, offsets)
            collector.add(data, offsets, rows)
            rows = duplicates.collapse_rejects(rows)
            yield blocks.split(rows, duplicates.LAYOUT, ranges.partition(rows["transaction_id"]), keys)
        report_rejects([(blocks.task_number(), collector)])

    def deduplicate(packed: list[bytes]) -> Iterator[Columns]:
        kept, tally = duplicates.deduplicate(blocks.unpack(packed, duplicates.LAYOUT), tail_length)
        report_tally([tally])
        return parquet_files.files_of(duplicates.sort_rows(kept, parser.epoch), CLEANED_COLUMNS, options)

    # Long lines are replaced before they reach Python, which would hold 100,000 of them at a time.
    short = F.when(F.expr("octet_length(value)") <= MAX_ROW_BYTES, F.col("value")).otherwise(LONG_LINE)
    shuffled = blocks.exchange(
        blocks.map_text(lines.select(short.cast("binary")), parse, blocks.BLOCK_SCHEMA, PADDING), ranges.partitions
    )
    return blocks.map_blocks(shuffled, deduplicate, parquet_files.FILE_SCHEMA)


def write_rejected(
    spark: SparkSession,
    lines: DataFrame,
    parser: Parser,
    tally: dict[str, Any],
    collected: dict[int, list[rejects.Reject]],
    uri: str,
) -> dict[str, str]:
    """Write a partition of `rejected_transactions` from the collected lines or from a second read of `lines`.

    Returns a line for each reason. Raises RuntimeError if the second read finds a different number of rejects.
    """
    from pyspark.sql import functions as F

    complete = rejects.collected_rejects(collected, tally, parser.header)
    if complete is not None:
        content = rejects.parquet_file(complete, spark.conf.get("spark.sql.parquet.compression.codec"))
        runtime.Files(spark).write(f"{uri}/part-00000.parquet", content)
        return rejects.samples_of(complete)
    rejected = rejects.reread(lines, parser, tally).repartition(1 + tally["rejected"] // 1000000)
    rejected.write.mode("overwrite").parquet(uri)
    # There are few rows and reasons; Spark's default is 200 tasks.
    runtime.set_shuffle_partitions(spark, 0)
    written = spark.read.schema(ddl(REJECTED_COLUMNS)).parquet(runtime.literal_path(uri))
    sample = F.min(F.expr(f"left(raw_line, {rejects.SAMPLE_LENGTH})"))
    groups = written.groupBy("reasons").agg(F.count("*").alias("rows"), sample.alias("sample")).collect()
    if sum(group.rows for group in groups) != tally["rejected"]:
        raise RuntimeError("the raw file changed while it was being read")
    return {reason: group.sample for group in groups for reason in group.reasons}


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
            f"the raw file is changing: {raw['size']} bytes when listed, {size} now; it is cleaned once it is stable"
        )


def _iso(unix_seconds: int | None) -> str | None:
    if unix_seconds is None:
        return None
    # isoformat gives four-digit years on every platform, unlike strftime's %Y.
    return datetime.fromtimestamp(unix_seconds, timezone.utc).replace(tzinfo=None).isoformat() + "Z"


if __name__ == "__main__":
    runtime.main(run, "clean_transactions")
