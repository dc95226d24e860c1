"""Settings: names and defaults of the contract, and errors that name the variable."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from ml_platform.definitions import build_resources
from ml_platform.settings import Settings, SettingsError, load_settings


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
    assert settings.s3_endpoint_url is None
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
        AWS_ENDPOINT_URL_S3="http://127.0.0.1:9000",
        DAGSTER_HOME=str(tmp_path),
    )
    assert (settings.raw_uri, settings.lake_uri) == ("s3://raw.bucket-1", "s3://lake-bucket/some/prefix")
    assert settings.epoch == date(2018, 4, 1)
    assert settings.tracking_uri == "http://mlflow.example:5000"
    assert settings.artifact_root is None
    assert settings.spark_master == "spark://master:7077"
    assert settings.s3_endpoint_url == "http://127.0.0.1:9000"
    assert settings.dagster_home == tmp_path


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    names = [field.alias for field in Settings.model_fields.values() if field.alias]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    unset = load_settings()
    assert load(monkeypatch, **dict.fromkeys(names, "")) == unset


def test_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
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
        ("ML_PLATFORM_RAW_URI", "s3://x"),
        ("ML_PLATFORM_RAW_URI", "s3:///prefix"),
        ("ML_PLATFORM_RAW_URI", "s3://Bucket_1/prefix"),
        ("ML_PLATFORM_LAKE_URI", "https://bucket.example/prefix"),
        ("ML_PLATFORM_LAKE_URI", "gs://bucket"),
        ("ML_PLATFORM_LAKE_URI", "what?/lake"),
    ],
)
def test_an_unusable_value_is_named_but_not_repeated(monkeypatch: pytest.MonkeyPatch, variable: str, value: str):
    with pytest.raises(SettingsError) as caught:
        load(monkeypatch, **{variable: value})
    message = str(caught.value)
    assert message.startswith(f"{variable}: ")
    assert value not in message
    assert "\n" not in message


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


def test_mlflow_is_on_this_machine_where_the_lake_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    settings = load(monkeypatch, ML_PLATFORM_LAKE_URI="s3://bucket")
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/data/mlflow.db"


def test_settings_do_not_change(monkeypatch: pytest.MonkeyPatch):
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.raw_uri = "elsewhere"  # type: ignore[misc]


def test_resources(monkeypatch: pytest.MonkeyPatch):
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
    assert (values["mlflow"]["tracking_uri"], values["mlflow"]["artifact_root"]) == (
        "http://mlflow.example",
        None,
    )
