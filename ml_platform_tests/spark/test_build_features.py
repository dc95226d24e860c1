"""The features job: exact values against an independent reading of the definitions, history, and no leaks."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from spark_jobs import build_features
from spark_jobs.build_features import DAY_S, FEATURES, HISTORY_DAYS, LABEL_DELAY_DAYS, WINDOW_DAYS
from spark_jobs.schema import CLEANED_COLUMNS, ddl

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

START = datetime(2019, 8, 22, tzinfo=timezone.utc)
Transaction = dict[str, Any]


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
    """Transactions of few customers and terminals, some unknown, with instants that meet the windows' edges."""
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


def expected_features(row: Transaction, rows: list[Transaction]) -> dict[str, float]:
    """The definitions, read one row at a time."""
    now = row["tx_time_seconds"]
    features = {
        "tx_amount": row["tx_amount"],
        "tx_during_weekend": float(row["tx_datetime"].weekday() >= 5),
        "tx_during_night": float(row["tx_datetime"].hour <= 6),
    }
    for days in WINDOW_DAYS:
        own = [
            other["tx_amount"]
            for other in rows
            if other is row
            or (
                row["customer_id"] is not None
                and other["customer_id"] == row["customer_id"]
                and now - days * DAY_S < other["tx_time_seconds"] <= now
            )
        ]
        end = now - LABEL_DELAY_DAYS * DAY_S
        labels = [
            other["tx_fraud"]
            for other in rows
            if row["terminal_id"] is not None
            and other["terminal_id"] == row["terminal_id"]
            and end - days * DAY_S < other["tx_time_seconds"] <= end
        ]
        features[f"customer_tx_count_{days}d"] = float(len(own))
        features[f"customer_mean_amount_{days}d"] = sum(own) / len(own)
        features[f"terminal_tx_count_{days}d"] = float(len(labels))
        features[f"terminal_fraud_risk_{days}d"] = sum(labels) / len(labels) if labels else 0.0
    return features


def built(spark: SparkSession, rows: list[Transaction]) -> dict[int, dict[str, float]]:
    """Features of `rows` by transaction_id."""
    frame = build_features.add_features(spark.createDataFrame(rows, ddl(CLEANED_COLUMNS)))
    return {row.transaction_id: {name: row[name] for name in FEATURES} for row in frame.collect()}


def test_features_are_what_their_definitions_say(spark: SparkSession) -> None:
    rows = random_transactions(400, days=50, seed=1)
    found = built(spark, rows)
    for row in rows:
        assert found[row["transaction_id"]] == pytest.approx(expected_features(row, rows), rel=1e-12)


def test_unknown_customers_and_terminals_have_the_documented_defaults(spark: SparkSession) -> None:
    rows = [
        transaction(number, 60 * DAY_S, customer_id=None, terminal_id=None, tx_amount=amount, tx_fraud=1)
        for number, amount in enumerate((5.0, 7.0))
    ]
    for number, amount in enumerate((5.0, 7.0)):
        features = built(spark, rows)[number]
        for days in WINDOW_DAYS:
            assert features[f"customer_tx_count_{days}d"] == 1
            assert features[f"customer_mean_amount_{days}d"] == amount
            assert features[f"terminal_tx_count_{days}d"] == features[f"terminal_fraud_risk_{days}d"] == 0


def test_nothing_after_an_instant_and_no_young_label_moves_a_feature_before_it(spark: SparkSession) -> None:
    rows = random_transactions(300, days=50, seed=2)
    instant = 40 * DAY_S
    changed = [
        row | {"tx_amount": 1e6, "tx_fraud": 1 - row["tx_fraud"], "customer_id": 3, "terminal_id": 2}
        if row["tx_time_seconds"] > instant
        # A label that is younger than the delay at that instant is not known yet.
        else row | {"tx_fraud": 1 - row["tx_fraud"]}
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
        frame = self.spark.createDataFrame(rows, ddl(CLEANED_COLUMNS))
        frame.write.mode("overwrite").parquet(str(self.directory / "cleaned" / key))

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
        rows = self.spark.read.parquet(str(self.directory / "features" / key)).collect()
        return {row.transaction_id: {name: row[name] for name in FEATURES} for row in rows}


@pytest.fixture
def partitions(spark: SparkSession, tmp_path: Path) -> Partitions:
    return Partitions(spark, tmp_path)


def test_a_partition_sees_its_history_and_nothing_else(partitions: Partitions, tmp_path: Path) -> None:
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
        assert report["features"] == list(FEATURES)
        assert json.loads((tmp_path / "features" / key / "_report.json").read_text()) == report
        # Built partition by partition, a row is what it is among all rows: the history reaches far enough.
        expected = {row["transaction_id"]: expected_features(row, rows) for row in part}
        found = partitions.features(key)
        assert found.keys() == expected.keys()
        for number, features in expected.items():
            assert found[number] == pytest.approx(features, rel=1e-12)


def test_history_is_long_enough_to_the_second(partitions: Partitions) -> None:
    """The oldest row that a window can reach counts, the one before it does not."""
    now = 60 * DAY_S
    oldest = now - HISTORY_DAYS * DAY_S + 1
    partitions.write("old", [transaction(1, oldest, tx_fraud=1), transaction(2, oldest - 1, tx_fraud=1)])
    partitions.write("new", [transaction(3, now)])
    partitions.run(partitions.item("new", START + timedelta(seconds=now), ["old"]))
    assert partitions.features("new")[3]["terminal_tx_count_30d"] == 1


def test_an_empty_partition_and_a_broken_one_have_verdicts_of_their_own(partitions: Partitions) -> None:
    partitions.write("empty", [])
    partitions.write("full", [transaction(1, 5)])
    verdicts = partitions.run(
        partitions.item("empty", None, []),
        partitions.item("gone", START, []),
        partitions.item("full", START, []),
    )
    assert verdicts["empty"]["report"]["counts"] == {"rows": 0, "fraud_rows": 0, "unusable_rows": 0}
    assert verdicts["gone"]["status"] == "failed"
    assert "gone" in verdicts["gone"]["error"]
    assert verdicts["full"]["report"]["counts"]["rows"] == 1
    assert not (partitions.directory / "features/gone").exists()


def test_amounts_that_overflow_are_counted_as_unusable(partitions: Partitions) -> None:
    partitions.write("huge", [transaction(number, 5, tx_amount=1e308) for number in range(3)])
    counts = partitions.run(partitions.item("huge", START, []))["huge"]["report"]["counts"]
    assert counts["unusable_rows"] == 3
