"""The assets with a fake engine, through Dagster's own machinery: what is sent to Spark, recorded and refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest
from dagster._core.definitions.observe import observe
from sklearn.metrics import average_precision_score

from ml_platform.assets.features import (
    blocked_files,
    chronological_keys,
    expected_inputs,
    history_of,
    source_fingerprints,
    stale_features,
)
from ml_platform.assets.model import FraudModelConfig, training_partitions
from ml_platform.assets.raw import raw_transactions
from ml_platform.lake.quality import QualityLimits
from ml_platform.lake.reports import CLEANED_TABLE, FEATURES_TABLE, REJECTED_TABLE, CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource
from ml_platform.model.mlflow import MlflowResource
from ml_platform.model.promotion import DECIDED_BY_FIGURES
from ml_platform_tests.fakes import (
    FakeEngine,
    cleaned_report,
    cleaned_reports,
    definitions,
    features_report,
    local_path,
    partitions_sent,
    put_cleaned,
    put_raw,
    put_report,
    raw_spec,
    recorded,
    requests_of,
    run_assets,
)
from spark_jobs import build_features
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION

CLEANED_KEY, FEATURES_KEY, MODEL = "cleaned_transactions", "transaction_features", "fraud_model"


@pytest.fixture
def keys(lake: LakeResource, instance: dg.DagsterInstance) -> list[str]:
    """Four raw files of 30 days each, registered in order of time."""
    keys = [f"file-{number}" for number in range(4)]
    for number, key in enumerate(keys):
        put_raw(lake, key, raw_spec(number))
    instance.add_dynamic_partitions("raw_files", keys)
    return keys


CANDIDATE = {"learner": "logistic_regression", "grid": {"C": [0.5], "max_iter": [10, 20]}}


def failure_of(result: dg.ExecuteInProcessResult, asset: str) -> str:
    """Message of the error that ended an asset's step."""
    (event,) = (event for event in result.get_step_failure_events() if event.step_key == asset)
    error = event.step_failure_data.error
    assert error is not None
    # Dagster wraps what an asset raises, except for its own Failure.
    return (error.cause or error).message


def modified(lake: LakeResource, kind: type[Any]) -> dict[str, int]:
    return {
        key: (local_path(lake.store.spark_uri(lake.partition_path(kind.table, key))) / REPORT_NAME).stat().st_mtime_ns
        for key in lake.reports(kind)
    }


class TestCleaned:
    def test_one_job_for_all_partitions_of_the_run(
        self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]
    ):
        result = run_assets(definitions(lake), instance, CLEANED_KEY, keys=(keys[0], keys[2]))
        assert result.success
        (request,) = requests_of(lake, result.run_id, "clean_transactions")
        files, _ = lake.list_raw_files()
        assert request == {
            "run_id": result.run_id,
            "epoch": "2020-01-01",
            "partitions": [
                {
                    "partition": key,
                    "raw": files[key].as_request(),
                    "output_uri": f"file://{lake.lake_uri}/{CLEANED_TABLE}/raw_file={key}",
                    "rejected_uri": f"file://{lake.lake_uri}/{REJECTED_TABLE}/raw_file={key}",
                }
                for key in keys[:3]
            ],
        }
        assert sorted(recorded(instance, CLEANED_KEY)) == keys[:3]
        assert set(lake.reports(CleanedReport)) == set(keys[:3])

    def test_metadata(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]):
        put_raw(
            lake,
            keys[0],
            raw_spec(0, counts={"raw_rows": 20_006, "rejected_rows": 5, "duplicate_rows": 1}),
        )
        put_raw(lake, keys[1], None)
        result = run_assets(definitions(lake), instance, CLEANED_KEY, keys=(keys[0], keys[1]))
        assert result.success
        full, empty = (recorded(instance, CLEANED_KEY)[key] for key in keys[:2])
        raw = lake.list_raw_files()[0][keys[0]]
        assert {
            "outcome": "cleaned",
            "dagster/row_count": 20_000,
            "raw_rows": 20_006,
            "rejected_rows": 5,
            "duplicate_rows": 1,
            "fraud_rows": 200,
            "raw_size_bytes": raw.size,
            "fingerprint": raw.fingerprint,
            "cleaned_by_run": result.run_id,
            "path": f"file://{lake.lake_uri}/{CLEANED_TABLE}/raw_file={keys[0]}",
            "rejected_path": f"file://{lake.lake_uri}/{REJECTED_TABLE}/raw_file={keys[0]}",
            "first_transaction": "2020-01-01T00:00:00Z",
            "last_transaction": "2020-01-30T23:59:59Z",
        }.items() <= full.items()
        assert {"outcome": "empty file", "dagster/row_count": 0}.items() <= empty.items()
        assert not {"rejected_path", "first_transaction"} & set(empty)

    def test_what_is_cleaned_is_not_sent_again(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]):
        put_cleaned(lake, *keys)
        before = modified(lake, CleanedReport)
        result = run_assets(definitions(lake), instance, CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert result.success
        assert requests_of(lake, result.run_id, "clean_transactions") == []
        assert modified(lake, CleanedReport) == before
        assert {value["outcome"] for value in recorded(instance, CLEANED_KEY).values()} == {"already clean"}

    def test_only_what_changed_is_sent(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]):
        put_cleaned(lake, *keys[:3])
        before = modified(lake, CleanedReport)
        put_raw(lake, keys[1], raw_spec(1, rows=17))
        result = run_assets(definitions(lake), instance, CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert partitions_sent(lake, result.run_id, "clean_transactions") == [keys[1], keys[3]]
        after = modified(lake, CleanedReport)
        assert (after[keys[0]], after[keys[2]]) == (before[keys[0]], before[keys[2]])
        assert recorded(instance, CLEANED_KEY)[keys[1]]["dagster/row_count"] == 17

    def test_rebuild(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]):
        put_cleaned(lake, *keys)
        result = run_assets(
            definitions(lake),
            instance,
            CLEANED_KEY,
            keys=(keys[1], keys[2]),
            config={CLEANED_KEY: {"rebuild": True}},
        )
        assert partitions_sent(lake, result.run_id, "clean_transactions") == keys[1:3]

    def test_other_epoch(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]):
        put_cleaned(lake, *keys)
        other = LakeResource(raw_uri=lake.raw_uri, lake_uri=lake.lake_uri, epoch="2019-08-22")
        result = run_assets(definitions(other), instance, CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert partitions_sent(lake, result.run_id, "clean_transactions") == keys

    def test_partial_failure(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]):
        put_cleaned(lake, keys[0])
        put_raw(lake, keys[1], {"error": "not a text file"})
        (lake.raw._root / f"{keys[2]}.txt").unlink()  # type: ignore[attr-defined]
        result = run_assets(definitions(lake), instance, CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert not result.success
        done = recorded(instance, CLEANED_KEY)
        assert {key: value["outcome"] for key, value in done.items()} == {
            keys[0]: "already clean",
            keys[3]: "cleaned",
        }
        message = failure_of(result, CLEANED_KEY)
        assert "2 of 4 partitions of cleaned_transactions failed (2 succeeded): " in message
        assert f"{keys[1]}: RuntimeError: not a text file" in message
        assert f"{keys[2]}: file not found in {lake.raw_uri}" in message

    def test_dagster_shows_exactly_which_partitions_exist(
        self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]
    ):
        put_raw(lake, keys[1], {"error": "not a text file"})
        run_assets(definitions(lake), instance, CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert instance.get_materialized_partitions(dg.AssetKey(CLEANED_KEY)) == {keys[0], *keys[2:]}

    def test_downstream_does_not_run_after_a_failure(
        self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]
    ):
        put_raw(lake, keys[1], {"error": "not a text file"})
        result = run_assets(definitions(lake), instance, CLEANED_KEY, FEATURES_KEY, MODEL, keys=(keys[0], keys[-1]))
        assert not result.success
        assert requests_of(lake, result.run_id, "build_features") == []
        assert recorded(instance, FEATURES_KEY) == {}

    def test_a_failed_partition_that_is_complete_no_more_is_not_reported_as_done(
        self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]
    ):
        put_cleaned(lake, *keys)
        put_raw(lake, keys[1], {"error": "not a text file"})
        run_assets(definitions(lake), instance, CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert set(lake.reports(CleanedReport)) == {keys[0], *keys[2:]}

    def test_the_engine_breaks_down(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]):
        engine = FakeEngine(breaks_down="clean_transactions")
        result = run_assets(definitions(lake, engine), instance, CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert "clean_transactions broke down" in failure_of(result, CLEANED_KEY)
        assert recorded(instance, CLEANED_KEY) == {}

    def test_wrong_data_stop_the_run_before_the_features(
        self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]
    ):
        put_raw(lake, keys[1], raw_spec(1, counts={"raw_rows": 1}))
        result = run_assets(definitions(lake), instance, CLEANED_KEY, FEATURES_KEY, keys=(keys[0], keys[-1]))
        assert not result.success
        assert requests_of(lake, result.run_id, "build_features") == []


