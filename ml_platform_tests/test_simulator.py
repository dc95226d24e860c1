"""The simulator writes the raw format, follows the handbook's rules, and its truth is exact."""

from __future__ import annotations

import io
import re
import tracemalloc
from collections import Counter, defaultdict
from datetime import date, datetime, timedelta
from decimal import Decimal, InvalidOperation

import numpy as np
import pytest

from ml_platform.dev.simulator import HEADER, FileTruth, Simulation, _Nearby

# 300 customers x 60 terminals need a larger radius than the handbook's to reach a few terminals each.
SMALL = {"customers": 300, "terminals": 60, "radius": 20.0, "days_per_file": 10}
# Settings under which every scenario is frequent enough to be seen in a few thousand rows.
FRAUDULENT = SMALL | {
    "fault_rate": 0,
    "large_amount": 150.0,
    "compromised_terminal_days": 3,
    "compromised_customers_per_day": 20,
    "compromised_customer_days": 4,
}


def write(simulation: Simulation, index: int = 0) -> tuple[bytes, FileTruth]:
    out = io.BytesIO()
    truth = simulation.write_file(index, out)
    return out.getvalue(), truth


def clean_rows(simulation: Simulation, index: int = 0) -> list[list[str]]:
    """Fields of a file without faults."""
    assert simulation.fault_rate == 0
    return [line.split(",") for line in write(simulation, index)[0].decode().splitlines()[1:]]


def read_under_contract(content: bytes, epoch: date) -> Counter[str]:
    """Count what the cleaning rules find, one line after the other in plain Python."""
    counts: Counter[str] = Counter()
    lines = content.decode().split("\n")[1:]
    by_id: dict[int, list[list[str]]] = defaultdict(list)
    for line in filter(None, lines):
        counts["raw_rows"] += 1
        fields = line.split(",")
        try:
            if len(fields) != 9 or not Decimal(fields[4]).is_finite():
                raise ValueError(line)
            by_id[int(fields[0])].append(fields)
            int(fields[7]), int(fields[8])
        except (ValueError, InvalidOperation):
            counts["malformed_row"] += 1
            counts["rejected_rows"] += 1
    for same_id in by_id.values():
        distinct = [list(fields) for fields in {tuple(fields) for fields in same_id}]
        if len(distinct) > 1:
            counts["conflicting_duplicate"] += len(same_id)
            counts["rejected_rows"] += len(same_id)
            continue
        counts["duplicate"] += len(same_id) - 1
        counts["duplicate_rows"] += len(same_id) - 1
        _, written, customer, terminal, amount, seconds, days, fraud, _ = same_id[0]
        hour_24 = written.endswith(" 24:00:00")
        reasons = []
        try:
            instant = datetime.strptime(written.replace(" 24:", " 00:") if hour_24 else written, "%Y-%m-%d %H:%M:%S")
        except ValueError:
            reasons.append("invalid_datetime")
        if Decimal(amount) < 0:
            reasons.append("invalid_amount")
        if fraud not in ("0", "1"):
            reasons.append("invalid_label")
        counts.update(reasons)
        if reasons:
            counts["rejected_rows"] += 1
            continue
        since = instant + timedelta(days=hour_24) - datetime(epoch.year, epoch.month, epoch.day)
        counts["clean_rows"] += 1
        counts["fraud_rows"] += int(fraud)
        counts["hour_24"] += hour_24
        counts["wrong_seconds"] += int(seconds) != since.total_seconds()
        counts["wrong_days"] += int(days) != since.days
        counts["unknown_terminal"] += not terminal.isdigit()
        counts["unknown_customer"] += not customer.isdigit()
    return counts


def test_lines_have_the_raw_format() -> None:
    content, truth = write(Simulation(**SMALL, fault_rate=0), 1)
    header, *lines, last = content.decode("ascii").split("\n")
    assert (header + "\n", last) == (HEADER.decode(), "")
    assert truth.name == "2019-09-01.txt"
    assert truth.size_bytes == len(content)
    assert len(lines) == truth.counts["raw_rows"] > 3_000
    form = re.compile(
        r"\d+,\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,(0|[1-9]\d*),(0|[1-9]\d*),(0|[1-9]\d*)\.\d\d,\d+,\d+,[01],[0-3]"
    )
    for line in lines:
        assert form.fullmatch(line), line
        _, written, customer, terminal, _, seconds, days, fraud, scenario = line.split(",")
        since = datetime.strptime(written, "%Y-%m-%d %H:%M:%S") - datetime(2019, 8, 22)
        assert (int(seconds), int(days)) == (since.total_seconds(), since.days)
        assert 0 < int(seconds) - int(days) * 86_400 < 86_400
        assert int(customer) < 300
        assert int(terminal) < 60
        assert (fraud == "1") == (scenario != "0")
    rows = [line.split(",") for line in lines]
    assert {int(row[6]) for row in rows} == set(range(10, 20))
    order = [(int(row[6]), int(row[2])) for row in rows]
    assert order == sorted(order)


