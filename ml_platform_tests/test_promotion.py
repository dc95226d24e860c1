"""The gate's figures are exact, its interval is honest, and every case has the decision that it is to have."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from ml_platform.model.promotion import (
    MIN_FRAUD_CUSTOMERS,
    Facts,
    PromotionRule,
    Scores,
    _Clusters,
    _poisson_table,
    average_precision,
    average_precision_interval,
    decide,
    delong,
    paired_bootstrap,
    roc_auc,
)

#: Enough for a test that does not depend on the last percent.
QUICK = PromotionRule(replicates=200)

UNSEEN = {"champion_train_last_date": date(2019, 11, 30), "test_first_date": date(2019, 12, 8)}
COMPARABLE = Facts(champion="3", **UNSEEN)


def week(
    seed: int,
    *,
    rows: int = 4000,
    frauds: int = 120,
    customers: int = 400,
    challenger: float = 1.0,
    champion: float = 1.0,
) -> dict[str, np.ndarray]:
    """Held-out rows that two models of the given strengths have scored; equal strengths are equally good models.

    Their scores have a part in common, a part of their own, and a part that the rows of a customer share.
    """
    random = np.random.default_rng(seed)
    label = np.zeros(rows, np.int64)
    label[random.choice(rows, frauds, replace=False)] = 1
    customer = random.integers(0, customers, rows)
    common = random.normal(size=rows)
    scored = {
        name: 2.2 * strength * label
        + common
        + random.normal(scale=0.8, size=rows)
        + random.normal(scale=0.5, size=customers)[customer]
        for name, strength in (("challenger", challenger), ("champion", champion))
    }
    return {"label": label, **scored, "customer_id": customer}


def without_champion(rows: dict[str, np.ndarray]) -> Scores:
    return Scores(rows["label"], rows["challenger"], None, rows["customer_id"])


# Figures


@st.composite
def labelled_rows(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """A few dozen rows with many ties, scores of two models, customers, and weights."""
    label = draw(
        st.lists(st.integers(0, 1), min_size=12, max_size=60).filter(lambda drawn: 0 < sum(drawn) < len(drawn))
    )
    rows = len(label)

    def column(values: st.SearchStrategy[int]) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=rows, max_size=rows)))

    return {
        "label": np.array(label),
        "challenger": column(st.integers(0, 12)) / 16,
        "champion": column(st.integers(0, 12)) / 16,
        "customer_id": column(st.integers(-3, 12)),
        "weight": column(st.integers(0, 3)),
    }


def data(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in rows.items() if name != "weight"}


@settings(deadline=None)
@given(labelled_rows())
def test_figures_are_those_of_scikit_learn_with_ties_and_weights(rows: dict[str, np.ndarray]):
    label, score, weight = rows["label"], rows["challenger"], rows["weight"]
    assert average_precision(label, score) == pytest.approx(average_precision_score(label, score), abs=1e-12)
    assert roc_auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    if weight[label == 1].any() and weight[label == 0].any():
        assert average_precision(label, score, weight) == pytest.approx(
            average_precision_score(label, score, sample_weight=weight), abs=1e-12
        )
        assert roc_auc(label, score, weight) == pytest.approx(
            roc_auc_score(label, score, sample_weight=weight), abs=1e-12
        )


def test_figures_of_many_distinct_scores():
    rows = week(1)
    assert average_precision(rows["label"], rows["challenger"]) == pytest.approx(
        average_precision_score(rows["label"], rows["challenger"]), abs=1e-12
    )
    assert roc_auc(rows["label"], rows["challenger"]) == pytest.approx(
        roc_auc_score(rows["label"], rows["challenger"]), abs=1e-12
    )


def test_figures_by_hand():
    # From the top: fraud, genuine, then one of each with equal scores.
    assert average_precision([1, 0, 1, 0], [0.9, 0.8, 0.5, 0.5]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert roc_auc([1, 0, 1, 0], [0.9, 0.8, 0.5, 0.5]) == pytest.approx((2 + 0.5) / 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0], [1.0, 2.0]), "without frauds"),
        (([1, 1], [1.0, 2.0]), "without genuine"),
        (([1, 0], [1.0, 2.0], [0, 1]), "without frauds"),
        (([1, 0], [1.0, 2.0], [1, 0.5]), "whole numbers"),
        (([1, 0], [1.0, 2.0], [1, -1]), "whole numbers"),
        (([1, 2], [1.0, 2.0]), "label takes 1"),
        (([1, 0], [1.0, np.nan]), "1 rows without a finite number"),
        (([1, 0], [1.0, 2.0, 3.0]), "each of the 2 rows"),
    ],
)
def test_unusable_rows_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        average_precision(*arguments)


# Bootstrap


def test_weights_are_poisson():
    table = _poisson_table().astype(float)
    assert table.mean() == pytest.approx(1, abs=1e-4)
    assert table.var() == pytest.approx(1, abs=1e-3)
    assert (table == 0).mean() == pytest.approx(np.exp(-1), abs=1e-5)
    assert (table == 3).mean() == pytest.approx(np.exp(-1) / 6, abs=2e-5)


def test_bootstrap_agrees_with_plain_resampling_of_customers():
    rows = week(2, rows=1500, frauds=90, customers=150)
    random = np.random.default_rng(0)
    of_customer = [np.flatnonzero(rows["customer_id"] == customer) for customer in np.unique(rows["customer_id"])]
    differences = []
    for _ in range(600):
        drawn = np.concatenate([of_customer[number] for number in random.integers(0, 150, 150)])
        label = rows["label"][drawn]
        ours, theirs = rows["challenger"][drawn], rows["champion"][drawn]
        differences.append(
            (
                average_precision_score(label, ours) - average_precision_score(label, theirs),
                roc_auc_score(label, ours) - roc_auc_score(label, theirs),
            )
        )
    found = paired_bootstrap(**rows, replicates=2000)
    for comparison, plain in zip((found.average_precision, found.roc_auc), np.transpose(differences), strict=True):
        # The standard error of 600 draws is known to about 3 %.
        assert comparison.difference.standard_error == pytest.approx(plain.std(ddof=1), rel=0.1)
        plain_bounds = np.quantile(plain, [0.025, 0.975])
        width = plain_bounds[1] - plain_bounds[0]
        assert comparison.difference[1:3] == pytest.approx(plain_bounds, abs=0.1 * width)


def test_bootstrap_of_independent_rows_agrees_with_delong():
    rows = week(3, rows=6000, frauds=200, customers=10**6)
    found = paired_bootstrap(rows["label"], rows["challenger"], rows["champion"], replicates=3000)
    expected = delong(rows["label"], rows["challenger"], rows["champion"])
    assert found.roc_auc.difference.estimate == pytest.approx(expected.difference, abs=1e-12)
    assert found.roc_auc.difference.standard_error == pytest.approx(expected.standard_error, rel=0.06)
    assert found.roc_auc.difference.lower == pytest.approx(expected.lower, abs=0.15 * expected.standard_error)


def test_rows_of_a_customer_are_not_independent_evidence():
    """The same row four times over is no more evidence than once; only clusters know that."""
    rows = week(4, rows=3000, frauds=150)
    once = rows | {"customer_id": np.arange(3000)}
    often = {name: np.repeat(values, 4) for name, values in once.items()}
    single, repeated = (paired_bootstrap(**each).average_precision.difference for each in (once, often))
    assert repeated == pytest.approx(single, abs=1e-12)
    assert paired_bootstrap(**(often | {"customer_id": None})).average_precision.difference.standard_error < (
        0.6 * single.standard_error
    )


def test_single_model_has_the_interval_that_it_has_in_a_pair():
    rows = week(5)
    pair = paired_bootstrap(**rows, replicates=300, seed=9)
    arguments = (rows["label"], rows["challenger"], rows["customer_id"])
    alone = average_precision_interval(*arguments, replicates=300, seed=9)
    assert alone == pair.average_precision.challenger
    assert alone.lower < alone.estimate < alone.upper
    assert alone.estimate == pytest.approx(average_precision_score(rows["label"], rows["challenger"]), abs=1e-12)


def test_every_row_of_an_unknown_customer_is_a_cluster_of_its_own():
    rows = week(27, rows=600, frauds=60)
    ids = np.where(np.arange(600) < 200, np.arange(600) // 2, np.nan)
    clusters = _Clusters.of(Scores(rows["label"], rows["challenger"], rows["champion"], ids))
    assert (clusters.number, clusters.customers) == (500, 100)
    assert np.array_equal(clusters.codes[:200], np.arange(200) // 2)
    assert sorted(clusters.codes[200:]) == list(range(100, 500))


def test_bootstrap_is_reproducible_and_follows_the_seed():
    rows = week(6)
    assert paired_bootstrap(**rows, replicates=200, seed=1) == paired_bootstrap(**rows, replicates=200, seed=1)
    assert paired_bootstrap(**rows, replicates=200, seed=1) != paired_bootstrap(**rows, replicates=200, seed=2)


def test_a_higher_confidence_has_a_wider_interval():
    rows = week(7)
    narrow, wide = (
        paired_bootstrap(**rows, confidence=confidence).average_precision.difference for confidence in (0.5, 0.99)
    )
    assert wide.lower < narrow.lower < narrow.upper < wide.upper


def test_memory_does_not_grow_with_the_replicates():
    rows = week(8, rows=50_000)

    def peak(replicates: int) -> int:
        tracemalloc.start()
        paired_bootstrap(**rows, replicates=replicates)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(800) < peak(200) + 1_000_000


def test_replicates_without_frauds_are_left_out():
    # All frauds are one customer's, who has no weight in about 37 % of the replicates.
    customers = np.repeat(np.arange(10), 4)
    label = (customers == 0).astype(int)
    found = paired_bootstrap(label, np.arange(40), -np.arange(40), customers, replicates=1000)
    assert 560 < found.replicates < 700
    assert np.isfinite(found.average_precision.difference).all()


@settings(max_examples=40, deadline=None)
@given(labelled_rows())
def test_swapping_the_models_mirrors_the_interval(rows: dict[str, np.ndarray]):
    assume(len(np.unique(rows["customer_id"])) >= 5)
    there = paired_bootstrap(**data(rows), replicates=200)
    swapped = data(rows) | {"challenger": rows["champion"], "champion": rows["challenger"]}
    back = paired_bootstrap(**swapped, replicates=200)
    for one, other in zip(there[:2], back[:2], strict=True):
        assert one.challenger == other.champion
        assert one.difference.estimate == -other.difference.estimate
        assert one.difference.lower == pytest.approx(-other.difference.upper, abs=1e-12)
        assert one.difference.standard_error == pytest.approx(other.difference.standard_error, abs=1e-12)
    if 2 <= rows["label"].sum() <= len(rows["label"]) - 2:
        one, other = (delong(each["label"], each["challenger"], each["champion"]) for each in (rows, swapped))
        assert one.lower == pytest.approx(-other.upper, abs=1e-12)
        assert one.p_value == pytest.approx(other.p_value, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(labelled_rows(), st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_the_rows_plays_no_part(rows: dict[str, np.ndarray], random, some_unknown: bool):
    given_rows = data(rows)
    if some_unknown:
        ids = rows["customer_id"]
        given_rows["customer_id"] = np.where(ids < 2, np.nan, ids)
    assume(some_unknown or len(np.unique(rows["customer_id"])) >= 5)
    order = list(range(len(rows["label"])))
    random.shuffle(order)
    shuffled = {name: values[order] for name, values in given_rows.items()}
    assert paired_bootstrap(**given_rows, replicates=200) == paired_bootstrap(**shuffled, replicates=200)


@settings(max_examples=40, deadline=None)
@given(labelled_rows(), st.integers(-8, 8), st.integers(-8, 8))
def test_adding_a_constant_to_scores_changes_nothing(rows: dict[str, np.ndarray], ours: int, theirs: int):
    given_rows = data(rows) | {"customer_id": None}
    shifted = given_rows | {"challenger": rows["challenger"] + ours / 4, "champion": rows["champion"] + theirs / 4}
    assert paired_bootstrap(**given_rows, replicates=200) == paired_bootstrap(**shifted, replicates=200)
    if 2 <= rows["label"].sum() <= len(rows["label"]) - 2:
        one, other = (delong(each["label"], each["challenger"], each["champion"]) for each in (given_rows, shifted))
        assert one == other


# DeLong


def test_delong_agrees_with_its_definition():
    """Sums over all pairs of a fraud and a genuine row, as DeLong et al. write them, with ties."""
    rows = week(10, rows=300, frauds=40)
    label = rows["label"]
    fraud_parts, genuine_parts = [], []
    for score in (np.round(rows["challenger"], 1), np.round(rows["champion"], 1)):
        above = score[label == 1][:, None] - score[label == 0][None, :]
        pairs = (above > 0) + 0.5 * (above == 0)
        assert (above == 0).any()
        fraud_parts.append(pairs.mean(axis=1))
        genuine_parts.append(pairs.mean(axis=0))
    covariance = np.cov(fraud_parts) / 40 + np.cov(genuine_parts) / 260
    contrast = np.array([1, -1])
    found = delong(label, np.round(rows["challenger"], 1), np.round(rows["champion"], 1))
    assert found.standard_error == pytest.approx(np.sqrt(contrast @ covariance @ contrast), rel=1e-9)
    assert found.difference == pytest.approx(fraud_parts[0].mean() - fraud_parts[1].mean(), abs=1e-12)
    assert found.challenger == pytest.approx(roc_auc_score(label, np.round(rows["challenger"], 1)), abs=1e-12)
    assert found.upper - found.lower == pytest.approx(2 * 1.959964 * found.standard_error, rel=1e-6)


def test_delong_of_equal_and_of_opposite_models():
    label = [1, 1, 0, 0]
    assert delong(label, [4, 3, 2, 1], [4, 3, 2, 1]).p_value == 1
    opposite = delong(label, [4, 3, 2, 1], [1, 2, 3, 4])
    assert (opposite.difference, opposite.standard_error, opposite.p_value) == (1, 0, 0)
    with pytest.raises(ValueError, match="at least two frauds"):
        delong([1, 0, 0], [1, 2, 3], [1, 2, 3])


# The rule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"margin": -0.01}, "margin is -0.01"),
        ({"margin": 1}, "margin is 1"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"confidence": 1}, "confidence is 1"),
        ({"confidence": 95}, "confidence is 95"),
        ({"replicates": 199}, "replicates is 199: an interval with confidence 0.95 takes 200 or more"),
        ({"replicates": 500, "confidence": 0.99}, "takes 1,000 or more"),
        ({"min_frauds": 1}, "min_frauds is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"mode": "off"}, "mode is 'off'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PromotionRule(**values)


def test_the_defaults_and_the_limits_of_a_rule_are_accepted():
    PromotionRule()
    PromotionRule(margin=0.999, confidence=0.99, replicates=1000, min_frauds=2)


def test_contradictions_are_refused():
    rows = week(11, rows=500, frauds=60)
    with pytest.raises(ValueError, match="no champion: give its version"):
        decide(QUICK, Scores(**rows), Facts())
    with pytest.raises(ValueError, match="no champion: give its version"):
        Facts(champion_error="gone")
    with pytest.raises(ValueError, match="give its error"):
        Facts(champion="3", champion_newer_library=True)
    with pytest.raises(ValueError, match="either scores"):
        decide(QUICK, without_champion(rows), Facts(champion="1"))
    with pytest.raises(ValueError, match="either scores"):
        decide(QUICK, Scores(**rows), Facts(champion="1", champion_error="gone"))
    with pytest.raises(ValueError, match="no held-out rows"):
        decide(QUICK, Scores([], []), Facts())
    with pytest.raises(ValueError, match="customer_id takes numbers"):
        Scores([1, 0], [1, 2], customer_id=["a", None])
    with pytest.raises(ValueError, match="each of the 2 rows"):
        Scores([1, 0], [1, 2], customer_id=[1])
    with pytest.raises(ValueError, match="champion has 1 rows without"):
        Scores([1, 0], [1, 2], [1, None])


def test_a_better_challenger_is_promoted():
    decision = decide(QUICK, Scores(**week(12, challenger=1.5)), COMPARABLE)
    assert (decision.outcome, decision.promote, decision.apply) == ("better", True, True)
    assert decision.figures["average_precision_difference_lower"] > 0
    first = decision.reasons[0]
    assert first.startswith("The challenger is better: average precision ")
    assert f"{decision.figures['average_precision_difference']:+.4f}" in first
    assert "champion (version 3)" in first
    assert "4,000 rows with 120 frauds, 400 customers" in first
    assert not any("features" in reason or "seen" in reason for reason in decision.reasons)
    assert any("DeLong" in reason for reason in decision.reasons)


def test_a_worse_challenger_is_not():
    decision = decide(QUICK, Scores(**week(12, champion=1.5)), COMPARABLE)
    assert (decision.outcome, decision.promote, decision.apply) == ("not_better", False, False)
    assert decision.reasons[0].startswith("The challenger is worse: ")


def test_a_higher_figure_within_the_noise_is_not_enough():
    decision = decide(QUICK, Scores(**week(14, challenger=1.02)), COMPARABLE)
    assert decision.figures["average_precision_difference"] > 0
    assert (decision.outcome, decision.promote) == ("not_better", False)
    assert decision.reasons[0].startswith("The challenger is not clearly better: ")


def test_the_margin_is_held_against_the_lower_bound():
    scores = Scores(**week(12, challenger=1.5))
    lower = decide(QUICK, scores, COMPARABLE).figures["average_precision_difference_lower"]
    below, above = (
        decide(PromotionRule(replicates=200, margin=margin), scores, COMPARABLE) for margin in (lower * 0.999, lower)
    )
    assert (below.outcome, below.promote) == ("better", True)
    assert (above.outcome, above.promote) == ("not_better", False)
    assert above.figures["margin"] == lower


def test_a_dry_run_decides_and_leaves_the_champion():
    rule = PromotionRule(replicates=200, mode="dry_run")
    decision = decide(rule, Scores(**week(12, challenger=1.5)), COMPARABLE)
    assert (decision.outcome, decision.promote, decision.apply) == ("better", True, False)
    assert "dry run" in decision.reasons[-1]
    assert decide(rule, without_champion(week(12)), Facts()).apply is False


def test_the_first_model_is_promoted():
    decision = decide(QUICK, without_champion(week(15)), Facts())
    assert (decision.outcome, decision.promote, decision.apply) == ("first_model", True, True)
    assert decision.reasons[0] == "There is no champion, so the first model becomes it."
    assert len(decision.reasons) == 2
    assert f"{decision.figures['average_precision']:.4f}" in decision.reasons[1]
    assert "champion_average_precision" not in decision.figures


@pytest.mark.parametrize("frauds", [0, 3])
def test_the_first_model_is_promoted_even_if_nothing_can_be_said_of_it(frauds: int):
    rows = week(16, rows=300, frauds=frauds, challenger=0)
    decision = decide(QUICK, without_champion(rows), Facts())
    assert (decision.outcome, decision.promote) == ("first_model", True)
    assert "not clearly better than a random order" in decision.reasons[-1]


def test_an_identical_challenger_makes_no_difference():
    rows = week(17)
    decision = decide(QUICK, Scores(**(rows | {"champion": rows["challenger"]})), COMPARABLE)
    assert (decision.outcome, decision.promote) == ("no_difference", False)
    assert decision.reasons == [
        "The challenger ranks all 4,000 held-out rows as the champion (version 3) does: no difference."
    ]
    assert decision.figures["average_precision_difference_upper"] == 0


def test_the_same_ranking_on_another_scale_makes_no_difference():
    rows = week(17)
    champion = 1 / (1 + np.exp(-rows["challenger"]))
    assert decide(QUICK, Scores(**(rows | {"champion": champion})), COMPARABLE).outcome == "no_difference"


def test_the_last_digits_of_scores_make_no_difference():
    """They differ when Spark sums in another order, and break ties then."""
    rows = week(17)
    tied = np.round(rows["challenger"], 2)
    champion = tied * (1 + np.random.default_rng(0).uniform(-1e-14, 1e-14, len(tied)))
    assert len(np.unique(champion)) > len(np.unique(tied))
    scores = Scores(**(rows | {"challenger": tied, "champion": champion}))
    assert decide(QUICK, scores, COMPARABLE).outcome == "no_difference"


def test_an_identical_challenger_is_named_such_even_with_few_frauds():
    rows = week(17, frauds=5)
    assert decide(QUICK, Scores(**(rows | {"champion": rows["challenger"]})), COMPARABLE).outcome == "no_difference"


def test_a_tie_keeps_the_champion():
    """Two genuine rows change places: another ranking of exactly the same worth."""
    rows = week(18)
    champion = rows["challenger"].copy()
    genuine = np.flatnonzero(rows["label"] == 0)[:2]
    champion[genuine] = champion[genuine[::-1]]
    decision = decide(QUICK, Scores(**(rows | {"champion": champion})), COMPARABLE)
    assert decision.figures["average_precision_difference"] == 0
    assert (decision.outcome, decision.promote) == ("not_better", False)


def test_a_single_lucky_row_does_not_promote():
    """One pair of rows in better order is an improvement of the figure, and no evidence."""
    rows = week(19)
    order = np.argsort(-rows["challenger"])
    above = next(n for n in range(3999) if (rows["label"][order[n]], rows["label"][order[n + 1]]) == (1, 0))
    champion = rows["challenger"].copy()
    champion[order[above : above + 2]] = champion[order[above : above + 2][::-1]]
    decision = decide(PromotionRule(), Scores(**(rows | {"champion": champion})), COMPARABLE)
    assert decision.figures["average_precision_difference"] > 0
    assert (decision.outcome, decision.promote) == ("not_better", False)


def test_too_few_frauds_keep_the_champion():
    scores = Scores(**week(20, frauds=49, challenger=3))
    decision = decide(QUICK, scores, COMPARABLE)
    assert (decision.outcome, decision.promote) == ("too_few_frauds", False)
    assert decision.reasons == [
        "The held-out rows have 49 frauds, fewer than 50: too few to compare models by. The champion (version 3) stays."
    ]
    enough = decide(PromotionRule(replicates=200, min_frauds=49), scores, COMPARABLE)
    assert (enough.outcome, enough.promote) == ("better", True)


def test_no_frauds_at_all_keep_the_champion():
    decision = decide(QUICK, Scores(**week(20, frauds=0)), COMPARABLE)
    assert (decision.outcome, decision.promote) == ("too_few_frauds", False)
    assert "average_precision" not in decision.figures
    assert decision.figures["frauds"] == 0


def test_nothing_but_frauds_keeps_the_champion():
    rows = week(20, rows=400, frauds=400, challenger=3)
    assert decide(QUICK, Scores(**rows), COMPARABLE).outcome == "too_few_frauds"


def test_many_frauds_of_few_customers_are_too_few():
    rows = week(21, challenger=3)
    fraudulent = np.flatnonzero(rows["label"])

    def decide_with(customers: int) -> str:
        ids = rows["customer_id"] + 1000
        ids[fraudulent] = np.arange(len(fraudulent)) % customers
        return decide(QUICK, Scores(**(rows | {"customer_id": ids})), COMPARABLE).outcome

    assert decide_with(MIN_FRAUD_CUSTOMERS - 1) == "too_few_frauds"
    assert decide_with(MIN_FRAUD_CUSTOMERS) == "better"


NEWER = "no column treeID (saved by Spark 4.3.0, read by 3.0.3)"


def test_a_champion_that_a_newer_library_wrote_stays_however_good_the_challenger_is():
    facts = Facts(champion="3", champion_error="the model was written by xgboost 9.0", champion_newer_library=True)
    decision = decide(QUICK, without_champion(week(22)), facts)
    assert (decision.outcome, decision.promote, decision.apply) == ("champion_newer_library", False, False)
    assert "(version 3) could not score the held-out rows: the model was written by xgboost 9.0" in decision.reasons[0]
    assert "ml-platform champion set" in decision.reasons[1]
    assert decide(QUICK, without_champion(week(22)), replace(facts, champion_newer_library=False)).promote


def test_an_unreadable_champion_is_replaced_by_a_model_that_works():
    decision = decide(QUICK, without_champion(week(22)), Facts(champion="3", champion_error=NEWER))
    assert (decision.outcome, decision.promote, decision.apply) == ("champion_unreadable", True, True)
    assert NEWER in decision.reasons[0]
    assert "serves nobody" in decision.reasons[1]


@pytest.mark.parametrize("strength", [0, -1], ids=["random", "upside down"])
def test_an_unreadable_champion_is_not_replaced_by_a_model_that_does_not_work(strength: float):
    rows = week(23, challenger=strength)
    decision = decide(QUICK, without_champion(rows), Facts(champion="3", champion_error=NEWER))
    assert (decision.outcome, decision.promote) == ("champion_unreadable", False)
    assert "not clearly better than a random order" in decision.reasons[1]


def test_a_model_that_only_finds_one_kind_of_fraud_is_better_than_chance_only_if_both_figures_say_so():
    """A tenth of the frauds on top, the rest below all others: high average precision, a ranking worse than chance."""
    rows = week(24)
    fraudulent = np.flatnonzero(rows["label"])
    score = np.random.default_rng(0).normal(size=4000)
    score[fraudulent] -= 10
    score[fraudulent[:30]] += 20
    decision = decide(QUICK, without_champion(rows | {"challenger": score}), Facts(champion="3", champion_error=NEWER))
    assert decision.figures["average_precision_lower"] > decision.figures["fraud_share"]
    assert decision.promote is False


def test_a_model_that_puts_no_fraud_near_the_top_is_not_better_than_chance():
    """All frauds just above the middle: the ROC AUC is better than chance, average precision is not."""
    rows = week(24, frauds=200)
    score = np.linspace(0, 1, 4000)
    score[rows["label"] == 1] = np.linspace(0.46, 0.6, 200)
    decision = decide(QUICK, without_champion(rows | {"challenger": score}), Facts(champion="3", champion_error=NEWER))
    assert decision.figures["roc_auc_lower"] > 0.5
    assert decision.figures["average_precision_lower"] < decision.figures["fraud_share"]
    assert decision.promote is False


def test_an_unreadable_champion_stays_if_too_few_frauds_speak_for_the_challenger():
    rows = week(22, frauds=20, challenger=3)
    decision = decide(QUICK, without_champion(rows), Facts(champion="3", champion_error=NEWER))
    assert (decision.outcome, decision.promote) == ("too_few_frauds", False)
    assert NEWER in decision.reasons[1]


def test_a_champion_whose_features_are_no_longer_built_is_named_such():
    facts = Facts(
        champion="3",
        champion_error="it needs features that these partitions do not have: amount_sum_7d",
        champion_features=("tx_amount", "amount_sum_7d"),
        challenger_features=("tx_amount", "amount_ratio"),
    )
    decision = decide(QUICK, without_champion(week(22)), facts)
    assert (decision.outcome, decision.promote) == ("champion_other_features", True)
    assert "no longer built: amount_sum_7d" in decision.reasons[0]
    broken = decide(QUICK, without_champion(week(23, challenger=0)), facts)
    assert (broken.outcome, broken.promote) == ("champion_other_features", False)


def test_an_unreadable_champion_with_fewer_features_is_just_unreadable():
    facts = Facts(
        champion="3",
        champion_error=NEWER,
        champion_features=("tx_amount",),
        challenger_features=("tx_amount", "amount_ratio"),
    )
    assert decide(QUICK, without_champion(week(22)), facts).outcome == "champion_unreadable"


@pytest.mark.parametrize(("strength", "outcome"), [(1.5, "better"), (1.0, "not_better")])
def test_a_champion_with_other_features_that_scored_the_rows_is_compared(strength: float, outcome: str):
    facts = Facts(champion="3", champion_features=("a", "b"), challenger_features=("b", "c"), **UNSEEN)
    decision = decide(QUICK, Scores(**week(12, challenger=strength)), facts)
    assert decision.outcome == outcome
    assert "only the challenger: c; only the champion: a" in decision.reasons[-1]


@pytest.mark.parametrize(
    ("last_date", "outcome"),
    [
        (date(2019, 12, 7), "not_better"),
        (date(2019, 12, 8), "not_comparable"),
        (date(2020, 1, 1), "not_comparable"),
        (None, "not_comparable"),
    ],
)
def test_a_champion_that_has_seen_the_rows_keeps_its_place_without_proof(last_date: date | None, outcome: str):
    facts = Facts(champion="3", champion_train_last_date=last_date, test_first_date=date(2019, 12, 8))
    decision = decide(QUICK, Scores(**week(12, champion=1.5)), facts)
    assert (decision.outcome, decision.promote) == (outcome, False)
    assert any("compare again" in reason for reason in decision.reasons) == (outcome == "not_comparable")


@pytest.mark.parametrize("last_date", [date(2019, 12, 8), None])
def test_a_champion_that_is_beaten_on_rows_it_has_seen_is_replaced(last_date: date | None):
    facts = Facts(champion="3", champion_train_last_date=last_date, test_first_date=date(2019, 12, 8))
    decision = decide(QUICK, Scores(**week(12, challenger=1.5)), facts)
    assert (decision.outcome, decision.promote) == ("better", True)
    assert any("won nevertheless" in reason for reason in decision.reasons)


def test_a_challenger_that_has_seen_the_rows_proves_nothing():
    facts = Facts(champion="3", challenger_train_last_date=date(2019, 12, 8), **UNSEEN)
    decision = decide(QUICK, Scores(**week(12, challenger=1.5)), facts)
    assert (decision.outcome, decision.promote) == ("not_comparable", False)
    assert "prove nothing" in decision.reasons[0]
    before = Facts(champion="3", challenger_train_last_date=date(2019, 12, 7), **UNSEEN)
    assert decide(QUICK, Scores(**week(12, challenger=1.5)), before).outcome == "better"


def test_figures_are_complete_plain_and_right():
    rows = week(25)
    ids = np.where(rows["customer_id"] < 40, np.nan, rows["customer_id"])
    scores = Scores(rows["label"], rows["challenger"], rows["champion"], ids)
    figures = decide(QUICK, scores, COMPARABLE).figures
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert {type(value) for value in figures.values()} == {int, float}
    assert (figures["rows"], figures["frauds"], figures["customers"]) == (4000, 120, 360)
    assert figures["unknown_customer_rows"] == np.isnan(ids).sum()
    known = ids[(rows["label"] == 1) & ~np.isnan(ids)]
    assert figures["fraud_customers"] == len(np.unique(known)) + (120 - len(known))
    assert figures["fraud_share"] == 0.03
    assert (figures["replicates"], figures["seed"], figures["confidence"]) == (200, 0, 0.95)
    pair = paired_bootstrap(rows["label"], rows["challenger"], rows["champion"], ids, replicates=200)
    for name in ("average_precision", "roc_auc"):
        comparison = getattr(pair, name)
        for key, interval in (
            (name, comparison.challenger),
            (f"champion_{name}", comparison.champion),
            (f"{name}_difference", comparison.difference),
        ):
            assert tuple(figures[key + end] for end in ("", "_lower", "_upper", "_standard_error")) == interval
    second = delong(rows["label"], rows["challenger"], rows["champion"])
    assert figures["delong_roc_auc_difference"] == second.difference
    for name in ("lower", "upper", "standard_error", "p_value"):
        assert figures[f"delong_roc_auc_difference_{name}"] == getattr(second, name)


def test_unknown_customers_may_be_none():
    rows = week(26)
    ids = rows["customer_id"].astype(object)
    ids[:100] = None
    as_nan = np.where(np.arange(4000) < 100, np.nan, rows["customer_id"])
    with_none, with_nan = (
        decide(QUICK, Scores(rows["label"], rows["challenger"], rows["champion"], each), COMPARABLE)
        for each in (ids, as_nan)
    )
    assert with_none == with_nan
    assert with_none.figures["unknown_customer_rows"] == 100


# The rule in the long run

LARGE = {"rows": 20_000, "frauds": 300, "customers": 1500}


def test_of_two_equally_good_models_neither_is_promoted():
    """The nominal rate is 2.5 %; that of promotions, in either direction, is to stay below 5 %.

    200 simulations are 400 decisions. If the true rate were 8 %, 20 promotions or fewer would have a chance of
    1.3 %; at 2.5 %, more than 20 have one of 0.1 %.
    """
    promotions = 0
    for seed in range(200):
        decision = decide(QUICK, Scores(**week(1000 + seed, **LARGE)), COMPARABLE)
        assert decision.outcome in ("better", "not_better")
        # Had they changed roles, the challenger would have won where the difference is now below nought.
        promotions += decision.promote + (decision.figures["average_precision_difference_upper"] < 0)
    assert 0 < promotions <= 20


def test_a_truly_better_model_is_promoted_nearly_always():
    promoted = sum(
        decide(QUICK, Scores(**week(2000 + seed, challenger=1.15, **LARGE)), COMPARABLE).promote for seed in range(30)
    )
    assert promoted >= 24