def test_raw_transactions_are_observed(lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]):
    put_raw(lake, "not-registered", raw_spec(9))
    lake.raw.write("two words.txt", b"x")
    assert observe([raw_transactions], instance=instance, resources={"lake": lake}).success
    files, _ = lake.list_raw_files()
    found = {
        observation.partition: (observation.tags["dagster/data_version"], observation.metadata["size_bytes"].value)
        for record in instance.fetch_observations(dg.AssetKey("raw_transactions"), limit=100).records
        if (observation := record.asset_observation)
    }
    assert found == {key: (files[key].fingerprint, files[key].size) for key in keys}


class TestTime:
    """Rules about time ranges, which names say nothing about."""

    @staticmethod
    def cleaned(**numbers: int | None) -> dict[str, CleanedReport]:
        return cleaned_reports(
            *(cleaned_report(key, None if number is None else raw_spec(number)) for key, number in numbers.items())
        )

    @staticmethod
    def between(key: str, first: str, last: str) -> dict[str, CleanedReport]:
        return cleaned_reports({**cleaned_report(key, raw_spec(0)), "tx_datetime": {"min": first, "max": last}})

    @staticmethod
    def features(cleaned: dict[str, CleanedReport]) -> dict[str, FeaturesReport]:
        inputs = expected_inputs(cleaned)
        return {
            key: FeaturesReport.model_validate(features_report(cleaned_report(key, raw_spec(0)), inputs[key]))
            for key in cleaned
        }

    def test_order_is_that_of_the_first_transactions(self):
        assert chronological_keys(self.cleaned(a=3, b=1, empty=None, c=2, d=0)) == ["d", "b", "c", "a"]

    def test_history_is_what_reaches_into_the_window(self):
        assert build_features.HISTORY_DAYS == 44
        assert history_of(self.cleaned(a=3, b=1, empty=None, c=2, d=0)) == {
            "d": [],
            "b": ["d"],
            # 44 days before day 60 is day 16: the file of days 0 to 29 reaches into it.
            "c": ["d", "b"],
            "a": ["b", "c"],
            "empty": [],
        }

    def test_history_ends_exactly_at_its_window(self):
        cleaned = self.cleaned(late=2)
        for key, last in {"in": "2020-01-17T00:00:01Z", "out": "2020-01-17T00:00:00Z"}.items():
            cleaned |= self.between(key, "2020-01-01T00:00:00Z", last)
        assert history_of(cleaned)["late"] == ["in"]

    def test_no_date_is_too_early(self):
        cleaned = self.between("first", "0001-01-01T00:00:00Z", "0001-01-01T06:00:00Z")
        cleaned |= self.between("second", "0001-01-30T00:00:00Z", "0001-01-30T06:00:00Z")
        assert history_of(cleaned) == {"first": [], "second": ["first"]}
        assert training_partitions(cleaned, self.features(cleaned), "second", 74) == (["first", "second"], [])

    @staticmethod
    def changed(cleaned: dict[str, CleanedReport], key: str, name: str, value: Any) -> dict[str, CleanedReport]:
        if name == "raw":
            value = cleaned[key].raw.model_copy(update={"fingerprint": value})
        return {**cleaned, key: cleaned[key].model_copy(update={name: value})}

    def test_inputs_name_what_the_features_depend_on(self):
        cleaned = self.cleaned(a=0, b=1)
        inputs = expected_inputs(cleaned)
        assert list(inputs["b"].history) == ["a"]
        assert inputs["a"].history == {}
        for name, value in (("schema_version", 99), ("epoch", "2018-04-01"), ("raw", "2")):
            changed = expected_inputs(self.changed(cleaned, "a", name, value))
            assert changed["a"] != inputs["a"]
            assert changed["b"] != inputs["b"]
        assert expected_inputs(self.cleaned(a=0, b=1, far=9))["b"] == inputs["b"]

    def test_stale(self):
        cleaned = self.cleaned(a=0, b=1, c=2)
        inputs, features = expected_inputs(cleaned), self.features(cleaned)
        assert stale_features(features, inputs) == []
        other = features["b"].model_copy(update={"features": ["tx_amount"]})
        assert stale_features({**features, "b": other}, inputs) == ["b"]
        late = expected_inputs(cleaned | self.cleaned(late=1))
        assert stale_features(features, late) == ["c"]
        assert stale_features({**features, "gone": features["a"]}, inputs) == []

    @pytest.mark.parametrize(
        ("name", "value", "judged"),
        [("schema_version", 99, False), ("epoch", "2018-04-01", False), ("raw", "a/b-2", True)],
    )
    def test_only_another_file_is_judged_again(self, name: str, value: Any, judged: bool):
        """A file of nothing but frauds, which it was when its features were built, too."""
        cleaned = self.cleaned(a=0, c=2) | cleaned_reports(cleaned_report("b", raw_spec(1, frauds=20_000)))
        features = self.features(cleaned)
        cleaned = self.changed(cleaned, "b", name, value)
        assert sorted(stale_features(features, expected_inputs(cleaned))) == ["b", "c"]
        built_from = source_fingerprints(features, {})
        assert list(blocked_files("abc", built_from, cleaned, QualityLimits())) == ["b"] * judged
        for outdated in ({}, {"b": {"schema_version": 0}}, {"b": {"inputs": {}}}):
            unknown = source_fingerprints({key: features[key] for key in "ac"}, outdated)
            (problem,) = blocked_files("abc", unknown, cleaned, QualityLimits()).values()
            assert "100.000% of the rows are frauds" in problem

    def test_training_partitions(self):
        cleaned = self.cleaned(d=0, b=1, c=2, a=3, empty=None)
        features = self.features(cleaned)
        # 74 days back from the end of day 119, and one more: from day 44 on.
        assert training_partitions(cleaned, features, "a", 74) == (["b", "c", "a"], [])
        assert training_partitions(cleaned, features, "c", 74) == (["d", "b", "c"], [])
        assert training_partitions(cleaned, features, "d", 74) == (["d"], [])
        del features["b"]
        assert training_partitions(cleaned, features, "a", 74) == (["c", "a"], ["b"])

    def test_a_day_of_training_data_is_never_left_out(self):
        """The window's first day belongs to it whole: the request's days are whole days up to the cut-off's."""
        cleaned = self.cleaned(first=0, second=1)
        for days in range(1, 60):
            used, _ = training_partitions(cleaned, self.features(cleaned), "second", days)
            # Days 60 - days to 59 are in the window; "first" has days 0 to 29.
            if 60 - days <= 29:
                assert "first" in used


