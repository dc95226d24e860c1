"""Training on small feature partitions whose fraud follows two features: windows, leaks, learners, champions."""

from __future__ import annotations

import json
import random
import re
import shutil
import statistics
from datetime import date, datetime, timedelta, timezone

import pytest

from spark_jobs import evaluation, runtime, train_model, verify_model
from spark_jobs.schema import SCHEMA_VERSION

pytestmark = pytest.mark.spark

EPOCH = datetime(2020, 1, 1, tzinfo=timezone.utc)
SCHEMA = (
    "transaction_id bigint, tx_datetime timestamp, customer_id bigint, terminal_id bigint, tx_amount double, "
    "tx_time_seconds bigint, tx_time_days int, tx_fraud int, tx_fraud_scenario int, risk double, noise double"
)
COLUMN = {name.split()[0]: index for index, name in enumerate(SCHEMA.split(", "))}
FILE_DAYS = 14
FILES = 2
#: Last full day of the second file.
LAST_DAY = FILES * FILE_DAYS - 1
SHORT_WINDOWS = {
    "test_days": 3,
    "delay_days": 2,
    "validation_days": 3,
    "train_days": 12,
    "min_train_days": 4,
    "compromised_lookback_days": 3,
    "alerts_per_day": 10,
}


#: Small trees, so that a fit takes a second.
TREES = {
    "gbt": {"maxIter": [3], "maxDepth": [2, 3], "maxBins": [64]},
    "random_forest": {"numTrees": [3], "maxDepth": [4], "maxBins": [64], "featureSubsetStrategy": ["onethird"]},
}


def logistic(**grid):
    return [{"learner": "logistic_regression", "grid": grid}]


def make_rows(seed=7, rows_per_day=120):
    """Two files of rows and their features; in each file one row stands at 24:00:00 of its last day."""
    draw = random.Random(seed)
    rows = []
    for file in range(FILES):
        first, after = file * FILE_DAYS * 86_400, (file + 1) * FILE_DAYS * 86_400
        times = [draw.randrange(first, after) for _ in range(rows_per_day * FILE_DAYS - 1)] + [after]
        for seconds in times:
            fraud = int(draw.random() < 0.12)
            rows.append(
                [
                    len(rows),
                    EPOCH + timedelta(seconds=seconds),
                    draw.choice([None, *range(1, 400)]),
                    draw.randrange(50),
                    abs(draw.gauss(30 + 40 * fraud, 20)),
                    seconds,
                    seconds // 86_400,
                    fraud,
                    fraud * (1 + len(rows) % 3),
                    draw.gauss(1.5 * fraud, 1),
                    draw.gauss(0, 1),
                ]
            )
    return rows


def write(spark, rows, directory):
    """Feature partitions as the lake has them; their URIs."""
    uris = []
    size = len(rows) // FILES
    for file in range(FILES):
        uri = str(directory / "transaction_features" / f"raw_file=file{file}")
        part = [tuple(row) for row in rows[file * size : (file + 1) * size]]
        spark.createDataFrame(part, SCHEMA).coalesce(1).write.parquet(uri)
        uris.append(uri)
    return uris


def vectors(spark, uris, condition):
    """Rows as the learners take them."""
    from pyspark.ml.feature import VectorAssembler

    assembler = VectorAssembler(inputCols=["tx_amount", "risk", "noise"], outputCol=train_model.VECTOR)
    return assembler.transform(spark.read.parquet(*uris).where(condition))


def request(uris, output, **changes):
    return {
        "run_id": "run-1",
        "cutoff": "file1",
        "feature_uris": uris,
        "cutoff_uri": uris[-1],
        "features": ["tx_amount", "risk", "noise"],
        "output_uri": str(output),
        "candidates": logistic(regParam=[0.5, 0], maxIter=[100, 200]),
        **SHORT_WINDOWS,
        **changes,
    }


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def uris(spark, rows, tmp_path_factory):
    return write(spark, rows, tmp_path_factory.mktemp("a lake"))


@pytest.fixture(scope="module")
def trained(spark, uris, tmp_path_factory):
    output = tmp_path_factory.mktemp("models") / "run 1"
    return train_model.run(spark, request(uris, output))


def expected_test_rows(rows):
    """The held-out rows, from the definition: day by day without the cards known by then."""
    start = LAST_DAY - 2
    kept = []
    for row in rows:
        day = row[COLUMN["tx_time_days"]]
        if not start <= day <= LAST_DAY:
            continue
        known = {
            other[COLUMN["customer_id"]]
            for other in rows
            if other[COLUMN["tx_fraud"]] and start - 2 - 3 <= other[COLUMN["tx_time_days"]] <= day - 2 - 1
        } - {None}
        if row[COLUMN["customer_id"]] not in known:
            kept.append(row)
    return kept


