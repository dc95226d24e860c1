"""The features job: exact values against an independent implementation, history, and no leaks."""

from __future__ import annotations

import json
import math
import statistics
from datetime import datetime, timedelta, timezone
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from spark_jobs import build_features
from spark_jobs.features.registry import (
    DICTIONARY_COLUMNS,
    HIGH_RATIO,
    HISTORY_DAYS,
    LABEL_DELAY_DAYS,
    MODEL_INPUTS,
    REGISTRY,
    WINDOW_DAYS,
)
from spark_jobs.features.windows import History
from spark_jobs.io import parquet_files
from spark_jobs.schema import CLEANED_COLUMNS, DAY_S, NO_KEY, SCHEMA_VERSION, ddl

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    Transaction = dict[str, Any]

pytestmark = pytest.mark.spark

START = datetime(2019, 8, 22, tzinfo=timezone.utc)


def transaction(number: int, seconds: int, **values: Any) -> Transaction:
    """A cleaned transaction, `seconds` after the start."""
    return {
        "transaction_id": number,
        "tx_datetime": START + timedelta(seconds=seconds),
        "customer_id": 1,
        "terminal_id": 1,
        "tx_amount": 10.0,
        "tx_time_seconds": seconds,
        "tx_time_days": seconds // DAY_S,
        "tx_fraud": 0,
        "tx_fraud_scenario": 0,
        **values,
    }


def random_transactions(count: int, days: int, seed: int) -> list[Transaction]:
    """Transactions of few customers and terminals, some unknown, with instants at the bounds of windows."""
    random = Random(seed)
    rows = []
    for number in range(count):
        seconds = random.choice((random.randrange(days * DAY_S), random.randrange(days) * DAY_S))
        rows.append(
            transaction(
                number,
                seconds,
                customer_id=random.choice((None, 0, 1, 2, 3)),
                terminal_id=random.choice((None, 0, 1, 2)),
                tx_amount=float(random.randrange(10_000)) / 100,
                tx_fraud=int(random.random() < 0.2),
            )
        )
    return rows


def trailing(row: Transaction, rows: list[Transaction], key: str, begin: int, end: int) -> list[Transaction]:
    """The transactions of the row's customer or terminal with begin < time <= end, in order of time and id."""
    found = [
        other
        for other in rows
        if row[key] is not None and other[key] == row[key] and begin < other["tx_time_seconds"] <= end
    ]
    return sorted(found, key=lambda other: (other["tx_time_seconds"], other["transaction_id"]))


def before(row: Transaction, rows: list[Transaction], days: int) -> list[Transaction]:
    """The customer's transactions of the days before, without this second."""
    now = row["tx_time_seconds"]
    return trailing(row, rows, "customer_id", now - days * DAY_S, now - 1)


def ratio(row: Transaction, rows: list[Transaction]) -> float:
    amounts = [other["tx_amount"] for other in before(row, rows, 30)]
    return min(row["tx_amount"] / statistics.fmean(amounts), 10) if sum(amounts) > 0 else 1.0


