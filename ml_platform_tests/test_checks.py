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
RUN_ID = "11111111-2222-3333-4444-555555555555"


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
        counts = {
            "raw_rows": raw,
            "clean_rows": clean,
            "duplicate_rows": duplicate,
            "rejected_rows": rejected,
        }
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

    def test_an_hour_24_at_the_end_shares_nothing(self):
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
    def test_neighbours(self, first: str | None, last: str | None, shared: int | None):
        cleaned = {
            "it": between("2020-01-01T00:00:00Z", "2020-01-31T00:00:00Z"),
            "other": between(first, last),
        }
        problem = quality.implausible_time_range("it", cleaned, LIMITS)
        assert problem == (None if shared is None else f"it shares {shared} days with other")

    @pytest.mark.parametrize("key", ["20200101", "2020-W01-1", "2020W011"])
    def test_a_date_in_another_form_means_nothing(self, key: str):
        """Python 3.11 reads more forms than 3.10: the verdict must not depend on the interpreter."""
        cleaned = {key: between("2018-01-01T00:00:00Z", "2018-01-31T00:00:00Z")}
        assert quality.implausible_time_range(key, cleaned, LIMITS) is None


def evaluate(
    instance: dg.DagsterInstance, lake: LakeResource, check: str, keys: tuple[str, str], run_id: str | None = None
) -> dg.AssetCheckEvaluation:
    """What one check finds over a range of partitions."""
    result = run_check(instance, lake, check, keys, run_id)
    (evaluation,) = (found for found in result.get_asset_check_evaluations() if found.partition is None)
    by_partition = {found.partition: found for found in result.get_asset_check_evaluations() if found.partition}
    assert list(by_partition) == keys_of_run(range_tags(*keys), instance.get_dynamic_partitions("raw_files"))
    assert evaluation.passed == all(found.passed for found in by_partition.values())
    return evaluation


def run_check(
    instance: dg.DagsterInstance, lake: LakeResource, check: str, keys: tuple[str, str], run_id: str | None = None
) -> dg.ExecuteInProcessResult:
    """Run one check through Dagster over a range of partitions."""
    graph = definitions(lake).resolve_asset_graph()
    (key,) = (key for key in graph.asset_check_keys if key.name == check)
    job = dg.Definitions(
        assets=definitions(lake).assets,
        asset_checks=definitions(lake).asset_checks,
        jobs=[dg.define_asset_job("check", selection=dg.AssetSelection.checks(key))],
        resources=definitions(lake).resources,
        executor=dg.in_process_executor,
    ).resolve_job_def("check")
    return job.execute_in_process(instance=instance, tags=range_tags(*keys), run_id=run_id, raise_on_error=False)


@pytest.fixture
def three(lake: LakeResource, instance: dg.DagsterInstance) -> list[str]:
    """Three registered partitions with cleaned data and features, all fine."""
    keys = [f"file-{number}" for number in range(3)]
    instance.add_dynamic_partitions("raw_files", keys)
    cleaned = {key: report(number) for number, key in enumerate(keys)}
    inputs = expected_inputs(cleaned_reports(*cleaned.values()))
    for key in keys:
        put_report(lake, CLEANED_TABLE, key, cleaned[key])
        put_report(lake, FEATURES_TABLE, key, features_report(cleaned[key], inputs[key]))
    return keys


BAD_CLEANED = {
    "rows_add_up": {"raw_rows": 1},
    "reject_rate": {"raw_rows": 40_000, "rejected_rows": 20_000},
    "fraud_rate": {"fraud_rows": 15_000},
}


