"""Metrics of scores with known labels: ranking, card precision, alert budgets, shares with intervals.

All functions work on a DataFrame with one row per transaction: ``transaction_id``, ``day`` (a number), ``customer_id``
(float, NaN if unknown), ``tx_fraud`` (0 or 1) and a column of scores.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from spark_jobs.evaluation.bootstrap import customer_codes

if TYPE_CHECKING:
    import pandas as pd

#: Cards checked per day in the handbook's card precision.
CARDS_PER_DAY = 100

#: Confidence of the intervals of shares.
CONFIDENCE = 0.95


def evaluate(scores: pd.DataFrame, score: str, alerts_per_day: int) -> dict[str, Any]:
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
        **ranking_figures(scores["tx_fraud"], scores[score]),
        "card_precision_at_100": card_precision(scores, score, CARDS_PER_DAY),
        "precision_at_budget": caught / len(alerts) if len(alerts) else None,
        "recall_at_budget": caught / frauds if frauds else None,
        "rows": len(scores),
        "frauds": frauds,
    }


def ranking_figures(label: pd.Series, score: pd.Series) -> dict[str, float | None]:
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


def share_of(name: str, rows: pd.DataFrame, part: pd.Series, whole: pd.Series) -> dict[str, float | None]:
    """Share sum(part) / sum(whole) with its interval; rows are clustered by customer, as they are not independent."""
    import numpy as np

    counted = (whole > 0).to_numpy()
    x, y = (values.to_numpy(dtype=np.float64)[counted] for values in (part, whole))
    total = y.sum()
    names = (name, f"{name}_lower", f"{name}_upper")
    if total == 0:
        return dict.fromkeys(names)
    customers = customer_codes(rows["customer_id"].to_numpy()[counted])
    x, y = np.bincount(customers, x), np.bincount(customers, y)
    share = x.sum() / total
    variance = ((x - share * y) ** 2).sum() / total**2 * len(y) / max(1, len(y) - 1)
    lower, upper = share_interval(share, variance, customers=len(y), rows=int(counted.sum()))
    return dict(zip(names, (float(share), lower, upper)))


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
    """Wilson's 95% score interval of a share of `draws` independent draws; `draws` need not be an integer.

    Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    scale = 1 + z * z / draws
    middle = (share + z * z / (2 * draws)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / draws + (z / (2 * draws)) ** 2)
    # At 0 and 1, rounding errors could put a bound on the wrong side of the share.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
