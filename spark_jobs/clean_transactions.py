"""Clean raw transaction files: text in; Parquet, rejects with their reasons and a report out.

A file is read once: its lines are parsed in numpy, a hundred thousand at a time, and shuffled in blocks by
``transaction_id``, so that copies meet; there they are found, counted, and the rest is sorted and written. Rejected
lines are few in real files and come back to the driver, which writes them. Only where they are many or long, or where
good rows turn out to contradict each other, is the file read again.
"""

from __future__ import annotations

import os
import re
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, Tuple

from spark_jobs import runtime
from spark_jobs.cleaning.plain_lines import LINE_COLUMNS, PADDING, parse_lines
from spark_jobs.cleaning.rules import FIX_BITS, HEADER_BIT, REJECT_BITS, is_number
from spark_jobs.features.windows import DAY_S, NO_KEY
from spark_jobs.io import blocks, parquet_files
from spark_jobs.schema import CLEANED_COLUMNS, REJECT_RULES, REJECTED_COLUMNS, REPORT_NAME, SCHEMA_VERSION, ddl

if TYPE_CHECKING:
    import numpy as np
    from pyspark.sql import Column, DataFrame, SparkSession

    from spark_jobs.io.blocks import Columns
    from spark_jobs.progress import Progress

    Array = np.ndarray[Any, Any]

#: A longer line is malformed unseen: splitting 100 MB of commas would take the memory of an executor.
MAX_ROW_BYTES = 4096

#: What stands for such a line: malformed, too, and no header.
LONG_LINE = "0"

#: Bytes at either end of a file that are looked at first.
END_BYTES = 64 << 10

#: Rejected lines that a task tells the driver, in bytes with LINE_BYTES for each; with more, the file is read again.
TOLD_BYTES = 256 << 10
LINE_BYTES = 64

#: Columns with few values, to be kept as dictionaries: of the others these would take time and more space.
REPEATING = ("terminal_id", "tx_amount", "tx_time_days", "tx_fraud", "tx_fraud_scenario")


def run(spark: SparkSession, request: dict[str, Any]) -> dict[str, Any]:
    """Clean the files of `request`, one verdict per partition.

    Request: ``run_id``; ``epoch`` (YYYY-MM-DD, where tx_time_seconds counts from); ``partitions``, a list of
    ``partition`` (key), ``raw`` (``uri``, ``size`` in bytes, ``fingerprint``), ``output_uri``, ``rejected_uri``.

    Returns ``run_id``, ``spark_version``, ``seconds`` and ``partitions``: key → ``status`` ``succeeded`` with the
    ``report`` that was also written to ``output_uri``, or ``failed`` with an ``error``.
    """
    started = time.monotonic()
    runtime.configure(spark)
    partitions = runtime.for_each_partition(
        spark,
        request["partitions"],
        lambda item, progress: clean_file(spark, item, request, progress),
        what="cleaning",
        size=lambda item: item["raw"]["size"],
    )
    return {
        "run_id": request["run_id"],
        "spark_version": spark.version,
        "seconds": round(time.monotonic() - started, 3),
        "partitions": partitions,
    }