class TestFeatures:
    def test_one_job_oldest_first(self, lake: LakeResource, instance: dg.DagsterInstance):
        """Names and registration run against time: history and order follow the reports' times."""
        order = {"w": 3, "x": 1, "y": 2, "z": 0, "empty": None}
        for key, number in order.items():
            put_raw(lake, key, None if number is None else raw_spec(number))
        instance.add_dynamic_partitions("raw_files", list(order))
        put_cleaned(lake, *order)
        result = run_assets(definitions(lake), instance, FEATURES_KEY, keys=("w", "empty"))
        assert result.success
        (request,) = requests_of(lake, result.run_id, "build_features")
        assert [item["partition"] for item in request["partitions"]] == ["empty", "z", "x", "y", "w"]
        uri = f"file://{lake.lake_uri}/{CLEANED_TABLE}/raw_file="
        items = {item["partition"]: item for item in request["partitions"]}
        assert {key: item["history"] for key, item in items.items()} == {
            "empty": [],
            "z": [],
            "x": [f"{uri}z"],
            "y": [f"{uri}z", f"{uri}x"],
            "w": [f"{uri}x", f"{uri}y"],
        }
        assert {key: item["tx_datetime_min"] for key, item in items.items()} == {
            "empty": None,
            "z": "2020-01-01T00:00:00Z",
            "x": "2020-01-31T00:00:00Z",
            "y": "2020-03-01T00:00:00Z",
            "w": "2020-03-31T00:00:00Z",
        }
        files, _ = lake.list_raw_files()
        assert items["w"] == {
            "partition": "w",
            "cleaned_uri": f"{uri}w",
            "tx_datetime_min": "2020-03-31T00:00:00Z",
            "history": [f"{uri}x", f"{uri}y"],
            "cleaned_bytes": sum(files[key].size for key in "wxy"),
            "inputs": expected_inputs(lake.reports(CleanedReport))["w"].model_dump(),
            "output_uri": f"file://{lake.lake_uri}/{FEATURES_TABLE}/raw_file=w",
        }
        metadata = recorded(instance, FEATURES_KEY)
        assert {
            "outcome": "built",
            "dagster/row_count": 20_000,
            "fraud_rows": 200,
            "history_partitions": ["x", "y"],
            "built_by_run": result.run_id,
        }.items() <= metadata["w"].items()
        assert metadata["empty"]["dagster/row_count"] == 0

    @pytest.fixture
    def built(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]) -> list[str]:
        put_cleaned(lake, *keys)
        assert run_assets(definitions(lake), instance, FEATURES_KEY, keys=(keys[0], keys[-1])).success
        return keys

    def test_what_is_up_to_date_is_not_sent_again(
        self, lake: LakeResource, instance: dg.DagsterInstance, built: list[str]
    ):
        before = modified(lake, FeaturesReport)
        result = run_assets(definitions(lake), instance, FEATURES_KEY, keys=(built[0], built[-1]))
        assert result.success
        assert requests_of(lake, result.run_id, "build_features") == []
        assert modified(lake, FeaturesReport) == before
        assert {value["outcome"] for value in recorded(instance, FEATURES_KEY).values()} == {"already up to date"}

    @pytest.mark.parametrize("changes", [{"counts": {}}, {"inputs": None}, {"features": "tx_amount"}], ids=str)
    def test_an_edited_report_marks_nothing_as_built(
        self, lake: LakeResource, instance: dg.DagsterInstance, built: list[str], changes: dict[str, Any]
    ):
        put_report(lake, FEATURES_TABLE, built[2], {**lake.reports(FeaturesReport)[built[2]].model_dump(), **changes})
        result = run_assets(definitions(lake), instance, FEATURES_KEY, keys=(built[0], built[-1]))
        assert partitions_sent(lake, result.run_id, "build_features") == [built[2]]

    def test_rebuild(self, lake: LakeResource, instance: dg.DagsterInstance, built: list[str]):
        result = run_assets(
            definitions(lake),
            instance,
            FEATURES_KEY,
            keys=(built[1], built[2]),
            config={FEATURES_KEY: {"rebuild": True}},
        )
        assert partitions_sent(lake, result.run_id, "build_features") == built[1:3]

    def test_a_late_file_makes_later_features_beyond_the_range_stale(
        self, lake: LakeResource, instance: dg.DagsterInstance, built: list[str]
    ):
        put_raw(lake, "late", raw_spec(1, start="2020-02-05T00:00:00Z", days=1, first_id=90_000_000, rows=500))
        instance.add_dynamic_partitions("raw_files", ["late"])
        before = modified(lake, FeaturesReport)
        result = run_assets(definitions(lake), instance, CLEANED_KEY, FEATURES_KEY, keys=("late", "late"))
        assert result.success
        assert partitions_sent(lake, result.run_id, "clean_transactions") == ["late"]
        # Later files within its 37 days; the earlier ones and its own month's file, which began before it, are not.
        assert partitions_sent(lake, result.run_id, "build_features") == ["late", built[2]]
        assert sorted(recorded(instance, FEATURES_KEY, result.run_id)) == sorted(["late", built[2]])
        after = modified(lake, FeaturesReport)
        assert {key for key in built if after[key] != before[key]} == {built[2]}

    def test_a_replaced_file_makes_its_own_and_later_features_stale(
        self, lake: LakeResource, instance: dg.DagsterInstance, built: list[str]
    ):
        put_raw(lake, built[0], raw_spec(0, rows=15_000))
        result = run_assets(definitions(lake), instance, CLEANED_KEY, FEATURES_KEY, keys=(built[0], built[0]))
        assert result.success
        assert partitions_sent(lake, result.run_id, "clean_transactions") == [built[0]]
        assert partitions_sent(lake, result.run_id, "build_features") == built[:3]

    def test_a_replaced_file_that_was_only_cleaned_gets_features_from_the_next_run(
        self, lake: LakeResource, instance: dg.DagsterInstance, built: list[str]
    ):
        put_raw(lake, built[1], raw_spec(1, rows=15_000))
        assert run_assets(definitions(lake), instance, CLEANED_KEY, keys=(built[1], built[1])).success
        other = run_assets(definitions(lake), instance, FEATURES_KEY, keys=(built[3], built[3]))
        assert partitions_sent(lake, other.run_id, "build_features") == built[1:4]

    @pytest.mark.parametrize("lost", [False, True])
    def test_a_replaced_file_that_its_checks_stopped_gets_features_from_no_other_run(
        self, lake: LakeResource, instance: dg.DagsterInstance, built: list[str], lost: bool
    ):
        put_raw(lake, built[1], raw_spec(1, frauds=15_000))
        bad = run_assets(definitions(lake), instance, CLEANED_KEY, FEATURES_KEY, keys=(built[1], built[1]))
        assert {item.check_name for item in bad.get_asset_check_evaluations() if not item.passed} == {"fraud_rate"}
        if lost:
            shutil.rmtree(local_path(lake.store.spark_uri(lake.partition_path(FEATURES_TABLE, built[1]))))
        before = modified(lake, FeaturesReport)
        other = run_assets(definitions(lake), instance, FEATURES_KEY, keys=(built[3], built[3]))
        assert other.success
        # Of the bad file's data, as all complete data, the others' history is made.
        assert partitions_sent(lake, other.run_id, "build_features") == built[2:4]
        assert modified(lake, FeaturesReport).get(built[1]) == before.get(built[1])
        put_raw(lake, built[1], raw_spec(1, rows=15_000))
        mended = run_assets(definitions(lake), instance, CLEANED_KEY, FEATURES_KEY, keys=(built[1], built[1]))
        assert mended.success
        assert partitions_sent(lake, mended.run_id, "build_features") == built[1:4]

    def test_a_failure_beyond_the_range_is_named_and_healed_by_the_next_run(
        self, lake: LakeResource, instance: dg.DagsterInstance, built: list[str]
    ):
        put_raw(lake, built[0], raw_spec(0, rows=15_000))
        engine = FakeEngine(no_features={built[1]: "disk full"})
        result = run_assets(definitions(lake, engine), instance, CLEANED_KEY, FEATURES_KEY, keys=(built[0], built[0]))
        assert f"{built[1]}: RuntimeError: disk full" in failure_of(result, FEATURES_KEY)
        assert sorted(recorded(instance, FEATURES_KEY, result.run_id)) == [built[0], built[2]]
        healed = run_assets(definitions(lake), instance, CLEANED_KEY, FEATURES_KEY, keys=(built[0], built[0]))
        assert healed.success
        assert partitions_sent(lake, healed.run_id, "build_features") == [built[1]]

    def test_what_nobody_asked_for_is_not_built(
        self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]
    ):
        put_cleaned(lake, *keys)
        result = run_assets(definitions(lake), instance, FEATURES_KEY, keys=(keys[1], keys[1]))
        assert partitions_sent(lake, result.run_id, "build_features") == [keys[1]]

    def test_partitions_without_cleaned_data_are_named(
        self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]
    ):
        put_cleaned(lake, keys[0], keys[2])
        result = run_assets(definitions(lake), instance, FEATURES_KEY, keys=(keys[0], keys[-1]))
        message = failure_of(result, FEATURES_KEY)
        for key in (keys[1], keys[3]):
            assert f"{key}: no cleaned data; materialize cleaned_transactions first" in message
        assert instance.get_materialized_partitions(dg.AssetKey(FEATURES_KEY)) == {keys[0], keys[2]}

    def test_partial_failure(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]):
        put_cleaned(lake, *keys)
        engine = FakeEngine(no_features={keys[1]: "disk full"})
        result = run_assets(definitions(lake, engine), instance, FEATURES_KEY, keys=(keys[0], keys[-1]))
        assert f"{keys[1]}: RuntimeError: disk full" in failure_of(result, FEATURES_KEY)
        assert instance.get_materialized_partitions(dg.AssetKey(FEATURES_KEY)) == {keys[0], *keys[2:]}
        healed = run_assets(definitions(lake), instance, FEATURES_KEY, keys=(keys[0], keys[-1]))
        assert partitions_sent(lake, healed.run_id, "build_features") == [keys[1]]


