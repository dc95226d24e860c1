"""MLflow: one MLflow run per Dagster run, models registered as versions, the alias ``champion``."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field, PrivateAttr

if TYPE_CHECKING:
    from dagster_mlflow.resources import MlFlow
    from mlflow.entities.model_registry import ModelVersion

EXPERIMENT = "fraud_model"
MODEL_NAME = "fraud_model"
CHAMPION = "champion"
CHALLENGER = "challenger"

#: Characters that MLflow's database keeps of a version's description.
MAX_DESCRIPTION = 5000

#: Error codes of MLflow for a version, an alias or a model that is not there, whatever the store.
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class MlflowResource(dg.ConfigurableResource):
    """dagster-mlflow's tracking resource, set up only when a step uses it: importing MLflow takes seconds."""

    tracking_uri: str = Field(description="Tracking server or database; the model registry is the same.")
    artifact_root: str | None = Field(
        default=None, description="Artifacts of a new experiment; default: the server's choice."
    )

    ui_url: str | None = Field(
        default=None, description="MLflow's UI, for links; default: the tracking URI, if that is a server's."
    )

    _init_context: dg.InitResourceContext | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        self._init_context = context

    def client(self) -> Any:
        """An MlflowClient of the tracking store and its registry."""
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)

    def artifact_location(self) -> str | None:
        """Where the artifacts of the next run go; None if only that run will tell. Makes nothing."""
        client = self.client()
        if experiment := client.get_experiment_by_name(EXPERIMENT):
            return str(experiment.artifact_location)
        if self.artifact_root:
            return self.artifact_root
        # The experiment comes with its first run. A server puts it beside the one that it has from the beginning.
        default = client.get_experiment_by_name("Default")
        return str(default.artifact_location) if default else None

    @contextmanager
    def run(self, tags: Mapping[str, str]) -> Generator[MlFlow]:
        """The MLflow run of this Dagster run, active inside the block; failed if the block raises.

        What it yields has all of ``mlflow``'s functions. MLflow's logged parameters are final, so a step that is
        executed again in the same Dagster run gets the same MLflow run.
        """
        import dagster_mlflow
        import mlflow

        if self._init_context is None:
            raise RuntimeError("the resource is used outside a Dagster run")
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
        """The version that has the alias ``champion``; None if there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client().get_model_version_by_alias(MODEL_NAME, CHAMPION)
        except MlflowException as error:
            if error.error_code in NOT_THERE:
                return None
            raise

    def set_champion(self, version: str, tags: Mapping[str, str]) -> None:
        """Give a version the alias ``champion``, and tags that say since when and why."""
        previous = self.champion()
        # Of some stores a version's number is an integer.
        if previous is not None and str(previous.version) != str(version):
            tags = {**tags, "champion_before": str(previous.version)}
        self.tag_version(version, tags)
        self.client().set_registered_model_alias(MODEL_NAME, CHAMPION, version)

    def set_challenger(self, version: str) -> None:
        """Give a version that did not win the alias ``challenger``."""
        self.client().set_registered_model_alias(MODEL_NAME, CHALLENGER, version)

    def register(self, run: MlFlow, tags: Mapping[str, str], description: str) -> ModelVersion:
        """Register the artifact ``model`` of an MLflow run as a version."""
        uri = f"runs:/{run.active_run().info.run_id}/model"
        version: ModelVersion = run.register_model(uri, MODEL_NAME, tags=dict(tags))
        self.client().update_model_version(MODEL_NAME, version.version, description[:MAX_DESCRIPTION])
        return version

    def tag_version(self, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a registered version."""
        client = self.client()
        for name, value in tags.items():
            client.set_model_version_tag(MODEL_NAME, version, name, value)

    def run_url(self, run: Any) -> str | None:
        """Address of an MLflow run in MLflow's UI; None if there is no UI that we know of."""
        base = self.ui_url or self.tracking_uri
        if not re.match(r"https?://", base):
            return None
        # Without the parameter MLflow 3 opens its page for language models.
        page = f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
        return f"{base.rstrip('/')}/#/{page}"


def hide_progress_bars() -> None:
    """Let MLflow draw none for artifacts: one is two dozen lines of a log. Who wants them sets MLflow's variable."""
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR as PROGRESS_BAR

    if not PROGRESS_BAR.is_set():
        PROGRESS_BAR.set(False)
