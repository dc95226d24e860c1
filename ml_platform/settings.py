"""The platform's settings. Nothing else reads the environment; boto3 and MLflow read their own variables."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_S3_URI = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?")


class SettingsError(Exception):
    """A setting is missing or unusable; the message names the variable and says what it takes."""


class Settings(BaseSettings):
    """Settings, each read from the environment variable that its alias names."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    deployment: Literal["local"] = Field(
        "local",
        alias="ML_PLATFORM_DEPLOYMENT",
        description="Where Spark runs: local, or the cluster of SPARK_MASTER.",
    )
    raw_uri: str = Field(
        "data/raw",
        alias="ML_PLATFORM_RAW_URI",
        description="Directory or s3://bucket/prefix of the raw files.",
    )
    lake_uri: str = Field(
        "data/lake", alias="ML_PLATFORM_LAKE_URI", description="Directory or s3://bucket/prefix of the lake."
    )
    epoch: date = Field(
        date(2019, 8, 22), alias="ML_PLATFORM_EPOCH", description="First day of the data set, YYYY-MM-DD."
    )
    mlflow_tracking_uri: str | None = Field(
        None,
        alias="MLFLOW_TRACKING_URI",
        description="MLflow's tracking server or database; default: an SQLite file beside the lake.",
    )
    mlflow_ui_url: str | None = Field(
        None, alias="MLFLOW_UI_URL", description="MLflow's UI, for links, where MLFLOW_TRACKING_URI is a database."
    )
    spark_master: str = Field(
        "local[*]",
        alias="SPARK_MASTER",
        description="Master of the local engine: local[*], spark://host:port, yarn.",
    )
    s3_endpoint_url: str | None = Field(
        None, alias="AWS_ENDPOINT_URL_S3", description="S3 endpoint, if it is not that of AWS."
    )
    java_home: Path | None = Field(None, alias="JAVA_HOME", description="Where Java is, for Spark.")
    spark_driver_memory: str | None = Field(
        None,
        alias="SPARK_DRIVER_MEMORY",
        description="Memory of the embedded Spark, e.g. 4g; default: a third of the machine's, from 1 to 8 GB.",
    )
    dagster_home: Path | None = Field(None, alias="DAGSTER_HOME", description="Directory of Dagster's own storage.")

    @field_validator("raw_uri", "lake_uri")
    @classmethod
    def _directory_or_bucket(cls, value: str) -> str:
        if "://" in value:
            if not _S3_URI.fullmatch(value):
                raise ValueError("takes a directory or s3://bucket/prefix")
            return value.rstrip("/")
        if "?" in value:
            raise ValueError("takes no path with a '?', which the address of an SQLite file cannot hold")
        return str(Path(value).expanduser().absolute())

    @property
    def default_mlflow_directory(self) -> Path:
        """Where MLflow's own files are by default: beside a lake on this machine, otherwise ./data."""
        return Path("data").absolute() if self.lake_uri.startswith("s3://") else Path(self.lake_uri).parent

    @property
    def tracking_uri(self) -> str:
        """MLflow's tracking URI, with the default filled in."""
        return self.mlflow_tracking_uri or f"sqlite:///{self.default_mlflow_directory / 'mlflow.db'}"

    @property
    def artifact_root(self) -> str | None:
        """Where MLflow keeps the artifacts of the default store; None where the server decides."""
        return None if self.mlflow_tracking_uri else (self.default_mlflow_directory / "mlflow-artifacts").as_uri()


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        SettingsError: a variable has an unusable value. The message does not repeat the value.
    """
    try:
        return Settings()  # type: ignore[call-arg]
    except ValidationError as error:
        problems = [f"{item['loc'][0]}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()]
        raise SettingsError("; ".join(problems)) from None
