"""Asset checks: each rule on fabricated reports, and each check through Dagster."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from datetime import date, datetime, timedelta, timezone
from typing import Any
from unittest import mock

import dagster as dg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from ml_platform.assets.features import expected_inputs
from ml_platform.escaping import shorten_list
from ml_platform.lake import quality
from ml_platform.lake.partitions import keys_of_run, range_tags
from ml_platform.lake.quality import QualityLimits
from ml_platform.lake.reports import CLEANED_TABLE, FEATURES_TABLE, CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource
from ml_platform.model.config import PromotionConfig
from ml_platform.model.gate import champion_health, champion_problem, champion_request, lost_parts, train_last_date
from ml_platform_tests.fakes import (
    EPOCH,
    cleaned_report,
    cleaned_reports,
    definitions,
    features_report,
    ids_between,
    put_report,
    raw_spec,
    times_between,
)
from spark_jobs.schema import SCHEMA_VERSION

LIMITS = QualityLimits()


def report(number: int = 0, **counts: int) -> dict[str, Any]:
    return cleaned_report(f"file-{number}", raw_spec(number), **counts)


def typed(number: int = 0, **counts: int) -> CleanedReport:
    return CleanedReport.model_validate(report(number, **counts))


def between(first: str | None, last: str | None, key: str = "file") -> CleanedReport:
    """The report of a file with these times."""
    return CleanedReport.model_validate({**report(), "partition": key, "tx_datetime": times_between(first, last)})


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
            ("2020-01-01", "2019-12-31T00:00:00Z", "2020-01-31T00:00:00Z", None),
            ("2020-01-01", "2019-12-30T23:59:59Z", "2020-01-31T00:00:00Z", "does not match the date in its name"),
            ("2020-01-01", "2020-06-01T00:00:00Z", "2020-06-30T00:00:00Z", "does not match the date in its name"),
            ("2020-13-01", "2019-01-01T00:00:00Z", "2019-01-31T00:00:00Z", None),
            ("9999-12-30", "9999-12-30T00:00:00Z", "9999-12-31T00:00:00Z", None),
            ("any-name", "0001-01-01T00:00:00Z", "0999-12-31T00:00:00Z", "spans 364876 days"),
        ],
    )
    def test_one_file(self, key: str, first: str | None, last: str | None, expected: str | None):
        problem = quality.implausible_time_range(between(first, last, key), LIMITS)
        assert problem is None if expected is None else expected in str(problem)

    def test_the_name_may_be_a_local_or_a_delivery_day(self):
        """The limit is for files that are named by the day after their last transaction, for instance."""
        delivered = between("2020-01-01T00:00:00Z", "2020-01-30T23:00:00Z", "2020-01-31")
        assert quality.implausible_time_range(delivered, LIMITS)
        assert quality.implausible_time_range(delivered, QualityLimits(max_days_before_name=30)) is None
        assert quality.implausible_time_range(delivered, QualityLimits(max_days_before_name=29))

    def test_the_odd_rows_are_named(self):
        outside = {
            "rows": 2,
            "usual_days": ["2020-01-01T00:00:00Z", "2020-01-30T00:00:00Z"],
            "examples": [{"transaction_id": 7, "tx_datetime": "2099-01-01T00:00:00Z"}],
        }
        times = times_between("2020-01-01T00:00:00Z", "2099-01-01T00:00:00Z")
        odd = CleanedReport.model_validate({**report(), "tx_datetime": times, "odd_rows": outside})
        problem = str(quality.implausible_time_range(odd, LIMITS))
        assert "; 2 rows are far from 2020-01-01 to 2020-01-30: id 7 at 2099-01-01 00:00:00" in problem

    @pytest.mark.parametrize("key", ["20200101", "2020-W01-1", "2020W011"])
    def test_a_name_in_another_date_format_is_not_a_date(self, key: str):
        """Python 3.11 reads more forms than 3.10: the verdict must not depend on the interpreter."""
        assert (
            quality.implausible_time_range(between("2018-01-01T00:00:00Z", "2018-01-31T00:00:00Z", key), LIMITS) is None
        )


class TestKnownIds:
    @pytest.mark.parametrize(
        ("customers", "terminals", "problem"),
        [
            (1000, 1000, None),
            (1100, 0, "5.50% of the clean rows have no customer, more than 5.00%"),
            (0, 20_000, "100.00% of the clean rows have no terminal, more than 5.00%"),
            (2000, 4000, "10.00% of the clean rows have no customer and 20.00% of the clean rows have no terminal"),
        ],
    )
    def test_rule(self, customers: int, terminals: int, problem: str | None):
        found = quality.many_unknown_ids(typed(unknown_customer=customers, unknown_terminal=terminals), LIMITS)
        assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("\nno route"), "its artifacts cannot be checked in file:///nowhere: no route"),
        (OSError(), "its artifacts cannot be checked in file:///nowhere: OSError"),
        (FileNotFoundError(), "its artifacts are gone from file:///nowhere"),
    ],
)
def test_artifacts_that_cannot_be_listed(monkeypatch: pytest.MonkeyPatch, error: OSError, told: str):
    monkeypatch.setattr("mlflow.artifacts.list_artifacts", mock.Mock(side_effect=error))
    client = mock.Mock(get_model_version_download_uri=lambda *_: "file:///nowhere")
    assert told in (lost_parts(mock.Mock(client=lambda: client), mock.Mock(version="7")) or "")


def test_a_registry_that_cannot_be_asked_is_an_error():
    client = mock.Mock(get_run=mock.Mock(side_effect=OSError("no route")))
    with pytest.raises(OSError, match="no route"):
        lost_parts(mock.Mock(client=lambda: client), mock.Mock(version="7"))


def file(
    key: str,
    days: tuple[int, int] = (0, 29),
    ids: tuple[int, int] | None = None,
    shared: Mapping[str, int | None] | None = None,
    **changes: Any,
) -> CleanedReport:
    """A cleaned file of some days (since 2020-01-01) and ids, which shares so many ids with others."""
    first, last = (f"{date(2020, 1, 1) + timedelta(days=day)}T06:00:00Z" for day in days)
    return CleanedReport.model_validate(
        {
            **cleaned_report(key, raw_spec(0)),
            "tx_datetime": times_between(first, last),
            "transaction_id": ids_between(*(ids or (1000 * days[0], 1000 * days[1] + 999))),
            "shared_ids": {
                other: {
                    "version": f"{SCHEMA_VERSION}/{EPOCH}/1-1",
                    "rows": rows,
                    "examples": [*range(min(rows or 0, 3))],
                }
                for other, rows in (shared or {}).items()
            },
            **changes,
        }
    )


def day_text(day: int) -> str:
    return f"{date(2020, 1, 1) + timedelta(days=day)}T00:00:00Z"


def daily(first: int, last: int) -> dict[str, int]:
    """A thousand rows on each day."""
    return {day_text(day): 1000 for day in range(first, last + 1)}


def verdicts(*files: CleanedReport, built: str = "", accepted: str = "", **limits: Any) -> quality.Verdicts:
    """The verdicts on files; those with a key of one letter in `built` have features, in capitals of older rows."""
    cleaned = {
        file.partition: file.model_copy(update={"accepted": True}) if file.partition in accepted else file
        for file in files
    }
    features = {
        key.lower(): FeaturesReport.model_validate(
            features_report(
                cleaned_report(key, raw_spec(0)),
                {"cleaned": cleaned[key.lower()].version if key.islower() else "older", "history": {}},
            )
        )
        for key in built
    }
    return quality.judge_files(cleaned, features, QualityLimits(**limits))


class TestVerdicts:
    @pytest.mark.parametrize(
        ("days", "shared"),
        [
            ((30, 58), None),
            ((29, 58), None),
            ((28, 58), 2),
            ((10, 20), 11),
            ((-30, 60), 30),
            ((-300, -250), None),
        ],
    )
    def test_files_that_share_days(self, days: tuple[int, int], shared: int | None):
        found = verdicts(file("a", ids=(0, 9)), file("b", days, ids=(10, 19)))
        expected = (
            {}
            if shared is None
            else {key: {"time_range": f"it shares {shared} days with {other}"} for key, other in ("ab", "ba")}
        )
        assert found.problems == expected

    def test_an_equal_id_is_a_problem_an_overlap_without_one_a_warning(self):
        found = verdicts(file("a", ids=(0, 100)), file("b", (30, 59), ids=(100, 200), shared={"a": 5}))
        assert found.problems == {
            "a": {"unique_ids": "5 of its ids are also in b: 0, 1, 2"},
            "b": {"unique_ids": "5 of its ids are also in a: 0, 1, 2"},
        }
        assert found.duplicates == {"a", "b"}
        found = verdicts(file("a", ids=(0, 100)), file("b", (30, 59), ids=(50, 200), shared={"a": 0}))
        assert found.problems == {}
        assert found.warnings["b"] == {"unique_ids": "its ids overlap those of a, but none is in both"}
        not_compared = file("a", ids=(0, 100)), file("b", (30, 59), ids=(100, 200))
        found = verdicts(*not_compared)
        assert found.problems["b"] == {"unique_ids": "its ids overlap those of a, and were not compared"}
        assert found.uncompared == {"b"}, "the next run cleans it again, and compares"
        found = verdicts(file("a", ids=(0, 100)), file("b", (30, 59), ids=(100, 200), shared={"a": None}))
        assert found.problems["b"] == {"unique_ids": "its ids overlap those of a, and could not be compared"}
        assert found.uncompared == {"b"}, "so that an error of the storage that passes stops no file for good"

    def test_a_comparison_with_an_older_version_of_a_file_counts_as_none(self):
        older = file("b", (30, 59), ids=(50, 200), shared={"a": 0}, epoch="2018-04-01")
        replaced = file("a", ids=(0, 100), raw={"size": 1, "fingerprint": "2-2"})
        assert set(verdicts(replaced, older).problems) == {"a", "b"}

    def test_files_that_their_own_figures_stop_accuse_nobody(self):
        """One row of 2099 in a good month, and one id of a later file."""
        outlier = file("a").model_copy(update={"counts": typed(fraud_rows=20_000).counts})
        found = verdicts(outlier, file("b", (10, 39)), built="")
        assert set(found.problems) == {"a"}

    def test_files_with_features_stand_then_those_with_the_fewest_conflicts(self):
        a, b, c = file("a", (0, 29)), file("b", (20, 49)), file("c", (45, 74))
        assert set(verdicts(a, b, c).problems) == {"b"}
        assert set(verdicts(a, b, c, built="b").problems) == {"a", "c"}
        assert set(verdicts(a, b).problems) == {"a", "b"}, "equals"
        assert set(verdicts(a, b, built="a").problems) == {"b"}
        assert set(verdicts(a, b, built="ab").problems) == set(), "both were taken before"

    def test_an_accepted_file_is_taken_as_it_is_and_judges_others(self):
        bad = file("a").model_copy(update={"counts": typed(fraud_rows=20_000).counts})
        assert set(verdicts(bad, file("b", (10, 39)), built="a", accepted="a").problems) == {"b"}
        assert set(verdicts(bad, built="a").problems) == {"a"}
        assert set(verdicts(bad, accepted="a").problems) == set()

    def test_shared_ids_at_the_ends_of_two_files_are_a_warning(self):
        """As of a file that begins with the last thousandth of the one before."""
        last = ids_between(0, 1_000_000) | {"p99_9": 999_000}
        first = ids_between(999_500, 2_000_000) | {"p0_1": 1_000_500}
        a = file("a", (0, 29), transaction_id=last)
        b = file("b", (30, 59), shared={"a": 501}, transaction_id=first)
        found = verdicts(a, b)
        assert found.problems == {}
        assert found.warnings["b"] == {"unique_ids": "501 of its ids are also in a: 0, 1, 2"}

    def test_a_file_with_features_of_older_rows_stands_before_one_without(self):
        """A corrected file is not brought down by the copy of it that was stopped before."""
        a, b = file("a"), file("b")
        assert set(verdicts(a, b, built="A").problems) == {"b"}
        assert set(verdicts(a, b, built="Ab").problems) == {"a"}

    def test_building_files_that_stand_changes_no_verdict(self):
        chain = [file(key, (25 * n, 25 * n + 29), (n, n)) for n, key in enumerate("abcd")]
        assert set(verdicts(*chain).problems) == {"b", "c"}
        for built in ("a", "d", "ad"):
            assert set(verdicts(*chain, built=built).problems) == {"b", "c"}

    @settings(max_examples=200)
    @given(
        first=st.integers(-400, 0),
        last=st.integers(29, 400),
        ids=st.tuples(st.integers(-(10**9), 30_000), st.integers(59_999, 10**9)),
        new=st.booleans(),
    )
    def test_odd_rows_stop_their_own_file_alone(self, first: int, last: int, ids: tuple[int, int], new: bool):
        """More than one row in a thousand: the file's usual days and ids reach anywhere. Its neighbours are good."""
        before = file("a", (-30, -1), (0, 29_999), rows_per_day=daily(-30, -1))
        after = file("c", (30, 59), (60_000, 89_999), rows_per_day=daily(30, 59))
        shared = {"a": int(ids[0] < 30_000), "c": int(ids[1] >= 60_000)}
        days = {**daily(0, 29), **dict.fromkeys((day_text(first), day_text(last)), 5)}
        odd = file("b", (first, last), ids, shared, rows_per_day=days)
        found = verdicts(before, odd, after, built="" if new else "ac")
        one_sided = (ids[0] < 30_000) != (ids[1] >= 60_000)
        if not new or not one_sided:
            assert set(found.problems) <= {"b"}

    @settings(max_examples=200)
    @given(
        starts=st.lists(st.integers(0, 200), min_size=1, max_size=6, unique=True),
        built=st.sets(st.integers(0, 5)),
        bad=st.sets(st.integers(0, 5)),
    )
    def test_verdicts_on_any_files(self, starts: list[int], built: set[int], bad: set[int]):
        keys = "abcdef"[: len(starts)]
        files = [
            file(key, (start, start + 29), ids=(n * 10, n * 10 + 9))
            for n, (key, start) in enumerate(zip(keys, starts, strict=True))
        ]
        for number in bad & set(range(len(files))):
            files[number] = files[number].model_copy(update={"counts": typed(fraud_rows=20_000).counts})
        with_features = {keys[number] for number in built if number < len(keys)}
        found = verdicts(*files, built="".join(sorted(with_features)))
        standing = [one for one in files if not found.reason(one.partition)]
        for one in files:
            key = one.partition
            own = quality.implausible_fraud_rate(one, LIMITS)
            assert ("fraud_rate" in found.problems.get(key, {})) == (own is not None)
            if own or key in with_features:
                assert (key in found.problems) == (own is not None)
        # Those that stand do not share days, unless both were taken before.
        for one, other in itertools.combinations(standing, 2):
            assert one.tx_datetime is not None
            assert other.tx_datetime is not None
            days = (
                min(one.tx_datetime.p99_9, other.tx_datetime.p99_9) - max(one.tx_datetime.p0_1, other.tx_datetime.p0_1)
            ).days + 1
            assert days <= LIMITS.max_overlap_days or {one.partition, other.partition} <= with_features
        # The order of the files does not matter.
        assert verdicts(*reversed(files), built="".join(sorted(with_features))).problems == found.problems


