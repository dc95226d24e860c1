"""Whether a new model (the challenger) replaces the model in service (the champion): scores in, decision out.

Both models have scored the same held-out rows. The figure that decides is the difference of their average
precisions; its uncertainty comes from a paired bootstrap that resamples customers, because the rows of one
customer are not independent of each other. The challenger is promoted if the lower bound of the interval is
above a margin, so a tie keeps the champion. `decide` names the cases in which that comparison is impossible
or says nothing, and what happens then.

Only rankings are compared: a model whose scores are another's on a different scale is the same model here.

What this does not cover: the rows of one terminal are taken as independent, the held-out days as typical of
the days to come, and a challenger as the only one that is tried on these rows. Of many that are tried on the
same rows, one wins by chance more often than the confidence says.

Nothing here reads or writes anything; the same arguments give the same decision, whatever the order of the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import date
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Integers = npt.NDArray[np.int64]

#: What `decide` found; see there.
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

#: Outcomes that rest on a comparison, or need none.
DECIDED_BY_FIGURES: tuple[Outcome, ...] = ("first_model", "better", "not_better", "no_difference")

#: Fewer customers with a fraud than these leave nothing to resample, however many frauds they have.
MIN_FRAUD_CUSTOMERS = 10

#: Replicates beyond each bound of an interval, below which the bound is mostly chance.
MIN_TAIL_REPLICATES = 5


@dataclass(frozen=True)
class PromotionRule:
    """When a challenger is promoted.

    Attributes:
        margin: by how much its average precision must be higher, at the least; 0 <= margin < 1.
        confidence: of the two-sided interval whose lower bound is held against the margin.
        replicates: bootstrap replicates.
        min_frauds: held-out frauds below which no models are compared.
        seed: of the bootstrap.
        mode: ``enforce``, or ``dry_run``: decide and report, but leave the champion.

    Raises:
        ValueError: a value is out of its range.
    """

    margin: float = 0.0
    confidence: float = 0.95
    replicates: int = 1000
    min_frauds: int = 50
    seed: int = 0
    mode: Literal["enforce", "dry_run"] = "enforce"

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise ValueError(
                f"margin is {self.margin}: it takes a difference of average precisions, 0 or more and below 1"
            )
        _check_bootstrap(self.confidence, self.replicates, self.seed)
        if not self.min_frauds >= 2:
            raise ValueError(f"min_frauds is {self.min_frauds}: it takes 2 or more")
        if self.mode not in ("enforce", "dry_run"):
            raise ValueError(f"mode is {self.mode!r}: it takes 'enforce' or 'dry_run'")


@dataclass(frozen=True, eq=False)
class Scores:
    """The held-out rows, one element per row in each array.

    Attributes:
        label: 1 for a fraud, 0 for a genuine transaction.
        challenger: the challenger's scores, higher means more suspicious; any finite numbers.
        champion: the champion's scores of the same rows, or None if there are none.
        customer_id: numbers; NaN or None where the customer is unknown. Such a row is a cluster of its own, and
            so is every row if this is None.

    Raises:
        ValueError: the arrays differ in length, a label is neither 0 nor 1, or a score is no finite number.
    """

    label: npt.ArrayLike
    challenger: npt.ArrayLike
    champion: npt.ArrayLike | None = None
    customer_id: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        label = _labels(self.label)
        object.__setattr__(self, "label", label)
        object.__setattr__(self, "challenger", _numbers("challenger", self.challenger, len(label)))
        if self.champion is not None:
            object.__setattr__(self, "champion", _numbers("champion", self.champion, len(label)))
        if self.customer_id is not None:
            object.__setattr__(self, "customer_id", _customers(self.customer_id, len(label)))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of the two models beside their scores.

    Attributes:
        champion: the champion's version; None if there is no champion.
        champion_error: why the champion could not score the rows; None if it could.
        champion_newer_library: whether that is because a newer library wrote it than the one that was to score.
        champion_features, challenger_features: names of their inputs; None if they are not known.
        champion_train_last_date, challenger_train_last_date: last day of the rows that they were fitted on or
            chosen by; None if it is not known.
        test_first_date: first day of the held-out rows; None if it is not known.

    Raises:
        ValueError: there is something about a champion, but no champion.
    """

    champion: str | None = None
    champion_error: str | None = None
    champion_newer_library: bool = False
    champion_features: tuple[str, ...] | None = None
    champion_train_last_date: date | None = None
    challenger_features: tuple[str, ...] | None = None
    challenger_train_last_date: date | None = None
    test_first_date: date | None = None

    def __post_init__(self) -> None:
        of_champion = (self.champion_error, self.champion_features, self.champion_train_last_date)
        if self.champion is None and any(fact is not None for fact in of_champion):
            raise ValueError("there are facts about a champion, but no champion: give its version")
        if self.champion_newer_library and self.champion_error is None:
            raise ValueError("a champion that a newer library wrote gives no scores: give its error")


