"""Scoring of small partitions: every row once, ranks, alerts with reasons, grades, and models that cannot score."""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import date, datetime, timedelta, timezone

import numpy as np
import pytest

from spark_jobs import runtime, score_transactions
from spark_jobs.schema import ALERT_COLUMNS, SCORED_COLUMNS
from spark_jobs.scoring import alerts, grading
from spark_jobs.training.learners import LogisticRegressionModel, Scorer

pytestmark = pytest.mark.spark

EPOCH = date(2020, 1, 1)
DAYS = 21
ROWS_PER_DAY = 60
BUDGET = 5
#: A model of two inputs, so that each score can be computed by hand.
FEATURES = ["tx_amount", "customer_amount_ratio_to_mean"]
SCHEMA = (
    "transaction_id bigint, tx_datetime timestamp, customer_id bigint, terminal_id bigint, tx_amount double, "
    "tx_time_days int, tx_fraud int, customer_amount_ratio_to_mean double"
)


def score_of(row):
    """The model's score of a row, by its definition."""
    return 1 / (1 + math.exp(-((row["tx_amount"] - 50) / 20 + (row["customer_amount_ratio_to_mean"] - 1) * 2 - 4)))


def make_rows(first_day, days):
    import random

    draw = random.Random(first_day)
    zero = datetime(2020, 1, 1, tzinfo=timezone.utc)
    rows = []
    for day in range(first_day, first_day + days):
        for number in range(ROWS_PER_DAY):
            fraud = int(draw.random() < 0.1)
            rows.append(
                {
                    "transaction_id": 10_000 + day * ROWS_PER_DAY + number,
                    "tx_datetime": zero + timedelta(days=day, seconds=draw.randrange(86_400)),
                    "customer_id": draw.choice([None, *range(1, 300)]),
                    "terminal_id": draw.choice([None, *range(50)]),
                    # Whole amounts, so that some scores are equal.
                    "tx_amount": float(draw.randrange(20, 60) + 20 * fraud),
                    "tx_time_days": day,
                    "tx_fraud": fraud,
                    "customer_amount_ratio_to_mean": float(draw.choice([1, 1, 2, 3]) + fraud),
                }
            )
    return rows


@pytest.fixture(scope="module")
def files():
    """The rows of two files, a and b."""
    return {"a": make_rows(0, DAYS), "b": make_rows(DAYS, DAYS)}


@pytest.fixture(scope="module")
def lake(spark, files, tmp_path_factory):
    """Features, which serve as cleaned rows, too, in several files."""
    root = tmp_path_factory.mktemp("a lake")
    for key, rows in files.items():
        frame = spark.createDataFrame([tuple(row.values()) for row in rows], SCHEMA)
        frame.repartition(3, "customer_id").sortWithinPartitions("tx_datetime").write.parquet(uri(root, key))
    model = LogisticRegressionModel(np.array([50.0, 1.0]), np.array([20.0, 0.5]), np.array([1.0, 1.0]), -4.0)
    (root / "model.json").write_text(Scorer("logistic_regression", FEATURES, model).to_json())
    (root / "_report.json").write_text(json.dumps({"profile": {}}))
    return root


def uri(root, key, table="transaction_features"):
    return str(root / table / f"raw_file={key}")


def champion(root, **changes):
    return {
        "version": 3,
        "model_uri": str(root / "model.json"),
        "report_uri": str(root / "_report.json"),
        "out_of_time_from": "2020-01-01",
        "held_out": {"average_precision": 0.5, "lower": 0.4, "upper": 0.6},
        "error": None,
        **changes,
    }


def request(root, keys, output, model, scored=None, grades=(), last_day=2 * DAYS - 1, run_id="run-1"):
    first = {"a": 0, "b": DAYS}
    return {
        "run_id": run_id,
        "champion": model,
        "epoch": EPOCH.isoformat(),
        "alerts_per_day": BUDGET,
        "data_first_day": 0,
        "partitions": [
            {
                "partition": key,
                "cause": "new",
                "inputs": {"cleaned": f"version of {key}"},
                "rows": DAYS * ROWS_PER_DAY,
                "rows_per_day": {str(first[key] + day): ROWS_PER_DAY for day in range(DAYS)},
                "usual_days": [first[key], first[key] + DAYS - 1],
                "features_uri": uri(root, key),
                "output_uri": uri(output, key, "scored_transactions"),
                "alerts_uri": uri(output, key, "alerts"),
            }
            for key in keys
        ],
        "grading": {
            "last_day": last_day,
            "delay_days": 7,
            "compromised_lookback_days": 7,
            "scored": scored or {},
            "cleaned": {
                key: {"uri": uri(root, key), "first_day": first[key], "last_day": first[key] + DAYS - 1}
                for key in first
            },
            "grades": list(grades),
        },
    }