class Checks:
    """Three registered partitions, ``file-0`` to ``file-2``, with cleaned data and features that pass every check."""

    def __init__(self, lake: LakeResource, instance: dg.DagsterInstance) -> None:
        self.lake, self.instance = lake, instance
        keys = [f"file-{number}" for number in range(3)]
        instance.add_dynamic_partitions("raw_files", keys)
        cleaned = {key: report(number) for number, key in enumerate(keys)}
        inputs = expected_inputs(cleaned_reports(*cleaned.values()), quality.Verdicts({}))
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
        """The verdict on the second file by a run that does not check it."""
        cleaned, features = self.lake.reports(CleanedReport), self.lake.reports(FeaturesReport)
        return quality.judge_files(cleaned, features, LIMITS).reason("file-1")


@pytest.fixture
def checks(lake: LakeResource, instance: dg.DagsterInstance) -> Checks:
    return Checks(lake, instance)


BAD_CLEANED = {
    "rows_add_up": {"raw_rows": 1},
    "reject_rate": {"raw_rows": 40_000, "rejected_rows": 20_000},
    "fraud_rate": {"fraud_rows": 15_000},
    "known_ids": {"unknown_customer": 15_000},
}


class TestThroughDagster:
    @pytest.mark.parametrize("check", [*BAD_CLEANED, "unique_ids", "time_range", "usable_features"])
    def test_good_partitions_pass(self, checks: Checks, check: str):
        evaluation = checks.evaluate(check)
        assert evaluation.passed
        assert evaluation.metadata["partitions"].value.startswith("3, ")
        assert "problems" not in evaluation.metadata

    @pytest.mark.parametrize(("check", "counts"), BAD_CLEANED.items())
    def test_a_bad_partition_fails_its_check(self, checks: Checks, check: str, counts: dict[str, int]):
        put_report(checks.lake, CLEANED_TABLE, "file-1", report(1, **counts))
        evaluation = checks.evaluate(check)
        assert not evaluation.passed
        assert evaluation.severity == dg.AssetCheckSeverity.ERROR
        assert list(evaluation.metadata["problems"].value) == ["file-1"]
        assert (evaluation.description or "").startswith("file-1: ")
        assert f"{check}: {evaluation.metadata['problems'].value['file-1']}" == checks.problem_beyond_a_run()

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
        raw = {"uri": "file:///raw/file-1.txt", "size": 1, "fingerprint": "2-2"}
        put_report(checks.lake, CLEANED_TABLE, "file-1", cleaned_report("file-1", raw_spec(1, **change), raw=raw))
        evaluation = checks.evaluate(check, "file-1", "file-1")
        assert not evaluation.passed
        assert "file-2" in evaluation.metadata["problems"].value["file-1"]
        assert f"{check}: {evaluation.metadata['problems'].value['file-1']}" == checks.problem_beyond_a_run()

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


