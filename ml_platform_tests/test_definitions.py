"""The code location: it loads fast, and its definitions have the names and properties that users rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import dagster as dg
import pytest
from dagster_shared.libraries import DagsterLibraryRegistry

from ml_platform.definitions import defs, freshness_policy

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    *("boto3", "botocore", "dagster_aws", "dagster_mlflow", "dagster_pyspark", "matplotlib", "mlflow", "numpy"),
    *("pandas", "pyspark", "sklearn", "xgboost", "google.protobuf", "grpc", "yandex", "yandexcloud"),
)
ASSETS = ("raw_transactions", "cleaned_transactions", "transaction_features", "scored_transactions", "fraud_model")
BUILT = ASSETS[1:]


def assets_definition(name: str) -> dg.AssetsDefinition:
    return defs.resolve_asset_graph().assets_def_for_key(dg.AssetKey(name))


def spec(name: str) -> dg.AssetSpec:
    return assets_definition(name).specs_by_key[dg.AssetKey(name)]


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_definitions_are_loadable():
    dg.Definitions.validate_loadable(defs)


def test_the_ui_lists_the_version_of_the_platform():
    """A server of the code location tells these versions to the UI."""
    assert DagsterLibraryRegistry.get()["ml-platform"] == version("ml-platform")


def test_an_unusable_setting_is_named_when_loading(tmp_path: Path):
    done = run_python("import ml_platform.definitions", tmp_path, ML_PLATFORM_EPOCH="soon")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ml_platform.settings.SettingsError: ML_PLATFORM_EPOCH: ")


def test_names():
    graph = defs.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == set(ASSETS)
    repository = defs.get_repository_def()
    jobs = {job.name for job in repository.get_all_jobs() if not job.name.startswith("__")}
    assert jobs == {"process_new_files", "delete_orphaned_clusters"}
    sensors = {"new_raw_files", "dead_runs", "orphaned_clusters", "report_failed_runs"}
    assert {sensor.name for sensor in repository.sensor_defs} == sensors
    assert [schedule.name for schedule in repository.schedule_defs] == ["process_new_files_daily"]
    described = (*map(defs.resolve_job_def, jobs), *repository.sensor_defs, *repository.schedule_defs)
    assert all(definition.description for definition in described)


def test_checks_of_data_block_and_checks_of_models_do_not():
    graph = defs.resolve_asset_graph()
    specs = [graph.get_check_spec(key) for key in graph.asset_check_keys]
    assert all(spec.description for spec in specs)
    stopping = {"rows_add_up", "reject_rate", "fraud_rate", "known_ids", "unique_ids", "time_range", "usable_features"}
    # Too little data for a model is an outcome, not wrong data.
    others = {"promotion", "champion_health", "enough_data"}
    others |= {"champion_scores", "live_quality", "feature_drift", "score_drift", "label_drift"}
    assert {spec.name for spec in specs} == {*stopping, *others}
    # Dagster would stop all partitions of a run at a check that blocks.
    assert not any(spec.blocking for spec in specs)


def test_new_files_are_looked_for_every_day():
    sensor = defs.resolve_sensor_def("new_raw_files")
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    assert sensor.minimum_interval_seconds == 24 * 60 * 60
    schedule = defs.resolve_schedule_def("process_new_files_daily")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 6 * * *", "UTC")
    assert sensor.job_name == schedule.job_name == "process_new_files"


@pytest.mark.parametrize(
    ("name", "status", "seconds"),
    [
        ("dead_runs", dg.DefaultSensorStatus.RUNNING, 30),
        ("orphaned_clusters", dg.DefaultSensorStatus.STOPPED, 5 * 60),
    ],
)
def test_sensors_that_clean_up_start_no_run(name: str, status: dg.DefaultSensorStatus, seconds: int):
    """A run would wait in the queue behind the one that is dead or whose cluster is left over."""
    sensor = defs.resolve_sensor_def(name)
    assert (sensor.default_status, sensor.minimum_interval_seconds) == (status, seconds)
    assert not sensor.has_jobs


def test_freshness():
    """Data and model are late two days after the next file is due, and overdue two days after the one after it."""
    for name in ASSETS:
        policy = defs.resolve_asset_graph().get(dg.AssetKey(name)).freshness_policy
        if name in ("cleaned_transactions", "fraud_model"):
            assert policy == dg.FreshnessPolicy.time_window(
                warn_window=timedelta(days=32), fail_window=timedelta(days=62)
            )
        else:
            assert policy is None
    assert freshness_policy(1) == dg.FreshnessPolicy.time_window(
        warn_window=timedelta(days=3), fail_window=timedelta(days=4)
    )


@pytest.mark.parametrize(("log_format", "is_json"), [("text", False), ("json", True)])
def test_runs_log_in_the_format_that_is_set(tmp_path: Path, log_format: str, is_json: bool):
    code = """
import dagster as dg
from ml_platform.definitions import defs
from ml_platform.run_config import run_config
from ml_platform.lake.partitions import range_tags
with dg.DagsterInstance.ephemeral(settings={"telemetry": {"enabled": False}}) as instance:
    instance.add_dynamic_partitions("raw_files", ["a", "b"])
    job = defs.resolve_job_def("process_new_files")
    job.execute_in_process(
        instance=instance, tags=range_tags("a", "b"), run_config=run_config(), raise_on_error=False
    )
