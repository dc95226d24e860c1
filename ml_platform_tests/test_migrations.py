"""A lake of another version of the platform: newer data are refused, older data are made again or moved.

These tests raise the platform's own version by one. Upgrades from version 1: test_upgrade.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.lake import migrations
from ml_platform.lake import resource as lake_module
from ml_platform.lake.migrations import Migration, migrate_lake
from ml_platform.lake.reports import CLEANED_TABLE as CLEANED
from ml_platform.lake.reports import FEATURES_TABLE as FEATURES
from ml_platform.lake.reports import CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource, SchemaVersionError
from ml_platform.sensors import new_raw_files
from ml_platform_tests import fakes
from ml_platform_tests.fakes import (
    cleaned_report,
    cleaned_reports,
    definitions,
    features_report,
    put_cleaned,
    put_raw,
    put_report,
    raw_spec,
    run_assets,
)
from spark_jobs.schema import SCHEMA_VERSION

NEWER, OLDER = SCHEMA_VERSION + 1, SCHEMA_VERSION


@pytest.fixture
def upgraded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the platform one version newer than what is in the lake by then."""

    def upgrade() -> None:
        for module in (lake_module, migrations, fakes):
            monkeypatch.setattr(module, "SCHEMA_VERSION", NEWER)
        # A newer version is another process.
        monkeypatch.setattr(lake_module, "_report_cache", {})

    return upgrade


