"""Training on small feature partitions whose fraud follows two features: windows, leaks, learners, champions."""

from __future__ import annotations

import json
import random
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import pytest

from spark_jobs import train_model
from spark_jobs.io import parquet_files
from spark_jobs.schema import SCHEMA_VERSION
from spark_jobs.training import fits, learners, library

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
}


FEATURES = ["tx_amount", "risk", "noise"]


def logistic(**grid):
    return [{"learner": "logistic_regression", "grid": grid}]


def trees(**grid):
    """Small ones, so that a fit takes no time."""
    return [{"learner": "xgboost", "grid": {"rounds": [5], "max_depth": [2], "max_bin": [64], **grid}}]


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


def write(rows, directory, files_of_a_partition=1):
    """Feature partitions as the lake has them, written without jobs of Spark; their URIs."""
    import pyarrow
    from pyarrow import parquet

    kinds = [(column.split()[0], parquet_files.arrow_type(column.split()[1])) for column in SCHEMA.split(", ")]
    uris = []
    size = len(rows) // FILES
    for file in range(FILES):
        path = directory / "transaction_features" / f"raw_file=file{file}"
        path.mkdir(parents=True)
        part = rows[file * size : (file + 1) * size]
        for number in range(files_of_a_partition):
            columns = zip(*part[number::files_of_a_partition])
            arrays = [pyarrow.array(values, kind) for values, (_, kind) in zip(columns, kinds)]
            table = pyarrow.Table.from_arrays(arrays, names=[name for name, _ in kinds])
            parquet.write_table(table, str(path / f"part-{number}.parquet"))
        uris.append(str(path))
    return uris


def read(*uris):
    """The rows of Parquet files below directories, read without jobs of Spark."""
    from pyarrow import parquet

    paths = [path for uri in uris for path in Path(uri).glob("*.parquet")]
    tables = [parquet.ParquetFile(str(path)).read().to_pydict() for path in paths]
    return [dict(zip(table, values)) for table in tables for values in zip(*table.values())]


def request(uris, output, **changes):
    return {
        "run_id": "run-1",
        "platform_version": "1.2.3",
        "cutoff": "file1",
        "feature_uris": uris,
        "cutoff_uri": uris[-1],
        "features": FEATURES,
        "output_uri": str(output),
        "candidates": logistic(C=[1e-6, 1], max_iter=[100, 200]),
        **SHORT_WINDOWS,
        **changes,
    }


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def uris(rows, tmp_path_factory):
    return write(rows, tmp_path_factory.mktemp("a lake"))


@pytest.fixture(scope="module")
def train(spark, uris, library_uri):
    """Train on the module's rows, or on `uris`; `changes` are of the request."""

    def train(output, uris=uris, **changes):
        return train_model.run(spark, request(uris, output, **{"library_uri": library_uri, **changes}))

    return train


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("models") / "run 1")


@pytest.fixture(scope="module")
def boosted(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("models") / "boosted", candidates=trees(rounds=[1, 5]), seed=3)


def model_file(report):
    with open(report["model_uri"], encoding="utf-8") as file:
        return file.read()


def roc_auc(report, score="score"):
    """Of the held-out rows."""
    from sklearn.metrics import roc_auc_score

    rows = read(report["scores_uri"])
    return roc_auc_score([row["tx_fraud"] for row in rows], [row[score] for row in rows])


def inside(rows, window):
    """The rows of one of a report's windows."""
    return [row for row in rows if window["first_day"] <= row[COLUMN["tx_time_days"]] <= window["last_day"]]


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

    def test_the_train_window_starts_with_the_data(self):
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

    def test_windows_count_their_rows_and_frauds(self, trained, rows):
        for name in ("train", "validation_train", "validation"):
            window = trained["windows"][name]
            frauds = [row[COLUMN["tx_fraud"]] for row in inside(rows, window)]
            assert (window["rows"], window["frauds"]) == (len(frauds), sum(frauds))
            assert window["days"] == window["last_day"] - window["first_day"] + 1


