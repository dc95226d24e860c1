"""Settings of the platform, including the cluster specification.

No other module reads the environment, except that boto3 and MLflow read their own variables.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_S3_URI = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?")
#: boto3 takes empty, `.` or `..` parts of a key literally; Hadoop normalizes them.
_INVALID_KEY_PARTS = {"", ".", ".."}
_TRACKING_URI = re.compile(r"(?i)(https?|databricks|file|sqlite|postgresql|mysql|mssql)(\+\w+)?://")
_EMAIL_ADDRESS = re.compile(r"[!-~]+@[A-Za-z0-9.-]+")
#: Hosts to which secrets may be sent unencrypted.
LOCALHOST = ("localhost", "127.0.0.1", "::1")
#: Kinds of changes that alerts report.
ALERT_KINDS = ("runs", "checks", "freshness", "champion", "ticks", "clusters")


class SettingsError(Exception):
    """A setting is missing or invalid; the message names the variable and the expected value."""


def problems_of(error: ValidationError) -> str:
    """Problems of values in one line, each with the value's name, without the values."""
    problems = [(".".join(map(str, problem["loc"])), _in_words(problem)) for problem in error.errors()]
    return "; ".join(f"{name}: {text}" if name else text for name, text in problems)


def _in_words(problem: Any) -> str:
    """A problem of a value, where pydantic's own words do not say what to do."""
    if problem["type"] == "missing":
        is_variable = len(problem["loc"]) == 1
        return "is required, but not set: see .env.example" if is_variable else "is missing"
    if problem["type"].startswith("date_"):
        return "must be a date like 2019-08-22"
    return str(problem["msg"]).removeprefix("Value error, ")


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError("must be JSON") from None


def _split_at_commas(value: Any) -> Any:
    return [item for part in value.split(",") if (item := part.strip())] if isinstance(value, str) else value


#: Names of Spark's and Hadoop's properties that hold secrets.
SECRET_PROPERTY = re.compile(r"secret|access\.key|password|token")


def _without_secrets(value: dict[str, str]) -> dict[str, str]:
    if secret := [name for name in value if SECRET_PROPERTY.search(name)]:
        raise ValueError(
            f"must hold no secrets ({', '.join(secret)}), because Dagster's UI shows properties: keys of S3 belong "
            "in AWS_... variables, others in the spark-defaults.conf of SPARK_CONF_DIR"
        )
    return value


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: In environment variables, lists are comma-separated and mappings are JSON.
Texts = Annotated[list[str], NoDecode, BeforeValidator(_split_at_commas)]
TextMapping = Annotated[dict[str, str], NoDecode, BeforeValidator(_from_json)]
Properties = Annotated[TextMapping, AfterValidator(_without_secrets)]