def test_a_file_made_alone_is_the_same_and_its_ids_go_on() -> None:
    in_sequence = Simulation(**SMALL)
    files = [write(in_sequence, index) for index in range(3)]
    assert write(Simulation(**SMALL), 2) == files[2] == write(in_sequence, 2)
    assert write(Simulation(**SMALL, seed=1))[0] != files[0][0]
    ids = {int(line.split(b",")[0]) for content, _ in files for line in content.splitlines()[1:]}
    assert ids == set(range(len(ids)))
    assert [truth.name for _, truth in files] == ["2019-08-22.txt", "2019-09-01.txt", "2019-09-11.txt"]
    assert Simulation(start=date(2024, 2, 28), days_per_file=2).file_name(1) == "2024-03-01.txt"


def test_a_kind_of_fault_can_be_left_out() -> None:
    settings = {**SMALL, "fault_rate": 1000}
    _, everything = write(Simulation(**settings), 0)
    _, truth = write(Simulation(**settings, without=("conflicting_duplicate",)), 0)
    assert everything.counts["conflicting_duplicate"] > 0
    assert truth.counts["conflicting_duplicate"] == 0
    assert truth.counts["duplicate"] > 0


@pytest.mark.parametrize(
    ("index", "settings"),
    [
        (0, {}),  # the first weeks, where an earlier base would give negative seconds
        (9, {}),
        (4, {"seed": 5, "start": date(2024, 1, 20)}),  # 2024 is a leap year: 02-29 exists, 02-30 does not
        (0, {"fault_rate": 0}),
        (0, {"radius": 1e-9}),  # no customer reaches a terminal: an empty file
    ],
    ids=["first", "later", "leap year", "clean", "empty"],
)
def test_the_truth_is_what_the_cleaning_rules_find(index: int, settings: dict[str, object]) -> None:
    simulation = Simulation(**{**SMALL, "customers": 700, "fault_rate": 1000, **settings})
    rows: list[int] = []
    out = io.BytesIO()
    truth = simulation.write_file(index, out, progress=rows.append)
    found = read_under_contract(out.getvalue(), simulation.start)
    assert truth.counts == {name: found[name] for name in truth.counts}
    assert set(found) <= set(truth.counts)
    assert truth.size_bytes == len(out.getvalue())
    assert len(rows) == simulation.days_per_file
    assert rows == sorted(rows)
    assert rows[-1] == found["raw_rows"] == found["clean_rows"] + found["duplicate_rows"] + found["rejected_rows"]
    if simulation.fault_rate == 0:
        assert set(+found) == {"raw_rows", "clean_rows", "fraud_rows"}
    elif rows[-1]:
        assert all(truth.counts.values())
    else:
        assert out.getvalue() == HEADER


def test_each_faulty_row_differs_from_the_clean_one_by_one_fault() -> None:
    settings = {**SMALL, "customers": 700}
    clean = {row[0]: row for row in clean_rows(Simulation(**settings, fault_rate=0), 3)}
    content, _ = write(Simulation(**settings, fault_rate=1000), 3)
    columns = ("id", "datetime", "customer", "terminal", "amount", "seconds", "days", "fraud", "scenario")
    changes: Counter[tuple[str, ...]] = Counter()
    copies: Counter[str] = Counter()
    for line in content.decode().splitlines()[1:]:
        fields = line.split(",")
        copies[fields[0]] += 1
        expected = clean[fields[0]]
        if len(fields) != len(expected):
            changes[f"{len(fields)} fields",] += 1
        else:
            changed = (name for name, a, b in zip(columns, fields, expected, strict=True) if a != b)
            changes[tuple(changed)] += 1
    assert set(copies) == set(clean)
    assert max(copies.values()) == 2
    assert set(changes) == {
        (),
        ("7 fields",),
        ("10 fields",),
        ("datetime",),
        ("datetime", "seconds"),  # hour 24, at the end of the row's own day
        ("customer",),
        ("terminal",),
        ("amount",),
        ("seconds",),
        ("fraud",),
    }
    terminals = Counter(line.split(",")[3] for line in content.decode().splitlines()[1:])
    assert all(terminals[terminal] for terminal in ("", "Err", "89518096"))
    amounts = {line.split(",")[4] for line in content.decode().splitlines()[1:]}
    assert {"0.00", "abc", "NaN"} <= amounts


