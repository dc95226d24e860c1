"""Average precision and ROC AUC of one or two models on the same rows, with bootstrap intervals over customers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Floats = npt.NDArray[np.float64]
    Integers = npt.NDArray[np.int64]


class Clusters(NamedTuple):
    """Resampling units: the cluster of each row, the number of clusters, and the number of known customers."""

    codes: Integers
    number: int
    customers: int


def customer_clusters(label: Array, models: Sequence[Array], customer_id: Array) -> Clusters:
    """Assign rows to clusters: one per customer, and one per row without a customer (NaN).

    `models` are the scores of one or two models.
    """
    import numpy as np

    codes = customer_codes(customer_id)
    single = np.flatnonzero(np.isnan(customer_id))
    known = len(label) and int(codes.max()) + 1 - len(single)
    # Number single rows by content, so that file order has no effect; rows with equal content are interchangeable.
    ranks = [_dense_rank(scores[single]) for scores in models]
    order = np.lexsort((ranks[0], ranks[0] + ranks[-1], label[single]))
    codes[single[order]] = known + np.arange(len(single))
    return Clusters(codes, known + len(single), known)


def customer_codes(customer_id: Array) -> Integers:
    """Number of each row's customer, from 0 in the order of their ids; a row without one (NaN) has its own number."""
    import numpy as np

    codes = np.empty(len(customer_id), np.int64)
    unknown = np.isnan(customer_id)
    known, codes[~unknown] = np.unique(customer_id[~unknown], return_inverse=True)
    codes[unknown] = len(known) + np.arange(unknown.sum())
    return codes


def bootstrap_figures(
    label: Array,
    models: Sequence[Array],
    clusters: Clusters,
    *,
    confidence: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, float | int]:
    """``average_precision`` and ``roc_auc``, each also with ``…_lower``, ``…_upper``, ``…_standard_error``.

    With two models, the challenger's scores come first; ``champion_…`` and ``…_difference`` (challenger minus
    champion) are added. ``replicates`` is the number of replicates with both frauds and genuine rows, in which the
    figures are defined; `label` must have both.

    Each replicate gives every customer a weight drawn from a Poisson distribution of mean 1, the same for both
    models, which applies to all rows of the customer. This is the bootstrap (Efron, 1979,
    https://doi.org/10.1214/aos/1176344552; percentile interval: Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13) with the multinomial numbers of draws replaced by their limit, independent Poisson
    draws (Hanley and MacGibbon, 2006, https://doi.org/10.1016/j.cmpb.2006.04.006; Chamandy, Muralidharan, Najmi and
    Naidu, Estimating Uncertainty for Massive Data Streams, Google, 2012). Each model's scores are sorted only once: a
    replicate is a gather and one pass of sums. The interval lies between the percentiles (1 ± confidence) / 2.

    The order of the rows has no effect: weights are assigned to customers by id, and to rows without a customer by
    label and scores.
    """
    import numpy as np

    rankings = [Ranking.of(label, scores) for scores in models]
    codes = [clusters.codes[ranking.order] for ranking in rankings]
    estimates = [ranking.figures(np.ones(len(label), np.uint8)) for ranking in rankings]
    drawn = np.empty((len(rankings), 2, replicates))
    for replicate, weights in enumerate(poisson_weights(clusters.number, replicates, seed)):
        for model, ranking in enumerate(rankings):
            drawn[model, :, replicate] = ranking.figures(weights[codes[model]])
    drawn = drawn[:, :, ~np.isnan(drawn[0, 0])]

    figures: dict[str, float | int] = {"replicates": drawn.shape[2]}

    def add(name: str, estimate: float, values: Floats) -> None:
        lower, upper = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
        figures[name] = estimate
        figures[f"{name}_lower"], figures[f"{name}_upper"] = float(lower), float(upper)
        figures[f"{name}_standard_error"] = float(values.std(ddof=1))

    for column, figure in enumerate(("average_precision", "roc_auc")):
        add(figure, estimates[0][column], drawn[0, column])
        if len(rankings) == 2:
            add(f"champion_{figure}", estimates[1][column], drawn[1, column])
            difference = estimates[0][column] - estimates[1][column]
            add(f"{figure}_difference", difference, drawn[0, column] - drawn[1, column])
    return figures


