"""The cleaning job: every rule, whole files, and any line of bytes."""

from __future__ import annotations

import bz2
import gzip
import json
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spark_jobs import clean_transactions, runtime
from spark_jobs.cleaning import bulk, duplicates, raw_text, rejects
from spark_jobs.cleaning.plain_lines import PADDING, Parser
from spark_jobs.cleaning.rules import HEADER_BIT, header_line
from spark_jobs.io import parquet_files
from spark_jobs.schema import CLEANED_COLUMNS, FIX_RULES, REJECT_RULES, SCHEMA_VERSION

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

EPOCH = "2019-08-22"
EPOCH_S = 1566432000
GOOD = "5,2019-08-22 06:51:03,17,711,70.91,24663,0,0,0"
# The misspelt first name is part of the format.
HEADER_LINE = (
    "# tranaction_id | tx_datetime | customer_id | terminal_id | tx_amount | tx_time_seconds | tx_time_days"
    " | tx_fraud | tx_fraud_scenario"
)
HEADER = f"{HEADER_LINE}\n".encode()
FIELDS = HEADER_LINE[2:].replace("tranaction", "transaction").split(" | ")


def good(**changes: str) -> str:
    """A good line with some fields changed."""
    return ",".join({**dict(zip(FIELDS, GOOD.split(","))), **changes}.values())


class Cleaner:
    """Cleans files made of lines, in a directory of its own."""

    def __init__(self, spark: SparkSession, directory: Path) -> None:
        self.spark = spark
        self.directory = directory

    def item(self, key: str, content: bytes, suffix: str = ".txt") -> dict[str, Any]:
        path = self.directory / f"{key}{suffix}"
        path.write_bytes(content)
        return {
            "partition": key,
            "raw": {"uri": f"file://{path}", "size": len(content), "fingerprint": f"print of {key}"},
            "output_uri": f"file://{self.directory}/cleaned/raw_file={key}",
            "rejected_uri": f"file://{self.directory}/rejected/raw_file={key}",
        }

    def run(self, *items: dict[str, Any], **request: Any) -> dict[str, Any]:
        request = {"run_id": "run", "epoch": EPOCH, "partitions": list(items), **request}
        return clean_transactions.run(self.spark, request)["partitions"]

    def clean(self, content: bytes) -> tuple[dict[str, int], list[dict[str, Any]], list[dict[str, Any]]]:
        """Counts of the report, clean rows in order of id, rejects in order of line."""
        verdict = self.run(self.item("file", content))["file"]
        assert verdict["status"] == "succeeded", verdict
        return verdict["report"]["counts"], self.rows(), self.rejects()

    def clean_lines(self, *lines: str) -> tuple[dict[str, int], list[dict[str, Any]], list[dict[str, Any]]]:
        return self.clean("".join(f"{line}\n" for line in (HEADER_LINE, *lines)).encode())

    def rows(self) -> list[dict[str, Any]]:
        types = [(name, parquet_files.arrow_type(kind)) for name, kind, _ in CLEANED_COLUMNS]
        return sorted(self.table("cleaned", "file", types), key=lambda row: row["transaction_id"])

    def rejects(self) -> list[dict[str, Any]]:
        return sorted(self.table("rejected", "file"), key=lambda row: row["raw_line"])

    def table(self, name: str, key: str, types: Any = None) -> list[dict[str, Any]]:
        """The rows of a partition, without the jobs of Spark's reader, which test_parquet_files covers."""
        from pyarrow import parquet

        rows: list[dict[str, Any]] = []
        for path in (self.directory / name / f"raw_file={key}").glob("*.parquet"):
            found = parquet.ParquetFile(str(path)).read()
            assert types in (None, [*zip(found.schema.names, found.schema.types)])
            rows += [dict(zip(found.schema.names, values)) for values in zip(*found.to_pydict().values())]
        return rows


@pytest.fixture
def cleaner(spark: SparkSession, tmp_path: Path) -> Cleaner:
    return Cleaner(spark, tmp_path)


