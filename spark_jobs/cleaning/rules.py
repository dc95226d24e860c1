"""The cleaning rules for one raw line, in plain Python: the reference for plain_lines.py."""

from __future__ import annotations

import math
import re
from datetime import date
from hashlib import blake2b
from typing import NamedTuple

from spark_jobs.schema import DAY_S, NO_KEY

#: Bits of `Line.rejected`: one per rule for a single row, and one for the header.
REJECT_BITS = {"malformed_row": 1, "invalid_datetime": 2, "invalid_amount": 4, "invalid_label": 8, "out_of_range": 64}
HEADER_BIT = 16

#: Bits of `Line.fixes`.
FIX_BITS = {"hour_24": 1, "wrong_seconds": 2, "wrong_days": 4, "respelled_id": 8}

FIELD_COUNT = 9

#: Longer lines are malformed and not parsed: splitting 100 MB of commas would exhaust an executor's memory.
MAX_ROW_BYTES = 4096

#: Placeholder for such a line in Python: also malformed, and never a header.
LONG_LINE = "0"

EPOCH_ORDINAL = date(1970, 1, 1).toordinal()

_BLANKS = bytes(range(0x21)) + b"\x7f"
_INTEGER = re.compile(rb"[+-]?[0-9]+")
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DECIMAL = re.compile(r"([+-]?)([0-9]*)\.?([0-9]*)(?:[eE]([+-]?[0-9]+))?")
#: Characters without width that str.strip() leaves: zero-width spaces and the byte order mark.
_INVISIBLE = "\u180e\u200b\u200c\u200d\u2060\ufeff"
_DATETIME = re.compile(rb"([0-9]{4})-([0-9]{2})-([0-9]{2}) ([0-9]{2}):([0-9]{2}):([0-9]{2})")


class Line(NamedTuple):
    """A parsed line. If it is rejected, its values are meaningless.

    Attributes:
        rejected: 0, or the bits of REJECT_BITS that apply, or HEADER_BIT.
        tx_unix_seconds: the instant, in seconds since 1970 (UTC).
        customer_id, terminal_id: NO_KEY if the raw value is not a key.
        fixes: bits of FIX_BITS.
        content: hash of the line, which identifies copies.
    """

    rejected: int
    transaction_id: int = 0
    tx_unix_seconds: int = 0
    customer_id: int = NO_KEY
    terminal_id: int = NO_KEY
    tx_amount: float = 0.0
    tx_fraud: int = 0
    tx_fraud_scenario: int = 0
    fixes: int = 0
    content: int = 0


def parse_line(line: bytes, header: bytes | None, epoch: int, seed: int) -> Line:
    """Parse a line without its line end. `epoch` is in Unix seconds; the 64-bit `seed` makes hashes unpredictable."""
    if line == header:
        return Line(HEADER_BIT)
    if line.count(b",") != FIELD_COUNT - 1:
        return Line(REJECT_BITS["malformed_row"])
    fields = [field.strip(_BLANKS) for field in line.split(b",")]
    transaction_id, amount = _integer(fields[0], 64), _number(fields[4])
    fraud, scenario = _integer(fields[7], 32), _integer(fields[8], 32)
    unix_seconds, is_hour_24 = _instant(fields[1])
    rejected = 0
    if transaction_id is None or amount is None or fraud is None or scenario is None:
        rejected |= REJECT_BITS["malformed_row"]
    if unix_seconds is None:
        rejected |= REJECT_BITS["invalid_datetime"]
    if amount is not None and amount < 0:
        rejected |= REJECT_BITS["invalid_amount"]
    if fraud not in (None, 0, 1):
        rejected |= REJECT_BITS["invalid_label"]
    # Every None has set a bit; the comparisons are for the type checker.
    if (
        rejected
        or transaction_id is None
        or unix_seconds is None
        or amount is None
        or fraud is None
        or scenario is None
    ):
        return Line(rejected)
    seconds = unix_seconds - epoch
    fixes = FIX_BITS["hour_24"] if is_hour_24 else 0
    if _integer(fields[5], 64) != seconds:
        fixes |= FIX_BITS["wrong_seconds"]
    if _integer(fields[6], 64) != seconds // DAY_S:
        fixes |= FIX_BITS["wrong_days"]
    (customer, customer_respelled), (terminal, terminal_respelled) = key_of(fields[2]), key_of(fields[3])
    if customer_respelled or terminal_respelled:
        fixes |= FIX_BITS["respelled_id"]
    return Line(
        rejected=0,
        transaction_id=transaction_id,
        tx_unix_seconds=unix_seconds,
        customer_id=customer,
        terminal_id=terminal,
        tx_amount=amount,
        tx_fraud=fraud,
        tx_fraud_scenario=scenario,
        fixes=fixes,
        content=hash_text(line, seed),
    )