def test_scenarios_follow_the_rules() -> None:
    rows = clean_rows(Simulation(**FRAUDULENT), 1)
    plain = clean_rows(
        Simulation(**{**FRAUDULENT, "compromised_terminals_per_day": 0, "compromised_customers_per_day": 0}),
        1,
    )
    assert {row[8] for row in rows} == {"0", "1", "2", "3"}
    # Without compromised terminals and customers the label says just whether the amount is large.
    assert all((Decimal(row[4]) > 150) == (row[8] == "1") for row in plain)

    terminals_of_day: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row[8] == "2":
            terminals_of_day[row[6]].add(row[3])
    for row, before in zip(rows, plain, strict=True):
        assert row[:4] == before[:4]
        if row[8] == "3":
            assert Decimal(row[4]) == 5 * Decimal(before[4]) or Decimal(row[4]) == 25 * Decimal(before[4])
        else:
            assert row[4] == before[4]
            compromised = row[3] in terminals_of_day[row[6]]
            large = Decimal(row[4]) > 150
            assert row[8] == ("2" if compromised else "1" if large else "0")
    # 2 new terminals a day for 3 days: at most 6 at once, and each stays for its 3 days.
    assert all(2 < len(terminals) <= 6 for terminals in terminals_of_day.values())


def test_a_third_of_a_compromised_customers_transactions_is_fraud() -> None:
    # Every customer is compromised on every day, for one day.
    settings = {**FRAUDULENT, "compromised_customers_per_day": 300, "compromised_customer_days": 1}
    scenarios = Counter(row[8] for row in clean_rows(Simulation(**settings)))
    assert scenarios["3"] / scenarios.total() == pytest.approx(1 / 3, abs=0.03)


def test_no_window_opens_before_the_first_day() -> None:
    settings = {**FRAUDULENT, "terminals": 400, "compromised_terminal_days": 6}
    terminals: dict[int, set[str]] = defaultdict(set)
    for row in clean_rows(Simulation(**{**settings, "customers": 3_000})):
        if row[8] == "2":
            terminals[int(row[6])].add(row[3])
    assert [len(terminals[day]) for day in range(3)] == [2, 4, 6]
    assert 9 <= len(terminals[9]) <= 12


def test_amounts_stay_exact_when_multiplied_again_and_again() -> None:
    rows = clean_rows(
        Simulation(
            customers=20,
            terminals=5,
            radius=200,
            days_per_file=20,
            fault_rate=0,
            compromised_customers_per_day=20,
            compromised_share=1,
            compromised_factor=1000,
        )
    )
    assert {row[8] for row in rows} == {"3"}
    assert max(Decimal(row[4]) for row in rows) == Decimal(10) ** 12


def test_size_and_fraud_are_those_of_the_handbook() -> None:
    simulation = Simulation(fault_rate=0)
    content, first = write(simulation)
    # The handbook's own draw: 9,585 transactions a day; the spread of the customers' rates alone is 0.85%.
    assert first.counts["raw_rows"] / 30 == pytest.approx(9_585, rel=0.04)
    # Handbook: about 1,700 frauds in the first 30 days, when windows are still opening, and 2,500 later.
    assert 0.004 < first.counts["fraud_rows"] / first.counts["raw_rows"] < 0.008
    # The default rate of faults shows every fault in 300,000 rows, and rejects few.
    _, third = write(Simulation(), 2)
    assert all(third.counts.values())
    assert third.counts["rejected_rows"] < third.counts["raw_rows"] * 0.001
    assert 0.007 < third.counts["fraud_rows"] / third.counts["raw_rows"] < 0.0105

    rows = np.array([line.split(",")[4:] for line in content.decode().splitlines()[1:]], dtype=float)
    amounts, seconds = rows[:, 0], rows[:, 1] % 86_400
    # Mean and quartiles of the handbook's data set.
    assert amounts.mean() == pytest.approx(53.6, abs=1.5)
    assert np.quantile(amounts, [0.25, 0.5, 0.75]) == pytest.approx([21.0, 44.6, 76.9], abs=2)
    assert seconds.mean() == pytest.approx(43_200, abs=200)
    # The sd of a normal distribution with sd 20,000 that is cut 2.16 sd from its mean on both sides.
    assert seconds.std() == pytest.approx(18_193, abs=100)


