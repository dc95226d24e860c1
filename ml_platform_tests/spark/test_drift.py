"""Drift of a file against the training window: counts, the index, its calibration, and input that nobody intends."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from spark_jobs.scoring import drift
from spark_jobs.training import fits

#: The training window ends a file and 14 days before the file, as after the fourth month of data.
TRAIN_FIRST, TRAIN_DAYS, FILE_FIRST, FILE_DAYS = 46, 60, 120, 30

CHECKS = ("feature_drift", "score_drift", "label_drift")


def daily(shares, days, rows=10_000, seed=0, first_day=0):
    """Random counts by day: `shares` of each bin, or a function of the day that gives them."""
    random = np.random.default_rng(seed)
    of_day = shares if callable(shares) else lambda day: shares
    return [random.multinomial(rows, of_day(day)).tolist() for day in range(first_day, first_day + days)]


def labelled(rate, days, rows=10_000, seed=0):
    """Random rows and frauds by day."""
    random = np.random.default_rng(seed)
    return [[rows, int(random.binomial(rows, rate))] for _ in range(days)]


def profile_of(inputs, rate=0.02, rows=10_000):
    """A profile of random counts; `inputs`: name → shares. The score has four equal bins."""
    shares = {**inputs, "score": [0.25] * 4}
    counts = {
        name: daily(values, TRAIN_DAYS, rows, seed, TRAIN_FIRST) for seed, (name, values) in enumerate(shares.items())
    }
    edges = {name: [float(edge) for edge in range(len(days[0]) - 1)] for name, days in counts.items()}
    labels = labelled(rate, TRAIN_DAYS, rows)
    return {"first_day": TRAIN_FIRST, "days": TRAIN_DAYS, "edges": edges, "counts": counts, "labels": labels}


def file_of(inputs, rows=10_000):
    """Random counts of a file."""
    shares = {**inputs, "score": [0.25] * 4}
    return {
        name: daily(values, FILE_DAYS, rows, 100 + seed, FILE_FIRST)
        for seed, (name, values) in enumerate(shares.items())
    }


def labels_of(rate, rows=10_000):
    """Random labels of the days of a file that are known."""
    return {FILE_FIRST + day: tuple(counts) for day, counts in enumerate(labelled(rate, 23, rows, 7))}


TWO = {"a": [0.2, 0.3, 0.5], "b": [0.9, 0.1]}


def measure(profile, counts, labels=None, data_first_day=0):
    results = drift.measure(profile, counts, FILE_FIRST, labels or labels_of(0.02), data_first_day)
    assert tuple(results) == CHECKS
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    return results


class TestBinCounts:
    def test_a_value_on_an_edge_is_above_it(self):
        counts = drift.bin_counts({"a": np.array([-1, 0, 0.5, 1, 2], "f4")}, {"a": [0.0, 1.0]})
        assert counts == {"a": [1, 2, 2]}

    def test_edges_are_those_of_32_bit_values(self):
        edge = float(np.float32(0.1))
        assert drift.bin_counts({"a": np.array([0.1], "f4")}, {"a": [edge]}) == {"a": [0, 1]}

    def test_batches_add_up_in_any_order(self):
        values = np.random.default_rng(0).normal(size=1000)
        edges = {"score": [-1.0, 0.0, 0.5]}
        whole = drift.bin_counts({"score": values}, edges)["score"]
        parts = [drift.bin_counts({"score": part}, edges)["score"] for part in np.split(values[::-1], 4)]
        assert np.sum(parts, axis=0).tolist() == whole

    def test_only_what_has_edges_is_counted(self):
        assert drift.bin_counts({"a": np.zeros(2), "b": np.zeros(2)}, {"b": []}) == {"b": [2]}

    def test_an_empty_batch(self):
        assert drift.bin_counts({"a": np.zeros(0, "f4")}, {"a": [1.0]}) == {"a": [0, 0]}

    def test_they_are_those_of_the_profile(self):
        class Scorer:
            features = ("a",)

            def score(self, matrix):
                return matrix[:, 0].astype("f8") / 3

        matrix = np.random.default_rng(0).exponential(size=(3000, 1)).astype("f4")
        days = np.repeat([4, 5, 6], 1000)
        profile = fits.profile_of(Scorer(), matrix, days, (matrix[:, 0] > 2).astype("u1"), (1.0, 1.0))
        columns = {"a": matrix[days == 5, 0], "score": Scorer().score(matrix[days == 5])}
        assert drift.bin_counts(columns, profile["edges"]) == {
            name: days[1] for name, days in profile["counts"].items()
        }


class TestPsi:
    def test_a_value_by_hand(self):
        profile, counts = profile_of(TWO), file_of(TWO)
        profile["counts"]["b"] = [[500_000, 500_000]] * TRAIN_DAYS
        counts["b"] = [[750_000, 250_000]] * FILE_DAYS
        worst = measure(profile, counts)["feature_drift"]["inputs"][0]
        assert worst["input"] == "b"
        assert worst["psi"] == pytest.approx(0.25 * math.log(1.5) - 0.25 * math.log(0.5), rel=1e-5)

    def test_equal_shares_have_none(self):
        profile, counts = profile_of(TWO), file_of(TWO)
        profile["counts"]["a"], counts["a"] = [[20, 30, 50]] * TRAIN_DAYS, [[20, 30, 50]] * FILE_DAYS
        assert measure(profile, counts)["feature_drift"]["inputs"][-1] == {
            "input": "a",
            "psi": pytest.approx(0, abs=1e-6),
            "exceedance": pytest.approx(0, abs=1e-3),
        }

    def test_a_week_repeats_so_weekends_do_not_count(self):
        """60, 30 and 23 days have unequal numbers of weekends."""

        def weekend(day):
            return [0.01, 0.99] if day % 7 >= 5 else [0.99, 0.01]

        result = measure(profile_of({"weekend": weekend}), file_of({"weekend": weekend}))["feature_drift"]
        assert result["outcome"] == "ok"
        assert result["inputs"][0]["psi"] < 1e-4

    def test_days_without_rows_at_the_ends_do_not_count(self):
        counts = file_of(TWO)
        longer = {name: [[0] * len(days[0])] * 3 + days + [[0] * len(days[0])] * 2 for name, days in counts.items()}
        results = [
            drift.measure(profile_of(TWO), counted, first_day, {}, 0)["feature_drift"]
            for counted, first_day in ((counts, FILE_FIRST), (longer, FILE_FIRST - 3))
        ]
        assert results[0] == results[1]


class TestOutcome:
    def test_the_same_distributions_are_ok(self):
        results = measure(profile_of(TWO), file_of(TWO))
        for check in CHECKS:
            assert results[check]["outcome"] == "ok"
            assert results[check]["exceedance"] < results[check]["threshold"]

    def test_a_change_of_an_input(self):
        results = measure(profile_of(TWO), file_of({**TWO, "b": [0.8, 0.2]}))
        result = results["feature_drift"]
        assert (result["outcome"], results["score_drift"]["outcome"]) == ("drift", "ok")
        assert [entry["input"] for entry in result["inputs"]] == ["b", "a"]
        assert result["exceedance"] == result["inputs"][0]["exceedance"] > result["threshold"] > 0
        assert re.fullmatch(
            r"b differs most: PSI 0\.08\d?, [\d.]+ times its limit for a clean file\.", result["reason"]
        )
        picture = result["pictures"][0]
        assert (picture["input"], picture["edges"]) == ("b", [0.0])
        assert picture["expected"] == pytest.approx([0.9, 0.1], abs=0.01)
        assert picture["found"] == pytest.approx([0.8, 0.2], abs=0.01)

    def test_a_change_of_the_score(self):
        counts = file_of(TWO)
        counts["score"] = daily([0.2, 0.25, 0.25, 0.3], FILE_DAYS)
        results = measure(profile_of(TWO), counts)
        assert (results["feature_drift"]["outcome"], results["score_drift"]["outcome"]) == ("ok", "drift")

    def test_pictures_are_those_of_the_three_worst(self):
        inputs = {name: [0.5, 0.5] for name in "abcde"}
        changed = {**inputs, "b": [0.6, 0.4], "e": [0.7, 0.3]}
        result = measure(profile_of(inputs), file_of(changed))["feature_drift"]
        assert [picture["input"] for picture in result["pictures"]][:2] == ["e", "b"]
        assert len(result["pictures"]) == 3
        assert "; 2 of 5 inputs are above it" in result["reason"]

    def test_the_order_of_inputs_changes_nothing(self):
        profile, counts = profile_of(TWO), file_of(TWO)
        other = {**profile, **{key: dict(reversed(list(profile[key].items()))) for key in ("edges", "counts")}}
        assert measure(other, dict(reversed(list(counts.items())))) == measure(profile, counts)

    def test_few_of_many_clean_files_give_a_warning(self):
        """Shares that vary by weeks for weeks: the outcome of chance, not drift."""
        random = np.random.default_rng(0)
        warnings = 0
        for _ in range(20):
            # A mean over 28 days of what is new every day, as of terminals that are compromised for 28 days.
            level = np.convolve(random.normal(size=TRAIN_FIRST + 200), np.ones(28) / 28**0.5, "valid")

            def shares(day, level=level):
                share = 0.1 + 0.01 * level[day]
                return [1 - share, share]

            results = measure(profile_of({"a": shares}), file_of({"a": shares}))
            warnings += results["feature_drift"]["outcome"] == "drift"
        assert warnings <= 1

    def test_more_rows_make_no_drift_of_differences_between_weeks(self):
        def shares(day):
            share = 0.1 + 0.01 * math.sin(day / 9)
            return [1 - share, share]

        results = [
            measure(profile_of({"a": shares}, rows=rows), file_of({"a": shares}, rows))["feature_drift"]
            for rows in (10_000, 5_000_000)
        ]
        assert [result["outcome"] for result in results] == ["ok", "ok"]
        # With sampling alone in mind, the exceedance would be 500 times larger.
        assert results[1]["exceedance"] < 3 * results[0]["exceedance"]

    def test_a_file_with_few_rows_varies_more(self):
        result = measure(profile_of(TWO), file_of(TWO, rows=20))["feature_drift"]
        assert result["outcome"] == "ok"

    def test_a_training_window_of_few_sampled_rows_varies_itself(self):
        """Its days were counted with a hundred rows each: a file of as many does not vary more than these."""
        inputs = {"a": [0.5, 0.5]}
        profile, few = profile_of(inputs), profile_of(inputs, rows=100)
        profile["counts"]["a"] = [[100 * rows for rows in day] for day in few["counts"]["a"]]
        sampled = {**profile, "effective_rows": 100 * TRAIN_DAYS}
        counts = file_of({"a": [0.75, 0.25]}, rows=100)
        results = [measure(each, counts)["feature_drift"] for each in (profile, sampled)]
        assert [result["outcome"] for result in results] == ["ok", "drift"]


class TestFraudRate:
    def test_the_same_rate_is_ok(self):
        result = measure(profile_of(TWO), file_of(TWO))["label_drift"]
        assert result["outcome"] == "ok"
        assert result["lower"] < result["found"]["rate"] < result["upper"]
        assert result["expected"]["rate"] == pytest.approx(0.02, rel=0.05)
        assert result["expected"]["rows"] == 8 * 7 * 10_000
        assert result["found"]["rows"] == 3 * 7 * 10_000
        # At least that of drawing rows independently.
        for entry in (result["expected"], result["found"]):
            assert entry["standard_error"] > math.sqrt(0.02 * 0.98 / entry["rows"])

    @pytest.mark.parametrize("rate", [0.0, 0.01, 0.04])
    def test_another_rate(self, rate):
        result = measure(profile_of(TWO), file_of(TWO), labels_of(rate))["label_drift"]
        assert result["outcome"] == "drift"
        assert not result["lower"] < result["found"]["rate"] < result["upper"]
        assert f"Fraud rate {result['found']['rate']:.3%}, against 2.0" in result["reason"]


class TestNotCalibrated:
    def every(self, results):
        assert {results[check]["outcome"] for check in CHECKS} == {"not_calibrated"}
        for check in CHECKS:
            assert results[check]["threshold"] is results[check]["exceedance"] is None
            assert results[check]["reason"].endswith(".")

    @pytest.mark.parametrize("profile", [None, {}, {"edges": {}}, {"edges": {"a": []}, "counts": {"a": []}}])
    def test_no_profile(self, profile):
        self.every(drift.measure(profile, file_of(TWO), FILE_FIRST, labels_of(0.02), 0))

    @pytest.mark.parametrize("key", ["first_day", "edges", "counts"])
    def test_a_profile_that_lacks_a_key(self, key):
        profile = profile_of(TWO)
        del profile[key]
        results = measure(profile, file_of(TWO))
        assert results["feature_drift"]["outcome"] == results["score_drift"]["outcome"] == "not_calibrated"

    def test_a_champion_trained_before_labels_were_kept(self):
        profile = profile_of(TWO)
        del profile["labels"]
        results = measure(profile, file_of(TWO))
        assert [results[check]["outcome"] for check in CHECKS] == ["ok", "ok", "not_calibrated"]

    def test_windows_of_inputs_still_fill(self):
        """After the third month, 32 days are left of the training window: the PSI is shown all the same."""
        results = measure(
            profile_of(TWO), file_of(TWO), data_first_day=TRAIN_FIRST + TRAIN_DAYS - 32 - drift.WARM_UP_DAYS
        )
        self.every(results)
        assert "has 4 whole weeks after the first 44 days" in results["feature_drift"]["reason"]
        assert [set(entry) for entry in results["feature_drift"]["inputs"]] == [{"input", "psi", "exceedance"}] * 2

    @pytest.mark.parametrize(("left", "outcome"), [(41, "not_calibrated"), (42, "ok")])
    def test_six_weeks_are_enough(self, left, outcome):
        first_day = TRAIN_FIRST + TRAIN_DAYS - left - drift.WARM_UP_DAYS
        results = measure(profile_of(TWO), file_of(TWO), data_first_day=first_day)
        assert {results[check]["outcome"] for check in CHECKS} == {outcome}

    @pytest.mark.parametrize("days", [0, 6])
    def test_a_file_shorter_than_a_week(self, days):
        counts = {name: counted[:days] for name, counted in file_of(TWO).items()}
        labels = dict(list(labels_of(0.02).items())[:days])
        self.every(drift.measure(profile_of(TWO), counts, FILE_FIRST, labels, 0))

    def test_a_file_without_rows(self):
        counts = {name: [[0] * len(day) for day in days] for name, days in file_of(TWO).items()}
        self.every(
            drift.measure(profile_of(TWO), counts, FILE_FIRST, {FILE_FIRST + day: (0, 0) for day in range(23)}, 0)
        )

    def test_a_training_window_without_rows(self):
        profile = profile_of(TWO)
        profile["counts"] = {name: [[0] * len(day) for day in days] for name, days in profile["counts"].items()}
        profile["labels"] = [[0, 0]] * TRAIN_DAYS
        self.every(drift.measure(profile, file_of(TWO), FILE_FIRST, labels_of(0.02), 0))

    def test_a_training_window_without_frauds(self):
        profile = {**profile_of(TWO), "labels": [[1000, 0]] * TRAIN_DAYS}
        assert measure(profile, file_of(TWO))["label_drift"]["outcome"] == "not_calibrated"

    @pytest.mark.parametrize("counted", [[], [[1, 2]] * FILE_DAYS, [[1, 2, 3], [1]]])
    def test_counts_that_do_not_match_the_edges(self, counted):
        result = measure(profile_of(TWO), {**file_of(TWO), "a": counted})["feature_drift"]
        assert (result["outcome"], result["reason"]) == ("not_calibrated", "The file has no whole week of inputs.")


class TestConstantInputs:
    """Values of a training window that are all in one bin, so that its weeks do not differ."""

    @pytest.mark.parametrize("shares", [[1.0], [0.0, 1.0]], ids=["no edges", "an edge"])
    def test_it_stays(self, shares):
        inputs = {**TWO, "constant": shares}
        assert measure(profile_of(inputs), file_of(inputs))["feature_drift"]["outcome"] == "ok"

    def test_few_other_values_are_no_drift(self):
        profile, counts = profile_of({"constant": [0.0, 1.0]}), file_of({"constant": [0.0, 1.0]})
        counts["constant"][20] = [2, 9_998]
        assert measure(profile, counts)["feature_drift"]["outcome"] == "ok"

    def test_it_changes(self):
        result = measure(profile_of({"constant": [0.0, 1.0]}), file_of({"constant": [0.01, 0.99]}))["feature_drift"]
        assert result["outcome"] == "drift"

    def test_days_that_are_all_equal(self):
        profile = profile_of(TWO)
        profile["counts"]["a"] = [[2000, 3000, 5000]] * TRAIN_DAYS
        assert measure(profile, file_of(TWO))["feature_drift"]["outcome"] == "ok"