def hash_text(text: bytes, seed: int) -> int:
    """A hash of 64 bits that nobody can foresee without the seed."""
    return int.from_bytes(blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def key_of(field: bytes) -> tuple[int, bool]:
    """(customer or terminal, NO_KEY if it is unknown; True if it is an integer by value alone).

    By value means ``711.0``, ``7.11E2``, or any kind of space around it. It is read as decimal text, never through a
    float, and only if the written digits determine the integer: ``9.901E+05`` may stand for a hundred of them.
    """
    field = field.strip(_BLANKS)
    value = _integer(field, 64)
    respelled = value is None
    if respelled:
        value = _integer_by_value(field)
    return (NO_KEY, False) if value is None or value < 0 else (value, respelled)


def _integer_by_value(field: bytes) -> int | None:
    try:
        text = field.decode("utf-8")
    except UnicodeDecodeError:
        text = field.decode("iso-8859-1")
    match = _DECIMAL.fullmatch(text.strip().strip(_INVISIBLE).strip())
    if not match:
        return None
    sign, whole, fraction, exponent = match.groups()
    digits, shift = whole + fraction, int(exponent or 0)
    point = max(0, len(whole) + shift)
    if not digits or shift > len(fraction) or digits[point:].strip("0"):
        return None
    number = digits[:point].lstrip("0") or "0"
    value = int(number) if len(number) <= 19 else 1 << 63
    return None if value >= 1 << 63 else -value if sign == "-" else value


def header_line(head: bytes) -> bytes | None:
    """Header of a file that begins with `head`, without its line end; None if the file has no header.

    A header is the first non-empty line, if it cannot be data: it starts with ``#``, or its first field is not a
    number, its second does not have the shape of a datetime and its fifth is not a number. Lines longer than
    MAX_ROW_BYTES, or with a NUL or a CR within, are malformed rows.
    """
    if head.startswith(b"\xef\xbb\xbf"):  # a byte order mark, which Spark's reader drops as well
        head = head[3:]
    first = next((line for line in (line.rstrip(b"\r") for line in head.split(b"\n")) if line), b"")
    if not first or len(first) > MAX_ROW_BYTES or b"\0" in first or b"\r" in first:
        return None
    fields = [field.strip(_BLANKS) for field in first.split(b",")] + [b""] * FIELD_COUNT
    is_row = _NUMBER.fullmatch(fields[0]) or _DATETIME.fullmatch(fields[1]) or _NUMBER.fullmatch(fields[4])
    return None if is_row and not first.startswith(b"#") else first


def has_only_carriage_returns(head: bytes) -> bool:
    """True if lines end with CR alone, which would make the whole file one line."""
    return b"\r" in head and b"\n" not in head


def _integer(field: bytes, bits: int) -> int | None:
    """Parse a field as a signed integer of `bits` bits; None if it is not one."""
    # int() takes quadratic time in the number of digits.
    if not _INTEGER.fullmatch(field) or len(field.lstrip(b"+-0")) > 20:
        return None
    value = int(field)
    return value if -(1 << (bits - 1)) <= value < 1 << (bits - 1) else None


def _number(field: bytes) -> float | None:
    """Parse a field as a finite number; None if it is not one."""
    value = float(field) if _NUMBER.fullmatch(field) else math.inf
    return value if math.isfinite(value) else None


def _instant(field: bytes) -> tuple[int | None, bool]:
    """(Unix seconds, or None for an invalid instant; True if it is written as 24:00:00)."""
    match = _DATETIME.fullmatch(field)
    if not match:
        return None, False
    year, month, day, hour, minute, second = map(int, match.groups())
    is_hour_24 = (hour, minute, second) == (24, 0, 0)
    if not is_hour_24 and (hour > 23 or minute > 59 or second > 59):
        return None, False
    try:
        days = date(year, month, day).toordinal()
    except ValueError:
        return None, False
    # The next day would be in the year 10000, which most readers cannot represent.
    if is_hour_24 and days == date.max.toordinal():
        return None, False
    return (days - EPOCH_ORDINAL) * DAY_S + hour * 3600 + minute * 60 + second, is_hour_24