class TestWindows:
    def test_handbook_geometry(self):
        assert train_model.time_windows(0, 119, train_model.DEFAULTS) == {
            "train": (46, 105),
            "validation_train": (46, 91),
            "validation": (99, 105),
            "test": (113, 119),
        }

    def test_train_starts_where_the_data_do(self):
        windows = train_model.time_windows(80, 119, train_model.DEFAULTS)
        assert (windows["train"], windows["validation_train"]) == ((80, 105), (80, 91))

    def test_rows_at_24_00_00_do_not_move_the_end(self, trained, rows):
        assert max(row[COLUMN["tx_time_days"]] for row in rows) == LAST_DAY + 1
        windows = trained["windows"]
        assert {name: (window["first_day"], window["last_day"]) for name, window in windows.items()} == {
            "train": (11, 22),
            "validation_train": (11, 17),
            "validation": (20, 22),
            "test": (25, 27),
        }
        assert (windows["test"]["first_date"], windows["test"]["last_date"]) == ("2020-01-26", "2020-01-28")

    def test_counts(self, trained, rows):
        for name in ("train", "validation_train", "validation"):
            window = trained["windows"][name]
            inside = [
                row[COLUMN["tx_fraud"]]
                for row in rows
                if window["first_day"] <= row[COLUMN["tx_time_days"]] <= window["last_day"]
            ]
            assert (window["rows"], window["frauds"]) == (len(inside), sum(inside))
            assert window["days"] == window["last_day"] - window["first_day"] + 1


class TestReport:
    def test_is_json_and_complete(self, trained):
        assert json.loads(json.dumps(trained)) == trained
        assert trained["outcome"] == "trained"
        assert trained["schema_version"] == SCHEMA_VERSION
        assert trained["champion"] is None
        assert not [name for name in trained["metrics"] if name.startswith("champion")]
        assert set(trained["seconds"]) == {"windows", "search", "fit", "score", "evaluate", "total"}

    def test_best_is_the_first_of_the_highest(self, trained):
        grid = trained["grid"]
        assert {entry["learner"] for entry in grid} == {"logistic_regression"}
        assert [tuple(entry["params"].values()) for entry in grid] == [(0.5, 100), (0.5, 200), (0, 100), (0, 200)]
        highest = max(entry["validation_average_precision"] for entry in grid)
        first = next(entry for entry in grid if entry["validation_average_precision"] == highest)
        assert trained["best"]["params"] == first["params"]
        assert trained["best"]["learner"] == "logistic_regression"
        assert trained["best"]["validation_average_precision"] == highest

    def test_importances_of_a_logistic_regression(self, trained, rows):
        """Coefficient times standard deviation, as shares."""
        window = trained["windows"]["train"]
        inside = [row for row in rows if window["first_day"] <= row[COLUMN["tx_time_days"]] <= window["last_day"]]
        sizes = {
            name: abs(value) * statistics.stdev(row[COLUMN[name]] for row in inside)
            for name, value in trained["coefficients"].items()
        }
        expected = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        assert trained["feature_importances"] == pytest.approx(expected)

    def test_one_fold_and_no_sampling_unless_asked(self, trained):
        windows = trained["windows"]
        assert trained["validation_folds"] == [{name: windows[name] for name in ("validation_train", "validation")}]
        assert [entry["fold_average_precisions"] for entry in trained["grid"]] == [
            [entry["validation_average_precision"]] for entry in trained["grid"]
        ]
        assert trained["sampling"] is None

    def test_tables_are_of_the_held_out_rows(self, spark, trained, rows):
        tables, metrics, test = trained["tables"], trained["metrics"], trained["windows"]["test"]
        assert set(tables) == {
            "roc",
            "precision_recall",
            "score_histogram",
            "calibration",
            "per_day",
            "per_scenario",
            "thresholds",
        }
        assert sum(bin["genuine"] + bin["frauds"] for bin in tables["score_histogram"]) == test["rows"]
        assert sum(bin["rows"] for bin in tables["calibration"]) == test["rows"]
        assert sum(day["rows"] for day in tables["per_day"]) == test["rows"]
        assert sum(day["frauds"] for day in tables["per_day"]) == test["frauds"]
        assert [day["date"] for day in tables["per_day"]] == ["2020-01-26", "2020-01-27", "2020-01-28"]
        for table in tables.values():
            assert all(isinstance(value, (int, float, str)) for row in table for value in row.values())

        scenarios = {}
        for row in expected_test_rows(rows):
            if row[COLUMN["tx_fraud"]]:
                scenario = row[COLUMN["tx_fraud_scenario"]]
                scenarios[scenario] = scenarios.get(scenario, 0) + 1
        assert {row["scenario"]: row["frauds"] for row in tables["per_scenario"]} == scenarios
        assert set(scenarios) == {1, 2, 3}
        caught = sum(row["caught"] for row in tables["per_scenario"])
        assert caught / test["frauds"] == pytest.approx(metrics["test_recall_at_budget"])
        assert tables["thresholds"][0]["recall"] == metrics["test_recall_at_budget"]

    def test_the_signal_is_found(self, trained):
        assert trained["metrics"]["test_roc_auc"] > 0.85
        assert trained["coefficients"]["risk"] > 4 * abs(trained["coefficients"]["noise"])

    def test_scores_are_the_held_out_rows_and_give_the_metrics(self, spark, trained, rows):
        from sklearn.metrics import average_precision_score, roc_auc_score

        scores = spark.read.parquet(trained["scores_uri"])
        assert scores.dtypes == [
            ("transaction_id", "bigint"),
            ("tx_datetime", "timestamp"),
            ("customer_id", "bigint"),
            ("tx_amount", "double"),
            ("tx_fraud", "int"),
            ("score", "double"),
            ("champion_score", "double"),
        ]
        written = scores.collect()
        expected = expected_test_rows(rows)
        assert sorted(row["transaction_id"] for row in written) == sorted(row[0] for row in expected)
        removed = trained["windows"]["test"]["removed_rows"]
        in_window = sum(25 <= row[COLUMN["tx_time_days"]] <= 27 for row in rows)
        assert removed == in_window - len(expected) > 0
        assert {row["champion_score"] for row in written} == {None}

        labels, values = [row["tx_fraud"] for row in written], [row["score"] for row in written]
        metrics = trained["metrics"]
        assert metrics["test_average_precision"] == pytest.approx(average_precision_score(labels, values))
        assert metrics["test_roc_auc"] == pytest.approx(roc_auc_score(labels, values))
        assert (metrics["test_rows"], metrics["test_frauds"]) == (len(labels), sum(labels))
        assert metrics["test_card_precision_at_100"] == evaluation.card_precision(scores)
        assert metrics["test_recall_at_budget"] == evaluation.budget_metrics(scores, "score", 10)["recall"]

    def test_saved_model_gives_the_same_scores(self, spark, trained, uris):
        from pyspark.ml import PipelineModel

        model = PipelineModel.load(trained["model_uri"])
        again = model.transform(spark.read.parquet(*uris)).select(
            "transaction_id", train_model._probability().alias("again")
        )
        compared = spark.read.parquet(trained["scores_uri"]).join(again, "transaction_id")
        assert compared.count() == trained["metrics"]["test_rows"]
        assert compared.where("score <> again").count() == 0