def reports_of(answer):
    assert {verdict["status"] for verdict in answer["partitions"].values()} == {"succeeded"}, answer
    return {key: verdict["report"] for key, verdict in answer["partitions"].items()}


@pytest.fixture(scope="module")
def score(spark, lake, library_uri):
    def score(output, keys=("a", "b"), model="the champion", **changes):
        asked = request(lake, keys, output, champion(lake) if model == "the champion" else model, **changes)
        return score_transactions.run(spark, {**asked, "library_uri": library_uri})

    return score


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("scores")


@pytest.fixture(scope="module")
def scored(score, output):
    return reports_of(score(output))


def parquet_rows(directory):
    from pyarrow import parquet

    paths = sorted(directory.glob("*.parquet"))
    return [row for path in paths for row in _plain(parquet.ParquetFile(str(path)).read().to_pydict())]


def _plain(columns):
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


@pytest.fixture(scope="module")
def found(scored, output):
    """The scored rows of each file, in the order of its Parquet files."""
    return {key: parquet_rows(output / "scored_transactions" / f"raw_file={key}") for key in scored}


@pytest.mark.images
class TestRows:
    def test_each_row_has_the_models_score_once_in_order_of_time(self, files, found):
        for key, rows in files.items():
            expected = {row["transaction_id"]: row for row in rows}
            assert [row["transaction_id"] for row in found[key]] == sorted(
                expected, key=lambda number: (expected[number]["tx_datetime"], number)
            )
            assert list(found[key][0]) == [name for name, *_ in SCORED_COLUMNS]
            for row in found[key]:
                source = expected[row["transaction_id"]]
                assert row["score"] == pytest.approx(score_of(source), rel=1e-6)
                assert row["model_version"] == 3
                for name in ("customer_id", "terminal_id", "tx_amount"):
                    assert row[name] == source[name]

    def test_ranks_are_those_of_the_day_with_ties_by_id(self, found):
        for rows in found.values():
            for day in {row["tx_datetime"].date() for row in rows}:
                of_day = [row for row in rows if row["tx_datetime"].date() == day]
                of_day.sort(key=lambda row: (-row["score"], row["transaction_id"]))
                assert [row["rank_of_day"] for row in of_day] == list(range(1, ROWS_PER_DAY + 1))
                assert [row["alert"] for row in of_day] == [True] * BUDGET + [False] * (ROWS_PER_DAY - BUDGET)

    def test_the_report_adds_up(self, scored, found):
        for key, report in scored.items():
            assert report["counts"] == {"rows": len(found[key]), "alerts": DAYS * BUDGET}
            assert report["score_sum"] == pytest.approx(sum(row["score"] for row in found[key]))
            assert sum(report["weeks"].values()) == len(found[key])
            assert (report["outcome"], report["model_version"], report["cause"]) == ("scored", 3, "new")
            assert json.loads(json.dumps(report)) == report


@pytest.mark.images
class TestAlerts:
    @pytest.fixture
    def table(self, scored, output):
        return parquet_rows(output / "alerts" / "raw_file=a")

    def test_they_are_the_rows_with_an_alert_by_day_and_rank(self, table, found):
        expected = [row for row in found["a"] if row["alert"]]
        expected.sort(key=lambda row: (row["tx_datetime"].date(), row["rank_of_day"]))
        names = [name for name, *_ in SCORED_COLUMNS]
        assert [{name: row[name] for name in names} for row in table] == expected
        assert list(table[0]) == [name for name, *_ in ALERT_COLUMNS]

    def test_reasons_are_the_inputs_that_raise_the_score_most_in_words(self, table):
        for row in table:
            raises = []
            for number in (1, 2, 3):
                words, contribution = row[f"reason_{number}"], row[f"contribution_{number}"]
                assert (words is None) == (contribution is None)
                if words is not None:
                    raises.append(contribution)
                    if words.startswith("amount") and "times" not in words:
                        assert words == f"amount {row['tx_amount']:,.2f}"
                        assert contribution == pytest.approx((row["tx_amount"] - 50) / 20, rel=1e-6)
            assert raises == sorted(raises, reverse=True)
            assert all(value > 0 for value in raises)
        assert any("times this customer's mean" in row["reason_1"] for row in table)

    def test_the_csv_holds_the_same(self, scored, output, table):
        text = (output / "alerts" / "raw_file=a" / "alerts.csv").read_bytes().decode()
        lines = list(csv.DictReader(io.StringIO(text)))
        assert [int(line["transaction_id"]) for line in lines] == [row["transaction_id"] for row in table]
        assert [float(line["score"]) for line in lines] == [row["score"] for row in table]
        assert [line["reason_1"] for line in lines] == [row["reason_1"] or "" for row in table]
        assert [line["tx_datetime"] for line in lines] == [
            row["tx_datetime"].strftime("%Y-%m-%d %H:%M:%S") for row in table
        ]

    def test_the_report_has_the_first_ten(self, scored, table):
        assert [alert["transaction_id"] for alert in scored["a"]["alerts"]] == [
            row["transaction_id"] for row in table[:10]
        ]

    @pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
    def test_no_cell_is_a_formula(self, text):
        assert alerts._cell(text) == f"'{text}"
        assert alerts._cell(-1.5) == -1.5


