"""Lines parsed by numpy: the same results as from parse_line, whatever the bytes."""

from __future__ import annotations

import random
import re
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spark_jobs.cleaning.plain_lines import LINE_COLUMNS, PADDING, parse_lines
from spark_jobs.cleaning.rules import Line, key_of, parse_line
from spark_jobs.schema import NO_KEY

EPOCH = 1566432000  # 2019-08-22
HEADER = b"# tranaction_id | tx_datetime"
SEED = 2**63 + 5


def parsed(lines: list[bytes]) -> dict[int, Line]:
    """The results of parse_lines by line number."""
    data = np.frombuffer(bytes(PADDING) + b"".join(lines) + bytes(PADDING), dtype="u1")
    offsets = np.cumsum([PADDING, *map(len, lines)])
    columns = parse_lines(data, offsets, HEADER, EPOCH, SEED)
    assert [columns[name].dtype for name, _ in LINE_COLUMNS] == [np.dtype(kind) for _, kind in LINE_COLUMNS]
    values = zip(*[columns[name].tolist() for name, _ in LINE_COLUMNS])
    return dict(zip(columns["line"].tolist(), map(Line._make, values)))


def require_same(lines: list[bytes]) -> None:
    """Both ways agree on all fields but the hash, which is equal for equal lines alone."""
    texts = [line.rstrip(b"\r") for line in lines]
    expected = {n: parse_line(text, HEADER, EPOCH, SEED) for n, text in enumerate(texts) if text}
    found = parsed(lines)
    assert {n: line._replace(content=0) for n, line in found.items()} == {
        n: line._replace(content=0) for n, line in expected.items()
    }
    hashes: dict[int, bytes] = {}
    for n, line in found.items():
        if not line.rejected:
            assert hashes.setdefault(line.content, texts[n]) == texts[n]
    assert len(hashes) == len({texts[n] for n, line in found.items() if not line.rejected})


DIGITS = st.integers(0, 10**18).map(str)
DAYS = st.dates().map(lambda day: f"{day.year:04d}-{day.month:02d}-{day.day:02d}")
TIMES = st.tuples(st.integers(0, 25), st.integers(0, 61), st.integers(0, 61)).map(
    lambda parts: "{:02d}:{:02d}:{:02d}".format(*parts)
)
ODD = st.sampled_from(
    ["", "Err", "-1", "-999999", "+7", " 5 ", "1e3", "7.", ".5", "1.2.3", "0x1", "24:00:00", "٣", "/", ":"]
)
SHORT = st.integers(0, 10**9).map(str)
#: An id in the spellings of pandas, Excel and people.
SPELLED = st.tuples(
    st.sampled_from(["", "+", "-", "\u00a0", "\u2003 ", "\ufeff", " "]),
    st.one_of(
        st.integers(0, 10**20).map("{}.0".format),
        st.integers(0, 10**20).map("{:e}".format),
        st.decimals(0, 10**6, places=3).map("{:E}".format),
        st.tuples(st.integers(0, 999), st.integers(-5, 30)).map("{0[0]}E{0[1]}".format),
        st.integers(0, 10**20).map(str),
    ),
    st.sampled_from(["", ".", "0", "\u3000", "\xa0", "E0"]),
).map("".join)
AMOUNT = st.one_of(
    st.decimals(0, 10**6, places=2).map(str), st.decimals(0, 100, places=3).map(str), SHORT, st.floats().map(repr), ODD
)
FIELDS = st.tuples(
    st.one_of(DIGITS, SHORT, ODD),
    st.one_of(st.tuples(DAYS, TIMES).map(" ".join), st.text("0123456789-: ", min_size=18, max_size=20)),
    st.one_of(SHORT, ODD, SPELLED),
    st.one_of(SHORT, ODD, SPELLED),
    AMOUNT,
    st.one_of(DIGITS, SHORT, ODD),
    st.one_of(SHORT, ODD),
    st.sampled_from(["0", "1", "2", "", "01"]),
    st.one_of(st.sampled_from(["0", "1", "2", "3"]), SHORT, ODD),
)
LINES = st.one_of(
    FIELDS.map(lambda fields: ",".join(fields).encode()),
    FIELDS.map(lambda fields: (",".join(fields) + "\r").encode()),
    st.lists(st.binary(max_size=8).map(lambda field: field.replace(b"\n", b"")), max_size=11).map(b",".join),
    st.sampled_from([HEADER, b"", b"\r", b"," * 8, b"," * 300]),
)


