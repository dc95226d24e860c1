"""The assets with a fake engine, through Dagster's own machinery: what is sent to Spark, recorded and refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import pandas as pd
import pytest
import yaml
from dagster._core.definitions.observe import observe
from sklearn.metrics import average_precision_score

from ml_platform.assets.features import (
    chronological_keys,
    expected_inputs,
    history_of,
    stale_features,
)
from ml_platform.assets.model import FraudModelConfig, training_partitions
from ml_platform.assets.raw import raw_transactions
from ml_platform.lake.quality import Verdicts
from ml_platform.lake.reports import CLEANED_TABLE, FEATURES_TABLE, REJECTED_TABLE, CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.withdrawal import allow_again, withdraw_file
from ml_platform.model import training
from ml_platform.model.mlflow import MlflowResource
from ml_platform.model.promotion import DECIDED_BY_FIGURES
from ml_platform.operations.changes import CHAMPION_ASSET
from ml_platform.planning import plan_runs
from ml_platform.version import PLATFORM_VERSION
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
    times_between,
)
from spark_jobs import build_features
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION

CLEANED_KEY, FEATURES_KEY, MODEL = "cleaned_transactions", "transaction_features", "fraud_model"
CANDIDATE = {"learner": "logistic_regression", "grid": {"C": [0.5], "max_iter": [10, 20]}}
NONE_STOPPED = Verdicts({})


class Bench:
    """A lake and Dagster's storage, and the assets over them with a fake engine."""

    def __init__(self, lake: LakeResource, instance: dg.DagsterInstance) -> None:
        self.lake, self.instance = lake, instance
        self.mlflow = MlflowResource(tracking_uri="sqlite:////nowhere/mlflow.db")

    def run(
        self, *assets: str, engine: FakeEngine | None = None, lake: LakeResource | None = None, **options: Any
    ) -> dg.ExecuteInProcessResult:
        """Run assets; `options` are those of `run_assets`."""
        return run_assets(definitions(lake or self.lake, engine, self.mlflow), self.instance, *assets, **options)

    def requests(self, result: dg.ExecuteInProcessResult, job: str) -> list[dict[str, Any]]:
        return requests_of(self.lake, result.run_id, job)

    def sent(self, result: dg.ExecuteInProcessResult, job: str) -> list[str]:
        return partitions_sent(self.lake, result.run_id, job)

    def recorded(self, asset: str, run_id: str | None = None) -> dict[str, dict[str, Any]]:
        return recorded(self.instance, asset, run_id)

    def put(self, files: dict[str, int | None]) -> None:
        """Put and register raw files: that of the n-th 30 days, or an empty one."""
        for key, number in files.items():
            put_raw(self.lake, key, None if number is None else raw_spec(number))
        self.instance.add_dynamic_partitions("raw_files", list(files))

    def put_features(self, *keys: str) -> None:
        """Mark features of cleaned files as built, as the files are now."""
        cleaned = self.lake.reports(CleanedReport)
        inputs = expected_inputs(cleaned, NONE_STOPPED)
        for key in keys:
            report = features_report(cleaned[key].model_dump(), inputs[key])
            put_report(self.lake, FEATURES_TABLE, key, report)
            self.instance.report_runless_asset_event(dg.AssetMaterialization(FEATURES_KEY, partition=key))

    def modified(self, kind: type[Any]) -> dict[str, int]:
        """When each report of this kind was written."""
        return {
            key: (self.partition(kind.table, key) / REPORT_NAME).stat().st_mtime_ns for key in self.lake.reports(kind)
        }

    def partition(self, table: str, key: str) -> Path:
        return local_path(self.lake.store.spark_uri(self.lake.partition_path(table, key)))


@pytest.fixture
def bench(lake: LakeResource, instance: dg.DagsterInstance) -> Bench:
    return Bench(lake, instance)


@pytest.fixture
def keys(bench: Bench) -> list[str]:
    """Four raw files of 30 days each, registered in order of time."""
    files: dict[str, int | None] = {f"file-{number}": number for number in range(4)}
    bench.put(files)
    return list(files)


@pytest.fixture
def built(bench: Bench, keys: list[str]) -> list[str]:
    """The same files with cleaned data and features."""
    put_cleaned(bench.lake, *keys)
    bench.put_features(*keys)
    return keys


def failure_of(result: dg.ExecuteInProcessResult, asset: str) -> str:
    """Message of the error that ended an asset's step."""
    (event,) = (event for event in result.get_step_failure_events() if event.step_key == asset)
    error = event.step_failure_data.error
    assert error is not None
    # Dagster wraps what an asset raises, except for its own Failure.
    return (error.cause or error).message