@dataclass(frozen=True)
class Decision:
    """What `decide` decided.

    Attributes:
        outcome: the case; see `decide`.
        promote: whether the rule promotes the challenger.
        apply: whether the alias is to be moved: `promote`, unless the rule is a dry run.
        reasons: sentences for people, the decisive one first.
        figures: numbers behind them, JSON-able and without null: what is not defined is left out.

            * ``rows``, ``frauds``, ``customers`` (known ones), ``unknown_customer_rows``, ``fraud_customers``
              (customers with a fraud; a row of an unknown one counts as one), ``fraud_share``
            * ``margin``, ``confidence``, ``seed``, ``replicates`` (in which the figures were defined)
            * ``average_precision`` and ``roc_auc`` of the challenger, ``champion_average_precision``,
              ``champion_roc_auc``, and the differences (challenger minus champion)
              ``average_precision_difference`` and ``roc_auc_difference``, each also with ``…_lower``,
              ``…_upper``, ``…_standard_error`` by the bootstrap
            * ``delong_roc_auc_difference``, also with ``…_lower``, ``…_upper``, ``…_standard_error`` and
              ``…_p_value``, by the method of DeLong, rows taken as independent
    """

    outcome: Outcome
    promote: bool
    apply: bool
    reasons: list[str]
    figures: dict[str, float | int] = field(default_factory=dict)


class Interval(NamedTuple):
    """An estimate with its bootstrap interval: the percentiles of the replicates, and their standard deviation."""

    estimate: float
    lower: float
    upper: float
    standard_error: float


class Comparison(NamedTuple):
    """One figure of two models on the same rows; the difference is challenger minus champion."""

    challenger: Interval
    champion: Interval
    difference: Interval


class PairedBootstrap(NamedTuple):
    """What `paired_bootstrap` finds; `replicates` are those in which the figures were defined."""

    average_precision: Comparison
    roc_auc: Comparison
    replicates: int


class DeLong(NamedTuple):
    """What `delong` finds; the difference is challenger minus champion, the p-value two-sided."""

    challenger: float
    champion: float
    difference: float
    standard_error: float
    lower: float
    upper: float
    p_value: float


def decide(rule: PromotionRule, scores: Scores, facts: Facts) -> Decision:
    """Decide whether the challenger becomes the champion.

    The first of these cases that applies is the outcome:

    ``first_model``: there is no champion. Promote: any model serves better than none, and the figures say how
        good it is.
    ``no_difference``: both models rank all rows alike (a retrain on the same data). Keep.
    ``not_comparable``: the challenger has seen the held-out rows, so its figures flatter it. Keep.
    ``too_few_frauds``: fewer than the rule's `min_frauds`, or their customers are fewer than
        `MIN_FRAUD_CUSTOMERS`. Keep: an interval from so few would be an accident.
    ``champion_newer_library``: the champion was written by a newer library than the one that was to score with it.
        Keep: it is as good as it was, and still serves wherever that library is. The library can be changed, or the
        champion by hand.
    ``champion_unreadable``, ``champion_other_features``: the champion gave no scores, in the second case
        because it needs features that the challenger's do not include. A champion that nobody can load serves
        nobody, so the challenger need not beat it, but it must be clearly better than chance: promote if both
        lower bounds are beyond those of a random order, average precision above the share of frauds and ROC AUC
        above 0.5. A broken challenger does not displace a champion that may still be mended.
    ``better``: the lower bound of the difference in average precision is above the margin. Promote, also if
        the champion has seen the held-out rows: that flatters the champion, and the challenger beat it
        nevertheless.
    ``not_comparable``: it is not, but the champion has seen the held-out rows, or that cannot be ruled out, so
        it may owe its figures to that. Keep; later rows will tell.
    ``not_better``: otherwise. Keep.

    A champion with other features that did score the rows is compared like any other; a reason mentions it.

    Raises:
        ValueError: scores and facts contradict each other, or there are no rows.
    """
    if len(_array(scores.label)) == 0:
        raise ValueError("there are no held-out rows to decide by: give the scores of the test window")
    if facts.champion is None and scores.champion is not None:
        raise ValueError("there are scores of a champion, but no champion: give its version")
    if facts.champion is not None and (scores.champion is None) != (facts.champion_error is not None):
        raise ValueError("a champion has either scores of the held-out rows or an error: give one of the two")

    figures = _figures(rule, scores)
    outcome, promote, reasons = _verdict(rule, scores, facts, figures)
    if rule.mode == "dry_run":
        reasons.append("The rule is a dry run: the champion is left as it is.")
    return Decision(outcome, promote, promote and rule.mode == "enforce", reasons, figures)


