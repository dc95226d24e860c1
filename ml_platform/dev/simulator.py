"""Simulated raw transaction files, for the demo and the tests.

Method: the transaction simulator of Y.-A. Le Borgne, W. Siblini, B. Lebichot and G. Bontempi,
"Reproducible Machine Learning for Credit Card Fraud Detection - Practical Handbook", Université Libre de
Bruxelles, 2022, chapter 3,
https://fraud-detection-handbook.github.io/fraud-detection-handbook/Chapter_3_GettingStarted/SimulatedDataset.html

* Customers and terminals are uniformly distributed in a 100 x 100 square. A customer uses the terminals within
  `radius`, a random one for each transaction; without any, the customer makes no transactions.
* A customer makes Poisson(rate) transactions a day, with the rate uniform in 0..4. The second of the day is
  normal(43,200; 20,000); transactions outside the day are dropped.
* The amount is normal(mean, mean / 2), with the mean uniform in 5..100; if negative, uniform(0, 2 * mean).
* Fraud (later scenarios overwrite earlier ones): 1 = amount above 220; 2 = all transactions of a
  compromised terminal (2 new ones a day, for 28 days); 3 = a random third of the transactions of a
  compromised customer (3 new ones a day, for 14 days), amount times 5.

Two steps are sampled differently, with the same distribution, so that a day depends only on its own number.
Thinned Poisson counts are Poisson again, and so is the sum over all customers, where each transaction belongs
to a customer with a probability proportional to their rate (J. F. C. Kingman, "Poisson Processes", 1993,
sections 2.2 and 5.1): one number is drawn for the day, then the customers, then seconds inside the day. In
scenario 3 each transaction is picked with probability 1/3; the handbook picks a third of all transactions in
the 14 days.

Most fault rates were counted in the 40 raw files of the OTUS MLOps course (1,879,794,138 rows; published in
bogorodvo/otus_mlops_hw_project and, for zero amounts, dmitriy-kaznacheev/otus-mlops). Damaged lines, which
those files do not have, are added to demonstrate the quarantine.

The same settings give the same bytes with the same version of numpy; numpy may change its generators'
distributions between versions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]
    Floats = NDArray[np.float64]

# The misspelled first name is part of the format.
HEADER = (
    b"# tranaction_id | tx_datetime | customer_id | terminal_id | tx_amount | tx_time_seconds | tx_time_days"
    b" | tx_fraud | tx_fraud_scenario\n"
)

_COURSE_ROWS = 1_879_794_138
# For each fault: its share of the rows at `fault_rate` 1, and what the cleaning report counts for one such row
# (nothing if the row stays valid).
_FAULTS: dict[str, tuple[float, tuple[str, ...]]] = {
    # Counted in the course's files.
    "duplicate": (2_553 / _COURSE_ROWS, ("duplicate",)),
    # The day number matches the written date, so it is one too low for the corrected instant.
    "hour_24": (3_805 / _COURSE_ROWS, ("hour_24", "wrong_days")),
    "wrong_seconds": (14_444 / _COURSE_ROWS, ("wrong_seconds",)),
    "empty_terminal": (13_060 / _COURSE_ROWS, ("unknown_terminal",)),
    "err_terminal": (27_252 / _COURSE_ROWS, ("unknown_terminal",)),
    "foreign_terminal": (575_157 / _COURSE_ROWS, ()),
    "unknown_customer": (14_623 / _COURSE_ROWS, ("unknown_customer",)),
    "zero_amount": (35_260 / _COURSE_ROWS, ()),
    # Invented, rarer than any of the above.
    "too_few_fields": (1e-6, ("malformed_row",)),
    "too_many_fields": (1e-6, ("malformed_row",)),
    "text_amount": (1e-6, ("malformed_row",)),
    "nan_amount": (1e-6, ("malformed_row",)),
    "empty_datetime": (1e-6, ("invalid_datetime",)),
    "impossible_date": (1e-6, ("invalid_datetime",)),
    "negative_amount": (1e-6, ("invalid_amount",)),
    "label_2": (1e-6, ("invalid_label",)),
    "conflicting_duplicate": (1e-6, ("conflicting_duplicate", "conflicting_duplicate")),
}
_REJECTIONS = frozenset(
    ("malformed_row", "invalid_datetime", "invalid_amount", "invalid_label", "conflicting_duplicate")
)
_DOUBLED = ("duplicate", "conflicting_duplicate")

# Terminal ids far outside the range, and the number of rows of the course's files that have them.
_FOREIGN_TERMINALS = {
    89518096: 513_023,
    21861: 59_066,
    618230: 2_643,
    22225: 333,
    436002: 90,
    22129: 1,
    360740: 1,
}

_DAY_SECONDS = 86_400
_WEEK_SECONDS = 7 * _DAY_SECONDS
_SQUARE = 100.0
_MAX_CENTS = 10**14  # keeps repeatedly multiplied amounts exact
_MEAN_SECOND, _SD_SECOND = 43_200.0, 20_000.0

# Independent random streams; the day is the last word of a stream's key.
_CUSTOMERS, _TERMINALS, _TOTALS, _TRANSACTIONS = 0, 1, 2, 3
_COMPROMISED_TERMINALS, _COMPROMISED_CUSTOMERS, _FAULTY_ROWS, _CHOICES = 4, 5, 6, 7

_BLOCK_ROWS = 65_536  # lines formatted per block


@dataclass(frozen=True)
class FileTruth:
    """Expected result of cleaning one simulated file.

    `name` is the file's name and `size_bytes` its size. `counts` has the keys of the cleaning report
    (raw_rows, clean_rows, duplicate_rows, rejected_rows and the names of the rules), and fraud_rows, the
    frauds among the clean rows. Fixes (hour_24, wrong_seconds, wrong_days, unknown_terminal,
    unknown_customer) are counted over clean rows.
    """

    name: str
    counts: dict[str, int]
    size_bytes: int


class _Population(NamedTuple):
    """Customers who can make transactions: row i of each array is one of them."""

    customer_id: Integers
    cumulative_rate: Floats  # transactions a day inside the day, summed up to and including the customer
    mean_amount: Floats
    nearby: _Nearby


class _Day(NamedTuple):
    """Transactions of one day, in file order."""

    number: int
    date: date
    first_id: int
    customer_id: Integers
    terminal_id: Integers
    second: Integers
    cents: Integers
    scenario: Integers


class _Fault(NamedTuple):
    row: int  # position in the day
    name: str  # key of _FAULTS
    shift: int  # seconds by which a wrong tx_time_seconds is off
    terminal: int  # id outside the range


@dataclass(frozen=True)
class Simulation:
    """Settings of a simulated data set, and the writer of its files.

    start: first day of the first file, and the base of tx_time_seconds and tx_time_days.
    days_per_file: days that a file covers.
    customers, terminals: number of each; ids start at 0.
    radius: maximum distance from a customer to a terminal, in units of the 100 x 100 square.
    seed: a different seed gives a different data set.
    fault_rate: multiple of the fault rates of the course's files, 0..1000; 0 gives clean files. The default
        affects about 2% of the rows (of 300,000 rows, on average at least 15 have each fault).
    without: faults to leave out, keys of `_FAULTS`.
    large_amount: scenario 1; amounts above it are fraud.
    compromised_terminals_per_day, compromised_terminal_days: scenario 2.
    compromised_customers_per_day, compromised_customer_days, compromised_share, compromised_factor:
        scenario 3; the share of the customer's transactions that are fraud, and the factor of their amounts.

    Memory depends on the population and one day, not on the number of files: about 160 bytes for each customer, 50 for
    each terminal, and 300 for each transaction of a day.
    Raises ValueError if a setting is out of range.
    """

    start: date = date(2019, 8, 22)
    days_per_file: int = 30
    customers: int = 5_000
    terminals: int = 10_000
    radius: float = 5.0
    seed: int = 0
    fault_rate: float = 50.0
    without: tuple[str, ...] = ()
    large_amount: float = 220.0
    compromised_terminals_per_day: int = 2
    compromised_terminal_days: int = 28
    compromised_customers_per_day: int = 3
    compromised_customer_days: int = 14
    compromised_share: float = 1 / 3
    compromised_factor: float = 5.0

    def __post_init__(self) -> None:
        bounds = {
            "days_per_file": (1, math.inf),
            "customers": (1, 2**31 - 1),
            "terminals": (1, 2**31 - 1),
            "radius": (1e-9, math.inf),
            "seed": (0, math.inf),
            "fault_rate": (0, 1000),
            "large_amount": (0, math.inf),
            "compromised_terminals_per_day": (0, self.terminals),
            "compromised_terminal_days": (0, math.inf),
            "compromised_customers_per_day": (0, self.customers),
            "compromised_customer_days": (0, math.inf),
            "compromised_share": (0, 1),
            "compromised_factor": (1e-9, 1000),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                above = " or more" if high == math.inf else f" to {high:,}"
                raise ValueError(f"{name} is {value}: give {low}{above}.")
        if unknown := set(self.without) - set(_FAULTS):
            raise ValueError(f"without names {', '.join(sorted(unknown))}: the faults are {', '.join(_FAULTS)}.")

    def file_name(self, index: int) -> str:
        """Name of file `index` (from 0): the first day that it covers, as `2019-08-22.txt`.

        Raises ValueError if the index is negative or the file would end after the year 9999.
        """
        if index < 0:
            raise ValueError(f"The index of the file is {index}: files count from 0.")
        try:
            self._date((index + 1) * self.days_per_file - 1)
        except OverflowError:
            raise ValueError(f"File {index} would end after the year 9999: choose an earlier start.") from None
        return f"{self._date(index * self.days_per_file).isoformat()}.txt"

    def write_file(self, index: int, out: BinaryIO, *, progress: Callable[[int], None] | None = None) -> FileTruth:
        """Write raw file `index` (from 0) to `out` and return the expected result of cleaning it.

        The file does not depend on whether earlier files were written: their transactions are only counted, to
        continue the ids. `progress` is called after each day with the rows written so far.
        Raises ValueError as `file_name` does.
        """
        name = self.file_name(index)
        first_day = index * self.days_per_file
        first_id = sum(self._total(day) for day in range(first_day))
        rules = {rule: 0 for _, counted in _FAULTS.values() for rule in counted}
        rows = frauds = 0
        out.write(HEADER)
        size_bytes = len(HEADER)
        for number in range(first_day, first_day + self.days_per_file):
            day = self._day(number, first_id)
            faults = self._faults(day)
            for block in _format(day, faults):
                out.write(block)
                size_bytes += len(block)
            first_id += day.second.size
            rows += day.second.size
            frauds += int((day.scenario > 0).sum())
            for fault in faults:
                counted = _FAULTS[fault.name][1]
                rows += fault.name in _DOUBLED
                frauds -= not _REJECTIONS.isdisjoint(counted) and int(day.scenario[fault.row] > 0)
                for rule in counted:
                    rules[rule] += 1
            if progress is not None:
                progress(rows)
        rejected = sum(rules[rule] for rule in _REJECTIONS)
        counts = {
            "raw_rows": rows,
            "clean_rows": rows - rules["duplicate"] - rejected,
            "duplicate_rows": rules["duplicate"],
            "rejected_rows": rejected,
            "fraud_rows": frauds,
        }
        return FileTruth(name, counts | rules, size_bytes)

    def _date(self, day: int) -> date:
        return self.start + timedelta(days=day)

    def _random(self, stream: int, day: int = 0) -> np.random.Generator:
        import numpy as np

        return np.random.default_rng(np.random.SeedSequence([self.seed, stream, day]))

    @cached_property
    def _population(self) -> _Population:
        import numpy as np

        random = self._random(_CUSTOMERS)
        customers = random.uniform(0, _SQUARE, (2, self.customers))
        mean_amount = random.uniform(5, 100, self.customers)
        rate = random.uniform(0, 4, self.customers)
        terminals = self._random(_TERMINALS).uniform(0, _SQUARE, (2, self.terminals))
        nearby = _Nearby(customers, terminals, self.radius)
        active = np.flatnonzero(nearby.exists())
        # Probability that the second of the day, truncated to a whole number, is 1..86,399.
        scale = _SD_SECOND * math.sqrt(2)
        inside = (math.erf((_DAY_SECONDS - _MEAN_SECOND) / scale) - math.erf((1 - _MEAN_SECOND) / scale)) / 2
        return _Population(
            customer_id=active,
            cumulative_rate=np.cumsum(rate[active] * inside),
            mean_amount=mean_amount[active],
            nearby=nearby,
        )

    def _total(self, day: int) -> int:
        """Number of transactions on a day; cheap, so that the first id of a late file needs no simulation."""
        people = self._population
        if people.customer_id.size == 0:
            return 0
        return int(self._random(_TOTALS, day).poisson(people.cumulative_rate[-1]))

    def _day(self, number: int, first_id: int) -> _Day:
        import numpy as np

        people = self._population
        total = self._total(number)
        random = self._random(_TRANSACTIONS, number)
        # Normalized sums of exponential variables are sorted uniform ones, which saves sorting by customer.
        waits = np.cumsum(random.standard_exponential(total + 1))
        if total:
            positions = waits[:-1] * (people.cumulative_rate[-1] / waits[-1])
            customer = np.searchsorted(people.cumulative_rate, positions, side="right")
            # A product may round up to the very end of the last customer's interval.
            customer = np.minimum(customer, people.customer_id.size - 1)
        else:
            customer = np.zeros(0, dtype=np.int64)
        customer_id = people.customer_id[customer]
        terminal_id = people.nearby.choose(customer_id, self._random(_CHOICES, number))

        second = random.normal(_MEAN_SECOND, _SD_SECOND, total)
        outside = np.flatnonzero((second < 1) | (second >= _DAY_SECONDS))
        while outside.size:
            second[outside] = random.normal(_MEAN_SECOND, _SD_SECOND, outside.size)
            outside = outside[(second[outside] < 1) | (second[outside] >= _DAY_SECONDS)]

        mean = people.mean_amount[customer]
        amount = random.normal(mean, mean / 2)
        negative = np.flatnonzero(amount < 0)
        amount[negative] = random.uniform(0, 2 * mean[negative])
        cents = np.rint(amount * 100).astype(np.int64)

        scenario = np.where(cents > self.large_amount * 100, 1, 0)
        compromised = np.zeros(self.terminals, dtype=bool)
        for drawn in self._compromised(number, _COMPROMISED_TERMINALS):
            compromised[drawn] = True
        scenario[compromised[terminal_id]] = 2
        windows = np.zeros(self.customers, dtype=np.int64)
        for drawn in self._compromised(number, _COMPROMISED_CUSTOMERS):
            windows[drawn] += 1
        # A customer compromised twice can have a transaction picked twice, as in the handbook.
        victims = np.flatnonzero(windows[customer_id])
        picks = random.binomial(windows[customer_id[victims]], self.compromised_share)
        victims, picks = victims[picks > 0], picks[picks > 0]
        scenario[victims] = 3
        multiplied = np.rint(cents[victims] * float(self.compromised_factor) ** picks)
        cents[victims] = np.minimum(multiplied, _MAX_CENTS).astype(np.int64)
        return _Day(
            number=number,
            date=self._date(number),
            first_id=first_id,
            customer_id=customer_id,
            terminal_id=terminal_id,
            second=second.astype(np.int64),
            cents=cents,
            scenario=scenario,
        )

    def _compromised(self, day: int, stream: int) -> Iterator[Integers]:
        """Terminals or customers of each window that includes the day; no window starts before the first day."""
        if stream == _COMPROMISED_TERMINALS:
            population, number = self.terminals, self.compromised_terminals_per_day
            length = self.compromised_terminal_days
        else:
            population, number = self.customers, self.compromised_customers_per_day
            length = self.compromised_customer_days
        for first in range(max(0, day - length + 1), day + 1):
            yield self._random(stream, first).choice(population, number, replace=False)

    def _faults(self, day: _Day) -> list[_Fault]:
        """The day's faults, by row."""
        import numpy as np

        random = self._random(_FAULTY_ROWS, day.number)
        names = list(_FAULTS)
        shares = [0.0 if name in self.without else _FAULTS[name][0] for name in names]
        edges = np.cumsum(shares) * self.fault_rate
        drawn = random.random(day.second.size)
        rows = np.flatnonzero(drawn < edges[-1])
        faults = np.searchsorted(edges, drawn[rows], side="right")
        shifts = random.integers(_WEEK_SECONDS, 8 * _WEEK_SECONDS, rows.size)
        weights = np.array(list(_FOREIGN_TERMINALS.values()), dtype=float)
        foreign = random.choice(list(_FOREIGN_TERMINALS), rows.size, p=weights / weights.sum())
        foreign[foreign < self.terminals] = max(_FOREIGN_TERMINALS)
        columns = (rows.tolist(), [names[fault] for fault in faults], shifts.tolist(), foreign.tolist())
        return [_Fault(*values) for values in zip(*columns, strict=True)]