def poisson_weights(clusters: int, replicates: int, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield, for each replicate, a Poisson(1) weight per cluster."""
    import numpy as np

    # Inverse distribution function on a grid of 65,536 steps.
    table = np.zeros(1 << 16, np.uint8)
    below = 0.0
    for value in range(20):
        table[round(below * (1 << 16)) :] = value
        below += math.exp(-1) / math.factorial(value)
    # Raw words of a specific generator, which numpy guarantees to be stable across versions.
    generator = np.random.PCG64(seed)
    for _ in range(replicates):
        words = generator.random_raw(clusters // 4 + 1).astype("<u8", copy=False)
        yield table[words.view("<u2")[:clusters]]


class Ranking(NamedTuple):
    """Rows in descending order of one model's scores, and the positions of the frauds in that order.

    Both figures depend only on groups of equal scores that contain a fraud, and on the total weight of the rows
    between them. `cuts` are the positions where such groups begin or end, excluding the end of the last row; `begin`
    and `end` index each group's bounds in the cumulative sums at the cuts.
    """

    order: Integers
    frauds: Integers
    first_fraud: Integers
    cuts: Integers
    begin: Integers
    end: Integers

    @staticmethod
    def of(label: Array, scores: Array) -> Ranking:
        """Create a ranking; `label` is 1 for a fraud."""
        import numpy as np

        rows = len(label)
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        is_start = np.concatenate(([True], ranked[1:] != ranked[:-1]))
        group = np.cumsum(is_start) - 1
        bounds = np.append(np.flatnonzero(is_start), rows)
        frauds = np.flatnonzero(label[order])
        with_fraud, first_fraud = np.unique(group[frauds], return_index=True)
        begin, end = bounds[with_fraud], bounds[with_fraud + 1]
        cuts = np.unique(np.concatenate(([0], begin, end)))
        return Ranking(
            order, frauds, first_fraud, cuts[cuts < rows], np.searchsorted(cuts, begin), np.searchsorted(cuts, end)
        )

    def figures(self, weight: Array) -> tuple[float, float]:
        """Average precision and ROC AUC with these weights of the rows in ranked order; NaN if undefined.

        Average precision is the sum over the distinct scores, from the highest, of (R_i - R_i-1) P_i, where R_i and
        P_i are recall and precision of the rows with that score or a higher one: scikit-learn's
        ``average_precision_score``. ROC AUC is the share of pairs in which the fraud has a higher score than the
        genuine row, ties counted half (Hanley and McNeil, 1982, https://doi.org/10.1148/radiology.143.1.7063747).
        """
        import numpy as np

        frauds = np.add.reduceat(weight[self.frauds], self.first_fraud, dtype=np.int64)
        frauds_so_far = np.cumsum(frauds)
        rows = np.zeros(len(self.cuts) + 1, np.int64)
        np.cumsum(np.add.reduceat(weight, self.cuts, dtype=np.int64), out=rows[1:])
        all_frauds = int(frauds_so_far[-1])
        all_genuine = int(rows[-1]) - all_frauds
        if all_frauds == 0 or all_genuine == 0:
            return math.nan, math.nan
        rows_so_far = rows[self.end]
        precision = frauds_so_far / np.maximum(rows_so_far, 1)
        genuine_above = rows_so_far - frauds_so_far
        genuine_above += rows[self.begin] - (frauds_so_far - frauds)
        outranked = all_genuine - genuine_above / 2
        return (
            float((frauds * precision).sum()) / all_frauds,
            float((frauds * outranked).sum()) / (all_frauds * all_genuine),
        )


def same_ranking(scores: Array, other: Array) -> bool:
    """Return True if two models rank all rows alike, up to rounding errors of the scores."""
    import numpy as np

    # Float sums depend on the order of addition, which varies in Spark.
    if np.allclose(scores, other, rtol=1e-9, atol=1e-12):
        return True
    return bool(np.array_equal(_dense_rank(scores), _dense_rank(other)))


def _dense_rank(values: Array) -> Integers:
    import numpy as np

    return np.unique(values, return_inverse=True)[1]
