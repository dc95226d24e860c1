"""Vectorized parsing of plain lines, which are nearly all lines of a real file, in numpy.

A plain line has nine fields of digits only (the amount with a decimal point, the instant as YYYY-MM-DD HH:MM:SS), short
enough for the arithmetic here: eight characters are loaded as one 64-bit word, then validated and converted together.
Only customer and terminal may hold any text.
All other lines go to rules.parse_line, which gives the same result for plain lines.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

from spark_jobs.cleaning.rules import FIELD_COUNT, FIX_BITS, REJECT_BITS, hash_text, key_of, parse_line
from spark_jobs.schema import DAY_S

if TYPE_CHECKING:
    from spark_jobs.cleaning.bulk import Bounds
    from spark_jobs.io.blocks import Array, Columns

#: Columns of parsed lines (see rules.Line): name, numpy type.
LINE_COLUMNS = (
    ("rejected", "u1"),
    ("transaction_id", "i8"),
    ("tx_unix_seconds", "i8"),
    ("customer_id", "i8"),
    ("terminal_id", "i8"),
    ("tx_amount", "f8"),
    ("tx_fraud", "i4"),
    ("tx_fraud_scenario", "i4"),
    ("fixes", "u1"),
    ("content", "u8"),
)

#: Bytes required before the first line and after the last.
PADDING = 16

#: Characters loaded as one word.
WORD = 8

#: Days per month. February 29 is left to parse_line.
_MONTH_DAYS = (0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

#: Mask for lengths used as table indices, so that the lengths of fields that are not plain stay in bounds.
_LENGTHS = 31

#: Longest text that `_key_and_hash` remembers: hostile ones are not to fill the memory.
_REMEMBERED_LENGTH = 64

# Words of eight equal bytes.
_ZEROS, _SIXES, _HIGH_HALVES = 0x3030303030303030, 0x0606060606060606, 0xF0F0F0F0F0F0F0F0


class Parser:
    """Parser for the lines of one file, usable in any process. Hashes are comparable only within one parser.

    `header` is the file's header line, `epoch` is in Unix seconds. Good rows outside `bounds` are rejected.
    """

    def __init__(self, header: bytes | None, epoch: int) -> None:
        self.header = header
        self.epoch = epoch
        self.bounds: Bounds | None = None
        self._seed = int.from_bytes(os.urandom(8), "little")

    def parse(self, data: Array, offsets: Array) -> Columns:
        """See parse_lines."""
        rows = parse_lines(data, offsets, self.header, self.epoch, self._seed)
        if self.bounds is not None:
            for name, (low, high) in zip(("transaction_id", "tx_unix_seconds"), self.bounds):
                is_outside = (rows["rejected"] == 0) & ((rows[name] < low) | (rows[name] > high))
                rows["rejected"][is_outside] = REJECT_BITS["out_of_range"]
        return rows


def parse_lines(data: Array, offsets: Array, header: bytes | None, epoch: int, seed: int) -> Columns:
    """LINE_COLUMNS of the lines that are not empty, and `line`, their line numbers.

    `data` holds the bytes of all lines, one after another, with PADDING bytes before and after; line i is
    ``data[offsets[i]:offsets[i + 1]]``. `header`, `epoch` and `seed` are those of parse_line.
    """
    import numpy as np

    start, stop = offsets[:-1], offsets[1:]
    commas = np.flatnonzero(data == ord(","))
    # Index of the first comma of each line, and of the line after the last.
    first_comma = np.searchsorted(commas, offsets)
    ends_in_return = (stop > start) & (data[stop - 1] == ord("\r"))
    while ends_in_return.any():
        stop = stop - ends_in_return
        ends_in_return = (stop > start) & (data[stop - 1] == ord("\r"))
    rows = np.flatnonzero(np.diff(first_comma) == FIELD_COUNT - 1)
    separators = [commas[first_comma[rows] + number] for number in range(FIELD_COUNT - 1)]
    begins, ends = [start[rows], *(comma + 1 for comma in separators)], [*separators, stop[rows]]
    fields = _Fields(data, begins, ends, seed)
    plain = _plain_columns(fields, epoch)
    rows = rows[fields.plain]
    is_plain = np.zeros(len(start), dtype=bool)
    is_plain[rows] = True
    other_numbers, others = [], []
    for number in np.flatnonzero(~is_plain):
        line = data[start[number] : stop[number]].tobytes()
        if line:
            other_numbers.append(number)
            others.append(parse_line(line, header, epoch, seed))
    columns = {"line": np.concatenate([rows, np.array(other_numbers, dtype="i8")])}
    for index, (name, kind) in enumerate(LINE_COLUMNS):
        values = np.array([other[index] for other in others], dtype=kind)
        columns[name] = np.concatenate([plain[name].astype(kind, copy=False), values])
    return columns


def _plain_columns(fields: _Fields, epoch: int) -> Columns:
    """LINE_COLUMNS of the plain lines."""
    import numpy as np

    values = {
        "rejected": np.zeros(len(fields.plain), dtype="u1"),
        "transaction_id": fields.integer(0, 2 * WORD),
        "tx_unix_seconds": fields.instant(1),
    }
    values["customer_id"], customer_respelled = fields.key(2)
    values["terminal_id"], terminal_respelled = fields.key(3)
    values["tx_amount"] = fields.amount(4)
    seconds = values["tx_unix_seconds"] - epoch
    wrong_seconds = fields.integer(5, 2 * WORD) != seconds
    wrong_days = fields.integer(6) != seconds // DAY_S
    values["fixes"] = (
        wrong_seconds * FIX_BITS["wrong_seconds"]
        + wrong_days * FIX_BITS["wrong_days"]
        + (customer_respelled | terminal_respelled) * FIX_BITS["respelled_id"]
    )
    values["tx_fraud"], values["tx_fraud_scenario"] = fields.two_digits(7, 8)
    values["content"] = fields.content
    fields.require(values["tx_fraud"] <= 1)
    return {name: column[fields.plain] for name, column in values.items()}


class _Fields:
    """Fields of lines that have nine; each field is read for all lines at once.

    Attributes:
        plain: True for lines whose fields read so far are all plain. The values of other lines are meaningless.
        content: hash of a line's fields read so far.
    """

    def __init__(self, data: Array, begins: list[Array], ends: list[Array], seed: int) -> None:
        import numpy as np

        self._bytes = data
        # A view of the eight bytes that start at each position. Little-endian: the first character is the lowest byte.
        self._words = np.ndarray((len(data) - WORD + 1,), "<u8", data.data, strides=(1,))
        self._begins, self._ends, self._seed = begins, ends, seed
        # Masks that keep the last n characters of a word, by n & _LENGTHS; from n = 8 on, all of them.
        full = (1 << 64) - 1
        last = [full ^ (full >> 8 * min(n, WORD)) for n in range(_LENGTHS + 1)]
        self._last = np.array(last, dtype="u8")
        self.plain = np.ones(len(begins[0]), dtype=bool)
        self.content = np.full(len(begins[0]), seed, dtype="u8")

    def require(self, condition: Array) -> None:
        """Mark lines as not plain unless they meet `condition`."""
        self.plain &= condition

    def integer(self, field: int, longest: int = WORD) -> Array:
        """Read a field of at most `longest` (8 or 16) digits."""
        import numpy as np

        length = self._length(field, longest)
        end = self._ends[field]
        value = self._digits(end, self._last[length & _LENGTHS])
        if longest > WORD:
            if (length > WORD).any():
                before = self._last[(np.maximum(length, WORD) - WORD) & _LENGTHS]
                value += self._digits(end - WORD, before) * 10**WORD
            else:
                # As in batches with longer fields, so that copies of a line have equal hashes.
                self._hash(np.zeros(1, dtype="u8"))
        return value

    def key(self, field: int) -> tuple[Array, Array]:
        """Read a customer or terminal in any spelling: (values, NO_KEY where it is unknown; where it is respelled).

        Spellings other than up to eight digits are read one by one, but each text only once in a while.
        """
        import numpy as np

        begin, end = self._begins[field], self._ends[field]
        length = end - begin
        text = self._words[end - WORD] & self._last[length & _LENGTHS]
        digits = text ^ (np.uint64(_ZEROS) & self._last[length & _LENGTHS])
        is_plain = ((length - 1).view("u8") < WORD) & _are_digits(digits)
        values, respelled = _number_of(digits), np.zeros(len(text), dtype=bool)
        others = np.flatnonzero(self.plain & ~is_plain)
        if len(others):
            content = self._bytes.tobytes()
            ends = zip(begin[others].tolist(), end[others].tolist())
            keys = [_key_and_hash(content[first:last], self._seed) for first, last in ends]
            for column, found, kind in zip((values, respelled, text), zip(*keys), ("i8", "bool", "u8")):
                column[others] = np.array(found, dtype=kind)
        self._hash(text)
        return values, respelled

    def two_digits(self, field: int, other: int) -> tuple[Array, Array]:
        """Read two fields of one digit each."""
        import numpy as np

        texts = []
        for number in (field, other):
            self._length(number, 1)
            texts.append(self._bytes[self._begins[number]])
        self._hash(texts[0].astype("u8") << np.uint64(8) | texts[1])
        values = [text - np.uint8(ord("0")) for text in texts]
        for value in values:
            self.require(value <= 9)
        return values[0], values[1]

    def amount(self, field: int) -> Array:
        """Read a field of at most eight characters: digits, with an optional point before the last one to three."""
        import numpy as np

        length = self._length(field, WORD)
        text = self._text(self._ends[field], self._last[length & _LENGTHS])
        decimals = np.zeros(len(text), dtype="i8")
        for count in (3, 1, 2):
            is_point = _byte(text, WORD - 1 - count) == ord(".")
            decimals[is_point] = count
        has_point = decimals > 0
        self.require(length > decimals + has_point)
        # Close the gap left by the point.
        fraction, whole = text & self._last[decimals], text & ~self._last[np.minimum(decimals + 1, WORD)]
        text = np.where(has_point, fraction | (whole << np.uint64(8)), text)
        digits = self._value(text, self._last[(length - has_point) & _LENGTHS])
        # Both operands are exact, so the quotient is the double nearest to the decimal number.
        return digits / np.array([1.0, 10.0, 100.0, 1000.0])[decimals]

    def instant(self, field: int) -> Array:
        """Read a field YYYY-MM-DD HH:MM:SS as Unix seconds."""
        import numpy as np

        begin, end = self._begins[field], self._ends[field]
        self.require(end - begin == len("YYYY-MM-DD HH:MM:SS"))
        year_month, day, time = self._words[begin], self._words[begin + 8], self._words[end - 8]
        values = []
        for word, pattern in ((year_month, "0000-00-"), (day, "00 00:00"), (time, "00:00:00")):
            self._hash(word)
            marks = np.uint64(_word_of("".join("\0" if char == "0" else char for char in pattern)))
            places = np.uint64(_word_of("".join("\xff" if char == "0" else "\0" for char in pattern)))
            self.require(word & ~places == marks)
            digits = (word ^ np.uint64(_ZEROS)) & places
            self.require(_are_digits(digits))
            values.append(digits)
        year = _pair(values[0], 0) * 100 + _pair(values[0], 2)
        month, day = _pair(values[0], 5), _pair(values[1], 0)
        hour, minute, second = (_pair(values[2], index) for index in (0, 3, 6))
        self.require((year >= 1) & (month >= 1) & (month <= 12) & (day >= 1))
        self.require(day <= np.array(_MONTH_DAYS)[np.minimum(month, 12)])
        self.require((hour < 24) & (minute < 60) & (second < 60))
        return _days(year, month, day) * DAY_S + hour * 3600 + minute * 60 + second

    def _length(self, field: int, longest: int) -> Array:
        """Length of a field; a line is not plain unless it is 1 to `longest`."""
        length = self._ends[field] - self._begins[field]
        self.require((length - 1).view("u8") < longest)
        return length

    def _digits(self, end: Array, mask: Array) -> Array:
        """Value of the digits before `end` selected by `mask`."""
        return self._value(self._text(end, mask), mask)

    def _text(self, end: Array, mask: Array) -> Array:
        """Hash and return the characters before `end` selected by `mask`, as the last ones of a word."""
        text: Array = self._words[end - WORD] & mask
        self._hash(text)
        return text

    def _value(self, text: Array, mask: Array) -> Array:
        """Value of the characters of `text` selected by `mask`, which must be digits; the other bytes are 0."""
        import numpy as np

        digits = text ^ (np.uint64(_ZEROS) & mask)
        self.require(_are_digits(digits))
        return _number_of(digits)

    def _hash(self, word: Array) -> None:
        """Mix a word into the hash `content`, with the constants of MurmurHash3's finalizer."""
        import numpy as np

        hashed = (self.content ^ word) * np.uint64(0xFF51AFD7ED558CCD)
        hashed ^= hashed >> np.uint64(33)
        hashed *= np.uint64(0xC4CEB9FE1A85EC53)
        hashed ^= hashed >> np.uint64(33)
        self.content = hashed


