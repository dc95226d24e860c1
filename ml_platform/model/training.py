"""Training workflow: train, evaluate, decide, register, verify, promote."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from ml_platform.lake.grades import newest_grade
from ml_platform.lake.reports import ScoredReport, TrainingReport
from ml_platform.lake.resource import LakeResource
from ml_platform.model.card import model_card
from ml_platform.model.config import FraudModelConfig
from ml_platform.model.evaluation import evaluation_tables, read_test_scores
from ml_platform.model.gate import (
    champion_health,
    champion_request,
    champion_tags,
    compared_tags,
    facts_of,
    verify_reload,
)
from ml_platform.model.mlflow import MODEL_NAME, MlflowResource
from ml_platform.model.packaging import partition_datasets, save_model
from ml_platform.model.plots import draw_figures, markdown_summary
from ml_platform.model.promotion import Decision, Scores, decide
from ml_platform.spark.engine import SparkEngine
from ml_platform.version import PLATFORM_VERSION
from spark_jobs.evaluation.metrics import evaluate
from spark_jobs.features.registry import MODEL_INPUTS
from spark_jobs.schema import REPORT_NAME
from spark_jobs.train_model import MODEL_FILE, SAMPLE_FILE
from spark_jobs.training.learners import LEARNERS, installed_version

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion

#: Maximum bytes of the summary in the asset's metadata, which Dagster stores in its database.
SUMMARY_LIMIT = 100_000


@dataclass(frozen=True)
class TrainingPartition:
    """A training partition: fingerprint of its raw file, number of rows and URI of its features."""

    fingerprint: str
    rows: int
    uri: str


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training. `decision`, `version` and `summary` are set only if a model was trained.

    Attributes:
        report: the job's report, with metrics and tables of the held-out rows.
        champion_problem: problem with the champion (see `champion_health`); None if there is no problem.
        champion_version: version in service after the training; None if there is no champion.
        mlflow_run: the MLflow run entity.
    """

    report: TrainingReport
    champion_problem: str | None
    champion_version: str | None
    mlflow_run: Any
    decision: Decision | None = None
    version: ModelVersion | None = None
    summary: str = ""

    @property
    def promoted(self) -> bool:
        """Whether the trained version is the one in service."""
        return self.version is not None and self.champion_version == str(self.version.version)