def test_rows_after_the_train_window_choose_nothing(spark, trained, rows, tmp_path):
    """Other labels and features in the delay, the test window and after D: only the test's figures move."""
    changed = []
    for row in rows:
        other = list(row)
        if row[COLUMN["tx_time_days"]] > trained["windows"]["train"]["last_day"]:
            other[COLUMN["tx_fraud"]] = 1 - row[COLUMN["tx_fraud"]]
            other[COLUMN["risk"]] = 2 * row[COLUMN["risk"]]
            other[COLUMN["tx_amount"]] = 1000.0
        changed.append(other)
    uris = write(spark, changed, tmp_path)
    report = train_model.run(spark, request(uris, tmp_path / "model"))
    assert report["best"]["params"] == trained["best"]["params"]
    assert [entry["validation_average_precision"] for entry in report["grid"]] == pytest.approx(
        [entry["validation_average_precision"] for entry in trained["grid"]], rel=1e-9
    )
    assert report["coefficients"] == pytest.approx(trained["coefficients"], rel=1e-6)
    assert report["intercept"] == pytest.approx(trained["intercept"], rel=1e-6)
    assert report["metrics"]["test_roc_auc"] < trained["metrics"]["test_roc_auc"] - 0.1


def test_cards_are_removed_from_the_day_they_are_known(spark):
    """Delay 2, lookback 3, test window 20 to 22: known are frauds of day 15 on, until three days before."""
    rows = [
        ("unknown customer, fraud", None, 15, 1),
        ("unknown customer", None, 22, 0),
        ("fraud before the lookback", 1, 14, 1),
        ("forgotten", 1, 20, 0),
        ("first day of the lookback", 2, 15, 1),
        ("known", 2, 20, 0),
        ("fraud known on the second day", 3, 18, 1),
        ("not yet known", 3, 20, 0),
        ("known by now", 3, 21, 1),
        ("fraud in the delay of the last day", 4, 20, 1),
        ("never known in the window", 4, 22, 0),
        ("genuine before", 5, 16, 0),
        ("never compromised", 5, 22, 0),
    ]
    frame = spark.createDataFrame(rows, "what string, customer_id bigint, tx_time_days int, tx_fraud int")
    kept = train_model.without_compromised_cards(frame, (20, 22), SHORT_WINDOWS)
    assert {row["what"] for row in kept.where("tx_time_days >= 20").collect()} == {
        "unknown customer",
        "forgotten",
        "not yet known",
        "fraud in the delay of the last day",
        "never known in the window",
        "never compromised",
    }


