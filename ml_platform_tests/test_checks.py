"""Asset checks: each rule on fabricated reports, and each check through Dagster."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import dagster as dg
import pytest
from mlflow.entities.model_registry import ModelVersion

from ml_platform.assets.features import expected_inputs
from ml_platform.assets.outcomes import shorten_list
from ml_platform.lake import quality
from ml_platform.lake.partitions import keys_of_run, range_tags
from ml_platform.lake.quality import QualityLimits
from ml_platform.lake.reports import CLEANED_TABLE, FEATURES_TABLE, CleanedReport
from ml_platform.lake.resource import LakeResource
from ml_platform.model.config import PromotionConfig
from ml_platform.model.gate import champion_health
from ml_platform_tests.fakes import cleaned_report, cleaned_reports, definitions, features_report, put_report, raw_spec

LIMITS = QualityLimits()


def report(number: int = 0, **counts: int) -> dict[str, Any]:
    return cleaned_report(f"file-{number}", raw_spec(number), **counts)


def typed(number: int = 0, **counts: int) -> CleanedReport:
    return CleanedReport.model_validate(report(number, **counts))


def between(first: str | None, last: str | None) -> CleanedReport:
    """The report of a file with these times."""
    return CleanedReport.model_validate({**report(), "tx_datetime": {"min": first, "max": last}})


class TestRowsAddUp:
    @pytest.mark.parametrize(
        ("raw", "clean", "duplicate", "rejected", "fine"),
        [
            (0, 0, 0, 0, True),
            (10, 7, 2, 1, True),
            (10, 7, 2, 0, False),
            (10, 8, 2, 1, False),
            (0, 1, 0, 0, False),
        ],
    )
    def test_rule(self, raw: int, clean: int, duplicate: int, rejected: int, fine: bool):
        counts = {"raw_rows": raw, "clean_rows": clean, "duplicate_rows": duplicate, "rejected_rows": rejected}
        problem = quality.row_count_mismatch(typed(**counts))
        assert (problem is None) == fine

    def test_problem_says_how_many(self):
        problem = quality.row_count_mismatch(typed(raw_rows=20_005, rejected_rows=3))
        assert problem == "20005 raw rows, but 20003 clean, duplicate and rejected rows"


class TestRejectRate:
    @pytest.mark.parametrize(
        ("raw", "rejected", "fine"),
        [(0, 0, True), (100, 0, True), (100, 2, True), (100, 3, False), (10_000, 201, False), (1, 1, False)],
    )
    def test_rule(self, raw: int, rejected: int, fine: bool):
        problem = quality.high_reject_rate(typed(raw_rows=raw, rejected_rows=rejected), LIMITS)
        assert (problem is None) == fine
        assert fine or str(raw) in str(problem)

    def test_limit_is_a_setting(self):
        rejected_half = typed(raw_rows=100, rejected_rows=50)
        assert quality.high_reject_rate(rejected_half, QualityLimits(max_reject_rate=0.5)) is None
        assert quality.high_reject_rate(rejected_half, QualityLimits(max_reject_rate=0.49))


class TestFraudRate:
    @pytest.mark.parametrize(
        ("clean", "frauds", "fine"),
        [
            (0, 0, True),
            (9_999, 0, True),
            (9_999, 9_999, True),
            (10_000, 0, False),
            (10_000, 4, False),
            (10_000, 5, True),
            (10_000, 2_500, True),
            (10_000, 2_501, False),
        ],
    )
    def test_rule(self, clean: int, frauds: int, fine: bool):
        problem = quality.implausible_fraud_rate(typed(clean_rows=clean, fraud_rows=frauds), LIMITS)
        assert (problem is None) == fine

    @pytest.mark.parametrize("limits", [{"max_reject_rate": 1.1}, {"min_fraud_rate": -0.1}, {"min_rows_to_judge": 0}])
    def test_impossible_limits_are_refused(self, limits: dict[str, Any]):
        with pytest.raises(ValueError, match=next(iter(limits))):
            QualityLimits(**limits)


class TestUniqueIds:
    @pytest.mark.parametrize(
        ("ids", "others", "culprit"),
        [
            ((0, 9), [(10, 19)], None),
            ((10, 19), [(0, 9), (20, 29)], None),
            ((0, 9), [(9, 19)], "other-0"),
            ((10, 19), [(0, 10)], "other-0"),
            ((0, 99), [(200, 299), (50, 60)], "other-1"),
            ((50, 60), [(0, 99)], "other-0"),
            ((5, 5), [(5, 5)], "other-0"),
            ((None, None), [(0, 9)], None),
            ((0, 9), [(None, None)], None),
        ],
    )
    def test_rule(self, ids: tuple[Any, Any], others: list[tuple[Any, Any]], culprit: str | None):
        def ids_only(first: int | None, last: int | None) -> CleanedReport:
            return CleanedReport.model_validate({**report(), "transaction_id": {"min": first, "max": last}})

        cleaned = {"it": ids_only(*ids)} | {f"other-{number}": ids_only(*ends) for number, ends in enumerate(others)}
        problem = quality.overlapping_ids("it", cleaned)
        assert (problem is None) == (culprit is None)
        assert culprit is None or culprit in str(problem)


class TestTimeRange:
    @pytest.mark.parametrize(
        ("key", "first", "last", "expected"),
        [
            ("any-name", "2020-01-01T00:00:00Z", "2020-01-31T00:00:00Z", None),
            ("any-name", None, None, None),
            ("any-name", "2020-01-01T00:00:00Z", "2020-04-10T00:00:00Z", None),
            ("any-name", "2020-01-01T00:00:00Z", "2020-04-10T00:00:01Z", "spans 100 days"),
            ("any-name", "1970-01-01T00:00:00Z", "2020-01-01T00:00:00Z", "spans 18262 days"),
            ("2020-01-01", "2020-01-01T00:00:00Z", "2020-01-31T00:00:00Z", None),
            ("2020-01-01", "2020-01-05T00:00:00Z", "2020-01-31T00:00:00Z", None),
            ("2020-01-01", "2019-12-31T23:59:59Z", "2020-01-31T00:00:00Z", "does not match the date in its name"),
            ("2020-01-01", "2020-06-01T00:00:00Z", "2020-06-30T00:00:00Z", "does not match the date in its name"),
            ("2020-13-01", "2019-01-01T00:00:00Z", "2019-01-31T00:00:00Z", None),
            ("9999-12-30", "9999-12-30T00:00:00Z", "9999-12-31T00:00:00Z", None),
            ("any-name", "0001-01-01T00:00:00Z", "0999-12-31T00:00:00Z", "spans 364876 days"),
        ],
    )
    def test_one_file(self, key: str, first: str | None, last: str | None, expected: str | None):
        cleaned = {key: between(first, last)}
        problem = quality.implausible_time_range(key, cleaned, LIMITS)
        assert problem is None if expected is None else expected in str(problem)

    def test_files_that_meet_at_24_00_00_share_no_day(self):
        cleaned = {
            "a": between("2020-01-01T00:00:05Z", "2020-01-31T00:00:00Z"),
            "b": between("2020-01-31T00:00:00Z", "2020-03-01T00:00:00Z"),
        }
        assert quality.implausible_time_range("a", cleaned, LIMITS) is None
        assert quality.implausible_time_range("b", cleaned, LIMITS) is None

    @pytest.mark.parametrize(
        ("first", "last", "shared"),
        [
            ("2020-01-31T00:00:00Z", "2020-02-28T00:00:00Z", None),
            ("2020-01-30T00:00:00Z", "2020-02-28T00:00:00Z", None),
            ("2020-01-29T00:00:00Z", "2020-02-28T00:00:00Z", 2),
            ("2020-01-10T00:00:00Z", "2020-01-20T00:00:00Z", 10),
            ("2019-12-01T00:00:00Z", "2020-02-28T00:00:00Z", 30),
            ("2018-01-01T00:00:00Z", "2018-01-31T00:00:00Z", None),
            (None, None, None),
        ],
    )
    def test_files_that_share_days(self, first: str | None, last: str | None, shared: int | None):
        cleaned = {"it": between("2020-01-01T00:00:00Z", "2020-01-31T00:00:00Z"), "other": between(first, last)}
        problem = quality.implausible_time_range("it", cleaned, LIMITS)
        assert problem == (None if shared is None else f"it shares {shared} days with other")

    @pytest.mark.parametrize("key", ["20200101", "2020-W01-1", "2020W011"])
    def test_a_name_in_another_date_format_is_not_a_date(self, key: str):
        """Python 3.11 reads more forms than 3.10: the verdict must not depend on the interpreter."""
        cleaned = {key: between("2018-01-01T00:00:00Z", "2018-01-31T00:00:00Z")}
        assert quality.implausible_time_range(key, cleaned, LIMITS) is None


class Checks:
    """Three registered partitions, ``file-0`` to ``file-2``, with cleaned data and features that pass every check."""

    def __init__(self, lake: LakeResource, instance: dg.DagsterInstance) -> None:
        self.lake, self.instance = lake, instance
        keys = [f"file-{number}" for number in range(3)]
        instance.add_dynamic_partitions("raw_files", keys)
        cleaned = {key: report(number) for number, key in enumerate(keys)}
        inputs = expected_inputs(cleaned_reports(*cleaned.values()))
        for key in keys:
            put_report(lake, CLEANED_TABLE, key, cleaned[key])
            put_report(lake, FEATURES_TABLE, key, features_report(cleaned[key], inputs[key]))

    def evaluate(self, check: str, first: str = "file-0", last: str = "file-2") -> dg.AssetCheckEvaluation:
        """What one check finds, through Dagster, over a range of partitions."""
        everything = definitions(self.lake)
        (key,) = (key for key in everything.resolve_asset_graph().asset_check_keys if key.name == check)
        job = dg.Definitions(
            assets=everything.assets,
            asset_checks=everything.asset_checks,
            jobs=[dg.define_asset_job("check", selection=dg.AssetSelection.checks(key))],
            resources=everything.resources,
            executor=dg.in_process_executor,
        ).resolve_job_def("check")
        tags = range_tags(first, last)
        result = job.execute_in_process(instance=self.instance, tags=tags, raise_on_error=False)
        found = result.get_asset_check_evaluations()
        (evaluation,) = (one for one in found if one.partition is None)
        by_partition = {one.partition: one for one in found if one.partition}
        assert list(by_partition) == keys_of_run(tags, self.instance.get_dynamic_partitions("raw_files"))
        assert evaluation.passed == all(one.passed for one in by_partition.values())
        return evaluation

    def problem_beyond_a_run(self) -> str | None:
        """What is said of the second file where its checks do not run; see assets/features.py."""
        return quality.file_problem("file-1", self.lake.reports(CleanedReport), LIMITS)


@pytest.fixture
def checks(lake: LakeResource, instance: dg.DagsterInstance) -> Checks:
    return Checks(lake, instance)


BAD_CLEANED = {
    "rows_add_up": {"raw_rows": 1},
    "reject_rate": {"raw_rows": 40_000, "rejected_rows": 20_000},
    "fraud_rate": {"fraud_rows": 15_000},
}


class TestThroughDagster:
    @pytest.mark.parametrize("check", [*BAD_CLEANED, "unique_ids", "time_range", "usable_features"])
    def test_good_partitions_pass(self, checks: Checks, check: str):
        evaluation = checks.evaluate(check)
        assert evaluation.passed
        assert evaluation.metadata["partitions_checked"].value == 3
        assert evaluation.metadata["problems"].value == {}

    @pytest.mark.parametrize(("check", "counts"), BAD_CLEANED.items())
    def test_a_bad_partition_fails_its_check(self, checks: Checks, check: str, counts: dict[str, int]):
        put_report(checks.lake, CLEANED_TABLE, "file-1", report(1, **counts))
        evaluation = checks.evaluate(check)
        assert not evaluation.passed
        assert evaluation.blocking
        assert evaluation.severity == dg.AssetCheckSeverity.ERROR
        assert list(evaluation.metadata["problems"].value) == ["file-1"]
        assert (evaluation.description or "").startswith("file-1: ")
        assert evaluation.metadata["problems"].value["file-1"] == checks.problem_beyond_a_run()

    def test_only_the_partitions_of_the_run_are_judged(self, checks: Checks):
        put_report(checks.lake, CLEANED_TABLE, "file-1", report(1, raw_rows=1))
        assert checks.evaluate("rows_add_up", "file-0", "file-0").passed
        assert not checks.evaluate("rows_add_up", "file-1", "file-1").passed

    @pytest.mark.parametrize(
        ("check", "change"),
        [
            ("unique_ids", {"first_id": 2_000_000 - 1}),
            ("time_range", {"start": "2020-02-25T00:00:00Z"}),
        ],
    )
    def test_neighbours_beyond_the_run_count(self, checks: Checks, check: str, change: dict[str, Any]):
        put_report(checks.lake, CLEANED_TABLE, "file-1", cleaned_report("file-1", raw_spec(1, **change)))
        evaluation = checks.evaluate(check, "file-1", "file-1")
        assert not evaluation.passed
        assert "file-2" in evaluation.metadata["problems"].value["file-1"]
        assert evaluation.metadata["problems"].value["file-1"] == checks.problem_beyond_a_run()

    def test_a_partition_without_a_report_is_a_problem(self, checks: Checks):
        checks.instance.add_dynamic_partitions("raw_files", ["file-3"])
        evaluation = checks.evaluate("rows_add_up", "file-2", "file-3")
        assert evaluation.metadata["problems"].value == {"file-3": "no report"}

    @pytest.mark.parametrize(
        ("counts", "problem"),
        [
            ({"unusable_rows": 2}, "2 rows have unusable features"),
            ({"rows": 19_999}, "19999 feature rows for 20000 clean rows"),
        ],
    )
    def test_unusable_features(self, checks: Checks, counts: dict[str, int], problem: str):
        features = features_report(report(1), {"cleaned": "1", "history": {}}, **counts)
        put_report(checks.lake, FEATURES_TABLE, "file-1", features)
        evaluation = checks.evaluate("usable_features")
        assert not evaluation.passed
        assert evaluation.blocking
        assert evaluation.metadata["problems"].value == {"file-1": problem}

    def test_features_without_cleaned_data(self, checks: Checks):
        put_report(checks.lake, CLEANED_TABLE, "file-1", {})
        evaluation = checks.evaluate("usable_features")
        assert list(evaluation.metadata["problems"].value) == ["file-1"]


@pytest.mark.parametrize(
    ("found", "days", "problem"),
    [
        ({}, 500, None),
        ({"average_precision": 0.2}, 0, None),
        ({"average_precision": 0.19}, 0, "the champion, version 3, has an average precision of 0.190, below 0.2"),
        ({"outcome": "champion_newer_library"}, 0, "The reason."),
        ({"outcome": "too_little_data"}, 120, None),
        (
            {"outcome": "too_little_data"},
            121,
            "no challenger could be compared with the champion, version 3, for 121 days; this time: too_little_data. "
            "The reason.",
        ),
    ],
    ids=["just compared", "at the floor", "below the floor", "newer library", "at the limit", "not compared for long"],
)
def test_the_health_of_the_champion(found: dict[str, Any], days: int, problem: str | None):
    created = datetime.now(timezone.utc) - timedelta(days=days, hours=1)
    champion = ModelVersion("fraud_model", "3", int(created.timestamp() * 1000), tags=[])
    found = {"outcome": "not_better", "reason": "The reason.", **found}
    assert champion_health(PromotionConfig(), champion, **found) == problem


def test_long_lists_are_cut():
    assert shorten_list(["a", "b"]) == "a, b"
    assert shorten_list([]) == ""
    assert shorten_list(list("abcdefg")) == "a, b, c, d, e and 2 more"
