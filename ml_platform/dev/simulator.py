"""Simulated raw transaction files, for the demo and the tests.

Method: the transaction simulator of Y.-A. Le Borgne, W. Siblini, B. Lebichot and G. Bontempi,
"Reproducible Machine Learning for Credit Card Fraud Detection - Practical Handbook", Université Libre de
Bruxelles, 2022, chapter 3,
https://fraud-detection-handbook.github.io/fraud-detection-handbook/Chapter_3_GettingStarted/SimulatedDataset.html

* Customers and terminals lie uniformly in a 100 x 100 square. A customer uses the terminals nearer than
  `radius`, one of them at random for each transaction; without any, they make no transactions.
* A customer makes Poisson(rate) transactions a day, the rate uniform in 0..4. The second of the day is
  normal(43,200; 20,000); transactions outside the day are dropped.
* The amount is normal(mean, mean / 2), the mean uniform in 5..100; if negative, uniform(0, 2 * mean).
* Fraud, a later scenario overwriting an earlier one: 1 = amount above 220; 2 = all transactions of a
  compromised terminal (2 new ones a day, for 28 days); 3 = a random third of the transactions of a
  compromised customer (3 new ones a day, for 14 days), amount times 5.

Two steps are done in another, equally distributed way, so that a day needs nothing but its own number.
Poisson counts that are thinned are Poisson again, and the sum of all customers' is too, with each
transaction belonging to a customer with a chance proportional to their rate (J. F. C. Kingman, "Poisson
Processes", 1993, sections 2.2 and 5.1): one number is drawn for the day, then the customers, then seconds
inside the day. In scenario 3 each transaction is picked with chance 1/3; the handbook picks a third of all
that fall in the 14 days.

Faults are those that were counted in the 40 raw files of the OTUS MLOps course (1,879,794,138 rows;
published in bogorodvo/otus_mlops_hw_project and, for zero amounts, dmitriy-kaznacheev/otus-mlops), and
damaged lines, which those files do not have, to show the quarantine.

The same settings give the same bytes with the same version of numpy; numpy may change its generators'
distributions between versions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]
    Floats = NDArray[np.float64]

# The misspelt first name is part of the format.
HEADER = (
    b"# tranaction_id | tx_datetime | customer_id | terminal_id | tx_amount | tx_time_seconds | tx_time_days"
    b" | tx_fraud | tx_fraud_scenario\n"
)

COUNTS = (
    "raw_rows",
    "clean_rows",
    "duplicate_rows",
    "rejected_rows",
    "malformed_row",
    "invalid_datetime",
    "invalid_amount",
    "invalid_label",
    "conflicting_duplicate",
    "duplicate",
    "hour_24",
    "wrong_seconds",
    "wrong_days",
    "unknown_terminal",
    "unknown_customer",
    "fraud_rows",
)

# Share of the rows with each fault at `fault_rate` 1: counted in the course's files ...
_FAULT_SHARES = {
    "duplicate": 2_553 / 1_879_794_138,
    "hour_24": 3_805 / 1_879_794_138,
    "wrong_seconds": 14_444 / 1_879_794_138,
    "empty_terminal": 13_060 / 1_879_794_138,
    "err_terminal": 27_252 / 1_879_794_138,
    "foreign_terminal": 575_157 / 1_879_794_138,
    "unknown_customer": 14_623 / 1_879_794_138,
    "zero_amount": 35_260 / 1_879_794_138,
    # ... and chosen, rarer than any of those.
    "too_few_fields": 1e-6,
    "too_many_fields": 1e-6,
    "text_amount": 1e-6,
    "nan_amount": 1e-6,
    "empty_datetime": 1e-6,
    "impossible_date": 1e-6,
    "negative_amount": 1e-6,
    "label_2": 1e-6,
    "conflicting_duplicate": 1e-6,
}
FAULTS = tuple(_FAULT_SHARES)

# What the report counts for one row with the fault. Faults that leave a valid row are not here.
_COUNTED_AS = {
    "duplicate": ("duplicate",),
    # The number of the day is that of the written date, so it is one too low for the corrected instant.
    "hour_24": ("hour_24", "wrong_days"),
    "wrong_seconds": ("wrong_seconds",),
    "empty_terminal": ("unknown_terminal",),
    "err_terminal": ("unknown_terminal",),
    "unknown_customer": ("unknown_customer",),
    "too_few_fields": ("malformed_row",),
    "too_many_fields": ("malformed_row",),
    "text_amount": ("malformed_row",),
    "nan_amount": ("malformed_row",),
    "empty_datetime": ("invalid_datetime",),
    "impossible_date": ("invalid_datetime",),
    "negative_amount": ("invalid_amount",),
    "label_2": ("invalid_label",),
    "conflicting_duplicate": ("conflicting_duplicate", "conflicting_duplicate"),
}
_REJECTIONS = (
    "malformed_row",
    "invalid_datetime",
    "invalid_amount",
    "invalid_label",
    "conflicting_duplicate",
)
_MAX_FAULT_RATE = 1000.0

# Terminal ids far outside the range, and how many rows of the course's files have them.
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
_MAX_CENTS = 10**14  # keeps amounts that are multiplied again and again exact
_MEAN_SECOND, _SD_SECOND = 43_200.0, 20_000.0

# Independent random streams; the day is the last word of a stream's key.
_CUSTOMERS, _TERMINALS, _TOTALS, _TRANSACTIONS = 0, 1, 2, 3
_COMPROMISED_TERMINALS, _COMPROMISED_CUSTOMERS, _FAULTS = 4, 5, 6

_CHUNK_ROWS = 16_384  # lines formatted at once; the byte table then fits the processor's cache
_CHUNK_PAIRS = 2_000_000  # customer-terminal pairs measured at once


@dataclass(frozen=True)
class FileTruth:
    """What a correct cleaning of one simulated file finds.

    `name` is the file's name and `size_bytes` its size. `counts` has the keys of the cleaning report
    (raw_rows, clean_rows, duplicate_rows, rejected_rows and the names of the rules), and fraud_rows, the
    frauds among the clean rows. Fixes (hour_24, wrong_seconds, wrong_days, unknown_terminal,
    unknown_customer) are counted over clean rows.
    """

    name: str
    counts: dict[str, int]
    size_bytes: int


class _Population(NamedTuple):
    """Everybody who can make transactions: row i of each array is one customer."""

    customer_id: Integers
    cumulative_rate: Floats  # transactions a day inside the day, summed up to and including the customer
    mean_amount: Floats
    first_terminal: Integers  # the customer's terminals are terminal_id[first : first + number]
    number_of_terminals: Integers
    terminal_id: NDArray[np.int32]


class _Day(NamedTuple):
    """The transactions of one day, in the order of the file."""

    number: int
    date: date
    first_id: int
    customer_id: Integers
    terminal_id: Integers
    second: Integers
    cents: Integers
    scenario: Integers


@dataclass(frozen=True)
class Simulation:
    """Settings of a simulated data set, and the writer of its files.

    start: first day of the first file, and the base of tx_time_seconds and tx_time_days.
    days_per_file: days that a file covers.
    customers, terminals: how many there are; ids count from 0.
    radius: how far a customer goes for a terminal, in units of the 100 x 100 square.
    seed: another seed gives another data set.
    fault_rate: how many times as many faults as were counted in the course's files, 0..1000; 0 gives a clean
        file. At the default, about 2 % of the rows (of 300,000 rows, at least 15 have each fault on average).
    without: faults to leave out, names of `FAULTS`.
    large_amount: scenario 1, fraud above this amount.
    compromised_terminals_per_day, compromised_terminal_days: scenario 2.
    compromised_customers_per_day, compromised_customer_days, compromised_share, compromised_factor:
        scenario 3; the share of the customer's transactions that are fraud, and what multiplies the amount.

    Memory is bounded by the population and one day, whatever the number of files.
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
        for name in ("days_per_file", "customers", "terminals"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more.")
        if max(self.customers, self.terminals) > 2**31 - 1:
            raise ValueError("customers and terminals must be below 2,147,483,648 each: give fewer.")
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise ValueError(f"radius is {self.radius}: give a number above 0 (the handbook's is 5).")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give a whole number of 0 or more.")
        if not 0 <= self.fault_rate <= _MAX_FAULT_RATE:
            raise ValueError(f"fault_rate is {self.fault_rate}: give a number from 0 (no faults) to 1000.")
        if unknown := set(self.without) - set(FAULTS):
            raise ValueError(f"without names {', '.join(sorted(unknown))}: the faults are {', '.join(FAULTS)}.")
        if not (math.isfinite(self.large_amount) and self.large_amount >= 0):
            raise ValueError(f"large_amount is {self.large_amount}: give 0 or more (the handbook's is 220).")
        for name in ("compromised_terminal_days", "compromised_customer_days"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 (no such fraud) or more.")
        for name, limit in (("terminals", self.terminals), ("customers", self.customers)):
            value = getattr(self, f"compromised_{name}_per_day")
            if not 0 <= value <= limit:
                raise ValueError(f"compromised_{name}_per_day is {value}: give 0 (no such fraud) to {limit} ({name}).")
        if not 0 <= self.compromised_share <= 1:
            raise ValueError(f"compromised_share is {self.compromised_share}: give a number from 0 to 1.")
        if not 0 < self.compromised_factor <= 1000:
            raise ValueError(f"compromised_factor is {self.compromised_factor}: give a number above 0 to 1000.")

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
        """Write raw file `index` (from 0) to `out` and return what a correct cleaning finds in it.

        The file is the same whether or not the files before it are made: their transactions are only counted,
        so that the ids go on. `progress` is called after each day with the rows written so far.
        Raises ValueError as `file_name` does.
        """
        name = self.file_name(index)
        first_day = index * self.days_per_file
        first_id = sum(self._total(day) for day in range(first_day))
        out.write(HEADER)
        size_bytes = len(HEADER)
        faults: Counter[str] = Counter()
        rows = 0
        counts = dict.fromkeys(COUNTS, 0)
        for number in range(first_day, first_day + self.days_per_file):
            day = self._day(number, first_id)
            faulty = self._faulty_lines(day)
            for block in _format(day, {row: lines for row, _, lines in faulty}):
                out.write(block)
                size_bytes += len(block)
            size = day.customer_id.size
            first_id += size
            rows += size
            counts["fraud_rows"] += int((day.scenario > 0).sum())
            for row, fault, lines in faulty:
                faults[fault] += 1
                rows += len(lines) - 1
                if _COUNTED_AS.get(fault, ("",))[0] in _REJECTIONS:
                    counts["fraud_rows"] -= int(day.scenario[row] > 0)
            if progress is not None:
                progress(rows)
        for fault, number_of_rows in faults.items():
            for rule in _COUNTED_AS.get(fault, ()):
                counts[rule] += number_of_rows
        counts["raw_rows"] = rows
        counts["duplicate_rows"] = counts["duplicate"]
        counts["rejected_rows"] = sum(counts[rule] for rule in _REJECTIONS)
        counts["clean_rows"] = rows - counts["duplicate_rows"] - counts["rejected_rows"]
        return FileTruth(name, counts, size_bytes)

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
        number_of_terminals, terminal_id = _within_radius(customers, terminals, self.radius)
        first_terminal = np.cumsum(number_of_terminals) - number_of_terminals
        active = np.flatnonzero(number_of_terminals)
        # Chance that the second of the day, cut to a whole number, is 1..86,399.
        scale = _SD_SECOND * math.sqrt(2)
        inside = (math.erf((_DAY_SECONDS - _MEAN_SECOND) / scale) - math.erf((1 - _MEAN_SECOND) / scale)) / 2
        return _Population(
            customer_id=active,
            cumulative_rate=np.cumsum(rate[active] * inside),
            mean_amount=mean_amount[active],
            first_terminal=first_terminal[active],
            number_of_terminals=number_of_terminals[active],
            terminal_id=terminal_id,
        )

    def _total(self, day: int) -> int:
        """Number of transactions on a day; cheap, so that the ids of a late file need no simulation."""
        people = self._population
        if people.customer_id.size == 0:
            return 0
        return int(self._random(_TOTALS, day).poisson(people.cumulative_rate[-1]))

    def _day(self, number: int, first_id: int) -> _Day:
        import numpy as np

        people = self._population
        total = self._total(number)
        random = self._random(_TRANSACTIONS, number)
        # Uniform numbers in ascending order are normalised sums of exponential ones: no sorting by customer.
        waits = np.cumsum(random.standard_exponential(total + 1))
        if total:
            places = waits[:-1] * (people.cumulative_rate[-1] / waits[-1])
            who = np.searchsorted(people.cumulative_rate, places, side="right")
            # A product may round up to the very end of the last customer's interval.
            who = np.minimum(who, people.customer_id.size - 1)
        else:
            who = np.zeros(0, dtype=np.int64)
        customer_id = people.customer_id[who]
        choice = (random.random(total) * people.number_of_terminals[who]).astype(np.int64)
        terminal_id = people.terminal_id[people.first_terminal[who] + choice].astype(np.int64)

        second = random.normal(_MEAN_SECOND, _SD_SECOND, total)
        outside = np.flatnonzero((second < 1) | (second >= _DAY_SECONDS))
        while outside.size:
            second[outside] = random.normal(_MEAN_SECOND, _SD_SECOND, outside.size)
            outside = outside[(second[outside] < 1) | (second[outside] >= _DAY_SECONDS)]

        mean = people.mean_amount[who]
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
        """Terminals or customers of each window that is open on the day; none opens before the first day."""
        if stream == _COMPROMISED_TERMINALS:
            population, number = self.terminals, self.compromised_terminals_per_day
            length = self.compromised_terminal_days
        else:
            population, number = self.customers, self.compromised_customers_per_day
            length = self.compromised_customer_days
        for first in range(max(0, day - length + 1), day + 1):
            yield self._random(stream, first).choice(population, number, replace=False)

    def _faulty_lines(self, day: _Day) -> list[tuple[int, str, list[bytes]]]:
        """Rows with a fault, ascending: position in the day, fault, and the lines to write instead."""
        import numpy as np

        random = self._random(_FAULTS, day.number)
        shares = [0.0 if name in self.without else share for name, share in _FAULT_SHARES.items()]
        edges = np.cumsum(shares) * self.fault_rate
        drawn = random.random(day.customer_id.size)
        rows = np.flatnonzero(drawn < edges[-1])
        faults = np.searchsorted(edges, drawn[rows], side="right")
        shifts = random.integers(_WEEK_SECONDS, 8 * _WEEK_SECONDS, rows.size)
        weights = np.array(list(_FOREIGN_TERMINALS.values()), dtype=float)
        foreign = random.choice(list(_FOREIGN_TERMINALS), rows.size, p=weights / weights.sum())
        foreign[foreign < self.terminals] = max(_FOREIGN_TERMINALS)
        names = list(_FAULT_SHARES)
        return [
            (
                int(row),
                names[fault],
                _faulty_line(_fields(day, int(row)), names[fault], day, int(shift), int(terminal)),
            )
            for row, fault, shift, terminal in zip(rows, faults, shifts, foreign, strict=True)
        ]


def _within_radius(customers: Floats, terminals: Floats, radius: float) -> tuple[Integers, NDArray[np.int32]]:
    """Terminals nearer than `radius`: their number for each customer, and all their ids in that order.

    `customers` and `terminals` are (2, n) coordinates in the square. A customer is compared with the
    terminals of the 3 x 3 grid cells around, customers in chunks, so memory follows the result and not the
    product.
    """
    import numpy as np

    # A cell is at least `radius` wide; more cells than terminals would only be empty.
    side = max(1, min(int(_SQUARE / radius), math.isqrt(terminals.shape[1])))
    cell = np.minimum((terminals * (side / _SQUARE)).astype(np.int64), side - 1)
    number_of_cell = cell[0] * side + cell[1]
    order = np.argsort(number_of_cell, kind="stable")
    x, y = terminals[0][order], terminals[1][order]
    ids = order.astype(np.int32)
    first_in_cell = np.searchsorted(number_of_cell[order], np.arange(side * side + 1))

    pairs_per_customer = max(1.0, terminals.shape[1] * min(1.0, 9 / side**2))
    step = max(1, int(_CHUNK_PAIRS / pairs_per_customer))
    numbers, found = [], []
    for start in range(0, customers.shape[1], step):
        at = customers[:, start : start + step]
        home = np.minimum((at * (side / _SQUARE)).astype(np.int64), side - 1)
        low, high = np.maximum(home[1] - 1, 0), np.minimum(home[1] + 1, side - 1)
        # The three cells of one grid row lie side by side in the order of the cells: one range per row.
        grid_rows = home[0][:, None] + np.array([-1, 0, 1])
        valid = (grid_rows >= 0) & (grid_rows < side)
        grid_rows = np.clip(grid_rows, 0, side - 1)
        begin = first_in_cell[grid_rows * side + low[:, None]]
        end = first_in_cell[grid_rows * side + high[:, None] + 1]
        lengths = np.where(valid, end - begin, 0).ravel()
        ends = np.cumsum(lengths)
        candidate = np.arange(ends[-1]) + np.repeat(begin.ravel() - ends + lengths, lengths)
        customer = np.repeat(np.repeat(np.arange(at.shape[1]), 3), lengths)
        near = (at[0][customer] - x[candidate]) ** 2 + (at[1][customer] - y[candidate]) ** 2 < radius**2
        numbers.append(np.bincount(customer[near], minlength=at.shape[1]))
        found.append(ids[candidate[near]])
    return np.concatenate(numbers), np.concatenate(found)


def _fields(day: _Day, row: int) -> list[str]:
    """The nine fields of a row, as text."""
    second = int(day.second[row])
    scenario = int(day.scenario[row])
    return [
        str(day.first_id + row),
        f"{day.date.isoformat()} {second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}",
        str(day.customer_id[row]),
        str(day.terminal_id[row]),
        _amount(int(day.cents[row])),
        str(day.number * _DAY_SECONDS + second),
        str(day.number),
        str(int(scenario > 0)),
        str(scenario),
    ]


def _amount(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


def _faulty_line(fields: list[str], fault: str, day: _Day, shift: int, foreign_terminal: int) -> list[bytes]:
    """The line or, for duplicates, the two lines of a row with the fault. `fields` is changed."""
    original = list(fields)
    cents = round(float(fields[4]) * 100)
    match fault:
        case "hour_24":
            fields[1] = f"{day.date.isoformat()} 24:00:00"
            fields[5] = str((day.number + 1) * _DAY_SECONDS)
        case "wrong_seconds":
            # Weeks earlier; in the first weeks of the data set, where that would be negative, later.
            seconds = int(fields[5])
            fields[5] = str(seconds - shift if seconds >= shift else seconds + shift)
        case "empty_terminal":
            fields[3] = ""
        case "err_terminal":
            fields[3] = "Err"
        case "foreign_terminal":
            fields[3] = str(foreign_terminal)
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
            fields[1] = f"{day.date.year:04}-02-30{fields[1][10:]}"
        case "negative_amount":
            fields[4] = f"-{_amount(max(cents, 1))}"
        case "label_2":
            fields[7] = "2"
        case "conflicting_duplicate":
            fields[4] = _amount(cents + 100)
    lines = [original, fields] if fault in ("duplicate", "conflicting_duplicate") else [fields]
    return [",".join(line).encode() + b"\n" for line in lines]


def _format(day: _Day, replaced: dict[int, list[bytes]]) -> Iterator[bytes]:
    """The day's lines in blocks, `replaced` (position to lines, ascending) in the place of their rows.

    Formatting value by value in Python takes most of the time of a file, so a table of bytes is filled column
    by column, numbers right-aligned after zero bytes, and the zero bytes are deleted from the text.
    """
    import numpy as np

    second = np.arange(_DAY_SECONDS)
    clock = np.empty((_DAY_SECONDS, 8), dtype=np.uint8)
    clock[:, [2, 5]] = ord(":")
    for column, unit in ((0, second // 3600), (3, second // 60 % 60), (6, second % 60)):
        clock[:, column] = unit // 10 + ord("0")
        clock[:, column + 1] = unit % 10 + ord("0")

    total = day.customer_id.size
    pending = iter(replaced.items())
    at, lines = next(pending, (total, []))
    for start in range(0, total, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, total)
        part = slice(start, stop)
        columns: list[Any] = [
            _decimal(np.arange(day.first_id + start, day.first_id + stop)),
            f",{day.date.isoformat()} ".encode(),
            clock[day.second[part]],
            b",",
            _decimal(day.customer_id[part]),
            b",",
            _decimal(day.terminal_id[part]),
            b",",
            _decimal(day.cents[part] // 100),
            b".",
            _decimal(day.cents[part] % 100 + 100)[:, 1:],
            b",",
            _decimal(day.second[part] + day.number * _DAY_SECONDS),
            f",{day.number},".encode(),
            _decimal((day.scenario[part] > 0).astype(np.int64)),
            b",",
            _decimal(day.scenario[part]),
            b"\n",
        ]
        widths = [len(column) if isinstance(column, bytes) else column.shape[1] for column in columns]
        table = np.empty((stop - start, sum(widths)), dtype=np.uint8)
        place = 0
        for column, width in zip(columns, widths, strict=True):
            value = np.frombuffer(column, dtype=np.uint8) if isinstance(column, bytes) else column
            table[:, place : place + width] = value
            place += width
        pieces, done = [], start
        while at < stop:
            pieces += [_text(table[done - start : at - start]), *lines]
            done = at + 1
            at, lines = next(pending, (total, []))
        pieces.append(_text(table[done - start :]))
        yield b"".join(pieces)


def _text(table: NDArray[np.uint8]) -> bytes:
    return table.tobytes().translate(None, b"\0")


def _decimal(values: Integers) -> NDArray[np.uint8]:
    """Digits of numbers of 0 or more, as wide as the largest; zero bytes stand before the first digit."""
    import numpy as np

    width = len(str(int(values.max())))
    digits = np.empty((values.size, width), dtype=np.uint8)
    rest = values
    for column in range(width - 1, -1, -1):
        quotient = rest // 10
        digit = (rest - quotient * 10 + ord("0")).astype(np.uint8)
        if column < width - 1:
            digit[rest == 0] = 0
        digits[:, column] = digit
        rest = quotient
    return digits