@pytest.fixture(params=["collected", "read again"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the rejected lines: few are written by the driver, many by Spark."""
    if request.param == "read again":
        monkeypatch.setattr(rejects, "collected_rejects", lambda *_: None)


def malformed(field: str, **values: str) -> list[tuple[str, str, str]]:
    """Lines that are malformed for the values of a field, named by their reasons."""
    return [("malformed_row", good(**{field: value}), reason) for reason, value in values.items()]


REJECTED = [
    ("malformed_row", "5,2019-08-22 06:51:03,17,711,70.91,24663,0,0", "eight fields"),
    ("malformed_row", GOOD + ",1", "ten fields"),
    ("malformed_row", "x" * 5000, "longer than any row"),
    ("malformed_row", "," * 5000, "longer than any row, of separators"),
    ("malformed_row", "garbage", "no separator"),
    ("malformed_row", "   ", "blanks are a line"),
    ("malformed_row invalid_datetime", ",,,,,,,,", "nine empty fields"),
    ("malformed_row", "naïve", "a letter of two bytes"),
    *malformed("transaction_id", empty="", text="x5", decimal_point="5.0", beyond_64_bits="9223372036854775808"),
    *malformed("tx_amount", empty="", text="abc", NaN="NaN", nan="nan", infinity="Infinity", minus_infinity="-inf"),
    *malformed("tx_amount", overflow="1e999", java_double="7.5d", java_float="7.5f", hexadecimal="0x1p3", two="1 2"),
    *malformed("tx_fraud", empty="", text="yes"),
    *malformed("tx_fraud_scenario", text="x", beyond_32_bits="3000000000"),
    ("invalid_datetime", good(tx_datetime=""), "empty"),
    ("invalid_datetime", good(tx_datetime="2019-13-45 10:00:00"), "no such month"),
    ("invalid_datetime", good(tx_datetime="2019-02-30 10:00:00"), "no such day"),
    ("invalid_datetime", good(tx_datetime="2019-08-22 24:00:01"), "past the last instant of a day"),
    ("invalid_datetime", good(tx_datetime="2019-02-30 24:00:00"), "24:00:00 of no day"),
    ("invalid_datetime", good(tx_datetime="2019-08-22"), "a date without a time"),
    ("invalid_datetime", good(tx_datetime="2019-08-22 06:51:03Z"), "a time zone"),
    ("invalid_datetime", good(tx_datetime="2019-08-22 06:60:03"), "no such minute"),
    ("invalid_datetime", good(tx_datetime="0000-08-22 06:51:03"), "no such year"),
    ("invalid_datetime", good(tx_datetime="9999-12-31 24:00:00"), "beyond the last year"),
    ("invalid_amount", good(tx_amount="-0.01"), "below 0"),
    ("invalid_label", good(tx_fraud="2"), "neither 0 nor 1"),
    ("invalid_label", good(tx_fraud="-1"), "neither 0 nor 1"),
    ("invalid_amount invalid_label", good(tx_amount="-1", tx_fraud="3"), "one row with two reasons"),
]


@pytest.mark.images
@pytest.mark.usefixtures("either_way")
def test_each_rejected_line_has_its_reasons_and_is_kept_as_it_stands(cleaner: Cleaner) -> None:
    lines = [(line.encode(), line, rules.split()) for rules, line, _ in REJECTED]
    # What is not UTF-8 is kept byte by byte.
    lines += [(line, line.decode("latin-1"), ["malformed_row"]) for line in (b"na\xefve", b"\xff\xfe\x00")]
    counts, rows, rejected = cleaner.clean(b"\n".join([HEADER + GOOD.encode(), *[line for line, _, _ in lines], b""]))
    assert [row["transaction_id"] for row in rows] == [5]
    expected = sorted((text, reasons) for _, text, reasons in lines)
    assert [(reject["raw_line"], reject["reasons"]) for reject in rejected] == expected
    by_rule = Counter(reason for *_, reasons in lines for reason in reasons)  # out_of_range has a limit
    assert {rule: counts[rule] for rule in REJECT_RULES} == {rule: by_rule[rule] for rule in REJECT_RULES}
    assert (counts["raw_rows"], counts["rejected_rows"]) == (len(lines) + 1, len(lines))


#: Changed fields, expected values, rules that count the row.
KEPT: list[tuple[dict[str, str], dict[str, Any], list[str]]] = [
    ({}, {"tx_amount": 70.91, "tx_time_seconds": 24663, "tx_time_days": 0}, []),
    ({"customer_id": "0", "terminal_id": "0"}, {"customer_id": 0, "terminal_id": 0}, []),
    ({"tx_amount": "0"}, {"tx_amount": 0.0}, []),
    ({"tx_amount": "1e3"}, {"tx_amount": 1000.0}, []),
    ({"tx_amount": " 7.50 "}, {"tx_amount": 7.5}, []),
    ({"tx_fraud": "1", "tx_fraud_scenario": "2"}, {"tx_fraud": 1, "tx_fraud_scenario": 2}, []),
    (
        {"tx_datetime": "2019-08-22 24:00:00", "tx_time_seconds": "86400"},
        {"tx_time_seconds": 86400, "tx_time_days": 1},
        ["hour_24", "wrong_days"],
    ),
    (
        {"tx_datetime": "2019-12-31 24:00:00", "tx_time_seconds": "11404800", "tx_time_days": "131"},
        {"tx_time_seconds": 11404800, "tx_time_days": 132},
        ["hour_24", "wrong_days"],
    ),
    ({"tx_time_seconds": "7"}, {"tx_time_seconds": 24663}, ["wrong_seconds"]),
    ({"tx_time_seconds": ""}, {"tx_time_seconds": 24663}, ["wrong_seconds"]),
    ({"tx_time_days": "1"}, {"tx_time_days": 0}, ["wrong_days"]),
    (
        {"tx_datetime": "2019-08-21 23:59:59", "tx_time_seconds": "-1", "tx_time_days": "-1"},
        {"tx_time_seconds": -1, "tx_time_days": -1},
        [],
    ),
    ({"terminal_id": "89518096"}, {"terminal_id": 89518096}, []),
    *[
        ({"terminal_id": raw}, {"terminal_id": None}, ["unknown_terminal"])
        for raw in ("", "Err", "7.5", "-1", "-7.0", "9.9E5")
    ],
    *[({"customer_id": raw}, {"customer_id": None}, ["unknown_customer"]) for raw in ("", "c7", "-999999")],
    *[({"terminal_id": raw}, {"terminal_id": 711}, ["respelled_id"]) for raw in ("711.0", "7.11E2", "\u00a0711\u2003")],
    ({"customer_id": "711.", "terminal_id": "7.110e+02"}, {"customer_id": 711, "terminal_id": 711}, ["respelled_id"]),
    ({"customer_id": "+0711 "}, {"customer_id": 711}, []),
    ({"transaction_id": "-8"}, {"transaction_id": -8}, []),
]


def test_faults_are_corrected_from_the_datetime_and_counted(cleaner: Cleaner) -> None:
    lines = [good(**{"transaction_id": str(number), **changes}) for number, (changes, *_) in enumerate(KEPT)]
    counts, rows, rejected = cleaner.clean_lines(*lines)
    assert rejected == []
    by_id = {row["transaction_id"]: row for row in rows}
    for number, (changes, expected, _) in enumerate(KEPT):
        row = by_id[int(changes.get("transaction_id", number))]
        assert {name: row[name] for name in expected} == expected, lines[number]
        assert row["tx_datetime"].timestamp() == EPOCH_S + row["tx_time_seconds"]
    by_rule = Counter(rule for *_, rules in KEPT for rule in rules)
    assert {rule: counts[rule] for rule in FIX_RULES} == {rule: by_rule[rule] for rule in FIX_RULES}
    assert counts["clean_rows"] == counts["raw_rows"] == len(KEPT)


@pytest.mark.images
def test_the_report_has_years_in_four_digits(cleaner: Cleaner) -> None:
    lines = [good(transaction_id=year, tx_datetime=f"{year}-12-31 00:00:00") for year in ("0001", "0999")]
    report = cleaner.run(cleaner.item("file", "\n".join(lines).encode()))["file"]["report"]
    first, last = "0001-12-31T00:00:00Z", "0999-12-31T00:00:00Z"
    assert report["tx_datetime"] == {"min": first, "max": last, "p0_1": first, "p99_9": last}


def test_copies_are_kept_once_and_conflicting_rows_not_at_all(cleaner: Cleaner) -> None:
    """Copies may differ in their line ends; a row that is rejected anyway conflicts with no other."""
    conflict = [good(transaction_id="7", tx_amount="1"), good(transaction_id="7", tx_amount="2")]
    alone = [good(transaction_id="8"), *[good(transaction_id="8", tx_amount="-1")] * 2]
    copies = [GOOD, f"{GOOD}\r", f"{GOOD}\r\r"]
    counts, rows, rejected = cleaner.clean_lines(*copies, *conflict, conflict[0], *alone)
    assert [(row["transaction_id"], row["tx_amount"]) for row in rows] == [(5, 70.91), (8, 70.91)]
    assert (counts["duplicate_rows"], counts["conflicting_duplicate"], counts["rejected_rows"]) == (2, 3, 5)
    assert [reject["raw_line"] for reject in rejected] == sorted([*conflict, conflict[0], *alone[1:]])


@pytest.mark.images
def test_many_batches_some_without_a_row_of_a_kind(cleaner: Cleaner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtime.SESSION_SETTINGS, "spark.sql.execution.arrow.maxRecordsPerBatch", "3")
    bad = (0, 7, 8, 39)
    lines = ["" if n % 10 < 4 else good(transaction_id="x" if n in bad else str(n)) for n in range(40)]
    lines += [good(transaction_id="x") for n in bad if not lines[n]]
    try:
        counts, rows, rejected = cleaner.clean_lines(*lines)
    finally:
        monkeypatch.undo()
        runtime.configure(cleaner.spark)
    assert (counts["raw_rows"], counts["rejected_rows"]) == (24 + sum(n % 10 < 4 for n in bad), len(bad))
    assert (len(rows), len(rejected)) == (counts["clean_rows"], counts["rejected_rows"])


def test_a_file_of_only_rejects_is_not_shuffled() -> None:
    data = np.frombuffer(bytes(PADDING) + b"x" * 1000 + bytes(PADDING), dtype="u1")
    parsed = Parser(None, 0).parse(data, np.arange(PADDING, PADDING + 1001))
    rows = duplicates.collapse_rejects(parsed)
    assert {name: rows[name].tolist() for name in ("rejected", "rows")} == {"rejected": [1], "rows": [1000]}


@pytest.mark.parametrize("largest_customer", [9, 2**62], ids=["one number to sort by", "three"])
def test_rows_are_sorted_by_day_customer_and_instant(largest_customer: int) -> None:
    """So that row groups hold their own days and customers."""
    random = np.random.RandomState(1)
    columns: dict[str, Any] = {name: random.randint(0, 2, 1000) for name, _ in duplicates.LAYOUT}
    columns["transaction_id"] = np.arange(1000)
    columns["customer_id"] = random.choice([-1, 0, 5, largest_customer], 1000)
    columns["tx_unix_seconds"] = EPOCH_S + random.randint(-3 * 86400, 3 * 86400, 1000) // 900 * 900
    ordered = duplicates.sort_rows(columns, EPOCH_S)
    names = ("tx_time_days", "customer_id", "tx_time_seconds", "transaction_id")
    keys = list(zip(*(ordered[name].tolist() for name in names)))
    assert keys == sorted(keys)
    assert set(ordered["transaction_id"]) == set(range(1000))
    rows = ordered["transaction_id"]
    assert (ordered["tx_datetime"] == columns["tx_unix_seconds"][rows]).all()
    assert (ordered["tx_time_days"] == ordered["tx_time_seconds"] // 86400).all()


@pytest.mark.parametrize(
    ("ids", "even"),
    [
        (range(60_000), True),
        (range(10**12, 10**12 + 60_000), True),
        (range(0, 90_000, 2), True),
        (range(60_000, 0, -1), False),
        ([0, 10**17] * 30_000, False),
        ([], False),
    ],
    ids=["from 0 on", "long ids", "every second one", "backwards", "alternating", "none"],
)
def test_ids_are_spread_evenly_where_they_grow(ids: Any, even: bool) -> None:
    content = "\n".join(good(transaction_id=str(number)) for number in ids).encode() or b"?"
    size = raw_text.END_BYTES
    ranges = duplicates.IdRanges(content[:size], content[-size:], len(content), 6)
    rows = np.bincount(ranges.partition(np.array(ids, dtype="i8")), minlength=6)
    assert (len(rows), rows.sum()) == (6, len(ids))
    if even:
        assert max(rows) - min(rows) <= 6


#: Content, clean rows, rejected rows, whether it has a header, description: what depends on how Spark reads lines.
FILES = [
    (b"", 0, 0, False, "0 bytes"),
    (b"\n\r\n\n", 0, 0, False, "empty lines alone"),
    (HEADER.rstrip(), 0, 0, True, "a header without a line end"),
    (GOOD.encode(), 1, 0, False, "no header, no last newline"),
    (f"\r\n{HEADER_LINE}\r\n{GOOD}\r\n\r\n".encode(), 1, 0, True, "Windows line ends and empty lines"),
    (b"\xef\xbb\xbf" + HEADER + GOOD.encode(), 1, 0, True, "a byte order mark before a header"),
    (b"\xef\xbb\xbf" + GOOD.encode(), 1, 0, False, "a byte order mark before a row"),
    (HEADER + GOOD.encode() + b"\n" + HEADER * 2, 1, 2, True, "the header again further down"),
    (HEADER + f"{GOOD[:9]}\r{GOOD[9:]}".encode(), 0, 1, True, "a carriage return does not end a line"),
    (b"?\n" + b"x" * 5000 + b"\n" + GOOD.encode(), 1, 1, True, "a short header and a line longer than any row"),
    (b"#" * 5000 + b"\n" + GOOD.encode(), 1, 1, False, "a first line longer than any row is not a header"),
    (f"{GOOD}\n".encode() + b"7," * 5_000_000, 1, 1, False, "a line of 10 MB, read in two parts"),
]

#: The same of files whose first lines alone differ.
FIRST_LINES = [
    (HEADER, 0, 0, True, "a header alone"),
    (f"id,when\n{GOOD}".encode(), 1, 0, True, "another header"),
    (f"#{GOOD}\n{GOOD}".encode(), 1, 0, True, "a header by its first character"),
    (f"1.5{GOOD}\n{GOOD}".encode(), 1, 1, False, "a broken first row is a row, not a header"),
    (b"\x00\xff\xfe\n\x80\x81,\x00\n", 0, 2, False, "binary content"),
    (good(transaction_id="").encode(), 0, 1, False, "a first row without an id"),
    (good(transaction_id="?", tx_datetime="2019-02-30 06:51:03").encode(), 0, 1, False, "a first row of no date"),
    (good(transaction_id="?", tx_datetime="").encode(), 0, 1, False, "a first row with nothing but an amount"),
    (f"a,b\r{GOOD}\n{GOOD}".encode(), 1, 1, False, "a carriage return within the first line"),
    (HEADER + b"caf\xc3\xa9\ncaf\xe9\n", 0, 2, True, "text in two encodings"),
]


@pytest.mark.images
def test_whole_files(cleaner: Cleaner) -> None:
    # Each by itself: they have the same id, which would be compared.
    verdicts = {}
    for number, case in enumerate(FILES):
        verdicts.update(cleaner.run(cleaner.item(str(number), case[0])))
    for number, (_, clean_rows, rejected_rows, has_header, description) in enumerate(FILES):
        report = verdicts[str(number)]["report"]
        counts = report["counts"]
        assert (counts["clean_rows"], counts["rejected_rows"], report["header"]) == (
            clean_rows,
            rejected_rows,
            has_header,
        ), description
        assert counts["raw_rows"] == clean_rows + rejected_rows
        assert report["schema_version"] == SCHEMA_VERSION
        assert [len(cleaner.table(name, str(number))) for name in ("cleaned", "rejected")] == [
            clean_rows,
            rejected_rows,
        ]
        directory = cleaner.directory / f"cleaned/raw_file={number}"
        assert list(directory.glob("*.parquet")), description
        assert json.loads((directory / "_report.json").read_text()) == report


@pytest.mark.parametrize(
    ("content", "clean_rows", "rejected_rows", "has_header"),
    [case[:4] for case in FIRST_LINES],
    ids=[case[4] for case in FIRST_LINES],
)
def test_first_lines(content: bytes, clean_rows: int, rejected_rows: int, has_header: bool) -> None:
    lines = content.split(b"\n")
    header = header_line(content)
    data = np.frombuffer(bytes(PADDING) + b"".join(lines) + bytes(PADDING), dtype="u1")
    rows = Parser(header, EPOCH_S).parse(data, np.cumsum([PADDING, *map(len, lines)]))
    rejected = (rows["rejected"] > 0) & (rows["rejected"] != HEADER_BIT)
    assert (header is not None, rejected.sum()) == (has_header, rejected_rows)
    assert (rows["rejected"] == 0).sum() == clean_rows


def test_an_empty_file_leaves_no_tiny_partition_size_to_the_next_reader(cleaner: Cleaner, spark: SparkSession) -> None:
    """The session goes on: the next table, of 13 MB, was once read in 13 million parts."""
    cleaner.clean(b"")
    assert int(spark.conf.get("spark.sql.files.maxPartitionBytes") or 0) >= 4 << 20
    runtime.configure(spark)
    assert spark.conf.get("spark.sql.files.maxPartitionBytes") == str(128 << 20)


@pytest.mark.images
def test_a_broken_file_does_not_affect_the_others(cleaner: Cleaner) -> None:
    items = [cleaner.item(key, HEADER + GOOD.encode()) for key in ("gone", "grown", "good")]
    (cleaner.directory / "gone.txt").unlink()
    (cleaner.directory / "grown.txt").write_bytes(HEADER + GOOD.encode() + b"\n6")
    verdicts = cleaner.run(*items)
    statuses = {key: verdict["status"] for key, verdict in verdicts.items()}
    assert statuses == {"gone": "failed", "grown": "failed", "good": "succeeded"}
    assert "gone.txt" in verdicts["gone"]["error"]
    assert "changing" in verdicts["grown"]["error"]
    assert not (cleaner.directory / "cleaned/raw_file=grown/_report.json").exists()


def test_a_file_cleaned_again_loses_its_report_first_and_its_old_rejects(
    cleaner: Cleaner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaner.clean(HEADER + GOOD.encode() + b"\ngarbage")
    assert cleaner.rejects()
    report = cleaner.directory / "cleaned/raw_file=file/_report.json"

    def fail(*_: Any) -> None:
        raise RuntimeError("the job dies while it works")

    with monkeypatch.context() as patch:
        patch.setattr(clean_transactions, "cleaned_files", fail)
        verdict = cleaner.run(cleaner.item("file", HEADER + GOOD.encode()))["file"]
    assert verdict["status"] == "failed"
    assert not report.exists()

    counts, _, rejected = cleaner.clean(HEADER + GOOD.encode())
    assert (counts["rejected_rows"], rejected) == (0, [])
    assert report.exists()


@pytest.mark.images
def test_a_file_that_no_row_can_be_read_from_is_refused(cleaner: Cleaner) -> None:
    rows = "\n".join(good(transaction_id=str(number)) for number in range(1000)).encode()
    verdicts = cleaner.run(
        cleaner.item("cr", rows.replace(b"\n", b"\r")),
        cleaner.item("text", rows, ".txt.gz"),
        cleaner.item("cut", gzip.compress(rows)[:-100], ".txt.gz"),
        cleaner.item("cut bz2", bz2.compress(rows)[:-100], ".txt.bz2"),
        cleaner.item("mixed", b"\r" + b"\n".join([rows, rows.replace(b"\n", b"\r")])),
    )
    assert {key: verdict["status"] for key, verdict in verdicts.items()} == {
        **dict.fromkeys(("cr", "text", "cut", "cut bz2"), "refused"),
        "mixed": "succeeded",
    }
    assert "CR alone" in verdicts["cr"]["error"]
    assert all("cannot be decompressed" in verdicts[key]["error"] for key in ("text", "cut", "cut bz2"))
    assert verdicts["mixed"]["report"]["counts"]["rejected_rows"] == 1


def test_an_error_of_the_storage_does_not_refuse_a_compressed_file(
    cleaner: Cleaner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stack of Java's errors names bzip2's classes, whatever went wrong."""
    item = cleaner.item("file", bz2.compress(GOOD.encode()) + bz2.compress(f"\n{GOOD}".encode()), ".txt.bz2")
    message = "SocketTimeoutException at org.apache.hadoop.io.compress.bzip2.CBZip2InputStream"
    monkeypatch.setattr(clean_transactions, "cleaned_files", mock.Mock(side_effect=RuntimeError(message)))
    (verdict,) = cleaner.run(item).values()
    assert verdict["status"] == "failed"


@pytest.mark.images
def test_compressed_files_are_cleaned_as_text(cleaner: Cleaner) -> None:
    rows = [good(transaction_id=str(number), tx_amount=str(number % 977)) for number in range(5000)]
    content = HEADER + "\n".join([*rows, "garbage", ""]).encode()
    plain = cleaner.run(cleaner.item("plain", content))["plain"]["report"]
    for suffix, compressed in ((".gz", gzip.compress(content)), (".bz2", bz2.compress(content))):
        report = cleaner.run(cleaner.item("file", compressed, f".txt{suffix}"))["file"]["report"]
        assert report["counts"] == plain["counts"]
        assert (plain["text_bytes"], report["text_bytes"]) == (len(content), len(content))
        assert report["raw"]["size"] < len(content) / 5
        assert len(cleaner.rows()) == 5000


def spread(days: list[int], ids: list[int]) -> bulk.Bulk | None:
    """The bulk of rows on some days and with some ids, as three tasks find it."""
    seconds, numbers = np.array(days, dtype="i8") * 86400 + 5, np.array(ids, dtype="i8")
    parts = []
    for task in range(3):
        own = np.flatnonzero(np.arange(len(ids)) % 3 == task)
        own = own[np.argsort(numbers[own], kind="stable")]
        parts.append(bulk.tails(numbers[own], seconds[own], bulk.tail_length(bulk.SHORTEST_ROW * len(ids))))
    return bulk.bulk_of([part for part in parts if part is not None], len(ids))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1000, 4000),
    odd=st.lists(st.tuples(st.integers(-700_000, 2_900_000), st.integers(-(2**62), 2**62)), max_size=4),
    seed=st.integers(0, 99),
)
def test_one_row_in_a_thousand_does_not_move_the_bulk(rows: int, odd: list[tuple[int, int]], seed: int) -> None:
    odd = odd[: rows // 1000]
    days = sorted(np.random.RandomState(seed).randint(18000, 18030, rows - len(odd)).tolist())
    ids = list(range(7, 7 + rows - len(odd)))
    found = spread([*days, *(day for day, _ in odd)], [*ids, *(number for _, number in odd)])
    assert found is not None
    assert days[0] <= found.days[0] <= found.days[1] <= days[-1]
    assert ids[0] <= found.ids[0] <= found.ids[1] <= ids[-1]
    in_order = np.sort([*days, *(day for day, _ in odd)])
    assert found.days == (in_order[rows // 1000], in_order[-1 - rows // 1000])
    in_order = np.sort([*ids, *(number for _, number in odd)])
    assert found.ids == (in_order[rows // 1000], in_order[-1 - rows // 1000])
    every = [*zip(days, ids), *odd]
    width = found.usual_days[1] - found.usual_days[0] + 1
    far = [row for row in every if not found.usual_days[0] - width <= row[0] <= found.usual_days[1] + width]
    assert found.odd == len(far)
    assert len(found.examples) == min(3, len(set(far)))
    assert found.rows_per_day == Counter(day for day, _ in every)


@pytest.mark.images
def test_rows_far_from_the_bulk_are_named_and_rejected_where_that_is_wanted(cleaner: Cleaner) -> None:
    rows = [good(transaction_id=str(number)) for number in range(5000)]
    odd = [good(transaction_id="5000", tx_datetime="2099-01-01 00:00:00"), good(transaction_id="700000000")]
    content = HEADER + "\n".join([*rows, *odd]).encode()
    report = cleaner.run(cleaner.item("file", content))["file"]["report"]
    assert report["odd_rows"] == {
        "rows": 1,
        "usual_days": ["2019-08-22T00:00:00Z"] * 2,
        "examples": [{"transaction_id": 5000, "tx_datetime": "2099-01-01T00:00:00Z"}],
    }
    assert report["transaction_id"] == {"min": 0, "max": 700000000, "p0_1": 5, "p99_9": 4996}
    assert report["counts"]["clean_rows"] == 5002
    report = cleaner.run(cleaner.item("file", content), out_of_range=1)["file"]["report"]
    counts = report["counts"]
    assert (counts["clean_rows"], counts["out_of_range"], counts["rejected_rows"]) == (5000, 2, 2)
    assert [(row["raw_line"], row["reasons"]) for row in cleaner.rejects()] == [
        (line, ["out_of_range"]) for line in odd
    ]
    assert report["transaction_id"]["max"] == 4999
    assert report["out_of_range"] == 1


@pytest.mark.images
def test_ids_are_compared_where_the_bulks_of_two_files_overlap(spark: SparkSession, tmp_path: Path) -> None:
    directory = tmp_path / "raw_file=above"  # like the lake's own directories
    directory.mkdir()
    cleaner = Cleaner(spark, directory)

    def file(*ids: int) -> bytes:
        return "\n".join(good(transaction_id=str(number)) for number in ids).encode()

    verdicts = cleaner.run(
        cleaner.item("even", file(*range(0, 100, 2))),
        cleaner.item("odd", file(*range(1, 100, 2))),
        cleaner.item("apart", file(*range(1000, 1100))),
        cleaner.item("both", file(*range(90, 110))),
    )
    shared = {key: verdict["report"]["shared_ids"] for key, verdict in verdicts.items()}
    assert shared["even"] == shared["apart"] == {}
    version = f"{SCHEMA_VERSION}/{EPOCH}/print of even"
    assert shared["odd"] == {"even": {"version": version, "rows": 0, "examples": []}}
    assert {key: (found["rows"], found["examples"]) for key, found in shared["both"].items()} == {
        "even": (5, [90, 92, 94]),
        "odd": (5, []),
    }
    assert verdicts["odd"]["report"]["accepted"] is False
    report = verdicts["odd"]["report"]
    neighbour = {"version": "old", "uri": cleaner.item("odd", b"")["output_uri"], **report}
    gone = {**neighbour, "uri": f"file://{cleaner.directory}/gone"}
    (verdict,) = cleaner.run(cleaner.item("late", file(97, 99)), neighbours={"odd": neighbour, "gone": gone}).values()
    assert verdict["report"]["shared_ids"] == {
        "odd": {"version": "old", "rows": 2, "examples": [97, 99]},
        "gone": {"version": "old", "rows": None, "examples": []},
    }


CELL = st.one_of(
    st.sampled_from([*GOOD.split(","), "", "id", "#", "2019-99-99 99:99:99", "\x00", "7\r"]), st.text(max_size=9)
)


@settings(max_examples=300, deadline=None)
@given(st.lists(CELL, min_size=1, max_size=10))
def test_only_a_line_that_cannot_be_data_is_a_header(cells: list[str]) -> None:
    line = ",".join(cells).replace("\n", "").encode().rstrip(b"\r")
    cells = [cell.strip() for cell in line.decode().split(",")] + [""] * 9
    header = header_line(line + b"\r\n" + GOOD.encode())
    is_data = (
        re.fullmatch(r"[0-9]+", cells[0])
        or cells[1] in ("2019-08-22 06:51:03", "2019-99-99 99:99:99")
        or re.fullmatch(r"[0-9]+\.?[0-9]*", cells[4])
    )
    if line and (b"\0" in line or b"\r" in line):
        assert header is None
    elif line.startswith(b"#"):
        assert header == line
    elif line and is_data:
        assert header is None
    elif line and not re.search(r"[0-9]", line.decode()):
        assert header == line


@pytest.mark.images
def test_paths_are_names_not_patterns(spark: SparkSession, tmp_path: Path) -> None:
    directory = tmp_path / "a b [1] {x} #%20 *"
    directory.mkdir()
    counts, _, rejected = Cleaner(spark, directory).clean(HEADER + GOOD.encode() + b"\ngarbage")
    assert (counts["clean_rows"], len(rejected)) == (1, 1)
    assert len(list((directory / "cleaned/raw_file=file").glob("*.parquet"))) >= 1


FIELD = st.one_of(
    st.sampled_from(GOOD.split(",")),
    st.sampled_from(["", "Err", "-999999", "-1", "2", "1e3", "NaN", "24:00:00", "2019-08-22 24:00:00", "7.5d", " 5 "]),
    st.text(max_size=8).filter(lambda text: "\n" not in text),
).map(str.encode)
LINE = st.one_of(
    st.lists(FIELD, min_size=8, max_size=10).map(b",".join),
    st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")),
    st.just(GOOD.encode()),
)


# Few examples of many lines, because each is a job of Spark.
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINE, min_size=40, max_size=100))
def test_any_lines_of_bytes_add_up(cleaner: Cleaner, lines: list[bytes]) -> None:
    """Below a header, every line that is not empty is clean, a duplicate or rejected, and nothing else."""
    counts, rows, rejected = cleaner.clean(HEADER + b"\n".join(lines))
    lines = [line for line in lines if line.rstrip(b"\r")]
    assert counts["raw_rows"] == len(lines)
    assert counts["raw_rows"] == counts["clean_rows"] + counts["duplicate_rows"] + counts["rejected_rows"]
    assert (len(rows), len(rejected)) == (counts["clean_rows"], counts["rejected_rows"])
    assert counts["rejected_rows"] >= sum(line.count(b",") != 8 for line in lines)
    assert all(reject["reasons"] and set(reject["reasons"]) <= set(REJECT_RULES) for reject in rejected)
    assert len({row["transaction_id"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("bad", "scans"),
    [([], 1), (["garbage", "naïve", good(tx_amount="-1") + "\r"], 1), (["0"], 3), (["garbage " * 20] * 2000, 3)],
    ids=["none", "few", "one that may stand for a long one", "many"],
)
def test_counting_and_a_few_rejects_cost_no_second_scan(
    cleaner: Cleaner, spark: SparkSession, bad: list[str], scans: int
) -> None:
    """By the raw bytes that Spark reads."""
    lines = [good(transaction_id=str(n)) for n in range(50_000)] + bad
    content = HEADER + "\n".join(lines).encode("latin-1")
    statistics = spark._jvm.org.apache.hadoop.fs.FileSystem.getGlobalStorageStatistics().get("file")
    item = cleaner.item("file", content)
    before = statistics.getLong("bytesRead")
    counts = cleaner.run(item)["file"]["report"]["counts"]
    read = statistics.getLong("bytesRead") - before
    assert scans * len(content) <= read < (scans + 0.5) * len(content)
    assert (counts["clean_rows"], counts["rejected_rows"]) == (50_000, len(bad))
    assert [reject["raw_line"] for reject in cleaner.rejects()] == sorted(line.rstrip("\r") for line in bad)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_a_file_that_stands_for_gigabytes_is_tested_in_pieces(suffix: str, compress: Any) -> None:
    """Decompressed at once, 100 MB here, it would take the memory of the driver."""
    whole = compress(b"x" * (50 << 20)) * 2
    files = mock.Mock(read=lambda uri, limit, start: whole[start : start + limit])
    tracemalloc.start()
    assert raw_text.damage_of(files, {"uri": f"file{suffix}", "size": len(whole)}) is None
    assert raw_text.damage_of(files, {"uri": f"file{suffix}", "size": len(whole) - 9})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