def test_counts_of_customers_are_poisson() -> None:
    """Each customer's daily counts have a variance equal to their mean; the mean of the rates is 2 a day."""
    rows = clean_rows(Simulation(customers=200, terminals=50, radius=200, days_per_file=300, fault_rate=0))
    counts = np.zeros((200, 300))
    np.add.at(counts, (np.array([int(row[2]) for row in rows]), np.array([int(row[6]) for row in rows])), 1)
    mean = counts.mean(axis=1)
    assert mean.max() < 4.6  # rates are below 4
    assert mean.mean() == pytest.approx(2 * 0.969, rel=0.1)
    assert (counts.var(axis=1) / mean).mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("customers", "terminals", "radius"),
    [(500, 700, 5.0), (700, 20, 12.5), (50, 60, 47.0), (40, 30, 500.0), (5, 1, 30.0)],
)
def test_terminals_within_the_radius_are_equally_likely(customers: int, terminals: int, radius: float) -> None:
    random = np.random.default_rng(terminals)
    at, of = random.uniform(0, 100, (2, customers)), random.uniform(0, 100, (2, terminals))
    near = np.hypot(at[0][:, None] - of[0], at[1][:, None] - of[1]) <= radius
    nearby = _Nearby(at, of, radius)
    assert nearby.exists().tolist() == near.any(axis=1).tolist()
    # 100 draws for each pair: a deviation of 6 standard deviations does not happen in some thousand pairs.
    who = np.arange(customers).repeat(100 * near.sum(axis=1))
    chosen = np.zeros(near.shape)
    np.add.at(chosen, (who, nearby.choose(who, random)), 1)
    assert not chosen[~near].any()
    assert (np.abs(chosen[near] - 100) < 6 * 10).all()


def test_memory_does_not_grow_with_the_pairs_of_customers_and_terminals() -> None:
    """8 million pairs are within reach, of which a list would take 32 MB."""
    random = np.random.default_rng(0)
    tracemalloc.start()
    nearby = _Nearby(*random.uniform(0, 100, (2, 2, 4_000)), radius=50)
    nearby.choose(np.arange(4_000), random)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6


def test_customers_use_all_terminals_within_reach_and_no_others() -> None:
    simulation = Simulation(customers=200, terminals=20, radius=10, days_per_file=60, fault_rate=0)
    people = simulation._population
    assert 0 < people.customer_id.size < 200
    at, of = people.nearby._customers, people.nearby._terminals
    near = np.hypot(at[0][:, None] - of[0], at[1][:, None] - of[1]) <= 10
    reachable = {
        customer: set(np.flatnonzero(near[customer]).tolist()) for customer in np.flatnonzero(near.any(axis=1)).tolist()
    }
    assert people.customer_id.tolist() == list(reachable)
    used: dict[int, set[int]] = defaultdict(set)
    for row in clean_rows(simulation):
        used[int(row[2])].add(int(row[3]))
    assert all(used[customer] <= reachable[customer] for customer in used)
    # In 60 days nearly all customers use all of their few terminals.
    assert sum(used[customer] == reachable[customer] for customer in reachable) > 0.9 * len(reachable)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"days_per_file": 0}, "days_per_file is 0: give 1 or more"),
        ({"customers": 2**31}, "customers is 2147483648: give 1 to 2,147,483,647"),
        ({"radius": float("nan")}, "radius is nan"),
        ({"fault_rate": 1001}, "fault_rate is 1001: give 0 to 1,000"),
        ({"terminals": 1}, "compromised_terminals_per_day is 2: give 0 to 1"),
        ({"compromised_share": 1.5}, "compromised_share is 1.5: give 0 to 1"),
        ({"without": ("duplicates",)}, "without names duplicates: the faults are duplicate, "),
    ],
)
def test_bad_settings_say_what_to_do(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Simulation(**settings)


@pytest.mark.parametrize(
    ("simulation", "index", "message"),
    [(Simulation(), -1, "files count from 0"), (Simulation(start=date(9999, 12, 20)), 0, "choose an earlier start")],
)
def test_impossible_files_are_refused(simulation: Simulation, index: int, message: str) -> None:
    out = io.BytesIO()
    with pytest.raises(ValueError, match=message):
        simulation.write_file(index, out)
    assert out.getvalue() == b""