class _Nearby:
    """The terminals within a radius of each customer, without a list of all such pairs: there may be billions.

    The square is a grid of cells at least as wide as the radius, so a customer reaches only terminals in the 3 x 3
    cells around. A random terminal of these is drawn again until it is within the radius.
    """

    def __init__(self, customers: Floats, terminals: Floats, radius: float) -> None:
        """`customers` and `terminals` are (2, n) coordinates in the square."""
        import numpy as np

        side = max(1, min(int(_SQUARE / radius), math.isqrt(terminals.shape[1])))
        self._customers, self._terminals, self._radius = customers, terminals, radius
        cell = _cells(terminals, side)
        self._by_cell = np.argsort(cell, kind="stable")
        bounds = np.searchsorted(cell[self._by_cell], np.arange((side + 2) ** 2 + 1))
        # The three cells of a column follow one another in the order by cell.
        columns = _cells(customers, side) + (side + 2) * np.array([[-1], [0], [1]])
        self._begin = bounds[columns - 1]
        self._end_number = np.cumsum(bounds[columns + 2] - self._begin, axis=0)

    def exists(self) -> NDArray[np.bool_]:
        """Whether there is a terminal within the radius, by customer."""
        import numpy as np
        from scipy.spatial import KDTree

        _, nearest = KDTree(self._terminals.T).query(self._customers.T)
        return self._is_near(np.arange(nearest.size), nearest)

    def choose(self, customer: Integers, random: np.random.Generator) -> Integers:
        """A random terminal within the radius of each of these customers, who must have one."""
        import numpy as np

        chosen = np.empty(customer.size, dtype=np.int64)
        left = np.arange(customer.size)
        while left.size:
            who = customer[left]
            end = self._end_number[:, who]
            number = random.integers(0, end[2])
            column = (number >= end[0]).astype(np.int64) + (number >= end[1])
            first_number = np.where(column, end[column - 1, np.arange(who.size)], 0)
            chosen[left] = self._by_cell[self._begin[column, who] + number - first_number]
            left = left[~self._is_near(who, chosen[left])]
        return chosen

    def _is_near(self, customer: Integers, terminal: Integers) -> NDArray[np.bool_]:
        x, y = self._terminals[:, terminal] - self._customers[:, customer]
        return x * x + y * y <= self._radius**2