def expected_features(row: Transaction, rows: list[Transaction]) -> dict[str, float]:
    """The definitions, applied to one row at a time."""
    now, amount = row["tx_time_seconds"], row["tx_amount"]
    end = now - LABEL_DELAY_DAYS * DAY_S

    def known(days: int) -> list[Transaction]:
        return trailing(row, rows, "terminal_id", end - days * DAY_S, end)

    features = {
        "tx_amount": amount,
        "tx_during_weekend": float(row["tx_datetime"].weekday() >= 5),
        "tx_during_night": float(row["tx_datetime"].hour <= 6),
    }
    for days in WINDOW_DAYS:
        own = trailing(row, rows, "customer_id", now - days * DAY_S, now) or [row]
        labels = [other["tx_fraud"] for other in known(days)]
        features[f"customer_tx_count_{days}d"] = float(len(own))
        features[f"customer_mean_amount_{days}d"] = statistics.fmean(other["tx_amount"] for other in own)
        features[f"terminal_tx_count_{days}d"] = float(len(labels))
        features[f"terminal_fraud_risk_{days}d"] = sum(labels) / len(labels) if labels else 0.0
    month = [other["tx_amount"] for other in before(row, rows, 30)]
    fortnight = before(row, rows, 14)
    ratios = [ratio(other, rows) for other in fortnight]
    largest = max((other["tx_amount"] for other in fortnight), default=0.0)
    deviation = max(statistics.stdev(month), 0.01) if len(month) > 1 else 1.0
    logs = [math.log1p(value) for value in month]
    labelled = known(35)
    frauds = [now - other["tx_time_seconds"] for other in labelled if other["tx_fraud"]]
    genuine = [now - other["tx_time_seconds"] for other in labelled if not other["tx_fraud"]]
    return {
        **features,
        "customer_amount_ratio_to_mean": ratio(row, rows),
        "customer_amount_z_score": (
            min(max((amount - statistics.fmean(month)) / deviation, -10), 10) if len(month) > 1 else 0.0
        ),
        "customer_amount_log_ratio": math.log1p(amount) - statistics.fmean(logs) if logs else 0.0,
        "customer_amount_ratio_to_max_14d": min(amount / largest, 10) if largest > 0 else 1.0,
        "customer_high_ratio_count_14d": float(sum(value > HIGH_RATIO for value in ratios)),
        "customer_max_ratio_14d": max(ratios, default=0.0),
        "terminal_fraud_count_3d": float(sum(other["tx_fraud"] for other in known(3))),
        "terminal_fraud_count_21d": float(sum(other["tx_fraud"] for other in known(21))),
        "terminal_first_fraud_age": max(frauds, default=42 * DAY_S) / DAY_S,
        "terminal_last_genuine_age": min(genuine, default=42 * DAY_S) / DAY_S,
        "terminal_last_label_age": (now - labelled[-1]["tx_time_seconds"]) / DAY_S if labelled else 42.0,
        "terminal_last_label": float(labelled[-1]["tx_fraud"]) if labelled else 0.0,
    }


def close(features: dict[str, float]) -> Any:
    """Sums are of whole cents and of logarithms rounded to nine places; the rest is exact."""
    return pytest.approx(features, rel=1e-7, abs=1e-8)


def built(spark: SparkSession, rows: list[Transaction], tasks: int = 1) -> dict[int, dict[str, float]]:
    """Features of `rows` by transaction_id, computed in so many parts."""
    import pyarrow.parquet

    frame = spark.createDataFrame(rows, ddl(CLEANED_COLUMNS)).selectExpr("*", "true AS is_current")
    found = {}
    for row in build_features.feature_files(frame, tasks, lambda tallies: None).collect():
        file = pyarrow.BufferReader(bytes(row.file) + parquet_files.MAGIC.encode())
        columns = pyarrow.parquet.read_table(file).to_pydict()
        for index, number in enumerate(columns["transaction_id"]):
            found[number] = {name: columns[name][index] for name in MODEL_INPUTS}
    return found


def test_nothing_after_an_instant_and_no_young_label_moves_a_feature_before_it(spark: SparkSession) -> None:
    rows = random_transactions(300, days=50, seed=2)
    instant = 40 * DAY_S
    changed = [
        {**row, "tx_amount": 1e6, "tx_fraud": 1 - row["tx_fraud"], "customer_id": 3, "terminal_id": 2}
        if row["tx_time_seconds"] > instant
        # A label that is younger than the delay at that instant is not known yet.
        else {**row, "tx_fraud": 1 - row["tx_fraud"]}
        if row["tx_time_seconds"] > instant - LABEL_DELAY_DAYS * DAY_S
        else row
        for row in rows
    ]
    before, after = built(spark, rows), built(spark, changed)
    earlier = [row["transaction_id"] for row in rows if row["tx_time_seconds"] <= instant]
    assert len(earlier) > 200
    assert {number: before[number] for number in earlier} == {number: after[number] for number in earlier}
    assert before != after


