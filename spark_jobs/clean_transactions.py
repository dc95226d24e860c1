"""Clean raw transaction files: text in; Parquet, rejects with their reasons and a report out.

A file is read once: every line is parsed, lines that a rule rejects are folded into one group per set of reasons,
and the rest are grouped by ``transaction_id``, which finds the duplicates. Ids come nearly in order, so they are
shuffled in blocks: what was together in the file stays together, which costs a third of a shuffle by single ids. All
counts are taken from those groups while they are written. A second scan happens only where there are rejects to write,
which real files rarely have.
"""

from __future__ import annotations

import re
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from spark_jobs import runtime
from spark_jobs.schema import CLEANED_COLUMNS, REJECT_RULES, REPORT_NAME, SCHEMA_VERSION

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, GroupedData, SparkSession

#: A longer line is malformed unseen: splitting 100 MB of commas would take the memory of an executor.
MAX_ROW_BYTES = 4096

#: A header is a line of at most so many bytes.
MAX_HEADER_BYTES = 64 << 10

#: Rows whose ids share all but the last so many bits stay together.
BLOCK_BITS = 13

#: Order of the rows in a Parquet file: that of the course's files, so that filters by time skip most row groups, and
#: filters by customer many.
SORTED_BY = ("tx_time_days", "customer_id", "tx_datetime", "transaction_id")

MAX_PLAIN_BYTES = 200

#: What no rule rejects, and most lines are. A line that does not match may still be right.
PLAIN_LINE = (
    r"\A[0-9]{1,18}+,"
    r"[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8])) (?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9],"
    r"[^,]*+,[^,]*+,[0-9]{1,9}+(?:\.[0-9]{1,9}+)?,[^,]*+,[^,]*+,[01],[0-9]{1,9}+\z"
)

_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

# Bits of the column `rejected`: one per rule that looks at a row alone, and one for the header's text.
_REJECT_BITS = {"malformed_row": 1, "invalid_datetime": 2, "invalid_amount": 4, "invalid_label": 8}
_HEADER_BIT = 16
# Bits of the column `fixes`.
_FIX_BITS = {"hour_24": 1, "wrong_seconds": 2, "wrong_days": 4}


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
        lambda item: clean_file(spark, item, request),
        what="cleaning",
        size=lambda item: item["raw"]["size"],
    )
    return {
        "run_id": request["run_id"],
        "spark_version": spark.version,
        "seconds": round(time.monotonic() - started, 3),
        "partitions": partitions,
    }


