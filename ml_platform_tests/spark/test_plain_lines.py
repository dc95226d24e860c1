"""The lines that numpy parses: exactly those of parse_line, whatever the bytes."""

from __future__ import annotations

import random
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spark_jobs.cleaning.plain_lines import LINE_COLUMNS, PADDING, parse_lines
from spark_jobs.cleaning.rules import HEADER_BIT, Line, parse_line

if TYPE_CHECKING:
    import pytest

EPOCH = 1566432000  # 2019-08-22
HEADER = b"# tranaction_id | tx_datetime"
SEED = 2**63 + 5


def parsed(lines: list[bytes]) -> dict[int, Line]:
    """What parse_lines makes of `lines`, by their numbers."""
    data = np.frombuffer(bytes(PADDING) + b"".join(lines) + bytes(PADDING), dtype="u1")
    offsets = np.cumsum([PADDING, *map(len, lines)])
    columns = parse_lines(data, offsets, HEADER, EPOCH, SEED)
    assert [columns[name].dtype for name, _ in LINE_COLUMNS] == [np.dtype(kind) for _, kind in LINE_COLUMNS]
    values = zip(*[columns[name].tolist() for name, _ in LINE_COLUMNS])
    return dict(zip(columns["line"].tolist(), map(Line._make, values)))


def require_same(lines: list[bytes]) -> None:
    """Both ways agree on every line: on the bits of rejected ones, on all but the hash of others."""
    texts = [line.rstrip(b"\r") for line in lines]
    expected = {n: parse_line(text, HEADER, EPOCH, SEED) for n, text in enumerate(texts) if text}
    found = parsed(lines)
    assert {n: line._replace(content=0) for n, line in found.items()} == {
        n: line._replace(content=0) for n, line in expected.items()
    }
    # Equal hashes mean equal lines, and the reverse.
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
AMOUNT = st.one_of(
    st.decimals(0, 10**6, places=2).map(str), st.decimals(0, 100, places=3).map(str), SHORT, st.floats().map(repr), ODD
)
FIELDS = st.tuples(
    st.one_of(DIGITS, SHORT, ODD),
    st.one_of(st.tuples(DAYS, TIMES).map(" ".join), st.text("0123456789-: ", min_size=18, max_size=20)),
    st.one_of(SHORT, ODD),
    st.one_of(SHORT, ODD),
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


@settings(max_examples=400, deadline=None)
@given(st.lists(LINES, max_size=12))
@example([b"5,2020-02-29 06:51:03,17,711,70.91,24663,0,0,0", b"5,2019-02-29 06:51:03,17,711,70.91,24663,0,0,0"])
@example([b"5,0000-01-01 00:00:00,1,1,1,0,0,0,0", b"5,9999-12-31 23:59:59,1,1,1,0,0,0,0"])
def test_any_lines_are_parsed_as_one_by_one(lines: list[bytes]) -> None:
    require_same(lines)


def test_no_lines() -> None:
    assert parsed([]) == {}
    assert parsed([b"", b"\r"]) == {}


def usual_lines(count: int) -> list[bytes]:
    """Lines as real files have them, of many days and sizes."""
    numbers = random.Random(5)
    lines = []
    for _ in range(count):
        day = date(1900, 1, 1) + timedelta(days=numbers.randrange(100000))
        fields: list[Any] = [
            numbers.randrange(10 ** numbers.randrange(1, 17)),
            f"{day} {numbers.randrange(24):02d}:{numbers.randrange(60):02d}:{numbers.randrange(60):02d}",
            numbers.randrange(10 ** numbers.randrange(1, 9)),
            numbers.randrange(10 ** numbers.randrange(1, 5)),
            round(numbers.random() * 10 ** numbers.randrange(1, 5), numbers.randrange(4)),
            numbers.randrange(10 ** numbers.randrange(1, 11)),
            numbers.randrange(2000),
            numbers.randrange(2),
            numbers.randrange(4),
        ]
        lines.append(",".join(map(str, fields)).encode())
    return lines


def test_usual_lines_are_the_fast_way_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = usual_lines(20000)
    require_same(lines)
    one_by_one = []

    def counted(line: bytes, *rest: Any) -> Line:
        one_by_one.append(line)
        return parse_line(line, *rest)

    monkeypatch.setattr("spark_jobs.cleaning.plain_lines.parse_line", counted)
    parsed(lines)
    # The last days of February in leap years.
    assert 0 < len(one_by_one) < 30
    assert all(b"-02-29 " in line for line in one_by_one)


def test_rows_that_differ_in_a_digit_have_other_hashes() -> None:
    """Copies are told from rows that conflict by the hash alone."""
    line = b"1234567890,2019-08-22 06:51:03,17345678,711,1570.91,1024663,1170,0,0"
    lines = [line]
    for position, char in enumerate(line):
        if chr(char).isdigit():
            lines += [line[:position] + digit + line[position + 1 :] for digit in (b"0", b"1", b"2")]
    require_same(list(dict.fromkeys(lines)))


def test_copies_have_the_same_hash_whatever_is_parsed_beside_them() -> None:
    """Ids and seconds of more than eight digits are read in two parts, and only where there are some."""
    short = b"5,2019-08-22 06:51:03,17,711,70.91,24663,0,0,0"
    long = b"123456789012,2019-08-22 06:51:03,17,711,70.91,123456789012,0,0,0"
    alone = parsed([short])[0]
    assert not alone.rejected
    assert parsed([short, long])[0] == parsed([long, short])[1] == alone


def test_the_header_is_known_by_its_text() -> None:
    assert parsed([HEADER, HEADER + b" "])[0].rejected == HEADER_BIT
    assert parsed([HEADER + b" "])[0].rejected != HEADER_BIT
