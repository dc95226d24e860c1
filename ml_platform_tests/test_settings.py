"""Settings: names and defaults of the contract, and errors that name the variable."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from urllib.parse import unquote, urlsplit

import dagster as dg
import pytest

from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.definitions import build_resources
from ml_platform.settings import (
    ClusterOptions,
    ClusterSettings,
    ClusterSpec,
    Settings,
    SettingsError,
    load_cluster_settings,
    load_settings,
)
from ml_platform.spark.engine import LocalSparkEngine


def load(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert settings.deployment == "local"
    assert settings.raw_uri == str(tmp_path / "data" / "raw")
    assert settings.lake_uri == str(tmp_path / "data" / "lake")
    assert settings.epoch == date(2019, 8, 22)
    assert settings.spark_master == "local[*]"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/data/mlflow.db"
    assert settings.artifact_root == (tmp_path / "data" / "mlflow-artifacts").as_uri()
    assert settings.dagster_home is None


def test_every_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    settings = load(
        monkeypatch,
        ML_PLATFORM_DEPLOYMENT="local",
        ML_PLATFORM_RAW_URI="s3://raw.bucket-1",
        ML_PLATFORM_LAKE_URI="s3://lake-bucket/some/prefix/",
        ML_PLATFORM_EPOCH="2018-04-01",
        MLFLOW_TRACKING_URI="http://mlflow.example:5000",
        SPARK_MASTER="spark://master:7077",
        SPARK_PROPERTIES='{"spark.local.dir": "/large/disk"}',
        DAGSTER_HOME=str(tmp_path),
    )
    assert (settings.raw_uri, settings.lake_uri) == ("s3://raw.bucket-1", "s3://lake-bucket/some/prefix")
    assert settings.epoch == date(2018, 4, 1)
    assert settings.tracking_uri == "http://mlflow.example:5000"
    assert settings.artifact_root is None
    assert settings.spark_master == "spark://master:7077"
    assert settings.spark_properties == {"spark.local.dir": "/large/disk"}
    assert settings.dagster_home == tmp_path


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    names = [field.alias for field in Settings.model_fields.values() if field.alias]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    unset = load_settings()
    assert load(monkeypatch, **dict.fromkeys(names, "")) == unset


def test_directories_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = load(monkeypatch, ML_PLATFORM_RAW_URI="~/my data", ML_PLATFORM_LAKE_URI="../lake")
    assert settings.raw_uri == "/home/somebody/my data"
    assert settings.lake_uri == f"{tmp_path}/../lake"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ML_PLATFORM_EPOCH", "22.08.2019"),
        ("ML_PLATFORM_EPOCH", "2019-02-30"),
        ("ML_PLATFORM_EPOCH", "2019-08-22T10:00:00"),
        ("ML_PLATFORM_DEPLOYMENT", "moon"),
        ("ML_PLATFORM_LOG_FORMAT", "xml"),
        ("ML_PLATFORM_FILES_EVERY_DAYS", "0"),
        ("ML_PLATFORM_FILES_EVERY_DAYS", "monthly"),
        ("ML_PLATFORM_RAW_URI", "s3://x"),
        ("ML_PLATFORM_RAW_URI", "s3:///prefix"),
        ("ML_PLATFORM_RAW_URI", "s3://Bucket_1/prefix"),
        ("ML_PLATFORM_LAKE_URI", "https://bucket.example/prefix"),
        ("ML_PLATFORM_LAKE_URI", "gs://bucket"),
        ("ML_PLATFORM_LAKE_URI", "what?/lake"),
        ("ML_PLATFORM_LAKE_URI", "s3://bucket//lake"),
        ("ML_PLATFORM_LAKE_URI", "s3://bucket/data/./lake"),
        ("ML_PLATFORM_RAW_URI", "s3://bucket/data/../raw"),
        ("SPARK_PROPERTIES", "spark.local.dir=/tmp"),
        ("SPARK_PROPERTIES", '["spark.local.dir"]'),
        ("SPARK_PROPERTIES", '{"spark.hadoop.fs.s3a.secret.key": "hunter22"}'),
        ("MLFLOW_TRACKING_URI", "https://me:hunter22@mlflow.example"),
        ("MLFLOW_TRACKING_URI", "HTTP://me@mlflow.example:5000/"),
        ("MLFLOW_TRACKING_URI", "postgres://me:hunter22@db.example/mlflow"),
        ("MLFLOW_UI_URL", "https://me:hunter22@mlflow.example"),
        ("DAGSTER_UI_URL", "https://me:hunter22@dagster.example"),
        ("ML_PLATFORM_DOCS_URL", "https://me:hunter22@git.example/docs"),
        ("ML_PLATFORM_DOCS_URL", "git.example/docs"),
        ("ML_PLATFORM_DOCS_URL", "javascript:alert(1)"),
        ("ML_PLATFORM_DOCS_URL", "https://git.example/a)[b]"),
    ],
)
def test_an_unusable_value_is_named_but_not_repeated(monkeypatch: pytest.MonkeyPatch, variable: str, value: str):
    with pytest.raises(SettingsError) as caught:
        load(monkeypatch, **{variable: value})
    message = str(caught.value)
    assert message.startswith(f"{variable}: ")
    assert value not in message
    assert "\n" not in message


def test_a_date_is_expected_in_its_form(monkeypatch: pytest.MonkeyPatch):
    for value in ("22.08.2019", "soon", "2019-08-22T10:00:00"):
        with pytest.raises(SettingsError, match=r"^ML_PLATFORM_EPOCH: must be a date like 2019-08-22$"):
            load(monkeypatch, ML_PLATFORM_EPOCH=value)


def test_all_unusable_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SettingsError, match=r"ML_PLATFORM_RAW_URI: .*; ML_PLATFORM_EPOCH: "):
        load(monkeypatch, ML_PLATFORM_RAW_URI="ftp://x", ML_PLATFORM_EPOCH="yesterday")


@pytest.mark.parametrize("name", ["plain", "with space", "100% #1", "a+b&c=d", "[x]{y}*", "ünï"])
def test_the_default_store_of_mlflow_is_beside_the_lake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    from sqlalchemy.engine import make_url

    settings = load(monkeypatch, ML_PLATFORM_LAKE_URI=str(tmp_path / name / "lake"))
    url = make_url(settings.tracking_uri)
    assert (url.database, dict(url.query)) == (str(tmp_path / name / "mlflow.db"), {})
    root = urlsplit(str(settings.artifact_root))
    assert (root.query, root.fragment) == ("", "")
    assert unquote(root.path) == str(tmp_path / name / "mlflow-artifacts")


def test_mlflow_stays_on_this_machine_when_the_lake_is_a_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    settings = load(monkeypatch, ML_PLATFORM_LAKE_URI="s3://bucket")
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/data/mlflow.db"


def test_settings_reach_the_resources(monkeypatch: pytest.MonkeyPatch):
    settings = load(
        monkeypatch,
        ML_PLATFORM_RAW_URI="s3://bucket/raw",
        ML_PLATFORM_LAKE_URI="/lake",
        ML_PLATFORM_EPOCH="2018-04-01",
        MLFLOW_TRACKING_URI="http://mlflow.example",
        SPARK_MASTER="local[3]",
    )
    resources = build_resources(settings)
    assert set(resources) == {"lake", "spark", "mlflow", "limits"}
    values = {key: resource.model_dump() for key, resource in resources.items()}
    assert values["lake"] == {"raw_uri": "s3://bucket/raw", "lake_uri": "/lake", "epoch": "2018-04-01"}
    assert values["spark"]["master"] == "local[3]"
    assert values["mlflow"]["artifact_root"] is None
    with dg.build_resources({"mlflow": resources["mlflow"]}) as opened:
        assert opened.mlflow.tracking_uri == "http://mlflow.example"


# --- The yandex deployment

YANDEX = {
    "ML_PLATFORM_DEPLOYMENT": "yandex",
    "ML_PLATFORM_RAW_URI": "s3://bucket/raw",
    "ML_PLATFORM_LAKE_URI": "s3://bucket/lake",
    "YC_FOLDER_ID": "folder",
    "YC_SUBNET_ID": "subnet",
    "YC_SERVICE_ACCOUNT_ID": "account",
}

#: Each variable of the engine: its text, the field, the value. Those of the cluster: test_dataproc_api.py.
ENGINE_VARIABLES = {
    "YC_SERVICE_ACCOUNT_KEY_FILE": ("/key.json", "service_account_key_file", "/key.json"),
    "YC_IAM_TOKEN": ("t1.x", "iam_token", "t1.x"),
    "YC_API_ENDPOINT": ("localhost:1", "api_endpoint", "localhost:1"),
    "YC_ROOT_CERTIFICATES_FILE": ("/ca.pem", "root_certificates_file", "/ca.pem"),
    "YC_CONSOLE_URL": ("https://console.example", "console_url", "https://console.example"),
    "DATAPROC_DATA_MAX_COUNT": ("7", "data_max_count", 7),
    "DATAPROC_TARGET_S": ("600", "target_s", 600.0),
    "DATAPROC_CREATE_TIMEOUT_S": ("100", "create_timeout_s", 100.0),
    "DATAPROC_JOB_TIMEOUT_S": ("101", "job_timeout_s", 101.0),
    "DATAPROC_MAX_LIFETIME_S": ("5000", "max_lifetime_s", 5000.0),
    "DATAPROC_DELETE_TIMEOUT_S": ("102", "delete_timeout_s", 102.0),
    "DATAPROC_POLL_S": ("0.5", "poll_s", 0.5),
    "DATAPROC_JOB_PROPERTIES": ('{"spark.x": "y"}', "job_properties", {"spark.x": "y"}),
    "DATAPROC_PRICES": ('{"s3-c2-m8": 9.5}', "prices", {"s3-c2-m8": 9.5}),
    "DATAPROC_CURRENCY": ("EUR", "currency", "EUR"),
}


@pytest.fixture
def yandex(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in YANDEX.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_every_variable_of_the_engine_is_tested():
    fields = {field for _, field, _ in ENGINE_VARIABLES.values()}
    assert fields == ClusterSettings.model_fields.keys() - ClusterSpec.model_fields.keys()


@pytest.mark.parametrize("variable", ENGINE_VARIABLES)
def test_a_variable_of_the_engine(yandex: pytest.MonkeyPatch, variable: str):
    text, field, value = ENGINE_VARIABLES[variable]
    assert getattr(load_cluster_settings(), field) != value
    yandex.setenv(variable, text)
    assert getattr(load_cluster_settings(), field) == value


def test_everything_reaches_the_engine(yandex: pytest.MonkeyPatch):
    for name, (text, _, _) in ENGINE_VARIABLES.items():
        yandex.setenv(name, text)
    yandex.setenv("DATAPROC_DATA_COUNT", "2")
    yandex.setenv("DATAPROC_LABELS", '{"team": "fraud"}')
    settings = load_cluster_settings()
    engine = build_resources(load_settings())["spark"]
    assert isinstance(engine, DataprocEngine)
    assert engine.spec == ClusterSpec(**settings.model_dump(include=set(ClusterSpec.model_fields)))
    for field in ClusterOptions.model_fields.keys() - {"iam_token"}:
        assert getattr(engine, field) == getattr(settings, field), field
    with dg.build_resources({"spark": engine}) as opened:
        assert opened.spark.iam_token == "t1.x"
    assert "t1.x" not in repr(engine) + repr(settings)
    assert (engine.deployment, engine.lake_uri) == ("yandex", "s3://bucket/lake")


def test_spark_properties_are_those_of_the_local_engine(monkeypatch: pytest.MonkeyPatch):
    engine = build_resources(load(monkeypatch, SPARK_PROPERTIES='{"spark.x": "y"}', SPARK_DRIVER_MEMORY="5g"))["spark"]
    assert isinstance(engine, LocalSparkEngine)
    assert (engine.spark_config, engine.driver_memory) == ({"spark.x": "y"}, "5g")


def test_a_deployment_may_have_a_name(yandex: pytest.MonkeyPatch):
    yandex.setenv("ML_PLATFORM_DEPLOYMENT_NAME", "team a")
    assert build_resources(load_settings())["spark"].deployment == "team a"


@pytest.mark.parametrize("variable", ["ML_PLATFORM_RAW_URI", "ML_PLATFORM_LAKE_URI"])
def test_a_cluster_needs_buckets(yandex: pytest.MonkeyPatch, variable: str):
    yandex.setenv(variable, "data/x")
    with pytest.raises(SettingsError, match=rf"^{variable}: .*s3://bucket/prefix"):
        load_settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATAPROC_PROPERTIES", "spark:a=b"),
        ("DATAPROC_PROPERTIES", "[1]"),
        ("DATAPROC_LABELS", '{"a": {}}'),
        ("DATAPROC_PRICES", '{"s3-c2-m8": "cheap"}'),
        ("DATAPROC_PRICES", '{"s3-c2-m8": NaN}'),
        ("DATAPROC_PRICES", '{"s3-c2-m8": -1}'),
        ("DATAPROC_MAX_LIFETIME_S", "inf"),
        ("DATAPROC_INITIALIZATION_ACTIONS", "s3a://bucket/init.sh"),
        ("DATAPROC_INITIALIZATION_ACTIONS", '[{"args": []}]'),
        ("DATAPROC_DATA_COUNT", "33"),
        ("DATAPROC_DATA_COUNT", "-1"),
        ("DATAPROC_MASTER_DISK_SIZE_GB", "big"),
        ("DATAPROC_ENVIRONMENT", "MOON"),
        ("DATAPROC_POLL_S", "0"),
        ("DATAPROC_CREATE_TIMEOUT_S", "-5"),
        ("DATAPROC_COMPUTE_CPU_TARGET", "101"),
        ("DATAPROC_PUBLIC_IP", "perhaps"),
    ],
)
def test_an_unusable_value_of_the_cluster_is_named(yandex: pytest.MonkeyPatch, variable: str, value: str):
    yandex.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_cluster_settings()
    message = str(caught.value)
    assert re.match(rf"{variable}(\.[\w.-]+)?: ", message)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        # Without compute nodes, autoscaling would silently have no effect.
        ({"DATAPROC_COMPUTE_MAX_COUNT": "5"}, "DATAPROC_COMPUTE_MAX_COUNT .* need DATAPROC_COMPUTE_COUNT"),
        ({"DATAPROC_COMPUTE_PREEMPTIBLE": "true"}, "DATAPROC_COMPUTE_PREEMPTIBLE need DATAPROC_COMPUTE_COUNT"),
        (
            {"DATAPROC_COMPUTE_COUNT": "3", "DATAPROC_COMPUTE_MAX_COUNT": "2"},
            "DATAPROC_COMPUTE_MAX_COUNT must not be below DATAPROC_COMPUTE_COUNT",
        ),
        ({"DATAPROC_DATA_COUNT": "3", "DATAPROC_DATA_MAX_COUNT": "2"}, "from 1 to DATAPROC_DATA_MAX_COUNT"),
        ({"DATAPROC_DATA_COUNT": "0", "DATAPROC_DATA_MAX_COUNT": "5"}, "from 1 to DATAPROC_DATA_MAX_COUNT"),
        ({"DATAPROC_MAX_LIFETIME_S": "1800"}, "DATAPROC_MAX_LIFETIME_S must be above DATAPROC_CREATE_TIMEOUT_S"),
        ({"YC_FOLDER_ID": ""}, r"^YC_FOLDER_ID: is required, but not set: see \.env\.example$"),
        ({"YC_SUBNET_ID": ""}, "^YC_SUBNET_ID: "),
        (
            {"DATAPROC_INITIALIZATION_ACTIONS": '[{"args": []}]'},
            r"^DATAPROC_INITIALIZATION_ACTIONS\.0\.uri: is missing$",
        ),
        ({"YC_SERVICE_ACCOUNT_ID": ""}, "^YC_SERVICE_ACCOUNT_ID: "),
    ],
)
def test_cluster_settings_that_are_missing_or_contradict_each_other(
    yandex: pytest.MonkeyPatch, variables: dict[str, str], error: str
):
    for name, value in variables.items():
        yandex.setenv(name, value)
    with pytest.raises(SettingsError, match=error):
        load_cluster_settings()


def test_the_local_deployment_needs_no_setting_of_the_cloud():
    assert load_settings().deployment == "local"
    assert not isinstance(build_resources(load_settings())["spark"], DataprocEngine)
