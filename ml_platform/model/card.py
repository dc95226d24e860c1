"""The model card: what a version's description in MLflow says to people."""

from __future__ import annotations

from collections.abc import Mapping

from ml_platform.escaping import printable
from ml_platform.lake.reports import TrainingReport
from ml_platform.model.promotion import Decision

#: Figures of the held-out week, as people call them.
FIGURES = {
    "average_precision": "average precision",
    "roc_auc": "ROC AUC",
    "card_precision_at_100": "card precision@100",
    "precision_at_budget": "precision at the alert budget",
    "recall_at_budget": "recall at the alert budget",
}

LIMITS = """\
**Limits.** The held-out week is one week: figures of others differ by more than the interval says if frauds change.
Labels count as known after the delay above. The model knows terminals and customers by their recent past alone; a new
terminal's first frauds cannot be seen. Scores are probabilities as far as the share of frauds stays what it was."""


def model_card(report: TrainingReport, decision: Decision, rows_by_partition: Mapping[str, int]) -> str:
    """Markdown: data, windows, learner, figures with intervals, the gate's decision, limits.

    `report` is that of a trained model, `rows_by_partition` the rows of each partition that it was trained on.
    """
    best, keys = report.best, list(rows_by_partition)
    assert best is not None
    params = ", ".join(f"{name} {value}" for name, value in best.params.items())
    parts = [
        f"**Probability that a card transaction is a fraud**, from {len(report.features)} inputs.",
        f"**Data.** {sum(rows_by_partition.values()):,} transactions of {len(keys)} raw files, {printable(keys[0])} to "
        f"{printable(keys[-1])}.",
        "**Windows.**\n\n" + _table(("window", "days", "rows", "frauds"), _windows(report)),
        f"**Learner.** {best.learner} ({params or 'defaults'}), the best of {len(report.grid)} candidates on the "
        f"validation window (average precision {best.validation_average_precision:.3f}).{_sampling(report)}",
        "**Held-out week.**\n\n" + _table(("figure", "value", "95 % interval"), _figures(report, decision)),
        f"**Promotion.** {decision.outcome}. {printable(' '.join(decision.reasons))}",
        LIMITS.replace("\n", " "),
    ]
    return "\n\n".join(parts)


def _windows(report: TrainingReport) -> list[tuple[str, ...]]:
    return [
        (name, f"{window.first_date} to {window.last_date}", f"{window.rows:,}", f"{window.frauds:,}")
        for name, window in report.windows.items()
        if name in ("train", "validation", "test")
    ]


def _sampling(report: TrainingReport) -> str:
    sampling = report.sampling
    if not sampling:
        return ""
    return (
        f" It was fitted to {sampling.kept_rows:,} of {sampling.rows:,} rows, {sampling.kept_frauds:,} "
        "of them frauds, drawn by a hash and weighted."
    )


def _figures(report: TrainingReport, decision: Decision) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, words in FIGURES.items():
        value = report.metrics.get(f"test_{name}")
        if value is not None:
            ends = [
                f"{decision.figures[key]:.3f}" for key in (f"{name}_lower", f"{name}_upper") if key in decision.figures
            ]
            rows.append((words, f"{value:.3f}", " to ".join(ends)))
    return rows


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