def _verdict(
    rule: PromotionRule, scores: Scores, facts: Facts, figures: dict[str, float | int]
) -> tuple[Outcome, bool, list[str]]:
    version = f"champion (version {facts.champion})"
    basis = _basis(figures)
    if facts.champion is None:
        reasons = ["There is no champion, so the first model becomes it.", _own_figures(rule, figures, basis)]
        if not _beats_chance(figures):
            reasons.append("It is not clearly better than a random order: look at it before you rely on it.")
        return "first_model", True, reasons
    if scores.champion is not None and _same_ranking(scores):
        return (
            "no_difference",
            False,
            [f"The challenger ranks all {figures['rows']:,} held-out rows as the {version} does: no difference."],
        )
    if _has_seen(facts.challenger_train_last_date, facts.test_first_date):
        return (
            "not_comparable",
            False,
            [
                f"The challenger was trained on rows up to {facts.challenger_train_last_date}, which include held-out "
                f"rows (from {facts.test_first_date}): its figures prove nothing. Hold out later rows."
            ],
        )
    few = _too_few(rule, figures)
    if few is not None:
        reasons = [f"{few}: too few to compare models by. The {version} stays."]
        if facts.champion_error is not None:
            reasons.append(f"It could not score the rows, though: {facts.champion_error}")
        return "too_few_frauds", False, reasons
    if facts.champion_newer_library:
        reasons = [
            f"The {version} could not score the held-out rows: {facts.champion_error}",
            "The champion stays: it may be better, and serves wherever the newer library is. Train with that library, "
            "or make another version the champion by hand (ml-platform champion set).",
            _own_figures(rule, figures, basis),
        ]
        return "champion_newer_library", False, reasons
    if facts.champion_error is not None:
        return _without_champion(rule, facts, figures, version, basis)
    return _compared(rule, facts, figures, version, basis)


def _without_champion(
    rule: PromotionRule, facts: Facts, figures: dict[str, float | int], version: str, basis: str
) -> tuple[Outcome, bool, list[str]]:
    lacking = _names_beyond(facts.champion_features, facts.challenger_features)
    outcome: Outcome = "champion_other_features" if lacking else "champion_unreadable"
    because = f" It needs features that are no longer built: {', '.join(lacking)}." if lacking else ""
    promote = _beats_chance(figures)
    verdict = (
        "The challenger is clearly better than a random order and replaces a champion that serves nobody."
        if promote
        else "The challenger is not clearly better than a random order, so the champion stays: mend either of them."
    )
    return (
        outcome,
        promote,
        [
            f"The {version} could not score the held-out rows: {facts.champion_error}{because}",
            verdict,
            _own_figures(rule, figures, basis),
        ],
    )