class Settings(BaseSettings):
    """Settings, each read from the environment variable in its alias."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    deployment: Literal["local", "yandex"] = Field(
        "local",
        alias="ML_PLATFORM_DEPLOYMENT",
        description="Where Spark runs: local (in the run's process or at SPARK_MASTER), or yandex (a cluster per run).",
    )
    deployment_name: str | None = Field(
        None,
        alias="ML_PLATFORM_DEPLOYMENT_NAME",
        description="Name of this deployment, unique within its cloud folder; default: ML_PLATFORM_DEPLOYMENT.",
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
        date(2019, 8, 22),
        alias="ML_PLATFORM_EPOCH",
        description="First day of the data set, YYYY-MM-DD: tx_time_seconds and tx_time_days count from it.",
    )
    mlflow_tracking_uri: str | None = Field(
        None,
        alias="MLFLOW_TRACKING_URI",
        description="MLflow's tracking server or database; default: mlflow.db (SQLite) next to a local lake, or in "
        "./data if the lake is in S3.",
    )
    artifacts_uri: str | None = Field(
        None,
        alias="ML_PLATFORM_ARTIFACTS_URI",
        description="Where MLflow's client stores artifacts; default: mlflow-artifacts next to a local lake, or in "
        "./data if the lake is in S3; a server uses its own location.",
    )
    mlflow_ui_url: str | None = Field(
        None,
        alias="MLFLOW_UI_URL",
        description="URL of MLflow's UI, for links, if browsers cannot use MLFLOW_TRACKING_URI.",
    )
    spark_master: str = Field(
        "local[*]",
        alias="SPARK_MASTER",
        description="Spark master of the local deployment: local[*] or spark://host:port.",
    )
    java_home: Path | None = Field(
        None, alias="JAVA_HOME", description="Java installation for Spark; default: java in PATH."
    )
    spark_home: Path | None = Field(
        None,
        alias="SPARK_HOME",
        description="Spark installation to use instead of the one in the package pyspark; read by PySpark.",
    )
    spark_driver_memory: str | None = Field(
        None,
        alias="SPARK_DRIVER_MEMORY",
        description="Driver memory of the embedded Spark, e.g. 4g; default: a third of the machine's, from 1 to 8 GB.",
    )
    spark_properties: Properties = Field(
        {},
        alias="SPARK_PROPERTIES",
        description="Additional Spark properties of the local deployment, JSON; they override the platform's.",
    )
    dagster_home: Path | None = Field(
        None,
        alias="DAGSTER_HOME",
        description="Directory of Dagster's configuration and storage; make uses .dagster_home.",
    )
    dagster_ui_url: str | None = Field(
        None, alias="DAGSTER_UI_URL", description="URL of Dagster's UI, for links in alerts."
    )
    docs_url: str | None = Field(
        None,
        alias="ML_PLATFORM_DOCS_URL",
        description="URL of the directory docs/ in your repository, for links to its pages in Dagster's UI.",
    )
    run_config_file: Path | None = Field(
        None,
        alias="ML_PLATFORM_RUN_CONFIG",
        description="YAML file with the run configuration of runs that are started for new files.",
    )
    log_format: Literal["text", "json"] = Field(
        "text", alias="ML_PLATFORM_LOG_FORMAT", description="Format of the runs' output."
    )
    files_every_days: int = Field(
        30,
        ge=1,
        alias="ML_PLATFORM_FILES_EVERY_DAYS",
        description="Expected days between raw files; the freshness policies use it to decide when data and model are "
        "late.",
    )

    @field_validator("raw_uri", "lake_uri")
    @classmethod
    def _directory_or_bucket(cls, value: str) -> str:
        if "://" in value:
            value = value.rstrip("/")
            if not _S3_URI.fullmatch(value) or _INVALID_KEY_PARTS.intersection(value.split("/")[3:]):
                raise ValueError("must be a directory or s3://bucket/prefix")
            return value
        if "?" in value:
            raise ValueError("must not contain '?', which is not allowed in an SQLite URL")
        return str(Path(value).expanduser().absolute())

    @field_validator("docs_url")
    @classmethod
    def _target_of_markdown_links(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"(?i)https?://[^\s()<>\[\]]+", value):
            raise ValueError("must be a URL that begins with https:// or http://, without brackets and blanks")
        return value.rstrip("/") if value else value

    @field_validator("mlflow_tracking_uri")
    @classmethod
    def _known_store(cls, value: str | None) -> str | None:
        """Reject what MLflow would only refuse in a run, with an error that repeats the URI and its password."""
        if value and "://" in value and not _TRACKING_URI.match(value):
            raise ValueError("must begin with https://, http://, sqlite:///, postgresql://, mysql:// or mssql://")
        return value

    @field_validator("mlflow_tracking_uri", "mlflow_ui_url", "dagster_ui_url", "docs_url")
    @classmethod
    def _no_credentials(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Reject an HTTP URL with credentials, which would leak into logs, errors and links."""
        if value and re.match("(?i)https?://", value) and "@" in urlsplit(value).netloc:
            is_client = info.field_name == "mlflow_tracking_uri"
            advice = "; use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if is_client else ""
            raise ValueError(f"must be a URL without user and password{advice}")
        return value

    @property
    def default_mlflow_directory(self) -> Path:
        """Default directory of MLflow's files: next to a local lake, otherwise ./data."""
        return Path("data").absolute() if self.lake_uri.startswith("s3://") else Path(self.lake_uri).parent

    @property
    def tracking_uri(self) -> str:
        """MLflow's tracking URI, with the default filled in."""
        return self.mlflow_tracking_uri or f"sqlite:///{self.default_mlflow_directory / 'mlflow.db'}"

    @property
    def artifact_root(self) -> str | None:
        """Artifact root of a new experiment; None if a tracking server decides on it."""
        if self.artifacts_uri or self.tracking_uri.lower().startswith("http"):
            return self.artifacts_uri
        return (self.default_mlflow_directory / "mlflow-artifacts").as_uri()