def clean_file(
    spark: SparkSession, item: dict[str, Any], request: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Clean one file and return its report, which is written last. Raises if the file changes meanwhile."""
    started = time.monotonic()
    files = runtime.Files(spark)
    report_uri = item["output_uri"] + "/" + REPORT_NAME
    # From here on the partition is incomplete, until its new report is there.
    files.delete(report_uri)
    raw = item["raw"]
    _require_size(files, raw)

    head = files.read(raw["uri"], END_BYTES)
    tail = files.read(raw["uri"], END_BYTES, start=raw["size"] - END_BYTES) if raw["size"] > END_BYTES else head
    parser = Parser(header_line(head), _unix_seconds(request["epoch"]))
    lines = spark.read.option("lineSep", "\n").text(runtime.literal_path(raw["uri"]))
    tallies, rejects = runtime.gathering(spark), runtime.gathering(spark)
    progress.follow(tallies)
    tasks = runtime.shuffle_partitions(spark, raw["size"])
    # Parts as large as those after the shuffle: whole rounds of the cores. No smaller than what opening a file costs.
    spark.conf.set("spark.sql.files.maxPartitionBytes", str(max(4 << 20, raw["size"] // tasks + 1)))
    ranges = IdRanges(head, tail, raw["size"], tasks)
    options = parquet_files.options(spark, REPEATING)
    cleaned = cleaned_files(lines, parser, ranges, options, tallies.add, rejects.add)
    parquet_files.write(cleaned, item["output_uri"])
    if len(tallies.value) != ranges.partitions:
        raise RuntimeError(f"{len(tallies.value)} of {ranges.partitions} tasks told what they wrote")
    tally = total(tallies.value)

    repeated_headers = max(0, tally["header"] - 1)
    rejected_rows = tally["rejected"] + repeated_headers
    files.delete(item["rejected_uri"])
    if rejected_rows:
        told = told_lines(rejects.value, tally, parser, repeated_headers)
        rejects.value.clear()
        if told is not None:
            files.write(item["rejected_uri"] + "/part-00000.parquet", rejects_file(told, options["compression"]))
        else:
            found = lines_read_again(lines, parser, tally["conflicting_ids"])
            rejected = with_reasons(found, parser, repeated_headers).repartition(1 + rejected_rows // 1000000)
            rejected.write.mode("overwrite").parquet(item["rejected_uri"])
            # A second scan that found other lines would leave rows that do not add up.
            written = spark.read.schema(ddl(REJECTED_COLUMNS)).parquet(runtime.literal_path(item["rejected_uri"]))
            if written.count() != rejected_rows:
                raise RuntimeError("the raw file changed while it was read")
    _require_size(files, raw)

    report = {
        "schema_version": SCHEMA_VERSION,
        "partition": item["partition"],
        "run_id": request["run_id"],
        "raw": raw,
        "epoch": request["epoch"],
        "header": parser.header is not None,
        "counts": _counts(tally, repeated_headers),
        "tx_datetime": {"min": _iso(tally["min_seconds"]), "max": _iso(tally["max_seconds"])},
        "transaction_id": {"min": tally["min_id"], "max": tally["max_id"]},
        "spark_version": spark.version,
        "seconds": round(time.monotonic() - started, 3),
    }
    files.write_json(report_uri, report)
    return report


def header_line(head: bytes) -> bytes | None:
    """The header of a file, from its first bytes: its first line that is not empty, if that is no data row.

    A header starts with ``#`` or has a first field that is no number. Returns its bytes without the line end, or
    None for a file without one (a first line longer than MAX_ROW_BYTES is a malformed row, not a header).
    """
    if head.startswith(b"\xef\xbb\xbf"):  # Spark's reader drops a byte order mark, too
        head = head[3:]
    for line in head.split(b"\n"):
        first = line.rstrip(b"\r")
        if not first:
            continue
        if len(first) > MAX_ROW_BYTES:
            return None
        is_header = first.startswith(b"#") or not is_number(first.split(b",")[0])
        return first if is_header else None
    return None


#: What a task tells of the lines it rejects: its number, and lines with their reasons; not all if they are many.
Told = Tuple[int, List[Tuple[bytes, int]]]

#: Among REJECT_BITS, for good rows that contradict others of the same id.
CONFLICT_BIT = 2 * HEADER_BIT

#: What is shuffled: parsed lines, and how many a row stands for.
SHUFFLED = (*LINE_COLUMNS, ("rows", "i8"))


class Parser:
    """Parses the lines of one file, in any process. Hashes of lines can only be compared with those of the same one.

    `header` is the file's header line, `epoch` is in Unix seconds.
    """

    def __init__(self, header: bytes | None, epoch: int) -> None:
        self.header = header
        self.epoch = epoch
        self._seed = int.from_bytes(os.urandom(8), "little")

    def parse(self, data: Array, offsets: Array) -> Columns:
        """See plain_lines.parse_lines."""
        return parse_lines(data, offsets, self.header, self.epoch, self._seed)


class IdRanges:
    """Which partition of the shuffle an id goes to: ids near each other go to the same one.

    Ids and instants grow together in the course's files, so that each partition, and each Parquet file written from
    one, holds days of its own. Beyond the range that `head` and `tail`, the first and last bytes of a file of `size`,
    make one expect, ids are spread at random.
    """

    def __init__(self, head: bytes, tail: bytes, size: int, partitions: int) -> None:
        self.partitions = partitions
        first, last = [re.findall(rb"^([0-9]{1,18}),", end, re.MULTILINE) for end in (head, b"?" + tail)]
        self._first = int(first[0]) if first else 0
        rows = size * (head.count(b"\n") + 1) // max(len(head), 1)
        # Not those of a file whose ids do not grow.
        ids = int(last[-1]) - self._first + 1 if last else 0
        self._width = max(1, -(-(ids if 0 < ids < 2 * rows else rows) // partitions))

    def partition(self, transaction_id: Array) -> Array:
        """Numbers of partitions."""
        import numpy as np

        # Ids that are too far apart for 64 bits wrap around, the same ones always alike.
        number = (transaction_id - self._first) // self._width
        expected = (number >= 0) & (number < self.partitions)
        return np.where(expected, number, blocks.mixed(number) % self.partitions)


def cleaned_files(
    lines: DataFrame,
    parser: Parser,
    ranges: IdRanges,
    options: dict[str, Any],
    tell: Callable[[list[Columns]], None],
    tell_rejects: Callable[[list[Told]], None],
) -> DataFrame:
    """Files of `cleaned_transactions`, sorted rows in each (see parquet_files), from the column `value` of `lines`.

    `options` are those of the files. Each task that writes some of them tells its tally (see `deduplicated`), each that
    parses lines those that it rejects (see `Told`).
    """
    from pyspark.sql import functions as F

    partitions = ranges.partitions
    keys = blocks.partition_keys(partitions)

    def shuffled(texts: Iterator[tuple[Array, Array]]) -> Iterator[Columns]:
        told: list[tuple[bytes, int]] = []
        room = TOLD_BYTES
        for data, offsets in texts:
            parsed = parser.parse(data, offsets)
            if room >= 0:
                most = room // LINE_BYTES + 1
                for line, reasons in zip(*rejected_lines(data, offsets, parsed, parsed["rejected"], most)):
                    room -= LINE_BYTES + (len(line) if line != LONG_LINE.encode() else TOLD_BYTES)
                    if room < 0:
                        break
                    told.append((line, int(reasons)))
            rows = counted(parsed)
            yield blocks.split(rows, SHUFFLED, ranges.partition(rows["transaction_id"]), keys)
        # Some are of no use: without the others the file is read again.
        tell_rejects([(blocks.task_number(), told if room >= 0 else [])])

    def written(packed: list[bytes]) -> Iterator[Columns]:
        kept, tally = deduplicated(blocks.unpack(packed, SHUFFLED))
        tell([tally])
        return parquet_files.files_of(in_order(kept, parser.epoch), CLEANED_COLUMNS, options)

    # Long lines stay where they are: Python would have to hold a hundred thousand of them.
    short = F.when(F.expr("octet_length(value)") <= MAX_ROW_BYTES, F.col("value")).otherwise(LONG_LINE)
    texts = lines.select(short.cast("binary"))
    moved = blocks.exchange(blocks.map_text(texts, shuffled, blocks.BLOCK_SCHEMA, PADDING), partitions)
    return blocks.map_blocks(moved, written, parquet_files.FILE_SCHEMA)


def counted(rows: Columns) -> Columns:
    """SHUFFLED columns of parsed lines: one row for all that were rejected for the same reasons.

    A file that is no text is nothing but rejects, and they must not all be moved.
    """
    import numpy as np

    good = np.flatnonzero(rows["rejected"] == 0)
    reasons, first, counts = np.unique(rows["rejected"], return_index=True, return_counts=True)
    bad = first[reasons > 0]
    kept = np.concatenate([good, bad])
    return {
        **{name: rows[name][kept] for name, _ in LINE_COLUMNS},
        "rows": np.concatenate([np.ones(len(good), dtype="i8"), counts[reasons > 0]]),
    }


def deduplicated(rows: Columns) -> tuple[Columns, dict[str, Any]]:
    """(the rows to keep, in order of their ids; the tally of all) of SHUFFLED that hold all rows of their ids.

    The tally has the counts of a report, ``rows`` (all that are no headers), ``header``, ``min_`` and ``max_`` of
    ``seconds`` and ``id`` (None without rows), and ``conflicting_ids``, an array.
    """
    import numpy as np

    rejected = rows["rejected"]

    def count(found: Array) -> int:
        return int(rows["rows"][found].sum())

    tally: dict[str, Any] = {
        "rows": count(rejected != HEADER_BIT),
        "header": count(rejected == HEADER_BIT),
        "rejected": count((rejected > 0) & (rejected != HEADER_BIT)),
        **{rule: count((rejected & bit) > 0) for rule, bit in REJECT_BITS.items()},
    }
    order = np.argsort(rows["transaction_id"], kind="stable")
    order = order[rejected[order] == 0]
    ids = rows["transaction_id"][order]
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]][: len(ids)])
    copies = np.diff(np.r_[starts, len(ids)])
    conflict = np.zeros(len(starts), dtype=bool)
    if len(starts) < len(ids):
        content = rows["content"][order]
        conflict = np.minimum.reduceat(content, starts) != np.maximum.reduceat(content, starts)
    kept = {name: values[order[starts[~conflict]]] for name, values in rows.items()}
    tally["conflicting_duplicate"] = int(copies[conflict].sum())
    tally["rejected"] += tally["conflicting_duplicate"]
    tally["conflicting_ids"] = ids[starts[conflict]]
    tally["clean_rows"] = int((~conflict).sum())
    tally["duplicate"] = int((copies[~conflict] - 1).sum())
    for fix, bit in FIX_BITS.items():
        tally[fix] = int(((kept["fixes"] & bit) > 0).sum())
    for name, found in (
        ("unknown_terminal", kept["terminal_id"] == NO_KEY),
        ("unknown_customer", kept["customer_id"] == NO_KEY),
        ("fraud_rows", kept["tx_fraud"] == 1),
        ("zero_amount", kept["tx_amount"] == 0),
    ):
        tally[name] = int(found.sum())
    for name, values in (("seconds", kept["tx_unix_seconds"]), ("id", kept["transaction_id"])):
        tally[f"min_{name}"] = int(values.min()) if len(values) else None
        tally[f"max_{name}"] = int(values.max()) if len(values) else None
    return kept, tally


def in_order(rows: Columns, epoch: int) -> Columns:
    """CLEANED_COLUMNS, the instant in Unix seconds, of rows in order of their ids, sorted by day, customer and instant.

    That is the order of the course's files.
    """
    import numpy as np

    seconds = rows["tx_unix_seconds"] - epoch
    days = seconds // DAY_S
    customers = rows["customer_id"]
    if len(days):
        # One number to sort by, where it fits; ids break ties, for they are in order and the sort is stable.
        width = int(customers.max()) - NO_KEY + 1
        if (int(days.max()) - int(days.min()) + 1) * width * DAY_S < 1 << 63:
            place = ((days - days.min()) * width + (customers - NO_KEY)) * DAY_S + seconds - days * DAY_S
            order = np.argsort(place, kind="stable")
        else:
            order = np.lexsort((seconds, customers, days))
    else:
        order = np.empty(0, dtype="i8")
    times = {"tx_datetime": rows["tx_unix_seconds"], "tx_time_seconds": seconds, "tx_time_days": days.astype("i4")}
    columns = {**rows, **times}
    return {name: columns[name][order] for name, _, _ in CLEANED_COLUMNS}


def total(tallies: list[dict[str, Any]]) -> dict[str, Any]:
    """The tally of a whole file, from those of its tasks."""
    import numpy as np

    # With that of no rows, for where no task had any.
    tallies = [*tallies, deduplicated(blocks.unpack([], SHUFFLED))[1]]
    summed: dict[str, Any] = {}
    for name in tallies[0]:
        values: list[Any] = [tally[name] for tally in tallies if tally[name] is not None]
        if name == "conflicting_ids":
            summed[name] = np.sort(np.concatenate(values))
        elif name.startswith(("min_", "max_")):
            best = min if name.startswith("min_") else max
            summed[name] = best(values) if values else None
        else:
            summed[name] = sum(values)
    return summed


def rejected_lines(
    data: Array, offsets: Array, rows: Columns, reasons: Array, most: int | None = None
) -> tuple[list[bytes], Array]:
    """(the lines of a text that `rows` reject, without their ends; their `reasons`), at `most` so many."""
    import numpy as np

    found = np.flatnonzero((reasons > 0) & (reasons != HEADER_BIT))[:most]
    numbers = rows["line"][found]
    return [data[offsets[n] : offsets[n + 1]].tobytes().rstrip(b"\r") for n in numbers], reasons[found]


def told_lines(
    told: list[Told], tally: dict[str, Any], parser: Parser, repeated_headers: int
) -> list[tuple[bytes, int]] | None:
    """The rejected lines with their reasons (bits), as the tasks told them; None if these are not all.

    A header that stands again further down is a malformed row: all its copies but one, `repeated_headers`.
    """
    # A task that is tried again tells again.
    lines = [line for task in dict(told).values() for line in task]
    if tally["conflicting_duplicate"] or len(lines) != tally["rejected"] or repeated_headers > TOLD_BYTES // LINE_BYTES:
        return None
    return lines + [(parser.header or b"", REJECT_BITS["malformed_row"])] * repeated_headers


def rejects_file(lines: list[tuple[bytes, int]], compression: str) -> bytes:
    """A Parquet file of REJECTED_COLUMNS; what `with_reasons` does in Spark, for few lines, without two more jobs."""
    import numpy as np
    import pyarrow

    texts, reasons, counts = [], [], [0]
    for line, bits in lines:
        try:
            line.decode("utf-8")
            texts.append(line)
        except UnicodeDecodeError:
            texts.append(line.decode("iso-8859-1").encode("utf-8"))
        found = [rule.encode() for rule, bit in REJECT_BITS.items() if bits & bit]
        reasons += found
        counts.append(len(found))
    text = pyarrow.string()
    ends = blocks.arrow_array(np.cumsum(counts, dtype="i4"))
    lists = pyarrow.ListArray.from_arrays(ends, blocks.arrow_array(reasons, text))
    table = pyarrow.Table.from_arrays(
        [blocks.arrow_array(texts, text), lists], names=[name for name, *_ in REJECTED_COLUMNS]
    )
    return parquet_files.file_of(table, compression=compression)


def lines_read_again(lines: DataFrame, parser: Parser, conflicting_ids: Array) -> DataFrame:
    """The rejected rows among `lines`: ``line``, ``rejected``.

    Good rows whose id is one of `conflicting_ids` (sorted) are rejected, too.
    """
    import numpy as np
    from pyspark.sql import functions as F

    def rejects(texts: Iterator[tuple[Array, Array]]) -> Iterator[Columns]:
        for data, offsets in texts:
            rows = parser.parse(data, offsets)
            reasons = rows["rejected"].astype("i4")
            if len(conflicting_ids):
                place = np.minimum(np.searchsorted(conflicting_ids, rows["transaction_id"]), len(conflicting_ids) - 1)
                reasons[(reasons == 0) & (conflicting_ids[place] == rows["transaction_id"])] = CONFLICT_BIT
            yield dict(zip(("line", "rejected"), rejected_lines(data, offsets, rows, reasons)))

    is_short = F.expr("octet_length(value)") <= MAX_ROW_BYTES
    short = lines.where(is_short).select(F.col("value").cast("binary"))
    found = blocks.map_text(short, rejects, "line binary, rejected int", PADDING)
    # Reading the lines once more is cheap, where Python need not see them.
    trimmed = F.expr("trim(TRAILING '\r' FROM value)").cast("binary")
    return found.union(lines.where(~is_short).select(trimmed, F.lit(REJECT_BITS["malformed_row"])))


def with_reasons(found: DataFrame, parser: Parser, repeated_headers: int) -> DataFrame:
    """REJECTED_COLUMNS of rejected lines: ``line``, ``rejected``.

    A header that stands again further down is a malformed row: all its copies but one, `repeated_headers`.
    """
    from pyspark.sql import functions as F

    if repeated_headers > 0:
        copies = runtime.session(found).range(repeated_headers)
        malformed = F.lit(REJECT_BITS["malformed_row"])
        found = found.union(copies.select(F.lit(bytearray(parser.header or b"")), malformed))
    bits = {**REJECT_BITS, "conflicting_duplicate": CONFLICT_BIT}
    reasons = [F.when(F.col("rejected").bitwiseAND(bit) > 0, F.lit(rule)) for rule, bit in bits.items()]
    return found.select(_text("line").alias("raw_line"), F.array(*reasons).alias("reasons")).select(
        "raw_line", F.expr("filter(reasons, r -> r IS NOT NULL)").alias("reasons")
    )


def _text(column: str) -> Column:
    """A line as valid text: one that is no UTF-8 is read as ISO 8859-1, which keeps every byte."""
    from pyspark.sql import functions as F

    return F.expr(
        f"IF(encode(decode({column}, 'UTF-8'), 'UTF-8') = {column}, CAST({column} AS STRING), "
        f"decode({column}, 'ISO-8859-1'))"
    )


def _counts(tally: dict[str, Any], repeated_headers: int) -> dict[str, int]:
    counts = {
        "raw_rows": tally["rows"] + repeated_headers,
        "clean_rows": tally["clean_rows"],
        "duplicate_rows": tally["duplicate"],
        "rejected_rows": tally["rejected"] + repeated_headers,
    }
    names = (*REJECT_RULES, "duplicate", *FIX_BITS, "unknown_terminal", "unknown_customer", "fraud_rows", "zero_amount")
    counts.update({name: tally[name] for name in names})
    counts["malformed_row"] += repeated_headers
    return counts


def _unix_seconds(day: str) -> int:
    return int(datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp())


def _require_size(files: runtime.Files, raw: dict[str, Any]) -> None:
    size = files.size(raw["uri"])
    if size != raw["size"]:
        raise RuntimeError(
            "the raw file is changing: {} bytes when it was listed, {} now; it is cleaned once it stays".format(
                raw["size"], size
            )
        )


def _iso(unix_seconds: int | None) -> str | None:
    if unix_seconds is None:
        return None
    # Years in four digits, which strftime's %Y has not everywhere; and utcfromtimestamp is deprecated.
    return datetime.fromtimestamp(unix_seconds, timezone.utc).replace(tzinfo=None).isoformat() + "Z"


if __name__ == "__main__":
    runtime.main(run, "clean_transactions")
