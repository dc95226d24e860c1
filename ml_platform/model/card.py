"""Model card: the human-readable description of a version in MLflow."""

from __future__ import annotations

from collections.abc import Mapping

from ml_platform.escaping import markdown_table, printable
from ml_platform.lake.reports import TrainingReport
from ml_platform.model.promotion import Decision

#: Labels of the held-out metrics in the card.
METRIC_LABELS = {
    "average_precision": "average precision",
    "roc_auc": "ROC AUC",
    "card_precision_at_100": "card precision@100",
    "precision_at_budget": "precision at the alert budget",
    "recall_at_budget": "recall at the alert budget",
}

LIMITS = """\
**Limits.** The held-out period is a single week: if fraud patterns change, other weeks differ by more than the interval
says. Labels are treated as known after the delay. The model knows terminals and customers only by their recent history,
so it cannot detect a new terminal's first frauds. Scores are calibrated as long as the share of frauds is unchanged."""


def model_card(
    report: TrainingReport, decision: Decision, rows_by_partition: Mapping[str, int], alerts_per_day: int
) -> str:
    """Model card as Markdown: data, windows, learner, metrics with intervals, promotion decision, limits.

    `report` is the report of a trained model, `rows_by_partition` has the rows of each training partition.
    """
    best, keys = report.best, list(rows_by_partition)
    assert best is not None  # noqa: S101 - narrows the type
    params = ", ".join(f"{name} {value}" for name, value in best.params.items())
    parts = [
        # The table of versions shows the beginning, and no Markdown.
        f"{best.learner}, {quality_in_words(report, alerts_per_day)}.",
        f"The score is the probability that a card transaction is a fraud, from {len(report.features)} inputs.",
        f"**Data.** {sum(rows_by_partition.values()):,} transactions of {len(keys)} raw files, {printable(keys[0])} to "
        f"{printable(keys[-1])}.",
        "**Windows.**\n\n" + markdown_table(("window", "days", "rows", "frauds"), _windows(report)),
        f"**Learner.** {best.learner} ({params or 'defaults'}), the best of {len(report.grid)} candidates on the "
        f"validation window (average precision {best.validation_average_precision:.3f}).{_sampling(report)}",
        "**Held-out week.**\n\n" + markdown_table(("figure", "value", "95% interval"), _figures(report, decision)),
        f"**Promotion.** {decision.outcome}. {printable(' '.join(decision.reasons))}",
        LIMITS.replace("\n", " "),
    ]
    return "\n\n".join(parts)


def quality_in_words(report: TrainingReport, alerts_per_day: int = 100) -> str:
    """What alerts at this budget would have been worth in the held-out week, in a sentence without capital and end."""
    rows = report.tables.get("thresholds", [])
    row = next((row for row in rows if row["alerts_per_day"] == alerts_per_day), None)
    if row is None:
        return f"its report has no figures for {alerts_per_day} alerts a day"
    if None in (row["precision"], row["recall"], row["amount_share"]):
        return "no frauds in the held-out week"
    return (
        f"of {alerts_per_day} alerts a day in the held-out week {alerts_per_day * row['precision']:.0f} are frauds; "
        f"they catch {100 * row['recall']:.0f}% of the frauds and {100 * row['amount_share']:.0f}% of the money"
    )


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
    for name, label in METRIC_LABELS.items():
        value = report.metrics.get(f"test_{name}")
        if value is not None:
            bounds = [
                f"{decision.figures[key]:.3f}" for key in (f"{name}_lower", f"{name}_upper") if key in decision.figures
            ]
            rows.append((label, f"{value:.3f}", " to ".join(bounds)))
    return rows