class InitializationAction(BaseModel):
    """An initialization script that runs on each host of the cluster."""

    uri: str
    args: list[str] = []
    timeout: int = Field(600, ge=1, description="Seconds.")


@dataclass(frozen=True)
class NodeGroup:
    """A group of identical hosts. `role` is master, data or compute."""

    role: str
    preset: str
    disk_type: str
    disk_size_gb: int
    hosts: int


class ClusterSpec(BaseModel):
    """Composition of a cluster. The defaults come from the Airflow pipeline that this project replaced."""

    folder_id: str = Field(description="Cloud folder in which clusters are created.")
    zone: str = Field("ru-central1-a", description="Availability zone of the subnet.")
    subnet_id: str = Field(description="Subnet of the cluster's hosts; it needs a NAT gateway.")
    security_group_ids: Texts = Field([], description="Security groups of the hosts.")
    service_account_id: str = Field(description="Service account of the cluster; reads and writes the buckets.")
    autoscaling_service_account_id: str = Field(
        "", description="Service account that scales the compute nodes; needed for autoscaling."
    )
    ssh_public_key: str = Field("", description="Public SSH key for access to the hosts.")
    bucket: str = Field("", description="Bucket for the service's own logs.")
    description: str = Field(
        "Made by ml_platform for one run; deleted at its end.",
        max_length=256,
        description="Description of the cluster in the console.",
    )
    labels: TextMapping = Field({}, description="Additional labels of the cluster; the platform's own take precedence.")

    image_version: str = Field("2.0", description="Version of the cluster's image.")
    services: Texts = Field(["YARN", "SPARK", "HDFS", "MAPREDUCE"], description="Hadoop services of the cluster.")
    properties: Properties = Field(
        {}, description='Properties of the services, by service and name, like {"yarn:NAME": "VALUE"}.'
    )
    initialization_actions: Annotated[list[InitializationAction], BeforeValidator(_from_json)] = Field(
        [],
        description='Scripts that new hosts run: JSON [{"uri": "s3://bucket/x.sh", "args": [], "timeout": 600}].',
    )
    oslogin: bool = Field(False, description="Allow access to the hosts by OS Login.")
    ui_proxy: bool = Field(True, description="Make the services' UIs available through the cloud's proxy.")
    log_group_id: str = Field("", description="Cloud Logging group that receives the cluster's logs.")
    host_group_ids: Texts = Field([], description="Groups of dedicated hosts.")
    public_ip: bool = Field(False, description="Give the master a public address.")
    environment: Literal["", "PRODUCTION", "PRESTABLE"] = Field(
        "", description="Environment of the cluster; default: the service's own."
    )

    master_preset: str = Field("s3-c2-m8", description="Preset (cores and memory) of the master.")
    master_disk_type: str = Field("network-ssd", description="Disk type of the master.")
    master_disk_size_gb: int = Field(40, ge=1, description="Disk size of the master, in GB.")
    data_preset: str = Field("s3-c4-m16", description="Preset (cores and memory) of a data node.")
    data_disk_type: str = Field("network-hdd", description="Disk type of a data node.")
    data_disk_size_gb: int = Field(128, ge=1, description="Disk size of a data node, in GB.")
    data_count: int = Field(3, ge=0, le=32, description="Data nodes; 0 for a cluster without HDFS.")
    compute_preset: str = Field("s3-c4-m16", description="Preset (cores and memory) of a compute node.")
    compute_disk_type: str = Field("network-hdd", description="Disk type of a compute node.")
    compute_disk_size_gb: int = Field(128, ge=1, description="Disk size of a compute node, in GB.")
    compute_count: int = Field(0, ge=0, le=32, description="Compute nodes; the initial number if they are scaled.")
    compute_max_count: int = Field(
        0, ge=0, le=100, description="Maximum compute nodes of autoscaling; 0: no autoscaling."
    )
    compute_preemptible: bool = Field(False, description="Use preemptible compute nodes.")
    compute_measurement_s: int = Field(60, ge=60, le=600, description="Autoscaling: averaging period of the load.")
    compute_warmup_s: int = Field(60, ge=0, le=600, description="Autoscaling: warm-up time of a new node.")
    compute_stabilization_s: int = Field(120, ge=60, le=1800, description="Autoscaling: stabilization period.")
    compute_cpu_target: float = Field(0, ge=0, le=100, description="Autoscaling: target CPU load in %; 0: by YARN.")
    compute_decommission_s: int = Field(120, ge=0, le=86400, description="Autoscaling: decommission timeout of a node.")

    @model_validator(mode="after")
    def _autoscaling_has_nodes(self) -> ClusterSpec:
        if (self.compute_max_count or self.compute_preemptible) and not self.compute_count:
            raise ValueError("DATAPROC_COMPUTE_MAX_COUNT and DATAPROC_COMPUTE_PREEMPTIBLE need DATAPROC_COMPUTE_COUNT")
        if self.compute_max_count and self.compute_max_count < self.compute_count:
            raise ValueError("DATAPROC_COMPUTE_MAX_COUNT must not be below DATAPROC_COMPUTE_COUNT")
        return self

    def node_groups(self) -> list[NodeGroup]:
        """Non-empty node groups, the master first."""
        groups = [
            NodeGroup("master", self.master_preset, self.master_disk_type, self.master_disk_size_gb, 1),
            NodeGroup("data", self.data_preset, self.data_disk_type, self.data_disk_size_gb, self.data_count),
            NodeGroup(
                "compute", self.compute_preset, self.compute_disk_type, self.compute_disk_size_gb, self.compute_count
            ),
        ]
        return [group for group in groups if group.hosts]