def test_a_window_may_begin_before_the_first_year() -> None:
    first_of_january = date(1, 1, 1).toordinal() - date(1970, 1, 1).toordinal()
    window = train_model._window(-1, 1, {}, first_of_january)
    assert (window["first_date"], window["last_date"]) == ("0000-12-31", "0001-01-02")


class TestTooLittleData:
    def refused(self, spark, tmp_path, uris, **changes):
        report = train_model.run(spark, request(uris, tmp_path / "model", **changes))
        assert report["outcome"] == "too_little_data"
        assert json.loads(json.dumps(report)) == report
        assert not (tmp_path / "model").exists()
        return report["reason"]

    def test_days(self, spark, tmp_path, uris):
        reason = self.refused(spark, tmp_path, uris[:1], cutoff="file0", cutoff_uri=uris[0], min_train_days=5)
        assert reason.startswith("There are 14 days of data up to 2020-01-14, and at least 15 are needed: 5 to fit")

    def test_enough_days_to_the_day(self, spark, tmp_path, uris):
        # 4 to fit on + 2 + 3 to choose on + 2 + 3 to test on = 14, but no window has so many frauds.
        reason = self.refused(spark, tmp_path, uris[:1], cutoff="file0", cutoff_uri=uris[0], min_frauds=10_000)
        assert "2020-01-01 to 2020-01-09 (train) has " in reason
        assert "and at least 10000 frauds are needed" in reason
        assert all(name in reason for name in ("(validation)", "(test)"))

    def test_no_genuine_rows(self, spark, tmp_path, rows):
        changed = [list(row) for row in rows]
        for row in changed:
            if 20 <= row[COLUMN["tx_time_days"]] <= 22:
                row[COLUMN["tx_fraud"]] = 1
        reason = self.refused(spark, tmp_path, write(spark, changed, tmp_path))
        assert "2020-01-21 to 2020-01-23 (validation)" in reason
        assert "no genuine row" in reason

    def test_empty_cutoff(self, spark, tmp_path, uris):
        empty = str(tmp_path / "raw_file=empty")
        spark.createDataFrame([], SCHEMA).write.parquet(empty)
        reason = self.refused(spark, tmp_path, [*uris, empty], cutoff="empty", cutoff_uri=empty)
        assert "empty has no rows" in reason


def test_candidates_are_judged_on_the_validation_windows(spark, uris, trained, tmp_path, monkeypatch):
    seen = []

    def search(folds, candidates, seed, weight, progress):
        seen.extend([[(fitted_on.count(), validated_on.count()) for fitted_on, validated_on in folds], candidates])
        seen.extend([seed, weight])
        raise InterruptedError

    monkeypatch.setattr(train_model, "search", search)
    candidates = logistic(regParam=[7])
    with pytest.raises(InterruptedError):
        train_model.run(spark, request(uris, tmp_path, candidates=candidates, seed=5))
    windows = trained["windows"]
    assert seen == [[(windows["validation_train"]["rows"], windows["validation"]["rows"])], candidates, 5, None]