@pytest.mark.parametrize(
    ("tags", "days"),
    [
        ({}, 200),
        ({"champion_since": "90"}, 90),
        ({"champion_since": "190", "champion_compared": "130"}, 130),
        ({"champion_since": "130", "champion_compared": "190"}, 130),
        ({"champion_since": "yesterday"}, 200),
    ],
    ids=["made champion in MLflow", "champion since", "compared since", "compared before", "edited by hand"],
)
def test_a_champion_without_a_recent_comparison_is_a_problem(tags: dict[str, str], days: int):
    """The version was registered 200 days ago; no challenger was trained."""
    now = datetime.now(timezone.utc)
    found = []
    for name, value in tags.items():
        instant = now - timedelta(days=int(value)) if value.isdigit() else None
        found.append(ModelVersionTag(name, instant.strftime("%Y-%m-%dT%H:%M:%SZ") if instant else value))
    registered = int((now - timedelta(days=200)).timestamp() * 1000)
    version = ModelVersion("fraud_model", "1", registered, tags=found)
    problem = champion_health(PromotionConfig(), version, outcome="too_little_data", reason="")
    assert (problem is None) == (days <= 120)
    if problem is not None:
        assert f"version 1, for {days} days; this time: too_little_data" in problem


@pytest.mark.parametrize(
    ("tag", "value", "problem"),
    [
        ("features", "[1]", "has no inputs"),
        ("features", "tx_amount", "has no inputs"),
        ("features", None, "has no inputs"),
        ("model_uri", None, "has no model file"),
        ("model_uri", "file:///a/directory", "has no model file"),
        ("learner", None, None),
        ("train_last_date", "yesterday", None),
    ],
)
def test_an_edited_tag_of_the_champion_is_no_error(tag: str, value: str | None, problem: str | None):
    tags = {"features": '["tx_amount"]', "model_uri": "file:///model.json", "learner": "xgboost"}
    tags |= {"train_last_date": "2020-01-16", tag: value}
    version = ModelVersion("fraud_model", "1", 0, tags=[ModelVersionTag(*item) for item in tags.items() if item[1]])
    assert (champion_request(version) is None) == (problem is not None)
    assert (problem or "None") in str(champion_problem(version))
    assert (train_last_date(version) is None) == (tag == "train_last_date")


def test_long_lists_are_cut():
    assert shorten_list(["a", "b"]) == "a, b"
    assert shorten_list([]) == ""
    assert shorten_list(list("abcdefg")) == "a, b, c, d, e and 2 more"