class ClusterOptions(BaseModel):
    """API access, timeouts, cluster sizing and prices."""

    service_account_key_file: str | None = Field(
        None, description="Authorized key for API calls; default: the token, or the account of the virtual machine."
    )
    iam_token: str | None = Field(None, repr=False, description="IAM token for API calls; it expires within 12 hours.")
    api_endpoint: str | None = Field(None, description="host:port of a non-default API endpoint.")
    root_certificates_file: str | None = Field(None, description="CA certificates for that endpoint (PEM).")
    console_url: str = Field("https://console.yandex.cloud", description="Base URL of links to the console.")
    create_timeout_s: Seconds = Field(1800, description="Timeout for the creation of a cluster.")
    job_timeout_s: Seconds = Field(4 * 3600, description="Timeout of a job, after which it is cancelled.")
    max_lifetime_s: Seconds = Field(8 * 3600, description="Maximum lifetime of a cluster, after which it is deleted.")
    delete_timeout_s: Seconds = Field(900, description="Timeout for the deletion of a cluster.")
    poll_s: Seconds = Field(
        10, description="Maximum interval between two questions to the API about a cluster or a job."
    )
    data_max_count: int = Field(
        0, ge=0, le=32, description="Maximum data nodes of a large run; 0: always DATAPROC_DATA_COUNT."
    )
    target_s: Seconds = Field(900, description="Target time of a run's data work, within the limits on nodes.")
    job_properties: Properties = Field(
        {}, description="Additional Spark properties of each job; they override the platform's."
    )
    prices: Annotated[dict[str, Price], BeforeValidator(_from_json)] = Field(
        {}, description="Price per hour of a host by preset, and of a GB of disk by disk type, for the cost of a run."
    )
    currency: str = Field("RUB", description="Currency of the prices.")


#: Fields of `ClusterSettings` with the variable prefix YC_; the others have DATAPROC_.
_YC_FIELDS = {
    *("folder_id", "zone", "subnet_id", "security_group_ids", "service_account_id", "ssh_public_key"),
    *("service_account_key_file", "iam_token", "api_endpoint", "root_certificates_file", "console_url"),
}