class TestTrees:
    @pytest.fixture(scope="class", params=TREES)
    def learner(self, request):
        return request.param

    @pytest.fixture(scope="class")
    def twice(self, spark, uris, learner, tmp_path_factory):
        """The same request, done twice; trees against a logistic regression that cannot win."""
        candidates = [
            *logistic(regParam=[1000], maxIter=[1], fitIntercept=[False]),
            {"learner": learner, "grid": TREES[learner]},
        ]
        output = tmp_path_factory.mktemp("models")
        return [
            train_model.run(spark, request(uris, output / name, candidates=candidates, seed=3)) for name in ("a", "b")
        ]

    def test_is_found_saved_and_scores(self, spark, uris, learner, twice):
        from pyspark.ml import PipelineModel
        from sklearn.metrics import average_precision_score

        report = twice[0]
        assert json.loads(json.dumps(report)) == report
        assert report["best"]["learner"] == learner
        assert [entry["learner"] for entry in report["grid"]] == ["logistic_regression"] + [learner] * (
            2 if learner == "gbt" else 1
        )
        assert report["metrics"]["test_roc_auc"] > 0.8
        assert "coefficients" not in report
        importances = report["feature_importances"]
        assert list(importances) == report["features"]
        assert sum(importances.values()) == pytest.approx(1)
        assert importances["risk"] > importances["noise"] >= 0

        again = PipelineModel.load(report["model_uri"]).transform(spark.read.parquet(*uris))
        again = again.select("transaction_id", train_model._probability().alias("again"))
        rows = spark.read.parquet(report["scores_uri"]).join(again, "transaction_id").collect()
        assert len(rows) == report["metrics"]["test_rows"]
        assert all(row["score"] == row["again"] and 0 <= row["score"] <= 1 for row in rows)
        assert report["metrics"]["test_average_precision"] == pytest.approx(
            average_precision_score([row["tx_fraud"] for row in rows], [row["score"] for row in rows])
        )

    def test_is_reproducible(self, spark, twice):
        first, second = twice
        assert second["best"] == first["best"]
        assert second["feature_importances"] == pytest.approx(first["feature_importances"], abs=1e-9)
        scores = [
            {row["transaction_id"]: row["score"] for row in spark.read.parquet(report["scores_uri"]).collect()}
            for report in twice
        ]
        assert scores[1] == pytest.approx(scores[0], abs=1e-9)
        assert len(set(scores[0].values())) > 3

    def test_seed_is_the_forests(self, spark, uris):
        """Another seed draws other rows and features; without seed, nothing would be reproducible."""
        params = {name: values[0] for name, values in TREES["random_forest"].items()}
        frame = vectors(spark, uris, "tx_time_days < 6")
        models = [
            train_model._estimator("random_forest", params, seed, None).fit(frame).toDebugString.splitlines()[1:]
            for seed in (1, 1, 2)
        ]
        assert models[0] == models[1] != models[2]


class TestFolds:
    def test_each_ends_validation_days_earlier_where_the_data_allow(self):
        windows = train_model.time_windows(0, 119, train_model.DEFAULTS)
        per_day = dict.fromkeys(range(120), (100, 5))
        settings = {**train_model.DEFAULTS, "validation_folds": 3}
        folds = [
            {"validation_train": (46, 91), "validation": (99, 105)},
            {"validation_train": (46, 84), "validation": (92, 98)},
            {"validation_train": (46, 77), "validation": (85, 91)},
        ]
        assert train_model.validation_folds(windows, per_day, settings) == folds
        assert train_model.validation_folds(windows, per_day, train_model.DEFAULTS) == folds[:1]
        # 46 to 77 are 32 days.
        assert train_model.validation_folds(windows, per_day, {**settings, "min_train_days": 32}) == folds
        assert train_model.validation_folds(windows, per_day, {**settings, "min_train_days": 33}) == folds[:2]
        # Days 92 to 98 have no frauds, then nothing but frauds.
        for frauds in (0, 100):
            week = {**per_day, **dict.fromkeys(range(92, 99), (100, frauds))}
            assert train_model.validation_folds(windows, week, settings) == folds[:1]

    def test_a_candidates_score_is_the_mean_over_the_folds(self, spark, uris, rows, trained, tmp_path, monkeypatch):
        """Each fold's figure, against the fold fitted and judged on its own."""
        monkeypatch.setattr(evaluation, "evaluate_with_tables", lambda *_: ({}, {}))  # is not the matter
        changes = {
            "validation_folds": 5,
            "min_train_days": 2,
            "candidates": [*logistic(regParam=[0, 0.5]), {"learner": "gbt", "grid": {"maxIter": [1], "maxDepth": [2]}}],
        }
        report = train_model.run(spark, request(uris, tmp_path / "model", **changes))
        folds = report["validation_folds"]
        # The train window is day 11 to 22; a third fold would have one day to fit on.
        assert [
            [(window["first_day"], window["last_day"]) for window in (fold["validation_train"], fold["validation"])]
            for fold in folds
        ] == [[(11, 17), (20, 22)], [(11, 14), (17, 19)]]
        days = [row[COLUMN["tx_time_days"]] for row in rows]
        assert folds[1]["validation"]["rows"] == sum(17 <= day <= 19 for day in days)
        assert folds[1]["validation_train"]["last_date"] == "2020-01-15"
        for entry in report["grid"]:
            assert len(entry["fold_average_precisions"]) == 2
            assert entry["validation_average_precision"] == pytest.approx(sum(entry["fold_average_precisions"]) / 2)
        assert report["grid"][0]["fold_average_precisions"][0] == pytest.approx(
            trained["grid"][2]["validation_average_precision"], rel=1e-9
        )
        fold = [vectors(spark, uris, f"tx_time_days BETWEEN {days}") for days in ("11 AND 14", "17 AND 19")]
        (alone,) = train_model.search([tuple(fold)], logistic(regParam=[0.5]))
        assert report["grid"][1]["fold_average_precisions"][1] == pytest.approx(
            alone["validation_average_precision"], rel=1e-9
        )