def _cells(points: Floats, side: int) -> Integers:
    """Number of each point's cell, in a grid of `side` x `side` cells with a rim of empty ones around it."""
    import numpy as np

    column, row = np.minimum((points * (side / _SQUARE)).astype(np.int64), side - 1) + 1
    return column * (side + 2) + row


def _format(day: _Day, faults: list[_Fault]) -> Iterator[bytes]:
    """Format the day's lines in blocks, with faults applied."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import csv

    options = csv.WriteOptions(include_header=False, quoting_style="none")
    midnight = np.datetime64(day.date, "s")
    faulty_rows = [fault.row for fault in faults]
    for start in range(0, day.second.size, _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        second, scenario = day.second[part], day.scenario[part]
        # The same integers, reinterpreted as hundredths.
        cents = pa.array(day.cents[part]).cast(pa.decimal128(19))
        columns = [
            np.arange(day.first_id + start, day.first_id + start + second.size),
            midnight + second,
            day.customer_id[part],
            day.terminal_id[part],
            pa.Array.from_buffers(pa.decimal128(19, 2), second.size, cents.buffers()),
            second + day.number * _DAY_SECONDS,
            np.full(second.size, day.number),
            (scenario > 0).astype(np.int8),
            scenario,
        ]
        text = pa.BufferOutputStream()
        csv.write_csv(pa.table(columns, names=list("123456789")), text, options)
        block = text.getvalue().to_pybytes()
        low, high = np.searchsorted(faulty_rows, [start, start + _BLOCK_ROWS])
        if low < high:
            lines = block.splitlines(keepends=True)
            for fault in faults[low:high]:
                lines[fault.row - start] = _faulty_lines(lines[fault.row - start], fault)
            block = b"".join(lines)
        yield block


def _faulty_lines(line: bytes, fault: _Fault) -> bytes:
    """The line with the fault applied or, for duplicates, the line and its copy."""
    fields = line.decode().rstrip("\n").split(",")
    day = int(fields[6])
    match fault.name:
        case "hour_24":
            fields[1] = f"{fields[1][:10]} 24:00:00"
            fields[5] = str((day + 1) * _DAY_SECONDS)
        case "wrong_seconds":
            # Weeks earlier; later in the first weeks of the data set, where that would be negative.
            seconds = int(fields[5])
            fields[5] = str(seconds - fault.shift if seconds >= fault.shift else seconds + fault.shift)
        case "empty_terminal":
            fields[3] = ""
        case "err_terminal":
            fields[3] = "Err"
        case "foreign_terminal":
            fields[3] = str(fault.terminal)
        case "unknown_customer":
            fields[2] = "-999999"
        case "zero_amount":
            fields[4] = "0.00"
        case "too_few_fields":
            del fields[7:]
        case "too_many_fields":
            fields.append("0")
        case "text_amount":
            fields[4] = "abc"
        case "nan_amount":
            fields[4] = "NaN"
        case "empty_datetime":
            fields[1] = ""
        case "impossible_date":
            fields[1] = f"{fields[1][:4]}-02-30{fields[1][10:]}"
        case "negative_amount":
            fields[4] = f"-{max(Decimal(fields[4]), Decimal('0.01'))}"
        case "label_2":
            fields[7] = "2"
        case "conflicting_duplicate":
            fields[4] = str(Decimal(fields[4]) + 1)
    faulty = ",".join(fields).encode() + b"\n"
    return line + faulty if fault.name in _DOUBLED else faulty
