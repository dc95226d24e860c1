"""The code location: it loads fast, and everything in it has the names and properties of the contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest

from ml_platform.definitions import defs, freshness_policy

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "boto3",
    "botocore",
    "dagster_aws",
    "dagster_mlflow",
    "dagster_pyspark",
    "matplotlib",
    "mlflow",
    "numpy",
    "pandas",
    "pyspark",
    "sklearn",
    "xgboost",
    "google.protobuf",
    "grpc",
    "yandex",
    "yandexcloud",
)
ASSETS = ("raw_transactions", "cleaned_transactions", "transaction_features", "fraud_model")
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


def test_loadable():
    dg.Definitions.validate_loadable(defs)


def test_import_is_light_and_touches_nothing(tmp_path: Path):
    code = f"""
import sys
import ml_platform.definitions
print(sorted(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert list(tmp_path.iterdir()) == []


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
    assert {sensor.name for sensor in repository.sensor_defs} == {
        "new_raw_files",
        "dead_runs",
        "orphaned_clusters",
        "report_failed_runs",
    }
    assert [schedule.name for schedule in repository.schedule_defs] == ["process_new_files_daily"]
    assert {key.name for key in graph.asset_check_keys} == {
        "promotion",
        "champion_health",
        "rows_add_up",
        "reject_rate",
        "fraud_rate",
        "unique_ids",
        "time_range",
        "usable_features",
        "enough_data",
    }


def test_automation():
    sensor = defs.resolve_sensor_def("new_raw_files")
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    assert sensor.minimum_interval_seconds == 24 * 60 * 60
    schedule = defs.resolve_schedule_def("process_new_files_daily")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 6 * * *", "UTC")
    assert sensor.job_name == schedule.job_name == "process_new_files"
    assert sensor.description
    assert schedule.description


def test_the_sensor_of_dead_runs():
    sensor = defs.resolve_sensor_def("dead_runs")
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    assert sensor.minimum_interval_seconds == 30
    # A run of its own would wait in the queue behind the dead one.
    assert not sensor.has_jobs
    assert sensor.description


def test_the_sensor_of_left_over_clusters():
    sensor = defs.resolve_sensor_def("orphaned_clusters")
    assert sensor.minimum_interval_seconds == 5 * 60
    # It starts no run: one would wait in the queue behind that whose cluster is left over.
    assert not sensor.has_jobs
    assert sensor.description
    assert defs.resolve_job_def("delete_orphaned_clusters").description


def test_the_sensor_of_failed_runs(tmp_path: Path):
    """It is on where somebody is to be told, and whoever loads the definitions learns no secret."""
    assert defs.resolve_sensor_def("report_failed_runs").default_status == dg.DefaultSensorStatus.STOPPED
    code = """
from ml_platform.definitions import defs
print(defs.resolve_sensor_def("report_failed_runs").default_status.value, repr(defs))
"""
    done = run_python(code, tmp_path, ML_PLATFORM_ALERT_WEBHOOK_URL="https://hooks.example/very-secret")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RUNNING ")
    assert "very-secret" not in done.stdout + done.stderr


def test_freshness():
    """Data and model are late two days after the next file, and overdue two days after that after it."""
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
def test_logs_of_runs(tmp_path: Path, log_format: str, is_json: bool):
    """A run of the sensor's configuration writes JSON lines where that is asked for."""
    code = """
import dagster as dg
from ml_platform.definitions import defs
from ml_platform.jobs import run_config
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
    if is_json:
        assert json.loads(lines[0])["dagster_meta"]["job_name"] == "process_new_files"


@pytest.mark.parametrize("deployment", ["local", "yandex"])
def test_deployments(tmp_path: Path, deployment: str):
    """The same keys of resources in each; clusters are looked after where they are made, and nothing is called."""
    code = """
import json, sys
from ml_platform.definitions import defs
print(json.dumps({
    "sensor": defs.resolve_sensor_def("orphaned_clusters").default_status.value,
    "resources": sorted(defs.resources),
    "engine": type(defs.resources["spark"]).__name__,
    "shown": repr(defs.resources),
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
        }
    )
    done = run_python(code.replace("sys.argv[1]", repr(" ".join(HEAVY))), tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sensor"] == ("RUNNING" if deployment == "yandex" else "STOPPED")
    assert found["engine"] == ("DataprocEngine" if deployment == "yandex" else "LocalSparkEngine")
    assert found["resources"] == ["lake", "limits", "mlflow", "spark"]
    assert found["heavy"] == []
    assert "very-secret" not in done.stdout + done.stderr


def test_job():
    job = defs.resolve_job_def("process_new_files")
    assert {key.to_user_string() for key in job.asset_layer.executable_asset_keys} == set(BUILT)
    assert job.executor_def is dg.in_process_executor
    assert job.partitions_def == dg.DynamicPartitionsDefinition(name="raw_files")
    assert job.description
    checks = {key.name for key in job.asset_layer.asset_graph.asset_check_keys}
    assert checks == {key.name for key in defs.resolve_asset_graph().asset_check_keys}


@pytest.mark.parametrize("name", ASSETS)
def test_asset(name: str):
    asset = spec(name)
    assert asset.partitions_def == dg.DynamicPartitionsDefinition(name="raw_files")
    assert asset.group_name not in (None, "default")
    assert (asset.description or "").strip()
    assert asset.kinds
    assert asset.owners
    schema = asset.metadata.get("dagster/column_schema")
    assert name == "fraud_model" or all(column.description for column in schema.columns)


@pytest.mark.parametrize("name", BUILT)
def test_built_asset(name: str):
    assert assets_definition(name).backfill_policy == dg.BackfillPolicy.single_run()


@pytest.mark.parametrize(("upstream", "downstream"), zip(ASSETS, BUILT, strict=False))
def test_the_chain(upstream: str, downstream: str):
    graph = defs.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.get(dg.AssetKey(downstream)).parent_keys} == {upstream}
    mapping = graph.get_partition_mapping(dg.AssetKey(downstream), dg.AssetKey(upstream))
    assert isinstance(mapping, dg.IdentityPartitionMapping)


def test_raw_transactions_are_somebody_elses():
    graph = defs.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.external_asset_keys} | {
        key.to_user_string() for key in graph.observable_asset_keys
    } == {"raw_transactions"}


@pytest.mark.parametrize(
    ("name", "nullable"),
    [
        ("cleaned_transactions", {"customer_id", "terminal_id"}),
        ("transaction_features", None),
    ],
)
def test_tables_have_described_columns(name: str, nullable: set[str] | None):
    schema = spec(name).metadata["dagster/column_schema"]
    assert isinstance(schema, dg.TableSchema)
    assert all(column.description and column.type for column in schema.columns)
    names = [column.name for column in schema.columns]
    assert len(set(names)) == len(names)
    if nullable is not None:
        assert {column.name for column in schema.columns if column.constraints.nullable} == nullable


def test_columns_of_cleaned_transactions_are_the_contracts():
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


def test_the_inputs_of_the_model_are_never_null():
    cleaned = spec("cleaned_transactions").metadata["dagster/column_schema"].columns
    features = spec("transaction_features").metadata["dagster/column_schema"].columns
    assert [column.name for column in features[: len(cleaned)]] == [column.name for column in cleaned]
    never_null = {column.name for column in features if not column.constraints.nullable}
    assert len(never_null) == 27
    assert {column.name for column in features[len(cleaned) :]} < never_null


def test_blocking_checks():
    graph = defs.resolve_asset_graph()
    blocking = {key.name: graph.get_check_spec(key).blocking for key in graph.asset_check_keys}
    # Too little data for a model is an outcome, not wrong data.
    assert sorted(name for name, blocks in blocking.items() if not blocks) == [
        "champion_health",
        "enough_data",
        "promotion",
    ]
    assert all(graph.get_check_spec(key).description for key in graph.asset_check_keys)