def _compared(
    rule: PromotionRule, facts: Facts, figures: dict[str, float | int], version: str, basis: str
) -> tuple[Outcome, bool, list[str]]:
    lower, upper = figures["average_precision_difference_lower"], figures["average_precision_difference_upper"]
    promote = lower > rule.margin
    interval = f"{100 * rule.confidence:g} % interval {lower:+.4f} to {upper:+.4f}"
    difference = (
        f"average precision {figures['average_precision']:.4f} against {figures['champion_average_precision']:.4f} of "
        f"the {version}, difference {figures['average_precision_difference']:+.4f} ({interval}; {basis})"
    )
    seen = _has_seen(facts.champion_train_last_date, facts.test_first_date)
    if promote:
        reasons = [f"The challenger is better: {difference}; the lower bound is above the margin of {rule.margin:g}."]
    else:
        word = "worse" if upper < 0 else "not clearly better"
        reasons = [
            f"The challenger is {word}: {difference}; the lower bound is not above the margin of {rule.margin:g}."
        ]
    if seen is not False:
        when = (
            f"The champion was trained on rows up to {facts.champion_train_last_date} and has seen held-out rows (from "
            f"{facts.test_first_date})"
            if seen
            else "It is not known whether the champion has seen the held-out rows: a window's dates are missing"
        )
        reasons.append(
            f"{when}. That could only flatter it, and the challenger won nevertheless."
            if promote
            else f"{when}. Its figures may owe to that; compare again on rows that are later."
        )
    if "delong_roc_auc_difference" in figures:
        reasons.append(
            f"As a second figure, ROC AUC {figures['roc_auc']:.4f} against {figures['champion_roc_auc']:.4f}, "
            f"difference {figures['delong_roc_auc_difference']:+.4f} with standard error "
            f"{figures['delong_roc_auc_difference_standard_error']:.4f} (DeLong, p = "
            f"{figures['delong_roc_auc_difference_p_value']:.2g})."
        )
    own = _names_beyond(facts.challenger_features, facts.champion_features)
    others = _names_beyond(facts.champion_features, facts.challenger_features)
    if own or others:
        listed = [f"only the challenger: {', '.join(own)}"] * bool(own)
        listed += [f"only the champion: {', '.join(others)}"] * bool(others)
        reasons.append(
            f"The models have different features ({'; '.join(listed)}). Both scored the same rows, so they compare."
        )
    if promote:
        return "better", True, reasons
    return ("not_better" if seen is False else "not_comparable"), False, reasons


def _figures(rule: PromotionRule, scores: Scores) -> dict[str, float | int]:
    import numpy as np

    label, clusters = _array(scores.label), _Clusters.of(scores)
    frauds = int(label.sum())
    figures: dict[str, float | int] = {
        "rows": len(label),
        "frauds": frauds,
        "customers": clusters.customers,
        "unknown_customer_rows": clusters.number - clusters.customers,
        "fraud_customers": len(np.unique(clusters.codes[label == 1])),
        "fraud_share": frauds / len(label),
        "margin": rule.margin,
        "confidence": rule.confidence,
        "seed": rule.seed,
    }
    if frauds in (0, len(label)):
        return figures
    models = [_Ranking.of(label, score) for score in (scores.challenger, scores.champion) if score is not None]
    drawn = _replicates(models, clusters, rule.replicates, rule.seed)
    figures["replicates"] = drawn.shape[2]
    for column, figure in enumerate(("average_precision", "roc_auc")):
        if len(models) > 1:
            compared = _comparison(models, drawn, column, rule.confidence)
            _enter(figures, figure, compared.challenger)
            _enter(figures, f"champion_{figure}", compared.champion)
            _enter(figures, f"{figure}_difference", compared.difference)
        else:
            _enter(figures, figure, _interval(models[0].figures()[column], drawn[0, column], rule.confidence))
    if len(models) > 1 and 2 <= frauds <= len(label) - 2:
        found = _delong(models[0], models[1], rule.confidence)
        figures["delong_roc_auc_difference"] = found.difference
        for name in ("lower", "upper", "standard_error", "p_value"):
            figures[f"delong_roc_auc_difference_{name}"] = getattr(found, name)
    return figures


def _enter(figures: dict[str, float | int], name: str, interval: Interval) -> None:
    figures[name] = interval.estimate
    for part in ("lower", "upper", "standard_error"):
        figures[f"{name}_{part}"] = getattr(interval, part)


def _basis(figures: dict[str, float | int]) -> str:
    customers = f"{figures['customers']:,} customers"
    if figures["unknown_customer_rows"]:
        customers += f" and {figures['unknown_customer_rows']:,} rows without one"
    return f"{figures['rows']:,} rows with {figures['frauds']:,} frauds, {customers}"