class ClusterSettings(ClusterSpec, ClusterOptions, BaseSettings):
    """Settings of the yandex deployment, from the variables YC_* and DATAPROC_*."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_ignore_empty=True,
        extra="ignore",
        enable_decoding=False,
        alias_generator=lambda name: ("YC_" if name in _YC_FIELDS else "DATAPROC_") + name.upper(),
    )

    @model_validator(mode="after")
    def _lifetime_covers_creation(self) -> ClusterSettings:
        if self.max_lifetime_s <= self.create_timeout_s:
            raise ValueError("DATAPROC_MAX_LIFETIME_S must be above DATAPROC_CREATE_TIMEOUT_S")
        return self

    @model_validator(mode="after")
    def _data_nodes_can_grow(self) -> ClusterSettings:
        if self.data_max_count and not 1 <= self.data_count <= self.data_max_count:
            raise ValueError("DATAPROC_DATA_COUNT must be from 1 to DATAPROC_DATA_MAX_COUNT")
        return self


def _webhook_url(value: str) -> str:
    """Return `value` if secrets may be sent to this URL; otherwise raise ValueError without repeating it."""
    try:
        parts = urlsplit(value)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        raise ValueError("must be https://host/path") from None
    if not value.isascii() or not value.isprintable() or " " in value or not host:
        raise ValueError("must be https://host/path")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in LOCALHOST):
        raise ValueError("must be https://host/path; http:// is allowed only on localhost")
    return value


class AlertSettings(BaseSettings):
    """Which changes alerts report, and to which destinations: e-mail, webhook, services known to apprise, or none.

    Secrets come from a variable or from a file named by a variable; the file is read on each use.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        env_ignore_empty=True,
        extra="ignore",
        alias_generator=lambda name: "ML_PLATFORM_ALERT_" + name.upper(),
    )

    email_to: Texts = Field([], description="Recipients of e-mails, comma-separated.")
    email_from: str | None = Field(None, description="Sender of e-mails.")
    smtp_host: str | None = Field(None, description="SMTP server for e-mails.")
    smtp_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port of the SMTP server; default: 587 for starttls, 465 for tls, 25 for none.",
    )
    smtp_security: Literal["starttls", "tls", "none"] = Field("starttls", description="Encryption of the connection.")
    smtp_user: str | None = Field(None, description="User of the SMTP server, if it requires a login.")
    smtp_password: SecretStr | None = Field(None, description="Password of that user.")
    smtp_password_file: Path | None = Field(
        None, description="File with the password, instead of ML_PLATFORM_ALERT_SMTP_PASSWORD."
    )
    webhook_url: SecretStr | None = Field(
        None, description="URL that accepts a POST of JSON; https, or http on this machine."
    )
    webhook_url_file: Path | None = Field(
        None, description="File with the URL, instead of ML_PLATFORM_ALERT_WEBHOOK_URL."
    )
    apprise_file: Path | None = Field(
        None, description="File with a URL of apprise per line: Slack, Telegram and others."
    )
    on: Texts = Field([*ALERT_KINDS], description="Kinds of changes to report.")

    @field_validator("on")
    @classmethod
    def _kinds(cls, value: list[str]) -> list[str]:
        if not value or not {*value} <= {*ALERT_KINDS}:
            raise ValueError(f"must be one or more of {', '.join(ALERT_KINDS)}, comma-separated")
        return value

    @field_validator("email_to", "email_from")
    @classmethod
    def _addresses(cls, value: Any) -> Any:
        for address in [value] if isinstance(value, str) else value or []:
            if not _EMAIL_ADDRESS.fullmatch(address):
                raise ValueError("must be addresses like me@example.com")
        return value

    @field_validator("webhook_url")
    @classmethod
    def _address(cls, value: SecretStr | None) -> SecretStr | None:
        return value and SecretStr(_webhook_url(value.get_secret_value()))

    @model_validator(mode="after")
    def _complete(self) -> AlertSettings:
        name = "ML_PLATFORM_ALERT_"
        for secret in ("smtp_password", "webhook_url"):
            if getattr(self, secret) and getattr(self, f"{secret}_file"):
                raise ValueError(f"set {name}{secret.upper()} or {name}{secret.upper()}_FILE, not both")
        if (self.email_to or self.smtp_host) and not (self.email_to and self.email_from and self.smtp_host):
            raise ValueError(f"e-mail alerts need {name}EMAIL_TO, {name}EMAIL_FROM and {name}SMTP_HOST")
        if bool(self.smtp_user) != bool(self.smtp_password or self.smtp_password_file):
            raise ValueError(f"{name}SMTP_USER and {name}SMTP_PASSWORD (or …_FILE) go together")
        if self.smtp_user and self.smtp_security == "none":
            raise ValueError(f"{name}SMTP_SECURITY=none would send the password unencrypted: use starttls or tls")
        return self

    @property
    def has_destination(self) -> bool:
        """True if alerts are on."""
        return bool(self.email_to or self.webhook_url or self.webhook_url_file or self.apprise_file)

    def read_smtp_password(self) -> str | None:
        """Return the SMTP password; None if no password is set. Raises SettingsError if its file cannot be used."""
        return self._read("smtp_password")

    def read_webhook_url(self) -> str | None:
        """Return the webhook URL; None if no webhook is set. Raises SettingsError if its file cannot be used."""
        url = self._read("webhook_url")
        try:
            return url and _webhook_url(url)
        except ValueError as error:
            raise SettingsError(f"ML_PLATFORM_ALERT_WEBHOOK_URL_FILE: the file's content {error}") from None

    def read_apprise_urls(self) -> list[str]:
        """Return the URLs for apprise; empty if no file is set. Raises SettingsError if it cannot be used."""
        if self.apprise_file is None:
            return []
        variable = "ML_PLATFORM_ALERT_APPRISE_FILE"
        lines = [line.strip() for line in _read_secret_file(variable, self.apprise_file).splitlines()]
        urls = [line for line in lines if line and not line.startswith("#")]
        if not urls:
            raise SettingsError(f"{variable}: {self.apprise_file} has no URL")
        if not all("://" in url for url in urls):
            raise SettingsError(
                f"{variable}: each line of {self.apprise_file} must be a URL like slack://…, or a # comment"
            )
        return urls

    def _read(self, name: str) -> str | None:
        secret: SecretStr | None = getattr(self, name)
        file: Path | None = getattr(self, f"{name}_file")
        if file is None:
            return secret.get_secret_value() if secret else None
        return _read_secret_file(f"ML_PLATFORM_ALERT_{name.upper()}_FILE", file)