def clean_file(spark: SparkSession, item: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Clean one file and return its report, which is written last. Raises if the file changes meanwhile."""
    from pyspark.sql import functions as F

    started = time.monotonic()
    files = runtime.Files(spark)
    report_uri = item["output_uri"] + "/" + REPORT_NAME
    # From here on the partition is incomplete, until its new report is there.
    files.delete(report_uri)
    raw = item["raw"]
    _require_size(files, raw)

    header = header_line(files.read(raw["uri"], MAX_HEADER_BYTES + 1))
    runtime.set_shuffle_partitions(spark, raw["size"])
    epoch = int(datetime.strptime(request["epoch"], "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp())
    lines = read_lines(spark, raw["uri"])
    groups = group_rows(parse(lines, header, epoch))

    groups, get_counts = runtime.observed(groups, "cleaning", *_count_columns())
    cleaned = groups.where("rejected = 0 AND NOT conflict").select(*_output_columns(epoch))
    cleaned.sortWithinPartitions(*SORTED_BY).write.mode("overwrite").parquet(item["output_uri"])
    observed = get_counts()

    rejected_rows = observed["rejected_rows"] + max(0, observed["header_rows"] - 1)
    files.delete(item["rejected_uri"])
    if rejected_rows:
        conflicts = observed["conflicting_duplicate"] > 0
        rejects = rejected_lines(lines, header, epoch, observed["header_rows"] - 1, conflicts)
        rejects = rejects.repartition(1 + rejected_rows // 1000000)
        rejects, get_written = runtime.observed(rejects, "rejects", F.count(F.lit(1)).alias("rows"))
        rejects.write.mode("overwrite").parquet(item["rejected_uri"])
        if get_written()["rows"] != rejected_rows:
            raise RuntimeError("the raw file changed while it was read")
    _require_size(files, raw)

    report = {
        "schema_version": SCHEMA_VERSION,
        "partition": item["partition"],
        "run_id": request["run_id"],
        "raw": raw,
        "epoch": request["epoch"],
        "header": header is not None,
        "counts": _counts(observed, rejected_rows),
        "tx_datetime": {"min": _iso(observed["min_seconds"]), "max": _iso(observed["max_seconds"])},
        "transaction_id": {"min": observed["min_id"], "max": observed["max_id"]},
        "spark_version": spark.version,
        "seconds": round(time.monotonic() - started, 3),
    }
    files.write_json(report_uri, report)
    return report


def header_line(head: bytes) -> bytes | None:
    """The header of a file, from its first bytes: its first line that is not empty, if that is no data row.

    A header starts with ``#`` or has a first field that is no number. Returns its bytes without the line end, or
    None for a file without one (a first line longer than MAX_HEADER_BYTES is a malformed row, not a header).
    """
    if head.startswith(b"\xef\xbb\xbf"):  # Spark's reader drops a byte order mark, too
        head = head[3:]
    for line in head.split(b"\n"):
        first = line.rstrip(b"\r")
        if not first:
            continue
        if len(first) > MAX_HEADER_BYTES - 3:
            return None
        is_header = first.startswith(b"#") or not _NUMBER.fullmatch(first.split(b",")[0].strip())
        return first if is_header else None
    return None


def read_lines(spark: SparkSession, uri: str) -> DataFrame:
    """Column `line`: every line of a text file that is not empty, without its line end."""
    from pyspark.sql import functions as F

    lines = spark.read.option("lineSep", "\n").text(runtime.literal_path(uri))
    # Trimming costs more than reading, so only where there is something to trim.
    trimmed = F.when(F.col("value").endswith("\r"), F.expr("trim(TRAILING '\\r' FROM value)"))
    return lines.select(trimmed.otherwise(F.col("value")).alias("line")).where("line <> ''")


def parse(lines: DataFrame, header: bytes | None, epoch: int) -> DataFrame:
    """Parse lines into typed columns; a row that a rule rejects has its reasons as bits in `rejected`.

    Columns: line, rejected (int, 0 for none), transaction_id, tx_unix_seconds (bigint), customer_id, terminal_id,
    tx_amount, tx_fraud, tx_fraud_scenario, fixes (bits of hour_24, wrong_seconds, wrong_days), content (hash of
    the line). `epoch` is in Unix seconds.
    """
    from pyspark.sql import functions as F

    is_header = F.lit(False) if header is None else F.col("line").cast("binary") == F.lit(bytearray(header))
    short_line = F.when(F.expr("octet_length(line)") <= MAX_ROW_BYTES, F.col("line"))
    fields = lines.select("line", is_header.alias("is_header"), _once(F.split(short_line, ",")).alias("f"))
    # Mostly the only point of a line is that of the amount, and then no integer has one.
    points = "substring_index(line, '.', 2) = line AND instr(f[4], '.') > 0"
    fields = fields.select("*", _once(F.expr(f"coalesce({points}, false)")).alias("is_usual"))
    fields = fields.select(
        "line",
        "is_header",
        F.coalesce(F.size("f") == 9, F.lit(False)).alias("has_nine"),
        _integer("f[0]", "bigint").alias("transaction_id"),
        F.expr("trim(f[1])").alias("datetime"),
        _integer("f[2]", "bigint").alias("customer_id"),
        _integer("f[3]", "bigint").alias("terminal_id"),
        _decimal("f[4]").alias("tx_amount"),
        _integer("f[5]", "bigint").alias("raw_seconds"),
        _integer("f[6]", "bigint").alias("raw_days"),
        _integer("f[7]", "int").alias("tx_fraud"),
        _integer("f[8]", "int").alias("tx_fraud_scenario"),
    )
    # The cast alone takes dates without a time, time zones and more. Years 0 and 10000 are beyond most readers.
    is_hour_24 = "substr(datetime, 12) = '24:00:00'"
    unix_seconds = F.expr(
        "CASE WHEN length(datetime) = 19 AND datetime RLIKE "
        "'^[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}$' "
        "AND datetime >= '0001' AND datetime < '9999-12-31 24' THEN "
        f"IF({is_hour_24}, CAST(CAST(substr(datetime, 1, 10) AS TIMESTAMP) AS BIGINT) + 86400, "
        "CAST(CAST(datetime AS TIMESTAMP) AS BIGINT)) END"
    )
    timed = fields.select("*", _once(unix_seconds).alias("tx_unix_seconds"))
    malformed = (
        "NOT has_nine OR transaction_id IS NULL OR tx_amount IS NULL OR tx_fraud IS NULL OR tx_fraud_scenario IS NULL"
    )
    seconds = f"(tx_unix_seconds - {epoch})"
    return timed.selectExpr(
        "line",
        "CASE WHEN is_header THEN {header} ELSE IF({malformed}, {m}, 0) "
        "+ IF(has_nine AND tx_unix_seconds IS NULL, {d}, 0) + IF(has_nine AND tx_amount < 0, {a}, 0) "
        "+ IF(has_nine AND tx_fraud NOT IN (0, 1), {b}, 0) END AS rejected".format(
            header=_HEADER_BIT,
            malformed=malformed,
            m=_REJECT_BITS["malformed_row"],
            d=_REJECT_BITS["invalid_datetime"],
            a=_REJECT_BITS["invalid_amount"],
            b=_REJECT_BITS["invalid_label"],
        ),
        "transaction_id",
        "tx_unix_seconds",
        "IF(customer_id >= 0, customer_id, NULL) AS customer_id",
        "IF(terminal_id >= 0, terminal_id, NULL) AS terminal_id",
        "tx_amount",
        "tx_fraud",
        "tx_fraud_scenario",
        "IF({is_hour_24}, {hour}, 0) + IF(raw_seconds <=> {seconds}, 0, {wrong_seconds}) "
        "+ IF(raw_days <=> floor({seconds} / 86400), 0, {wrong_days}) AS fixes".format(
            is_hour_24=is_hour_24,
            hour=_FIX_BITS["hour_24"],
            seconds=seconds,
            wrong_seconds=_FIX_BITS["wrong_seconds"],
            wrong_days=_FIX_BITS["wrong_days"],
        ),
        "xxhash64(line) AS content",
    )


def group_rows(rows: DataFrame) -> DataFrame:
    """One row per transaction_id of good rows, and at least one per set of reasons of rejected rows.

    Columns: those of `parse` (of any row of the group: all are alike unless `conflict`), `rows` (how many), and
    `conflict`: rows of the group differ.
    """
    from pyspark.sql import functions as F

    values = (
        "tx_unix_seconds",
        "customer_id",
        "terminal_id",
        "tx_amount",
        "tx_fraud",
        "tx_fraud_scenario",
        "fixes",
    )
    good = F.col("rejected") == 0
    block = F.when(good, F.expr(f"shiftright(transaction_id, {BLOCK_BITS})")).otherwise(F.expr("pmod(content, 1024)"))
    keyed = rows.select(
        "rejected",
        _once(block).alias("block"),
        F.when(good, F.col("transaction_id")).alias("transaction_id"),
        "content",
        *values,
    )
    return (
        keyed.repartition(_shuffle_partitions(rows), "block")
        .groupBy("rejected", "block", "transaction_id")
        .agg(
            F.count(F.lit(1)).alias("rows"),
            F.min("content").alias("min_content"),
            F.max("content").alias("max_content"),
            *[F.first(name).alias(name) for name in values],
        )
        .withColumn("conflict", F.expr("rejected = 0 AND min_content <> max_content"))
    )


def rejected_lines(
    lines: DataFrame, header: bytes | None, epoch: int, repeated_headers: int, conflicts: bool
) -> DataFrame:
    """The rejected rows among `lines`: `raw_line` and `reasons`.

    A header that stands again further down is a malformed row: all its copies but one, `repeated_headers`. With
    `conflicts`, the rows that share a transaction_id and differ are looked up.
    """
    from pyspark.sql import functions as F

    reasons = [F.when(F.col("rejected").bitwiseAND(bit) > 0, F.lit(rule)) for rule, bit in _REJECT_BITS.items()]
    plain = (F.expr("octet_length(line)") <= MAX_PLAIN_BYTES) & F.col("line").rlike(PLAIN_LINE)
    rejects = parse(lines.where(~plain), header, epoch)
    rejects = rejects.where((F.col("rejected") > 0) & (F.col("rejected") < _HEADER_BIT)).select(
        "line", F.array(*reasons).alias("reasons")
    )
    if header is not None and repeated_headers > 0:
        copies = (
            runtime.session(lines)
            .range(repeated_headers)
            .select(
                F.lit(bytearray(header)).cast("string").alias("line"),
                F.array(F.lit("malformed_row")).alias("reasons"),
            )
        )
        rejects = rejects.union(copies)
    if conflicts:
        # Different lines with the same first field, found without parsing the rest; then those that are good rows.
        first_field = f"substring_index(IF(octet_length(line) <= {MAX_ROW_BYTES}, line, ''), ',', 1)"
        keyed = lines.select("line", F.expr(f"CAST({first_field} AS BIGINT)").alias("id"))
        keyed = keyed.withColumn("block", F.expr(f"shiftright(id, {BLOCK_BITS})"))
        contents = keyed.select("block", "id", F.expr("xxhash64(line)").alias("content"))
        differing = _differing(contents.repartition(_shuffle_partitions(lines), "block").groupBy("block", "id"))
        suspects = keyed.join(F.broadcast(differing.select("id")), "id").select("line")
        good = parse(suspects, header, epoch).where("rejected = 0")
        ids = _differing(good.groupBy("transaction_id")).select("transaction_id")
        conflicting = good.join(ids, "transaction_id").select(
            "line", F.array(F.lit("conflicting_duplicate")).alias("reasons")
        )
        rejects = rejects.union(conflicting)
    return rejects.select(
        _text("line").alias("raw_line"), F.expr("filter(reasons, r -> r IS NOT NULL)").alias("reasons")
    )


def _differing(grouped: GroupedData) -> DataFrame:
    """The groups whose rows have more than one `content`."""
    from pyspark.sql import functions as F

    return grouped.agg(F.min("content").alias("a"), F.max("content").alias("b")).where("a <> b")


def _shuffle_partitions(frame: DataFrame) -> int:
    return int(str(runtime.session(frame).conf.get("spark.sql.shuffle.partitions")))


def _once(column: Column) -> Column:
    """The same column, computed once per row.

    The optimizer copies an expression into every expression that uses it, up to dozens of times per row (Spark 3.0.3
    took five times as long), but never what it takes for nondeterministic.
    """
    from pyspark.sql import functions as F

    return F.when(F.spark_partition_id() >= 0, column)


def _integer(field: str, spark_type: str) -> Column:
    """A field as an integer, NULL if it is none. The cast alone would cut 31.7 down to 31."""
    from pyspark.sql import functions as F

    return F.expr(f"IF(is_usual OR instr({field}, '.') = 0, CAST({field} AS {spark_type}), NULL)")


def _decimal(field: str) -> Column:
    """A field as a finite double, NULL if it is none. The cast alone takes 1d, 0x1p3, NaN and Infinity."""
    from pyspark.sql import functions as F

    number = f"CAST({field} AS DOUBLE)"
    # Without letters there is nothing to look for.
    without_letters = f"(lower({field}) = upper({field}) OR translate({field}, 'dDfFxXnN', '') = {field})"
    return F.expr(f"IF({without_letters} AND abs({number}) < double('Infinity'), {number}, NULL)")


def _text(column: str) -> Column:
    """A line as valid text: one that is no UTF-8 is read as ISO 8859-1, which keeps every byte."""
    from pyspark.sql import functions as F

    return F.expr(
        f"IF(encode(decode(CAST({column} AS BINARY), 'UTF-8'), 'UTF-8') = CAST({column} AS BINARY), {column}, "
        f"decode(CAST({column} AS BINARY), 'ISO-8859-1'))"
    )


def _count_columns() -> list[Column]:
    """Aggregates over the groups that make up a report's counts."""
    from pyspark.sql import functions as F

    def total(condition: str, rows: str = "rows") -> Column:
        return F.expr(f"coalesce(sum(IF({condition}, {rows}, 0)), 0)")

    kept = "rejected = 0 AND NOT conflict"
    return [
        total(f"rejected < {_HEADER_BIT}").alias("rows_seen"),
        total(f"rejected = {_HEADER_BIT}").alias("header_rows"),
        total(kept, "1").alias("clean_rows"),
        total(kept, "rows - 1").alias("duplicate"),
        total(f"conflict OR (rejected > 0 AND rejected < {_HEADER_BIT})").alias("rejected_rows"),
        total("conflict").alias("conflicting_duplicate"),
        *[total(f"(rejected & {bit}) > 0").alias(rule) for rule, bit in _REJECT_BITS.items()],
        *[total(kept + f" AND (fixes & {bit}) > 0", "1").alias(rule) for rule, bit in _FIX_BITS.items()],
        total(kept + " AND terminal_id IS NULL", "1").alias("unknown_terminal"),
        total(kept + " AND customer_id IS NULL", "1").alias("unknown_customer"),
        total(kept + " AND tx_fraud = 1", "1").alias("fraud_rows"),
        total(kept + " AND tx_amount = 0", "1").alias("zero_amount"),
        F.expr(f"min(IF({kept}, tx_unix_seconds, NULL))").alias("min_seconds"),
        F.expr(f"max(IF({kept}, tx_unix_seconds, NULL))").alias("max_seconds"),
        F.expr(f"min(IF({kept}, transaction_id, NULL))").alias("min_id"),
        F.expr(f"max(IF({kept}, transaction_id, NULL))").alias("max_id"),
    ]


def _counts(observed: dict[str, Any], rejected_rows: int) -> dict[str, int]:
    repeated_headers = rejected_rows - observed["rejected_rows"]
    counts = {
        "raw_rows": observed["rows_seen"] + repeated_headers,
        "clean_rows": observed["clean_rows"],
        "duplicate_rows": observed["duplicate"],
        "rejected_rows": rejected_rows,
        "duplicate": observed["duplicate"],
        "fraud_rows": observed["fraud_rows"],
        "zero_amount": observed["zero_amount"],
    }
    for rule in (*REJECT_RULES, *_FIX_BITS, "unknown_terminal", "unknown_customer"):
        counts[rule] = observed[rule]
    counts["malformed_row"] += repeated_headers
    return counts


def _output_columns(epoch: int) -> list[Column]:
    """The columns of ``cleaned_transactions``, the times counted from the instant."""
    from pyspark.sql import functions as F

    seconds = f"(tx_unix_seconds - {epoch})"
    computed = {
        "tx_datetime": "CAST(tx_unix_seconds AS TIMESTAMP)",
        "tx_time_seconds": seconds,
        "tx_time_days": f"CAST(floor({seconds} / 86400) AS INT)",
    }
    return [F.expr(computed.get(name, name)).alias(name) for name, _, _ in CLEANED_COLUMNS]


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
    return datetime.fromtimestamp(unix_seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


if __name__ == "__main__":
    runtime.main(run, "clean_transactions")
