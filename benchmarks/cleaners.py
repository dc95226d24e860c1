"""Cleaning by four engines, each in its own process: this platform, its predecessor, DuckDB and Polars.

All but the predecessor follow the rules of docs/cleaning.md and give the same rows and counts; for the predecessor, see
`old_pipeline`. DuckDB and Polars only handle what benchmark data contain (ASCII lines, one header), so they do less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from datetime import date
from pathlib import Path
from typing import Any

#: The counts that all engines but the predecessor return.
COUNTS = (
    "raw_rows",
    "clean_rows",
    "rejected_rows",
    "duplicate",
    "malformed_row",
    "invalid_datetime",
    "invalid_amount",
    "invalid_label",
    "conflicting_duplicate",
    "hour_24",
    "wrong_seconds",
    "wrong_days",
    "unknown_terminal",
    "unknown_customer",
)

FIELDS = (
    "transaction_id",
    "tx_datetime",
    "customer_id",
    "terminal_id",
    "tx_amount",
    "tx_time_seconds",
    "tx_time_days",
    "tx_fraud",
    "tx_fraud_scenario",
)


def platform(raw: Path, out: Path, epoch: date) -> dict[str, int]:
    """The platform's job, in a session configured like that of its local engine."""
    from benchmarks.common import spark_session
    from ml_platform.spark.bare_jobs import clean

    spark = spark_session()
    counts = clean(spark, [raw], out, epoch)[raw.stem]["counts"]
    spark.stop()
    return {name: counts[name] for name in COUNTS}


def warm_job(raw: Path, out: Path, epoch: date) -> dict[str, float]:
    """Rows and seconds of the platform's job in a session that has run it twice before."""
    from benchmarks.common import spark_session
    from ml_platform.spark.bare_jobs import clean

    spark = spark_session()
    for _ in range(3):
        started = time.monotonic()
        report = clean(spark, [raw], out, epoch)[raw.stem]
        seconds = time.monotonic() - started
    spark.stop()
    return {"rows": report["counts"]["raw_rows"], "seconds": seconds}


def old_pipeline(raw: Path, out: Path, epoch: date) -> dict[str, int]:
    """The predecessor's processing of a new file: `out`/CLEANED is copied, extended and written again.

    It dropped duplicates by id within the new file, rows without an instant, and the signs of customer ids; an unknown
    terminal became terminal 0; days were computed from the seconds. Its JVM runs with Spark's defaults, without the
    options and the class archive that the platform adds.
    """
    from pyspark.sql import functions as F

    from ml_platform.spark.session import default_spark_config, local_session

    config = default_spark_config("local[*]")
    del config["spark.driver.defaultJavaOptions"]
    spark = local_session("old_pipeline", config)
    old, new, cleaned = (f"file://{out}/{name}" for name in ("OLD", "NEW", "CLEANED"))
    if (out / "CLEANED").exists():
        spark.read.parquet(cleaned).write.mode("overwrite").parquet(old)
    types = ("bigint", "timestamp", "bigint", "bigint", "double", "bigint", "int", "int", "int")
    schema = ", ".join(f"{name} {kind}" for name, kind in zip(FIELDS, types, strict=True))
    spark.conf.set("spark.sql.ansi.enabled", "false")
    rows = spark.read.csv(f"file://{raw}", header=True, schema=schema)
    rows = rows.dropDuplicates(["transaction_id"]).where("tx_datetime IS NOT NULL").fillna({"terminal_id": 0})
    rows = rows.withColumns(
        {"customer_id": F.expr("abs(customer_id)"), "tx_time_days": F.expr("floor(tx_time_seconds / 86400)")}
    )
    rows.write.mode("overwrite").parquet(new)
    everything = spark.read.parquet(new)
    if (out / "OLD").exists():
        everything = spark.read.parquet(old).union(everything)
    everything.write.mode("overwrite").parquet(cleaned)
    spark.stop()
    return {}