def _read_secret_file(variable: str, file: Path) -> str:
    try:
        content = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"{variable}: cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{variable}: {file} is not a text file") from None
    if not content:
        raise SettingsError(f"{variable}: {file} is empty")
    return content


def load_alert_settings() -> AlertSettings:
    """Read the alert settings from the environment; raises SettingsError as `load_settings` does."""
    return _load(AlertSettings)


def load_dotenv() -> None:
    """Read .env of this directory, which overrides the environment, as in Dagster's commands."""
    import dotenv

    dotenv.load_dotenv(Path.cwd() / ".env", override=True)


def is_set(variable: str) -> bool:
    """True if an environment variable has a value."""
    return bool(os.environ.get(variable))  # noqa: TID251 - this is where settings come from


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        SettingsError: a variable has an invalid value. The message does not repeat the value.
    """
    settings = _load(Settings)
    if settings.deployment == "yandex":
        local = [
            name
            for name, uri in (("ML_PLATFORM_RAW_URI", settings.raw_uri), ("ML_PLATFORM_LAKE_URI", settings.lake_uri))
            if not uri.startswith("s3://")
        ]
        if local:
            raise SettingsError(f"{', '.join(local)}: clusters cannot access local directories; set s3://bucket/prefix")
    return settings


def load_cluster_settings() -> ClusterSettings:
    """Read the settings of the yandex deployment from the environment; raises SettingsError as `load_settings` does."""
    return _load(ClusterSettings)


def _load(kind: Any) -> Any:
    try:
        return kind()
    except ValidationError as error:
        raise SettingsError(problems_of(error)) from None
