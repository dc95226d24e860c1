"""Evaluation of the scores of held-out rows: metrics, curves and daily alert budgets, with intervals.

All functions work on one DataFrame of scores: the lake's ``test_scores`` as returned by `read_test_scores`. A held-out
week of the full data set has eleven million rows, 0.7 GB in memory.
"""

from __future__ import annotations

import math
from datetime import date, timedelta
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from ml_platform.lake.storage import Store

    Floats = npt.NDArray[np.float64]

#: Cards checked per day in the handbook's card precision.
CARDS_PER_DAY = 100

#: Daily alert budgets in the table ``thresholds``.
BUDGETS = (10, 20, 50, 100, 200, 500)

#: Maximum number of points per curve, and numbers of bins.
CURVE_POINTS = 200
HISTOGRAM_BINS = 20
CALIBRATION_BINS = 10

#: Confidence of the intervals of shares.
CONFIDENCE = 0.95

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
    # Microseconds cover the years 1 to 9999; pandas' nanoseconds do not.
    table = pa.concat_tables(
        [
            parquet.read_table(io.BytesIO(store.read(f"{name}/{part}")), coerce_int96_timestamp_unit="us")
            for part in parts
        ]
    )
    instant = table["tx_datetime"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    frame = table.drop_columns("tx_datetime").append_column("microseconds", instant).to_pandas()
    frame["customer_id"] = frame["customer_id"].astype("float64")
    frame["day"] = frame.pop("microseconds") // DAY_US
    return frame.sort_values("transaction_id", ignore_index=True)


def evaluate(scores: pd.DataFrame, score: str = "score", alerts_per_day: int = 100) -> dict[str, Any]:
    """Compute the metrics of one score column.

    ``average_precision`` and ``roc_auc`` are scikit-learn's; ``card_precision_at_100``: see `card_precision`;
    ``precision_at_budget`` and ``recall_at_budget``: see `with_ranks`; ``rows``, ``frauds``. A metric that is not
    defined on these rows (for example without frauds) is None.
    """
    ranked = with_ranks(scores, score)
    alerts = ranked[ranked["rank"] <= alerts_per_day]
    frauds = int(scores["tx_fraud"].sum())
    caught = int(alerts["tx_fraud"].sum())
    return {
        **_ranking(scores["tx_fraud"], scores[score]),
        "card_precision_at_100": card_precision(scores, score, CARDS_PER_DAY),
        "precision_at_budget": caught / len(alerts) if len(alerts) else None,
        "recall_at_budget": caught / frauds if frauds else None,
        "rows": len(scores),
        "frauds": frauds,
    }


def _ranking(label: pd.Series, score: pd.Series) -> dict[str, float | None]:
    """Average precision (step-wise, ties counted together) and ROC AUC; None if there is only one class."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if label.sum() in (0, len(label)):
        return {"average_precision": None, "roc_auc": None}
    return {
        "average_precision": float(average_precision_score(label, score)),
        "roc_auc": float(roc_auc_score(label, score)),
    }


def with_ranks(scores: pd.DataFrame, score: str = "score") -> pd.DataFrame:
    """Add a ``rank`` within the day, starting at 1: by descending score, ties by ascending transaction_id.

    With a budget of k alerts per day, the rows with rank <= k are the alerts. Over all days together, precision is the
    share of frauds among the alerts, and recall the share of frauds that are alerts (precision and recall at k).
    """
    import numpy as np

    order = np.lexsort((scores["transaction_id"], -scores[score], scores["day"]))
    days = scores["day"].to_numpy()[order]
    starts = np.flatnonzero(np.concatenate(([True], days[1:] != days[:-1])))[: len(days)]
    rank = np.empty(len(days), dtype=np.int64)
    rank[order] = np.arange(len(days)) - np.repeat(starts, np.diff(np.append(starts, len(days)))) + 1
    return scores.assign(rank=rank)


def card_precision(scores: pd.DataFrame, score: str = "score", cards_per_day: int = CARDS_PER_DAY) -> float | None:
    """Card precision@k: daily mean of the share of compromised cards among the k most suspicious.

    As in the Fraud Detection Handbook, chapter 4, "Precision top-k metrics"
    (https://fraud-detection-handbook.github.io/fraud-detection-handbook/Chapter_4_PerformanceMetrics/TopKBased.html):
    a card's score for a day is the maximum of its rows, a card is compromised on a day on which it has a fraud, and
    compromised cards that were among the k are excluded on later days. The divisor is k even on days with fewer cards.
    Ties are ordered by customer_id; the handbook does not specify their order. Rows without a customer are ignored.
    None if no row has a customer.
    """
    cards = scores.groupby(["day", "customer_id"], as_index=False).agg(score=(score, "max"), fraud=("tx_fraud", "max"))
    caught: set[float] = set()
    shares = []
    for _, day in cards.groupby("day"):
        remaining = day[~day["customer_id"].isin(caught)]
        top = remaining.sort_values(["score", "customer_id"], ascending=[False, True]).head(cards_per_day)
        compromised = top.loc[top["fraud"] == 1, "customer_id"]
        shares.append(len(compromised) / cards_per_day)
        caught.update(compromised)
    return math.fsum(shares) / len(shares) if shares else None


def evaluation_tables(scores: pd.DataFrame, alerts_per_day: int = 100) -> dict[str, Table]:
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
        "thresholds": [_threshold(ranked, budget) for budget in BUDGETS],
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
        **_ranking(is_fraud, rows["score"]),
        **_share("precision_at_budget", rows, is_alert * is_fraud, is_alert),
        **_share("recall_at_budget", rows, is_alert * is_fraud, is_fraud),
    }


def _scenario(scenario: int, frauds: pd.DataFrame, alerts_per_day: int) -> dict[str, Any]:
    caught = frauds["rank"] <= alerts_per_day
    return {
        "scenario": scenario,
        "frauds": len(frauds),
        "caught": int(caught.sum()),
        **_share("recall_at_budget", frauds, caught, frauds["tx_fraud"]),
    }


def _threshold(ranked: pd.DataFrame, budget: int) -> dict[str, Any]:
    is_alert, is_fraud, amount = ranked["rank"] <= budget, ranked["tx_fraud"], ranked["tx_amount"]
    caught = is_alert * is_fraud
    return {
        "alerts_per_day": budget,
        **_share("precision", ranked, caught, is_alert),
        **_share("recall", ranked, caught, is_fraud),
        "amount_caught": round(float((caught * amount).sum()), 2),
        **_share("amount_share", ranked, caught * amount, is_fraud * amount),
    }


def _share(name: str, rows: pd.DataFrame, part: pd.Series, whole: pd.Series) -> dict[str, float | None]:
    """Share sum(part) / sum(whole) with its interval; rows are clustered by customer, as they are not independent."""
    import numpy as np

    counted = (whole > 0).to_numpy()
    x, y = (values.to_numpy(dtype=np.float64)[counted] for values in (part, whole))
    total = y.sum()
    names = (name, f"{name}_lower", f"{name}_upper")
    if total == 0:
        return dict.fromkeys(names)
    # Each row without a customer is a separate cluster.
    customers = np.unique(rows["customer_id"].to_numpy()[counted], return_inverse=True, equal_nan=False)[1]
    x, y = np.bincount(customers, x), np.bincount(customers, y)
    share = x.sum() / total
    variance = ((x - share * y) ** 2).sum() / total**2 * len(y) / max(1, len(y) - 1)
    lower, upper = share_interval(share, variance, customers=len(y), rows=int(counted.sum()))
    return dict(zip(names, (float(share), lower, upper), strict=True))


def share_interval(share: float, variance: float, *, customers: int, rows: int) -> tuple[float, float]:
    """Interval of a share, the sum of x over the sum of y of customers c with 0 <= x_c <= y_c.

    This is Wilson's interval for the number of independent draws with the same variance, at most `rows`, multiplied by
    (t_{rows-1} / t_{customers-1})^2 of Student's distribution, because few customers give a poor variance estimate:
    Korn and Graubard's effective sample size, 1998, Survey Methodology 24, 193 to 201. If the share is 0 or 1, or there
    is only one customer, each customer counts as one draw.

    `variance` is C / (C - 1) times the sum of (x_c - share * y_c)^2 over (sum of y)^2, where C is `customers`: the
    variance of a ratio of sums over independent customers (Cochran, Sampling Techniques, 1977, chapter 6).
    """
    from scipy.stats import t

    if customers < 2 or share in (0.0, 1.0):
        return wilson_interval(share, customers)
    draws = min(rows, share * (1 - share) / variance) if variance > 0 else rows
    quantile = (1 + CONFIDENCE) / 2
    return wilson_interval(share, draws * float(t.ppf(quantile, rows - 1) / t.ppf(quantile, customers - 1)) ** 2)


def wilson_interval(share: float, draws: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of `draws` independent draws; `draws` need not be an integer.

    Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    scale = 1 + z * z / draws
    middle = (share + z * z / (2 * draws)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / draws + (z / (2 * draws)) ** 2)
    # At 0 and 1, rounding errors could put a bound on the wrong side of the share.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def _records(**columns: npt.NDArray[Any]) -> Table:
    """Convert columns to rows of plain Python numbers."""
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]