class TestReport:
    def test_the_report_is_json_and_complete(self, trained):
        assert json.loads(json.dumps(trained)) == trained
        assert trained["outcome"] == "trained"
        assert trained["schema_version"] == SCHEMA_VERSION
        assert trained["platform_version"] == "1.2.3"
        assert trained["champion"] is None
        assert set(trained["seconds"]) == {"windows", "search", "fit", "score", "explain", "total"}

    def test_best_is_the_first_of_the_highest(self, trained):
        grid = trained["grid"]
        assert {entry["learner"] for entry in grid} == {"logistic_regression"}
        assert [tuple(entry["params"].values()) for entry in grid] == [(1e-6, 100), (1e-6, 200), (1, 100), (1, 200)]
        highest = max(entry["validation_average_precision"] for entry in grid)
        first = next(entry for entry in grid if entry["validation_average_precision"] == highest)
        assert trained["best"]["params"] == first["params"]
        assert trained["best"]["learner"] == "logistic_regression"
        assert trained["best"]["validation_average_precision"] == highest

    def test_importances_are_mean_absolute_contributions_of_held_out_rows(self, uris, trained):
        """Of so few rows, all are drawn."""
        scorer = learners.Scorer.from_json(model_file(trained))
        ids = {row["transaction_id"] for row in read(trained["scores_uri"])}
        rows = [row for row in read(*uris) if row["transaction_id"] in ids]
        parts = scorer.contributions(
            learners.matrix_of({name: [row[name] for row in rows] for name in FEATURES}, FEATURES)
        )
        expected = dict(zip(FEATURES, abs(parts[:, :-1]).mean(axis=0)))
        assert trained["feature_importances"] == pytest.approx(expected)

    def test_one_fold_and_no_sampling_unless_asked(self, trained):
        windows = trained["windows"]
        assert trained["validation_folds"] == [{name: windows[name] for name in ("validation_train", "validation")}]
        assert [entry["fold_average_precisions"] for entry in trained["grid"]] == [
            [entry["validation_average_precision"]] for entry in trained["grid"]
        ]
        assert trained["sampling"] is None

    def test_the_signal_is_found(self, trained):
        assert roc_auc(trained) > 0.85
        assert trained["coefficients"]["risk"] > 4 * abs(trained["coefficients"]["noise"])

    def test_scores_are_the_held_out_rows(self, spark, trained, rows):
        assert spark.read.parquet(trained["scores_uri"]).dtypes == [
            ("transaction_id", "bigint"),
            ("tx_datetime", "timestamp"),
            ("customer_id", "bigint"),
            ("tx_amount", "double"),
            ("tx_fraud", "int"),
            ("tx_fraud_scenario", "int"),
            ("score", "double"),
            ("champion_score", "double"),
        ]
        written = read(trained["scores_uri"])
        expected = expected_test_rows(rows)
        assert sorted(row["transaction_id"] for row in written) == sorted(row[0] for row in expected)
        removed = trained["windows"]["test"]["removed_rows"]
        in_window = sum(25 <= row[COLUMN["tx_time_days"]] <= 27 for row in rows)
        assert removed == in_window - len(expected) > 0
        assert {row["champion_score"] for row in written} == {None}

        test = trained["windows"]["test"]
        assert (test["rows"], test["frauds"]) == (len(written), sum(row["tx_fraud"] for row in written))
        by_id = {row[0]: row for row in rows}
        for row in written:
            for name in ("customer_id", "tx_amount", "tx_fraud", "tx_fraud_scenario"):
                assert row[name] == by_id[row["transaction_id"]][COLUMN[name]]

    def test_the_model_file_gives_the_same_scores(self, uris, trained, boosted):
        for report in (trained, boosted):
            scorer = learners.Scorer.from_json(model_file(report))
            scores = {row["transaction_id"]: row["score"] for row in read(report["scores_uri"])}
            rows = [row for row in read(*uris) if row["transaction_id"] in scores]
            matrix = learners.matrix_of({name: [row[name] for row in rows] for name in FEATURES}, FEATURES)
            again = dict(zip([row["transaction_id"] for row in rows], scorer.score(matrix)))
            assert len(again) == report["windows"]["test"]["rows"]
            assert again == scores

    def test_the_sample_is_of_held_out_rows_with_their_inputs_and_scores(self, uris, boosted):
        import pyarrow.parquet as parquet

        table = parquet.read_table(boosted["sample_uri"]).to_pydict()
        ids = ["transaction_id", "tx_datetime", "customer_id", "terminal_id", "tx_fraud"]
        assert list(table) == [*ids, *FEATURES, "score"]
        scores = {row["transaction_id"]: row["score"] for row in read(boosted["scores_uri"])}
        assert dict(zip(table["transaction_id"], table["score"])) == scores
        rows = {row["transaction_id"]: row for row in read(*uris)}
        for name in ("customer_id", "tx_fraud", *FEATURES):
            assert table[name] == [rows[number][name] for number in table["transaction_id"]]
        assert [when.timestamp() for when in table["tx_datetime"]] == [
            rows[number]["tx_time_seconds"] + EPOCH.timestamp() for number in table["transaction_id"]
        ]

    def test_the_profile_counts_the_train_window_by_day(self, boosted, rows):
        profile, window = boosted["profile"], boosted["windows"]["train"]
        assert (profile["first_day"], profile["days"]) == (window["first_day"], window["days"])
        assert set(profile["edges"]) == set(profile["counts"]) == {*FEATURES, "score"}
        per_day = dict.fromkeys(range(window["first_day"], window["last_day"] + 1), 0)
        for row in inside(rows, window):
            per_day[row[COLUMN["tx_time_days"]]] += 1
        for name, edges in profile["edges"].items():
            assert edges == sorted(set(edges))
            assert len(edges) < fits.BINS
            counts = profile["counts"][name]
            assert [sum(day) for day in counts] == list(per_day.values())
            assert {len(day) for day in counts} == {len(edges) + 1}
        # Quantiles: nearly as many rows in each bin.
        totals = [sum(day[number] for day in profile["counts"]["noise"]) for number in range(fits.BINS)]
        assert max(totals) - min(totals) <= 2
        edges = profile["edges"]["risk"]
        below = sum(1 for row in inside(rows, window) if row[COLUMN["risk"]] < edges[0])
        assert sum(day[0] for day in profile["counts"]["risk"]) == pytest.approx(below, abs=1)

    def test_the_profile_counts_the_labels_by_day(self, boosted, rows):
        profile, window = boosted["profile"], boosted["windows"]["train"]
        per_day = {day: [0, 0] for day in range(window["first_day"], window["last_day"] + 1)}
        for row in inside(rows, window):
            counted = per_day[row[COLUMN["tx_time_days"]]]
            counted[0] += 1
            counted[1] += row[COLUMN["tx_fraud"]]
        assert profile["labels"] == list(per_day.values())
        assert profile["effective_rows"] == window["rows"]


