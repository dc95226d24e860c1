"""The cleaning rules for one raw line, in plain Python: the reference for plain_lines.py."""

from __future__ import annotations

import math
import re
from datetime import date
from hashlib import blake2b
from typing import NamedTuple

from spark_jobs.schema import DAY_S, NO_KEY

#: Bits of `Line.rejected`: one per rule for a single row, and one for the header.
REJECT_BITS = {"malformed_row": 1, "invalid_datetime": 2, "invalid_amount": 4, "invalid_label": 8}
HEADER_BIT = 16

#: Bits of `Line.fixes`.
FIX_BITS = {"hour_24": 1, "wrong_seconds": 2, "wrong_days": 4}

FIELD_COUNT = 9

#: Longer lines are malformed and not parsed: splitting 100 MB of commas would exhaust an executor's memory.
MAX_ROW_BYTES = 4096

#: Placeholder for such a line in Python: also malformed, and never a header.
LONG_LINE = "0"

EPOCH_ORDINAL = date(1970, 1, 1).toordinal()

_BLANKS = bytes(range(0x21)) + b"\x7f"
_INTEGER = re.compile(rb"[+-]?[0-9]+")
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
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
    return Line(
        rejected=0,
        transaction_id=transaction_id,
        tx_unix_seconds=unix_seconds,
        customer_id=_key(fields[2]),
        terminal_id=_key(fields[3]),
        tx_amount=amount,
        tx_fraud=fraud,
        tx_fraud_scenario=scenario,
        fixes=fixes,
        content=int.from_bytes(blake2b(line, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little"),
    )


def header_line(head: bytes) -> bytes | None:
    """Header of a file that begins with `head`, without its line end; None if the file has no header.

    A header is the first non-empty line, if it starts with ``#`` or its first field is not a number. A first
    line longer than MAX_ROW_BYTES is a malformed row.
    """
    if head.startswith(b"\xef\xbb\xbf"):  # a byte order mark, which Spark's reader drops as well
        head = head[3:]
    first = next((line for line in (line.rstrip(b"\r") for line in head.split(b"\n")) if line), b"")
    if not first or len(first) > MAX_ROW_BYTES:
        return None
    is_row = _NUMBER.fullmatch(first.split(b",")[0].strip(_BLANKS)) and not first.startswith(b"#")
    return None if is_row else first


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


def _key(field: bytes) -> int:
    value = _integer(field, 64)
    return NO_KEY if value is None or value < 0 else value


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