class TestCleaned:
    def test_one_job_for_all_partitions_of_the_run(self, bench: Bench, keys: list[str]):
        result = bench.run(CLEANED_KEY, keys=(keys[0], keys[2]))
        assert result.success
        (request,) = bench.requests(result, "clean_transactions")
        files, _ = bench.lake.list_raw_files()
        assert request == {
            "run_id": result.run_id,
            "platform_version": PLATFORM_VERSION,
            "epoch": "2020-01-01",
            "out_of_range": None,
            "neighbours": {},
            "partitions": [
                {
                    "partition": key,
                    "raw": files[key].as_request(),
                    "output_uri": f"file://{bench.lake.lake_uri}/{CLEANED_TABLE}/raw_file={key}",
                    "rejected_uri": f"file://{bench.lake.lake_uri}/{REJECTED_TABLE}/raw_file={key}",
                    "accepted": False,
                }
                for key in keys[:3]
            ],
        }
        assert sorted(bench.recorded(CLEANED_KEY)) == keys[:3]
        assert set(bench.lake.reports(CleanedReport)) == set(keys[:3])

    def test_metadata_of_a_cleaned_and_of_an_empty_file(self, bench: Bench, keys: list[str]):
        counts = {"raw_rows": 20_006, "rejected_rows": 5, "duplicate_rows": 1}
        put_raw(bench.lake, keys[0], raw_spec(0, counts=counts))
        put_raw(bench.lake, keys[1], None)
        result = bench.run(CLEANED_KEY, keys=(keys[0], keys[1]))
        assert result.success
        full, empty = (bench.recorded(CLEANED_KEY)[key] for key in keys[:2])
        raw = bench.lake.list_raw_files()[0][keys[0]]
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
            "path": f"{bench.lake.lake_uri}/{CLEANED_TABLE}/raw_file={keys[0]}",
            "rejected_path": f"{bench.lake.lake_uri}/{REJECTED_TABLE}/raw_file={keys[0]}",
            "first_transaction": "2020-01-01T00:00:00Z",
            "last_transaction": "2020-01-30T23:59:59Z",
        }.items() <= full.items()
        assert {"outcome": "empty file", "dagster/row_count": 0}.items() <= empty.items()
        assert not {"rejected_path", "first_transaction"} & set(empty)

    def test_only_new_and_changed_files_are_sent(self, bench: Bench, keys: list[str]):
        put_cleaned(bench.lake, *keys[:3])
        before = bench.modified(CleanedReport)
        put_raw(bench.lake, keys[1], raw_spec(1, rows=17))
        result = bench.run(CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert bench.sent(result, "clean_transactions") == [keys[1], keys[3]]
        after = bench.modified(CleanedReport)
        assert (after[keys[0]], after[keys[2]]) == (before[keys[0]], before[keys[2]])
        assert bench.recorded(CLEANED_KEY)[keys[1]]["dagster/row_count"] == 17

    def test_another_epoch_cleans_every_file_again(self, bench: Bench, keys: list[str]):
        put_cleaned(bench.lake, *keys)
        other = LakeResource(raw_uri=bench.lake.raw_uri, lake_uri=bench.lake.lake_uri, epoch="2019-08-22")
        result = bench.run(CLEANED_KEY, keys=(keys[0], keys[-1]), lake=other)
        assert bench.sent(result, "clean_transactions") == keys

    def test_a_file_that_fails_is_named_and_the_others_are_done(self, bench: Bench, keys: list[str]):
        put_cleaned(bench.lake, keys[0])
        put_raw(bench.lake, keys[1], {"error": "not a text file"})
        (bench.lake.raw._root / f"{keys[2]}.txt").unlink()  # type: ignore[attr-defined]
        result = bench.run(CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert not result.success
        done = bench.recorded(CLEANED_KEY)
        outcomes = {key: value["outcome"] for key, value in done.items()}
        assert outcomes == {keys[0]: "already clean", keys[3]: "cleaned"}
        assert bench.instance.get_materialized_partitions(dg.AssetKey(CLEANED_KEY)) == set(outcomes)
        message = failure_of(result, "intake_checks")
        assert "2 of 4 files are left out; everything else is done. " in message
        assert f"{keys[1]}: RuntimeError: not a text file" in message
        assert f"{keys[2]}: file not found in {bench.lake.raw_uri}" in message
        # These files cannot be accepted.
        assert "Correct or restore the files; a changed file is cleaned by a later run." in message
        assert "accept" not in message

    def test_an_engine_that_breaks_down_fails_the_step(self, bench: Bench, keys: list[str]):
        engine = FakeEngine(breaks_down="clean_transactions")
        result = bench.run(CLEANED_KEY, keys=(keys[0], keys[-1]), engine=engine)
        assert "clean_transactions broke down" in failure_of(result, CLEANED_KEY)
        assert bench.recorded(CLEANED_KEY) == {}

    def test_features_are_built_without_files_that_are_left_out(self, bench: Bench, keys: list[str]):
        put_raw(bench.lake, keys[1], {"error": "not a text file"})
        put_raw(bench.lake, keys[2], raw_spec(2, counts={"raw_rows": 1}))  # a check fails
        result = bench.run(CLEANED_KEY, FEATURES_KEY, keys=(keys[0], keys[-1]))
        assert not result.success
        assert bench.sent(result, "build_features") == [keys[0], keys[3]]
        assert set(bench.recorded(FEATURES_KEY)) == {keys[0], keys[3]}

    def test_a_run_of_files_that_cannot_be_cleaned_ends_with_the_first_step(self, bench: Bench, keys: list[str]):
        put_raw(bench.lake, keys[1], {"error": "not a text file"})
        result = bench.run(CLEANED_KEY, FEATURES_KEY, MODEL, keys=(keys[1], keys[1]))
        assert f"{keys[1]}: RuntimeError: not a text file" in failure_of(result, CLEANED_KEY)
        assert bench.recorded(CLEANED_KEY) == {}

    def test_a_range_without_partitions_is_an_error(self, bench: Bench, keys: list[str]):
        result = bench.run(CLEANED_KEY, keys=(keys[2], keys[1]))
        assert "empty or backwards" in failure_of(result, CLEANED_KEY)


class TestUpToDate:
    def test_complete_partitions_are_not_sent_again(self, bench: Bench, built: list[str]):
        before = [bench.modified(kind) for kind in (CleanedReport, FeaturesReport)]
        result = bench.run(CLEANED_KEY, FEATURES_KEY, keys=(built[0], built[-1]))
        assert result.success
        assert [bench.requests(result, job) for job in ("clean_transactions", "build_features")] == [[], []]
        assert [bench.modified(kind) for kind in (CleanedReport, FeaturesReport)] == before
        for asset, outcome in ((CLEANED_KEY, "already clean"), (FEATURES_KEY, "already up to date")):
            assert [value["outcome"] for value in bench.recorded(asset, result.run_id).values()] == [outcome] * 4

    @pytest.mark.parametrize(("asset", "job"), [(CLEANED_KEY, "clean_transactions"), (FEATURES_KEY, "build_features")])
    def test_a_rebuild_sends_complete_partitions_again(self, bench: Bench, built: list[str], asset: str, job: str):
        result = bench.run(asset, keys=(built[1], built[2]), config={asset: {"rebuild": True}})
        assert bench.sent(result, job) == built[1:3]


def test_raw_transactions_are_observed(bench: Bench, keys: list[str]):
    put_raw(bench.lake, "not-registered", raw_spec(9))
    bench.lake.raw.write("two words.txt", b"x")
    assert observe([raw_transactions], instance=bench.instance, resources={"lake": bench.lake}).success
    files, _ = bench.lake.list_raw_files()
    found = {
        observation.partition: (observation.tags["dagster/data_version"], observation.metadata["size_bytes"].value)
        for record in bench.instance.fetch_observations(dg.AssetKey("raw_transactions"), limit=100).records
        if (observation := record.asset_observation)
    }
    assert found == {key: (files[key].fingerprint, files[key].size) for key in keys}


class TestTime:
    """Order, history and training windows follow the times of transactions, not the names of files."""

    @staticmethod
    def cleaned(**numbers: int | None) -> dict[str, CleanedReport]:
        return cleaned_reports(
            *(cleaned_report(key, None if number is None else raw_spec(number)) for key, number in numbers.items())
        )

    @staticmethod
    def between(key: str, first: str, last: str) -> dict[str, CleanedReport]:
        return cleaned_reports({**cleaned_report(key, raw_spec(0)), "tx_datetime": times_between(first, last)})

    @staticmethod
    def features(cleaned: dict[str, CleanedReport]) -> dict[str, FeaturesReport]:
        inputs = expected_inputs(cleaned, NONE_STOPPED)
        return {
            key: FeaturesReport.model_validate(features_report(cleaned_report(key, raw_spec(0)), inputs[key]))
            for key in cleaned
        }

    def test_files_are_ordered_by_their_first_transactions(self):
        assert chronological_keys(self.cleaned(a=3, b=1, empty=None, c=2, d=0)) == ["d", "b", "c", "a"]

    def test_history_is_the_files_that_reach_into_the_window(self):
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

    def test_inputs_change_with_what_the_features_depend_on(self):
        cleaned = self.cleaned(a=0, b=1)
        inputs = expected_inputs(cleaned, NONE_STOPPED)
        assert list(inputs["b"].history) == ["a"]
        assert inputs["a"].history == {}
        for name, value in (("schema_version", 99), ("epoch", "2018-04-01"), ("raw", "2")):
            changed = expected_inputs(self.changed(cleaned, "a", name, value), NONE_STOPPED)
            assert changed["a"] != inputs["a"]
            assert changed["b"] != inputs["b"]
        assert expected_inputs(self.cleaned(a=0, b=1, far=9), NONE_STOPPED)["b"] == inputs["b"]

    def test_features_of_changed_inputs_are_stale(self):
        cleaned = self.cleaned(a=0, b=1, c=2)
        inputs, features = expected_inputs(cleaned, NONE_STOPPED), self.features(cleaned)
        assert stale_features(features, inputs) == []
        other = features["b"].model_copy(update={"features": ["tx_amount"]})
        assert stale_features({**features, "b": other}, inputs) == ["b"]
        late = expected_inputs(cleaned | self.cleaned(late=1), NONE_STOPPED)
        assert stale_features(features, late) == ["c"]
        assert stale_features({**features, "gone": features["a"]}, inputs) == []

    def test_training_partitions_cover_the_window(self):
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
    def test_one_job_builds_the_oldest_first(self, bench: Bench):
        """Names and registration are in another order than the transactions."""
        order: dict[str, int | None] = {"w": 3, "x": 1, "y": 2, "z": 0, "empty": None}
        bench.put(order)
        put_cleaned(bench.lake, *order)
        result = bench.run(FEATURES_KEY, keys=("w", "empty"))
        assert result.success
        (request,) = bench.requests(result, "build_features")
        assert [item["partition"] for item in request["partitions"]] == ["empty", "z", "x", "y", "w"]
        uri = f"file://{bench.lake.lake_uri}/{CLEANED_TABLE}/raw_file="
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
        files, _ = bench.lake.list_raw_files()
        assert items["w"] == {
            "partition": "w",
            "cleaned_uri": f"{uri}w",
            "tx_datetime_min": "2020-03-31T00:00:00Z",
            "history": [f"{uri}x", f"{uri}y"],
            "cleaned_bytes": sum(files[key].size for key in "wxy"),
            "inputs": expected_inputs(bench.lake.reports(CleanedReport), NONE_STOPPED)["w"].model_dump(),
            "output_uri": f"file://{bench.lake.lake_uri}/{FEATURES_TABLE}/raw_file=w",
        }
        metadata = bench.recorded(FEATURES_KEY)
        assert {
            "outcome": "built",
            "dagster/row_count": 20_000,
            "fraud_rows": 200,
            "history_partitions": ["x", "y"],
            "built_by_run": result.run_id,
        }.items() <= metadata["w"].items()
        assert metadata["empty"]["dagster/row_count"] == 0

    def test_features_with_an_edited_report_are_built_again(self, bench: Bench, built: list[str]):
        reports, edits = (
            bench.lake.reports(FeaturesReport),
            ({"counts": {}}, {"inputs": None}, {"features": "tx_amount"}),
        )
        for key, changes in zip(built[1:], edits, strict=True):
            put_report(bench.lake, FEATURES_TABLE, key, {**reports[key].model_dump(), **changes})
        result = bench.run(FEATURES_KEY, keys=(built[0], built[-1]))
        assert bench.sent(result, "build_features") == built[1:]

    def test_a_late_file_makes_later_features_beyond_the_range_stale(self, bench: Bench, built: list[str]):
        put_raw(bench.lake, "late", raw_spec(1, start="2020-02-05T00:00:00Z", days=1, first_id=90_000_000, rows=500))
        bench.instance.add_dynamic_partitions("raw_files", ["late"])
        before = bench.modified(FeaturesReport)
        result = bench.run(CLEANED_KEY, FEATURES_KEY, keys=("late", "late"))
        assert result.success
        assert bench.sent(result, "clean_transactions") == ["late"]
        # Later files within its 37 days; the earlier ones and its own month's file, which began before it, are not.
        assert bench.sent(result, "build_features") == ["late", built[2]]
        assert sorted(bench.recorded(FEATURES_KEY, result.run_id)) == sorted(["late", built[2]])
        after = bench.modified(FeaturesReport)
        assert {key for key in built if after[key] != before[key]} == {built[2]}

    def test_a_replaced_file_makes_its_own_and_later_features_stale(self, bench: Bench, built: list[str]):
        put_raw(bench.lake, built[0], raw_spec(0, rows=15_000))
        result = bench.run(CLEANED_KEY, FEATURES_KEY, keys=(built[0], built[0]))
        assert result.success
        assert bench.sent(result, "clean_transactions") == [built[0]]
        assert bench.sent(result, "build_features") == built[:3]

    def test_a_replaced_file_that_was_only_cleaned_gets_features_from_the_next_run(
        self, bench: Bench, built: list[str]
    ):
        put_raw(bench.lake, built[1], raw_spec(1, rows=15_000))
        assert bench.run(CLEANED_KEY, keys=(built[1], built[1])).success
        other = bench.run(FEATURES_KEY, keys=(built[3], built[3]))
        assert bench.sent(other, "build_features") == built[1:4]

    def test_a_replaced_file_that_its_checks_stopped_gets_features_from_no_other_run(
        self, bench: Bench, built: list[str]
    ):
        put_raw(bench.lake, built[1], raw_spec(1, frauds=15_000))
        bad = bench.run(CLEANED_KEY, FEATURES_KEY, keys=(built[1], built[1]))
        assert {item.check_name for item in bad.get_asset_check_evaluations() if not item.passed} == {"fraud_rate"}
        # The others' history uses the bad file's cleaned data, because it is complete.
        assert bench.sent(bad, "build_features") == built[2:4]
        for lost in (False, True):
            if lost:
                shutil.rmtree(bench.partition(FEATURES_TABLE, built[1]))
            before = bench.modified(FeaturesReport)
            other = bench.run(FEATURES_KEY, keys=(built[3], built[3]))
            assert other.success
            assert bench.requests(other, "build_features") == []
            assert bench.modified(FeaturesReport).get(built[1]) == before.get(built[1])
        put_raw(bench.lake, built[1], raw_spec(1, rows=15_000))
        mended = bench.run(CLEANED_KEY, FEATURES_KEY, keys=(built[1], built[1]))
        assert mended.success
        assert bench.sent(mended, "build_features") == built[1:4]

    def test_a_failure_beyond_the_range_is_named_and_healed_by_the_next_run(self, bench: Bench, built: list[str]):
        put_raw(bench.lake, built[0], raw_spec(0, rows=15_000))
        engine = FakeEngine(no_features={built[1]: "disk full"})
        result = bench.run(CLEANED_KEY, FEATURES_KEY, keys=(built[0], built[0]), engine=engine)
        assert f"{built[1]}: RuntimeError: disk full" in failure_of(result, FEATURES_KEY)
        assert sorted(bench.recorded(FEATURES_KEY, result.run_id)) == [built[0], built[2]]
        healed = bench.run(CLEANED_KEY, FEATURES_KEY, keys=(built[0], built[0]))
        assert healed.success
        assert bench.sent(healed, "build_features") == [built[1]]

    def test_only_the_runs_partitions_are_built(self, bench: Bench, keys: list[str]):
        put_cleaned(bench.lake, *keys)
        result = bench.run(FEATURES_KEY, keys=(keys[1], keys[1]))
        assert bench.sent(result, "build_features") == [keys[1]]

    def test_partitions_without_cleaned_data_are_named(self, bench: Bench, keys: list[str]):
        put_cleaned(bench.lake, keys[0], keys[2])
        result = bench.run(FEATURES_KEY, keys=(keys[0], keys[-1]))
        message = failure_of(result, FEATURES_KEY)
        for key in (keys[1], keys[3]):
            assert f"{key}: no cleaned data; materialize cleaned_transactions first" in message
        assert bench.instance.get_materialized_partitions(dg.AssetKey(FEATURES_KEY)) == {keys[0], keys[2]}

    def test_a_failed_partition_is_built_by_the_next_run(self, bench: Bench, keys: list[str]):
        put_cleaned(bench.lake, *keys)
        engine = FakeEngine(no_features={keys[1]: "disk full"})
        result = bench.run(FEATURES_KEY, keys=(keys[0], keys[-1]), engine=engine)
        assert f"{keys[1]}: RuntimeError: disk full" in failure_of(result, FEATURES_KEY)
        assert bench.instance.get_materialized_partitions(dg.AssetKey(FEATURES_KEY)) == {keys[0], *keys[2:]}
        healed = bench.run(FEATURES_KEY, keys=(keys[0], keys[-1]))
        assert bench.sent(healed, "build_features") == [keys[1]]


@pytest.mark.usefixtures("no_pictures")
class TestModel:
    @pytest.fixture
    def bench(self, bench: Bench, mlflow: MlflowResource) -> Bench:
        bench.mlflow = mlflow
        return bench

    @pytest.fixture
    def champion(self, bench: Bench, first_run: Path, tmp_path: Path) -> None:
        """Version 1 is the champion."""
        shutil.copy(first_run / "mlflow.db", tmp_path / "ml flow")

    def test_one_model_per_run(self, bench: Bench, built: list[str]):
        result = bench.run(
            MODEL,
            keys=(built[0], built[2]),
            config={MODEL: {"candidates": [CANDIDATE], "seed": 7}},
        )
        assert result.success
        (request,) = bench.requests(result, "train_model")
        uri = f"file://{bench.lake.lake_uri}"
        output = f"{uri}/models/{built[2]}/{result.run_id}"
        assert request == {
            "run_id": result.run_id,
            "platform_version": PLATFORM_VERSION,
            "cutoff": built[2],
            "cutoff_uri": f"{uri}/{FEATURES_TABLE}/raw_file={built[2]}",
            "cutoff_last_date": "2020-03-30",
            "feature_uris": [f"{uri}/{FEATURES_TABLE}/raw_file={key}" for key in built[:3]],
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
        metadata = bench.recorded(MODEL)
        assert sorted(metadata) == built[:3]
        trained = metadata[built[2]]
        assert {
            "outcome": "trained",
            "cutoff": built[2],
            "model_version": 1,
            "is_champion": True,
            "champion_version": 1,
            "best_parameters": {"C": 0.5, "max_iter": 20},
            "test_average_precision": round(average_precision, 4),
            "test_rows": 500,
            "path": str(local_path(output)),
        }.items() <= trained.items()
        files, _ = bench.lake.list_raw_files()
        data_set = {
            key: {
                "fingerprint": files[key].fingerprint,
                "rows": 20_000,
                "uri": f"{uri}/{FEATURES_TABLE}/raw_file={key}",
            }
            for key in built[:3]
        }
        assert trained["trained_on"] == data_set
        assert "mlflow_run" not in trained  # a file has no address to open
        for key in built[:2]:
            assert {
                **trained,
                "outcome": f"the model of this run is that of partition {built[2]}",
            } == metadata[key]

        client = bench.mlflow.client()
        (run,) = client.search_runs([client.get_experiment_by_name("fraud_model").experiment_id])
        assert run.info.run_id == trained["mlflow_run_id"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["dagster.run_id"] == result.run_id
        assert run.data.tags["platform_version"] == PLATFORM_VERSION
        assert run.data.tags["partitions"] == ",".join(built[:3])
        assert run.data.tags["outcome"] == "trained"
        assert {
            "cutoff": built[2],
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

        champion = bench.mlflow.champion()
        assert champion is not None
        assert (str(champion.version), champion.run_id) == ("1", run.info.run_id)
        assert champion.tags["platform_version"] == PLATFORM_VERSION
        assert champion.tags["model_uri"] == f"{output}/model.json"
        assert json.loads(champion.tags["features"]) == list(build_features.MODEL_INPUTS)

        artifacts = Path(client.download_artifacts(run.info.run_id, ""))
        assert json.loads((artifacts / "data_set.json").read_text()) == {
            "cutoff": built[2],
            "partitions": data_set,
        }
        assert json.loads((artifacts / "report.json").read_text())["outcome"] == "trained"
        assert (artifacts / "model/data/model.json").read_bytes() == bench.lake.store.read(
            f"models/{built[2]}/{result.run_id}/model.json"
        )
        version = client.get_model_version("fraud_model", "1")
        for part in (
            f"{built[0]} to {built[2]}",
            "60,000 transactions",
            f"average precision | {average_precision:.3f}",
            "first_model",
        ):
            assert part in version.description
        inputs = client.get_run(run.info.run_id).inputs.dataset_inputs
        assert {item.dataset.name: {tag.key: tag.value for tag in item.tags} for item in inputs} == {
            key: {"mlflow.data.context": "training", "fingerprint": files[key].fingerprint, "rows": "20000"}
            for key in built[:3]
        }
        for item in inputs:
            assert json.loads(item.dataset.source)["uri"] == data_set[item.dataset.name]["uri"]
            fingerprint = data_set[item.dataset.name]["fingerprint"]
            assert item.dataset.digest == hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
        assert (artifacts / "figures" / "overview.png").read_bytes() == b"a picture"
        report = bench.lake.read_json(f"models/{built[2]}/{result.run_id}/{REPORT_NAME}")
        assert (report["outcome"], report["schema_version"]) == ("trained", SCHEMA_VERSION)
        assert report["metrics"]["test_average_precision"] == average_precision
        assert len(report["tables"]["per_day"]) == 7
        assert json.loads((artifacts / "promotion.json").read_text())["outcome"] == "first_model"
        checks = {item.check_name: item for item in result.get_asset_check_evaluations() if item.partition is None}
        passed = {name: check.passed for name, check in checks.items()}
        assert passed == dict.fromkeys(["enough_data", "promotion", "champion_health"], True)

    def test_the_cut_off_is_the_last_in_time_not_by_name(self, bench: Bench):
        bench.put({"a": 2, "b": 0, "empty": None, "c": 1})
        result = bench.run(CLEANED_KEY, FEATURES_KEY, MODEL, keys=("a", "c"))
        assert result.success
        (request,) = bench.requests(result, "train_model")
        assert request["cutoff"] == "a"
        assert [uri.rpartition("=")[2] for uri in request["feature_uris"]] == ["b", "c", "a"]
        assert {key: value["outcome"] for key, value in bench.recorded(MODEL).items()} == {
            "a": "trained",
            **dict.fromkeys(["b", "c", "empty"], "the model of this run is that of partition a"),
        }

    def test_train_each_starts_with_the_oldest_which_later_models_challenge(self, bench: Bench):
        bench.put({"c": 1, "b": 0, "a": 2})
        config = {MODEL: {"train_each": True}}
        result = bench.run(CLEANED_KEY, FEATURES_KEY, MODEL, keys=("c", "a"), config=config)
        assert result.success
        metadata = bench.recorded(MODEL)
        assert {key: value["model_version"] for key, value in metadata.items()} == {"b": 1, "c": 2, "a": 3}
        assert [key for key, value in metadata.items() if value["is_champion"]] == ["b"]
        champions = {
            request["cutoff"]: request["champion"] and request["champion"]["model_uri"]
            for request in bench.requests(result, "train_model")
        }
        first = f"file://{bench.lake.lake_uri}/models/b/{result.run_id}/model.json"
        assert champions == {"b": None, "c": first, "a": first}

        client = bench.mlflow.client()
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

        later = bench.run(MODEL, keys=("a", "a"))
        assert later.success
        (request,) = bench.requests(later, "train_model")
        assert request["champion"] == {
            "version": request["champion"]["version"],
            "model_uri": first,
            "features": list(build_features.MODEL_INPUTS),
        }
        assert str(request["champion"]["version"]) == "1"
        trained = bench.recorded(MODEL, later.run_id)["a"]
        assert (trained["model_version"], trained["is_champion"], trained["champion_version"]) == (4, False, 1)

    def test_too_little_data_is_an_outcome(self, bench: Bench, built: list[str]):
        engine = FakeEngine(too_little={built[0]: "The test window has 4 frauds, fewer than 10."})
        result = bench.run(MODEL, keys=(built[0], built[0]), engine=engine)
        assert result.success
        metadata = bench.recorded(MODEL)[built[0]]
        assert metadata["outcome"] == "too_little_data"
        assert metadata["reason"] == "The test window has 4 frauds, fewer than 10."
        assert "model_version" not in metadata
        assert bench.mlflow.champion() is None
        run = bench.mlflow.client().get_run(metadata["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert (run.data.tags["outcome"], run.data.tags["reason"]) == ("too_little_data", metadata["reason"])
        evaluations = {item.check_name: item for item in result.get_asset_check_evaluations()}
        assert not evaluations["enough_data"].passed
        assert metadata["reason"] in (evaluations["enough_data"].description or "")

    def test_missing_features_are_named(self, bench: Bench, built: list[str]):
        shutil.rmtree(bench.partition(FEATURES_TABLE, built[1]))
        result = bench.run(MODEL, keys=(built[0], built[3]))
        message = failure_of(result, MODEL)
        assert f"features are missing or stale for {built[1]}; materialize transaction_features first" in message
        assert bench.requests(result, "train_model") == []

    def test_stale_features_are_named(self, bench: Bench, built: list[str]):
        changed = cleaned_report(built[2], raw_spec(2), raw={"fingerprint": "other", "size": 1, "uri": ""})
        put_report(bench.lake, CLEANED_TABLE, built[2], changed)
        result = bench.run(MODEL, keys=(built[1], built[3]))
        message = failure_of(result, MODEL)
        assert "features are missing or stale for " in message
        assert all((key in message) == (key in built[2:]) for key in built)

    @pytest.fixture
    def replaced(self, bench: Bench, built: list[str]) -> Callable[..., list[str]]:
        """Replace the second file, clean it, and rebuild the later features but not its own."""

        def replaced(**spec: int) -> list[str]:
            changed = cleaned_report(built[1], raw_spec(1, **spec), raw={"fingerprint": "o", "size": 1, "uri": ""})
            put_report(bench.lake, CLEANED_TABLE, built[1], changed)
            bench.put_features(*built[2:])
            return built

        return replaced

    def test_stale_features_before_the_range_are_named_too(self, bench: Bench, replaced: Callable[..., list[str]]):
        """The training window reaches back beyond the run's own partitions."""
        keys = replaced()
        result = bench.run(MODEL, keys=(keys[3], keys[3]))
        assert f"features are missing or stale for {keys[1]};" in failure_of(result, MODEL)

    def test_a_replaced_file_that_its_checks_would_stop_is_left_out(
        self, bench: Bench, replaced: Callable[..., list[str]]
    ):
        keys = replaced(frauds=15_000)
        result = bench.run(MODEL, keys=(keys[3], keys[3]))
        assert result.success
        metadata = bench.recorded(MODEL)[keys[3]]
        assert metadata["left_out"] == [keys[1]]
        assert list(metadata["trained_on"]) == keys[2:4]
        result = bench.run(MODEL, keys=(keys[1], keys[3]))
        assert f"the run includes files that no model can be trained for: {keys[1]}: fraud_rate: 75.000%" in failure_of(
            result, MODEL
        )

    def test_empty_files_alone_make_no_model(self, bench: Bench):
        bench.put({"a": None, "b": None})
        result = bench.run(CLEANED_KEY, FEATURES_KEY, MODEL, keys=("a", "b"))
        assert result.success
        assert {(value["outcome"], value["reason"]) for value in bench.recorded(MODEL).values()} == {
            ("no model", "no partition of this run has any rows")
        }
        assert bench.requests(result, "train_model") == []

    def trained(self, bench: Bench, key: str, **engine: Any) -> dict[str, Any]:
        """Train with the cut-off `key` on a fake engine with these fields; return the partition's metadata."""
        promotion = engine.pop("promotion", {})
        config = {MODEL: {"promotion": promotion}}
        result = bench.run(MODEL, keys=(key, key), engine=FakeEngine(**engine), config=config)
        assert result.success
        return bench.recorded(MODEL)[key]

    @pytest.mark.usefixtures("champion")
    def test_a_better_challenger_is_promoted_with_its_reasons(self, bench: Bench, built: list[str]):
        metadata = self.trained(bench, built[2], challenger_skill=3.0, champion_skill=0.5)
        assert (metadata["promotion"], metadata["is_champion"], metadata["champion_version"]) == ("better", True, 2)
        champion = bench.mlflow.champion()
        assert champion is not None
        assert champion.version == 2
        assert champion.tags["champion_before"] == "1"
        assert champion.tags["champion_why"] in metadata["promotion_reasons"]
        (move,) = bench.instance.fetch_observations(CHAMPION_ASSET, limit=1).records
        assert move.asset_observation is not None
        told = {name: value.value for name, value in move.asset_observation.metadata.items()}
        assert (told["champion_version"], told["champion_before"], told["by"]) == ("2", "1", "fraud_model")
        assert told["why"] == champion.tags["champion_why"]
        assert re.fullmatch(r"0\.\d{4} \(0\.\d{4} to [01]\.\d{4}\)", told["test_average_precision"])
        run = bench.mlflow.client().get_run(champion.run_id)
        assert run.data.tags["promotion"] == "better"
        assert run.data.metrics["promotion.average_precision_difference_lower"] > 0

    @pytest.mark.usefixtures("champion")
    @pytest.mark.parametrize(
        ("tag", "value", "asked"), [("features", "[1]", False), ("train_last_date", "yesterday", True)]
    )
    def test_training_survives_an_edited_tag_of_the_champion(
        self, bench: Bench, built: list[str], tag: str, value: str, asked: bool
    ):
        bench.mlflow.client().set_model_version_tag("fraud_model", "1", tag, value)
        metadata = self.trained(bench, built[2], champion_skill=0.5)
        assert (metadata["promotion"], metadata["is_champion"]) == ("better" if asked else "champion_unreadable", True)

    @pytest.mark.parametrize(
        ("engine", "outcome"),
        [
            ({"challenger_skill": 0.5, "champion_skill": 3.0}, "not_better"),
            ({"challenger_skill": 3.0, "champion_skill": 0.5, "promotion": {"mode": "dry_run"}}, "better"),
            ({"challenger_skill": 3.0, "champion_skill": 0.5, "promotion": {"min_frauds": 61}}, "too_few_frauds"),
            ({"challenger_skill": 3.0, "champion_error": "written by xgboost 9.0"}, "champion_newer_library"),
        ],
    )
    @pytest.mark.usefixtures("champion")
    def test_the_champion_stays_unless_the_challenger_is_clearly_better(
        self, bench: Bench, built: list[str], engine: dict[str, Any], outcome: str
    ):
        metadata = self.trained(bench, built[2], **engine)
        assert (metadata["promotion"], metadata["is_champion"], metadata["champion_version"]) == (outcome, False, 1)
        champion = bench.mlflow.champion()
        assert champion is not None
        assert champion.version == 1
        # Its age counts from the last comparison with a challenger.
        assert ("champion_compared" in champion.tags) == (outcome in DECIDED_BY_FIGURES)
        # Both have what a promotion by hand needs.
        challenger = bench.mlflow.client().get_model_version("fraud_model", "2")
        proof = "100 rows scored again, largest difference 0.0"
        assert (challenger.tags["reload_proof"], champion.tags["reload_proof"]) == (proof, proof)
        assert bench.mlflow.client().get_model_version_by_alias("fraud_model", "challenger").version == 2

    @pytest.mark.usefixtures("champion")
    def test_a_champion_that_changed_during_the_training_stays(
        self, bench: Bench, built: list[str], monkeypatch: pytest.MonkeyPatch
    ):
        """The challenger was compared with the one before."""
        self.trained(bench, built[2], challenger_skill=0.5, champion_skill=3.0)
        verify = training.verify_reload

        def roll_back(mlflow: MlflowResource, *arguments: Any) -> None:
            verify(mlflow, *arguments)
            mlflow.set_champion("2", {}, lambda event: None)

        monkeypatch.setattr(training, "verify_reload", roll_back)
        metadata = self.trained(bench, built[2], challenger_skill=3.0, champion_skill=0.5)
        assert (metadata["promotion"], metadata["is_champion"], metadata["champion_version"]) == ("better", False, 2)
        aliases = {
            name: bench.mlflow.client().get_model_version_by_alias("fraud_model", name).version
            for name in ("champion", "challenger")
        }
        assert aliases == {"champion": 2, "challenger": 3}

    @pytest.mark.parametrize("challenger", [False, True])
    def test_a_model_that_does_not_reload_to_the_same_scores_fails_the_run(
        self, bench: Bench, built: list[str], challenger: bool, request: pytest.FixtureRequest
    ):
        if challenger:
            request.getfixturevalue("champion")
        engine = FakeEngine(reload_difference=0.01, challenger_skill=0.5, champion_skill=3.0)
        result = bench.run(MODEL, keys=(built[2], built[2]), engine=engine)
        assert "reloaded from MLflow" in failure_of(result, MODEL)
        champion = bench.mlflow.champion()
        assert (champion and champion.version) == (1 if challenger else None)
        last = bench.mlflow.client().get_model_version("fraud_model", "2" if challenger else "1")
        assert "reload_proof" not in last.tags

    @pytest.mark.usefixtures("champion")
    def test_a_champion_without_a_recent_comparison_fails_its_health_check(
        self, bench: Bench, built: list[str], monkeypatch: pytest.MonkeyPatch
    ):
        """The version was registered 200 days ago; this run trains no challenger."""
        bench.mlflow.client().delete_model_version_tag("fraud_model", "1", "champion_since")
        champion = bench.mlflow.champion()
        assert champion is not None
        champion._creation_time -= int(timedelta(days=200).total_seconds() * 1000)
        monkeypatch.setattr(MlflowResource, "champion", lambda self: champion)
        engine = FakeEngine(too_little={built[2]: "The test window has 4 frauds, fewer than 10."})
        result = bench.run(MODEL, keys=(built[2], built[2]), engine=engine)
        health = {item.check_name: item for item in result.get_asset_check_evaluations()}["champion_health"]
        assert not health.passed
        assert "version 1, for 200 days; this time: too_little_data" in (health.description or "")

    def test_an_error_fails_the_mlflow_run(self, bench: Bench, built: list[str]):
        import mlflow as module

        engine = FakeEngine(breaks_down="train_model")
        result = bench.run(MODEL, keys=(built[0], built[0]), engine=engine)
        assert "train_model broke down" in failure_of(result, MODEL)
        client = bench.mlflow.client()
        (run,) = client.search_runs([client.get_experiment_by_name("fraud_model").experiment_id])
        assert run.info.status == "FAILED"
        assert module.active_run() is None
        assert bench.mlflow.champion() is None

    @pytest.mark.parametrize(
        "config",
        [
            *({"test_days": 0}, {"min_frauds": 0}, {"alerts_per_day": 0}, {"delay_days": -1}),
            {"promotion": {"confidence": 0.999}},
        ],
    )
    def test_impossible_values_are_refused(self, config: dict[str, Any]):
        with pytest.raises(ValueError, match=next(iter(config))):
            FraudModelConfig(**config)


def test_an_unusable_address_of_mlflow_is_not_a_missing_champion():
    """MLflow answers both with the same code."""
    resource = MlflowResource(tracking_uri="postgres://db.example/mlflow")
    for call in (resource.champion, lambda: resource.version("1"), lambda: resource.metrics_of(mock.Mock(run_id="x"))):
        with pytest.raises(Exception, match="unsupported URI"):
            call()


def test_the_address_of_an_mlflow_run_is_that_of_its_web_page():
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


ALL = (CLEANED_KEY, FEATURES_KEY, MODEL)


@pytest.mark.usefixtures("no_pictures")
class TestIntake:
    """One bad file among good ones: the run goes on without it, fails at its end, and is not started again."""

    @pytest.fixture
    def bench(self, bench: Bench, mlflow: MlflowResource) -> Bench:
        bench.mlflow = mlflow
        return bench

    @staticmethod
    def materialized(bench: Bench) -> list[set[str]]:
        return [set(bench.instance.get_materialized_partitions(dg.AssetKey(asset))) for asset in ALL]

    def test_the_run_goes_on_with_the_others(self, bench: Bench):
        """Of the bad files, those without a time are not cleaned; one is tried again."""
        bad = {
            "file-1": (raw_spec(1, frauds=20_000), "fraud_rate: 100.000% of the rows are frauds"),
            "file-2": (
                raw_spec(2, counts={"unknown_terminal": 20_000}),
                "known_ids: 100.00% of the clean rows have no",
            ),
            "file-3": ({"refused": "its lines end with CR alone"}, "its lines end with CR alone"),
            "file-4": ({"error": "the raw file is changing"}, "RuntimeError: the raw file is changing"),
            "file-7": (raw_spec(7, days=150), "time_range: it spans 149 days"),
        }
        good = ["file-0", "file-5", "file-6"]
        keys = sorted([*bad, *good])
        bench.put({key: number for number, key in enumerate(keys)})
        for key, (spec, _) in bad.items():
            put_raw(bench.lake, key, spec)
        result = bench.run(*ALL, keys=(keys[0], keys[-1]))
        assert {event.step_key for event in result.get_step_failure_events()} == {"intake_checks"}
        message = failure_of(result, "intake_checks")
        assert "5 of 8 files are left out; everything else is done. file-" in message
        assert [key for key, (_, reason) in bad.items() if f"{key}: {reason}" not in message] == []
        assert "take the file as it is: materialize transaction_features with accept: true" in message
        assert self.materialized(bench) == [set(keys) - {"file-3", "file-4"}, set(good), set(good)]
        (request,) = bench.requests(result, "train_model")
        # The first file is older than the window.
        assert request["feature_uris"] == [bench.lake.partition_uri(FEATURES_TABLE, key) for key in good[1:]]
        assert bench.recorded(MODEL)[good[-1]]["outcome"] == "trained"
        failed = {(one.check_name, one.partition) for one in result.get_asset_check_evaluations() if not one.passed}
        assert {key for _, key in failed if key} == set(bad)

        plan = plan_runs(bench.instance, bench.lake)
        assert plan.ranges == [("file-4", "file-4")]
        for number, key in enumerate(keys):
            if key in bad:
                put_raw(bench.lake, key, raw_spec(number))
        assert plan_runs(bench.instance, bench.lake).ranges == [("file-1", "file-4"), ("file-7", "file-7")]
        mended = bench.run(*ALL, keys=(keys[0], keys[-1]))
        assert mended.success
        assert plan_runs(bench.instance, bench.lake).ranges == []

    def test_a_stopped_cut_off_trains_no_model(self, bench: Bench, keys: list[str]):
        put_raw(bench.lake, keys[3], raw_spec(3, frauds=20_000))
        result = bench.run(*ALL, keys=(keys[0], keys[-1]))
        (request,) = bench.requests(result, "train_model")
        assert request["cutoff"] == keys[2]
        alone = bench.run(*ALL, keys=(keys[3], keys[3]))
        assert {event.step_key for event in alone.get_step_failure_events()} == {"intake_checks"}
        assert bench.requests(alone, "train_model") == []
        assert [keys[3] in made for made in self.materialized(bench)] == [True, False, False]

    def test_an_accepted_file_is_trained_on_until_it_changes(self, bench: Bench, keys: list[str]):
        put_raw(bench.lake, keys[1], raw_spec(1, frauds=20_000))
        assert not bench.run(CLEANED_KEY, FEATURES_KEY, keys=(keys[0], keys[-1])).success
        refused = bench.run(FEATURES_KEY, keys=(keys[1], keys[1]))
        assert f"{keys[1]}: fraud_rate" in failure_of(refused, FEATURES_KEY)
        accepted = bench.run(FEATURES_KEY, keys=(keys[1], keys[1]), config={FEATURES_KEY: {"accept": True}})
        assert accepted.success
        assert bench.lake.reports(CleanedReport)[keys[1]].accepted
        result = bench.run(*ALL, keys=(keys[1], keys[1]))
        assert result.success
        assert bench.requests(result, "train_model")[0]["cutoff"] == keys[1]
        # Built again for another reason, it stays accepted.
        put_raw(bench.lake, keys[0], raw_spec(0, rows=15_000))
        assert bench.run(CLEANED_KEY, FEATURES_KEY, keys=(keys[0], keys[0])).success
        assert bench.lake.reports(CleanedReport)[keys[1]].accepted
        put_raw(bench.lake, keys[1], raw_spec(1, frauds=19_999))
        assert not bench.run(CLEANED_KEY, FEATURES_KEY, keys=(keys[1], keys[1])).success

    def test_rows_that_another_limit_rejects_are_not_accepted(self, bench: Bench, keys: list[str]):
        assert bench.run(CLEANED_KEY, keys=(keys[0], keys[0])).success
        bench.run(FEATURES_KEY, keys=(keys[0], keys[0]), config={FEATURES_KEY: {"accept": True}})
        rebuild = {"keys": (keys[0], keys[0]), "config": {CLEANED_KEY: {"rebuild": True}}}
        for limits, accepted in (({}, True), ({"out_of_range": 2.0}, False)):
            result = bench.run(CLEANED_KEY, limits=limits, **rebuild)
            (request,) = bench.requests(result, "clean_transactions")
            assert [item["accepted"] for item in request["partitions"]] == [accepted]

    def test_a_file_with_features_can_be_accepted(self, bench: Bench, keys: list[str]):
        """It was built under other limits, or its features are gone."""
        put_raw(bench.lake, keys[1], raw_spec(1, frauds=20_000))
        loose = {"max_fraud_rate": 1.0}
        assert bench.run(*ALL, keys=(keys[0], keys[-1]), limits=loose).success
        stopped = bench.run(FEATURES_KEY, keys=(keys[1], keys[1]))
        assert f"{keys[1]}: fraud_rate" in failure_of(stopped, FEATURES_KEY)
        accept = {"keys": (keys[1], keys[1]), "config": {FEATURES_KEY: {"accept": True}}}
        broken = bench.run(FEATURES_KEY, engine=FakeEngine(breaks_down="build_features"), **accept)
        assert broken.success, "the features are there"
        assert bench.run(FEATURES_KEY, keys=(keys[1], keys[1])).success
        assert plan_runs(bench.instance, bench.lake).ranges == []

    def test_a_raw_file_that_is_gone_is_named_though_its_partition_is_there(self, bench: Bench, keys: list[str]):
        put_cleaned(bench.lake, *keys)
        (bench.lake.raw._root / f"{keys[1]}.txt").unlink()  # type: ignore[attr-defined]
        result = bench.run(CLEANED_KEY, keys=(keys[0], keys[-1]))
        assert f"{keys[1]}: file not found in" in failure_of(result, "intake_checks")

    def test_unusable_features_start_no_run_again_and_again(self, bench: Bench, keys: list[str]):
        put_cleaned(bench.lake, *keys)
        bench.put_features(*keys)
        report = bench.lake.read_json(f"{FEATURES_TABLE}/raw_file={keys[1]}/{REPORT_NAME}")
        report["counts"]["unusable_rows"] = 2
        put_report(bench.lake, FEATURES_TABLE, keys[1], report)
        result = bench.run(*ALL, keys=(keys[0], keys[-1]))
        assert f"{keys[1]}: 2 rows have unusable features" in failure_of(result, "feature_checks")
        assert set(bench.recorded(MODEL, result.run_id)) == {keys[0], *keys[2:]}
        assert plan_runs(bench.instance, bench.lake).ranges == []

    def test_a_limit_that_rejects_odd_rows_cleans_the_stopped_files_again_and_only_them(
        self, bench: Bench, keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        put_raw(bench.lake, keys[1], raw_spec(1, days=150))
        assert not bench.run(*ALL, keys=(keys[0], keys[-1])).success
        plan = plan_runs(bench.instance, bench.lake)
        assert plan.ranges == []
        assert f"1 left out: {keys[1]}: time_range: it spans 149 days" in plan.reason
        limits = {"limits": {"config": {"out_of_range": 2.0}}}
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({"resources": limits}))
        monkeypatch.setenv("ML_PLATFORM_RUN_CONFIG", str(file))
        plan = plan_runs(bench.instance, bench.lake)
        assert plan.ranges == [(keys[1], keys[1])]
        result = bench.run(*ALL, keys=(keys[0], keys[-1]), limits={"out_of_range": 2.0})
        assert bench.sent(result, "clean_transactions") == [keys[1]]
        assert bench.requests(result, "clean_transactions")[0]["out_of_range"] == 2
        # The same limit does not clean it again.
        assert plan_runs(bench.instance, bench.lake).ranges == []

    def test_rows_of_files_that_share_ids_are_no_history(self, bench: Bench, keys: list[str]):
        files = bench.lake.list_raw_files()[0]
        shared = {"version": files[keys[0]].version(bench.lake.epoch), "rows": 5, "examples": [1]}
        put_raw(bench.lake, keys[1], raw_spec(1, first_id=0, report={"shared_ids": {keys[0]: shared}}))
        result = bench.run(CLEANED_KEY, FEATURES_KEY, keys=(keys[0], keys[-1]))
        assert "unique_ids: 5 of its ids are also in file-1: 1" in failure_of(result, "intake_checks")
        assert bench.sent(result, "build_features") == keys[2:]
        features = bench.lake.reports(FeaturesReport)
        assert features[keys[2]].inputs.history == {}
        # A file with another date is history, although it is stopped.
        put_raw(bench.lake, keys[1], raw_spec(1, frauds=20_000))
        assert not bench.run(CLEANED_KEY, FEATURES_KEY, keys=(keys[0], keys[-1])).success
        assert list(bench.lake.reports(FeaturesReport)[keys[2]].inputs.history) == keys[:2]

    def test_a_withdrawn_file_is_not_cleaned_by_hand(self, bench: Bench, keys: list[str]):
        assert bench.run(*ALL, keys=(keys[0], keys[-1])).success
        effects = withdraw_file(bench.lake, keys[1])
        assert f"features of {keys[2]}, {keys[3]} become stale; the next run builds them again" in effects
        assert f"models/{keys[-1]}/" in effects[1]
        assert not bench.partition(CLEANED_TABLE, keys[1]).exists()
        assert plan_runs(bench.instance, bench.lake).ranges == []
        put_raw(bench.lake, keys[1], raw_spec(1, rows=15_000))
        assert plan_runs(bench.instance, bench.lake).ranges == []
        assert "it was withdrawn" in failure_of(bench.run(*ALL, keys=(keys[1], keys[1])), CLEANED_KEY)
        among_others = bench.run(*ALL, keys=(keys[0], keys[-1]))
        checks = {check.check_name: check for check in among_others.get_asset_check_evaluations() if not check.passed}
        assert f"{keys[1]}: it was withdrawn" in checks["rows_add_up"].description
        assert allow_again(bench.lake, keys[1])
        assert not allow_again(bench.lake, keys[1])
        assert plan_runs(bench.instance, bench.lake).ranges == [(keys[1], keys[1])]

    def test_keys_that_lie_between_and_are_not_in_the_run_are_named(self, bench: Bench, keys: list[str]):
        bench.put({"file-0-late": 9})
        result = bench.run(CLEANED_KEY, keys=(keys[0], keys[-1]))
        logs = bench.instance.all_logs(result.run_id)
        assert any("not part of this run" in log.user_message and "file-0-late" in log.user_message for log in logs)
        run = bench.instance.get_run_by_id(result.run_id)
        assert run is not None
        assert run.tags["ml_platform/partitions"] == ",".join(keys)