def test_rows_after_the_train_window_do_not_affect_the_model(train, trained, rows, tmp_path):
    """Other labels and features in the delay, the test window and after D: only the test's figures move."""
    changed = []
    for row in rows:
        other = list(row)
        if row[COLUMN["tx_time_days"]] > trained["windows"]["train"]["last_day"]:
            other[COLUMN["tx_fraud"]] = 1 - row[COLUMN["tx_fraud"]]
            other[COLUMN["risk"]] = 2 * row[COLUMN["risk"]]
            other[COLUMN["tx_amount"]] = 1000.0
        changed.append(other)
    report = train(tmp_path / "model", write(changed, tmp_path))
    assert report["best"] == trained["best"]
    assert [entry["validation_average_precision"] for entry in report["grid"]] == [
        entry["validation_average_precision"] for entry in trained["grid"]
    ]
    assert model_file(report) == model_file(trained)
    assert roc_auc(report) < roc_auc(trained) - 0.1


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
    @pytest.fixture(autouse=True)
    def use(self, train):
        self.train = train

    def refused(self, tmp_path, uris, **changes):
        report = self.train(tmp_path / "model", uris, **changes)
        assert report["outcome"] == "too_little_data"
        assert json.loads(json.dumps(report)) == report
        assert not (tmp_path / "model").exists()
        return report["reason"]

    def test_too_few_days(self, tmp_path, uris):
        reason = self.refused(tmp_path, uris[:1], cutoff="file0", cutoff_uri=uris[0], min_train_days=5)
        assert reason.startswith("There are 14 days of data up to 2020-01-14, and at least 15 are needed: 5 to fit")

    def test_just_enough_days_but_too_few_frauds(self, tmp_path, uris):
        # 4 to fit on + 2 + 3 to choose on + 2 + 3 to test on = 14, but no window has so many frauds.
        reason = self.refused(tmp_path, uris[:1], cutoff="file0", cutoff_uri=uris[0], min_frauds=10_000)
        assert "2020-01-01 to 2020-01-09 (train) has " in reason
        assert "and at least 10000 frauds are needed" in reason
        assert all(name in reason for name in ("(validation)", "(test)"))

    def test_a_window_of_only_frauds(self, tmp_path, rows):
        changed = [list(row) for row in rows]
        for row in changed:
            if 20 <= row[COLUMN["tx_time_days"]] <= 22:
                row[COLUMN["tx_fraud"]] = 1
        reason = self.refused(tmp_path, write(changed, tmp_path))
        assert "2020-01-21 to 2020-01-23 (validation)" in reason
        assert "no genuine row" in reason

    def test_empty_cutoff(self, spark, tmp_path, uris):
        empty = str(tmp_path / "raw_file=empty")
        spark.createDataFrame([], SCHEMA).write.parquet(empty)
        reason = self.refused(tmp_path, [*uris, empty], cutoff="empty", cutoff_uri=empty)
        assert "empty has no rows" in reason


