"""MLflow resource: one MLflow run per Dagster run, registered model versions, the alias ``champion``."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field, PrivateAttr

from ml_platform.operations.changes import champion_changed

if TYPE_CHECKING:
    from dagster_mlflow.resources import MlFlow
    from mlflow.entities import Experiment
    from mlflow.entities.model_registry import ModelVersion

EXPERIMENT = "fraud_model"
MODEL_NAME = "fraud_model"
CHAMPION = "champion"
CHALLENGER = "challenger"

#: Description of the registered model in MLflow's UI.
MODEL_DESCRIPTION = """Probability that a card transaction is a fraud, one version per training run of the asset
`fraud_model` in Dagster.

* The alias **champion** is the version in service: it scores the files that arrive. A new version gets it only if it is
  better on the same held-out rows; else it is the **challenger**. Tags say since when, by whom and why.
* Each version's description has its data, windows, figures with intervals, and limits.
* Move the alias with `ml-platform champion set` or `rollback`, which check that the version can be used and record the
  reason."""

#: Maximum length of a version's description in MLflow's database.
MAX_DESCRIPTION = 5000

#: MLflow's error codes, across store types, for a version, alias or model that does not exist.
NOT_FOUND_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class MlflowResource(dg.ConfigurableResource):
    """dagster-mlflow's tracking resource, initialized lazily, because importing MLflow takes seconds."""

    tracking_uri: str = Field(description="Tracking server or database, also used as the model registry.")
    artifact_root: str | None = Field(
        default=None, description="Artifact root of a new experiment; default: the server's choice."
    )

    ui_url: str | None = Field(
        default=None, description="URL of MLflow's UI, for links; default: the tracking URI if it is a server."
    )

    _init_context: dg.InitResourceContext | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        self._init_context = context

    def client(self) -> Any:
        """Create an MlflowClient for the tracking store and registry.

        For an unusable URI it raises one of NOT_FOUND_CODES: call it outside a `try` that catches these.
        """
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)

    def experiment(self) -> Experiment | None:
        """The platform's experiment, also one in the trash; None if no run has created it yet."""
        return self.client().get_experiment_by_name(EXPERIMENT)

    def artifact_location(self) -> str | None:
        """Artifact location of the next run; None if it is not known before that run. Has no side effects."""
        client = self.client()
        if experiment := self.experiment():
            return str(experiment.artifact_location)
        if self.artifact_root:
            return self.artifact_root
        # The experiment is created with its first run; a server stores it next to the default experiment.
        default = client.get_experiment_by_name("Default")
        return str(default.artifact_location) if default else None

    @contextmanager
    def run(self, tags: Mapping[str, str]) -> Generator[MlFlow]:
        """Activate the MLflow run of this Dagster run; it is marked as failed if the block raises.

        The yielded object has all functions of ``mlflow``. A step that is retried in the same Dagster run gets the same
        MLflow run, whose logged parameters cannot be changed.
        """
        import dagster_mlflow
        import mlflow

        if self._init_context is None:
            raise RuntimeError("the MLflow resource is used outside a Dagster run")
        mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_registry_uri(self.tracking_uri)
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            mlflow.create_experiment(EXPERIMENT, artifact_location=self.artifact_root)
        config = {
            "experiment_name": EXPERIMENT,
            "mlflow_tracking_uri": self.tracking_uri,
            "parent_run_id": None,
            "mlflow_run_id": None,
            "env": {},
            "env_to_tag": None,
            "extra_tags": dict(tags),
        }
        tracking = contextmanager(dagster_mlflow.mlflow_tracking.resource_fn)
        with tracking(self._init_context.replace_config(config)) as run:
            try:
                yield run
            except BaseException:
                run.end_run(status="FAILED")
                raise
            run.end_run(status="FINISHED")

    def champion(self) -> ModelVersion | None:
        """Version with the alias ``champion``; None if there is no champion."""
        from mlflow.exceptions import MlflowException

        client = self.client()
        try:
            return client.get_model_version_by_alias(MODEL_NAME, CHAMPION)
        except MlflowException as error:
            if error.error_code in NOT_FOUND_CODES:
                return None
            raise

    def version(self, number: str) -> ModelVersion | None:
        """A version of the registered model; None if there is none."""
        from mlflow.exceptions import MlflowException

        client = self.client()
        try:
            return client.get_model_version(MODEL_NAME, number)
        except MlflowException as error:
            if error.error_code in NOT_FOUND_CODES:
                return None
            raise

    def log_steps(
        self, version: ModelVersion, metrics: Mapping[int, Mapping[str, float]], *, again: Collection[int]
    ) -> None:
        """Log metrics by step to the MLflow run of a version: those of the steps in `again`, and all that it lacks.

        Does nothing if the run is gone.
        """
        import time

        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        client, now = self.client(), int(time.time() * 1000)
        names = sorted({name for values in metrics.values() for name in values})
        try:
            logged = {name: {point.step for point in client.get_metric_history(version.run_id, name)} for name in names}
            points = [
                Metric(name, value, now, step)
                for step, values in sorted(metrics.items())
                for name, value in values.items()
                if step in again or step not in logged[name]
            ]
            client.log_batch(version.run_id, metrics=points)
        except MlflowException as error:
            if error.error_code not in NOT_FOUND_CODES:
                raise

    def metrics_of(self, version: ModelVersion) -> dict[str, float]:
        """Metrics of a version's MLflow run; empty if the run is gone."""
        from mlflow.exceptions import MlflowException

        client = self.client()
        try:
            return dict(client.get_run(version.run_id).data.metrics)
        except MlflowException as error:
            if error.error_code in NOT_FOUND_CODES:
                return {}
            raise

    def set_champion(
        self, version: str, tags: Mapping[str, str], record: Callable[[dg.AssetObservation], object]
    ) -> None:
        """Move the alias ``champion`` to a version, and set tags that record when and why.

        `record` gets an event if the champion changed, and must store it in Dagster: alerts report it from there.
        """
        previous = self.champion()
        # Some stores return the version number as an integer.
        before = None if previous is None else str(previous.version)
        if before not in (None, str(version)):
            tags = {**tags, "champion_before": str(before)}
        metrics = self.metrics_of(self.client().get_model_version(MODEL_NAME, version))
        self.tag_version(version, tags)
        self.client().set_registered_model_alias(MODEL_NAME, CHAMPION, version)
        if before != str(version):
            who, why = tags.get("champion_by", ""), tags.get("champion_why", "")
            figures = _with_intervals(metrics)
            record(champion_changed(version=str(version), previous=before, who=who, why=why, figures=figures))

    def set_challenger(self, version: str) -> None:
        """Move the alias ``challenger`` to a version that was not promoted."""
        self.client().set_registered_model_alias(MODEL_NAME, CHALLENGER, version)

    def register(self, run: MlFlow, tags: Mapping[str, str], description: str) -> ModelVersion:
        """Register the artifact ``model`` of an MLflow run as a model version."""
        uri = f"runs:/{run.active_run().info.run_id}/model"
        version: ModelVersion = run.register_model(uri, MODEL_NAME, tags=dict(tags))
        client = self.client()
        client.update_model_version(MODEL_NAME, version.version, description[:MAX_DESCRIPTION])
        # MLflow shows this tag as the description of the run.
        run.set_tag("mlflow.note.content", description[:MAX_DESCRIPTION])
        if not client.get_registered_model(MODEL_NAME).description:  # people may write their own
            client.update_registered_model(MODEL_NAME, MODEL_DESCRIPTION)
        return version

    def tag_version(self, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a registered version."""
        client = self.client()
        for name, value in tags.items():
            client.set_model_version_tag(MODEL_NAME, version, name, value)

    def run_url(self, run: Any) -> str | None:
        """URL of an MLflow run in MLflow's UI; None if the UI's URL is not known."""
        base = self.ui_url or self.tracking_uri
        if not re.match(r"https?://", base):
            return None
        # Without this parameter MLflow 3 opens its GenAI page.
        page = f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
        return f"{base.rstrip('/')}/#/{page}"


def _with_intervals(metrics: Mapping[str, float]) -> dict[str, str]:
    """The figures that a model is judged by, from the metrics of its run."""
    figures = {}
    for name in ("average_precision", "roc_auc"):
        if f"test_{name}" in metrics:
            figures[f"test_{name}"] = f"{metrics[f'test_{name}']:.4f}"
            ends = [metrics.get(f"promotion.{name}_{end}") for end in ("lower", "upper")]
            if None not in ends:
                figures[f"test_{name}"] += f" ({ends[0]:.4f} to {ends[1]:.4f})"
    return figures


def hide_progress_bars() -> None:
    """Disable MLflow's artifact progress bars, which flood logs, unless MLflow's own variable is set."""
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR as PROGRESS_BAR

    if not PROGRESS_BAR.is_set():
        PROGRESS_BAR.set(False)


def limit_retries() -> None:
    """Make MLflow's client fail within seconds in place of minutes, unless MLflow's own variables are set."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    for variable, value in ((MLFLOW_HTTP_REQUEST_MAX_RETRIES, "1"), (MLFLOW_HTTP_REQUEST_TIMEOUT, "15")):
        if not variable.is_set():
            variable.set(value)
