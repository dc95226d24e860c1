"""Exact trailing windows over the rows of each customer or terminal, in time linear in the rows.

Spark's range windows go over a frame's rows again for every row, which takes hours where single terminals carry
millions of rows. Here a partition of rows is sorted once by key and time; where a window begins and ends is found by
binary search, and sums are differences of running sums. Running sums are kept in integers, whose differences are
exact whatever stands before the window: a row's features do not depend on the rows around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    #: Columns of as many rows: name → numpy array.
    Columns = Dict[str, Any]

DAY_S = 86400

#: Amounts are summed in these units, and beyond this amount counted as this amount, so that squares fit 64 bits.
CENT = 0.01
LARGEST_AMOUNT = 1e6

#: Resolution of sums of logarithms.
LOG_UNIT = 1e-9

#: In numpy a NULL key is this; keys are never negative.
NO_KEY = -1


class Window:
    """A stretch of sorted rows per row: those with positions from `start` up to but without `stop`."""

    def __init__(self, start: Array, stop: Array) -> None:
        import numpy as np

        self.start = start
        self.stop = np.maximum(start, stop)

    @property
    def count(self) -> Array:
        """Rows in the window."""
        return (self.stop - self.start).astype("float64")

    def sum(self, values: Array) -> Array:
        """Exact sum of integers over the window; right as long as the sum itself fits 64 bits."""
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
            # `best` holds the maxima of `width` rows from each position on; two of them cover the window.
            rows = np.flatnonzero((length >= width) & (length < 2 * width))
            result[rows] = np.maximum(best[self.start[rows]], best[self.stop[rows] - width])
            best = np.maximum(best[:-width], best[width:]) if len(best) > width else best[:0]
            width *= 2
        return result


class History:
    """Rows of one partition, sorted by key, time and transaction_id.

    Attributes:
        time: seconds, bigint. amount: double. cents: amounts in whole cents. fraud: 0 or 1.
        known: whether the row has a key. Rows without one have empty windows.
    """

    def __init__(self, key: Array, time: Array, transaction_id: Array, amount: Array, fraud: Array) -> None:
        import numpy as np

        self._first = int(time.min()) if len(key) else 0
        self._span = (int(time.max()) - self._first if len(key) else 0) + 1
        if len(key) and int(key.max()) >= 2**62 // self._span:
            # One number for key and time would not fit: number the keys.
            ranks = np.unique(key[key != NO_KEY], return_inverse=True)[1]
            numbered = np.full(len(key), NO_KEY)
            numbered[key != NO_KEY] = ranks
            key = numbered
        place = key * self._span + (time - self._first)
        self.order = np.argsort(place, kind="stable")
        # One number for key and time, sorted.
        self._place = place[self.order]
        self._sort_ties(transaction_id)
        self.time = time[self.order]
        self.amount = amount[self.order]
        self.fraud = fraud[self.order].astype("int64")
        self.known = key[self.order] != NO_KEY
        self.cents = np.rint(np.minimum(self.amount, LARGEST_AMOUNT) / CENT).astype("int64")
        self._base = self._place - (self.time - self._first)
        self._found: dict[int, Array] = {}

    def _sort_ties(self, transaction_id: Array) -> None:
        """Bring the few rows of the same key and second into the order of their ids."""
        import numpy as np

        same = self._place[1:] == self._place[:-1]
        tied = np.flatnonzero(np.r_[same, False] | np.r_[False, same])
        rows = self.order[tied]
        self.order[tied] = rows[np.lexsort((transaction_id[rows], self._place[tied]))]

    def _position(self, seconds: int) -> Array:
        """For each row, the first position of its key whose time is at least the row's own plus `seconds`."""
        import numpy as np

        if seconds not in self._found:
            target = np.clip(self.time - self._first + seconds, 0, self._span)
            self._found[seconds] = np.searchsorted(self._place, self._base + target)
        return self._found[seconds]

    def window(self, days: int, delay_days: int = 0, *, with_now: bool) -> Window:
        """Rows of the same key in (t - delay - days, t - delay]; without those of that last second if not `with_now`.

        Empty for rows without a key.
        """
        import numpy as np

        end = -delay_days * DAY_S
        stop = self._position(end + 1 if with_now else end)
        start = self._position(end - days * DAY_S + 1)
        return Window(np.where(self.known, start, 0), np.where(self.known, stop, 0))


def over_history(rows: Columns, key: str, compute: Callable[[History], Columns]) -> Columns:
    """What `compute` makes of the history of `rows` by `key`, as columns of `rows`.

    `compute` gives columns of doubles for the rows in the history's order.
    """
    import numpy as np

    history = History(rows[key], rows["tx_time_seconds"], rows["transaction_id"], rows["tx_amount"], rows["tx_fraud"])
    columns = {}
    for name, values in compute(history).items():
        columns[name] = np.empty(len(values), dtype="f8")
        columns[name][history.order] = values
    return columns
