"""A version in service: what the scoring job needs to know of it, and the grades of its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ml_platform.escaping import markdown, markdown_table
from ml_platform.lake.reports import Grade
from ml_platform.model.gate import champion_problem, champion_request, train_last_date
from ml_platform.model.live_plots import drift_plot, grades_plot
from ml_platform.model.mlflow import MlflowResource
from ml_platform.model.plot_elements import markdown_image
from spark_jobs.schema import REPORT_NAME

#: Inputs in a table, those that drift most.
INPUTS_SHOWN = 8

if TYPE_CHECKING:
    import dagster as dg
    from mlflow.entities.model_registry import ModelVersion


def scoring_request(mlflow: MlflowResource, version: ModelVersion) -> dict[str, Any]:
    """A version in the format of the scoring job's request, with ``error`` if its tags show that it cannot score."""
    request = champion_request(version)
    last_date = train_last_date(version)
    found: dict[str, Any] = {
        "version": int(version.version),
        "out_of_time_from": None if last_date is None else (last_date + timedelta(days=1)).isoformat(),
        "held_out": _held_out(mlflow.metrics_of(version)),
        "error": None,
    }
    if request is None:
        return {**found, "error": champion_problem(version) or f"version {version.version} cannot be read"}
    directory = request["model_uri"].rpartition("/")[0]
    return {**found, "model_uri": request["model_uri"], "report_uri": f"{directory}/{REPORT_NAME}"}


def _held_out(metrics: dict[str, float]) -> dict[str, float] | None:
    """Average precision of the held-out week with its interval, as the gate computed it; None if it could not."""
    names = {
        "average_precision": "test_average_precision",
        "lower": "promotion.average_precision_lower",
        "upper": "promotion.average_precision_upper",
    }
    found = {name: metrics[metric] for name, metric in names.items() if metric in metrics}
    return found if len(found) == len(names) else None


def log_grades(mlflow: MlflowResource, new: Sequence[Grade], every: Sequence[Grade], log: dg.DagsterLogManager) -> None:
    """Log grades as metrics ``live_…`` of the MLflow run that trained their version, with the week as the step.

    Those in `every` that an earlier run graded and could not log are logged, too.
    """
    for number in sorted({grade.model_version for grade in new}):
        version = mlflow.version(str(number))
        if version is None:
            log.warning(f"version {number} is gone from MLflow: its grades are only in the lake")
            continue
        of_version = [grade for grade in every if grade.model_version == number]
        mlflow.log_steps(
            version,
            {grade.week: {f"live_{name}": value for name, value in grade.figures().items()} for grade in of_version},
            again={grade.week for grade in new if grade.model_version == number},
        )


def grades_summary(grades: Sequence[Grade]) -> str:
    """Grades of all versions as Markdown: a plot and a table, the newest week first."""
    at_budget = ("precision at the budget", "recall at the budget")
    header = ("week", "version", "rows", "frauds", "average precision", *at_budget, "calibration")
    rows = [
        (
            f"{grade.first_date} to {grade.last_date}",
            str(grade.model_version),
            f"{grade.rows:,}",
            f"{grade.frauds:,}",
            _with_bounds(grade, "average_precision"),
            *(_shown(getattr(grade, name)) for name in ("precision_at_budget", "recall_at_budget", "calibration")),
        )
        for grade in reversed(grades[-26:])
    ]
    return f"{markdown_image('live_quality', grades_plot(grades))}\n\n{markdown_table(header, rows)}\n"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _with_bounds(grade: Grade, name: str) -> str:
    figures = grade.figures()
    if name not in figures:
        return ""
    return f"{figures[name]:.3f} ({figures[f'{name}_lower']:.3f} to {figures[f'{name}_upper']:.3f})"


def drift_summary(drift: Mapping[str, Any]) -> str:
    """The results of the drift checks as Markdown: what they say, the inputs that drift most, and their plots."""
    lines = [
        f"* {markdown(name)}: {markdown(found['outcome'])}. {markdown(found['reason'])}"
        for name, found in drift.items()
    ]
    of_inputs = drift.get("feature_drift", {})
    inputs, threshold = of_inputs.get("inputs", [])[:INPUTS_SHOWN], of_inputs.get("threshold")
    rows = []
    for row in inputs:
        part = f"{100 * row['exceedance'] / threshold:.0f}%" if threshold and row["exceedance"] is not None else ""
        rows.append((markdown(row["input"]), f"{row['psi']:.3g}", part))
    pictures = [picture for found in drift.values() for picture in found.get("pictures", [])]
    parts = ["\n".join(lines)]
    if rows:
        parts.append("The inputs that differ most; a clean file stays below 100% of the limits.")
        parts.append(markdown_table(("input", "PSI", "part of its limit"), rows))
    if pictures:
        parts.append(markdown_image("drift", drift_plot(pictures)))
    return "\n\n".join(parts) + "\n"