class Partitions:
    """Cleaned partitions on disk and the job that builds their features."""

    def __init__(self, spark: SparkSession, directory: Path) -> None:
        self.spark, self.directory = spark, directory

    def write(self, key: str, rows: list[Transaction]) -> None:
        """Replace a partition, without a job of Spark."""
        import pyarrow
        from pyarrow import parquet

        kinds = {name: parquet_files.arrow_type(kind) for name, kind, _ in CLEANED_COLUMNS}
        arrays = [pyarrow.array([row[name] for row in rows], kind) for name, kind in kinds.items()]
        directory = self.directory / "cleaned" / key
        directory.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_arrays(arrays, names=list(kinds)), str(directory / "rows.parquet"))

    def item(self, key: str, first: datetime | None, history: list[str]) -> dict[str, Any]:
        return {
            "partition": key,
            "cleaned_uri": f"file://{self.directory}/cleaned/{key}",
            "tx_datetime_min": first and first.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "history": [f"file://{self.directory}/cleaned/{earlier}" for earlier in history],
            "cleaned_bytes": 1000,
            "inputs": {"cleaned": f"version of {key}"},
            "output_uri": f"file://{self.directory}/features/{key}",
        }

    def run(self, *items: dict[str, Any]) -> dict[str, Any]:
        return build_features.run(self.spark, {"run_id": "run", "partitions": list(items)})["partitions"]

    def features(self, key: str) -> dict[int, dict[str, float]]:
        from pyarrow import parquet

        found = {}
        for path in (self.directory / "features" / key).glob("*.parquet"):
            columns = parquet.ParquetFile(str(path)).read().to_pydict()
            inputs = zip(*[columns[name] for name in MODEL_INPUTS])
            found.update(
                (number, dict(zip(MODEL_INPUTS, row))) for number, row in zip(columns["transaction_id"], inputs)
            )
        return found


@pytest.fixture
def partitions(spark: SparkSession, tmp_path: Path) -> Partitions:
    return Partitions(spark, tmp_path)