def _number_of(digits: Array) -> Array:
    """Numbers of eight digits, one in each byte: adjacent ones become numbers below 100, then four of these one."""
    import numpy as np

    u = np.uint64
    pairs = digits * u(10) + (digits >> u(8))
    even = (pairs & u(0x000000FF000000FF)) * u((1000000 << 32) + 100)
    odd = ((pairs >> u(16)) & u(0x000000FF000000FF)) * u((10000 << 32) + 1)
    value: Array = ((even + odd) >> u(32)).view("i8")
    return value


def _key_and_hash(text: bytes, seed: int) -> tuple[int, bool, int]:
    """(key_of(text), and a hash of the text). The memory of short texts is what makes respelled files fast."""
    return (_remembered if len(text) <= _REMEMBERED_LENGTH else _remembered.__wrapped__)(text, seed)


@lru_cache(maxsize=1 << 16)
def _remembered(text: bytes, seed: int) -> tuple[int, bool, int]:
    key, respelled = key_of(text)
    return key, respelled, hash_text(text, seed)


def _word_of(text: str) -> int:
    return int.from_bytes(text.encode("latin-1"), "little")


def _byte(word: Array, index: int) -> Array:
    import numpy as np

    return (word >> np.uint64(8 * index)) & np.uint64(0xFF)


def _pair(digits: Array, index: int) -> Array:
    """Value of the two digits that start at `index`."""
    import numpy as np

    pair: Array = (_byte(digits, index) * np.uint64(10) + _byte(digits, index + 1)).view("i8")
    return pair


def _are_digits(values: Array) -> Array:
    """True where all bytes are below 10. Only a byte of 10 or more can carry into its neighbour."""
    import numpy as np

    return ((values | (values + np.uint64(_SIXES))) & np.uint64(_HIGH_HALVES)) == 0


def _days(year: Array, month: Array, day: Array) -> Array:
    """Days since 1970-01-01 in the Gregorian calendar.

    Years start in March, so that a leap day comes last: Richards, in Explanatory Supplement to the Astronomical
    Almanac, 3rd edition, 15.11.
    """
    year = year - (month <= 2)
    months = (month + 9) % 12
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * months + 2) // 5 + day - 719469
