"""Promotion rule: decides whether a new model (challenger) replaces the model in service (champion).

Both models have scored the same held-out rows. The decision is based on the difference of their average precisions; its
uncertainty is estimated by a paired bootstrap over customers, because the rows of one customer are not independent. The
challenger is promoted if the lower bound of the interval is above a margin, so a tie keeps the champion. Only rankings
are compared; the scale of the scores does not matter.

Assumptions: rows of one terminal are independent, the held-out days are typical of future days, and the challenger is
the only one tried on these rows. If many are tried on the same rows, one wins by chance more often than the confidence
says.

This module does no I/O and is deterministic; the order of the rows does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

import dagster as dg
from pydantic import Field, model_validator

from spark_jobs.evaluation.bootstrap import bootstrap_figures, customer_clusters, same_ranking

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Figures = dict[str, float | int]

#: Outcomes of `decide`, documented there.
Outcome = Literal[
    "first_model",
    "champion_newer_library",
    "champion_unreadable",
    "champion_other_features",
    "too_few_frauds",
    "not_comparable",
    "no_difference",
    "not_better",
    "better",
]

#: Outcomes that are based on a comparison, or need none.
DECIDED_BY_FIGURES: tuple[Outcome, ...] = ("first_model", "better", "not_better", "no_difference")

#: With fewer customers that have a fraud, the bootstrap has too few units to resample, regardless of the frauds.
MIN_FRAUD_CUSTOMERS = 10

#: With fewer replicates beyond each bound of an interval, the bound is mostly noise.
MIN_TAIL_REPLICATES = 5


class PromotionRule(dg.Config):
    """Settings of the promotion rule."""

    mode: Literal["enforce", "dry_run"] = Field(default="enforce", description="enforce; dry_run keeps the champion.")
    margin: float = Field(default=0.0, ge=0, lt=1, description="Minimum improvement in average precision.")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="Confidence level of the deciding interval.")
    replicates: int = Field(default=1000, ge=100, description="Bootstrap replicates.")
    min_frauds: int = Field(default=50, ge=2, description="Minimum held-out frauds to compare models.")

    @model_validator(mode="after")
    def _has_enough_replicates(self) -> PromotionRule:
        # The tolerance covers confidences such as 0.95, whose complement has no exact binary representation.
        needed = math.ceil(2 * MIN_TAIL_REPLICATES / (1 - self.confidence) - 1e-6)
        if self.replicates < needed:
            raise ValueError(
                f"replicates is {self.replicates}: an interval with confidence {self.confidence:g} needs "
                f"{needed:,} or more"
            )
        return self


@dataclass(frozen=True, eq=False)
class Scores:
    """Labels and scores of the held-out rows: arrays with one element per row.

    Attributes:
        label: 1 for a fraud, 0 for a genuine transaction.
        challenger: the challenger's scores; higher means more suspicious.
        customer_id: numbers, NaN where the customer is unknown.
        champion: the champion's scores of the same rows; None if it has not scored them.

    Raises:
        ValueError: there are no rows, a label is neither 0 nor 1, or a score is not finite.
    """

    label: Array
    challenger: Array
    customer_id: Array
    champion: Array | None = None

    def __post_init__(self) -> None:
        import numpy as np

        if len(self.label) == 0:
            raise ValueError("no held-out rows; train the model again")
        if not np.isin(self.label, (0, 1)).all():
            raise ValueError("a held-out row has a label that is neither 0 nor 1; train the model again")
        for name, scores in (("challenger", self.challenger), ("champion", self.champion)):
            if scores is not None and not np.isfinite(scores).all():
                raise ValueError(
                    f"{(~np.isfinite(scores)).sum():,} of the {name}'s scores are not finite; train the model again"
                )


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about the two models other than their scores.

    Attributes:
        champion: the champion's version; None if there is no champion.
        champion_error: why the champion could not score the rows; None if it could.
        champion_newer_library: True if the reason is that it was written by a newer library than the installed one.
        champion_features, challenger_features: names of their inputs; None if unknown.
        champion_train_last_date, challenger_train_last_date: last day of the rows used to fit or select the model;
            None if unknown.
        test_first_date: first day of the held-out rows; None if unknown.
    """

    champion: str | None = None
    champion_error: str | None = None
    champion_newer_library: bool = False
    champion_features: tuple[str, ...] | None = None
    champion_train_last_date: date | None = None
    challenger_features: tuple[str, ...] | None = None
    challenger_train_last_date: date | None = None
    test_first_date: date | None = None