"""
    done = run_python(code, tmp_path, ML_PLATFORM_LOG_FORMAT=log_format)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "file not found in" in line]
    assert lines
    assert lines[0].startswith("{") is is_json
    assert ("Stack Trace" in done.stdout + done.stderr) is is_json
    if is_json:
        assert json.loads(lines[0])["dagster_meta"]["job_name"] == "process_new_files"


@pytest.mark.parametrize("deployment", ["local", "yandex"])
def test_each_deployment_has_its_engine(tmp_path: Path, deployment: str):
    """Each has the same resources; only one with clusters runs the sensor of clusters, and only one with a destination
    of alerts that of failed runs. To load it is light, touches no file and shows no secret.
    """
    code = """
import json, sys
from ml_platform.definitions import defs
print(json.dumps({
    "sensor": defs.resolve_sensor_def("orphaned_clusters").default_status.value,
    "alerts": defs.resolve_sensor_def("report_failed_runs").default_status.value,
    "resources": sorted(defs.resources),
    "engine": type(defs.resources["spark"]).__name__,
    "shown": [repr(defs.resources), repr(defs)],
    "heavy": sorted(name for name in sys.argv[1].split() if name in sys.modules),
}))
"""
    environment = (
        {}
        if deployment == "local"
        else {
            "ML_PLATFORM_DEPLOYMENT": "yandex",
            "ML_PLATFORM_RAW_URI": "s3://bucket/raw",
            "ML_PLATFORM_LAKE_URI": "s3://bucket/lake",
            "YC_FOLDER_ID": "folder",
            "YC_SUBNET_ID": "subnet",
            "YC_SERVICE_ACCOUNT_ID": "account",
            "YC_IAM_TOKEN": "t1.very-secret",
            "ML_PLATFORM_ALERT_WEBHOOK_URL": "https://hooks.example/very-secret",
        }
    )
    done = run_python(code.replace("sys.argv[1]", repr(" ".join(HEAVY))), tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sensor"] == ("RUNNING" if deployment == "yandex" else "STOPPED")
    assert found["alerts"] == found["sensor"]
    assert found["engine"] == ("DataprocEngine" if deployment == "yandex" else "LocalSparkEngine")
    assert found["resources"] == ["lake", "limits", "mlflow", "spark"]
    assert found["heavy"] == []
    assert "very-secret" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_job():
    job = defs.resolve_job_def("process_new_files")
    assert {key.to_user_string() for key in job.asset_layer.executable_asset_keys} == set(BUILT)
    assert job.executor_def is dg.in_process_executor
    assert job.partitions_def == dg.DynamicPartitionsDefinition(name="raw_files")
    checks = {key.name for key in job.asset_layer.asset_graph.asset_check_keys}
    assert checks == {key.name for key in defs.resolve_asset_graph().asset_check_keys}


@pytest.mark.parametrize("name", ASSETS)
def test_asset(name: str):
    asset = spec(name)
    assert asset.partitions_def == dg.DynamicPartitionsDefinition(name="raw_files")
    assert name not in BUILT or assets_definition(name).backfill_policy == dg.BackfillPolicy.single_run()
    assert asset.group_name not in (None, "default")
    assert (asset.description or "").strip()
    assert asset.kinds
    assert asset.owners
    schema = asset.metadata.get("dagster/column_schema", dg.TableSchema([]))
    assert name == "fraud_model" or schema.columns
    assert all(column.description and column.type for column in schema.columns)


@pytest.mark.parametrize(("upstream", "downstream"), zip(ASSETS, BUILT, strict=False))
def test_each_asset_depends_on_the_one_before(upstream: str, downstream: str):
    graph = defs.resolve_asset_graph()
    parents = {key.to_user_string() for key in graph.get(dg.AssetKey(downstream)).parent_keys}
    assert parents == {upstream} | ({"transaction_features"} if downstream == "fraud_model" else set())
    mapping = graph.get_partition_mapping(dg.AssetKey(downstream), dg.AssetKey(upstream))
    assert isinstance(mapping, dg.IdentityPartitionMapping)


def test_raw_transactions_are_external():
    graph = defs.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.external_asset_keys} | {
        key.to_user_string() for key in graph.observable_asset_keys
    } == {"raw_transactions"}


def test_columns_of_cleaned_transactions():
    schema = spec("cleaned_transactions").metadata["dagster/column_schema"]
    assert [(column.name, column.type) for column in schema.columns] == [
        ("transaction_id", "bigint"),
        ("tx_datetime", "timestamp"),
        ("customer_id", "bigint"),
        ("terminal_id", "bigint"),
        ("tx_amount", "double"),
        ("tx_time_seconds", "bigint"),
        ("tx_time_days", "int"),
        ("tx_fraud", "int"),
        ("tx_fraud_scenario", "int"),
    ]
    nullable = {column.name for column in schema.columns if column.constraints.nullable}
    assert nullable == {"customer_id", "terminal_id"}


def test_only_keys_of_features_may_be_null():
    cleaned = spec("cleaned_transactions").metadata["dagster/column_schema"].columns
    features = spec("transaction_features").metadata["dagster/column_schema"].columns
    assert [column.name for column in features[: len(cleaned)]] == [column.name for column in cleaned]
    assert len({column.name for column in features}) == len(features)
    nullable = {column.name for column in features if column.constraints.nullable}
    assert nullable == {"customer_id", "terminal_id"}
