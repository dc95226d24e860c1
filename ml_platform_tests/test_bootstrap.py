"""The bootstrap gives the figures of a naive implementation with scikit-learn's metrics, and resamples customers."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.promotion import scored_week
from spark_jobs.evaluation.bootstrap import Clusters, bootstrap_figures, customer_clusters, poisson_weights

Rows = dict[str, np.ndarray]


@st.composite
def labelled_rows(draw: st.DrawFn) -> Rows:
    """A few dozen rows with many ties, scores of two models, and customers, of whom some are unknown."""
    label = draw(
        st.lists(st.integers(0, 1), min_size=12, max_size=60).filter(lambda drawn: 0 < sum(drawn) < len(drawn))
    )

    def column(highest: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(0, highest), min_size=len(label), max_size=len(label))), float)

    customer_id = column(15)
    customer_id[customer_id >= draw(st.integers(4, 16))] = np.nan
    return {
        "label": np.array(label),
        "challenger": column(12) / 16,
        "champion": column(12) / 16,
        "customer_id": customer_id,
    }


def models_and_clusters(rows: Rows) -> tuple[list[np.ndarray], Clusters]:
    models = [rows["challenger"], rows["champion"]]
    return models, customer_clusters(rows["label"], models, rows["customer_id"])


def naive_figures(rows: Rows, *, confidence: float, replicates: int, seed: int) -> dict[str, float]:
    """The same figures, by scikit-learn from all rows in each replicate; empty with fewer than two replicates."""
    label, clusters = rows["label"], models_and_clusters(rows)[1]

    def values_of(weight: np.ndarray | None) -> dict[str, float]:
        values = {}
        for name, metric in (("average_precision", average_precision_score), ("roc_auc", roc_auc_score)):
            ours, theirs = (metric(label, rows[m], sample_weight=weight) for m in ("challenger", "champion"))
            values |= {name: ours, f"champion_{name}": theirs, f"{name}_difference": ours - theirs}
        return values

    weights = [drawn[clusters.codes] for drawn in poisson_weights(clusters.number, replicates, seed)]
    drawn = [values_of(weight) for weight in weights if weight[label == 1].any() and weight[label == 0].any()]
    figures: dict[str, float] = {"replicates": len(drawn)} if len(drawn) > 1 else {}
    for name, estimate in values_of(None).items() if figures else ():
        values = [each[name] for each in drawn]
        lower, upper = np.quantile(values, [(1 - confidence) / 2, 1 - (1 - confidence) / 2])
        figures |= {name: estimate, f"{name}_lower": lower, f"{name}_upper": upper}
        figures[f"{name}_standard_error"] = np.std(values, ddof=1)
    return figures


@settings(max_examples=20)
@given(labelled_rows(), st.sampled_from([0.5, 0.95]), st.integers(0, 3))
def test_figures_are_those_of_the_naive_bootstrap(rows: Rows, confidence: float, seed: int):
    """With ties, unknown customers, and replicates that have no frauds or nothing but frauds."""
    sizes = {"confidence": confidence, "replicates": 6, "seed": seed}
    expected = naive_figures(rows, **sizes)
    assume(expected)
    models, clusters = models_and_clusters(rows)
    figures = bootstrap_figures(rows["label"], models, clusters, **sizes)
    assert figures == pytest.approx(expected, abs=1e-12)
    alone = bootstrap_figures(rows["label"], models[:1], clusters, **sizes)
    assert alone == {name: value for name, value in figures.items() if "champion" not in name and "diff" not in name}


def test_figures_of_many_distinct_scores_are_those_of_the_naive_bootstrap():
    rows = scored_week(1)
    figures = bootstrap_figures(rows["label"], *models_and_clusters(rows), replicates=10)
    assert figures == pytest.approx(naive_figures(rows, confidence=0.95, replicates=10, seed=0), abs=1e-12)


def test_weights_are_poisson_of_mean_1_and_follow_the_seed():
    drawn = np.concatenate(list(poisson_weights(400_000, 5, seed=0)))
    assert drawn.mean() == pytest.approx(1, abs=4e-3)
    assert drawn.var() == pytest.approx(1, abs=6e-3)
    for value, factorial in enumerate((1, 1, 2, 6, 24)):
        assert (drawn == value).mean() == pytest.approx(np.exp(-1) / factorial, abs=2e-3)
    first, again, other = (next(poisson_weights(1000, 1, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rows_of_a_customer_are_not_independent_evidence():
    """The same row four times over is no more evidence than once; only clusters show that."""
    once = scored_week(4, rows=3000, frauds=150) | {"customer_id": np.arange(3000.0)}
    often = {name: np.repeat(values, 4) for name, values in once.items()}
    unknown = often | {"customer_id": np.full(12_000, np.nan)}
    single, repeated, independent = (
        bootstrap_figures(rows["label"], *models_and_clusters(rows), replicates=300) for rows in (once, often, unknown)
    )
    assert repeated == pytest.approx(single, abs=1e-12)
    name = "average_precision_difference_standard_error"
    assert independent[name] < 0.6 * single[name]


def test_every_row_of_an_unknown_customer_is_a_cluster_of_its_own():
    rows = scored_week(27, rows=600, frauds=60)
    rows["customer_id"] = np.where(np.arange(600) < 200, np.arange(600) // 2, np.nan)
    codes, number, customers = models_and_clusters(rows)[1]
    assert (number, customers) == (500, 100)
    assert np.array_equal(codes[:200], np.arange(200) // 2)
    assert sorted(codes[200:]) == list(range(100, 500))


def test_memory_does_not_grow_with_the_replicates():
    rows = scored_week(8, rows=50_000)

    def peak(replicates: int) -> int:
        tracemalloc.start()
        bootstrap_figures(rows["label"], *models_and_clusters(rows), replicates=replicates)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(60) < peak(10) + 500_000  # a replicate's weights of the rows are 50 kB