class TestFits:
    def test_a_fit_is_that_of_the_library_on_the_rows_of_its_window(self, train, boosted, rows):
        """Sorted by time and id, whatever the order of files and tasks."""
        import numpy as np

        train_rows = inside(rows, boosted["windows"]["train"])
        train_rows.sort(key=lambda row: (row[COLUMN["tx_time_seconds"]], row[0]))
        matrix = np.array([[row[COLUMN[name]] for name in FEATURES] for row in train_rows], dtype="f4")
        label = np.array([row[COLUMN["tx_fraud"]] for row in train_rows])
        params = boosted["best"]["params"]
        model = learners.LEARNERS["xgboost"].fit(matrix, label, np.ones(len(label)), params, 3, 4)
        assert learners.Scorer("xgboost", FEATURES, model).to_json() == model_file(boosted)

    def test_the_model_file_holds_no_path_time_or_run(self, boosted):
        text = model_file(boosted)
        for part in ("run-1", "file1", boosted["model_uri"], boosted["windows"]["test"]["last_date"]):
            assert part not in text

    def test_trees_find_the_signal(self, boosted):
        assert (boosted["best"]["learner"], boosted["best"]["params"]["rounds"]) == ("xgboost", 5)
        assert roc_auc(boosted) > 0.8
        assert "coefficients" not in boosted
        importances = boosted["feature_importances"]
        assert list(importances) == FEATURES
        assert importances["risk"] > importances["noise"] >= 0

    def test_amounts_beyond_32_bits_are_trained_on(self, train, rows, tmp_path):
        changed = [list(row) for row in rows]
        for row in changed[::100]:
            row[COLUMN["tx_amount"]] = 1e300
        uris = write(changed, tmp_path)
        report = train(tmp_path / "model", uris, candidates=[*trees(), *logistic()])
        for entry in report["grid"]:
            assert 0.2 < entry["validation_average_precision"] <= 1

    def test_a_feature_that_is_not_a_number_is_named(self, train, rows, tmp_path):
        changed = [list(row) for row in rows]
        changed[len(rows) // 2][COLUMN["risk"]] = None
        with pytest.raises(Exception, match="missing values in risk"):
            train(tmp_path / "model", write(changed, tmp_path), candidates=logistic())


class TestFolds:
    def test_each_fold_ends_validation_days_earlier(self):
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

    #: Columns of every row among them.
    INPUTS = ("tx_time_seconds", "tx_time_days", "tx_amount", "terminal_id", "risk")

    @pytest.fixture(scope="class")
    def folded(self, train, tmp_path_factory):
        candidates = [*trees(rounds=[1], max_depth=[1]), *logistic(C=[1e-6, 1])]
        changes = {"validation_folds": 5, "min_train_days": 2, "candidates": candidates}
        return train(tmp_path_factory.mktemp("folded") / "model", features=list(self.INPUTS), **changes)

    def test_a_candidates_score_is_the_mean_over_the_folds(self, folded, rows):
        """Each fold's figure, against the fold fitted and judged on its own."""
        import numpy as np
        from sklearn.metrics import average_precision_score

        folds = folded["validation_folds"]
        # The train window is day 11 to 22; a third fold would have one day to fit on.
        assert [
            [(window["first_day"], window["last_day"]) for window in (fold["validation_train"], fold["validation"])]
            for fold in folds
        ] == [[(11, 17), (20, 22)], [(11, 14), (17, 19)]]
        days = [row[COLUMN["tx_time_days"]] for row in rows]
        assert folds[1]["validation"]["rows"] == sum(17 <= day <= 19 for day in days)
        assert folds[1]["validation_train"]["last_date"] == "2020-01-15"
        for entry in folded["grid"]:
            alone = []
            for fold in folds:
                fitted, judged = (inside(rows, fold[name]) for name in ("validation_train", "validation"))
                fitted.sort(key=lambda row: (row[COLUMN["tx_time_seconds"]], row[0]))
                (matrix, label), (other, truth) = (
                    (
                        np.array([[row[COLUMN[name]] for name in self.INPUTS] for row in part], dtype="f4"),
                        np.array([row[COLUMN["tx_fraud"]] for row in part]),
                    )
                    for part in (fitted, judged)
                )
                learner = learners.LEARNERS[entry["learner"]]
                model = learner.fit(matrix, label, np.ones(len(label)), entry["params"], 0, 1)
                alone.append(average_precision_score(truth, model.score(other)))
            assert entry["fold_average_precisions"] == pytest.approx(alone, rel=1e-9)
            assert entry["validation_average_precision"] == pytest.approx(sum(alone) / 2)

    def test_columns_of_every_row_may_be_inputs_and_the_best_learner_is_found(self, folded):
        assert [entry["learner"] for entry in folded["grid"]] == ["xgboost", *["logistic_regression"] * 2]
        assert folded["best"]["learner"] == "logistic_regression"
        assert list(folded["coefficients"]) == list(self.INPUTS)


class TestSampling:
    LIMIT = 1000

    @pytest.fixture(scope="class")
    def sampled(self, train, tmp_path_factory):
        """A model of each learner, on samples drawn with two seeds."""
        output = tmp_path_factory.mktemp("sampled")
        return [
            train(output / str(seed), max_train_rows=self.LIMIT, candidates=candidates, seed=seed)
            for seed, candidates in ((1, trees(rounds=[30])), (2, logistic(C=[1])))
        ]

    def test_the_limit_is_a_hard_bound_and_is_reported(self, sampled):
        for report in sampled:
            assert json.loads(json.dumps(report)) == report
            sampling, window = report["sampling"], report["windows"]["train"]
            assert sampling["max_train_rows"] == self.LIMIT
            assert (sampling["rows"], sampling["frauds"]) == (window["rows"], window["frauds"])
            assert self.LIMIT / 2 < sampling["kept_rows"] <= self.LIMIT
            # Frauds are fewer than half of the limit, so all are kept.
            assert (sampling["kept_frauds"], sampling["fraud_weight"]) == (window["frauds"], 1)
            genuine = sampling["genuine_weight"] * (sampling["kept_rows"] - sampling["kept_frauds"])
            assert genuine == pytest.approx(window["rows"] - window["frauds"])

    def test_a_seed_draws_the_rows(self, sampled):
        first, second = (report["sampling"]["kept_rows"] for report in sampled)
        assert first != second

    def test_threads_files_and_their_order_change_no_byte(self, train, sampled, rows, tmp_path):
        """Nor does the order of their rows. The learners' own tests try other numbers of threads."""
        changed = []
        for file in range(FILES):
            part = rows[file * len(rows) // FILES : (file + 1) * len(rows) // FILES]
            changed += random.Random(8).sample(part, len(part))
        changes = {"max_train_rows": self.LIMIT, "candidates": trees(rounds=[30]), "seed": 1, "fit_threads": 8}
        report = train(tmp_path / "model", write(changed, tmp_path, files_of_a_partition=3), **changes)
        assert model_file(report) == model_file(sampled[0])
        same = ("best", "sampling", "profile", "feature_importances", "windows")
        assert {name: report[name] for name in same} == {name: sampled[0][name] for name in same}

    def test_the_profile_counts_what_the_rows_stand_for(self, sampled):
        report = sampled[0]
        profile, window = report["profile"], report["windows"]["train"]
        assert sum(map(sum, profile["counts"]["risk"])) == pytest.approx(window["rows"], rel=0.05)
        rows, frauds = (sum(column) for column in zip(*profile["labels"]))
        assert (rows, frauds) == pytest.approx((window["rows"], window["frauds"]), rel=0.05)
        # The rows of a class of larger weight vary more.
        kept, weight = report["sampling"]["kept_rows"], report["sampling"]["genuine_weight"]
        assert kept / weight < profile["effective_rows"] < kept

    def test_scores_stay_calibrated(self, sampled):
        """Half of the genuine rows are learned from: without weights, the mean score would be a third higher."""
        assert [report["best"]["learner"] for report in sampled] == ["xgboost", "logistic_regression"]
        for report in sampled:
            scores = read(report["scores_uri"])
            mean, share = (sum(row[name] for row in scores) / len(scores) for name in ("score", "tx_fraud"))
            assert mean == pytest.approx(share, rel=0.2)

    @pytest.mark.parametrize(
        ("limit", "rows", "frauds", "genuine_share", "fraud_share"),
        [
            (1000, 1000, 900, 1, 1),
            (10_000, 1_000_000, 8_000, 5_000 / 992_000, 0.625),
            (10_000, 1_000_000, 2_000, 8_000 / 998_000, 1),
            (5_000_000, 94_000_000, 5_600_000, 2.5 / 88.4, 2.5 / 5.6),
            (10_000, 12_000, 11_000, 1, 5_000 / 11_000),
        ],
        ids=["all", "frauds are at most half", "all frauds, genuine rows fill up", "real files", "few genuine rows"],
    )
    def test_shares_of_the_classes(self, limit, rows, frauds, genuine_share, fraud_share):
        sample = fits.draw(limit, rows, frauds)
        for threshold, share in zip(sample, (genuine_share, fraud_share)):
            drawn = threshold / fits.HASHES
            assert drawn == 1 if share == 1 else share * 0.85 < drawn < share
        assert sample.genuine / fits.HASHES * (rows - frauds) + sample.frauds / fits.HASHES * frauds <= limit


class TestChampion:
    def test_the_champion_scores_the_same_rows(self, train, boosted, tmp_path):
        """Trees as champion of a run with fewer features."""
        champion = {"model_uri": boosted["model_uri"], "features": boosted["features"], "version": "1"}
        changes = {"features": ["tx_amount", "noise"], "candidates": logistic(C=[1])}
        report = train(tmp_path / "model", champion=champion, **changes)
        assert report["champion"] == {**champion, "status": "scored"}
        before, after = read(boosted["scores_uri"]), read(report["scores_uri"])
        assert {row["transaction_id"]: row["champion_score"] for row in after} == {
            row["transaction_id"]: row["score"] for row in before
        }
        assert roc_auc(report) < roc_auc(report, "champion_score")

    @pytest.fixture
    def score_beside(self, spark, uris, trained, library_uri, tmp_path):
        """Score some rows with the base run's model and a champion; the verdict and the rows written."""
        test = spark.read.parquet(*uris).where("tx_time_days = 25")
        test = test.selectExpr("*", "IF(customer_id IS NULL, NULL, 1.0) AS age")
        library_name = library.ship(spark, library_uri)

        def score(champion):
            output = str(tmp_path / "test_scores")
            verdict = train_model.write_scores(spark, test, model_file(trained), champion, output, library_name)
            return verdict, read(output)

        return score

    @pytest.mark.parametrize(
        ("changes", "status", "told"),
        [
            (None, "unreadable", "/nowhere/model.json"),
            ({"features": ["risk", "years", "noise"]}, "unreadable", "not have: years"),
            ({"model": {}}, "unreadable", "not a logistic regression"),
            ({"learner": "gbt"}, "unreadable", "no learner 'gbt'"),
            ({"schema_version": 99}, "newer_library", "of schema 99"),
            ("not JSON\n", "unreadable", "not JSON"),
        ],
        ids=["missing file", "other features", "not a model", "unknown learner", "newer schema", "not JSON"],
    )
    def test_a_champion_that_cannot_score_is_reported(self, score_beside, trained, tmp_path, changes, status, told):
        path = tmp_path / "a [champion] {of} before.json"
        if isinstance(changes, dict):
            path.write_text(json.dumps({**json.loads(model_file(trained)), **changes}))
        elif changes:
            path.write_text(changes)
        else:
            path = "/nowhere/model.json"
        verdict, scores = score_beside({"model_uri": str(path), "features": ["risk"], "version": "1"})
        assert verdict["status"] == status
        assert told in verdict["error"]
        assert "\n" not in verdict["error"]
        assert {row["champion_score"] for row in scores} == {None}
        assert sum(row["score"] is not None for row in scores) > 50

    @pytest.mark.parametrize("call", ["read", "write"])
    def test_an_error_of_the_storage_is_not_the_champions(self, score_beside, boosted, monkeypatch, call):
        """The champion could be read another time; taken for unreadable, it would be replaced."""
        champion = {"model_uri": boosted["model_uri"], "features": boosted["features"], "version": "1"}

        def unavailable(*_, **__):
            raise ConnectionError("503 Slow Down")

        if call == "read":
            monkeypatch.setattr(train_model.runtime.Files, "read", unavailable)
        else:
            monkeypatch.setattr(train_model.fits, "with_scores", unavailable)
        with pytest.raises(ConnectionError, match="503"):
            score_beside(champion)

    def test_a_champion_that_fails_on_some_rows_is_unreadable(self, score_beside, trained, tmp_path):
        """An input is NULL on some rows only, so the champion loads, applies, and fails while it scores."""
        document = {**json.loads(model_file(trained)), "features": ["tx_amount", "risk", "age"]}
        path = tmp_path / "champion.json"
        path.write_text(json.dumps(document))
        verdict, scores = score_beside({"model_uri": str(path), "features": document["features"], "version": "2"})
        assert verdict["status"] == "unreadable"
        assert "missing values in age" in verdict["error"]
        assert {row["champion_score"] for row in scores} == {None}
        assert sum(row["score"] is not None for row in scores) > 50


@pytest.mark.images
class TestLibrary:
    def test_a_missing_library_stops_the_job_before_it_reads_a_row(self, train, tmp_path):
        uri = str(tmp_path / "xgboost-2.1.4-{}.zip".format("0" * 64))
        with pytest.raises(library.LibraryError, match=r"cannot be fetched from .*xgboost-2\.1\.4"):
            train(tmp_path / "model", uris=["/nowhere"], cutoff_uri="/nowhere", library_uri=uri)

    def test_a_damaged_library_stops_the_job_too(self, train, tmp_path):
        path = tmp_path / "xgboost-2.1.4-{}.zip".format("1" * 64)
        path.write_bytes(b"half of an archive")
        with pytest.raises(library.LibraryError, match="is damaged: the SHA-256 of its 18 bytes is"):
            train(tmp_path / "model", uris=["/nowhere"], cutoff_uri="/nowhere", library_uri=str(path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"features": []}, "lacks features"),
        ({"cutoff_uri": "/elsewhere"}, "one of feature_uris"),
        ({"features": ["risk", "age_of_card"]}, "no column age_of_card"),
        ({"candidates": [{"learner": "gbt"}]}, "no learner 'gbt'; it was replaced by xgboost"),
        ({"candidates": trees(maxDepth=[5])}, "no parameter maxDepth; it is now max_depth"),
        ({"candidates": []}, "no combination"),
        ({"validation_folds": 0}, "validation_folds must be 1 or more"),
        ({"max_train_rows": 0}, "max_train_rows must be 1,000 or more"),
    ],
)
def test_wrong_requests_say_what_is_wrong(train, uris, tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        train(tmp_path, **change)