@dataclass(frozen=True)
class Decision:
    """The result of `decide`.

    Attributes:
        outcome: the case; see `decide`.
        promote: True if the rule promotes the challenger.
        apply: True if the alias is to be moved: `promote`, unless the rule is a dry run.
        reasons: human-readable sentences, the decisive one first.
        figures: the numbers behind them, JSON-serializable and without null; undefined ones are omitted.

            * ``rows``, ``frauds``, ``customers`` (known ones), ``unknown_customer_rows``, ``fraud_customers``
              (customers with a fraud; a row of an unknown customer counts as one), ``fraud_share``
            * ``margin``, ``confidence``, ``seed``, ``replicates`` (those in which the figures were defined)
            * ``average_precision`` and ``roc_auc`` of the challenger, ``champion_average_precision``,
              ``champion_roc_auc``, and the differences (challenger minus champion)
              ``average_precision_difference`` and ``roc_auc_difference``, each also with ``…_lower``,
              ``…_upper``, ``…_standard_error`` by the bootstrap
    """

    outcome: Outcome
    promote: bool
    apply: bool
    reasons: list[str]
    figures: Figures = field(default_factory=dict)


def decide(rule: PromotionRule, scores: Scores, facts: Facts, seed: int = 0) -> Decision:
    """Decide whether the challenger becomes the champion; `seed` is the bootstrap's.

    The first of these cases that applies is the outcome:

    ``first_model``: there is no champion. Promote: any model is better than none, and the figures say how
        good it is.
    ``no_difference``: both models rank all rows alike (a retrain on the same data). Keep.
    ``not_comparable``: the challenger has seen the held-out rows, so its figures are too good. Keep.
    ``too_few_frauds``: there are fewer frauds or genuine rows than the rule's `min_frauds`, or fewer customers with
        a fraud than `MIN_FRAUD_CUSTOMERS`. Keep: an interval from so few would be mostly noise.
    ``champion_newer_library``: the champion was written by a newer library than the installed one. Keep: it is as
        good as before, and still usable where that library is installed. Install that library, or change the
        champion by hand.
    ``champion_unreadable``, ``champion_other_features``: the champion could not score the rows, in the second case
        because it needs features that are no longer built. Such a champion is unusable, so the challenger need not
        beat it, but must be clearly better than chance: promote if both lower bounds are above those of a random
        order, average precision above the share of frauds and ROC AUC above 0.5. A broken challenger does not replace
        a champion that may still be repaired.
    ``better``: the lower bound of the difference in average precision is above the margin. Promote, even if the
        champion has seen the held-out rows: that favours the champion, and the challenger still beat it.
    ``not_comparable``: otherwise, if the champion has or may have seen the held-out rows, which may explain its
        figures. Keep; compare again on later rows.
    ``not_better``: otherwise. Keep.

    A champion with different features that did score the rows is compared like any other; a reason mentions it.

    Raises:
        ValueError: the scores include a champion that does not exist or could not score, or lack one that could.
    """
    could_score = facts.champion is not None and facts.champion_error is None
    if could_score != (scores.champion is not None):
        raise ValueError(
            "the report and the held-out scores disagree on whether a champion scored the rows; train the model again"
        )
    figures = _figures(rule, scores, seed)
    alike = scores.champion is not None and same_ranking(scores.challenger, scores.champion)
    outcome, promote = _outcome(rule, figures, facts, alike=alike)
    reasons = _reasons(outcome, promote, rule, figures, facts)
    return Decision(outcome, promote, promote and rule.mode == "enforce", reasons, figures)