class TestSampling:
    def test_weighted_totals_are_kept(self, spark, uris, trained):
        window = spark.read.parquet(*uris).where("tx_time_days BETWEEN 11 AND 22")
        folds = [{"validation_train": (11, 17), "validation": (20, 22)}]
        settings = {**train_model.DEFAULTS, "max_train_rows": 500}
        samples = [train_model.learning_rows(window, folds, {**settings, "seed": seed}) for seed in (1, 1, 2)]
        kept = []
        for frame, sampling in samples:
            rows = frame.collect()
            train = trained["windows"]["train"]
            assert (sampling["rows"], sampling["frauds"]) == (train["rows"], train["frauds"])
            learned = [row for row in rows if row["weight"] is not None]
            assert len(learned) == sampling["kept_rows"] == pytest.approx(500, abs=60)
            assert sum(row["tx_fraud"] for row in learned) == train["frauds"]
            assert {row["weight"] for row in learned if row["tx_fraud"]} == {1.0}
            assert sum(row["weight"] for row in learned) == pytest.approx(train["rows"])
            # What is validated on is all there.
            assert sum(row["tx_time_days"] >= 20 for row in rows) == trained["windows"]["validation"]["rows"]
            assert all(row["weight"] is not None for row in rows if row["tx_time_days"] < 20)
            kept.append({row["transaction_id"] for row in learned})
        assert kept[0] == kept[1] != kept[2]

    def test_frauds_are_never_fewer_than_asked_for(self, spark, uris, trained):
        window = spark.read.parquet(*uris).where("tx_time_days BETWEEN 11 AND 22")
        folds = [{"validation_train": (11, 17), "validation": (20, 22)}]
        _, sampling = train_model.learning_rows(window, folds, {**train_model.DEFAULTS, "max_train_rows": 1})
        frauds = trained["windows"]["train"]["frauds"]
        assert sampling["kept_rows"] - frauds == pytest.approx(frauds, rel=0.3)

    def test_enough_room_leaves_the_rows_alone(self, spark, uris, trained):
        window = spark.read.parquet(*uris).where("tx_time_days BETWEEN 11 AND 22")
        rows = trained["windows"]["train"]["rows"]
        for limit in (None, rows):
            frame, sampling = train_model.learning_rows(window, [], {**train_model.DEFAULTS, "max_train_rows": limit})
            assert sampling is None
            assert "weight" not in frame.columns
            assert frame.count() == rows

    @pytest.mark.parametrize("learner", train_model.LEARNERS)
    def test_scores_stay_calibrated(self, spark, uris, learner):
        """A third of the genuine rows is learned from: without weights, the mean score would be twice as high."""
        from pyspark.ml.feature import VectorAssembler
        from pyspark.sql import functions

        window = spark.read.parquet(*uris).where("tx_time_days BETWEEN 11 AND 22")
        folds = [{"validation_train": (11, 17), "validation": (23, 25)}]
        rows, _ = train_model.learning_rows(window, folds, {**train_model.DEFAULTS, "max_train_rows": 600})
        assembler = VectorAssembler(inputCols=["tx_amount", "risk", "noise"], outputCol=train_model.VECTOR)
        params = {"gbt": {"maxIter": 10, "maxDepth": 2, "stepSize": 0.5}, "random_forest": {"maxDepth": 4}}
        estimator = train_model._estimator(learner, params.get(learner, {}), 0, train_model.WEIGHT)
        scored = estimator.fit(assembler.transform(rows)).transform(assembler.transform(window))
        mean, share = scored.agg(functions.avg(train_model._probability()), functions.avg("tx_fraud")).collect()[0]
        assert mean == pytest.approx(share, rel=0.2)

    def test_is_reported(self, spark, uris, tmp_path):
        changes = {"max_train_rows": 600, "candidates": logistic(maxIter=[20])}
        report = train_model.run(spark, request(uris, tmp_path / "model", **changes))
        assert json.loads(json.dumps(report)) == report
        sampling, train = report["sampling"], report["windows"]["train"]
        assert (sampling["max_train_rows"], sampling["rows"], sampling["frauds"]) == (
            600,
            train["rows"],
            train["frauds"],
        )
        genuine = sampling["genuine_weight"] * (sampling["kept_rows"] - sampling["frauds"])
        assert genuine == pytest.approx(train["rows"] - train["frauds"])
        assert report["metrics"]["test_roc_auc"] > 0.85