def test_features_with_history_are_what_their_definitions_say(partitions: Partitions, tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = random_transactions(500, days=90, seed=3)
    parts = {str(n): [row for row in rows if row["tx_time_days"] // 30 == n] for n in range(3)}
    for key, part in parts.items():
        partitions.write(key, part)
    first = {key: min(row["tx_datetime"] for row in part) for key, part in parts.items()}
    verdicts = partitions.run(
        partitions.item("0", first["0"], []),
        partitions.item("1", first["1"], ["0"]),
        partitions.item("2", first["2"], ["0", "1"]),
    )
    for key, part in parts.items():
        report = verdicts[key]["report"]
        assert report["counts"] == {
            "rows": len(part),
            "fraud_rows": sum(row["tx_fraud"] for row in part),
            "unusable_rows": 0,
        }
        assert report["features"] == list(MODEL_INPUTS)
        assert report["schema_version"] == SCHEMA_VERSION
        assert json.loads((tmp_path / "features" / key / "_report.json").read_text()) == report
        # Built partition by partition, a row is what it is among all rows: the history reaches far enough.
        expected = {row["transaction_id"]: expected_features(row, rows) for row in part}
        found = partitions.features(key)
        assert found.keys() == expected.keys()
        for number, features in expected.items():
            assert found[number] == close(features)

    path = next((tmp_path / "features/0").glob("*.parquet"))
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    assert {column.path_in_schema for column in columns if column.has_dictionary_page} == set(DICTIONARY_COLUMNS)


def test_a_row_is_the_same_alone_in_a_range_and_after_its_history_was_built_again(partitions: Partitions) -> None:
    rows = random_transactions(300, days=60, seed=11)
    for key in ("0", "1"):
        partitions.write(key, [row for row in rows if row["tx_time_days"] // 30 == int(key)])
    earlier = partitions.item("0", START, [])
    later = partitions.item("1", START + timedelta(days=30), ["0"])
    found = []
    for items in ([later], [earlier, later], [later]):
        assert {verdict["status"] for verdict in partitions.run(*items).values()} == {"succeeded"}
        found.append(partitions.features("1"))
        # The same rows in another order and other files.
        partitions.write("0", [row for row in reversed(rows) if row["tx_time_days"] // 30 == 0])
    assert found[0]
    assert found[0] == found[1] == found[2]


def test_history_is_long_enough_to_the_second(partitions: Partitions) -> None:
    """The oldest row that a window can reach counts, the one before it does not."""
    now = 60 * DAY_S
    oldest = now - (35 + LABEL_DELAY_DAYS) * DAY_S + 1
    partitions.write("old", [transaction(1, oldest, tx_fraud=1), transaction(2, oldest - 1, tx_fraud=1)])
    partitions.write("new", [transaction(3, now)])
    partitions.run(partitions.item("new", START + timedelta(seconds=now), ["old"]))
    features = partitions.features("new")[3]
    assert features["terminal_first_fraud_age"] == (now - oldest) / DAY_S
    assert max(feature.days for feature in REGISTRY) == HISTORY_DAYS


@pytest.mark.images
def test_history_may_reach_to_before_the_first_year(partitions: Partitions) -> None:
    partitions.write("old", random_transactions(10, days=1, seed=5))
    partitions.write("new", random_transactions(10, days=1, seed=6))
    item = {**partitions.item("new", START, ["old"]), "tx_datetime_min": "0001-01-02T00:00:00Z"}
    assert partitions.run(item)["new"]["status"] == "succeeded"


def test_a_rows_features_do_not_depend_on_unrelated_rows(spark: SparkSession) -> None:
    """Bit by bit, whatever the number of other rows and of parts."""
    rows = random_transactions(300, days=50, seed=4)
    others = [{**row, "transaction_id": 10_000 + n, "customer_id": 9, "terminal_id": 9, "tx_amount": 1e6 / 7}
              for n, row in enumerate(random_transactions(300, days=50, seed=5))]  # fmt: skip
    among = built(spark, rows + others, tasks=7)
    assert len(among) == 600
    for number, features in built(spark, rows).items():
        assert among[number] == features


def test_each_feature_stays_within_the_window_that_it_declares() -> None:
    """A row before the declared days, or a label younger than the declared delay, moves no feature."""
    import numpy as np

    rows = random_transactions(300, days=80, seed=6)

    def history_of(rows: list[Transaction], entity: str) -> History:
        keys = [NO_KEY if row[f"{entity}_id"] is None else row[f"{entity}_id"] for row in rows]
        arrays = [
            [row[name] for row in rows] for name in ("tx_time_seconds", "transaction_id", "tx_amount", "tx_fraud")
        ]
        return History(*(np.array(values) for values in (keys, *arrays)))

    now = max(row["tx_time_seconds"] for row in rows) + 1
    for feature in REGISTRY:
        if feature.entity == "transaction":
            continue
        for customer_id, terminal_id in ((1, 1), (2, 2)):
            last = transaction(10_000, now, customer_id=customer_id, terminal_id=terminal_id)
            near = [row for row in rows if row["tx_time_seconds"] > now - feature.days * DAY_S]
            young = [
                {**row, "tx_fraud": 1 - row["tx_fraud"]}
                if feature.delay_days == 0 or row["tx_time_seconds"] > now - feature.delay_days * DAY_S
                else row
                for row in near
            ]
            values = []
            for part in (rows, near, young):
                history = history_of([*part, last], feature.entity)
                values.append(feature.compute(history)[list(history.order).index(len(part))])
            assert values[0] == values[1] == values[2], feature.name


@pytest.mark.images
def test_empty_and_broken_partitions_and_absurd_amounts(partitions: Partitions) -> None:
    partitions.write("empty", [])
    amounts = (0.0, 1e308, 0.001, 1e308)
    partitions.write("full", [transaction(n, n, tx_amount=amount) for n, amount in enumerate(amounts)])
    verdicts = partitions.run(
        {**partitions.item("empty", None, []), "cleaned_bytes": 0},
        partitions.item("gone", START, []),
        partitions.item("full", START, []),
    )
    assert verdicts["empty"]["report"]["counts"] == {"rows": 0, "fraud_rows": 0, "unusable_rows": 0}
    assert verdicts["gone"]["status"] == "failed"
    assert "gone" in verdicts["gone"]["error"]
    assert verdicts["full"]["report"]["counts"] == {"rows": 4, "fraud_rows": 0, "unusable_rows": 0}
    assert not (partitions.directory / "features/gone").exists()
