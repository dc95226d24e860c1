"""Every case of the promotion rule has its decision and its reasons, and the rule seldom errs."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.promotion import error_rates, scored_week
from ml_platform.model.promotion import Facts, PromotionRule, Scores, decide
from ml_platform_tests.test_bootstrap import Rows, labelled_rows

QUICK = PromotionRule(replicates=200)

TEST_STARTS = date(2019, 12, 8)
COMPARABLE = Facts(champion="3", champion_train_last_date=date(2019, 12, 7), test_first_date=TEST_STARTS)

#: Why a champion gave no scores.
ERROR = "no column treeID (saved by Spark 4.3.0, read by 3.0.3)"
UNREADABLE = Facts(champion="3", champion_error=ERROR)
NEWER = replace(UNREADABLE, champion_newer_library=True)
LACKING = replace(
    UNREADABLE,
    champion_features=("tx_amount", "amount_sum_7d"),
    challenger_features=("tx_amount", "amount_ratio"),
)
NEEDS_FEWER = replace(LACKING, champion_features=("tx_amount",))
OTHER_FEATURES = replace(COMPARABLE, champion_features=("a", "b"), challenger_features=("b", "c"))

EQUAL = scored_week(14, challenger=1.02)
BETTER = Scores(**scored_week(12, challenger=1.5))
WORSE = Scores(**scored_week(12, champion=1.5))
STRONG = scored_week(22, challenger=3)
RANDOM = scored_week(23, challenger=0)


MIDDLE = scored_week(24, frauds=200)
ONLY_FRAUDS = Scores(**scored_week(20, rows=400, frauds=400))
FEW = scored_week(20, frauds=49, challenger=3)


def alone(rows: Rows) -> Scores:
    return Scores(rows["label"], rows["challenger"], rows["customer_id"])


def against(rows: Rows, champion: np.ndarray, **changes: np.ndarray) -> Scores:
    return Scores(**(rows | {"champion": champion} | changes))


def swapped(*pair: int) -> Scores:
    """The champion differs from the challenger only in that two rows change places."""
    champion = EQUAL["challenger"].copy()
    champion[list(pair)] = champion[list(pair[::-1])]
    return against(EQUAL, champion)


def fraud_above_genuine() -> tuple[int, int]:
    """The first two rows in the challenger's order of which the upper is a fraud and the lower genuine."""
    order = np.argsort(-EQUAL["challenger"])
    labels = EQUAL["label"][order]
    upper = np.flatnonzero(labels[:-1] > labels[1:])[0]
    return order[upper], order[upper + 1]


def of_customers(number: int) -> Scores:
    """Strong evidence, but all frauds are of so many customers."""
    customers = np.where(STRONG["label"] == 1, np.cumsum(STRONG["label"]) % number, STRONG["customer_id"] + 1000)
    return Scores(**(STRONG | {"customer_id": customers}))


def one_kind_of_fraud() -> Rows:
    """A quarter of the frauds on top, the rest below all others: a high average precision, but a bad ranking."""
    scores = np.random.default_rng(0).normal(size=4000)
    frauds = np.flatnonzero(EQUAL["label"])
    scores[frauds] -= 10
    scores[frauds[:30]] += 20
    return EQUAL | {"challenger": scores}


def frauds_in_the_middle() -> Rows:
    """All frauds just above the middle: ROC AUC is better than chance, average precision is not."""
    scores = np.linspace(0, 1, 4000)
    scores[MIDDLE["label"] == 1] = np.linspace(0.46, 0.6, 200)
    return MIDDLE | {"challenger": scores}


def last_digits() -> Scores:
    """Ties that another order of summation breaks."""
    tied = np.round(EQUAL["challenger"], 2)
    champion = tied * (1 + np.random.default_rng(0).uniform(-1e-14, 1e-14, len(tied)))
    assert len(np.unique(champion)) > len(np.unique(tied))
    return against(EQUAL, champion, challenger=tied)


def champion_seen(last_date: date | None) -> Facts:
    return replace(COMPARABLE, champion_train_last_date=last_date)


def challenger_seen(last_date: date) -> Facts:
    return replace(COMPARABLE, challenger_train_last_date=last_date)