def duckdb(raw: Path, out: Path, epoch: date) -> dict[str, int]:
    """The same rules as SQL."""
    import duckdb

    names = [f"c{index}" for index in range(len(FIELDS))]
    columns = ", ".join(f"'{name}': 'VARCHAR'" for name in names)
    start = int((epoch - date(1970, 1, 1)).total_seconds())

    def integer(field: str, kind: str = "BIGINT") -> str:
        return f"CASE WHEN NOT contains({field}, '.') THEN TRY_CAST({field} AS {kind}) END"

    con = duckdb.connect()
    con.execute("SET preserve_insertion_order = false")
    con.execute(
        f"""
        CREATE TABLE parsed AS
        WITH fields AS (
            SELECT hash({", ".join(names)}) AS content, c1,
                {integer("c0")} AS transaction_id,
                CASE WHEN substr(c1, 12) = '24:00:00' THEN epoch(TRY_CAST(substr(c1, 1, 10) AS TIMESTAMP)) + 86400
                     ELSE epoch(TRY_CAST(c1 AS TIMESTAMP)) END::BIGINT AS instant,
                {integer("c2")} AS customer, {integer("c3")} AS terminal,
                CASE WHEN isfinite(TRY_CAST(c4 AS DOUBLE)) THEN TRY_CAST(c4 AS DOUBLE) END AS tx_amount,
                {integer("c5")} AS seconds, {integer("c6")} AS days,
                {integer("c7", "INTEGER")} AS tx_fraud, {integer("c8", "INTEGER")} AS tx_fraud_scenario,
                concat_ws(',', {", ".join(names)}) AS raw_line
            FROM read_csv('{raw}', columns = {{{columns}}}, auto_detect = false, header = false, delim = ',',
                quote = '', escape = '', store_rejects = true, nullstr = '\\N', skip = 1, new_line = '\\n')
        )
        SELECT * EXCLUDE (c1, raw_line, customer, terminal),
            CASE WHEN customer >= 0 THEN customer END AS customer_id,
            CASE WHEN terminal >= 0 THEN terminal END AS terminal_id,
            substr(c1, 12) = '24:00:00' AS hour_24,
            seconds IS DISTINCT FROM instant - {start} AS wrong_seconds,
            days IS DISTINCT FROM (instant - {start}) // 86400 AS wrong_days,
            (transaction_id IS NULL OR tx_amount IS NULL OR tx_fraud IS NULL OR tx_fraud_scenario IS NULL)
                AS malformed_row,
            instant IS NULL AS invalid_datetime,
            coalesce(tx_amount < 0, false) AS invalid_amount,
            coalesce(tx_fraud NOT IN (0, 1), false) AS invalid_label,
            malformed_row OR invalid_datetime OR invalid_amount OR invalid_label AS rejected,
            CASE WHEN rejected THEN raw_line END AS raw_line
        FROM fields
        """
    )
    con.execute(
        """
        CREATE TABLE repeated AS
        SELECT transaction_id, count(*) AS copies, min(content) <> max(content) AS conflict
        FROM parsed WHERE NOT rejected GROUP BY transaction_id HAVING count(*) > 1
        """
    )
    con.execute(
        """
        CREATE VIEW kept AS
        SELECT * FROM parsed ANTI JOIN repeated USING (transaction_id) WHERE NOT rejected
        UNION ALL BY NAME
        SELECT DISTINCT ON (transaction_id) parsed.* FROM parsed JOIN repeated USING (transaction_id)
        WHERE NOT rejected AND NOT conflict
        """
    )
    out.mkdir(parents=True, exist_ok=True)
    con.execute(
        f"""
        COPY (
            SELECT transaction_id, make_timestamp(instant * 1000000) AS tx_datetime, customer_id, terminal_id,
                tx_amount, instant - {start} AS tx_time_seconds,
                ((instant - {start}) // 86400)::INTEGER AS tx_time_days,
                tx_fraud, tx_fraud_scenario
            FROM kept
        ) TO '{out}/clean.parquet' (FORMAT parquet, COMPRESSION zstd)
        """
    )
    con.execute(
        f"""
        COPY (
            SELECT raw_line, [reason for reason in [
                CASE WHEN malformed_row THEN 'malformed_row' END,
                CASE WHEN invalid_datetime THEN 'invalid_datetime' END,
                CASE WHEN invalid_amount THEN 'invalid_amount' END, CASE WHEN invalid_label THEN 'invalid_label' END
            ] if reason is not null] AS reasons
            FROM parsed WHERE rejected
            UNION ALL SELECT csv_line, ['malformed_row'] FROM (SELECT DISTINCT line, csv_line FROM reject_errors)
        ) TO '{out}/rejects.parquet' (FORMAT parquet, COMPRESSION zstd)
        """
    )
    flags = ("hour_24", "wrong_seconds", "wrong_days")
    rejects = ("malformed_row", "invalid_datetime", "invalid_amount", "invalid_label")
    totals = con.execute(
        f"""
        SELECT * FROM
            (SELECT count(*), count(*) FILTER (rejected), {", ".join(f"count(*) FILTER ({name})" for name in rejects)}
             FROM parsed),
            (SELECT count(DISTINCT line) FROM reject_errors),
            (SELECT coalesce(sum(copies) FILTER (conflict), 0), coalesce(sum(copies - 1) FILTER (NOT conflict), 0)
             FROM repeated),
            (SELECT {", ".join(f"count(*) FILTER ({name})" for name in flags)},
                count(*) FILTER (terminal_id IS NULL), count(*) FILTER (customer_id IS NULL), count(*) FROM kept)
        """
    ).fetchone()
    assert totals is not None
    read, rejected, *by_rule, ragged, conflicts, duplicates, hour_24, seconds, days, terminal, customer, kept = totals
    counts = dict(zip(rejects, by_rule, strict=True))
    counts["malformed_row"] += ragged
    return {
        **counts,
        "raw_rows": read + ragged,
        "clean_rows": kept,
        "rejected_rows": rejected + ragged + conflicts,
        "duplicate": duplicates,
        "conflicting_duplicate": conflicts,
        "hour_24": hour_24,
        "wrong_seconds": seconds,
        "wrong_days": days,
        "unknown_terminal": terminal,
        "unknown_customer": customer,
    }