class TestChampion:
    def test_scores_the_same_rows(self, spark, uris, trained, tmp_path):
        """The base run's model as champion of a run with fewer features."""
        champion = {
            "model_uri": trained["model_uri"],
            "features": trained["features"],
            "version": "1",
            "spark_version": trained["spark_version"],
        }
        changes = {"features": ["tx_amount", "noise"], "candidates": logistic(regParam=[0], maxIter=[100])}
        report = train_model.run(spark, request(uris, tmp_path / "model", champion=champion, **changes))
        assert report["champion"] == {**champion, "status": "scored"}
        before = spark.read.parquet(trained["scores_uri"]).collect()
        after = spark.read.parquet(report["scores_uri"]).collect()
        assert {row["transaction_id"]: row["champion_score"] for row in after} == {
            row["transaction_id"]: row["score"] for row in before
        }
        for name in ("average_precision", "roc_auc", "card_precision_at_100", "recall_at_budget"):
            assert report["metrics"]["champion_test_" + name] == trained["metrics"]["test_" + name]
        assert report["metrics"]["test_roc_auc"] < report["metrics"]["champion_test_roc_auc"]

    @pytest.fixture
    def score_beside(self, spark, uris, trained, tmp_path):
        """Score some rows with the base run's model and a champion; the verdict and the rows written."""
        from pyspark.ml import PipelineModel

        test = spark.read.parquet(*uris).where("tx_time_days = 25")
        model = PipelineModel.load(trained["model_uri"])
        output = str(tmp_path / "test_scores")

        def score(champion):
            verdict = train_model.write_scores(spark, test, model, champion, output)
            return verdict, spark.read.parquet(output)

        return score

    @pytest.mark.parametrize(
        ("champion", "told"),
        [
            ({"model_uri": "/nowhere/model", "features": ["risk"], "version": "1"}, "/nowhere/model"),
            ({"model_uri": "/nowhere/model", "features": ["risk", "age"], "version": "1"}, "not have: age"),
            ({"model_uri": "/nowhere", "features": [], "spark_version": "99.1"}, "(saved by Spark 99.1, read by "),
        ],
        ids=["no model there", "other features", "another Spark"],
    )
    def test_unreadable_is_reported(self, score_beside, champion, told):
        verdict, scores = score_beside(champion)
        assert verdict["status"] == "unreadable"
        assert told in verdict["error"]
        assert "\n" not in verdict["error"]
        assert scores.where("champion_score IS NOT NULL").count() == 0
        assert scores.where("score IS NOT NULL").count() > 50

    @pytest.mark.parametrize(
        ("on_null", "told"), [("error", ""), ("keep", "gives no number for")], ids=["fails on a row", "NaN"]
    )
    def test_failing_on_some_rows_is_unreadable_too(self, score_beside, trained, tmp_path, on_null, told):
        """Customers are NULL on some rows only, so the champion loads, applies, and fails while it scores."""
        from pyspark.ml import PipelineModel
        from pyspark.ml.feature import VectorAssembler

        _, logistic = PipelineModel.load(trained["model_uri"]).stages
        features = ["tx_amount", "risk", "customer_id"]
        assembler = VectorAssembler(inputCols=features, outputCol=train_model.VECTOR, handleInvalid=on_null)
        uri = str(tmp_path / "champion")
        PipelineModel(stages=[assembler, logistic]).save(uri)
        verdict, scores = score_beside({"model_uri": uri, "features": features, "version": "2"})
        assert verdict["status"] == "unreadable"
        assert told in verdict["error"]
        assert scores.where("champion_score IS NOT NULL").count() == 0
        assert scores.where("score IS NOT NULL").count() > 50


