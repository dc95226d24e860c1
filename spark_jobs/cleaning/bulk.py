"""The bulk of a file: the 0.1 and 99.9 percentiles of its ids and days, which a few odd rows do not move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Sequence, Tuple

from spark_jobs.schema import DAY_S

if TYPE_CHECKING:
    from spark_jobs.io.blocks import Array

#: Rows on either side of the bulk, per thousand.
OUTSIDE_PER_MILLE = 1

#: Bytes that every valid row has at least: nine fields, one of them a datetime.
SHORTEST_ROW = 30

#: Odd rows that a report names.
EXAMPLES = 3

#: Days that a report counts rows of.
MAX_DAYS = 400

#: Days in this range are counted in an array.
_COUNTED_DAYS = 1 << 20

_INT64 = (-(1 << 63), (1 << 63) - 1)

#: Two integers; of a range the lowest and the highest value, both included.
Range = Tuple[int, int]


class Bounds(NamedTuple):
    """Ids and Unix seconds beyond which rows are rejected as ``out_of_range``."""

    ids: Range
    seconds: Range


class Bulk(NamedTuple):
    """Percentiles of a file's ids and days (since 1970), and the rows that a person would look at first.

    `usual_days` leave out EXAMPLES rows at either end where that is more than the percentiles do, as in small files.
    `odd` rows are farther from them than their width; `examples` are (id, Unix seconds) of the farthest. `rows_per_day`
    has the MAX_DAYS days with most rows.
    """

    ids: Range
    days: Range
    usual_days: Range
    odd: int
    examples: Sequence[Range]
    rows_per_day: dict[int, int]


def tail_length(size: int) -> int:
    """Rows at either end that decide the percentiles of a file of `size` bytes, at most."""
    return size // SHORTEST_ROW * OUTSIDE_PER_MILLE // 1000 + EXAMPLES + 1


def tails(ids: Array, seconds: Array, length: int) -> dict[str, Any] | None:
    """Summarize a task's rows for `bulk_of`, given their ids in order and their Unix seconds; None without rows."""
    import numpy as np

    if not len(ids):
        return None
    days, counts = _days_and_counts(seconds)
    low = int(np.searchsorted(np.cumsum(counts), length)) + 1
    high = int(np.searchsorted(np.cumsum(counts[::-1]), length)) + 1
    few = min(EXAMPLES, len(ids))
    first = np.argpartition(seconds, few - 1)[:few]
    last = np.argpartition(seconds, len(seconds) - few)[-few:]
    return {
        "low_ids": ids[:length],
        "high_ids": ids[-length:],
        "days": _fullest(days, counts),
        "low_days": (days[:low], counts[:low]),
        "high_days": (days[-high:], counts[-high:]),
        "rows": [(int(ids[row]), int(seconds[row])) for row in {*first.tolist(), *last.tolist()}],
    }


def _days_and_counts(seconds: Array) -> tuple[Array, Array]:
    """Days since 1970 with rows, in order, and how many each has."""
    import numpy as np

    days = seconds // DAY_S
    first = int(days.min())
    if int(days.max()) - first >= _COUNTED_DAYS:
        found, counts = np.unique(days, return_counts=True)
        return found, counts
    counts = np.bincount(days - first)
    filled = np.flatnonzero(counts)
    return filled + first, counts[filled]


def bulk_of(parts: Sequence[dict[str, Any]], rows: int) -> Bulk | None:
    """The bulk of a file of `rows` rows from the `tails` of its tasks; None without rows."""
    import numpy as np

    if not parts:
        return None
    skipped = rows * OUTSIDE_PER_MILLE // 1000
    low_ids = np.sort(np.concatenate([part["low_ids"] for part in parts]))
    high_ids = np.sort(np.concatenate([part["high_ids"] for part in parts]))
    ids = int(low_ids[min(skipped, len(low_ids) - 1)]), int(high_ids[-1 - min(skipped, len(high_ids) - 1)])
    low_days = [part["low_days"] for part in parts]
    high_days = [(-days, counts) for days, counts in (part["high_days"] for part in parts)]
    days = _percentile(low_days, skipped), -_percentile(high_days, skipped)
    skipped = max(skipped, min(EXAMPLES, rows // 20))
    first, last = _percentile(low_days, skipped), -_percentile(high_days, skipped)
    width = last - first + 1
    odd = _rows_below(low_days, first - width) + _rows_below(high_days, -last - width)
    examples = {row for part in parts for row in part["rows"] if not first - width <= row[1] // DAY_S <= last + width}
    middle = (first + last + 1) * DAY_S // 2
    farthest = sorted(examples, key=lambda row: (-abs(row[1] - middle), row[0]))[:EXAMPLES]
    all_days = np.concatenate([part["days"][0] for part in parts])
    found, place = np.unique(all_days, return_inverse=True)
    totals = np.bincount(place, weights=np.concatenate([part["days"][1] for part in parts])).astype("i8")
    rows_per_day = dict(zip(*(column.tolist() for column in _fullest(found, totals))))
    return Bulk(ids, days, (first, last), odd, farthest, rows_per_day)


def _fullest(days: Array, counts: Array) -> tuple[Array, Array]:
    """The MAX_DAYS days with most rows, in order."""
    import numpy as np

    kept = np.sort(np.argsort(-counts, kind="stable")[:MAX_DAYS])
    return days[kept], counts[kept]


def _percentile(tables: Sequence[tuple[Array, Array]], skipped: int) -> int:
    """The value of the row that has `skipped` rows before it, by values and how many rows have each."""
    import numpy as np

    values = np.concatenate([table[0] for table in tables])
    counts = np.concatenate([table[1] for table in tables])
    order = np.argsort(values, kind="stable")
    rows_until = np.cumsum(counts[order])
    place = min(int(np.searchsorted(rows_until, skipped, side="right")), len(order) - 1)
    return int(values[order[place]])


def _rows_below(tables: Sequence[tuple[Array, Array]], bound: int) -> int:
    return sum(int(counts[values < bound].sum()) for values, counts in tables)


def bounds_of(bulk: Bulk, widths: float) -> Bounds:
    """Bounds that lie `widths` times the width of the bulk outside of it."""

    def widened(low: int, high: int) -> Range:
        margin = int(widths * (high - low + 1))
        return max(low - margin, _INT64[0]), min(high + margin, _INT64[1])

    first, last = widened(*bulk.days)
    return Bounds(widened(*bulk.ids), (first * DAY_S, (last + 1) * DAY_S - 1))
