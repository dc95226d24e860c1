"""Rejected lines and their reasons: collected on the driver if they are few, otherwise read again by Spark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Tuple

from spark_jobs import runtime
from spark_jobs.cleaning.plain_lines import PADDING
from spark_jobs.cleaning.rules import HEADER_BIT, LONG_LINE, MAX_ROW_BYTES, REJECT_BITS
from spark_jobs.io import blocks, parquet_files
from spark_jobs.schema import REJECTED_COLUMNS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from spark_jobs.cleaning.plain_lines import Parser
    from spark_jobs.io.blocks import Array, Columns

#: A rejected line without its line end, and the bits of its reasons.
Reject = Tuple[bytes, int]

#: Extends REJECT_BITS: valid rows that differ from others with the same id.
CONFLICT_BIT = 2 * HEADER_BIT

#: Bytes of rejects that a task may send to the driver, counting each as its text plus BYTES_PER_REJECT; above this
#: limit, the file is read again.
COLLECTED_BYTES = 256 << 10
BYTES_PER_REJECT = 64

#: Characters of a line that a report shows.
SAMPLE_LENGTH = 200


class Collector:
    """Rejected lines of a task; empty if there are too many, or if one is too long to be held in Python."""

    def __init__(self) -> None:
        self.lines: list[Reject] = []
        self.text_bytes = 0
        self._bytes_left = COLLECTED_BYTES

    def add(self, data: Array, offsets: Array, rows: Columns) -> None:
        """Add the lines of a text that are rejected in its parsed `rows`."""
        self.text_bytes += int(offsets[-1] - offsets[0]) + len(offsets) - 1  # with the line ends
        if self._bytes_left < 0:
            return
        limit = self._bytes_left // BYTES_PER_REJECT + 1
        for line, reasons in zip(*rejected_lines(data, offsets, rows, rows["rejected"], limit)):
            self._bytes_left -= BYTES_PER_REJECT + (COLLECTED_BYTES if line == LONG_LINE.encode() else len(line))
            if self._bytes_left < 0:
                self.lines.clear()
                return
            self.lines.append((line, int(reasons)))


def rejected_lines(
    data: Array, offsets: Array, rows: Columns, reasons: Array, limit: int | None = None
) -> tuple[list[bytes], Array]:
    """(lines of a text that have `reasons`, without line ends; their reasons), at most the first `limit`."""
    import numpy as np

    selected = np.flatnonzero((reasons > 0) & (reasons != HEADER_BIT))[:limit]
    numbers = rows["line"][selected]
    return [data[offsets[n] : offsets[n + 1]].tobytes().rstrip(b"\r") for n in numbers], reasons[selected]


def collected_rejects(
    collected: dict[int, list[Reject]], tally: dict[str, Any], header: bytes | None
) -> list[Reject] | None:
    """All rejects of a file with this `tally`, including repeated headers; None if the tasks did not collect all.

    `collected` maps task numbers to rejects.
    """
    if tally["conflicting_duplicate"] or tally["repeated_headers"] > COLLECTED_BYTES // BYTES_PER_REJECT:
        return None
    lines = [line for task in collected.values() for line in task]
    lines += [(header or b"", REJECT_BITS["malformed_row"])] * tally["repeated_headers"]
    return lines if len(lines) == tally["rejected"] else None


def parquet_file(rejects: list[Reject], compression: str | None) -> bytes:
    """Parquet file of REJECTED_COLUMNS with the rows that `reread` gives, but without its two Spark jobs."""
    import numpy as np
    import pyarrow

    texts, reasons, counts = [], [], [0]
    for line, bits in rejects:
        texts.append(_text_of(line).encode())
        rules = [rule.encode() for rule in _rules_of(bits)]
        reasons += rules
        counts.append(len(rules))
    text = pyarrow.string()
    ends = blocks.arrow_array(np.cumsum(counts, dtype="i4"))
    lists = pyarrow.ListArray.from_arrays(ends, blocks.arrow_array(reasons, text))
    table = pyarrow.Table.from_arrays(
        [blocks.arrow_array(texts, text), lists], names=[name for name, *_ in REJECTED_COLUMNS]
    )
    return parquet_files.file_of(table, compression=compression)


def samples_of(rejects: list[Reject]) -> dict[str, str]:
    """The first line of each rule, cut to SAMPLE_LENGTH."""
    samples: dict[str, str] = {}
    for line, bits in rejects:
        for rule in _rules_of(bits):
            samples.setdefault(rule, _text_of(line)[:SAMPLE_LENGTH])
    return samples


def _rules_of(bits: int) -> list[str]:
    return [rule for rule, bit in REJECT_BITS.items() if bits & bit]


def _text_of(line: bytes) -> str:
    """A line as text: as ISO 8859-1, which keeps every byte, if it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("iso-8859-1")


def reread(lines: DataFrame, parser: Parser, tally: dict[str, Any]) -> DataFrame:
    """Read `lines` again: REJECTED_COLUMNS of all rejects, including conflicting ids and repeated headers."""
    import numpy as np
    from pyspark.sql import functions as F

    conflicting_ids = tally["conflicting_ids"]
    malformed = F.lit(REJECT_BITS["malformed_row"])

    def find_rejects(texts: Iterator[tuple[Array, Array]]) -> Iterator[Columns]:
        for data, offsets in texts:
            rows = parser.parse(data, offsets)
            reasons = rows["rejected"].astype("i4")
            if len(conflicting_ids):
                index = np.minimum(np.searchsorted(conflicting_ids, rows["transaction_id"]), len(conflicting_ids) - 1)
                reasons[(reasons == 0) & (conflicting_ids[index] == rows["transaction_id"])] = CONFLICT_BIT
            yield dict(zip(("line", "rejected"), rejected_lines(data, offsets, rows, reasons)))

    is_short = F.expr("octet_length(value)") <= MAX_ROW_BYTES
    short = lines.where(is_short).select(F.col("value").cast("binary"))
    rejected = blocks.map_text(short, find_rejects, "line binary, rejected int", PADDING)
    # Long lines stay in the JVM, where a second scan is cheap.
    trimmed = F.expr("trim(TRAILING '\r' FROM value)").cast("binary")
    rejected = rejected.union(lines.where(~is_short).select(trimmed, malformed))
    if tally["repeated_headers"]:
        copies = runtime.session(lines).range(tally["repeated_headers"])
        rejected = rejected.union(copies.select(F.lit(bytearray(parser.header or b"")), malformed))

    # A line that is not UTF-8 is decoded as ISO 8859-1, which preserves every byte.
    text = (
        "IF(encode(decode(line, 'UTF-8'), 'UTF-8') = line, CAST(line AS STRING), decode(line, 'ISO-8859-1')) "
        "AS raw_line"
    )
    bits = {**REJECT_BITS, "conflicting_duplicate": CONFLICT_BIT}
    rules = ", ".join(f"IF((rejected & {bit}) > 0, '{rule}', NULL)" for rule, bit in bits.items())
    return rejected.selectExpr(text, f"filter(array({rules}), rule -> rule IS NOT NULL) AS reasons")