class TestSparkVersions:
    """A model says itself which Spark saved it; a newer one's is refused before anything of it is loaded."""

    @pytest.fixture
    def saved_by(self, trained, tmp_path):
        """The base run's model as if a Spark of that version had saved it; its URI."""

        def saved_by(version):
            copy = tmp_path / f"a [model] {{of}} {version}"
            shutil.copytree(trained["model_uri"], str(copy))
            (metadata,) = copy.glob("metadata/part-*")
            text = metadata.read_text()
            assert '"sparkVersion":"' in text
            metadata.write_text(re.sub('"sparkVersion":"[^"]+"', f'"sparkVersion":"{version}"', text))
            for checksum in copy.glob("metadata/.*.crc"):
                checksum.unlink()
            return str(copy)

        return saved_by

    def test_a_newer_sparks_model_is_refused_by_name(self, spark, uris, trained, saved_by, tmp_path):
        uri = saved_by("99.1.0")
        told = f"saved by Spark 99.1.0, and this older Spark {spark.version} does not read it"
        request = {"run_id": "r", "feature_uris": uris[-1:], "features": trained["features"], "model_uri": uri}
        with pytest.raises(runtime.NewerSparkError, match=re.escape(told)):
            verify_model.run(spark, {**request, "scores_uri": trained["scores_uri"]})

        champion = {"model_uri": uri, "features": trained["features"], "version": "1", "spark_version": "99.1.0"}
        model = runtime.load_model(spark, trained["model_uri"])
        test, output = spark.read.parquet(*uris).where("tx_time_days = 25"), str(tmp_path / "test_scores")
        verdict = train_model.write_scores(spark, test, model, champion, output)
        assert verdict["status"] == "newer_spark"
        assert told in verdict["error"]
        assert spark.read.parquet(output).where("champion_score IS NOT NULL").count() == 0

    def test_an_older_sparks_model_and_that_of_another_patch_are_loaded(self, spark, saved_by):
        own = ".".join(spark.version.split(".")[:2])
        for version in ("2.4.8", own + ".99"):
            assert len(runtime.load_model(spark, saved_by(version)).stages) == 2


class TestSearch:
    def test_a_converged_fit_is_every_longer_fit(self, spark, uris):
        frame = vectors(spark, uris, "tx_time_days <= 20").coalesce(1)
        iterations = [200, 3, 100]
        entries = train_model.search([(frame, frame)], logistic(regParam=[0], maxIter=iterations))
        assert [entry["params"]["maxIter"] for entry in entries] == iterations
        longest, stopped, converged = entries
        # The first was stopped by its maxIter, so the next was fitted; that converged, so the longest was not.
        assert stopped["iterations"] == 3 < converged["iterations"] < 100
        assert [entry["reused_fit"] for entry in entries] == [True, False, False]
        assert longest["validation_average_precision"] == converged["validation_average_precision"]

        short, long = (
            train_model._estimator("logistic_regression", {"regParam": 0, "maxIter": maximum}, 0, None).fit(frame)
            for maximum in (100, 200)
        )
        assert train_model._iterations(long) == converged["iterations"]
        assert list(short.coefficients) == list(long.coefficients)

    def test_an_error_of_a_fit_is_raised(self, spark):
        frame = spark.createDataFrame([(1,)], "tx_fraud int")
        with pytest.raises(Exception, match=train_model.VECTOR):
            train_model.search([(frame, frame)], logistic(regParam=[0]))

    def test_the_default_has_every_learner_and_the_baselines_grid(self, spark):
        points = train_model._points(train_model.DEFAULTS["candidates"])
        assert {learner for learner, _ in points} == set(train_model.LEARNERS)
        baseline = [params for learner, params in points if learner == "logistic_regression"]
        assert [(params["regParam"], params["maxIter"]) for params in baseline] == [
            (strength, iterations) for strength in (0, 0.1, 0.5) for iterations in (100, 500, 1000)
        ]

    @pytest.mark.parametrize("learner", train_model.LEARNERS)
    def test_whatever_a_grid_may_vary_is_a_parameter(self, spark, learner):
        estimator = train_model._estimator(learner, {}, 0, None)
        assert all(estimator.hasParam(name) for name in train_model.LEARNERS[learner][1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"features": []}, "lacks features"),
        ({"cutoff_uri": "/elsewhere"}, "one of feature_uris"),
        ({"features": ["risk", "age_of_card"]}, "no column age_of_card"),
        ({"candidates": [{"learner": "xgboost"}]}, "no learner 'xgboost'; .* logistic_regression, gbt, random_forest"),
        ({"candidates": [{"learner": "gbt", "grid": {"numTrees": [5]}}]}, "gbt cannot have numTrees; .* maxIter"),
        ({"candidates": [{"learner": "gbt", "grid": {"maxDepth": ["deep"]}}]}, "gbt cannot have {'maxDepth': 'deep'}"),
        ({"candidates": []}, "no combination"),
        ({"candidates": [{"learner": "gbt", "grid": {"maxDepth": []}}]}, "no combination"),
        ({"validation_folds": 0}, "validation_folds must be 1 or more"),
        ({"max_train_rows": 0}, "max_train_rows must be 1 or more"),
    ],
)
def test_wrong_requests_say_what_is_wrong(spark, uris, tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        train_model.run(spark, request(uris, tmp_path, **change))