class TestThroughDagster:
    def problem_beyond_a_run(self, lake: LakeResource) -> str | None:
        """What is said of the second file where its checks do not run; see assets/features.py."""
        return quality.file_problem("file-1", lake.reports(CleanedReport), LIMITS)

    @pytest.mark.parametrize("check", [*BAD_CLEANED, "unique_ids", "time_range", "usable_features"])
    def test_passes(self, lake: LakeResource, instance: dg.DagsterInstance, three: list[str], check: str):
        evaluation = evaluate(instance, lake, check, (three[0], three[-1]))
        assert evaluation.passed
        assert evaluation.metadata["partitions_checked"].value == 3
        assert evaluation.metadata["problems"].value == {}

    @pytest.mark.parametrize(("check", "counts"), BAD_CLEANED.items())
    def test_bad_counts(
        self,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        three: list[str],
        check: str,
        counts: dict[str, int],
    ):
        put_report(lake, CLEANED_TABLE, "file-1", report(1, **counts))
        evaluation = evaluate(instance, lake, check, (three[0], three[-1]))
        assert not evaluation.passed
        assert evaluation.blocking
        assert evaluation.severity == dg.AssetCheckSeverity.ERROR
        assert list(evaluation.metadata["problems"].value) == ["file-1"]
        assert (evaluation.description or "").startswith("file-1: ")
        assert evaluation.metadata["problems"].value["file-1"] == self.problem_beyond_a_run(lake)

    def test_only_the_partitions_of_the_run_are_judged(
        self, lake: LakeResource, instance: dg.DagsterInstance, three: list[str]
    ):
        put_report(lake, CLEANED_TABLE, "file-1", report(1, raw_rows=1))
        assert evaluate(instance, lake, "rows_add_up", (three[0], three[0])).passed
        assert not evaluate(instance, lake, "rows_add_up", (three[1], three[1])).passed

    @pytest.mark.parametrize(
        ("check", "change"),
        [
            ("unique_ids", {"first_id": 2_000_000 - 1}),
            ("time_range", {"start": "2020-02-25T00:00:00Z"}),
        ],
    )
    def test_neighbours_beyond_the_run_count(
        self,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        three: list[str],
        check: str,
        change: dict[str, Any],
    ):
        put_report(lake, CLEANED_TABLE, "file-1", cleaned_report("file-1", raw_spec(1, **change)))
        evaluation = evaluate(instance, lake, check, (three[1], three[1]))
        assert not evaluation.passed
        assert "file-2" in evaluation.metadata["problems"].value["file-1"]
        assert evaluation.metadata["problems"].value["file-1"] == self.problem_beyond_a_run(lake)

    def test_a_partition_without_a_report_is_a_problem(
        self, lake: LakeResource, instance: dg.DagsterInstance, three: list[str]
    ):
        instance.add_dynamic_partitions("raw_files", ["file-3"])
        evaluation = evaluate(instance, lake, "rows_add_up", (three[2], "file-3"))
        assert evaluation.metadata["problems"].value == {"file-3": "no report"}

    @pytest.mark.parametrize(
        ("counts", "problem"),
        [
            ({"unusable_rows": 2}, "2 rows have unusable features"),
            ({"rows": 19_999}, "19999 feature rows for 20000 clean rows"),
        ],
    )
    def test_unusable_features(
        self,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        three: list[str],
        counts: dict[str, int],
        problem: str,
    ):
        features = features_report(report(1), {"cleaned": "1", "history": {}}, **counts)
        put_report(lake, FEATURES_TABLE, "file-1", features)
        evaluation = evaluate(instance, lake, "usable_features", (three[0], three[-1]))
        assert not evaluation.passed
        assert evaluation.blocking
        assert evaluation.metadata["problems"].value == {"file-1": problem}

    def test_features_without_cleaned_data(self, lake: LakeResource, instance: dg.DagsterInstance, three: list[str]):
        put_report(lake, CLEANED_TABLE, "file-1", {})
        evaluation = evaluate(instance, lake, "usable_features", (three[0], three[-1]))
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
def test_the_champions_health(found: dict[str, Any], days: int, problem: str | None):
    created = datetime.now(timezone.utc) - timedelta(days=days, hours=1)
    champion = ModelVersion("fraud_model", "3", int(created.timestamp() * 1000), tags=[])
    found = {"outcome": "not_better", "reason": "The reason.", **found}
    assert champion_health(PromotionConfig(), champion, **found) == problem


def test_shorten_list():
    assert shorten_list(["a", "b"]) == "a, b"
    assert shorten_list([]) == ""
    assert shorten_list(list("abcdefg")) == "a, b, c, d, e and 2 more"