CHANCE = "not clearly better than a random order"
FAILED = f"The champion (version 3) could not score the held-out rows: {ERROR}"
STAYS = f"{FAILED}|{CHANCE}|average precision 0."
REPLACED = f"{FAILED}|and replaces a champion that cannot be used|average precision 0."
LOST = f"{FAILED} It needs features that are no longer built: amount_sum_7d."
IDENTICAL, SIGMOID = against(EQUAL, EQUAL["challenger"]), against(EQUAL, 1 / (1 + np.exp(-EQUAL["challenger"])))
KEEP, PROMOTE = False, True

#: What sets the case apart, scores, facts, outcome, whether it promotes, and a part of each of its reasons.
CASES = [
    # Any first model is promoted; its reasons say how good it is.
    ("no champion", alone(EQUAL), Facts(), "first_model", PROMOTE, "There is no champion|it has average precision 0."),
    ("first, no frauds", alone(scored_week(16, frauds=0)), Facts(), "first_model", PROMOTE,
     f"There is no champion|quality cannot be measured on 4,000 rows with 0 frauds|{CHANCE}"),
    ("first, three frauds", alone(scored_week(16, rows=300, frauds=3, challenger=0)), Facts(), "first_model", PROMOTE,
     f"There is no champion|On 300 rows with 3 frauds|{CHANCE}"),
    # The same ranking comes first: neither few frauds nor held-out rows that were seen matter then.
    ("identical", IDENTICAL, COMPARABLE, "no_difference", KEEP, "ranks all 4,000 held-out rows as the champion"),
    ("identical, other scale", SIGMOID, COMPARABLE, "no_difference", KEEP, "no difference"),
    ("identical except for last digits", last_digits(), COMPARABLE, "no_difference", KEEP, "no difference"),
    ("identical, few", against(FEW, FEW["challenger"]), COMPARABLE, "no_difference", KEEP, "no difference"),
    ("identical, seen", IDENTICAL, challenger_seen(TEST_STARTS), "no_difference", KEEP, "no difference"),
    # A challenger that has seen held-out rows proves nothing.
    ("challenger saw one day", BETTER, challenger_seen(TEST_STARTS), "not_comparable", KEEP, "prove nothing"),
    ("challenger saw, few", Scores(**FEW), challenger_seen(TEST_STARTS), "not_comparable", KEEP, "prove nothing"),
    ("challenger saw the day before", BETTER, challenger_seen(date(2019, 12, 7)), "better", PROMOTE, "is better"),
    # Just too few frauds, genuine rows or customers with a fraud; and just enough.
    ("49 frauds", Scores(**FEW), COMPARABLE, "too_few_frauds", KEEP, "49 frauds, fewer than 50: too few to compare"),
    ("50 frauds", Scores(**scored_week(20, frauds=50, challenger=3)), COMPARABLE, "better", PROMOTE, "is better"),
    ("no frauds", Scores(**scored_week(20, frauds=0)), COMPARABLE, "too_few_frauds", KEEP, "have 0 frauds"),
    ("only frauds", ONLY_FRAUDS, COMPARABLE, "too_few_frauds", KEEP, "have 0 genuine"),
    ("9 customers", of_customers(9), COMPARABLE, "too_few_frauds", KEEP, "come from 9 customers, fewer than 10"),
    ("10 customers", of_customers(10), COMPARABLE, "better", PROMOTE, "is better"),
    ("unreadable, few", alone(FEW), UNREADABLE, "too_few_frauds", KEEP, "49 frauds|could not score the rows, though"),
    ("newer library, few", alone(FEW), NEWER, "too_few_frauds", KEEP, f"49 frauds|{ERROR}"),
    # A champion that is as good as it was elsewhere stays, however good the challenger is.
    ("newer library", alone(STRONG), NEWER, "champion_newer_library", KEEP, f"{FAILED}|champion set|precision 0."),
    # A champion that cannot score gives way to a challenger that beats chance by both figures.
    ("unreadable", alone(EQUAL), UNREADABLE, "champion_unreadable", PROMOTE, REPLACED),
    ("unreadable, random", alone(RANDOM), UNREADABLE, "champion_unreadable", KEEP, STAYS),
    ("unreadable, reversed", alone(scored_week(23, challenger=-1)), UNREADABLE, "champion_unreadable", KEEP, STAYS),
    ("only average precision", alone(one_kind_of_fraud()), UNREADABLE, "champion_unreadable", KEEP, STAYS),
    ("only ROC AUC", alone(frauds_in_the_middle()), UNREADABLE, "champion_unreadable", KEEP, STAYS),
    ("needs fewer", alone(EQUAL), NEEDS_FEWER, "champion_unreadable", PROMOTE, REPLACED),
    ("needs others", alone(EQUAL), LACKING, "champion_other_features", PROMOTE, REPLACED.replace(FAILED, LOST)),
    ("needs others, random", alone(RANDOM), LACKING, "champion_other_features", KEEP, STAYS.replace(FAILED, LOST)),
    # Compared: only the lower bound of the difference counts.
    ("better", BETTER, COMPARABLE, "better", PROMOTE, "The challenger is better: average precision 0."),
    ("worse", WORSE, COMPARABLE, "not_better", KEEP, "The challenger is worse: average precision 0."),
    ("within the noise", Scores(**EQUAL), COMPARABLE, "not_better", KEEP, "The challenger is not clearly better: "),
    ("tie", swapped(*np.flatnonzero(EQUAL["label"] == 0)[:2]), COMPARABLE, "not_better", KEEP, "difference +0.0000"),
    ("one lucky row", swapped(*fraud_above_genuine()), COMPARABLE, "not_better", KEEP, "not clearly better"),
    ("other features, better", BETTER, OTHER_FEATURES, "better", PROMOTE,
     "is better|different features (only the challenger: c; only the champion: a)"),
    ("other features", Scores(**EQUAL), OTHER_FEATURES, "not_better", KEEP, "not clearly better|different features"),
    # A champion that has or may have seen held-out rows may owe its figures to that.
    ("champion saw one day", WORSE, champion_seen(TEST_STARTS), "not_comparable", KEEP, "worse|compare again"),
    ("champion saw all", WORSE, champion_seen(date(2020, 1, 1)), "not_comparable", KEEP, "worse|to 2020-01-01 and"),
    ("champion's dates unknown", WORSE, champion_seen(None), "not_comparable", KEEP, "worse|It is not known"),
    ("champion saw, beaten", BETTER, champion_seen(TEST_STARTS), "better", PROMOTE, "better|still won"),
    ("dates unknown, beaten", BETTER, champion_seen(None), "better", PROMOTE, "better|still won"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_decision(case: tuple[str, Scores, Facts, str, bool, str]):
    _, scores, facts, outcome, promote, parts = case
    decision = decide(QUICK, scores, facts)
    assert (decision.outcome, decision.promote, decision.apply) == (outcome, promote, promote)
    assert [part for part, reason in zip(parts.split("|"), decision.reasons, strict=True) if part not in reason] == []


def test_the_crafted_scores_turn_on_one_figure():
    precise = decide(QUICK, alone(one_kind_of_fraud()), UNREADABLE).figures
    assert precise["average_precision_lower"] > precise["fraud_share"]
    assert precise["roc_auc_lower"] < 0.5
    ranked = decide(QUICK, alone(frauds_in_the_middle()), UNREADABLE).figures
    assert ranked["average_precision_lower"] < ranked["fraud_share"]
    assert ranked["roc_auc_lower"] > 0.5
    name = "average_precision_difference"
    assert decide(QUICK, swapped(*fraud_above_genuine()), COMPARABLE).figures[name] > 0


def test_a_dry_run_decides_and_leaves_the_champion():
    rule = PromotionRule(replicates=200, mode="dry_run")
    for scores, facts, outcome in ((BETTER, COMPARABLE, "better"), (alone(EQUAL), Facts(), "first_model")):
        decision = decide(rule, scores, facts)
        assert (decision.outcome, decision.promote, decision.apply) == (outcome, True, False)
        assert decision.reasons[-1] == "The rule is a dry run: the champion stays."


def test_the_margin_is_held_against_the_lower_bound():
    scores = BETTER
    lower = decide(QUICK, scores, COMPARABLE).figures["average_precision_difference_lower"]
    below, above = (
        decide(PromotionRule(replicates=200, margin=margin), scores, COMPARABLE) for margin in (lower * 0.999, lower)
    )
    assert (below.outcome, below.promote) == ("better", True)
    assert (above.outcome, above.promote) == ("not_better", False)
    assert above.figures["margin"] == lower


@settings(max_examples=20)
@given(labelled_rows(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_has_no_effect(rows: Rows, random: Any):
    order = list(range(len(rows["label"])))
    random.shuffle(order)
    shuffled = {name: values[order] for name, values in rows.items()}
    rule = PromotionRule(replicates=200, min_frauds=2)
    assert decide(rule, Scores(**rows), COMPARABLE) == decide(rule, Scores(**shuffled), COMPARABLE)


def test_figures_are_complete_and_plain():
    ids = np.where(EQUAL["customer_id"] < 40, np.nan, EQUAL["customer_id"])
    decision = decide(QUICK, Scores(**(EQUAL | {"customer_id": ids})), COMPARABLE, seed=7)
    figures = decision.figures
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert {type(value) for value in figures.values()} == {int, float}
    frauds = ids[EQUAL["label"] == 1]
    unknown_frauds = np.isnan(frauds).sum()
    assert {name: figures[name] for name in list(figures)[:10]} == {
        "rows": 4000,
        "frauds": 120,
        "customers": 360,
        "unknown_customer_rows": np.isnan(ids).sum(),
        "fraud_customers": len(np.unique(frauds[~np.isnan(frauds)])) + unknown_frauds,
        "fraud_share": 0.03,
        "margin": 0,
        "confidence": 0.95,
        "seed": 7,
        "replicates": 200,
    }
    assert set(list(figures)[10:]) == {
        f"{name}{end}"
        for figure in ("average_precision", "roc_auc")
        for name in (figure, f"champion_{figure}", f"{figure}_difference")
        for end in ("", "_lower", "_upper", "_standard_error")
    }
    assert (
        f"4,000 rows with 120 frauds, 360 customers and {np.isnan(ids).sum()} rows without one" in decision.reasons[0]
    )
    assert (
        decide(QUICK, Scores(**EQUAL), COMPARABLE, seed=8).figures != decide(QUICK, Scores(**EQUAL), COMPARABLE).figures
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"margin": -0.01}, "margin"),
        ({"margin": 1}, "margin"),
        ({"margin": float("nan")}, "margin"),
        ({"confidence": 1}, "confidence"),
        ({"confidence": 95}, "confidence"),
        ({"replicates": 199}, "replicates is 199: an interval with confidence 0.95 needs 200 or more"),
        ({"replicates": 500, "confidence": 0.99}, "needs 1,000 or more"),
        ({"min_frauds": 1}, "min_frauds"),
        ({"mode": "off"}, "mode"),
    ],
)
def test_an_impossible_rule_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        PromotionRule(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.array([])}, "no held-out rows"),
        ({"label": np.array([1, np.nan])}, "neither 0 nor 1"),
        ({"label": np.array([1, 2])}, "neither 0 nor 1"),
        ({"challenger": np.array([0.5, np.nan])}, "1 of the challenger's scores are not finite"),
        ({"champion": np.array([np.inf, np.nan])}, "2 of the champion's scores are not finite"),
    ],
)
def test_damaged_scores_are_refused(changes: dict[str, Any], message: str):
    rows = {"label": np.array([1, 0]), "challenger": np.array([0.5, 0.1]), "customer_id": np.array([1.0, 2.0])}
    with pytest.raises(ValueError, match=f"{message}.*train the model again"):
        Scores(**(rows | changes))


@pytest.mark.parametrize(
    ("scores", "facts"),
    [(Scores(**EQUAL), Facts()), (Scores(**EQUAL), UNREADABLE), (alone(EQUAL), COMPARABLE)],
    ids=["no champion", "it could not score", "it scored"],
)
def test_scores_that_contradict_the_report_are_refused(scores: Scores, facts: Facts):
    with pytest.raises(ValueError, match="disagree"):
        decide(QUICK, scores, facts)


def test_the_rule_seldom_errs():
    """A few weeks with fixed seeds; `python -m benchmarks.promotion --simulations 200` measures the rates."""
    equal, better = error_rates(QUICK, 1.0, 10), error_rates(QUICK, 1.15, 5)
    assert equal["promoted"] + equal["worse"] <= 0.2
    assert better["promoted"] >= 0.8