def add_currency(_: Migration, table: str, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """A step of an upgrade: cleaned reports get one more key, features are made again."""
    if table == FEATURES:
        return None
    return {**report, "schema_version": report["schema_version"] + 1, "currency": "EUR"}


def fill(lake: LakeResource, *keys: str) -> None:
    for number, key in enumerate(keys):
        put_raw(lake, key, raw_spec(number))
    put_cleaned(lake, *keys)


def content(lake: LakeResource) -> dict[str, bytes]:
    root = Path(lake.lake_uri)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def tick(instance: dg.DagsterInstance, lake: LakeResource) -> dg.SensorResult:
    result = new_raw_files(dg.build_sensor_context(instance=instance, resources={"lake": lake}))
    assert isinstance(result, dg.SensorResult)
    return result


def ranges(result: dg.SensorResult) -> list[tuple[str, str]]:
    start, end = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
    return [(request.tags[start], request.tags[end]) for request in result.run_requests or []]


def versions(lake: LakeResource, table: str) -> dict[str, int]:
    """Versions of the reports that count."""
    kind = {CLEANED: CleanedReport, FEATURES: FeaturesReport}[table]
    return {key: report.schema_version for key, report in lake.reports(kind).items()}


def process(instance: dg.DagsterInstance, lake: LakeResource, *keys: str) -> dg.ExecuteInProcessResult:
    """Clean and build features of a range of partitions."""
    instance.add_dynamic_partitions("raw_files", list(keys))
    return run_assets(definitions(lake), instance, CLEANED, FEATURES, keys=(keys[0], keys[-1]))


class TestNewer:
    @pytest.fixture
    def lake(self, lake: LakeResource) -> LakeResource:
        fill(lake, "a", "b")
        put_cleaned(lake, "b", schema_version=NEWER)
        return lake

    def test_the_sensor_starts_nothing(self, lake: LakeResource, instance: dg.DagsterInstance):
        message = rf"raw_file=b in .*newer version of ml_platform \(schema {NEWER}; .* {OLDER}\)"
        with pytest.raises(SchemaVersionError, match=message):
            tick(instance, lake)
        assert lake.reports(FeaturesReport) == {}

    def test_a_run_fails_and_replaces_nothing(self, lake: LakeResource, instance: dg.DagsterInstance):
        before = content(lake)
        result = process(instance, lake, "a", "b")
        assert not result.success
        assert content(lake) == before
        (failure,) = [event for event in result.all_events if event.is_step_failure]
        assert failure.step_key == "cleaned_transactions"
        assert "newer version of ml_platform" in str(failure.step_failure_data.error)

    def test_newer_features_alone_are_not_replaced(self, lake: LakeResource, instance: dg.DagsterInstance):
        put_cleaned(lake, "b")
        put_report(lake, FEATURES, "b", {"schema_version": NEWER})
        before = content(lake)
        assert not process(instance, lake, "a", "b").success
        assert content(lake) == before


class TestOlder:
    def test_an_older_lake_is_built_again(
        self, lake: LakeResource, instance: dg.DagsterInstance, upgraded: Callable[[], None]
    ):
        fill(lake, "a", "b")
        assert process(instance, lake, "a", "b").success
        upgraded()
        assert lake.reports(CleanedReport) == lake.reports(FeaturesReport) == {}
        assert lake.outdated_reports(CleanedReport).keys() == lake.outdated_reports(FeaturesReport).keys() == {"a", "b"}
        assert ranges(tick(instance, lake)) == [("a", "b")]
        assert process(instance, lake, "a", "b").success
        assert versions(lake, CLEANED) == versions(lake, FEATURES) == {"a": NEWER, "b": NEWER}
        assert ranges(tick(instance, lake)) == []

    def test_features_beyond_the_run_are_built_again(
        self, lake: LakeResource, instance: dg.DagsterInstance, upgraded: Callable[[], None]
    ):
        fill(lake, "a", "b")
        assert process(instance, lake, "a", "b").success
        upgraded()
        list(migrate_lake(lake, steps={OLDER: add_currency}))
        assert process(instance, lake, "b").success
        assert versions(lake, FEATURES) == {"a": NEWER, "b": NEWER}

    def test_a_partition_without_its_raw_file_is_named(
        self, lake: LakeResource, instance: dg.DagsterInstance, upgraded: Callable[[], None]
    ):
        fill(lake, "a", "b")
        (Path(lake.raw_uri) / "a.txt").unlink()
        upgraded()
        put_cleaned(lake, "b", schema_version=NEWER)
        result = tick(instance, lake)
        assert ranges(result) == []
        assert "1 left out because they are of an older version and their raw files are gone" in str(result.skip_reason)
        assert "(restore these; ml-platform migrate --dry-run lists them): a" in str(result.skip_reason)


class TestMigrate:
    @pytest.fixture
    def lake(self, lake: LakeResource, upgraded: Callable[[], None]) -> LakeResource:
        """Cleaned data and features of two partitions, one of which has no raw file any more."""
        fill(lake, "a", "b")
        for key in ("a", "b"):
            features = features_report(cleaned_report(key, raw_spec(0)), {"cleaned": "1", "history": {}})
            put_report(lake, FEATURES, key, features)
        (Path(lake.raw_uri) / "b.txt").unlink()
        upgraded()
        return lake

    def test_reports_are_moved(self, lake: LakeResource, instance: dg.DagsterInstance):
        old = lake.outdated_reports(CleanedReport)
        outcomes = migrate_lake(lake, steps={OLDER: add_currency})
        assert [(item.table, item.key, item.version, item.can_move, item.outcome) for item in outcomes] == [
            (CLEANED, "a", OLDER, True, f"was moved to {NEWER}"),
            (CLEANED, "b", OLDER, True, f"was moved to {NEWER}"),
            (FEATURES, "a", OLDER, False, "the next run makes it again"),
            (FEATURES, "b", OLDER, False, "the next run makes it again"),
        ]
        moved = {key: {**report, "schema_version": NEWER, "currency": "EUR"} for key, report in old.items()}
        assert lake.reports(CleanedReport) == cleaned_reports(*moved.values())
        assert ranges(tick(instance, lake)) == []

    def test_an_interrupted_migration_can_be_repeated(self, lake: LakeResource):
        work = migrate_lake(lake, steps={OLDER: add_currency})
        assert next(work).key == "a"
        work.close()
        assert (list(lake.reports(CleanedReport)), list(lake.outdated_reports(CleanedReport))) == (["a"], ["b"])
        moved = [item.key for item in migrate_lake(lake, steps={OLDER: add_currency}) if item.can_move]
        assert moved == ["b"]
        after = content(lake)
        assert not any(item.can_move for item in migrate_lake(lake, steps={OLDER: add_currency}))
        assert content(lake) == after

    def test_without_a_step_nothing_is_moved(self, lake: LakeResource):
        before = content(lake)
        outcomes = {(item.table, item.key): item.outcome for item in migrate_lake(lake, steps={})}
        assert outcomes[CLEANED, "a"] == "the next run makes it again"
        assert "its raw file, from which it could be made again, is gone" in outcomes[CLEANED, "b"]
        assert content(lake) == before

    def test_reports_are_moved_by_two_steps(self, lake: LakeResource, monkeypatch: pytest.MonkeyPatch):
        for module in (lake_module, migrations):
            monkeypatch.setattr(module, "SCHEMA_VERSION", NEWER + 1)
        monkeypatch.setattr(lake_module, "_report_cache", {})
        assert not any(item.can_move for item in migrate_lake(lake, steps={OLDER: add_currency}))
        assert not any(item.can_move for item in migrate_lake(lake, steps={NEWER: add_currency}))
        list(migrate_lake(lake, steps={OLDER: add_currency, NEWER: add_currency}))
        assert versions(lake, CLEANED) == {"a": NEWER + 1, "b": NEWER + 1}

    def test_a_step_must_raise_the_version(self, lake: LakeResource):
        before = content(lake)
        with pytest.raises(RuntimeError, match=f"the step from schema {OLDER}"):
            list(migrate_lake(lake, steps={OLDER: lambda _, table, report: dict(report)}))
        assert content(lake) == before


class TestCommand:
    @pytest.fixture
    def migrate(
        self,
        lake: LakeResource,
        run_cli: Callable[..., tuple[int, str, str]],
        tmp_path: Path,
        empty_mlflow_store: Path,
        upgraded: Callable[[], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> Callable[..., tuple[int, str]]:
        """The command after an upgrade that brings a step."""
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_mlflow_store, tmp_path)}")
        monkeypatch.setenv("ML_PLATFORM_RAW_URI", lake.raw_uri)
        monkeypatch.setenv("ML_PLATFORM_LAKE_URI", lake.lake_uri)
        monkeypatch.setitem(migrations.STEPS, OLDER, add_currency)
        fill(lake, "a", "b")
        upgraded()

        def run(*arguments: str) -> tuple[int, str]:
            code, out, err = run_cli("migrate", *arguments)
            return code, out + err

        return run

    def test_a_dry_run_changes_nothing(self, lake: LakeResource, migrate: Callable[..., tuple[int, str]]):
        before = content(lake)
        code, out = migrate("--dry-run")
        assert code == 0
        assert f"can be moved to {NEWER}" in out
        assert "run without --dry-run to apply it" in out
        assert content(lake) == before
        code, out = migrate()
        assert code == 0
        assert f"was moved to {NEWER}" in out
        assert list(lake.reports(CleanedReport)) == ["a", "b"]
        assert migrate() == (0, f"{lake.lake_uri} has no data of an older version.\n")

    def test_nothing_is_moved_while_a_run_is_active(self, lake: LakeResource, migrate: Callable[..., tuple[int, str]]):
        """A job deletes the report first: to write it back would mark half a partition as complete."""
        before = content(lake)
        Path(os.environ["DAGSTER_HOME"]).mkdir()
        with dg.DagsterInstance.get() as instance:
            instance.add_run(dg.DagsterRun(job_name="process_new_files", status=dg.DagsterRunStatus.STARTED))
        code, out = migrate()
        assert (code, "runs are queued or running" in out) == (1, True)
        assert content(lake) == before
        assert migrate("--dry-run")[0] == 0

    def test_a_newer_lake_is_refused_before_anything_is_done(
        self, lake: LakeResource, migrate: Callable[..., tuple[int, str]]
    ):
        put_cleaned(lake, "b", schema_version=NEWER + 1)
        before = content(lake)
        code, out = migrate()
        assert code == 1
        assert out.startswith("error: cleaned_transactions/raw_file=b in ")
        assert len(out.splitlines()) == 1
        assert content(lake) == before