def _outcome(rule: PromotionRule, figures: Figures, facts: Facts, *, alike: bool) -> tuple[Outcome, bool]:
    """First case of `decide` that applies, and whether it promotes; `alike`: both models rank all rows alike."""
    if facts.champion is None:
        return "first_model", True
    if alike:
        return "no_difference", False
    if _has_seen(facts.challenger_train_last_date, facts):
        return "not_comparable", False
    if _shortage(rule, figures):
        return "too_few_frauds", False
    if facts.champion_newer_library:
        return "champion_newer_library", False
    if facts.champion_error is not None:
        return "champion_other_features" if _lost_features(facts) else "champion_unreadable", _beats_chance(figures)
    if figures["average_precision_difference_lower"] > rule.margin:
        return "better", True
    if _has_seen(facts.champion_train_last_date, facts) is False:
        return "not_better", False
    return "not_comparable", False


def _figures(rule: PromotionRule, scores: Scores, seed: int) -> Figures:
    import numpy as np

    models = [model for model in (scores.challenger, scores.champion) if model is not None]
    clusters = customer_clusters(scores.label, models, scores.customer_id)
    rows, frauds = len(scores.label), int(scores.label.sum())
    figures: Figures = {
        "rows": rows,
        "frauds": frauds,
        "customers": clusters.customers,
        "unknown_customer_rows": clusters.number - clusters.customers,
        "fraud_customers": len(np.unique(clusters.codes[scores.label == 1])),
        "fraud_share": frauds / rows,
        "margin": rule.margin,
        "confidence": rule.confidence,
        "seed": seed,
    }
    if 0 < frauds < rows:
        figures |= bootstrap_figures(
            scores.label, models, clusters, confidence=rule.confidence, replicates=rule.replicates, seed=seed
        )
    return figures


def _has_seen(train_last: date | None, facts: Facts) -> bool | None:
    """True if a model trained up to `train_last` has seen held-out rows; None if a date is unknown."""
    if train_last is None or facts.test_first_date is None:
        return None
    return train_last >= facts.test_first_date


def _shortage(rule: PromotionRule, figures: Figures) -> str | None:
    """Reason why the held-out rows are too few for a comparison; None if they are enough."""
    if figures["frauds"] < rule.min_frauds:
        return f"The held-out rows have {figures['frauds']:,} frauds, fewer than {rule.min_frauds:,}"
    if figures["fraud_customers"] < MIN_FRAUD_CUSTOMERS:
        return (
            f"The {figures['frauds']:,} held-out frauds come from {figures['fraud_customers']} customers, fewer than "
            f"{MIN_FRAUD_CUSTOMERS}"
        )
    genuine = figures["rows"] - figures["frauds"]
    return f"The held-out rows have {genuine} genuine transactions" if genuine < rule.min_frauds else None


def _beats_chance(figures: Figures) -> bool:
    # Average precision alone is not enough: one lucky fraud at the top raises it far above the share of frauds.
    return (
        "average_precision" in figures
        and figures["average_precision_lower"] > figures["fraud_share"]
        and figures["roc_auc_lower"] > 0.5
    )


def _lost_features(facts: Facts) -> list[str]:
    """Features that the champion needs and the challenger does not have."""
    return _difference(facts.champion_features, facts.challenger_features)


def _difference(names: tuple[str, ...] | None, others: tuple[str, ...] | None) -> list[str]:
    return [] if names is None or others is None else [name for name in names if name not in others]