@dataclass(frozen=True)
class Training:
    """A training up to a cut-off in the active MLflow run; `run` has MLflow's functions."""

    context: dg.AssetExecutionContext
    config: FraudModelConfig
    lake: LakeResource
    spark: SparkEngine
    mlflow: MlflowResource
    run: Any
    cutoff: str
    #: Last usual day of the cut-off; its later rows are odd ones.
    last_date: date
    partitions: Mapping[str, TrainingPartition]

    @cached_property
    def directory(self) -> str:
        """Directory of the model in the lake."""
        return self.lake.model_path(self.cutoff, self.context.run.run_id)

    @cached_property
    def champion(self) -> ModelVersion | None:
        """Version in service when the training started."""
        return self.mlflow.champion()

    def execute(self) -> TrainingResult:
        """Run all steps. The alias moves last, so that a failure in an earlier step leaves the champion unchanged."""
        report = self.train()
        self.log_training(report)
        if report.outcome != "trained":
            return TrainingResult(
                report,
                self.check_champion(report.outcome, report.reason),
                None if self.champion is None else self.champion.version,
                self.run.active_run(),
            )
        scores = read_test_scores(self.lake.store, f"{self.directory}/test_scores")
        report = self.evaluate(report, scores)
        decision = self.decide(report, scores)
        summary = self.log_evaluation(report, decision)
        version = self.register(report, decision)
        # Verify every version, because any of them can be made the champion by hand later.
        verify_reload(self.mlflow, version, self.sample)
        problem = self.check_champion(
            decision.outcome,
            decision.reasons[0],
            replaced=decision.apply,
            average_precision=report.metrics.get("champion_test_average_precision"),
        )
        in_service = self.promote(version, decision)
        return TrainingResult(report, problem, in_service, self.run.active_run(), decision, version, summary)

    def train(self) -> TrainingReport:
        """Run the Spark job."""
        request = {
            **self.config.as_request(),
            "cutoff": self.cutoff,
            "cutoff_uri": self.partitions[self.cutoff].uri,
            "cutoff_last_date": self.last_date.isoformat(),
            "feature_uris": [partition.uri for partition in self.partitions.values()],
            "features": list(MODEL_INPUTS),
            "output_uri": self.lake.store.spark_uri(self.directory),
            "champion": champion_request(self.champion),
        }
        rows = sum(partition.rows for partition in self.partitions.values())
        report = self.spark.run_job(self.context, self.lake, "train_model", request, rows=rows, label=self.cutoff)
        return TrainingReport.model_validate(report)

    def log_training(self, report: TrainingReport) -> None:
        """Log data, settings and outcome to MLflow; for a model also each candidate's parameters and score."""
        run, data_set = self.run, {key: asdict(partition) for key, partition in self.partitions.items()}
        datasets, dataset_tags = partition_datasets(data_set)
        run.log_inputs(datasets, ["training"] * len(datasets), dataset_tags)
        run.log_dict({"cutoff": self.cutoff, "partitions": data_set}, "data_set.json")
        run.log_params(
            self.config.as_request()
            | {"candidates": json.dumps(self.config.candidates), "cutoff": self.cutoff}
            | {"alerts_per_day": self.config.alerts_per_day}
            | {"data_set_partitions": len(data_set), "data_set_rows": sum(part["rows"] for part in data_set.values())}
        )
        run.set_tag("outcome", report.outcome)
        run.set_tag("mlflow.runName", f"{MODEL_NAME} {self.cutoff}")
        if report.best is None:
            self.context.log.warning(f"no model for {self.cutoff}: {report.reason}")
            run.set_tag("reason", report.reason)
            return
        run.log_params({f"best.{name}": value for name, value in report.best.params.items()})
        run.log_param("best.learner", report.best.learner)
        points = {
            f"grid.{number}": json.dumps({"learner": point.learner, **point.params})
            for number, point in enumerate(report.grid)
        }
        run.log_params(points)
        run.log_metrics(
            {
                f"grid.{number}.validation_average_precision": point.validation_average_precision
                for number, point in enumerate(report.grid)
            }
            | {"validation_average_precision": report.best.validation_average_precision}
        )

    def evaluate(self, report: TrainingReport, scores: pd.DataFrame) -> TrainingReport:
        """Add metrics and tables of the held-out rows to the report, and store it next to the model."""
        budget = self.config.alerts_per_day
        metrics = {f"test_{name}": value for name, value in evaluate(scores, "score", budget).items()}
        if report.champion is not None and report.champion.status == "scored":
            champion = evaluate(scores, "champion_score", budget)
            metrics |= {
                f"champion_test_{name}": value for name, value in champion.items() if name not in ("rows", "frauds")
            }
        tables = evaluation_tables(scores, budget)
        partitions = list(self.partitions)
        report = report.model_copy(update={"metrics": metrics, "tables": tables, "partitions": partitions})
        self.lake.write_json(f"{self.directory}/{REPORT_NAME}", report.model_dump(mode="json"))
        return report

    def decide(self, report: TrainingReport, scores: pd.DataFrame) -> Decision:
        """Compare the model with the champion on the same rows."""
        facts = facts_of(report, self.champion)
        compared = facts.champion is not None and facts.champion_error is None
        return decide(
            self.config.promotion,
            Scores(
                label=scores["tx_fraud"].to_numpy(),
                challenger=scores["score"].to_numpy(),
                champion=scores["champion_score"].to_numpy() if compared else None,
                customer_id=scores["customer_id"].to_numpy(),
            ),
            facts,
            self.config.seed,
        )

    def log_evaluation(self, report: TrainingReport, decision: Decision) -> str:
        """Log report, figures and decision to MLflow; returns a summary as Markdown."""
        run, figures, content = self.run, decision.figures, report.model_dump(mode="json")
        intervals = {
            f"test_{name}": (float(figures[f"{name}_lower"]), float(figures[f"{name}_upper"]))
            for name in ("average_precision", "roc_auc")
            if f"{name}_lower" in figures
        }
        run.log_dict(content, "report.json")
        run.log_metrics({name: value for name, value in report.metrics.items() if value is not None})
        pictures = draw_figures(content, intervals=intervals)
        with tempfile.TemporaryDirectory(prefix="ml-platform-") as directory:
            for name, picture in pictures.items():
                (Path(directory) / f"{name}.png").write_bytes(picture)
            run.log_artifacts(directory, "figures")
        run.log_dict(asdict(decision), "promotion.json")
        run.set_tags({"promotion": decision.outcome, "promotion.reason": " ".join(decision.reasons)[:4000]})
        run.log_metrics({f"promotion.{name}": float(value) for name, value in figures.items()})
        return markdown_summary(content, pictures, intervals=intervals, limit=SUMMARY_LIMIT)

    @cached_property
    def sample(self) -> pd.DataFrame:
        """Sample of held-out rows with ids, inputs and scores, written by the job."""
        import io

        import pandas as pd

        return pd.read_parquet(io.BytesIO(self.lake.store.read(f"{self.directory}/{SAMPLE_FILE}")))

    def register(self, report: TrainingReport, decision: Decision) -> ModelVersion:
        """Log the model file as an MLflow model and register it with a model card."""
        assert report.best is not None  # noqa: S101 - narrows the type
        with tempfile.TemporaryDirectory(prefix="ml-platform-") as directory:
            target = Path(directory) / "model"
            save_model(target, self.lake.store.read(f"{self.directory}/{MODEL_FILE}"), self.sample)
            self.run.log_artifacts(str(target), "model")
        learner = report.best.learner
        library = LEARNERS[learner].library
        tags = {
            "cutoff": self.cutoff,
            "dagster.run_id": self.context.run.run_id,
            "platform_version": PLATFORM_VERSION,
            "model_uri": report.model_uri,
            "features": json.dumps(report.features),
            "train_last_date": report.windows["train"].last_date,
            "learner": learner,
        }
        if library is not None:
            tags["library_version"] = installed_version(library)
        rows = {key: partition.rows for key, partition in self.partitions.items()}
        return self.mlflow.register(self.run, tags, model_card(report, decision, rows, self.config.alerts_per_day))

    def check_champion(
        self, outcome: str, reason: str, *, replaced: bool = False, average_precision: float | None = None
    ) -> str | None:
        """See `champion_health`; also tags the champion with the time of the comparison.

        Its figure is that of its last graded week in service; `average_precision`, of the held-out rows, until there is
        one.
        """
        if self.champion is None or replaced:
            return None
        grade = newest_grade(self.lake.reports(ScoredReport), int(self.champion.version))
        if grade is not None and grade.average_precision is not None:
            average_precision = grade.average_precision
        problem = champion_health(
            self.config.promotion, self.champion, outcome=outcome, reason=reason, average_precision=average_precision
        )
        if tags := compared_tags(outcome):
            self.mlflow.tag_version(self.champion.version, tags)
        return problem

    def promote(self, version: ModelVersion, decision: Decision) -> str | None:
        """Set the version's alias, ``champion`` or ``challenger``; returns the version in service."""
        current = self.mlflow.champion()
        in_service = None if current is None else str(current.version)
        compared = None if self.champion is None else str(self.champion.version)
        if decision.apply and in_service == compared:
            tags = champion_tags(who="fraud_model", why=decision.reasons[0])
            self.mlflow.set_champion(version.version, tags, self.context.log_event)
            in_service = str(version.version)
        else:
            if decision.apply:
                # Someone has rolled it back, for example. The decision is about another champion.
                self.context.log.warning(
                    f"the champion was changed during the training: version {version.version} stays a challenger"
                )
            self.mlflow.set_challenger(version.version)
        self.context.log.info(f"model version {version.version}: {decision.outcome}. {decision.reasons[0]}")
        return in_service
