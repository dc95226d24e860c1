"""Duplicates, conflicts and row counts, found where the shuffle has brought rows with the same id together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from spark_jobs.cleaning import bulk
from spark_jobs.cleaning.plain_lines import LINE_COLUMNS
from spark_jobs.cleaning.rules import FIX_BITS, HEADER_BIT, REJECT_BITS
from spark_jobs.io import blocks
from spark_jobs.schema import CLEANED_COLUMNS, DAY_S, NO_KEY

if TYPE_CHECKING:
    from spark_jobs.io.blocks import Array, Columns

#: The shuffled columns: parsed lines, and the number of lines that each row represents.
LAYOUT = (*LINE_COLUMNS, ("rows", "i8"))


class IdRanges:
    """Range partitioning of the shuffle by id: neighbouring ids go to the same partition.

    Ids and instants grow together in the course's files, so each partition, and each Parquet file, covers its own days.
    The range of ids is estimated from `head` and `tail`, the first and last bytes of a file of `size` bytes; ids
    outside it are hashed to partitions.
    """

    def __init__(self, head: bytes, tail: bytes, size: int, partitions: int) -> None:
        self.partitions = partitions
        first, last = [re.findall(rb"^([0-9]{1,18}),", end, re.MULTILINE) for end in (head, b"?" + tail)]
        self._first = int(first[0]) if first else 0
        rows = size * (head.count(b"\n") + 1) // max(len(head), 1)
        ids = int(last[-1]) - self._first + 1 if last else 0
        # If ids do not grow in the file, the first and the last say nothing about their range.
        self._width = max(1, -(-(ids if 0 < ids < 2 * rows else rows) // partitions))

    def partition(self, transaction_id: Array) -> Array:
        """Partition numbers of ids."""
        import numpy as np

        # Differences beyond 64 bits wrap around, in the same way for equal ids.
        number = (transaction_id - self._first) // self._width
        in_range = (number >= 0) & (number < self.partitions)
        return np.where(in_range, number, blocks.hash_ids(number) % self.partitions)


def collapse_rejects(rows: Columns) -> Columns:
    """Columns of LAYOUT from parsed lines, with one row for all lines rejected for the same reasons.

    Otherwise a binary file, all of it rejects, would be shuffled in full.
    """
    import numpy as np

    good = np.flatnonzero(rows["rejected"] == 0)
    reasons, first, counts = np.unique(rows["rejected"], return_index=True, return_counts=True)
    kept = np.concatenate([good, first[reasons > 0]])
    return {
        **{name: rows[name][kept] for name, _ in LINE_COLUMNS},
        "rows": np.concatenate([np.ones(len(good), dtype="i8"), counts[reasons > 0]]),
    }


def deduplicate(rows: Columns, tail_length: int) -> tuple[Columns, dict[str, Any]]:
    """Deduplicate columns of LAYOUT that hold all rows of their ids: (rows to keep, sorted by id; tally of all rows).

    A tally has the counts of a report, ``rows`` (all but headers), ``header``, ``rejected``, ``min_`` and ``max_`` of
    ``seconds`` and ``id`` (None if there are no rows), ``conflicting_ids``, an array, and ``tails`` of
    `tail_length` rows (see bulk.tails).
    """
    import numpy as np

    rejected = rows["rejected"]

    def count(selected: Array) -> int:
        return int(rows["rows"][selected].sum())

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
    for name, selected in (
        *((fix, (kept["fixes"] & bit) > 0) for fix, bit in FIX_BITS.items()),
        ("unknown_terminal", kept["terminal_id"] == NO_KEY),
        ("unknown_customer", kept["customer_id"] == NO_KEY),
        ("fraud_rows", kept["tx_fraud"] == 1),
        ("zero_amount", kept["tx_amount"] == 0),
    ):
        tally[name] = int(selected.sum())
    for name, values in (("seconds", kept["tx_unix_seconds"]), ("id", kept["transaction_id"])):
        tally[f"min_{name}"] = int(values.min()) if len(values) else None
        tally[f"max_{name}"] = int(values.max()) if len(values) else None
    tally["tails"] = bulk.tails(kept["transaction_id"], kept["tx_unix_seconds"], tail_length)
    return kept, tally


def merge_tallies(tallies: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the tallies of a file's tasks: ``bulk`` (see bulk.Bulk) replaces ``tails``, ``repeated_headers`` is new.

    A header that is repeated further down is a malformed row.
    """
    import numpy as np

    total: dict[str, Any] = {}
    for name in tallies[0]:
        values: list[Any] = [tally[name] for tally in tallies if tally[name] is not None]
        if name == "tails":
            total["bulk"] = bulk.bulk_of(values, total["clean_rows"])
        elif name == "conflicting_ids":
            total[name] = np.sort(np.concatenate(values))
        elif name.startswith("min_"):
            total[name] = min(values, default=None)
        elif name.startswith("max_"):
            total[name] = max(values, default=None)
        else:
            total[name] = sum(values)
    total["repeated_headers"] = max(0, total["header"] - 1)
    for name in ("rows", "rejected", "malformed_row"):
        total[name] += total["repeated_headers"]
    return total


def sort_rows(rows: Columns, epoch: int) -> Columns:
    """CLEANED_COLUMNS (tx_datetime in Unix seconds) of rows in id order, sorted by day, customer and instant.

    This is the order of the course's files.
    """
    import numpy as np

    seconds = rows["tx_unix_seconds"] - epoch
    days = seconds // DAY_S
    customers = rows["customer_id"]
    order = np.empty(0, dtype="i8")
    if len(days):
        # Sort by one number if it fits into 64 bits. Rows come in id order and the sorts are stable, so ids break ties.
        width = int(customers.max()) - NO_KEY + 1
        if (int(days.max()) - int(days.min()) + 1) * width * DAY_S < 1 << 63:
            sort_key = ((days - days.min()) * width + (customers - NO_KEY)) * DAY_S + seconds - days * DAY_S
            order = np.argsort(sort_key, kind="stable")
        else:
            order = np.lexsort((seconds, customers, days))
    times = {"tx_datetime": rows["tx_unix_seconds"], "tx_time_seconds": seconds, "tx_time_days": days.astype("i4")}
    columns = {**rows, **times}
    return {name: columns[name][order] for name, _, _ in CLEANED_COLUMNS}
