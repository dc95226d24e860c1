"""Curves and tables of the scores of held-out rows; their metrics are those of `spark_jobs.evaluation.metrics`.

All functions work on one DataFrame of scores: the lake's ``test_scores`` as returned by `read_test_scores`. A held-out
week of the full data set has eleven million rows, 0.7 GB in memory.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from spark_jobs.evaluation.metrics import ranking_figures, share_of, with_ranks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from ml_platform.lake.storage import Store

    Floats = npt.NDArray[np.float64]

#: Daily alert budgets in the table ``thresholds``, besides the deployment's own.
BUDGETS = (10, 20, 50, 100, 200, 500)

#: Maximum number of points per curve, and numbers of bins.
CURVE_POINTS = 200
HISTOGRAM_BINS = 20
CALIBRATION_BINS = 10

DAY_US = 86_400_000_000

Table = list[dict[str, Any]]


def read_test_scores(store: Store, name: str) -> pd.DataFrame:
    """Read the held-out rows of a training, sorted by transaction_id, from the Parquet directory `name` of the lake.

    Columns: those of ``test_scores`` (customer_id as float, NaN if unknown; champion_score NaN without a champion),
    with ``day``, days since 1970-01-01 UTC, instead of tx_datetime.
    """
    import io

    import pyarrow as pa
    from pyarrow import parquet

    parts = sorted(part.name for part in store.list_directory(name) if part.name.startswith("part-"))
    table = pa.concat_tables([parquet.read_table(io.BytesIO(store.read(f"{name}/{part}"))) for part in parts])
    # Microseconds cover the years 1 to 9999; pandas' nanoseconds do not.
    instant = table["tx_datetime"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    frame = table.drop_columns("tx_datetime").append_column("microseconds", instant).to_pandas()
    frame["customer_id"] = frame["customer_id"].astype("float64")
    frame["day"] = frame.pop("microseconds") // DAY_US
    return frame.sort_values("transaction_id", ignore_index=True)


def evaluation_tables(scores: pd.DataFrame, alerts_per_day: int) -> dict[str, Table]:
    """Compute the report's tables for the column ``score``, each a list of flat dicts.

    ``roc`` (``false_positive_rate``, ``true_positive_rate``) and ``precision_recall`` (``recall``, ``precision``): at
    most `CURVE_POINTS` points of scikit-learn's curves; empty if there is only one class.
    ``score_histogram`` (``lower``, ``upper``, ``genuine``, ``frauds``): `HISTOGRAM_BINS` equal bins over [0, 1].
    ``calibration`` (``mean_score``, ``fraud_share``, ``rows``): up to `CALIBRATION_BINS` bins of equal size by rank,
    lowest scores first; equal scores share a bin.
    ``per_day`` (``date``, ``rows``, ``frauds``, ``average_precision``, ``roc_auc``, ``precision_at_budget``,
    ``recall_at_budget``), ``per_scenario`` (``scenario``, ``frauds``, ``caught``, ``recall_at_budget``): see
    `with_ranks`; ``thresholds`` (``alerts_per_day``, ``precision``, ``recall``, ``amount_caught``: tx_amount of the
    caught frauds, ``amount_share``: their part of all frauds' amounts). Shares also have ``…_lower`` and ``…_upper``
    (see `share_interval`).
    """
    ranked = with_ranks(scores)
    return {
        **_curves(scores["tx_fraud"], scores["score"]),
        "score_histogram": _histogram(scores),
        "calibration": _calibration(scores),
        "per_day": [_day(int(day), rows, alerts_per_day) for day, rows in ranked.groupby("day")],
        "per_scenario": [
            _scenario(int(scenario), rows, alerts_per_day)
            for scenario, rows in ranked[ranked["tx_fraud"] == 1].groupby("tx_fraud_scenario")
        ],
        "thresholds": [_threshold(ranked, budget) for budget in sorted({*BUDGETS, alerts_per_day})],
    }


def _curves(label: pd.Series, score: pd.Series) -> dict[str, Table]:
    import numpy as np
    from sklearn.metrics import precision_recall_curve, roc_curve

    if label.sum() in (0, len(label)):
        return {"roc": [], "precision_recall": []}

    def thinned(position: Floats) -> npt.NDArray[np.intp]:
        """Indices of evenly spaced points along a curve, including the first and the last."""
        return np.unique(np.searchsorted(position, np.linspace(position[0], position[-1], CURVE_POINTS)))

    false_positives, true_positives, _ = roc_curve(label, score, drop_intermediate=False)
    roc = thinned((false_positives + true_positives) / 2)
    precision, recall, _ = precision_recall_curve(label, score)
    # By ascending recall, without scikit-learn's artificial end point; for each recall the highest precision.
    recall, first = np.unique(recall[-2::-1], return_index=True)
    precision = precision[-2::-1][first]
    points = thinned(recall)
    return {
        "roc": _records(false_positive_rate=false_positives[roc], true_positive_rate=true_positives[roc]),
        "precision_recall": _records(recall=recall[points], precision=precision[points]),
    }


def _histogram(scores: pd.DataFrame) -> Table:
    import numpy as np

    genuine, edges = np.histogram(scores.loc[scores["tx_fraud"] == 0, "score"], HISTOGRAM_BINS, (0, 1))
    frauds, _ = np.histogram(scores.loc[scores["tx_fraud"] == 1, "score"], HISTOGRAM_BINS, (0, 1))
    return _records(lower=edges[:-1], upper=edges[1:], genuine=genuine, frauds=frauds)


def _calibration(scores: pd.DataFrame) -> Table:
    # Equal scores have the same mean rank, and therefore the same bin.
    bins = (scores["score"].rank() - 0.5) * CALIBRATION_BINS // len(scores)
    table = scores.groupby(bins).agg(
        mean_score=("score", "mean"), fraud_share=("tx_fraud", "mean"), rows=("score", "size")
    )
    return _records(**{name: table[name].to_numpy() for name in table})


def _day(day: int, rows: pd.DataFrame, alerts_per_day: int) -> dict[str, Any]:
    is_alert, is_fraud = rows["rank"] <= alerts_per_day, rows["tx_fraud"]
    return {
        "date": (date(1970, 1, 1) + timedelta(days=day)).isoformat(),
        "rows": len(rows),
        "frauds": int(is_fraud.sum()),
        **ranking_figures(is_fraud, rows["score"]),
        **share_of("precision_at_budget", rows, is_alert * is_fraud, is_alert),
        **share_of("recall_at_budget", rows, is_alert * is_fraud, is_fraud),
    }


def _scenario(scenario: int, frauds: pd.DataFrame, alerts_per_day: int) -> dict[str, Any]:
    caught = frauds["rank"] <= alerts_per_day
    return {
        "scenario": scenario,
        "frauds": len(frauds),
        "caught": int(caught.sum()),
        **share_of("recall_at_budget", frauds, caught, frauds["tx_fraud"]),
    }


def _threshold(ranked: pd.DataFrame, budget: int) -> dict[str, Any]:
    is_alert, is_fraud, amount = ranked["rank"] <= budget, ranked["tx_fraud"], ranked["tx_amount"]
    caught = is_alert * is_fraud
    return {
        "alerts_per_day": budget,
        **share_of("precision", ranked, caught, is_alert),
        **share_of("recall", ranked, caught, is_fraud),
        "amount_caught": round(float((caught * amount).sum()), 2),
        **share_of("amount_share", ranked, caught * amount, is_fraud * amount),
    }


def _records(**columns: npt.NDArray[Any]) -> Table:
    """Convert columns to rows of plain Python numbers."""
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]