def _own_figures(rule: PromotionRule, figures: dict[str, float | int], basis: str) -> str:
    if "average_precision" not in figures:
        return f"Its quality cannot be told from {basis}."
    parts = [
        f"{name} {figures[key]:.4f} ({100 * rule.confidence:g} % interval {figures[key + '_lower']:.4f} to "
        f"{figures[key + '_upper']:.4f}; of a random order {chance:.4f})"
        for name, key, chance in (
            ("average precision", "average_precision", figures["fraud_share"]),
            ("ROC AUC", "roc_auc", 0.5),
        )
    ]
    return f"On {basis}, it has {' and '.join(parts)}."


def _beats_chance(figures: dict[str, float | int]) -> bool:
    # Average precision alone is no proof: one fraud on top by luck lifts it far above the share of frauds.
    return (
        "average_precision" in figures
        and figures["average_precision_lower"] > figures["fraud_share"]
        and figures["roc_auc_lower"] > 0.5
    )


def _too_few(rule: PromotionRule, figures: dict[str, float | int]) -> str | None:
    if figures["frauds"] < rule.min_frauds:
        return f"The held-out rows have {figures['frauds']:,} frauds, fewer than {rule.min_frauds:,}"
    if figures["fraud_customers"] < MIN_FRAUD_CUSTOMERS:
        return (
            f"The {figures['frauds']:,} held-out frauds are of {figures['fraud_customers']} customers, fewer than "
            f"{MIN_FRAUD_CUSTOMERS}"
        )
    genuine = figures["rows"] - figures["frauds"]
    return f"The held-out rows have {genuine} genuine transactions" if genuine < rule.min_frauds else None


def _has_seen(train_last: date | None, test_first: date | None) -> bool | None:
    if train_last is None or test_first is None:
        return None
    return train_last >= test_first


def _names_beyond(names: tuple[str, ...] | None, others: tuple[str, ...] | None) -> list[str]:
    return [] if names is None or others is None else [name for name in names if name not in others]


def _same_ranking(scores: Scores) -> bool:
    """Whether both models put all rows in the same order, but for the last digits of the scores."""
    import numpy as np

    ours, theirs = _array(scores.challenger), _array(scores.champion)
    # Sums of floats come out differently in the last digits when Spark adds them up in another order.
    if np.allclose(ours, theirs, rtol=1e-9, atol=1e-12):
        return True
    return bool(np.array_equal(_dense_rank(ours), _dense_rank(theirs)))