def polars(raw: Path, out: Path, epoch: date) -> dict[str, int]:
    """The same rules as expressions."""
    import polars as pl

    start = int((epoch - date(1970, 1, 1)).total_seconds())
    field = pl.col("f").list.get
    is_24 = pl.col("at_text").str.slice(11) == "24:00:00"
    instants = [
        text.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False).dt.epoch("s") + days * 86400
        for text, days in ((pl.col("at_text"), 0), (pl.col("at_text").str.slice(0, 10) + " 00:00:00", 1))
    ]
    amount = field(4, null_on_oob=True).cast(pl.Float64, strict=False)
    lines = pl.scan_csv(raw, separator="\x01", quote_char=None, has_header=False, new_columns=["line"], skip_rows=1)
    rows = (
        lines.with_columns(f=pl.col("line").str.split(","))
        .with_columns(
            nine=pl.col("f").list.len() == 9,
            at_text=field(1, null_on_oob=True),
            tx_amount=pl.when(amount.is_finite()).then(amount),
            **{
                name: field(index, null_on_oob=True).cast(kind, strict=False)
                for index, name, kind in (
                    (0, "transaction_id", pl.Int64),
                    (2, "customer_id", pl.Int64),
                    (3, "terminal_id", pl.Int64),
                    (5, "seconds", pl.Int64),
                    (6, "days", pl.Int64),
                    (7, "tx_fraud", pl.Int32),
                    (8, "tx_fraud_scenario", pl.Int32),
                )
            },
        )
        .with_columns(hour_24=is_24.fill_null(False), at=pl.when(is_24).then(instants[1]).otherwise(instants[0]))
        .with_columns(
            tx_time_seconds=pl.col("at") - start,
            tx_time_days=((pl.col("at") - start) // 86400).cast(pl.Int32),
            customer_id=pl.when(pl.col("customer_id") >= 0).then("customer_id"),
            terminal_id=pl.when(pl.col("terminal_id") >= 0).then("terminal_id"),
            malformed_row=~pl.col("nine")
            | pl.any_horizontal(pl.col("transaction_id", "tx_amount", "tx_fraud", "tx_fraud_scenario").is_null()),
            invalid_datetime=pl.col("nine") & pl.col("at").is_null(),
            invalid_amount=pl.col("nine") & (pl.col("tx_amount") < 0).fill_null(False),
            invalid_label=pl.col("nine") & (~pl.col("tx_fraud").is_in([0, 1])).fill_null(False),
        )
        .with_columns(
            wrong_seconds=pl.col("seconds").ne_missing(pl.col("tx_time_seconds")),
            wrong_days=pl.col("days").ne_missing(pl.col("tx_time_days")),
            rejected=pl.any_horizontal("malformed_row", "invalid_datetime", "invalid_amount", "invalid_label"),
            content=pl.col("line").hash(),
        )
        .drop("f", "at_text", "seconds", "days", "nine")
        .with_columns(line=pl.when("rejected").then("line"))
        .collect(engine="streaming")
    )
    rules = ("malformed_row", "invalid_datetime", "invalid_amount", "invalid_label")
    good = rows.lazy().filter(~pl.col("rejected"))
    repeated = (
        good.group_by("transaction_id")
        .agg(copies=pl.len(), conflict=pl.col("content").min() != pl.col("content").max())
        .filter(pl.col("copies") > 1)
        .collect(engine="streaming")
    )
    single = good.join(repeated.lazy(), on="transaction_id", how="anti")
    twice = good.join(repeated.lazy().filter(~pl.col("conflict")), on="transaction_id", how="semi")
    kept = pl.concat([single, twice.unique("transaction_id")])
    kept = kept.with_columns(tx_datetime=pl.from_epoch("at", time_unit="s").cast(pl.Datetime("us"))).collect()
    out.mkdir(parents=True, exist_ok=True)
    kept.select(FIELDS).write_parquet(out / "clean.parquet", compression="zstd")
    rejected = rows.filter("rejected")
    reasons = pl.concat_list([pl.when(rule).then(pl.lit(rule)) for rule in rules]).list.drop_nulls()
    rejected.select(raw_line="line", reasons=reasons).write_parquet(out / "rejects.parquet", compression="zstd")
    conflicts = repeated.filter("conflict")["copies"].sum()
    return {
        "raw_rows": len(rows),
        "clean_rows": len(kept),
        "rejected_rows": len(rejected) + conflicts,
        "duplicate": (repeated.filter(~pl.col("conflict"))["copies"] - 1).sum(),
        "conflicting_duplicate": conflicts,
        **{rule: rejected[rule].sum() for rule in rules},
        **{flag: kept[flag].sum() for flag in ("hour_24", "wrong_seconds", "wrong_days")},
        "unknown_terminal": kept["terminal_id"].null_count(),
        "unknown_customer": kept["customer_id"].null_count(),
    }


CLEANERS = {cleaner.__name__: cleaner for cleaner in (platform, warm_job, old_pipeline, duckdb, polars)}


def main() -> None:
    """Clean one file and print what the cleaner returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cleaner", choices=CLEANERS)
    parser.add_argument("raw", type=Path, help="raw file")
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--epoch", type=date.fromisoformat, required=True, help="first day of the data set")
    arguments = parser.parse_args()
    if arguments.cleaner != "old_pipeline":
        shutil.rmtree(arguments.out, ignore_errors=True)
    counts: dict[str, Any] = CLEANERS[arguments.cleaner](arguments.raw, arguments.out, arguments.epoch)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