class TestGrades:
    @pytest.mark.images
    def test_each_week_whose_labels_are_known_is_graded_once(self, scored):
        assert scored["a"]["grades"] == []  # they are in the report of the run's last partition
        grades = scored["b"]["grades"]
        # Six weeks of data; the last one's labels are not known.
        assert [grade["week"] for grade in grades] == [0, 1, 2, 3, 4]
        assert [list(grade["scores"]) for grade in grades] == [["a"]] * 3 + [["b"]] * 2
        assert {run for grade in grades for run in grade["scores"].values()} == {"run-1"}
        assert (grades[1]["first_date"], grades[1]["last_date"]) == ("2020-01-08", "2020-01-14")
        assert scored["b"]["grading_error"] is None

    @pytest.mark.images
    def test_figures_are_of_the_rows_without_cards_known_to_be_compromised(self, files, found, scored):
        from sklearn.metrics import average_precision_score, roc_auc_score

        everything = files["a"] + files["b"]
        labels = {row["transaction_id"]: row["tx_fraud"] for row in everything}
        for grade in scored["b"]["grades"]:
            first = 7 * grade["week"]
            kept = []
            for row in found["a"] + found["b"]:
                day = (row["tx_datetime"].date() - EPOCH).days
                if not first <= day <= first + 6:
                    continue
                known = {
                    other["customer_id"]
                    for other in everything
                    if other["tx_fraud"] and first - 14 <= other["tx_time_days"] <= day - 8
                } - {None}
                if row["customer_id"] not in known:
                    kept.append(row)
            truth, scores = [labels[row["transaction_id"]] for row in kept], [row["score"] for row in kept]
            assert (grade["rows"], grade["frauds"]) == (len(kept), sum(truth))
            assert grade["removed_rows"] == 7 * ROWS_PER_DAY - len(kept)
            assert grade["average_precision"] == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
            assert grade["roc_auc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
            assert grade["calibration"] == pytest.approx(sum(truth) / sum(scores), abs=1e-12)
            for name in ("average_precision", "roc_auc", "precision_at_budget", "recall_at_budget", "calibration"):
                assert grade[f"{name}_lower"] <= grade[name] <= grade[f"{name}_upper"], name
        assert any(grade["removed_rows"] for grade in scored["b"]["grades"])

    def test_a_week_may_lie_in_two_files(self):
        """Here the epoch is three days later, so that a week begins in the first file and ends in the second."""
        entries = {
            key: {
                **{"uri": "", "run_id": f"run of {key}", "model_version": 3, "held_out": None},
                "weeks": grading.live_weeks({day - 3: 1 for day in days}, "2020-01-04", "2020-01-04"),
                "out_of_time_from": "2020-01-04",
            }
            for key, days in (("a", range(DAYS)), ("b", range(DAYS, 2 * DAYS)))
        }
        found = grading.ungraded_weeks(
            {"scored": entries, "grades": [], "delay_days": 7, "last_day": 41, "epoch": "2020-01-04"}
        )
        assert {week.week: sorted(week.scores) for week in found} == {
            0: ["a"], 1: ["a"], 2: ["a", "b"], 3: ["b"], 4: ["b"]
        }  # fmt: skip

    def test_graded_weeks_are_graded_again_only_if_their_scores_change(self, score, scored, output, tmp_path):
        entries = {"a": grading.entry_of(uri(output, "a", "scored_transactions"), scored["a"])}
        grades = scored["b"]["grades"]
        again = reports_of(score(tmp_path, keys=["b"], scored=entries, grades=grades, run_id="run-2"))["b"]
        assert [grade["week"] for grade in again["grades"]] == [3, 4]
        assert {run for grade in again["grades"] for run in grade["scores"].values()} == {"run-2"}
        for grade, before in zip(again["grades"], grades[3:]):
            assert grade["average_precision"] == before["average_precision"]

    def test_rows_that_the_model_has_seen_are_not_graded(self, score, lake, tmp_path):
        model = champion(lake, out_of_time_from="2020-01-10")
        report = reports_of(score(tmp_path, keys=["a"], model=model))["a"]
        assert [(grade["week"], grade["first_date"]) for grade in report["grades"]] == [
            (1, "2020-01-10"),
            (2, "2020-01-15"),
        ]
        assert report["grades"][0]["rows"] + report["grades"][0]["removed_rows"] == 5 * ROWS_PER_DAY

    def test_scores_of_other_rows_than_the_cleaned_ones_have_no_grade_and_others_do(
        self, score, scored, output, lake, tmp_path
    ):
        wrong = {"a": {**grading.entry_of(uri(output, "b", "scored_transactions"), scored["a"]), "run_id": "x"}}
        report = reports_of(score(tmp_path, keys=["b"], scored=wrong))["b"]
        assert [grade["week"] for grade in report["grades"]] == [3, 4], "those of b"
        assert report["grading_error"] == (
            "version 3, 2020-01-01 to 2020-01-07 in a: the scored rows are not those of the cleaned partitions: "
            "score them again"
        )
        assert report["counts"]["rows"] == DAYS * ROWS_PER_DAY


@pytest.mark.parametrize("profile", [[], {"edges": {"tx_amount": ["x"]}}, {"edges": {"tx_amount": 1}}])
def test_a_damaged_training_report_is_as_good_as_an_empty_one(spark, tmp_path, profile):
    (tmp_path / "_report.json").write_text(json.dumps({"profile": profile}))
    found = score_transactions._profile(runtime.Files(spark), {"report_uri": str(tmp_path / "_report.json")})
    assert found == ({}, {})


@pytest.mark.images
def test_an_empty_training_report_does_not_stop_the_scores(scored):
    assert {report["drift"]["feature_drift"]["outcome"] for report in scored.values()} == {"not_calibrated"}


class TestWithoutScores:
    @pytest.mark.parametrize(
        ("changes", "outcome", "told"),
        [
            (None, "no_champion", None),
            ({"error": "version 3 has no model file in its tags"}, "champion_unreadable", "no model file"),
            pytest.param(
                *({"model_uri": "/gone/model.json"}, "champion_unreadable", "there is no /gone/model.json"),
                marks=pytest.mark.images,
            ),
            ({"content": "{"}, "champion_unreadable", "schema_version"),
            ({"content": {"schema_version": 99}}, "champion_newer_library", "schema 99"),
            ({"features": ["tx_amount", "moon"]}, "champion_other_features", "moon"),
            # It loads, and fails while it scores: infinity less infinity.
            pytest.param(
                *({"coefficients": [1e308, -1e308]}, "champion_unreadable", "scores that are not numbers"),
                marks=pytest.mark.images,
            ),
        ],
    )
    def test_the_report_says_why_and_grades_are_made(
        self, score, scored, output, lake, tmp_path, changes, outcome, told
    ):
        model = None
        if changes is not None:
            document = {**json.loads((lake / "model.json").read_text()), "features": changes.pop("features", FEATURES)}
            if "coefficients" in changes:
                coefficients = {"coefficients": changes.pop("coefficients"), "deviation": [1e-300, 1e-300]}
                document["model"] = {**document["model"], **coefficients}
            (tmp_path / "model.json").write_text(json.dumps(changes.pop("content", document)))
            model = champion(lake, **{"model_uri": str(tmp_path / "model.json"), **changes})
        # Scores of an earlier version of the rows go.
        old = tmp_path / "scored_transactions" / "raw_file=b"
        old.mkdir(parents=True)
        (old / "part-0.parquet").write_bytes(b"old")
        entries = {"a": grading.entry_of(uri(output, "a", "scored_transactions"), scored["a"])}
        # Whatever the outcome, grades are made in the same way: once is enough.
        last_day = 2 * DAYS - 1 if model is None else -1
        asked = {"scored": entries, "last_day": last_day, "run_id": "run-3"}
        report = reports_of(score(tmp_path, keys=["b"], model=model, **asked))["b"]
        assert report["outcome"] == outcome
        assert told is None or told in report["error"]
        assert sorted(path.name for path in old.iterdir() if not path.name.startswith(".")) == ["_report.json"]
        assert [grade["week"] for grade in report["grades"]] == ([0, 1, 2] if model is None else [])