def average_precision(label: npt.ArrayLike, score: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> float:
    """Average precision: the sum over the distinct scores, from the highest, of (R_i - R_i-1) P_i.

    R_i and P_i are recall and precision of the rows with that score or a higher one, so rows with equal scores
    enter together and nothing is interpolated: the definition of scikit-learn's ``average_precision_score``.

    Args:
        label: 1 for a fraud, 0 for a genuine transaction.
        score: higher means more suspicious.
        weight: how often each row counts, whole numbers from 0; by default once.

    Raises:
        ValueError: there are no frauds or no genuine rows, or an argument is unusable.
    """
    return _weighted(label, score, weight)[0]


def roc_auc(label: npt.ArrayLike, score: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> float:
    """Area under the ROC curve: how often a fraud has a higher score than a genuine row, ties counted half.

    That it equals the Mann-Whitney statistic: Hanley and McNeil, 1982, https://doi.org/10.1148/radiology.143.1.7063747
    Arguments and errors are those of `average_precision`.
    """
    return _weighted(label, score, weight)[1]


def _weighted(label: npt.ArrayLike, score: npt.ArrayLike, weight: npt.ArrayLike | None) -> tuple[float, float]:
    import numpy as np

    labels = _labels(label)
    model = _Ranking.of(labels, _numbers("score", score, len(labels)))
    if weight is None:
        _check_classes(labels)
        return model.figures()
    weights = _numbers("weight", weight, len(labels))
    if (weights < 0).any() or (weights % 1).any():
        raise ValueError("weight takes whole numbers from 0, one for each row")
    _check_classes(labels[weights > 0])
    return model.figures(weights.astype(np.int64)[model.order])


def paired_bootstrap(
    label: npt.ArrayLike,
    challenger: npt.ArrayLike,
    champion: npt.ArrayLike,
    customer_id: npt.ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> PairedBootstrap:
    """Intervals of two models' figures and of their difference, by resampling customers.

    Each replicate gives every customer a weight drawn from a Poisson distribution of mean 1, the same for both
    models, and all the customer's rows get it. That is the bootstrap (Efron, 1979,
    https://doi.org/10.1214/aos/1176344552; percentile interval: Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13) with the multinomial numbers of draws replaced by independent ones, to which
    they tend (Hanley and MacGibbon, 2006, https://doi.org/10.1016/j.cmpb.2006.04.006; Chamandy, Muralidharan,
    Najmi and Naidu, Estimating Uncertainty for Massive Data Streams, Google, 2012). It lets each model's scores
    be sorted once: a replicate is a gather and one pass of sums.

    The interval runs between the percentiles (1 ± confidence) / 2 of the replicates. Replicates without frauds
    or without genuine rows are left out. The order of the rows plays no part: weights belong to the customers
    in the order of their ids, and to the rows without a customer in the order of the scores.

    Args:
        label, challenger, champion, customer_id: as in `Scores`.

    Raises:
        ValueError: an argument is unusable, or there are no frauds or no genuine rows.
    """
    _check_bootstrap(confidence, replicates, seed)
    scores = Scores(label, challenger, champion, customer_id)
    models = _rankings(scores)
    drawn = _replicates(models, _Clusters.of(scores), replicates, seed)
    average_precision, auc = (_comparison(models, drawn, column, confidence) for column in (0, 1))
    return PairedBootstrap(average_precision, auc, drawn.shape[2])


def _comparison(models: list[_Ranking], drawn: Floats, column: int, confidence: float) -> Comparison:
    """Two models by one of their figures; `drawn` is what `_replicates` drew of both."""
    ours, theirs = (model.figures()[column] for model in models)
    return Comparison(
        _interval(ours, drawn[0, column], confidence),
        _interval(theirs, drawn[1, column], confidence),
        _interval(ours - theirs, drawn[0, column] - drawn[1, column], confidence),
    )


def average_precision_interval(
    label: npt.ArrayLike,
    score: npt.ArrayLike,
    customer_id: npt.ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> Interval:
    """Average precision of one model with its interval; arguments, method and errors as in `paired_bootstrap`."""
    _check_bootstrap(confidence, replicates, seed)
    scores = Scores(label, score, None, customer_id)
    models = _rankings(scores)
    drawn = _replicates(models, _Clusters.of(scores), replicates, seed)
    return _interval(models[0].figures()[0], drawn[0, 0], confidence)


def delong(
    label: npt.ArrayLike, challenger: npt.ArrayLike, champion: npt.ArrayLike, *, confidence: float = 0.95
) -> DeLong:
    """Difference of two models' ROC AUC on the same rows, with a standard error that needs no resampling.

    With V_i the share of genuine rows below the i-th of m frauds and W_j the share of frauds above the j-th of
    n genuine rows, ties counted half, the AUC is the mean of V and that of W, and the variance of a difference
    of AUCs is var(ΔV) / m + var(ΔW) / n (DeLong, DeLong and Clarke-Pearson, 1988,
    https://doi.org/10.2307/2531595). V and W come from ranks, hence from one sort per model instead of m * n
    comparisons (Sun and Xu, 2014, https://doi.org/10.1109/LSP.2014.2337313). Interval and p-value are those of
    the normal distribution.

    Rows are taken as independent, so where customers' rows are alike the standard error is too small; that is
    why the bootstrap decides and this is a second figure.

    Raises:
        ValueError: an argument is unusable, or there are fewer than two frauds or two genuine rows.
    """
    _check_confidence(confidence)
    scores = Scores(label, challenger, champion)
    labels = _array(scores.label)
    if not 2 <= labels.sum() <= len(labels) - 2:
        raise ValueError("DeLong's method takes at least two frauds and two genuine rows")
    ours, theirs = _rankings(scores)
    return _delong(ours, theirs, confidence)


def _delong(ours: _Ranking, theirs: _Ranking, confidence: float) -> DeLong:
    fraud_ours, genuine_ours = ours.placements()
    fraud_theirs, genuine_theirs = theirs.placements()
    difference = float((fraud_ours - fraud_theirs).mean())
    variance = (fraud_ours - fraud_theirs).var(ddof=1) / len(fraud_ours)
    variance += (genuine_ours - genuine_theirs).var(ddof=1) / len(genuine_ours)
    error = math.sqrt(variance)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    deviations = abs(difference) / error if error > 0 else 0.0 if difference == 0 else math.inf
    p_value = math.erfc(deviations / math.sqrt(2))
    return DeLong(
        float(fraud_ours.mean()),
        float(fraud_theirs.mean()),
        difference,
        error,
        difference - half,
        difference + half,
        p_value,
    )


class _Ranking(NamedTuple):
    """Rows in descending order of one model's scores, and where the frauds stand in it.

    Only groups of equal scores that have a fraud matter to either figure; the weight of the rows between them
    does, their order does not. `cuts` are the positions where such groups begin and end, without the last row's
    end; `begin` and `end` are each group's indices into the running sums at the cuts.
    """

    order: Integers
    group: Integers
    label: Integers
    frauds: Integers
    first_fraud: Integers
    cuts: Integers
    begin: Integers
    end: Integers

    @staticmethod
    def of(label: npt.ArrayLike, score: npt.ArrayLike) -> _Ranking:
        import numpy as np

        labels, scores = _array(label), _array(score)
        rows = len(labels)
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
        group = np.zeros(rows, np.int64)
        group[starts[1:]] = 1
        np.cumsum(group, out=group)
        frauds = np.flatnonzero(labels[order])
        with_fraud, first_fraud = np.unique(group[frauds], return_index=True)
        bounds = np.append(starts, rows)
        begin, end = bounds[with_fraud], bounds[with_fraud + 1]
        cuts = np.unique(np.concatenate(([0], begin, end)))
        return _Ranking(
            order=order,
            group=group,
            label=labels[order],
            frauds=frauds,
            first_fraud=first_fraud,
            cuts=cuts[cuts < rows],
            begin=np.searchsorted(cuts, begin),
            end=np.searchsorted(cuts, end),
        )

    def figures(self, weight: npt.NDArray[Any] | None = None) -> tuple[float, float]:
        """Average precision and ROC AUC with the weights of the rows in ranked order; NaN if not defined."""
        import numpy as np

        if weight is None:
            weight = np.ones(len(self.order), np.uint8)
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

    def placements(self) -> tuple[Floats, Floats]:
        """Of each fraud, the share of genuine rows below it; of each genuine row, that of the frauds above it.

        Both in the order in which the rows were given.
        """
        import numpy as np

        groups = int(self.group[-1]) + 1
        frauds = np.bincount(self.group, weights=self.label, minlength=groups)
        genuine = np.bincount(self.group, minlength=groups) - frauds
        below = genuine.sum() - np.cumsum(genuine) + genuine / 2
        above = np.cumsum(frauds) - frauds / 2
        placement = np.where(self.label == 1, below[self.group] / genuine.sum(), above[self.group] / frauds.sum())
        given = np.empty(len(placement))
        given[self.order] = placement
        label = np.empty(len(placement), np.int64)
        label[self.order] = self.label
        return given[label == 1], given[label == 0]


class _Clusters(NamedTuple):
    """What is resampled: the number of each row's cluster, how many there are, how many are known customers."""

    codes: Integers
    number: int
    customers: int

    @staticmethod
    def of(scores: Scores) -> _Clusters:
        import numpy as np

        label = _array(scores.label)
        rows = len(label)
        codes = np.empty(rows, np.int64)
        unknown = np.ones(rows, bool)
        customers = 0
        if scores.customer_id is not None:
            ids = _array(scores.customer_id)
            unknown = np.isnan(ids)
            known, codes[~unknown] = np.unique(ids[~unknown], return_inverse=True)
            customers = len(known)
        lone = np.flatnonzero(unknown)
        # Rows that are equal in all of these are interchangeable, so the order of the rows plays no part.
        first = _dense_rank(_array(scores.challenger)[lone])
        second = first if scores.champion is None else _dense_rank(_array(scores.champion)[lone])
        order = np.lexsort((first, first + second, label[lone]))
        codes[lone[order]] = customers + np.arange(len(lone))
        return _Clusters(codes, customers + len(lone), customers)


def _replicates(models: list[_Ranking], clusters: _Clusters, replicates: int, seed: int) -> Floats:
    """Average precision and ROC AUC of each replicate: (model, figure, replicate), undefined ones left out."""
    import numpy as np

    table = _poisson_table()
    # Raw words of a named generator, because numpy keeps these the same from version to version.
    generator = np.random.PCG64(seed)
    codes = [clusters.codes[model.order] for model in models]
    drawn = np.empty((len(models), 2, replicates))
    for replicate in range(replicates):
        words = generator.random_raw(clusters.number // 4 + 1).astype("<u8", copy=False)
        weights = table[words.view("<u2")[: clusters.number]]
        for number, model in enumerate(models):
            drawn[number, :, replicate] = model.figures(weights[codes[number]])
    defined = drawn[:, :, ~np.isnan(drawn[0, 0])]
    if defined.shape[2] == 0:
        raise ValueError("no replicate has both frauds and genuine rows: there are too few customers to resample")
    return defined


def _poisson_table() -> npt.NDArray[np.uint8]:
    """A Poisson(1) variate for each 16-bit word: the inverse of the distribution function on a grid of 65,536."""
    import numpy as np

    table = np.zeros(1 << 16, np.uint8)
    below = 0.0
    for value in range(20):
        table[round(below * (1 << 16)) :] = value
        below += math.exp(-1) / math.factorial(value)
    return table


def _interval(estimate: float, drawn: Floats, confidence: float) -> Interval:
    import numpy as np

    lower, upper = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    error = drawn.std(ddof=1) if len(drawn) > 1 else 0.0
    return Interval(float(estimate), float(lower), float(upper), float(error))


def _rankings(scores: Scores) -> list[_Ranking]:
    _check_classes(_array(scores.label))
    return [_Ranking.of(scores.label, score) for score in (scores.challenger, scores.champion) if score is not None]


def _dense_rank(values: Floats) -> Integers:
    import numpy as np

    return np.unique(values, return_inverse=True)[1]


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it takes a share between 0 and 1, such as 0.95")


def _check_bootstrap(confidence: float, replicates: int, seed: int) -> None:
    _check_confidence(confidence)
    # The tolerance is for shares such as 0.95, whose complement is no exact binary number.
    needed = math.ceil(2 * MIN_TAIL_REPLICATES / (1 - confidence) - 1e-6)
    if not replicates >= needed:
        raise ValueError(
            f"replicates is {replicates}: an interval with confidence {confidence:g} takes {needed:,} or more"
        )
    if not seed >= 0:
        raise ValueError(f"seed is {seed}: it takes a whole number from 0")


def _check_classes(label: npt.NDArray[Any]) -> None:
    if label.sum() in (0, len(label)):
        raise ValueError("the figures are not defined without frauds or without genuine rows: take more rows")


def _array(values: Any) -> npt.NDArray[Any]:
    import numpy as np

    return np.asarray(values)


def _labels(values: npt.ArrayLike) -> Integers:
    import numpy as np

    label = np.asarray(values)
    if label.ndim != 1:
        raise ValueError("label takes an array with one element per row")
    if not np.isin(label, (0, 1)).all():
        raise ValueError("label takes 1 for a fraud and 0 for a genuine transaction, nothing else")
    return label.astype(np.int64)


def _numbers(name: str, values: npt.ArrayLike, rows: int) -> Floats:
    import numpy as np

    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (rows,):
        raise ValueError(f"{name} takes one number for each of the {rows:,} rows, not shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} has {(~np.isfinite(numbers)).sum():,} rows without a finite number")
    return numbers


def _customers(values: npt.ArrayLike, rows: int) -> npt.NDArray[Any]:
    import numpy as np

    customers = np.asarray(values)
    if customers.shape != (rows,):
        raise ValueError(f"customer_id takes one element for each of the {rows:,} rows, not shape {customers.shape}")
    if customers.dtype.kind not in "iuf":
        try:
            customers = customers.astype(np.float64)  # None becomes NaN
        except (TypeError, ValueError):
            raise ValueError("customer_id takes numbers, and NaN or None where the customer is unknown") from None
    return customers
