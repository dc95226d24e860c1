"""A lake that another version of the platform wrote: newer is refused, older is made again or moved.

Version 1 is the first, so these tests raise the platform's own version to 2.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.cli import main as cli
from ml_platform.lake import migrations
from ml_platform.lake import resource as lake_module
from ml_platform.lake.migrations import migrate_lake
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.reports import CLEANED_TABLE as CLEANED
from ml_platform.lake.reports import FEATURES_TABLE as FEATURES
from ml_platform.lake.resource import LakeResource, SchemaVersionError
from ml_platform.sensors import new_raw_files
from ml_platform_tests import fakes
from ml_platform_tests.fakes import FakeEngine, put_cleaned, put_raw, put_report, raw_spec
from spark_jobs.schema import SCHEMA_VERSION

NEWER, OLDER = SCHEMA_VERSION + 1, SCHEMA_VERSION


@pytest.fixture
def upgraded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the platform one version newer than what is in the lake by then."""

    def upgrade() -> None:
        for module in (lake_module, migrations, fakes):
            monkeypatch.setattr(module, "SCHEMA_VERSION", NEWER)

    return upgrade


def rename_epoch(table: str, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """A step as an upgrade might bring one: cleaned reports get one more key, features are made again."""
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


def process(instance: dg.DagsterInstance, lake: LakeResource, *keys: str) -> dg.ExecuteInProcessResult:
    """Clean and build features of a range of partitions."""
    instance.add_dynamic_partitions(str(raw_files.name), list(keys))
    from ml_platform.assets.cleaned import cleaned_transactions
    from ml_platform.assets.features import transaction_features
    from ml_platform.assets.raw import raw_transactions
    from ml_platform.checks import ASSET_CHECKS
    from ml_platform.lake.partitions import range_tags
    from ml_platform.lake.quality import QualityLimits

    assets = [cleaned_transactions, transaction_features]
    checks = [check for check in ASSET_CHECKS if next(iter(check.check_keys)).asset_key.path[-1] != "fraud_model"]
    defs = dg.Definitions(
        assets=[raw_transactions, *assets],
        asset_checks=checks,
        jobs=[dg.define_asset_job("both", selection=[*assets], executor_def=dg.in_process_executor)],
        resources={"lake": lake, "spark": FakeEngine(), "limits": QualityLimits()},
    )
    return defs.resolve_job_def("both").execute_in_process(
        instance=instance, tags=range_tags(keys[0], keys[-1]), raise_on_error=False
    )


class TestNewer:
    @pytest.fixture
    def lake(self, lake: LakeResource) -> LakeResource:
        fill(lake, "a", "b")
        put_cleaned(lake, "b", schema_version=NEWER)
        return lake

    def test_reports(self, lake: LakeResource):
        with pytest.raises(
            SchemaVersionError, match=r"raw_file=b in .*newer version of ml_platform \(schema 2; .* 1\)"
        ):
            lake.reports(CLEANED)
        assert lake.reports(FEATURES) == {}

    def test_the_sensor_starts_nothing(self, lake: LakeResource, instance: dg.DagsterInstance):
        with pytest.raises(SchemaVersionError):
            tick(instance, lake)

    def test_a_run_fails_and_replaces_nothing(self, lake: LakeResource, instance: dg.DagsterInstance):
        before = content(lake)
        result = process(instance, lake, "a", "b")
        assert not result.success
        assert content(lake) == before
        (failure,) = [event for event in result.all_events if event.is_step_failure]
        assert failure.step_key == "cleaned_transactions"
        error = failure.step_failure_data.error
        assert error is not None
        assert "newer version of ml_platform" in str(error)

    def test_newer_features_alone_are_not_replaced(self, lake: LakeResource, instance: dg.DagsterInstance):
        put_cleaned(lake, "b")
        put_report(lake, FEATURES, "b", {"schema_version": NEWER})
        before = content(lake)
        assert not process(instance, lake, "a", "b").success
        assert content(lake) == before

    def test_migrate(self, lake: LakeResource):
        before = content(lake)
        with pytest.raises(SchemaVersionError):
            list(migrate_lake(lake, steps={OLDER: rename_epoch}))
        assert content(lake) == before


class TestOlder:
    def test_it_is_made_again(self, lake: LakeResource, instance: dg.DagsterInstance, upgraded: Callable[[], None]):
        fill(lake, "a", "b")
        assert process(instance, lake, "a", "b").success
        upgraded()
        assert lake.reports(CLEANED) == lake.reports(FEATURES) == {}
        assert lake.outdated_reports(CLEANED).keys() == lake.outdated_reports(FEATURES).keys() == {"a", "b"}
        assert ranges(tick(instance, lake)) == [("a", "b")]
        assert process(instance, lake, "a", "b").success
        for table in (CLEANED, FEATURES):
            assert {key: report["schema_version"] for key, report in lake.reports(table).items()} == {
                "a": NEWER,
                "b": NEWER,
            }
        assert ranges(tick(instance, lake)) == []

    def test_features_beyond_the_run_are_made_again(
        self, lake: LakeResource, instance: dg.DagsterInstance, upgraded: Callable[[], None]
    ):
        fill(lake, "a", "b")
        assert process(instance, lake, "a", "b").success
        upgraded()
        list(migrate_lake(lake, steps={OLDER: rename_epoch}))
        assert process(instance, lake, "b").success
        assert {key: report["schema_version"] for key, report in lake.reports(FEATURES).items()} == {
            "a": NEWER,
            "b": NEWER,
        }

    def test_what_cannot_be_made_again_is_named(
        self, lake: LakeResource, instance: dg.DagsterInstance, upgraded: Callable[[], None]
    ):
        fill(lake, "a", "b")
        (Path(lake.raw_uri) / "a.txt").unlink()
        upgraded()
        put_cleaned(lake, "b", schema_version=NEWER)
        result = tick(instance, lake)
        assert ranges(result) == []
        assert "1 of an older version are left out" in str(result.skip_reason)
        assert "(see ml-platform migrate): a" in str(result.skip_reason)


class TestMigrate:
    @pytest.fixture
    def lake(self, lake: LakeResource, instance: dg.DagsterInstance, upgraded: Callable[[], None]) -> LakeResource:
        fill(lake, "a", "b")
        assert process(instance, lake, "a", "b").success
        (Path(lake.raw_uri) / "b.txt").unlink()
        upgraded()
        return lake

    def test_moved(self, lake: LakeResource):
        old = lake.outdated_reports(CLEANED)
        found = [
            (item.table, item.key, item.version, item.outcome) for item in migrate_lake(lake, steps={1: rename_epoch})
        ]
        assert found == [
            (CLEANED, "a", 1, "was moved to 2"),
            (CLEANED, "b", 1, "was moved to 2"),
            (FEATURES, "a", 1, "the next run makes it again"),
            (FEATURES, "b", 1, "the next run makes it again"),
        ]
        assert lake.reports(CLEANED) == {
            key: {**report, "schema_version": 2, "currency": "EUR"} for key, report in old.items()
        }

    def test_a_moved_partition_needs_no_run(self, lake: LakeResource, instance: dg.DagsterInstance):
        list(migrate_lake(lake, steps={1: rename_epoch}))
        assert ranges(tick(instance, lake)) == []

    def test_dry_run(self, lake: LakeResource):
        before = content(lake)
        found = [item.outcome for item in migrate_lake(lake, dry_run=True, steps={1: rename_epoch})]
        assert found[:2] == ["can be moved to 2"] * 2
        assert content(lake) == before

    def test_interrupted_and_again_and_again(self, lake: LakeResource):
        work = migrate_lake(lake, steps={1: rename_epoch})
        assert next(work).key == "a"
        work.close()
        assert (list(lake.reports(CLEANED)), list(lake.outdated_reports(CLEANED))) == (["a"], ["b"])
        moved = [item.key for item in migrate_lake(lake, steps={1: rename_epoch}) if item.can_move]
        assert moved == ["b"]
        after = content(lake)
        assert not any(item.can_move for item in migrate_lake(lake, steps={1: rename_epoch}))
        assert content(lake) == after

    def test_without_a_step(self, lake: LakeResource):
        before = content(lake)
        found = {(item.table, item.key): item.outcome for item in migrate_lake(lake, steps={})}
        assert found[CLEANED, "a"] == "the next run makes it again"
        assert "its raw file, from which it could be made again, is gone" in found[CLEANED, "b"]
        assert content(lake) == before

    def test_two_steps(self, lake: LakeResource, monkeypatch: pytest.MonkeyPatch):
        for module in (lake_module, migrations):
            monkeypatch.setattr(module, "SCHEMA_VERSION", 3)
        assert not any(item.can_move for item in migrate_lake(lake, steps={1: rename_epoch}))
        assert not any(item.can_move for item in migrate_lake(lake, steps={2: rename_epoch}))
        list(migrate_lake(lake, steps={1: rename_epoch, 2: rename_epoch}))
        assert [report["schema_version"] for report in lake.reports(CLEANED).values()] == [3, 3]

    def test_a_step_that_leaves_the_version_is_no_step(self, lake: LakeResource):
        before = content(lake)
        with pytest.raises(RuntimeError, match="the step from schema 1"):
            list(migrate_lake(lake, steps={1: lambda table, report: dict(report)}))
        assert content(lake) == before


class TestCommand:
    @pytest.fixture
    def run(
        self,
        lake: LakeResource,
        tmp_path: Path,
        empty_mlflow_store: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_mlflow_store, tmp_path)}")
        monkeypatch.setenv("ML_PLATFORM_RAW_URI", lake.raw_uri)
        monkeypatch.setenv("ML_PLATFORM_LAKE_URI", lake.lake_uri)
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
        for console in (cli.console, cli.errors):
            monkeypatch.setattr(console, "width", 300)

        def run(*arguments: str) -> tuple[int, str]:
            monkeypatch.setattr(sys, "argv", ["ml-platform", "migrate", *arguments])
            capfd.readouterr()
            code: Any = 0
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
            output = capfd.readouterr()
            return int(code or 0), output.out + output.err

        return run

    def test_nothing_to_do(self, lake: LakeResource, run: Callable[..., tuple[int, str]]):
        fill(lake, "a")
        assert run() == (0, f"Nothing of an older version is in {lake.lake_uri}.\n")

    def test_dry_run_then_done(
        self,
        lake: LakeResource,
        run: Callable[..., tuple[int, str]],
        upgraded: Callable[[], None],
        monkeypatch: pytest.MonkeyPatch,
    ):
        fill(lake, "a")
        upgraded()
        monkeypatch.setitem(migrations.STEPS, OLDER, rename_epoch)
        before = content(lake)
        code, out = run("--dry-run")
        assert code == 0
        assert "can be moved to 2" in out
        assert "without --dry-run it is done" in out
        assert content(lake) == before
        code, out = run()
        assert code == 0
        assert "was moved to 2" in out
        assert list(lake.reports(CLEANED)) == ["a"]
        assert "Nothing of an older version" in run()[1]

    def test_not_while_a_run_writes(
        self,
        lake: LakeResource,
        run: Callable[..., tuple[int, str]],
        upgraded: Callable[[], None],
        monkeypatch: pytest.MonkeyPatch,
    ):
        """A job takes the report away first: to write it back would call half a partition whole."""
        fill(lake, "a")
        upgraded()
        monkeypatch.setitem(migrations.STEPS, OLDER, rename_epoch)
        before = content(lake)
        (Path.cwd() / "home").mkdir()
        with dg.DagsterInstance.get() as instance:
            instance.add_run(dg.DagsterRun(job_name="process_new_files", status=dg.DagsterRunStatus.STARTED))
        code, out = run()
        assert (code, "runs are queued or running" in out) == (1, True)
        assert content(lake) == before
        assert run("--dry-run")[0] == 0

    def test_a_newer_lake_is_one_line(self, lake: LakeResource, run: Callable[..., tuple[int, str]]):
        fill(lake, "a")
        put_cleaned(lake, "a", schema_version=NEWER)
        code, out = run()
        assert code == 1
        assert out.startswith("error: cleaned_transactions/raw_file=a in ")
        assert len(out.splitlines()) == 1
