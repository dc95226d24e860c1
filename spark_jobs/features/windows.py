"""Exact trailing windows over the rows of each customer or terminal, in time linear in the rows.

Spark's range windows scan a window again for every row, which takes hours if single terminals have millions of rows.
Here the rows are sorted once by key and time, the bounds of a window are found by binary search, and its sums are
differences of running sums. These are integers, so the differences are exact: a row's features do not depend on rows
outside its windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from spark_jobs.schema import DAY_S, NO_KEY

if TYPE_CHECKING:
    from spark_jobs.io.blocks import Array, Columns

#: Amounts are summed in whole cents and capped at LARGEST_AMOUNT, so that their squares fit 64 bits.
CENT = 0.01
LARGEST_AMOUNT = 1e6

#: Resolution of summed logarithms.
LOG_UNIT = 1e-9


class Window:
    """Window of each row: a range of the sorted rows, positions `start` to `stop` (exclusive)."""

    def __init__(self, start: Array, stop: Array) -> None:
        import numpy as np

        self.start = start
        self.stop = np.maximum(start, stop)

    @property
    def count(self) -> Array:
        """Number of rows in the window."""
        return (self.stop - self.start).astype("float64")

    def sum(self, values: Array) -> Array:
        """Exact sum of integers over the window, if it fits into 64 bits."""
        import numpy as np

        running = np.zeros(len(values) + 1, dtype="int64")
        np.cumsum(values, dtype="int64", out=running[1:])
        return running[self.stop] - running[self.start]

    def mean(self, values: Array, otherwise: Array | float = 0.0) -> Array:
        """Mean of integers over the window; `otherwise` where it is empty."""
        import numpy as np

        count = self.count
        return np.where(count > 0, self.sum(values) / np.maximum(count, 1), otherwise)

    def max(self, values: Array, otherwise: float = 0.0) -> Array:
        """Largest value in the window; `otherwise` where it is empty. Takes log2(longest window) passes."""
        import numpy as np

        length = self.stop - self.start
        result = np.full(len(values), otherwise, dtype="float64")
        best, width = np.asarray(values, dtype="float64"), 1
        longest = int(length.max()) if len(length) else 0
        while width <= longest:
            # `best` has the maximum of the `width` rows from each position on; two of these cover a window.
            rows = np.flatnonzero((length >= width) & (length < 2 * width))
            result[rows] = np.maximum(best[self.start[rows]], best[self.stop[rows] - width])
            best = np.maximum(best[:-width], best[width:]) if len(best) > width else best[:0]
            width *= 2
        return result


class History:
    """Rows of one partition, sorted by key, time and transaction_id.

    Attributes:
        order: indices that sort the given rows.
        time: seconds. cents: amounts in whole cents, at most LARGEST_AMOUNT. fraud: 0 or 1.
    """

    def __init__(self, key: Array, time: Array, transaction_id: Array, amount: Array, fraud: Array) -> None:
        import numpy as np

        self._first = int(time.min()) if len(key) else 0
        self._span = (int(time.max()) - self._first if len(key) else 0) + 1
        if len(key) and int(key.max()) >= 2**62 // self._span:
            # Key and time would not fit into 64 bits together: replace the keys by their ranks.
            ranks = np.unique(key[key != NO_KEY], return_inverse=True)[1]
            ranked = np.full(len(key), NO_KEY)
            ranked[key != NO_KEY] = ranks
            key = ranked
        place = key * self._span + (time - self._first)
        self.order = np.argsort(place, kind="stable")
        # Key and time in one number, sorted.
        self._place = place[self.order]
        self._sort_ties(transaction_id)
        self.time = time[self.order]
        self.fraud = fraud[self.order].astype("int64")
        self.cents = np.rint(np.minimum(amount[self.order], LARGEST_AMOUNT) / CENT).astype("int64")
        self._has_key = key[self.order] != NO_KEY
        self._base = self._place - (self.time - self._first)
        self._positions: dict[int, Array] = {}

    def _sort_ties(self, transaction_id: Array) -> None:
        """Sort the few rows of the same key and second by id."""
        import numpy as np

        same = self._place[1:] == self._place[:-1]
        tied = np.flatnonzero(np.r_[same, False] | np.r_[False, same])
        rows = self.order[tied]
        self.order[tied] = rows[np.lexsort((transaction_id[rows], self._place[tied]))]

    def _position(self, seconds: int) -> Array:
        """For each row, the first position of its key with a time of at least the row's plus `seconds`."""
        import numpy as np

        if seconds not in self._positions:
            target = np.clip(self.time - self._first + seconds, 0, self._span)
            self._positions[seconds] = np.searchsorted(self._place, self._base + target)
        return self._positions[seconds]

    def window(self, days: int, delay_days: int = 0, *, include_current: bool) -> Window:
        """Rows of the same key in (t - delay - days, t - delay], the last second only with `include_current`.

        Empty for rows without a key.
        """
        import numpy as np

        end = -delay_days * DAY_S
        stop = self._position(end + 1 if include_current else end)
        start = self._position(end - days * DAY_S + 1)
        return Window(np.where(self._has_key, start, 0), np.where(self._has_key, stop, 0))


def over_history(rows: Columns, key: str, compute: Callable[[History], Columns]) -> Columns:
    """Float64 columns computed from the history of `rows` by `key`, in the order of `rows`."""
    import numpy as np

    history = History(rows[key], rows["tx_time_seconds"], rows["transaction_id"], rows["tx_amount"], rows["tx_fraud"])
    columns = {}
    for name, values in compute(history).items():
        columns[name] = np.empty(len(values), dtype="f8")
        columns[name][history.order] = values
    return columns