@pytest.fixture
def mlflow(empty_mlflow_store: Path, tmp_path: Path) -> Iterator[MlflowResource]:
    """MLflow on a store of the test's own."""
    import mlflow as module

    directory = tmp_path / "ml flow"
    directory.mkdir()
    shutil.copy(empty_mlflow_store, directory / "mlflow.db")
    yield MlflowResource(
        tracking_uri=f"sqlite:///{directory}/mlflow.db", artifact_root=(directory / "artifacts").as_uri()
    )
    while module.active_run():
        module.end_run()


@pytest.mark.usefixtures("no_pictures")
class TestModel:
    @pytest.fixture
    def ready(self, lake: LakeResource, instance: dg.DagsterInstance, keys: list[str]) -> list[str]:
        """Cleaned data and features of all partitions."""
        put_cleaned(lake, *keys)
        assert run_assets(definitions(lake), instance, FEATURES_KEY, keys=(keys[0], keys[-1])).success
        return keys

    def test_one_model_per_run(
        self, lake: LakeResource, instance: dg.DagsterInstance, ready: list[str], mlflow: MlflowResource
    ):
        result = run_assets(
            definitions(lake, mlflow=mlflow),
            instance,
            MODEL,
            keys=(ready[0], ready[2]),
            config={MODEL: {"candidates": [CANDIDATE], "seed": 7}},
        )
        assert result.success
        (request,) = requests_of(lake, result.run_id, "train_model")
        uri = f"file://{lake.lake_uri}"
        output = f"{uri}/models/{ready[2]}/{result.run_id}"
        assert request == {
            "run_id": result.run_id,
            "cutoff": ready[2],
            "cutoff_uri": f"{uri}/{FEATURES_TABLE}/raw_file={ready[2]}",
            "feature_uris": [f"{uri}/{FEATURES_TABLE}/raw_file={key}" for key in ready[:3]],
            "features": list(build_features.MODEL_INPUTS),
            "output_uri": output,
            "champion": None,
            "test_days": 7,
            "delay_days": 7,
            "train_days": 60,
            "validation_days": 7,
            "min_train_days": 7,
            "min_frauds": 10,
            "seed": 7,
            "candidates": [CANDIDATE],
            "validation_folds": 1,
            "search_rows": 200_000,
            "max_train_rows": 5_000_000,
            "fit_threads": 4,
            "library_uri": None,
        }

        scores = pd.read_parquet(local_path(f"{output}/test_scores"))
        average_precision = average_precision_score(scores["tx_fraud"], scores["score"])
        metadata = recorded(instance, MODEL)
        assert sorted(metadata) == ready[:3]
        trained = metadata[ready[2]]
        assert {
            "outcome": "trained",
            "cutoff": ready[2],
            "model_version": 1,
            "is_champion": True,
            "champion_version": 1,
            "best_parameters": {"C": 0.5, "max_iter": 20},
            "test_average_precision": average_precision,
            "test_rows": 500,
            "path": output,
        }.items() <= trained.items()
        files, _ = lake.list_raw_files()
        data_set = {
            key: {
                "fingerprint": files[key].fingerprint,
                "rows": 20_000,
                "uri": f"{uri}/{FEATURES_TABLE}/raw_file={key}",
            }
            for key in ready[:3]
        }
        assert trained["trained_on"] == data_set
        assert "mlflow_run" not in trained  # a file has no address to open
        for key in ready[:2]:
            assert {
                **trained,
                "outcome": f"the model of this run is that of partition {ready[2]}",
            } == metadata[key]

        client = mlflow.client()
        (run,) = client.search_runs([client.get_experiment_by_name("fraud_model").experiment_id])
        assert run.info.run_id == trained["mlflow_run_id"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["dagster.run_id"] == result.run_id
        assert run.data.tags["partitions"] == ",".join(ready[:3])
        assert run.data.tags["outcome"] == "trained"
        assert {
            "cutoff": ready[2],
            "seed": "7",
            "best.max_iter": "20",
            "data_set_partitions": "3",
            "data_set_rows": "60000",
        }.items() <= run.data.params.items()
        assert [json.loads(run.data.params[f"grid.{point}"]) for point in range(2)] == [
            {"learner": "logistic_regression", "C": 0.5, "max_iter": 10},
            {"learner": "logistic_regression", "C": 0.5, "max_iter": 20},
        ]
        metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith("promotion.")}
        assert {
            "test_average_precision": average_precision,
            "test_rows": 500,
            "test_frauds": 60,
            "grid.0.validation_average_precision": 0.5,
            "grid.1.validation_average_precision": 0.51,
            "validation_average_precision": 0.51,
        }.items() <= metrics.items()
        assert {"test_roc_auc", "test_card_precision_at_100", "test_recall_at_budget"} <= metrics.keys()

        champion = mlflow.champion()
        assert champion is not None
        assert (str(champion.version), champion.run_id) == ("1", run.info.run_id)
        assert champion.tags["model_uri"] == f"{output}/model.json"
        assert json.loads(champion.tags["features"]) == list(build_features.MODEL_INPUTS)

        artifacts = Path(client.download_artifacts(run.info.run_id, ""))
        assert json.loads((artifacts / "data_set.json").read_text()) == {
            "cutoff": ready[2],
            "partitions": data_set,
        }
        assert json.loads((artifacts / "report.json").read_text())["outcome"] == "trained"
        found = {
            str(path.relative_to(artifacts / "model")) for path in (artifacts / "model").rglob("*") if path.is_file()
        }
        (package,) = {Path(name).parts[1] for name in found if name.startswith("code/")}
        assert found == {
            "MLmodel",
            *(f"code/{package}/{name}" for name in ("__init__.py", "learners.py", "pyfunc.py")),
            "conda.yaml",
            "data/model.json",
            "input_example.json",
            "python_env.yaml",
            "requirements.txt",
            "serving_input_example.json",
        }
        assert (artifacts / "model/data/model.json").read_bytes() == lake.store.read(
            f"models/{ready[2]}/{result.run_id}/model.json"
        )
        version = client.get_model_version("fraud_model", "1")
        for part in (
            f"{ready[0]} to {ready[2]}",
            "60,000 transactions",
            f"average precision | {average_precision:.3f}",
            "first_model",
        ):
            assert part in version.description
        inputs = client.get_run(run.info.run_id).inputs.dataset_inputs
        assert {item.dataset.name: {tag.key: tag.value for tag in item.tags} for item in inputs} == {
            key: {"mlflow.data.context": "training", "fingerprint": files[key].fingerprint, "rows": "20000"}
            for key in ready[:3]
        }
        for item in inputs:
            assert json.loads(item.dataset.source)["uri"] == data_set[item.dataset.name]["uri"]
            fingerprint = data_set[item.dataset.name]["fingerprint"]
            assert item.dataset.digest == hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
        assert (artifacts / "figures" / "overview.png").read_bytes() == b"a picture"
        report = lake.read_json(f"models/{ready[2]}/{result.run_id}/{REPORT_NAME}")
        assert (report["outcome"], report["schema_version"]) == ("trained", SCHEMA_VERSION)
        assert report["metrics"]["test_average_precision"] == average_precision
        assert len(report["tables"]["per_day"]) == 7
        assert json.loads((artifacts / "promotion.json").read_text())["outcome"] == "first_model"
        checks = {item.check_name: item for item in result.get_asset_check_evaluations() if item.partition is None}
        assert {name: check.passed for name, check in checks.items()} == {
            **dict.fromkeys(["enough_data", "promotion", "champion_health"], True)
        }

    def test_the_cut_off_is_the_last_in_time_not_by_name(
        self, lake: LakeResource, instance: dg.DagsterInstance, mlflow: MlflowResource
    ):
        order = {"a": 2, "b": 0, "empty": None, "c": 1}
        for key, number in order.items():
            put_raw(lake, key, None if number is None else raw_spec(number))
        instance.add_dynamic_partitions("raw_files", list(order))
        result = run_assets(
            definitions(lake, mlflow=mlflow), instance, CLEANED_KEY, FEATURES_KEY, MODEL, keys=("a", "c")
        )
        assert result.success
        (request,) = requests_of(lake, result.run_id, "train_model")
        assert request["cutoff"] == "a"
        assert [uri.rpartition("=")[2] for uri in request["feature_uris"]] == ["b", "c", "a"]
        assert {key: value["outcome"] for key, value in recorded(instance, MODEL).items()} == {
            "a": "trained",
            **dict.fromkeys(["b", "c", "empty"], "the model of this run is that of partition a"),
        }

    def test_data_of_the_future_are_not_trained_on(
        self, lake: LakeResource, instance: dg.DagsterInstance, ready: list[str], mlflow: MlflowResource
    ):
        result = run_assets(definitions(lake, mlflow=mlflow), instance, MODEL, keys=(ready[1], ready[1]))
        (request,) = requests_of(lake, result.run_id, "train_model")
        assert [uri.rpartition("=")[2] for uri in request["feature_uris"]] == ready[:2]

    def test_train_each_oldest_first_then_a_challenger(
        self, lake: LakeResource, instance: dg.DagsterInstance, mlflow: MlflowResource
    ):
        order = {"c": 1, "b": 0, "a": 2}
        for key, number in order.items():
            put_raw(lake, key, raw_spec(number))
        instance.add_dynamic_partitions("raw_files", list(order))
        platform = definitions(lake, mlflow=mlflow)
        assets = (CLEANED_KEY, FEATURES_KEY, MODEL)
        result = run_assets(platform, instance, *assets, keys=("c", "a"), config={MODEL: {"train_each": True}})
        assert result.success
        metadata = recorded(instance, MODEL)
        assert {key: value["model_version"] for key, value in metadata.items()} == {"b": 1, "c": 2, "a": 3}
        assert {key: value["is_champion"] for key, value in metadata.items()} == {
            "b": True,
            "c": False,
            "a": False,
        }
        champions = {
            request["cutoff"]: request["champion"] and request["champion"]["model_uri"]
            for request in requests_of(lake, result.run_id, "train_model")
        }
        first = f"file://{lake.lake_uri}/models/b/{result.run_id}/model.json"
        assert champions == {"b": None, "c": first, "a": first}

        client = mlflow.client()
        runs = client.search_runs([client.get_experiment_by_name("fraud_model").experiment_id])
        parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        assert len(runs) == 4
        assert len(parents) == 1
        nested = {run.data.params["cutoff"]: run for run in runs if run is not parents[0]}
        assert set(nested) == {"a", "b", "c"}
        for cutoff, run in nested.items():
            assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
            assert run.data.tags["dagster.run_id"] == result.run_id
            assert run.info.status == "FINISHED"
            assert metadata[cutoff]["mlflow_run_id"] == run.info.run_id
        assert parents[0].info.status == "FINISHED"

        later = run_assets(platform, instance, MODEL, keys=("a", "a"))
        assert later.success
        (request,) = requests_of(lake, later.run_id, "train_model")
        assert request["champion"] == {
            "version": request["champion"]["version"],
            "model_uri": first,
            "features": list(build_features.MODEL_INPUTS),
        }
        assert str(request["champion"]["version"]) == "1"
        trained = recorded(instance, MODEL, later.run_id)["a"]
        assert (trained["model_version"], trained["is_champion"], trained["champion_version"]) == (4, False, 1)

    def test_too_little_data_is_an_outcome(
        self, lake: LakeResource, instance: dg.DagsterInstance, ready: list[str], mlflow: MlflowResource
    ):
        engine = FakeEngine(too_little={ready[0]: "The test window has 4 frauds, fewer than 10."})
        result = run_assets(definitions(lake, engine, mlflow), instance, MODEL, keys=(ready[0], ready[0]))
        assert result.success
        metadata = recorded(instance, MODEL)[ready[0]]
        assert metadata["outcome"] == "too_little_data"
        assert metadata["reason"] == "The test window has 4 frauds, fewer than 10."
        assert "model_version" not in metadata
        assert mlflow.champion() is None
        run = mlflow.client().get_run(metadata["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert (run.data.tags["outcome"], run.data.tags["reason"]) == (
            "too_little_data",
            metadata["reason"],
        )
        evaluations = {item.check_name: item for item in result.get_asset_check_evaluations()}
        assert not evaluations["enough_data"].passed
        assert metadata["reason"] in (evaluations["enough_data"].description or "")

    def test_missing_features_are_named(
        self, lake: LakeResource, instance: dg.DagsterInstance, ready: list[str], mlflow: MlflowResource
    ):
        shutil.rmtree(local_path(lake.store.spark_uri(lake.partition_path(FEATURES_TABLE, ready[1]))))
        result = run_assets(definitions(lake, mlflow=mlflow), instance, MODEL, keys=(ready[0], ready[3]))
        message = failure_of(result, MODEL)
        assert f"features are missing or stale for {ready[1]}; materialize transaction_features first" in message
        assert requests_of(lake, result.run_id, "train_model") == []

    def test_stale_features_are_named(
        self, lake: LakeResource, instance: dg.DagsterInstance, ready: list[str], mlflow: MlflowResource
    ):
        changed = cleaned_report(ready[2], raw_spec(2), raw={"fingerprint": "other", "size": 1, "uri": ""})
        put_report(lake, CLEANED_TABLE, ready[2], changed)
        result = run_assets(definitions(lake, mlflow=mlflow), instance, MODEL, keys=(ready[1], ready[3]))
        message = failure_of(result, MODEL)
        assert "features are missing or stale for " in message
        assert all((key in message) == (key in ready[2:]) for key in ready)

    @pytest.fixture
    def replaced(self, lake: LakeResource, ready: list[str]) -> Callable[..., list[str]]:
        """Replace the second file, clean it, and build the features again that have it as history."""

        def replaced(**spec: int) -> list[str]:
            changed = cleaned_report(ready[1], raw_spec(1, **spec), raw={"fingerprint": "o", "size": 1, "uri": ""})
            put_report(lake, CLEANED_TABLE, ready[1], changed)
            inputs = expected_inputs(lake.reports(CleanedReport))
            for number, key in enumerate(ready[2:], start=2):
                report = features_report(cleaned_report(key, raw_spec(number)), inputs[key])
                put_report(lake, FEATURES_TABLE, key, report)
            return ready

        return replaced

    def test_stale_features_before_the_range_are_not_trained_on_unseen(
        self,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        replaced: Callable[..., list[str]],
        mlflow: MlflowResource,
    ):
        """The training window reaches back beyond the run's own partitions."""
        keys = replaced()
        result = run_assets(definitions(lake, mlflow=mlflow), instance, MODEL, keys=(keys[3], keys[3]))
        assert f"features are missing or stale for {keys[1]};" in failure_of(result, MODEL)

    def test_a_replaced_file_that_its_checks_would_stop_is_left_out(
        self,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        replaced: Callable[..., list[str]],
        mlflow: MlflowResource,
    ):
        keys = replaced(frauds=15_000)
        result = run_assets(definitions(lake, mlflow=mlflow), instance, MODEL, keys=(keys[3], keys[3]))
        assert result.success
        metadata = recorded(instance, MODEL)[keys[3]]
        assert metadata["left_out"] == [keys[1]]
        assert list(metadata["trained_on"]) == keys[2:4]
        result = run_assets(definitions(lake, mlflow=mlflow), instance, MODEL, keys=(keys[1], keys[3]))
        assert f"features are missing or stale for {keys[1]};" in failure_of(result, MODEL)

    def test_nothing_but_empty_files(self, lake: LakeResource, instance: dg.DagsterInstance, mlflow: MlflowResource):
        for key in ("a", "b"):
            put_raw(lake, key, None)
        instance.add_dynamic_partitions("raw_files", ["a", "b"])
        result = run_assets(
            definitions(lake, mlflow=mlflow), instance, CLEANED_KEY, FEATURES_KEY, MODEL, keys=("a", "b")
        )
        assert result.success
        assert {(value["outcome"], value["reason"]) for value in recorded(instance, MODEL).values()} == {
            ("no model", "no partition of this run has any rows")
        }
        assert requests_of(lake, result.run_id, "train_model") == []

    def trained(
        self, lake: LakeResource, instance: dg.DagsterInstance, mlflow: MlflowResource, key: str, **engine: Any
    ) -> dict[str, Any]:
        """Train at `key` with an engine of these skills; the partition's metadata."""
        promotion = engine.pop("promotion", {})
        platform = definitions(lake, FakeEngine(**engine), mlflow)
        result = run_assets(platform, instance, MODEL, keys=(key, key), config={MODEL: {"promotion": promotion}})
        assert result.success
        return recorded(instance, MODEL)[key]

    def test_a_better_challenger_is_promoted_with_its_reasons(
        self, lake: LakeResource, instance: dg.DagsterInstance, ready: list[str], mlflow: MlflowResource
    ):
        assert self.trained(lake, instance, mlflow, ready[1])["promotion"] == "first_model"
        metadata = self.trained(lake, instance, mlflow, ready[2], challenger_skill=3.0, champion_skill=0.5)
        assert (metadata["promotion"], metadata["is_champion"], metadata["champion_version"]) == ("better", True, 2)
        champion = mlflow.champion()
        assert champion is not None
        assert champion.version == 2
        assert champion.tags["champion_before"] == "1"
        assert champion.tags["champion_why"] in metadata["promotion_reasons"]
        run = mlflow.client().get_run(champion.run_id)
        assert run.data.tags["promotion"] == "better"
        assert run.data.metrics["promotion.average_precision_difference_lower"] > 0

    @pytest.mark.parametrize(
        ("tag", "value", "asked"),
        [
            ("features", "[1]", False),
            ("features", "tx_amount", False),
            ("features", None, False),
            ("model_uri", None, False),
            ("learner", None, True),
            ("model_uri", "file:///a/directory", False),
            ("train_last_date", "yesterday", True),
        ],
    )
    def test_an_edited_tag_of_the_champion_stops_no_training(
        self,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        ready: list[str],
        mlflow: MlflowResource,
        tag: str,
        value: str | None,
        asked: bool,
    ):
        self.trained(lake, instance, mlflow, ready[1])
        client = mlflow.client()
        client.delete_model_version_tag("fraud_model", "1", tag)
        if value is not None:
            client.set_model_version_tag("fraud_model", "1", tag, value)
        metadata = self.trained(lake, instance, mlflow, ready[2], champion_skill=0.5)
        assert (metadata["promotion"], metadata["is_champion"]) == ("better" if asked else "champion_unreadable", True)

    @pytest.mark.parametrize(
        ("engine", "outcome"),
        [
            ({"challenger_skill": 0.5, "champion_skill": 3.0}, "not_better"),
            ({"challenger_skill": 2.0, "champion_skill": 2.0}, "not_better"),
            ({"challenger_skill": 2.0, "champion_skill": None}, "no_difference"),
            ({"challenger_skill": 3.0, "champion_skill": 0.5, "promotion": {"mode": "dry_run"}}, "better"),
            ({"challenger_skill": 3.0, "champion_skill": 0.5, "promotion": {"min_frauds": 61}}, "too_few_frauds"),
            ({"challenger_skill": 3.0, "champion_skill": 0.5, "promotion": {"margin": 0.9}}, "not_better"),
            ({"challenger_skill": 3.0, "champion_error": "written by xgboost 9.0"}, "champion_newer_library"),
        ],
    )
    def test_the_champion_stays(
        self,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        ready: list[str],
        mlflow: MlflowResource,
        engine: dict[str, Any],
        outcome: str,
    ):
        self.trained(lake, instance, mlflow, ready[1])
        metadata = self.trained(lake, instance, mlflow, ready[2], **engine)
        assert (metadata["promotion"], metadata["is_champion"], metadata["champion_version"]) == (outcome, False, 1)
        champion = mlflow.champion()
        assert champion is not None
        assert champion.version == 1
        # Compared with a challenger or not, that is what its age counts from.
        assert ("champion_compared" in champion.tags) == (outcome in DECIDED_BY_FIGURES)
        # The challenger could be made the champion by hand.
        challenger = mlflow.client().get_model_version("fraud_model", "2")
        proof = "100 rows scored again, largest difference 0.0"
        assert (challenger.tags["reload_proof"], champion.tags["reload_proof"]) == (proof, proof)
        assert mlflow.client().get_model_version_by_alias("fraud_model", "challenger").version == 2

    @pytest.mark.parametrize("challenger", [False, True])
    def test_a_model_that_does_not_reload_to_the_same_scores_fails_the_run(
        self,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        ready: list[str],
        mlflow: MlflowResource,
        challenger: bool,
    ):
        if challenger:
            self.trained(lake, instance, mlflow, ready[1])
        engine = FakeEngine(reload_difference=0.01, challenger_skill=0.5, champion_skill=3.0)
        result = run_assets(definitions(lake, engine, mlflow), instance, MODEL, keys=(ready[2], ready[2]))
        assert "reloaded from MLflow" in failure_of(result, MODEL)
        champion = mlflow.champion()
        assert (champion and champion.version) == (1 if challenger else None)
        last = mlflow.client().get_model_version("fraud_model", "2" if challenger else "1")
        assert "reload_proof" not in last.tags

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
    def test_a_champion_that_no_challenger_was_compared_with_for_long(
        self,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        ready: list[str],
        mlflow: MlflowResource,
        monkeypatch: pytest.MonkeyPatch,
        tags: dict[str, str],
        days: int,
    ):
        """Also where there was no challenger at all. Its version was registered 200 days ago."""
        self.trained(lake, instance, mlflow, ready[1])
        now = datetime.now(timezone.utc)
        client = mlflow.client()
        client.delete_model_version_tag("fraud_model", "1", "champion_since")
        for name, value in tags.items():
            instant = now - timedelta(days=int(value)) if value.isdigit() else None
            tag = instant.strftime("%Y-%m-%dT%H:%M:%SZ") if instant else value
            client.set_model_version_tag("fraud_model", "1", name, tag)
        champion = mlflow.champion()
        assert champion is not None
        champion._creation_time = int((now - timedelta(days=200)).timestamp() * 1000)
        monkeypatch.setattr(MlflowResource, "champion", lambda self: champion)
        engine = FakeEngine(too_little={ready[2]: "The test window has 4 frauds, fewer than 10."})
        result = run_assets(definitions(lake, engine, mlflow), instance, MODEL, keys=(ready[2], ready[2]))
        health = {item.check_name: item for item in result.get_asset_check_evaluations()}["champion_health"]
        assert health.passed == (days <= 120)
        if not health.passed:
            assert f"version 1, for {days} days; this time: too_little_data" in (health.description or "")

    def test_an_error_fails_the_mlflow_run(
        self, lake: LakeResource, instance: dg.DagsterInstance, ready: list[str], mlflow: MlflowResource
    ):
        import mlflow as module

        engine = FakeEngine(breaks_down="train_model")
        result = run_assets(definitions(lake, engine, mlflow), instance, MODEL, keys=(ready[0], ready[0]))
        assert "train_model broke down" in failure_of(result, MODEL)
        client = mlflow.client()
        (run,) = client.search_runs([client.get_experiment_by_name("fraud_model").experiment_id])
        assert run.info.status == "FAILED"
        assert module.active_run() is None
        assert mlflow.champion() is None

    @pytest.mark.parametrize(
        "config",
        [
            *({"test_days": 0}, {"min_frauds": 0}, {"alerts_per_day": 0}, {"delay_days": -1}),
            {"promotion": {"confidence": 0.999}},
        ],
    )
    def test_what_is_impossible_is_refused(self, config: dict[str, Any]):
        with pytest.raises(ValueError, match=next(iter(config))):
            FraudModelConfig(**config)


def test_addresses_of_mlflow_runs():
    class Run:
        class info:
            experiment_id, run_id = "7", "abc"

    def url(tracking_uri: str, ui_url: str | None = None) -> str | None:
        return MlflowResource(tracking_uri=tracking_uri, ui_url=ui_url).run_url(Run)

    assert url("http://host:5000/") == "http://host:5000/#/experiments/7/runs/abc?workflowType=machine_learning"
    assert url("sqlite:////tmp/mlflow.db") is None
    # A browser may know the server by another name than its clients do.
    for tracking_uri in ("http://mlflow:5000", "sqlite:////tmp/mlflow.db"):
        shown = url(tracking_uri, "http://127.0.0.1:5001")
        assert shown == "http://127.0.0.1:5001/#/experiments/7/runs/abc?workflowType=machine_learning"