def _reasons(outcome: Outcome, promote: bool, rule: PromotionRule, figures: Figures, facts: Facts) -> list[str]:
    """Explain the decision in sentences, the decisive one first."""
    champion = f"champion (version {facts.champion})"
    not_scored = f"The {champion} could not score the held-out rows: {facts.champion_error}"
    if outcome == "first_model":
        reasons = ["There is no champion, so this first model becomes the champion.", _quality(rule, figures)]
        if not _beats_chance(figures):
            reasons.append("It is not clearly better than a random order: review it before you rely on it.")
    elif outcome == "no_difference":
        reasons = [f"The challenger ranks all {figures['rows']:,} held-out rows as the {champion} does: no difference."]
    elif outcome == "not_comparable" and _has_seen(facts.challenger_train_last_date, facts):
        reasons = [
            f"The challenger was trained on rows up to {facts.challenger_train_last_date}, which include held-out "
            f"rows (from {facts.test_first_date}): its figures prove nothing. Hold out later rows."
        ]
    elif outcome == "too_few_frauds":
        reasons = [f"{_shortage(rule, figures)}: too few to compare models by. The {champion} stays."]
        if facts.champion_error is not None:
            reasons.append(f"It could not score the rows, though: {facts.champion_error}")
    elif outcome == "champion_newer_library":
        reasons = [
            not_scored,
            "The champion stays: it may be better, and is usable where the newer library is installed. Train with that "
            "library, or make another version the champion by hand (ml-platform champion set).",
            _quality(rule, figures),
        ]
    elif outcome in ("champion_unreadable", "champion_other_features"):
        lost = _lost_features(facts)
        reasons = [
            not_scored + (f" It needs features that are no longer built: {', '.join(lost)}." if lost else ""),
            "The challenger is clearly better than a random order and replaces a champion that cannot be used."
            if promote
            else "The challenger is not clearly better than a random order, so the champion stays: repair one of them.",
            _quality(rule, figures),
        ]
    else:
        reasons = [_comparison(promote, rule, figures, champion), *_caveats(promote, facts)]
    if rule.mode == "dry_run":
        reasons.append("The rule is a dry run: the champion stays.")
    return reasons


def _comparison(promote: bool, rule: PromotionRule, figures: Figures, champion: str) -> str:
    lower, upper = figures["average_precision_difference_lower"], figures["average_precision_difference_upper"]
    verdict = "better" if promote else "worse" if upper < 0 else "not clearly better"
    return (
        f"The challenger is {verdict}: average precision {figures['average_precision']:.4f} against "
        f"{figures['champion_average_precision']:.4f} of the {champion}, difference "
        f"{figures['average_precision_difference']:+.4f} ({100 * rule.confidence:g}% interval {lower:+.4f} to "
        f"{upper:+.4f}; {_basis(figures)}); the lower bound is {'' if promote else 'not '}above the margin of "
        f"{rule.margin:g}."
    )


def _caveats(promote: bool, facts: Facts) -> list[str]:
    """Caveats of a comparison: held-out rows that the champion has seen, and different features."""
    caveats = []
    seen = _has_seen(facts.champion_train_last_date, facts)
    if seen is not False:
        when = (
            f"The champion was trained on rows up to {facts.champion_train_last_date} and has seen held-out rows (from "
            f"{facts.test_first_date})"
            if seen
            else "It is not known whether the champion has seen the held-out rows: a window's dates are missing"
        )
        caveats.append(
            f"{when}. That can only favour the champion, and the challenger still won."
            if promote
            else f"{when}. That may explain its figures; compare again on later rows."
        )
    gained = _difference(facts.challenger_features, facts.champion_features)
    lists = (("only the challenger", gained), ("only the champion", _lost_features(facts)))
    listed = "; ".join(f"{model}: {', '.join(names)}" for model, names in lists if names)
    if listed:
        caveats.append(f"The models have different features ({listed}), but both scored the same rows.")
    return caveats


def _quality(rule: PromotionRule, figures: Figures) -> str:
    if "average_precision" not in figures:
        return f"Its quality cannot be measured on {_basis(figures)}."
    chances = (("average precision", figures["fraud_share"]), ("ROC AUC", 0.5))
    parts = [
        f"{name} {figures[key]:.4f} ({100 * rule.confidence:g}% interval {figures[f'{key}_lower']:.4f} to "
        f"{figures[f'{key}_upper']:.4f}; random order: {chance:.4f})"
        for key, (name, chance) in zip(("average_precision", "roc_auc"), chances, strict=True)
    ]
    return f"On {_basis(figures)}, it has {' and '.join(parts)}."


def _basis(figures: Figures) -> str:
    customers = f"{figures['customers']:,} customers"
    if figures["unknown_customer_rows"]:
        customers += f" and {figures['unknown_customer_rows']:,} rows without one"
    return f"{figures['rows']:,} rows with {figures['frauds']:,} frauds, {customers}"