@pytest.mark.images
@settings(max_examples=200, deadline=None)
@given(st.lists(LINES, max_size=12))
@example([b"5,2020-02-29 06:51:03,17,711,70.91,24663,0,0,0", b"5,2019-02-29 06:51:03,17,711,70.91,24663,0,0,0"])
@example([])
@example([b"", b"\r"])
@example([HEADER, HEADER + b" "])
@example([b"5,0000-01-01 00:00:00,1,1,1,0,0,0,0", b"5,9999-12-31 23:59:59,1,1,1,0,0,0,0"])
def test_any_lines_are_parsed_as_one_by_one(lines: list[bytes]) -> None:
    require_same(lines)


@given(SPELLED)
@example("9.901E+05")
@example("9.901E+03")
@example("0.0")
@example("9223372036854775807.0")
@example("9223372036854775808.0")
@example("1.0E999999999")
@example("0.0E-999999999")
def test_an_id_is_read_if_its_digits_determine_an_integer(text: str) -> None:
    key, respelled = key_of(text.encode())
    bare = re.sub(r"[\s\ufeff]+", lambda match: " ", text).strip()
    match = re.fullmatch(r"([+-]?)([0-9]*)\.?([0-9]*)(?:E\+?(-?[0-9]+))?", bare, re.IGNORECASE)
    if not match:  # for instance two points
        assert (key, respelled) == (NO_KEY, False)
        return
    sign, whole, fraction, exponent = match.groups()
    shift = int(exponent or 0)
    if shift > len(fraction):
        assert (key, respelled) == (NO_KEY, False)
        return
    if abs(shift) > 1000:
        return
    value = Fraction(int(whole + fraction), 10 ** len(fraction)) * Fraction(10) ** shift
    value = -value if sign == "-" else value
    is_key = value.denominator == 1 and 0 <= value < 2**63
    assert key == (value if is_key else NO_KEY)
    assert respelled == (is_key and not re.fullmatch(r"[+-]?[0-9]+", text.strip(" ")))


def usual_lines(count: int) -> list[bytes]:
    """Lines of many days and sizes, like those of real files."""
    numbers = random.Random(5)

    def number(digits: int) -> int:
        return numbers.randrange(10 ** numbers.randrange(1, digits))

    lines = []
    for _ in range(count):
        instant = datetime(1900, 1, 1) + timedelta(seconds=numbers.randrange(100_000 * 86400))
        amount = round(numbers.random() * 10 ** numbers.randrange(1, 5), numbers.randrange(4))
        keys, times, labels = (number(9), number(5)), (number(11), number(5)), (number(2) % 2, number(2) % 4)
        fields = (number(17), instant, *keys, amount, *times, *labels)
        lines.append(",".join(map(str, fields)).encode())
    return lines


def test_usual_lines_go_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = usual_lines(20000)
    require_same(lines)
    one_by_one = []

    def counted(line: bytes, *rest: Any) -> Line:
        one_by_one.append(line)
        return parse_line(line, *rest)

    monkeypatch.setattr("spark_jobs.cleaning.plain_lines.parse_line", counted)
    parsed(lines)
    # February 29 alone goes the slow way.
    assert 0 < len(one_by_one) < 30
    assert all(b"-02-29 " in line for line in one_by_one)


@pytest.mark.images
def test_rows_that_differ_in_a_digit_have_other_hashes() -> None:
    """The hash alone separates copies from conflicts."""
    line = b"1234567890,2019-08-22 06:51:03,17345678,711,1570.91,1024663,1170,0,0"
    lines = [line]
    for position, char in enumerate(line):
        if chr(char).isdigit():
            lines += [line[:position] + digit + line[position + 1 :] for digit in (b"0", b"1", b"2")]
    require_same(list(dict.fromkeys(lines)))


@pytest.mark.images
def test_equal_lines_have_equal_hashes_in_any_batch() -> None:
    """Batches with ids or seconds of more than eight digits read them in two parts, others in one."""
    short = b"5,2019-08-22 06:51:03,17,711,70.91,24663,0,0,0"
    long = b"123456789012,2019-08-22 06:51:03,17,711,70.91,123456789012,0,0,0"
    alone = parsed([short])[0]
    assert not alone.rejected
    assert parsed([short, long])[0] == parsed([long, short])[1] == alone
